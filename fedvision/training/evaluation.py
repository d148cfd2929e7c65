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


def judgement_values(statistics: NDArray[np.float64], job: Job, is_final: bool) -> NDArray[np.float64]:
    """Return what a site adds to a secure sum: its statistics, its own metrics, and which are defined.

    The metrics are there because a mean over sites cannot be had from pooled statistics.

    Args:
        statistics: Shape (R, S), see ``resample_patients``.
        job: Says which metrics there are.
        is_final: Whether these are of the final test, which has more metrics.

    Returns:
        Shape (R * (S + 2 M),): all statistics, then M metrics a row (0 where undefined), then M ones and
        zeros a row.
    """
    names = metric_names(job, is_final)
    found = [task_module(job).metrics(row, job) for row in statistics]
    values = np.array([[row.get(name, np.nan) for name in names] for row in found]).reshape(
        len(statistics), len(names)
    )
    defined = ~np.isnan(values)
    parts = (statistics.ravel(), np.where(defined, values, 0.0).ravel(), defined.ravel().astype(np.float64))
    return np.concatenate(parts)


def split_judgement(
    values: NDArray[np.float64], num_rows: int, job: Job, is_final: bool
) -> tuple[NDArray[np.float64], list[dict[str, float]]]:
    """Return pooled statistics, shape (R, S), and each row's mean over sites, from added-up values.

    Args:
        values: Sum over sites of ``judgement_values``.
        num_rows: R.
        job: As there.
        is_final: As there.
    """
    names, size = metric_names(job, is_final), task_module(job).statistics_size(job)
    statistics = values[: num_rows * size].reshape(num_rows, size)
    sums, counts = values[num_rows * size :].reshape(2, num_rows, len(names))
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.where(counts > 0.5, sums / counts, np.nan)
    return statistics, [dict(zip(names, map(float, row), strict=True)) for row in means]


def judgement_size(num_rows: int, job: Job, is_final: bool) -> int:
    """Return the length of ``judgement_values``."""
    return num_rows * (task_module(job).statistics_size(job) + 2 * len(metric_names(job, is_final)))


def metric_names(job: Job, is_final: bool) -> tuple[str, ...]:
    """Return the names of a job's metrics in validation or in the final test, sorted; no data decides."""
    task = task_module(job)
    example = np.full(task.statistics_size(job), float(is_final))
    return tuple(sorted(task.metrics(example, job)))
