"""From accepted updates to new global weights, and from sites' statistics to the federation's metrics."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedvision.config import Job
from fedvision.training.loop import learning_rate, make_optimizer
from fedvision.updates.layout import FloatVector
from fedvision.wire.messages import TrainReply
from fedvision_server.jobs import RunState

Metrics = dict[str, float]
MetricsOf = Callable[[NDArray[np.float64]], Metrics]
INTERVAL = (2.5, 97.5)


def weight_of(reply: TrainReply, job: Job) -> int:
    """Return a site's weight in the mean: its number of training cases, or 1."""
    return reply.num_samples if job.aggregation.weighting == "samples" else 1


def server_step(
    state: RunState, mean_update: NDArray[np.float64], job: Job
) -> tuple[FloatVector, dict[str, NDArray[np.float32]]]:
    """Return the next global weights and the moments of the server's optimiser.

    FedAvg on updates (McMahan et al. 2017, algorithm 1; the server learning rate as in Reddi et al. 2021,
    algorithm 1), which needs no moments. Where a round is one private gradient (``privacy.mode =
    "distributed"``), the step is that of ``training.optimizer``, with the round's learning rate, on the mean
    gradient of a patient.

    Args:
        state: Weights and moments before the round.
        mean_update: float64, shape (d,).
        job: Sets the optimiser and its rates.
    """
    if job.privacy.mode != "distributed":
        return (state.weights + job.aggregation.server_learning_rate * mean_update).astype(np.float32), {}
    weights = nn.Parameter(torch.from_numpy(state.weights.copy()))
    optimizer = make_optimizer([weights], job, learning_rate(job, state.round + 1))
    optimizer.state[weights].update(
        {
            name: torch.from_numpy(values.copy()).reshape(() if name == "step" else -1)
            for name, values in state.moments.items()
        }
    )
    weights.grad = torch.from_numpy((-mean_update / job.privacy.patients).astype(np.float32))
    optimizer.step()
    kept = {
        name: value.detach().numpy().reshape(-1)
        for name, value in optimizer.state[weights].items()
        if isinstance(value, torch.Tensor)
    }
    return weights.detach().numpy(), kept


def mean_site(by_site: Mapping[str, Metrics]) -> Metrics:
    """Return the plain mean over sites of each metric; a site where it is undefined does not count."""
    names = sorted({name for metrics in by_site.values() for name in metrics})
    means = {}
    for name in names:
        values = [m[name] for m in by_site.values() if not math.isnan(m.get(name, math.nan))]
        means[name] = float(np.mean(values)) if values else math.nan
    return means


def worst_site(by_site: Mapping[str, Metrics], headline: str) -> str | None:
    """Return the site with the lowest headline metric (the first by name among equals), or None."""
    defined = {s: m[headline] for s, m in by_site.items() if not math.isnan(m.get(headline, math.nan))}
    return min(sorted(defined), key=defined.__getitem__) if defined else None


def intervals(rows: NDArray[np.float64], metrics_of: MetricsOf) -> dict[str, list[float]]:
    """Return 95 % percentile bootstrap intervals of every metric (Efron & Tibshirani 1993, ch. 13).

    Args:
        rows: Shape (B, S), one bootstrap resample a row; none gives no interval.
        metrics_of: Statistics to metrics.
    """
    resamples = [metrics_of(row) for row in rows]
    found = {}
    for name in resamples[0] if resamples else ():
        values = np.array([r[name] for r in resamples])
        values = values[~np.isnan(values)]
        if values.size:
            low, high = np.percentile(values, INTERVAL)
            found[name] = [float(low), float(high)]
    return found


def summarise(by_site: Mapping[str, Metrics], pooled: Metrics, headline: str) -> dict[str, Any]:
    """Return mean, worst and pooled metrics as they stand in ``rounds.jsonl`` and ``test.json``."""
    worst = worst_site(by_site, headline)
    return {
        "mean_site": mean_site(by_site),
        "worst_site": {"site": worst, "metrics": by_site[worst] if worst else {}},
        "pooled": pooled,
    }
