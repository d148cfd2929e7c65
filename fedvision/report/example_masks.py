"""Example pictures of segmentations: outlines of truth and prediction, and a map of the errors."""

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
    square,
    stretch,
    zoom,
)
from fedvision.report.notation import metric_text
from fedvision.report.palette import CONFUSED_COLOUR, EXTRA_COLOUR, MISSED_COLOUR
from fedvision.tasks import CaseResult

_MAX_PIXELS = 900


def masks_figure(sample: Sample, result: CaseResult, job: Job, title: str) -> Any:
    """Return the figure of a segmented case.

    A picture is shown as it is, with outlines, and with its errors; a volume in three slices with
    outlines, and below with errors.
    """
    assert sample.label is not None
    truth, found = sample.label.numpy(), result.prediction["label"]
    counts = np.bincount(truth.ravel(), minlength=256) + np.bincount(found.ravel(), minlength=256)
    present = [label for label in range(1, len(job.task.classes) + 1) if counts[label]]
    captions = [class_entries(result, job, present), _key(job)]
    score = f"Dice {metric_text(result.score, 'dice')}"
    if truth.ndim == 2:
        step = 1 + (max(truth.shape) - 1) // _MAX_PIXELS
        image = picture_of(sample.image.numpy()[:, ::step, ::step])
        truth, found = truth[::step, ::step], found[::step, ::step]
        figure, panels = make_panels((1, 3), truth.shape[0] / truth.shape[1], title, score, captions)
        show(panels[0], image, "image")
        show(panels[1], image, "outlines")
        _draw_outlines(panels[1], truth, found, present)
        show(panels[2], _error_picture(image, truth, found), "errors")
        return figure
    volume = sample.image[0].numpy()
    shown = display_range(volume)
    views = _views(truth, found)
    figure, panels = make_panels((2, 3), 0.85, title, score, captions)
    for (axis, index), above, below in zip(views, panels[:3], panels[3:], strict=True):
        picture = stretch(cut(volume, axis, index), shown)
        inside, guess = cut(truth, axis, index), cut(found, axis, index)
        across, up = (sample.spacing_mm[other] for other in range(3) if other != axis)
        show(
            above,
            picture,
            f"outlines, axis {axis + 1}, slice {index + 1} of {truth.shape[axis]}",
            up / across,
        )
        _draw_outlines(above, inside, guess, present)
        show(below, _error_picture(picture, inside, guess), "errors", up / across)
        rows, columns = np.nonzero((inside > 0) | (guess > 0))
        if len(rows):
            low, high = np.array([columns.min(), rows.min()]), np.array([columns.max(), rows.max()]) + 1
            for axes in (above, below):
                zoom(axes, inside.shape, low, high)
    return figure


def _key(job: Job) -> list[tuple[Any, str]]:
    """Return the caption's entries that say what lines and error colours mean."""
    errors = [(MISSED_COLOUR, "missed"), (EXTRA_COLOUR, "too much")]
    if len(job.task.classes) > 1:
        errors.append((CONFUSED_COLOUR, "wrong class"))
    return [
        (line(class_colour(1), "-"), "truth, in the colour of its class"),
        (line(INK, DASHES), "prediction"),
        *((square(colour), text) for colour, text in errors),
    ]


def _draw_outlines(axes: Any, truth: Picture, found: Picture, classes: Sequence[int]) -> None:
    """Draw the outlines of every class: truth solid in its colour, prediction dashed and light."""
    from matplotlib.patheffects import withStroke

    rows, columns = truth.shape
    if min(rows, columns) < 2:
        return
    x, y = np.arange(columns) + 0.5, np.arange(rows) + 0.5
    shade = [withStroke(linewidth=2.6, foreground=PAGE, alpha=0.55)]
    for label in classes:
        for labels, colour, style in ((truth, class_colour(label), "-"), (found, INK, DASHES)):
            mask = labels == label
            if mask.any() and not mask.all():
                level = {"levels": [0.5], "linewidths": 1.2, "linestyles": [style], "colors": [colour]}
                axes.contour(x, y, mask.astype(np.float32), **level).set_path_effects(shade)


def _error_picture(image: Picture, truth: Picture, found: Picture) -> Picture:
    """Return the image dimmed, right foreground lighter, wrong pixels in colour; shape (rows, cols, 3)."""
    grey = image.mean(axis=-1) if image.ndim == 3 else image
    picture = np.repeat((0.5 * grey)[..., None], 3, axis=-1)
    right = (truth == found) & (truth > 0)
    picture[right] = 0.5 * picture[right] + 0.35
    for wrong, colour in (
        ((truth > 0) & (found == 0), MISSED_COLOUR),
        ((truth == 0) & (found > 0), EXTRA_COLOUR),
        ((truth > 0) & (found > 0) & (truth != found), CONFUSED_COLOUR),
    ):
        picture[wrong] = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return picture


def _views(truth: Picture, found: Picture) -> list[tuple[int, int]]:
    """Return axis and index of three slices at right angles, each through the most foreground."""
    foreground = truth if truth.any() else found
    views = []
    for axis in (2, 1, 0):
        counts = np.count_nonzero(foreground, axis=tuple(other for other in range(3) if other != axis))
        views.append((axis, int(counts.argmax()) if counts.any() else truth.shape[axis] // 2))
    return views
