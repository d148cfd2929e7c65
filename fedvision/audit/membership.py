"""Membership inference: was this patient among those who trained the model? Attacks, and how well they do.

An attack gives each patient a number, larger where the patient looks more like one who trained. It knows
the released model, the patient's images and labels, and shadow models (``fedvision.audit.shadows``) of which
it knows who trained them. Every attack is offline: to judge a patient it needs only shadows without him.

Legend of shapes: N patients, M shadow models. Losses are one number a patient and model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Flags = NDArray[np.bool_]
Score = Callable[[Values, Values, Flags], Values]

RATES = (0.01, 0.001)
"""False-positive rates at which true-positive rates are given."""
RESAMPLES = 1000
OFFLINE_TERMS = (0.0, 0.3, 0.6, 0.9, 1.0)
"""The paper's a: 0 puts a patient's likelihood at large halfway to certainty, 1 leaves it as measured."""
_LEAST_LOSS = 1e-6


def audit_folder(run: Path) -> Path:
    """Return where the audit of a run lies unless somebody says otherwise: beside the run, not in it."""
    return run.with_name(f"{run.resolve().name}-audit")


def confidence(losses: Values) -> Values:
    """Return losses on the scale on which they are nearly Gaussian: log(p / (1 - p)) with p = exp(-loss).

    Carlini et al. 2022, equation 4. A loss of a user's own that can be 0 or below is no likelihood; then
    minus the loss is taken.
    """
    if losses.min() <= 0:
        return -losses
    bounded = np.maximum(losses, _LEAST_LOSS)
    return -bounded - np.log(-np.expm1(-bounded))


def loss_threshold(target: Values, shadows: Values, inside: Flags) -> Values:
    """Return minus the loss: who trained a model has a low one (Yeom et al. 2018, adversary 2).

    Args:
        target: Losses of the released model, shape (N,).
        shadows: Not used.
        inside: Not used.
    """
    return -target


def lira(target: Values, shadows: Values, inside: Flags) -> Values:
    """Return how far the released model's confidence is above that of models that did not see the patient.

    Likelihood-ratio attack, offline (Carlini et al. 2022, section VI-D), with one variance for all patients
    as there for few shadow models (section VI-C).

    Args:
        target: Losses of the released model, shape (N,).
        shadows: Losses of the shadow models, shape (M, N).
        inside: Who trained which, shape (M, N); each patient is outside of one at least.

    Returns:
        Standard deviations above the mean, shape (N,).
    """
    seen = confidence(np.vstack([target[None], shadows]))
    mean = _outside_mean(seen[1:], inside)
    residuals = (seen[1:] - mean)[~inside]
    freedom = max(residuals.size - target.size, 1)
    spread = float(np.sqrt(np.sum(residuals**2) / freedom))
    return (seen[0] - mean) / (spread or 1.0)


def rmia(target: Values, shadows: Values, inside: Flags) -> Values:
    """Return the log of the patient's likelihood under the released model over that under one at large.

    Robust membership inference, offline (Zarifzadeh et al. 2024, equations 2 and 11). The paper then counts
    whose ratio among others is lower. With the same others for every patient the order is that of the ratio.
    The term a of the offline form is the one that does best against the shadow models, as in the paper.

    Args:
        target: As in ``lira``.
        shadows: As in ``lira``.
        inside: As in ``lira``.
    """
    term = 0.3
    if len(shadows) >= 4:
        tried = {one: _mean_auc(partial(_ratio, term=one), shadows, inside) for one in OFFLINE_TERMS}
        term = max(tried, key=lambda one: tried[one])
    return _ratio(target, shadows, inside, term)


def _ratio(target: Values, shadows: Values, inside: Flags, term: float) -> Values:
    """Return minus log of (likelihood at large / likelihood), for one term of the offline form."""
    outside = _outside_mean(np.exp(-shadows), inside)
    at_large = ((1 + term) * outside + (1 - term)) / 2
    return -target - np.log(np.maximum(at_large, np.finfo(float).tiny))


def _outside_mean(values: Values, inside: Flags) -> Values:
    """Return each patient's mean over the models that did not see him, shape (N,)."""
    counts = (~inside).sum(axis=0)
    if not counts.all():
        raise ValueError("every patient must be outside of at least one shadow model")
    return np.asarray(np.where(inside, 0.0, values).sum(axis=0) / counts)


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        name: For people.
        source: Who described it.
        signal: Which losses it looks at, a key of ``shadows.signals_of``.
        score: From losses to one number a patient.
    """

    name: str
    source: str
    signal: str
    score: Score


ATTACKS = {
    "loss": Attack("loss threshold", "Yeom et al. 2018", "loss", loss_threshold),
    "lira": Attack("LiRA, offline", "Carlini et al. 2022", "loss", lira),
    "rmia": Attack("RMIA, offline", "Zarifzadeh et al. 2024", "loss", rmia),
    "lira-boundary": Attack(
        "LiRA on outlines", "Carlini et al. 2022, loss near outlines as in He et al. 2020", "boundary", lira
    ),
}


def attacks_for(signals: Mapping[str, Values]) -> dict[str, Attack]:
    """Return the attacks for which the signals are there."""
    return {key: attack for key, attack in ATTACKS.items() if attack.signal in signals}


@dataclass(frozen=True)
class Rate:
    """A true-positive rate with its 95 % interval, at a false-positive rate."""

    fpr: float
    tpr: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """How well an attack tells members from others.

    Attributes:
        auc: Area under the curve; 0.5 is guessing.
        auc_low: Lower end of its 95 % interval.
        auc_high: Upper end.
        rates: At each of ``RATES``.
    """

    auc: float
    auc_low: float
    auc_high: float
    rates: tuple[Rate, ...]


def auc(scores: Values, members: Flags) -> float:
    """Return the chance that a member scores above somebody else, ties counting half."""
    from scipy.stats import rankdata

    ranks, count = rankdata(scores), int(members.sum())
    above = float(ranks[members].sum()) - count * (count + 1) / 2
    return above / (count * (len(scores) - count))


def tpr_at(scores: Values, members: Flags, fpr: float) -> float:
    """Return the share of members above a threshold that at most ``fpr`` of the others pass.

    With fewer than 1 / ``fpr`` others that is the share above all of them.
    """
    others = np.sort(scores[~members])[::-1]
    threshold = others[min(int(fpr * len(others) + 1e-9), len(others) - 1)]
    return float(np.mean(scores[members] > threshold))


def roc(scores: Values, members: Flags) -> tuple[Values, Values]:
    """Return false- and true-positive rates at every threshold, both rising, from (0, 0) to (1, 1)."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.diff(scores[order]) != 0, True)  # of equal scores only the last is a threshold
    hits = np.cumsum(members[order])[ends] / members.sum()
    false = np.cumsum(~members[order])[ends] / (~members).sum()
    return np.append(0.0, false), np.append(0.0, hits)


def measure(scores: Values, members: Flags, seed: int) -> Measured:
    """Return an attack's numbers, with 95 % percentile intervals of a bootstrap over patients.

    Members and others are resampled each among themselves. The interval of a rate has at least the exact
    binomial one in it: where all or none are found, every resample says the same.

    Args:
        scores: Shape (N,), larger for a member.
        members: Who trained, shape (N,); both kinds are there.
        seed: Of the resampling.
    """
    rng = np.random.default_rng(seed)
    inside, outside = np.flatnonzero(members), np.flatnonzero(~members)
    found = np.empty((RESAMPLES, 1 + len(RATES)))
    flags = np.repeat([True, False], [inside.size, outside.size])
    for row in found:
        drawn = np.concatenate([rng.choice(inside, inside.size), rng.choice(outside, outside.size)])
        again = scores[drawn]
        row[:] = [auc(again, flags), *(tpr_at(again, flags, fpr) for fpr in RATES)]
    low, high = np.quantile(found, [0.025, 0.975], axis=0)
    rates = []
    for at, fpr in enumerate(RATES, start=1):
        tpr = tpr_at(scores, members, fpr)
        least, most = _exact(round(tpr * inside.size), inside.size)
        rates.append(Rate(fpr, tpr, min(float(low[at]), least), max(float(high[at]), most)))
    return Measured(auc(scores, members), float(low[0]), float(high[0]), tuple(rates))


def _exact(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Clopper, Pearson 1934)."""
    from scipy.stats import beta

    low = 0.0 if hits == 0 else float(beta.ppf(0.025, hits, count - hits + 1))
    return low, 1.0 if hits == count else float(beta.ppf(0.975, hits + 1, count - hits))


def strength(attack: Attack, shadows: Values, inside: Flags) -> float | None:
    """Return the attack's mean AUC against the shadow models, of which is known who trained them.

    This is what the attack finds in models that are not protected: where it is near 0.5, a low number for
    the released model means little. Each shadow is attacked with the others, without its twin, which has the
    other half.

    Returns:
        The mean; None with fewer than four shadow models.
    """
    return _mean_auc(attack.score, shadows, inside) if len(shadows) >= 4 else None


def _mean_auc(score: Score, shadows: Values, inside: Flags) -> float:
    """Return the mean AUC of a score against each shadow model with the others as its shadows."""
    count, found = len(shadows), []
    for one in range(count):
        others = [other for other in range(count) if other not in (one, one ^ 1)]
        scores = score(shadows[one], shadows[others], inside[others])
        found.append(auc(scores, inside[one]))
    return float(np.mean(found))


def halves(num_patients: int, num_shadows: int, draw: Callable[[int], int]) -> Flags:
    """Return who trains which shadow model: of each two one random half each, shape (M, N).

    Args:
        num_patients: N.
        num_shadows: M, even: every patient is outside of half of the models.
        draw: A seed for each pair, so that more shadows keep the first ones.

    Raises:
        ValueError: M is odd or below 2.
    """
    if num_shadows < 2 or num_shadows % 2:
        raise ValueError(f"num_shadows must be even and >= 2, got {num_shadows}")
    inside = np.zeros((num_shadows, num_patients), dtype=bool)
    for pair in range(num_shadows // 2):
        rng = np.random.default_rng(draw(pair))
        inside[2 * pair, rng.permutation(num_patients)[: num_patients // 2]] = True
        inside[2 * pair + 1] = ~inside[2 * pair]
    return inside


def worst(scores: Mapping[str, Values], members: Flags, count: int = 10) -> dict[str, Sequence[int]]:
    """Return the members that each attack is surest of, by attack: positions, surest first."""
    inside = np.flatnonzero(members)
    return {key: [int(inside[at]) for at in np.argsort(-own[inside])[:count]] for key, own in scores.items()}
