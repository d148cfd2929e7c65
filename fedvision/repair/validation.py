"""Judge models on the root set, and choose the round whose model is kept.

Rules:
- A round whose score fell far below the best before it is not taken, nor any after it until the score is
  back: the run goes back to the last good round.
- The score of the root set and that of the sites' validation both count; either may be absent.
- Without any score the last round is taken, and the text says that nobody judged it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from fedvision.config import Job
from fedvision.data.manifest import Case
from fedvision.tasks import task_module
from fedvision.training.evaluation import evaluate
from fedvision.training.root import RootSet

COLLAPSE = 0.1
"""A score that is so far below the best before it has collapsed."""
LEAST_AGREEMENT = 0.5
"""A root set on which a model scores less than this share of what it reaches at the sites does not fit."""


@dataclass(frozen=True)
class RoundScore:
    """What is known of the model after a round; None where it was not judged.

    Attributes:
        round: 1 is the first.
        root: Headline metric on the root set.
        sites: Headline metric on the sites' validation cases, mean over sites.
    """

    round: int
    root: float | None = None
    sites: float | None = None


@dataclass(frozen=True)
class Choice:
    """Which round's model is kept, and why, in a sentence or two."""

    round: int
    text: str


def judge_on_root(
    network: nn.Module, job: Job, root: RootSet, cases: Sequence[Case] | None = None
) -> dict[str, float]:
    """Return a model's metrics on root cases.

    Args:
        network: The model.
        job: What is judged, and how.
        root: The set.
        cases: Which of its cases; None for all.
    """
    task, chosen = task_module(job), root.cases if cases is None else cases
    device = next(network.parameters()).device
    total = np.zeros(task.statistics_size(job))
    for _, result in evaluate(network, job, root.store(job), chosen, device, is_final=False):
        total += result.statistics
    found: dict[str, float] = task.metrics(total, job)
    return found


def choose(states: Sequence[RoundScore], collapse: float = COLLAPSE) -> Choice:
    """Return the last good round: the last whose scores are no more than ``collapse`` below the best so far.

    The same scores give the same round. Scores of rounds that are not finite numbers count as absent.

    Args:
        states: In the order of the rounds, at least one.
        collapse: In units of the metric, > 0.

    Raises:
        ValueError: No state.
    """
    if not states:
        raise ValueError("there is no round to choose from")
    best: dict[str, float] = {}
    good, fallen = 0, ""
    for state in states:
        known = {
            name: value
            for name, value in (("root set", state.root), ("sites", state.sites))
            if value is not None and math.isfinite(value)
        }
        reasons = [
            f"{name} {value:.3f} after {best[name]:.3f}"
            for name, value in known.items()
            if value < best.get(name, -math.inf) - collapse
        ]
        if reasons:
            fallen = f"round {state.round} collapsed ({', '.join(reasons)})"
            continue
        for name, value in known.items():
            best[name] = max(best.get(name, -math.inf), value)
        # A round that nobody judged is good as long as the judged one before it was.
        if known or not fallen:
            good, fallen = state.round, ""
    if not best:
        return Choice(states[-1].round, f"round {states[-1].round} is kept; no round was judged")
    if fallen:
        return Choice(good, f"back to round {good}: {fallen}")
    return Choice(good, f"round {good} is kept; no score collapsed")


def misfit(root: float, sites: float | None) -> str:
    """Say why a root set must not repair a model, "" if it may.

    Labels that are wrong in a plausible way pass every check of files. They show here: the model does far
    worse on them than on the sites' own validation cases.

    Args:
        root: Headline metric on the root set.
        sites: The same on the sites' validation cases; None if not known.
    """
    if not math.isfinite(root):
        return "the model has no score on the root set"
    if sites is not None and math.isfinite(sites) and root < LEAST_AGREEMENT * sites:
        where = f"{root:.3f} there and {sites:.3f} at the sites"
        return f"the root set's labels do not fit: the model reaches {where}"
    return ""
