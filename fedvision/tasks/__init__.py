"""What a federation can train. One module a task; every task offers the same functions.

- ``HEADLINE``: the metric that chooses the best model, larger is better.
- ``build_network(job)``: the network with fresh weights.
- ``training_batch(samples, job, rng)``: samples to one batch: crop, augment, stack.
- ``training_loss(network, batch, job, device)``: the scalar loss of one batch.
- ``evaluate_case(network, sample, job, device, final)``: predict and judge one case.
- ``statistics_size(job)``: length of a case's statistics.
- ``metrics(statistics, job)``: metrics by name from statistics that were added up over any cases.

A case is judged by a vector of *sums*: metrics of a site, of several sites pooled, or of a bootstrap
resample come from adding the vectors of the cases. So a site needs to send sums only, never a case.
"""

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedvision.config import Job
from fedvision.seeds import derive_seed


@dataclass(frozen=True)
class CaseResult:
    """How the model did on one case. Stays at the site, except for sums over cases of ``statistics``.

    Attributes:
        case_id: As in the manifest.
        patient: As in the manifest.
        statistics: float64, shape (S,), S = ``statistics_size(job)``; additive over cases.
        score: Orders cases from worst to best, in [0, 1].
        values: Numbers a person wants to see for this case, such as Dice or HD95 in mm.
        prediction: For pictures. Segmentation: {"label": uint8 array of shape S}. Detection: {"boxes":
            float32 (N, 2 * dims) on the sample's grid, "labels": int64 (N,), "scores": float32 (N,)}.
    """

    case_id: str
    patient: str
    statistics: NDArray[np.float64]
    score: float
    values: dict[str, float]
    prediction: dict[str, NDArray[Any]] = field(repr=False)


def task_module(job: Job) -> ModuleType:
    """Return the module with the functions of the job's task."""
    if job.task.kind == "segmentation":
        from fedvision.tasks import segmentation

        return segmentation
    from fedvision.tasks import detection

    return detection


def initial_network(job: Job) -> nn.Module:
    """Return the network with the weights that every party starts from, set by the job's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(job.seed, "initial weights"))
        network: nn.Module = task_module(job).build_network(job)
    return network


def local_names(network: nn.Module, job: Job) -> frozenset[str]:
    """Return the names of the weights that stay at the site, after checking that the rest may be shared.

    Raises:
        ModelError: A layer would share batch statistics of patients.
    """
    from fedvision.tasks import normalisation

    normalisation.check_normalisation(network, job)
    return normalisation.local_names(network) if job.model.local_normalisation else frozenset()
