import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from fedvision.errors import ConfigError
from fedvision.privacy.accounting import (
    LEAST_NOISE,
    MIN_NOISE,
    Mechanism,
    accounted_noise,
    bound_on_tpr,
    check_delta,
    delta_for,
    epsilon,
    grid_loss,
    inflated_clip,
    largest_tpr,
    noise_for,
    steps_for,
    two_epsilons,
)

HOSPITAL = 32 / 600
"""Sampling rate of 600 patients in batches of 32; 1900 steps are 100 rounds of one epoch."""

few = settings(max_examples=6, deadline=None, derandomize=True)
rates = st.sampled_from([0.01, 0.1, 0.5, 1.0])
noises = st.floats(0.5, 5.0)
numbers_of_steps = st.integers(1, 500)


def delta_of(chances: NDArray[np.float64], others: NDArray[np.float64], at: float) -> float:
    """Return the hockey-stick divergence of two distributions over the same bins, the worse direction."""
    grown = math.exp(at)
    one_way, other_way = np.maximum(chances - grown * others, 0), np.maximum(others - grown * chances, 0)
    return float(max(one_way.sum(), other_way.sum()))


def one_step(
    sampling_rate: float, noise: float, bins: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the output of a step, in bins, with and without a patient of one clip norm."""
    middle, width = np.linspace(-12 * noise, 1 + 12 * noise, bins, retstep=True)
    without = stats.norm.pdf(middle, 0, noise) * width
    return (1 - sampling_rate) * without + sampling_rate * stats.norm.pdf(middle, 1, noise) * width, without


def assert_tight(delta_at: Callable[[float], float], found: float, delta: float) -> None:
    """Assert that ``found`` is an epsilon at ``delta``, and that a slightly smaller one is not."""
    assert delta_at(found) <= delta * (1 + 1e-6)
    assert delta_at(found * 0.995 - 0.002) > delta


@pytest.mark.parametrize(
    ("sampling_rate", "noise", "steps", "delta", "expected"),
    [
        (HOSPITAL, 1.0, 1900, 1e-4, 15.40),
        (8 / 200, 0.8, 2500, 1e-3, 17.98),
        (256 / 20000, 0.6, 15800, 1e-6, 44.58),
        (1.0, 20.0, 300, 1e-4, 3.21),
        (HOSPITAL, 1.4493, 1900, 1e-4, 8.00),  # ten sites: of the sum
        (HOSPITAL, 1.375, 1900, 1e-4, 8.70),  # with one share of ten missing in each round
        (HOSPITAL, 1.4493 / math.sqrt(50), 1900, 1e-4, 1227),  # one of fifty shares alone
        (HOSPITAL, 1.4493 / 4, 1900, 1e-4, 237.8),  # four crops of a patient, clipped one by one
        (HOSPITAL, 1.4493 / 16, 1900, 1e-4, 8050),
    ],
)
def test_epsilons_are_those_of_the_published_tables(
    sampling_rate: float, noise: float, steps: int, delta: float, expected: float
) -> None:
    assert epsilon([Mechanism(sampling_rate, noise, steps)], delta) == pytest.approx(expected, rel=1.5e-3)


@pytest.mark.parametrize(
    ("patients", "batch", "steps", "target", "expected"),
    [(60, 8, 800, 8, 1.89), (600, 32, 1900, 8, 1.42), (2000, 64, 3200, 30, 0.67)],
)
def test_noise_multipliers_are_those_of_the_published_table(
    patients: int, batch: int, steps: int, target: float, expected: float
) -> None:
    delta = delta_for(patients)
    found = noise_for(target, delta, batch / patients, steps)
    assert found == pytest.approx(expected, abs=0.006)
    assert epsilon([Mechanism(batch / patients, found, steps)], delta) <= target
    assert epsilon([Mechanism(batch / patients, found - 0.001, steps)], delta) > target


@pytest.mark.parametrize("noise", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-6])
def test_one_step_without_sampling_costs_what_the_formula_says(noise: float, delta: float) -> None:
    def delta_at(at: float) -> float:
        near, far = 1 / (2 * noise) - at * noise, -1 / (2 * noise) - at * noise
        return float(stats.norm.cdf(near) - math.exp(at) * stats.norm.cdf(far))

    assert_tight(delta_at, epsilon([Mechanism(1.0, noise, 1)], delta), delta)


@pytest.mark.parametrize(("sampling_rate", "noise"), [(0.05, 0.5), (0.3, 1.0), (0.9, 2.0)])
def test_one_step_with_sampling_costs_what_integration_says(sampling_rate: float, noise: float) -> None:
    chances, others = one_step(sampling_rate, noise, 400_001)
    found = epsilon([Mechanism(sampling_rate, noise, 1)], 1e-4)
    assert_tight(lambda at: delta_of(chances, others, at), found, 1e-4)


def test_two_different_steps_cost_what_integration_says() -> None:
    first, second = one_step(0.3, 0.8, 2001), one_step(0.7, 1.5, 2001)
    chances, others = np.outer(first[0], second[0]), np.outer(first[1], second[1])
    found = epsilon([Mechanism(0.3, 0.8, 1), Mechanism(0.7, 1.5, 1)], 1e-3)
    assert_tight(lambda at: delta_of(chances, others, at), found, 1e-3)


@few
@given(rates, noises, numbers_of_steps)
def test_more_noise_costs_less_and_more_sampling_or_steps_cost_more(
    sampling_rate: float, noise: float, steps: int
) -> None:
    cost = epsilon([Mechanism(sampling_rate, noise, steps)], 1e-4)
    slack = 1e-3 * cost + 1e-4  # the grids of two calls differ
    assert epsilon([Mechanism(sampling_rate, noise * 1.2, steps)], 1e-4) <= cost + slack
    assert epsilon([Mechanism(sampling_rate / 2, noise, steps)], 1e-4) <= cost + slack
    assert epsilon([Mechanism(sampling_rate, noise, steps + 50)], 1e-4) >= cost - slack
    assert epsilon([Mechanism(sampling_rate, noise, steps)], 1e-3) <= cost + slack


@few
@given(rates, noises, rates, noises, numbers_of_steps)
def test_two_mechanisms_cost_no_more_than_the_sum_and_no_less_than_each(
    rate: float, noise: float, other_rate: float, other_noise: float, steps: int
) -> None:
    first, second = Mechanism(rate, noise, steps), Mechanism(other_rate, other_noise, 20)
    together = epsilon([first, second], 2e-5)
    slack = 1e-3 * together + 1e-4
    assert together <= epsilon([first], 1e-5) + epsilon([second], 1e-5) + slack
    assert together >= max(epsilon([first], 2e-5), epsilon([second], 2e-5)) - slack
    assert epsilon([second, first], 2e-5) == pytest.approx(together, rel=1e-6)


def test_the_order_and_the_cutting_of_steps_do_not_matter() -> None:
    whole = epsilon([Mechanism(HOSPITAL, 1.42, 1900)], 1e-4)
    parts = epsilon([Mechanism(HOSPITAL, 1.42, 900), Mechanism(HOSPITAL, 1.42, 1000)], 1e-4)
    assert parts == pytest.approx(whole, rel=1e-6)


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert epsilon([], 1e-5) == 0.0
    assert epsilon([Mechanism(0.5, 0.0, 0)], 1e-5) == 0.0
    for noise in (0.0, LEAST_NOISE / 2):
        assert epsilon([Mechanism(0.5, 1.0, 10), Mechanism(0.5, noise, 1)], 1e-5) == math.inf


def test_a_plan_too_large_for_a_distribution_is_bounded_by_renyi() -> None:
    found = epsilon([Mechanism(1.0, 0.3, 1_000_000)], 1e-5)
    shift = 1_000_000 / (2 * 0.3**2)
    assert shift < found < 1.2 * shift
    assert largest_tpr([Mechanism(1.0, 0.3, 1_000_000)], 0.01) == 1.0


def test_a_delta_below_what_the_distribution_cuts_off_is_still_bounded() -> None:
    found = epsilon([Mechanism(HOSPITAL, 1.42, 1900)], 1e-30)
    assert epsilon([Mechanism(HOSPITAL, 1.42, 1900)], 1e-15) < found < 40


@pytest.mark.parametrize(("rate", "noise", "steps"), [(0.0, 1.0, 1), (1.1, 1.0, 1), (math.nan, 1.0, 1),
                                                       (0.5, -1.0, 1), (0.5, math.inf, 1), (0.5, math.nan, 1),
                                                       (0.5, 1.0, -1)])  # fmt: skip
def test_a_mechanism_out_of_range_is_refused(rate: float, noise: float, steps: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        Mechanism(rate, noise, steps)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, math.nan])
def test_a_delta_that_is_no_probability_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="delta must be between"):
        epsilon([], delta)


def test_a_target_that_no_noise_meets_is_refused_and_says_what_can_be_met() -> None:
    with pytest.raises(ConfigError, match="noise multiplier 1000 gives 19") as caught:
        noise_for(0.01, 1e-5, 1.0, 10_000_000)
    assert "epsilon 20 or more" in caught.value.hint
    for target in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="epsilon must be > 0"):
            noise_for(target, 1e-5, 0.1, 10)
        with pytest.raises(ConfigError, match="epsilon must be > 0"):
            steps_for(target, 1e-5, 0.1, 1.0)


def test_a_generous_target_still_gets_some_noise() -> None:
    assert noise_for(1e7, 1e-4, 0.01, 1) == MIN_NOISE


@pytest.mark.parametrize(("target", "rate", "noise"), [(8.0, HOSPITAL, 1.42), (2.0, 1.0, 10.0)])
def test_the_most_steps_are_the_most(target: float, rate: float, noise: float) -> None:
    found = steps_for(target, 1e-4, rate, noise)
    assert epsilon([Mechanism(rate, noise, found)], 1e-4) <= target
    assert epsilon([Mechanism(rate, noise, found + 1)], 1e-4) > target


def test_a_single_step_that_costs_too_much_is_refused_and_says_what_it_costs() -> None:
    with pytest.raises(ConfigError, match=r"one step costs 4\.38") as caught:
        steps_for(0.5, 1e-5, 1.0, 1.0)
    assert "epsilon 4.4 or more" in caught.value.hint
    with pytest.raises(ConfigError, match="one step costs inf"):
        steps_for(0.5, 1e-5, 1.0, 0.0)


def test_steps_that_cost_next_to_nothing_end_at_ten_million() -> None:
    assert steps_for(1.0, 1e-5, 1e-4, 50.0) == 10_000_000


def test_delta_is_a_tenth_of_one_patient_and_never_above_one_patient() -> None:
    assert delta_for(600) == pytest.approx(1 / 6000)
    check_delta(1 / 600, 600)
    check_delta(delta_for(1), 1)
    for delta in (0.002, 0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="at most 1 / 600 patients"):
            check_delta(delta, 600)
    with pytest.raises(ConfigError, match="num_patients"):
        delta_for(0)


@pytest.mark.parametrize(
    ("at", "delta", "fpr", "expected"),
    [(0.0, 0.0, 0.3, 0.3), (math.inf, 0.0, 0.01, 1.0), (1.0, 0.0, 0.01, 0.0271828), (0.0, 0.1, 0.2, 0.3),
     (3.0, 0.0, 0.5, 1 - 0.5 * math.exp(-3)), (800.0, 0.0, 0.0, 0.0), (1.0, 0.01, 0.0, 0.01)],
)  # fmt: skip
def test_the_bound_on_an_attack_is_that_of_epsilon_and_delta(
    at: float, delta: float, fpr: float, expected: float
) -> None:
    assert bound_on_tpr(at, delta, fpr) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("at", "delta", "fpr"), [(-1.0, 0.0, 0.1), (1.0, 1.1, 0.1), (1.0, 0.1, math.nan)])
def test_a_bound_for_impossible_numbers_is_refused(at: float, delta: float, fpr: float) -> None:
    with pytest.raises(ValueError, match="need epsilon"):
        bound_on_tpr(at, delta, fpr)


@pytest.mark.parametrize(
    ("target", "noise", "expected", "at_a_tenth"),
    [(1, 7.47, 0.022, 0.003), (8, 1.45, 0.297, 0.099), (30, 0.742, 0.978, 0.906)],
)
def test_the_largest_true_positive_rate_is_that_of_the_published_table(
    target: float, noise: float, expected: float, at_a_tenth: float
) -> None:
    plan = [Mechanism(HOSPITAL, noise, 1900)]
    assert largest_tpr(plan, 0.01) == pytest.approx(expected, abs=1.5e-3)
    assert largest_tpr(plan, 0.001) == pytest.approx(at_a_tenth, abs=1.5e-3)
    assert largest_tpr(plan, 0.01) <= bound_on_tpr(target, 1e-4, 0.01)


def test_the_best_attack_on_one_gaussian_step_is_the_likelihood_ratio() -> None:
    for fpr in (0.001, 0.01, 0.3):
        best = stats.norm.cdf(stats.norm.ppf(fpr) + 1 / 1.5)
        assert best <= largest_tpr([Mechanism(1.0, 1.5, 1)], fpr) < 1.001 * best


def test_without_steps_an_attack_guesses_and_without_noise_it_wins() -> None:
    assert largest_tpr([], 0.01) == 0.01
    assert largest_tpr([Mechanism(0.5, 0.0, 1)], 0.01) == 1.0
    with pytest.raises(ValueError, match="need epsilon"):
        largest_tpr([], -0.1)


def test_one_share_alone_protects_far_less_than_the_sum() -> None:
    intact, broken = two_epsilons([Mechanism(HOSPITAL, 1.4493, 1900)], 10, 1e-4)
    assert intact == pytest.approx(8.0, abs=0.01)
    assert broken == pytest.approx(115.7, abs=0.2)
    same, alone = two_epsilons([Mechanism(HOSPITAL, 1.4493, 1900)], 1, 1e-4)
    assert same == alone == pytest.approx(intact)
    with pytest.raises(ValueError, match="honest"):
        two_epsilons([], 0, 1e-4)


@few
@given(st.integers(1, 40), st.floats(0.5, 30), st.integers(0, 2**32))
def test_rounding_lengthens_a_patient_by_at_most_the_inflated_clip(
    size: int, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(50):
        patient = rng.normal(size=size) * rng.integers(0, 2, size)
        patient *= scale / max(np.linalg.norm(patient), scale * 1e-9)  # one clip norm, in steps
        others = rng.integers(-5, 5, size) + 0.5 - rng.uniform(0, 1, size) * patient  # near the edges
        change = np.rint(others + patient) - np.rint(others)
        assert np.linalg.norm(change) <= inflated_clip(size, scale) * scale


def test_a_sum_rounded_to_float32_changes_by_at_most_the_inflated_clip() -> None:
    rng, patients, scale, size = np.random.default_rng(1), 500, 2.0**40, 2
    for _ in range(300):
        direction = rng.normal(size=size)
        whole = direction / np.linalg.norm(direction) * patients  # the longest sum there is
        one = rng.normal(size=size)
        one /= np.linalg.norm(one)
        change = (
            whole.astype(np.float32).astype(float) - (whole - one).astype(np.float32).astype(float)
        ) * scale
        assert np.linalg.norm(change) <= inflated_clip(size, scale, patients) * scale
        assert patients * 2.0**-23 > np.linalg.norm(change) / scale - 1


def test_the_grid_costs_nothing_that_shows_where_it_is_fine() -> None:
    assert inflated_clip(10**6, 2.0**10) == pytest.approx(1.98, abs=0.01)
    assert accounted_noise(1.42, 10**7, 2.0**30 / 10, 8) == pytest.approx(1.42, rel=3e-5)
    assert accounted_noise(1.42, 10**7, 2.0**30 / 10, 8) < 1.42
    assert grid_loss(10**7, 100, 4.0, 10**5) == pytest.approx(1.3e-56, rel=0.02)
    assert grid_loss(10**9, 10**4, 4.0, 10**9) < 1e-20


@pytest.mark.parametrize(("share_steps", "honest"), [(4.0, 3), (5.0, 1), (4.5, 6)])
@pytest.mark.parametrize("sampling_rate", [0.1, 1.0])
def test_a_sum_of_discrete_gaussians_costs_no_more_than_accounted_for(
    share_steps: float, honest: int, sampling_rate: float
) -> None:
    scale = 6
    reach = np.arange(-200, 201)
    share = np.exp(-(reach**2) / (2 * share_steps**2))
    share /= share.sum()
    whole = share
    for _ in range(honest - 1):
        whole = np.convolve(whole, share)
    longest = scale + 1  # a patient of one clip norm, rounded
    without = np.concatenate([whole, np.zeros(longest)])
    moved = np.concatenate([np.zeros(longest), whole])
    chances = (1 - sampling_rate) * without + sampling_rate * moved
    noise = share_steps * math.sqrt(honest) / scale
    accounted = one_step(sampling_rate, accounted_noise(noise, 1, scale, honest), 200_001)
    forgotten = one_step(sampling_rate, noise, 200_001)
    for at in (0.1, 0.3, 0.6):
        really = delta_of(chances, without, at)
        assert really <= delta_of(*accounted, at) + 1e-12
        assert really > delta_of(*forgotten, at) or really < 1e-12


@pytest.mark.parametrize("share_steps", [1.0, 1.2])
@pytest.mark.parametrize("honest", [2, 5])
def test_a_sum_of_discrete_gaussians_is_as_near_to_one_as_the_bound_says(
    share_steps: float, honest: int
) -> None:
    reach = np.arange(-60, 61)
    share = np.exp(-(reach**2) / (2 * share_steps**2))
    share /= share.sum()
    whole = share
    for _ in range(honest - 1):
        whole = np.convolve(whole, share)
    around = np.arange(-(whole.size // 2), whole.size // 2 + 1)
    one = np.exp(-(around**2) / (2 * honest * share_steps**2))
    one /= one.sum()
    is_near = np.abs(around) < 12  # where nothing was cut off
    apart = np.abs(np.log(whole[is_near] / one[is_near])).max()
    assert 1e-4 * grid_loss(1, honest, share_steps, 1) < apart <= grid_loss(1, honest, share_steps, 1)


@pytest.mark.parametrize("width", [0.5, 0.8, 1.0])
def test_sums_over_shifted_grids_differ_by_no_more_than_poisson_says(width: float) -> None:
    grid = np.arange(-40, 41)
    sums = [np.exp(-((grid - shift) ** 2) / (2 * width**2)).sum() for shift in np.linspace(0, 1, 101)]
    assert math.log(max(sums) / min(sums)) <= 5 * math.exp(-2 * math.pi**2 * width**2)


def test_a_grid_too_coarse_for_a_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"at least 4 steps of the grid, got 3\.99"):
        accounted_noise(1.0, 10, 3.99 * 2, honest=4)
    assert accounted_noise(1.0, 10, 8.0, honest=4) < 1.0


@pytest.mark.parametrize(
    ("noise", "size", "scale", "honest"),
    [(0.0, 1, 9.0, 1), (1.0, 0, 9.0, 1), (1.0, 1, 0.0, 1), (1.0, 1, 9.0, 0)],
)
def test_an_impossible_grid_is_refused(noise: float, size: int, scale: float, honest: int) -> None:
    with pytest.raises(ValueError, match="need"):
        accounted_noise(noise, size, scale, honest)
    with pytest.raises(ValueError, match="need"):
        grid_loss(1, 1, 0.5, 1)


def test_the_accountant_is_loaded_only_when_it_counts() -> None:
    code = "import sys, fedvision.privacy.accounting; print('dp_accounting' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


def test_with_hardly_any_noise_every_patient_may_be_found() -> None:
    assert largest_tpr([Mechanism(1.0, 0.2, 10)], 0.001) > 0.99
