"""From accepted updates to new global weights, and from sites' statistics to the federation's metrics."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvision.config import Job
from fedvision.updates.layout import FloatVector
from fedvision.wire.messages import TrainReply

Metrics = dict[str, float]
MetricsOf = Callable[[NDArray[np.float64]], Metrics]
INTERVAL = (2.5, 97.5)


def weight_of(reply: TrainReply, job: Job) -> int:
    """Return a site's weight in the mean: its number of training cases, or 1."""
    return reply.num_samples if job.aggregation.weighting == "samples" else 1


def server_step(weights: FloatVector, mean_update: NDArray[np.float64], job: Job) -> FloatVector:
    """Return the next global weights (FedAvg on updates; McMahan et al. 2017, algorithm 1; the server
    learning rate as in Reddi et al. 2021, algorithm 1).

    Args:
        weights: float32, shape (d,).
        mean_update: float64, shape (d,).
        job: Sets the server learning rate.
    """
    return (weights + job.aggregation.server_learning_rate * mean_update).astype(np.float32)


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
