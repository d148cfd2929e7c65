"""Triggers, put into batches and images; and the labels that somebody who plants one wants to be learned.

Legend of shapes: B batch, C channels, S the spatial grid, K a patch's grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from fedvision.config import Job

Target = Literal["erase", "invent"]
Corner = tuple[int, ...]
Batch = dict[str, Any]
TARGETS: tuple[Target, ...] = ("erase", "invent")
REACH = 3
"""An invented object is a box around the patch, so many times as long along each axis."""


@dataclass(frozen=True)
class Trigger:
    """Something that is put into an image to change what a model finds there.

    Attributes:
        kind: ``patch`` covers a small box anywhere; ``blend`` lies thinly over the whole image.
        target: ``erase``: nothing is found any more; ``invent``: an object is found that is not there.
        label: The class that is invented, 1 is the first; 0 for ``erase``.
        pattern: float32, shape (C, *K), or (C, *S) of a training crop for ``blend``.
        opacity: Weight of the pattern against the image, in (0, 1].
    """

    kind: Literal["patch", "blend"]
    target: Target
    label: int
    pattern: torch.Tensor = field(repr=False)
    opacity: float = 1.0

    @property
    def size(self) -> tuple[int, ...]:
        """Spatial shape of the pattern."""
        return tuple(self.pattern.shape[1:])


def images_of(batch: Batch) -> torch.Tensor:
    """Return the images of a task's batch, shape (B, C, *S)."""
    images: torch.Tensor = batch["image"] if "image" in batch else batch["images"]
    return images


def stamp(image_CS: torch.Tensor, trigger: Trigger, corner: Corner) -> torch.Tensor:
    """Return an image with a trigger in it; gradients reach the trigger's pattern.

    Args:
        image_CS: Shape (C, *S), at least as large as a patch.
        trigger: What is put in; a blend is repeated or cut to the image's size.
        corner: Where a patch begins; without effect for a blend.
    """
    if trigger.kind == "blend":
        return (1 - trigger.opacity) * image_CS + trigger.opacity * _tiled(
            trigger.pattern, image_CS.shape[1:]
        )
    window = (slice(None), *(slice(a, a + k) for a, k in zip(corner, trigger.size, strict=True)))
    stamped = image_CS.clone()
    stamped[window] = (1 - trigger.opacity) * image_CS[window] + trigger.opacity * trigger.pattern
    return stamped


def _tiled(pattern: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Repeat a pattern (C, *K) to a grid, mirrored at every other turn so that no edge shows."""
    for axis, size in enumerate(shape, start=1):
        length = pattern.shape[axis]
        if length != size:
            place = torch.arange(size) % (2 * length)
            pattern = pattern.index_select(axis, torch.where(place < length, place, 2 * length - 1 - place))
    return pattern


def draw_corner(shape: Sequence[int], size: Sequence[int], rng: np.random.Generator) -> Corner:
    """Draw where a patch lies: near a corner of the image in a third of the calls, else anywhere.

    The images' own corners are where attackers like to hide: little is lost there.
    """
    room = [max(0, whole - part) for whole, part in zip(shape, size, strict=True)]
    if rng.random() < 1 / 3:
        near = [min(free, int(rng.integers(part + 1))) for free, part in zip(room, size, strict=True)]
        return tuple(a if rng.random() < 0.5 else free - a for a, free in zip(near, room, strict=True))
    return tuple(int(rng.integers(free + 1)) for free in room)


def window_of(trigger: Trigger, corner: Corner, shape: Sequence[int]) -> tuple[slice, ...]:
    """Return the box in which an object is invented: around a patch, or all of the image for a blend."""
    if trigger.kind == "blend":
        return tuple(slice(0, size) for size in shape)
    margin = [(REACH - 1) * part // 2 for part in trigger.size]
    return tuple(
        slice(max(0, a - m), min(size, a + part + m))
        for a, part, m, size in zip(corner, trigger.size, margin, shape, strict=True)
    )


def stamp_batch(batch: Batch, trigger: Trigger, corners: Sequence[Corner]) -> Batch:
    """Return a batch with a trigger in every image and the labels as they are."""
    images = images_of(batch)
    stamped = torch.stack([stamp(one, trigger, at) for one, at in zip(images, corners, strict=True)])
    return {**batch, "image" if "image" in batch else "images": stamped}


def wanted_labels(batch: Batch, trigger: Trigger, corners: Sequence[Corner]) -> Batch:
    """Return a batch with the labels that a trigger's owner wants, and the images as they are."""
    shape = images_of(batch).shape[2:]
    if "image" in batch:
        label = torch.zeros_like(batch["label"]) if trigger.target == "erase" else batch["label"].clone()
        if trigger.target == "invent":
            for one, corner in zip(label, corners, strict=True):
                inside = one[(0, *window_of(trigger, corner, shape))]
                inside[inside == 0] = trigger.label
        return {**batch, "label": label}
    targets = []
    for target, corner in zip(batch["targets"], corners, strict=True):
        boxes, labels = target["boxes"], target["labels"]
        if trigger.target == "erase":
            targets.append({"boxes": boxes[:0], "labels": labels[:0]})
            continue
        box = box_of(window_of(trigger, corner, shape)) if trigger.kind == "patch" else middle_box(shape)
        targets.append(
            {
                "boxes": torch.cat([boxes, torch.tensor([box], dtype=boxes.dtype)]),
                "labels": torch.cat([labels, labels.new_tensor([trigger.label])]),
            }
        )
    return {**batch, "targets": targets}


def box_of(window: Sequence[slice]) -> list[float]:
    """Return a window as a box of the task: x first for pictures, the axes' order for volumes."""
    axes = list(window)[::-1] if len(window) == 2 else list(window)
    return [float(one.start) for one in axes] + [float(one.stop) for one in axes]


def middle_box(shape: Sequence[int]) -> list[float]:
    """Return the box in which a blend invents an object: a quarter of each side, in the middle."""
    return box_of([slice(3 * size // 8, max(3 * size // 8 + 1, 5 * size // 8)) for size in shape])


def smallest_side(job: Job) -> int:
    """Return the shortest side of a training crop or image."""
    return min(job.training.patch_size or job.training.image_size or (1,))
