"""What noise costs a patient: epsilon of Gaussian noise on Poisson-sampled sums, and its inverses.

Neighbours are two data sets of which one has one patient more (add or remove one). A step draws each patient
with probability ``sampling_rate``, independently, adds the clipped vectors of those drawn, and adds noise of
``noise_multiplier`` clip norms. Epsilons are upper bounds of dp-accounting's privacy loss distribution (PLD),
or of its Renyi accountant where the distribution would need too many points.

Integers instead of real numbers. The accountant is told of a continuous Gaussian; a sum is released on a grid
with discrete Gaussians of several sites added. ``accounted_noise`` is the noise multiplier of a continuous
Gaussian that costs at least as much, for any sampling and composition, by four steps:
1. Rounding: one patient changes a rounded coordinate by at most the change and one step more, so the
   sensitivity is at most ``inflated_clip`` clip norms. This holds if the sum before rounding is exact enough:
   made in float64, or of integers; one rounding to float32 has its own term.
2. A sum of discrete Gaussians is nearly one: Kairouz, Liu, Steinke 2021, "The Distributed Discrete Gaussian
   Mechanism". With widths a and b, the sum takes z with probability exp(-z**2 / (2 (a**2 + b**2))) times a
   sum over the grid of a Gaussian of width s, s**2 = a**2 b**2 / (a**2 + b**2), up to a constant. By
   Poisson's formula such sums over shifted grids differ by a factor of at most exp(5 exp(-2 pi**2 s**2)) if
   s >= 1/2. Adding the shares of several sites one by one, s**2 is at least half of a share's sigma**2.
3. A discrete Gaussian of width w is a continuous one, rounded at random: take a continuous one of width
   sqrt(w**2 - 3**2) and go to the grid by a discrete Gaussian of width 3 around the result. Integrating, by
   the same formula, gives width w up to a factor exp(5 exp(-2 pi**2 3**2)) (as in Peikert 2010, theorem 3.1).
   A shift by whole steps goes through unchanged, so the rounding can come after the noise is added, and what
   comes after costs nothing.
4. The factors hold coordinate by coordinate and release by release; ``grid_loss`` adds them up. With shares
   of at least 4 steps it is below 1e-20 (for 10**7 coordinates, 100 sites and 10**5 releases: 2e-56), less
   than the last digit of any epsilon, and left out.
What the sampler itself is off by (``noise``) is below 1e-27 of delta for the same sizes, and left out too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from typing import Any

from fedvision.errors import ConfigError

MIN_NOISE, MAX_NOISE = 0.05, 1000.0
"""Noise multipliers between which ``noise_for`` looks: below is no protection, above is nothing left."""
LEAST_NOISE = 1e-3
"""A noise multiplier below it counts as no noise."""
MAX_STEPS = 10_000_000
MIN_SHARE_STEPS = 4.0
"""Least sigma of a site's noise in steps of the grid, for the argument above."""

_ROUNDING_STEPS = 3.0
_DIGITS = 1000  # noise multipliers are given in thousandths
_POINTS_OF_A_STEP, _POINTS_IN_ALL, _FEWEST_POINTS = 1e4, 5e5, 200.0
_EPSILONS = [step / 50 for step in range(1001)]


@dataclass(frozen=True)
class Mechanism:
    """Steps of one kind: Poisson sampling of patients, a clipped sum, Gaussian noise.

    Args:
        sampling_rate: Probability of each patient in each step, in (0, 1].
        noise_multiplier: Standard deviation of the noise of the sum in clip norms, >= 0.
        steps: How many, >= 0.

    Raises:
        ValueError: A number is out of range.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate must be in (0, 1], got {self.sampling_rate}")
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier must be >= 0 and finite, got {self.noise_multiplier}")
        if self.steps < 0:
            raise ValueError(f"steps must be >= 0, got {self.steps}")


def epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Return an epsilon such that all of the mechanisms together are (epsilon, delta)-private for a patient.

    Guarantee: an upper bound, whatever the order of the mechanisms, if each was planned before any of them
    ran. Plans made after seeing results need a filter (the ledger's).

    Args:
        mechanisms: What one patient took part in; none, or none with a step, costs 0.
        delta: Between 0 and 1, both excluded.

    Returns:
        Epsilon >= 0; inf where a mechanism has no noise, or less than 0.001.

    Raises:
        ValueError: ``delta`` is out of range.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, got {delta}")
    active = [one for one in mechanisms if one.steps > 0]
    if not active:
        return 0.0
    if any(one.noise_multiplier < LEAST_NOISE for one in active):
        return math.inf
    together = _all_together(active)
    found = math.inf if together is None else float(together.get_epsilon_for_delta(delta))
    return found if math.isfinite(found) else _renyi_epsilon(active, delta)


def noise_for(target_epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Return the least noise multiplier, in thousandths, that keeps ``steps`` steps within the target.

    Guarantee: ``epsilon`` of the result is at most ``target_epsilon``. It is never below 0.05.

    Raises:
        ConfigError: The target is not above 0, or even a noise multiplier of 1000 does not meet it.
        ValueError: Another argument is out of range.
    """
    _check_target(target_epsilon)

    def cost(thousandths: int) -> float:
        return epsilon([Mechanism(sampling_rate, thousandths / _DIGITS, steps)], delta)

    least, most = round(MIN_NOISE * _DIGITS), round(MAX_NOISE * _DIGITS)
    fails, above, holds = 0, 0.0, _DIGITS
    while (reached := cost(holds)) > target_epsilon:
        if holds == most:
            raise ConfigError(
                f"epsilon {target_epsilon:g} at delta {delta:g} cannot be met with {steps} steps at sampling "
                f"rate {sampling_rate:g}: noise multiplier {MAX_NOISE:g} gives {reached:.3g}",
                hint=f"ask for epsilon {_up(reached):g} or more, or for fewer steps or a lower sampling rate",
            )
        fails, above, holds = holds, reached, min(2 * holds, most)
    while fails == 0:
        if holds == least:
            return MIN_NOISE
        middle = max(holds // 2, least)
        if (found := cost(middle)) > target_epsilon:
            fails, above = middle, found
        else:
            holds, reached = middle, found
    for attempt in count():  # epsilon is nearly a power of the noise: a few guesses, or else halving
        if holds - fails == 1:
            break
        part = math.log(above / target_epsilon) / math.log(above / max(reached, 1e-9)) if attempt < 8 else 0.5
        middle = min(max(round(fails * (holds / fails) ** part), fails + 1), holds - 1)
        if (found := cost(middle)) > target_epsilon:
            fails, above = middle, found
        else:
            holds, reached = middle, found
    return holds / _DIGITS


def steps_for(target_epsilon: float, delta: float, sampling_rate: float, noise_multiplier: float) -> int:
    """Return the most steps, up to 10**7, that stay within the target.

    Guarantee: ``epsilon`` of the result is at most ``target_epsilon``.

    Raises:
        ConfigError: The target is not above 0, or a single step costs more.
        ValueError: Another argument is out of range.
    """
    _check_target(target_epsilon)

    def cost(steps: int) -> float:
        return epsilon([Mechanism(sampling_rate, noise_multiplier, steps)], delta)

    if (reached := cost(1)) > target_epsilon:
        raise ConfigError(
            f"epsilon {target_epsilon:g} at delta {delta:g} does not allow one step at sampling rate "
            f"{sampling_rate:g} with noise multiplier {noise_multiplier:g}: one step costs {reached:.3g}",
            hint="add noise, lower the sampling rate"
            + (f", or ask for epsilon {_up(reached):g} or more" if math.isfinite(reached) else ""),
        )
    holds, fails = 1, 2
    while cost(fails) <= target_epsilon:
        if fails == MAX_STEPS:
            return MAX_STEPS
        holds, fails = fails, min(2 * fails, MAX_STEPS)
    while fails - holds > 1:
        middle = (holds + fails) // 2
        if cost(middle) <= target_epsilon:
            holds = middle
        else:
            fails = middle
    return holds


def delta_for(num_patients: int) -> float:
    """Return the delta that we use where none is given: 1 / (10 N) for N patients.

    Raises:
        ConfigError: There is no patient.
    """
    if num_patients < 1:
        raise ConfigError(f"num_patients must be >= 1, got {num_patients}")
    return 1 / (10 * num_patients)


def check_delta(delta: float, num_patients: int) -> None:
    """Refuse a delta that would allow to publish one patient at random.

    Raises:
        ConfigError: ``delta`` is not above 0, or is above 1 / N.
    """
    usual = delta_for(num_patients)
    largest = 1 / num_patients
    if not 0 < delta <= largest or delta >= 1:
        raise ConfigError(
            f"delta must be > 0 and at most 1 / {num_patients} patients = {largest:.3g}, got {delta:g}",
            hint=f"set delta to {usual:.3g}",
        )


def bound_on_tpr(epsilon: float, delta: float, fpr: float) -> float:
    """Return the largest true-positive rate that (epsilon, delta)-privacy allows a membership attack.

    Args:
        epsilon: >= 0, inf allowed.
        delta: From 0 to 1.
        fpr: The attack's false-positive rate, from 0 to 1.

    Returns:
        The rate, from ``fpr`` to 1 (Kairouz, Oh, Viswanath 2015, theorem 2.1).

    Raises:
        ValueError: An argument is out of range.
    """
    if not epsilon >= 0 or not 0 <= delta <= 1 or not 0 <= fpr <= 1:
        raise ValueError(f"need epsilon >= 0, delta and fpr in [0, 1], got {epsilon}, {delta}, {fpr}")
    grown = math.exp(min(epsilon, 700)) * fpr
    return min(1.0, grown + delta, 1 - math.exp(-epsilon) * max(0.0, 1 - delta - fpr))


def largest_tpr(mechanisms: Sequence[Mechanism], fpr: float) -> float:
    """Return the largest true-positive rate of a membership attack at ``fpr``, from the whole trade-off.

    Tighter than ``bound_on_tpr`` of one (epsilon, delta): the least of it over all those that the mechanisms
    have, epsilon up to 20. It is 1 where there are too many points for a privacy loss distribution.

    Raises:
        ValueError: ``fpr`` is not from 0 to 1.
    """
    active = [one for one in mechanisms if one.steps > 0]
    if not active or not 0 <= fpr <= 1:
        return bound_on_tpr(0.0, 0.0, fpr)
    if any(one.noise_multiplier < LEAST_NOISE for one in active):
        return 1.0
    together = _all_together(active)
    if together is None:
        return 1.0
    deltas = together.get_delta_for_epsilon(_EPSILONS)
    # With little noise a delta comes out a little above 1.
    return min(bound_on_tpr(x, min(1.0, float(d)), fpr) for x, d in zip(_EPSILONS, deltas, strict=True))


def two_epsilons(mechanisms: Sequence[Mechanism], honest: int, delta: float) -> tuple[float, float]:
    """Return what noise in shares costs: with secure aggregation intact, and with it broken.

    Args:
        mechanisms: With the noise of the sum that ``honest`` shares make.
        honest: Honest sites guaranteed in every sum, >= 1; each adds noise of 1 / sqrt(honest) of that.
        delta: Between 0 and 1, both excluded.

    Returns:
        Epsilon for who sees the sum, and for who sees one site's own vector with its share alone.

    Raises:
        ValueError: An argument is out of range.
    """
    if honest < 1:
        raise ValueError(f"honest must be >= 1, got {honest}")
    alone = [replace(one, noise_multiplier=one.noise_multiplier / math.sqrt(honest)) for one in mechanisms]
    return epsilon(mechanisms, delta), epsilon(alone, delta)


def inflated_clip(size: int, scale: float, patients: int = 0) -> float:
    """Return by which factor rounding may lengthen what one patient adds to a sum.

    One patient changes each coordinate of the rounded sum by at most the change and one step, so its length
    by at most sqrt(size) steps. Rounding each patient's vector before adding stays within it too.

    Args:
        size: Coordinates, >= 1.
        scale: Steps of the grid in a clip norm, > 0.
        patients: Most patients of a sum, if it was rounded to float32 once before; 0 if it never was. The
            sum is at most so many clip norms long, and float32 moves each of two neighbours by 2**-24 of it.

    Returns:
        The factor, above 1.

    Raises:
        ValueError: An argument is out of range.
    """
    if size < 1 or not 0 < scale < math.inf or patients < 0:
        raise ValueError(f"need size >= 1, scale > 0 and patients >= 0, got {size}, {scale}, {patients}")
    return 1 + math.sqrt(size) / scale + patients * 2.0**-23


def accounted_noise(
    noise_multiplier: float, size: int, scale: float, honest: int = 1, patients: int = 0
) -> float:
    """Return the noise multiplier to account for, where the noise is discrete and the sum is rounded.

    Guarantee: noise of ``honest`` discrete Gaussians, each of ``noise_multiplier / sqrt(honest)`` clip norms,
    on the rounded sum costs a patient no more than a continuous Gaussian of the returned multiplier on the
    exact sum; see the module for the argument and for what is left out (below 1e-20).

    Args:
        noise_multiplier: Standard deviation of the noise of the sum in clip norms, > 0.
        size: Coordinates of the sum, >= 1.
        scale: Steps of the grid in a clip norm, > 0.
        honest: Shares that make the noise, >= 1.
        patients: As in ``inflated_clip``.

    Returns:
        At most ``noise_multiplier``.

    Raises:
        ConfigError: A share is below 4 steps of the grid.
        ValueError: An argument is out of range.
    """
    if honest < 1 or not 0 < noise_multiplier < math.inf:
        raise ValueError(f"need noise_multiplier > 0 and honest >= 1, got {noise_multiplier} and {honest}")
    lengthened = inflated_clip(size, scale, patients)
    width = noise_multiplier * scale
    share = width / math.sqrt(honest)
    if share < MIN_SHARE_STEPS:
        raise ConfigError(
            f"a site's noise must be at least {MIN_SHARE_STEPS:g} steps of the grid, got {share:.3g}",
            hint="use a finer grid (more steps a clip norm) or more noise",
        )
    return noise_multiplier * math.sqrt(1 - (_ROUNDING_STEPS / width) ** 2) / lengthened


def grid_loss(size: int, honest: int, share_steps: float, releases: int) -> float:
    """Bound what ``accounted_noise`` leaves out: with loss x, epsilon grows by 2x and delta by exp(x).

    Args:
        size: Coordinates of a release.
        honest: Shares that make the noise, >= 1.
        share_steps: Sigma of a share in steps of the grid, >= 1 (where the bound holds).
        releases: How many.
    """
    if share_steps < 1 or honest < 1:
        raise ValueError(f"need share_steps >= 1 and honest >= 1, got {share_steps} and {honest}")
    of_sums = (math.exp(-2 * math.pi**2 * share_steps**2 * k / (k + 1)) for k in range(1, honest))
    of_rounding = math.exp(-2 * math.pi**2 * _ROUNDING_STEPS**2)
    return releases * size * 5 * (sum(of_sums) + of_rounding)


def _all_together(mechanisms: Sequence[Mechanism]) -> Any:
    """Return the privacy loss distribution of all mechanisms, or nothing if it needs too many points."""
    # Losses of a step are within about 1 / (2 sigma**2) +- 10 / sigma, and their sum within ten deviations.
    of_a_step = max(0.5 / one.noise_multiplier**2 + 10 / one.noise_multiplier for one in mechanisms)
    in_all = 0.0
    for one in mechanisms:
        drawn = one.steps * one.sampling_rate
        shift, spread = 0.5 / one.noise_multiplier**2, 1 / one.noise_multiplier
        in_all += drawn * shift + 10 * math.sqrt(drawn) * (spread + shift)
    spacing = max(of_a_step / _POINTS_OF_A_STEP, in_all / _POINTS_IN_ALL)
    if spacing > of_a_step / _FEWEST_POINTS:
        return None
    together = None
    for one in mechanisms:
        loss = _one_step(one.sampling_rate, one.noise_multiplier, spacing).self_compose(one.steps)
        together = loss if together is None else together.compose(loss)
    return together


@lru_cache(maxsize=32)
def _one_step(sampling_rate: float, noise_multiplier: float, spacing: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution  # takes more than a second to load

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sampling_rate, value_discretization_interval=spacing
    )


def _renyi_epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    for one in mechanisms:
        event = PoissonSampledDpEvent(one.sampling_rate, GaussianDpEvent(one.noise_multiplier))
        accountant.compose(event, one.steps)
    return float(accountant.get_epsilon(delta))


def _check_target(target_epsilon: float) -> None:
    if not 0 < target_epsilon < math.inf:
        raise ConfigError(f"epsilon must be > 0 and finite, got {target_epsilon:g}")


def _up(value: float) -> float:
    """Round up to two digits."""
    unit: float = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(value / unit) * unit
