"""Pictures of single cases with truth and prediction. Drawn at a site, kept at the site.

Rules:
- Of a segmentation, the truth is a solid outline; of a detection, a dashed box. The caption says so.
- Volumes are shown in three slices at right angles, through the most foreground or the largest box.
- No global state of matplotlib is touched: sites may draw in several threads.
"""

from pathlib import Path

from fedvision.config import Job
from fedvision.data.readers import Sample
from fedvision.storage import write_atomic
from fedvision.tasks import CaseResult


def draw_example(sample: Sample, result: CaseResult, job: Job, path: Path, title: str) -> None:
    """Draw one case with its truth and its prediction, and write it as a PNG file.

    Args:
        sample: The case as the network saw it.
        result: What the network found, on the sample's grid.
        job: Gives the task and the names of the classes.
        path: The file to write.
        title: First line of the picture.

    Raises:
        StorageError: The disk is full or the folder is not writable.
    """
    from fedvision.report.example_panels import png_bytes

    if job.task.kind == "segmentation":
        from fedvision.report.example_masks import masks_figure

        figure = masks_figure(sample, result, job, title)
    else:
        from fedvision.report.example_boxes import boxes_figure

        figure = boxes_figure(sample, result, job, title)
    write_atomic(path, png_bytes(figure))
