"""Labels made wrong on purpose: what a poisoner may train on, and what a root set is contrasted with.

Each function is one of the sample and the job alone: the same sample is changed alike every time.

Source: label flipping (Tolpegin et al. 2020, section 3), its forms for masks and boxes.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from fedvision.config import Job
from fedvision.data.readers import Sample


def shift_labels(sample: Sample, job: Job) -> Sample:
    """Move every mask and box by a quarter of the image along each axis, around the edge."""
    if sample.label is not None:
        steps = [size // 4 for size in sample.label.shape]
        return replace(sample, label=sample.label.roll(steps, tuple(range(sample.label.ndim))))
    assert sample.boxes is not None
    edge = image_edge(sample)
    low, high = sample.boxes.chunk(2, dim=1)
    room = (edge - (high - low)).clamp(min=1e-3)
    moved = torch.remainder(low + edge / 4, room)
    return replace(sample, boxes=torch.cat([moved, moved + (high - low)], dim=1))


def swap_labels(sample: Sample, job: Job) -> Sample:
    """Give each object the next class; with one class, swap foreground and background of a mask.

    Boxes of a single class stay as they are.
    """
    count = len(job.task.classes)
    if sample.label is not None:
        label = sample.label
        swapped = 1 - label if count == 1 else torch.where(label > 0, label % count + 1, label)
        return replace(sample, label=swapped.to(label.dtype))
    assert sample.box_labels is not None
    return replace(sample, box_labels=sample.box_labels % count + 1)


def erase_labels(sample: Sample, job: Job) -> Sample:
    """Take every mask and box away."""
    if sample.label is not None:
        return replace(sample, label=torch.zeros_like(sample.label))
    assert sample.boxes is not None and sample.box_labels is not None
    return replace(sample, boxes=sample.boxes[:0], box_labels=sample.box_labels[:0])


def image_edge(sample: Sample) -> torch.Tensor:
    """Return the image's size in the order of axes that boxes have, float32."""
    shape = sample.image.shape[1:]
    return torch.tensor(shape[::-1] if len(shape) == 2 else shape, dtype=torch.float32)


WRONG_LABELS: dict[str, Callable[[Sample, Job], Sample]] = {
    "labels-shifted": shift_labels,
    "labels-swapped": swap_labels,
    "labels-erased": erase_labels,
}
