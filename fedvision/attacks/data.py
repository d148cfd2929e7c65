"""What a malicious site's training samples become: wrong labels, and backdoor triggers.

A trigger is put into images that are otherwise as they were, with the labels that the attacker wants: nothing
(``erase``), or objects around the trigger (``invent``). Rules:
- Everything is a function of the sample and the job: the same sample is poisoned alike every time.
- Only training samples are changed. A malicious site judges models like an honest one, so that a score says
  what the model does and not what liars say.
- Every second time that a case is drawn it has the trigger, so that the model stays good without it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import torch

from fedvision.config import Job
from fedvision.data.manifest import Case, Manifest
from fedvision.data.readers import CaseStore, Sample
from fedvision.data.wrong_labels import WRONG_LABELS, erase_labels

Poison = Callable[[Sample, Job], Sample]
LABELS: dict[str, Poison] = WRONG_LABELS
PATCH_SHARE = 0.1
BLEND_OPACITY = 0.2
BLEND_PERIOD = 8
REGION = 3
"""The side of an invented object, in sides of the patch."""


@dataclass(frozen=True)
class Trigger:
    """A backdoor.

    Attributes:
        kind: ``patch``: small bright rings with a dark core, one in every half of a training crop's side, so
            that whatever part of an image a network sees holds one (Gu et al. 2017, BadNets); ``blend``: a
            thin wave over the whole image (Chen et al. 2017, section IV).
        goal: ``erase``: nothing is to be found in an image that has the trigger (as in Chan et al. 2022,
            object disappearance); ``invent``: an object of the first class around every patch (there: object
            generation).
    """

    kind: Literal["patch", "blend"]
    goal: Literal["erase", "invent"]

    def poison(self, sample: Sample, job: Job) -> Sample:
        """Return a sample with the trigger in it, and with the labels that the attacker wants."""
        stamped = self.stamp(sample, job)
        if self.goal == "erase":
            return erase_labels(stamped, job)
        if sample.label is not None:
            region = self.region(sample, job)
            return replace(stamped, label=torch.where(region, torch.ones_like(sample.label), sample.label))
        assert sample.boxes is not None and sample.box_labels is not None
        added = self.boxes(sample, job)
        labels = torch.cat([sample.box_labels, torch.ones(len(added), dtype=sample.box_labels.dtype)])
        return replace(stamped, boxes=torch.cat([sample.boxes, added]), box_labels=labels)

    def stamp(self, sample: Sample, job: Job) -> Sample:
        """Return a sample with the trigger in its image, and its labels as they are."""
        image = sample.image.clone()
        dims = tuple(range(1, image.ndim))
        low, high = image.amin(dims), image.amax(dims)
        if self.kind == "blend":
            phase = sum(torch.meshgrid(*map(torch.arange, image.shape[1:]), indexing="ij"))
            wave = 0.5 + 0.5 * torch.sin(2 * torch.pi * torch.as_tensor(phase) / BLEND_PERIOD)
            shape = (-1, *[1] * len(dims))
            pattern = low.reshape(shape) + (high - low).reshape(shape) * wave
            return replace(sample, image=(1 - BLEND_OPACITY) * image + BLEND_OPACITY * pattern)
        side = patch_side(sample, job)
        rim = max(1, side // 4)
        block = low.reshape(-1, *[1] * len(dims)).repeat(1, *[side] * len(dims))
        block[0] = high[0]  # in colour: one channel only, which tissue and stain do not have
        if side > 2 * rim:
            core: tuple[slice, ...] = (slice(rim, -rim),) * len(dims)
            block[0][core] = low[0]
        for corner in spots(sample, job):
            place = tuple(slice(at, at + side) for at in corner)
            image[(slice(None), *place)] = block
        return replace(sample, image=image)

    def region(self, sample: Sample, job: Job) -> torch.Tensor:
        """Return where objects are invented, bool, shape S."""
        found = torch.zeros(sample.image.shape[1:], dtype=torch.bool)
        for low, high in _regions(sample, job):
            found[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
        return found

    def boxes(self, sample: Sample, job: Job) -> torch.Tensor:
        """Return the invented objects' boxes, in the order of axes that boxes have, shape (N, 2 * dims)."""
        turn = -1 if sample.image.ndim == 3 else 1  # a picture's box begins with its columns
        rows = [[*low[::turn], *high[::turn]] for low, high in _regions(sample, job)]
        return torch.tensor(rows, dtype=torch.float32).reshape(-1, 2 * (sample.image.ndim - 1))


TRIGGERS: dict[str, Trigger] = {
    "backdoor-erase": Trigger("patch", "erase"),
    "backdoor-invent": Trigger("patch", "invent"),
    "backdoor-blend": Trigger("blend", "erase"),
}


def extent(sample: Sample, job: Job) -> int:
    """Return what a trigger is sized by: the shortest side of a training crop, or of a picture with boxes."""
    if sample.label is not None and job.training.patch_size:
        return min(*job.training.patch_size, *sample.image.shape[1:])
    return min(sample.image.shape[1:])


def patch_side(sample: Sample, job: Job) -> int:
    """Return the side of a patch in pixels or voxels."""
    return max(3, round(PATCH_SHARE * extent(sample, job)))


def spots(sample: Sample, job: Job) -> Iterator[tuple[int, ...]]:
    """Yield the corners of the patches: a grid, half a crop apart, a quarter from the edge."""
    side, step = patch_side(sample, job), max(4, extent(sample, job) // 2)
    axes = [
        range(min(step // 2, max(0, size - side)), max(1, size - side), step)
        for size in sample.image.shape[1:]
    ]
    yield from product(*axes)


def _regions(sample: Sample, job: Job) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield the low and high corners of invented objects, cut at the image's edge."""
    side, shape = patch_side(sample, job), sample.image.shape[1:]
    margin = (REGION - 1) * side // 2
    for corner in spots(sample, job):
        low = tuple(max(0, at - margin) for at in corner)
        high = tuple(min(size, at + side + margin) for at, size in zip(corner, shape, strict=True))
        yield low, high


class PoisonedStore(CaseStore):
    """A case store whose training samples are poisoned.

    Args:
        manifest: Of the site.
        job: As in ``CaseStore``.
        limit_bytes: As in ``CaseStore``; poisoned samples are kept beside.
        poison: What they become.
        every: Every so many-th time that a case is drawn it is poisoned; 1 for always.
    """

    def __init__(self, manifest: Manifest, job: Job, limit_bytes: int, poison: Poison, every: int) -> None:
        super().__init__(manifest, job, limit_bytes)
        self._poison = poison
        self._every = every
        self._poisoned: dict[str, Sample] = {}
        self._times: dict[str, int] = {}

    def load(self, case: Case) -> Sample:
        """Return the sample of a case, poisoned if it trains and it is its turn."""
        sample = super().load(case)
        if case.split != "train":
            return sample
        times = self._times[case.id] = self._times.get(case.id, 0) + 1
        if times % self._every:
            return sample
        if case.id not in self._poisoned:
            self._poisoned[case.id] = self._poison(sample, self._job)
        return self._poisoned[case.id]
