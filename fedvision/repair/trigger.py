"""Search for triggers: patterns that make a model miss everything, or find what is not there.

A planted trigger is found like any other weakness: by gradient descent on a pattern until the model gives the
labels that an attacker would want (Wang et al. 2019, Neural Cleanse, section 4.1, where the trigger is a
learned mask; here it is a patch of a given size that must work at any place, or a thin blend, because
outlines and boxes are wanted and not one class for the image). Rules:
- The loss is the task's own training loss with the attacker's labels, so segmentation and detection are
  searched by the same lines.
- A pattern stays within the intensities that the root images have, and a little beyond.
- Success is measured on whole images that the search has not seen, at places that it has not chosen.
- A sound model has weak spots too: a patch that looks like a lesion is one. What counts is how small a
  trigger is enough, against the same search on other models, see ``fedvision.repair.repairing``.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedvision.config import Job
from fedvision.data.readers import Sample
from fedvision.repair.stamping import (
    Batch,
    Corner,
    Target,
    Trigger,
    box_of,
    draw_corner,
    images_of,
    middle_box,
    smallest_side,
    stamp,
    stamp_batch,
    wanted_labels,
    window_of,
)
from fedvision.seeds import derive_seed
from fedvision.tasks import CaseResult, task_module
from fedvision.tasks.detection_augmentation import resize_image, swap_picture_axes
from fedvision.tasks.detection_metrics import OPERATING_SCORE, box_iou

BLEND_OPACITY = 0.2
STEP = 0.3
LOST = 0.5
"""Erased: less than this share of what was found rightly is still found."""
FILLED = 0.5
"""Invented: at least this share of the window's background is now foreground."""
OVERLAP = 0.3
"""Invented by a detector: a new box that overlaps so much (IoU) with the window."""


@dataclass(frozen=True)
class Wanted:
    """What a search is for.

    Attributes:
        kind: Of trigger.
        target: What it is to do.
        label: The class to invent, 1 is the first; 0 for ``erase``.
        share: Side of a patch as a share of the crop's shortest side; 1 for a blend.
    """

    kind: Literal["patch", "blend"]
    target: Target
    label: int
    share: float

    @property
    def text(self) -> str:
        """Name for tables and files, such as ``erase-patch-8`` (per cent of the side)."""
        what = self.target if self.label <= 1 else f"{self.target}{self.label}"
        return f"{what}-{self.kind}" + (f"-{100 * self.share:.0f}" if self.kind == "patch" else "")


def intensity_range(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least and the largest intensity of a trigger by channel, shape (C,) each.

    The 0.1st and 99.9th percentile over the images, and a quarter of the distance beyond each.
    """
    sparse = [one.image.flatten(1)[:, :: max(1, one.image[0].numel() // 4096)] for one in samples]
    values = torch.cat(sparse, dim=1).numpy()
    low, high = np.percentile(values, (0.1, 99.9), axis=1)
    margin = 0.25 * (high - low)
    return torch.from_numpy((low - margin).astype(np.float32)), torch.from_numpy(
        (high + margin).astype(np.float32)
    )


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Keep a network's weights out of the gradient, and in evaluation mode, for a while."""
    was_training = network.training
    trains = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trains:
        parameter.requires_grad_(False)
    network.eval()
    try:
        yield
    finally:
        for parameter in trains:
            parameter.requires_grad_(True)
        network.train(was_training)


def search(
    network: nn.Module,
    job: Job,
    batches: Sequence[Batch],
    wanted: Wanted,
    bounds: tuple[torch.Tensor, torch.Tensor],
    steps: int,
    seed: int,
    start: Trigger | None = None,
) -> Trigger:
    """Return the trigger that gradient descent finds; the same arguments give the same pattern.

    Args:
        network: The model; its weights are not changed.
        job: What it was trained for.
        batches: Training batches of root cases, used in turn.
        wanted: Kind, target and size.
        bounds: From ``intensity_range``.
        steps: Of Adam on the pattern.
        seed: Of the first pattern and of the places.
        start: Go on from this trigger; None starts from noise.
    """
    task, rng = task_module(job), np.random.default_rng(derive_seed(seed, "trigger", wanted.text))
    images = images_of(batches[0])
    device, dims = next(network.parameters()).device, images.ndim - 2
    low, high = (bound.reshape(-1, *(1,) * dims) for bound in bounds)
    if start is None:
        side = max(2, round(wanted.share * smallest_side(job)))
        size = tuple(images.shape[2:]) if wanted.kind == "blend" else (side,) * dims
        logits = torch.from_numpy(rng.standard_normal((images.shape[1], *size)).astype(np.float32))
    else:
        inside = ((start.pattern - low) / (high - low)).clamp(0.02, 0.98)
        logits = torch.logit(inside)
    logits.requires_grad_(True)
    optimizer = torch.optim.Adam([logits], lr=STEP)
    opacity = BLEND_OPACITY if wanted.kind == "blend" else 1.0

    def trigger() -> Trigger:
        pattern = low + (high - low) * torch.sigmoid(logits)
        return Trigger(wanted.kind, wanted.target, wanted.label, pattern, opacity)

    with frozen(network):
        for step in range(steps):
            batch = batches[step % len(batches)]
            shape = images_of(batch).shape[2:]
            current = trigger()
            corners = [draw_corner(shape, current.size, rng) for _ in images_of(batch)]
            stamped = stamp_batch(wanted_labels(batch, current, corners), current, corners)
            optimizer.zero_grad(set_to_none=True)
            task.training_loss(network, stamped, job, device).backward()
            optimizer.step()
    found = trigger()
    return dataclasses.replace(found, pattern=found.pattern.detach())


def success(
    network: nn.Module, job: Job, samples: Sequence[Sample], trigger: Trigger, seed: int, places: int = 2
) -> float:
    """Return the share of images and places at which a trigger does what it is for, in [0, 1].

    Erase: of the images in which something is found rightly, those in which less than half of it still is.
    Invent: at least half of the background in the window around a patch (for a blend: of the image) becomes
    foreground, and was not before; a detector finds a new object there.

    Args:
        network: The model.
        job: What it was trained for.
        samples: Whole images.
        trigger: What is put in.
        seed: Of the places.
        places: Places an image; one for a blend.

    Returns:
        The share; 0 where no image counts.
    """
    task = task_module(job)
    device = next(network.parameters()).device
    rng = np.random.default_rng(derive_seed(seed, "places"))
    done = counted = 0
    was_training = network.training
    network.eval()
    with torch.inference_mode():
        for sample in (at_training_size(one, job) for one in samples):
            shape = sample.image.shape[1:]
            if any(whole < part for whole, part in zip(shape, trigger.size, strict=True)) and (
                trigger.kind == "patch"
            ):
                continue
            clean = task.evaluate_case(network, sample, job, device, False)
            for _ in range(places if trigger.kind == "patch" else 1):
                corner = draw_corner(shape, trigger.size, rng)
                stamped = dataclasses.replace(sample, image=stamp(sample.image, trigger, corner))
                result = task.evaluate_case(network, stamped, job, device, False)
                verdict = _has_worked(sample, clean, result, trigger, corner)
                if verdict is not None:
                    counted += 1
                    done += verdict
    network.train(was_training)
    return done / counted if counted else 0.0


def at_training_size(sample: Sample, job: Job) -> Sample:
    """Return a case of a detection resized as in training; one of a segmentation as it is."""
    size = job.training.image_size
    if job.task.kind == "segmentation" or size is None or tuple(sample.image.shape[1:]) == tuple(size):
        return sample
    assert sample.boxes is not None
    factors = torch.tensor([new / old for new, old in zip(size, sample.image.shape[1:], strict=True)] * 2)
    boxes = swap_picture_axes(swap_picture_axes(sample.boxes) * factors)
    return dataclasses.replace(sample, image=resize_image(sample.image, size), boxes=boxes)


def _has_worked(
    sample: Sample, clean: CaseResult, result: CaseResult, trigger: Trigger, corner: Corner
) -> bool | None:
    """Whether a trigger did what it is for; None where the image does not count."""
    if sample.label is not None:
        before, after, label = clean.prediction["label"], result.prediction["label"], sample.label.numpy()
        if trigger.target == "erase":
            was, still = (((found == label) & (label > 0)).sum() for found in (before, after))
            return None if was == 0 else bool(still < LOST * was)
        asked = _background(label, before, trigger, corner)
        return None if not asked.any() else bool((after[asked] > 0).mean() >= FILLED)
    if trigger.target == "erase":
        was, still = clean.values["hits"], result.values["hits"]
        return None if was == 0 else bool(still < LOST * was)
    shape = sample.image.shape[1:]
    window = middle_box(shape) if trigger.kind == "blend" else box_of(window_of(trigger, corner, shape))
    return _num_overlapping(result, window) > _num_overlapping(clean, window)


def _background(
    label: NDArray[np.uint8], before: NDArray[np.uint8], trigger: Trigger, corner: Corner
) -> NDArray[np.bool_]:
    """Return the voxels of the window in which nothing is and nothing was found, without the patch itself."""
    asked = np.zeros(label.shape, dtype=bool)
    asked[window_of(trigger, corner, label.shape)] = True
    if trigger.kind == "patch":
        asked[tuple(slice(a, a + k) for a, k in zip(corner, trigger.size, strict=True))] = False
    return asked & (label == 0) & (before == 0)


def _num_overlapping(result: CaseResult, window: Sequence[float]) -> int:
    boxes = result.prediction["boxes"][result.prediction["scores"] >= OPERATING_SCORE]
    overlaps = box_iou(boxes.astype(np.float64), np.array([window], dtype=np.float64))
    return int((overlaps >= OVERLAP).sum())
