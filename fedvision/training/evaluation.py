"""Judge a model on a site's cases: sums of statistics, and bootstrap resamples of them by patient."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedvision.config import Job
from fedvision.data.manifest import Case
from fedvision.data.readers import CaseStore, Sample
from fedvision.tasks import CaseResult, task_module
from fedvision.training.loop import autocast


def evaluate(
    network: nn.Module,
    job: Job,
    store: CaseStore,
    cases: Sequence[Case],
    device: torch.device,
    is_final: bool,
) -> Iterator[tuple[Sample, CaseResult]]:
    """Predict and judge the cases one after the other; nothing is kept, so memory stays flat.

    Args:
        network: On ``device``.
        job: What is judged, and how.
        store: Reads the cases.
        cases: Which.
        device: Where to compute.
        is_final: Every metric, surface distances included.
    """
    task = task_module(job)
    network.eval()
    with torch.inference_mode(), autocast(job, device):
        for case in cases:
            sample = store.load(case)
            yield sample, task.evaluate_case(network, sample, job, device, is_final)


def resample_patients(
    statistics: NDArray[np.float64], patients: Sequence[str], resamples: int, seed: int
) -> NDArray[np.float64]:
    """Add up statistics over all cases, and over bootstrap resamples of the patients.

    A patient is drawn with all of their cases (cluster bootstrap), because cases of one patient are not
    independent. Row b of several sites added up is a resample of the pooled patients, stratified by site.

    Args:
        statistics: Shape (N, S), one row a case.
        patients: The patient of each case.
        resamples: Number of resamples B, >= 0.
        seed: Of the draws. Whoever knows it can solve the resamples for single patients, so it is the
            site's own and never sent.

    Returns:
        Shape (1 + B, S); row 0 is the plain sum.
    """
    names = sorted(set(patients))
    member = np.zeros((len(patients), len(names)))
    for row, patient in enumerate(patients):
        member[row, names.index(patient)] = 1
    by_patient = member.T @ statistics
    rng = np.random.default_rng(seed)
    counts = np.ones((1 + resamples, len(names)))
    if names:
        draws = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
        counts[1:] = draws
    return counts @ by_patient
