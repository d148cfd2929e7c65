"""Example pictures of detections: boxes of truth and prediction, with classes and scores."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedvision.config import Job
from fedvision.data.readers import Sample
from fedvision.report.example_panels import (
    DASHES,
    INK,
    PAGE,
    Picture,
    class_colour,
    class_entries,
    cut,
    display_range,
    line,
    make_panels,
    picture_of,
    show,
    stretch,
    zoom,
)
from fedvision.report.notation import counted, is_number, metric_text
from fedvision.tasks import CaseResult
from fedvision.tasks.detection_metrics import OPERATING_SCORE

_NAMED_BOXES = 12
_SCORED_BOXES = 40


def boxes_figure(sample: Sample, result: CaseResult, job: Job, title: str) -> Any:
    """Return the figure of a case with boxes.

    A picture is shown as it is and with its boxes; a volume in three slices through the largest box.
    Only predictions that count for the case's own score are drawn.
    """
    assert sample.boxes is not None and sample.box_labels is not None
    truth = (sample.boxes.numpy(), sample.box_labels.numpy())
    is_shown = result.prediction["scores"] >= OPERATING_SCORE
    boxes, labels, scores = (result.prediction[key][is_shown] for key in ("boxes", "labels", "scores"))
    present = sorted({int(k) for k in (*truth[1], *labels) if 0 < k <= len(job.task.classes)})
    hidden = int((~is_shown).sum())
    note = f"prediction with score {OPERATING_SCORE:g} or more" + (f" ({hidden} below)" if hidden else "")
    captions = [class_entries(result, job, present), [(line(INK, DASHES), "truth"), (line(INK, "-"), note)]]
    if len(sample.spacing_mm) == 2:
        image = picture_of(sample.image.numpy())
        rows, columns = image.shape[:2]
        figure, panels = make_panels((1, 2), rows / columns, title, _score_text(result), captions)
        show(panels[0], image, "image")
        show(panels[1], image, "boxes")
        _draw_boxes(panels[1], *truth, None, job)
        _draw_boxes(panels[1], boxes, labels, scores, job)
        return figure
    figure, panels = make_panels((1, 3), 1.0, title, _score_text(result), captions)
    volume = sample.image[0].numpy()
    grid, shown = volume.shape, display_range(volume)
    target = _largest(truth[0] if len(truth[0]) else boxes[:1], grid)
    for axis, axes in zip((2, 1, 0), panels, strict=True):
        index = int(np.clip((target[axis] + target[axis + 3]) / 2, 0, grid[axis] - 1))
        picture = stretch(cut(volume, axis, index), shown)
        across, up = (sample.spacing_mm[other] for other in range(3) if other != axis)
        show(axes, picture, f"axis {axis + 1}, slice {index + 1} of {grid[axis]}", up / across)
        for them, of_class, sure in ((*truth, None), (boxes, labels, scores)):
            meets = (them[:, axis] <= index + 0.5) & (them[:, axis + 3] >= index + 0.5)
            _draw_boxes(
                axes,
                _on_slice(them[meets], axis, grid),
                of_class[meets],
                None if sure is None else sure[meets],
                job,
            )
        region = _on_slice(target[None], axis, grid)[0]
        zoom(axes, picture.shape, region[:2], region[2:])
    return figure


def _score_text(result: CaseResult) -> str:
    """Return what was found, missed and invented in the whole case."""
    counts = [result.values.get(key) for key in ("hits", "misses", "false_positives")]
    if not all(map(is_number, counts)):
        return f"score {metric_text(result.score, 'score')}"
    found, missed, extra = (int(count or 0) for count in counts)
    return f"{found} found, {missed} missed, {counted(extra, 'false positive')}"


def _largest(boxes: Picture, grid: Sequence[int]) -> Picture:
    """Return the largest box, or the whole grid where there is none."""
    if not len(boxes):
        return np.array([0.0] * len(grid) + list(grid))
    dims = len(grid)
    chosen: Picture = boxes[np.prod(boxes[:, dims:] - boxes[:, :dims], axis=1).argmax()]
    return chosen


def _on_slice(boxes: Picture, axis: int, grid: Sequence[int]) -> Picture:
    """Return boxes of a volume as (x1, y1, x2, y2) on a slice that ``cut`` made."""
    across, up = (other for other in range(3) if other != axis)
    flat = np.stack(
        [boxes[:, across], grid[up] - boxes[:, up + 3], boxes[:, across + 3], grid[up] - boxes[:, up]], axis=1
    )
    result: Picture = flat
    return result


def _draw_boxes(axes: Any, boxes: Picture, labels: Picture, scores: Picture | None, job: Job) -> None:
    """Draw boxes (x1, y1, x2, y2): truth dashed; predictions, which have scores, solid with a label."""
    from matplotlib.patches import Rectangle

    for place, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        x1, y1, x2, y2 = (float(side) for side in box)
        colour = class_colour(int(label))
        style: Any = DASHES if scores is None else "-"
        width = 1.5 if scores is None else 1.2
        if scores is None:
            axes.add_patch(
                Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=PAGE, linewidth=2.4, alpha=0.5)
            )
        axes.add_patch(
            Rectangle(
                (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=width, linestyle=style
            )
        )
        if scores is None or len(boxes) > _SCORED_BOXES:
            continue
        name = f"{job.task.classes[int(label) - 1]} " if len(boxes) <= _NAMED_BOXES else ""
        axes.annotate(
            f"{name}{scores[place]:.2f}",
            (max(x1, 0), max(y1, 0)),
            xytext=(1, -1 if y1 < 8 else 1),
            textcoords="offset points",
            va="top" if y1 < 8 else "bottom",
            fontsize=7,
            color=PAGE,
            parse_math=False,
            annotation_clip=True,
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.0, "alpha": 0.9},
        )
