"""How often a planted trigger does what the attacker wants, on images that nobody trained on."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedvision.attacks.data import Trigger
from fedvision.config import Job
from fedvision.data.manifest import Case
from fedvision.data.readers import CaseStore, Sample
from fedvision.tasks import CaseResult, task_module
from fedvision.tasks.detection_metrics import OPERATING_SCORE, box_iou

LOST = 0.5
"""Erased: less than this share of what was found rightly is still found."""
FILLED = 0.5
"""Invented: at least this share of the region is foreground, or of the boxes is found."""
OVERLAP = 0.5


@dataclass(frozen=True)
class Success:
    """How a trigger did.

    Attributes:
        num_images: Images that can show it: for ``erase``, those in which something is found without it.
        num_fooled: Those in which it did what it was made for.
    """

    num_images: int
    num_fooled: int

    @property
    def share(self) -> float | None:
        """Share of fooled images, None where there is none to be fooled."""
        return self.num_fooled / self.num_images if self.num_images else None


def measure(
    network: nn.Module,
    job: Job,
    trigger: Trigger,
    cases: Iterable[tuple[CaseStore, Case]],
    device: torch.device,
) -> Success:
    """Put a trigger into test images and say how often it works.

    Args:
        network: On ``device``.
        job: The task.
        trigger: What is put in.
        cases: Test cases, each with the store that reads it.
        device: Where to compute.
    """
    task = task_module(job)
    network.eval()
    found = []
    with torch.inference_mode():
        for store, case in cases:
            sample = store.load(case)
            stamped = task.evaluate_case(network, trigger.stamp(sample, job), job, device, False)
            if trigger.goal == "invent":
                found.append(_is_invented(stamped, sample, trigger, job))
            else:
                before = task.evaluate_case(network, sample, job, device, False)
                found.append(_is_erased(before, stamped, sample))
    counted = [one for one in found if one is not None]
    return Success(len(counted), sum(counted))


def _right(result: CaseResult, sample: Sample) -> float:
    """Return how much of what is there was found: pixels, or boxes."""
    if sample.label is None:
        return result.values["hits"]
    label = sample.label.numpy()
    return float(((result.prediction["label"] == label) & (label > 0)).sum())


def _is_erased(before: CaseResult, after: CaseResult, sample: Sample) -> bool | None:
    found = _right(before, sample)
    return None if found == 0 else _right(after, sample) < LOST * found


def _is_invented(result: CaseResult, sample: Sample, trigger: Trigger, job: Job) -> bool | None:
    if sample.label is not None:
        region = trigger.region(sample, job).numpy() & (sample.label.numpy() == 0)
        return None if not region.any() else bool((result.prediction["label"][region] > 0).mean() >= FILLED)
    wanted = trigger.boxes(sample, job).numpy()
    is_sure = (result.prediction["scores"] >= OPERATING_SCORE) & (result.prediction["labels"] == 1)
    boxes = result.prediction["boxes"][is_sure]
    if not len(boxes):
        return False
    return bool(np.mean(box_iou(boxes, wanted).max(axis=0) >= OVERLAP) >= FILLED)
