import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedvision.privacy import noise
from fedvision.privacy.noise import discrete_gaussian, measured_sigma, noise_scale

IMPOSSIBLE = 1e-9
"""Seeds are fixed, so a p-value below it is a wrong distribution, not bad luck."""


def drawn(size: int, sigma: float, seed: int = 1) -> NDArray[np.int64]:
    return discrete_gaussian(size, sigma, np.random.default_rng(seed).bytes)


def exact(sigma: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the integers within 14 sigma and their exact probabilities."""
    numbers = np.arange(-math.ceil(14 * sigma), math.ceil(14 * sigma) + 1)
    weights = np.exp(-(numbers**2) / (2 * sigma**2))
    return numbers, weights / weights.sum()


def p_value(samples: NDArray[np.int64], sigma: float) -> float:
    """Return that of a chi-square test against the exact distribution; the far bins are put together."""
    numbers, chances = exact(sigma)
    found = np.bincount(samples + numbers[-1], minlength=numbers.size)
    expected = chances * samples.size
    is_near = expected >= 10
    far = [expected[~is_near].sum(), found[~is_near].sum()]
    wanted, got = np.append(expected[is_near], far[0]), np.append(found[is_near], far[1])
    if wanted[-1] < 1:
        assert got[-1] <= 12
        wanted, got = wanted[:-1], got[:-1]
    return float(stats.chi2.sf(((got - wanted) ** 2 / wanted).sum(), len(wanted) - 1))


def source_of(*pieces: bytes) -> Callable[[int], bytes]:
    """Return a source of randomness that gives these pieces in order and checks what was asked for."""
    left = list(pieces)

    def give(size_bytes: int) -> bytes:
        assert len(left[0]) == size_bytes
        return left.pop(0)

    return give


@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0, 2.7, 63.9, 64.0, 200.0])
def test_the_numbers_follow_the_discrete_gaussian(sigma: float) -> None:
    assert p_value(drawn(400_000, sigma), sigma) > IMPOSSIBLE


@pytest.mark.parametrize("sigma", [0.3, 0.5])
def test_a_rounded_continuous_gaussian_would_be_found_out(sigma: float) -> None:
    rounded = np.rint(np.random.default_rng(1).normal(0, sigma, 400_000)).astype(np.int64)
    assert p_value(rounded, sigma) < IMPOSSIBLE


@pytest.mark.parametrize("factor", [2 / 3, 0.97, 1.03, 3 / 2])
@pytest.mark.parametrize("sigma", [1.0, 200.0])
def test_another_sigma_would_be_found_out(sigma: float, factor: float) -> None:
    assert p_value(drawn(400_000, sigma * factor), sigma) < IMPOSSIBLE


@pytest.mark.parametrize("sigma", [0.3, 1.7, 63.0, 100.0, 150.0])
def test_the_table_gives_every_integer_its_probability_to_2_to_the_minus_139(sigma: float) -> None:
    table = noise._table(sigma)
    width, whole = 1 << table.block_bits, 1 << 192
    bounds = [0, *table.bounds, whole]
    chances = [upper - lower for lower, upper in pairwise(bounds)]
    assert len(chances) == 1 + 2 * math.ceil(14 * sigma / width)
    with localcontext(prec=100):
        given = [Decimal(chances[0])]
        for block in range(len(chances) // 2):
            core, rest = Decimal(chances[1 + 2 * block]), Decimal(chances[2 + 2 * block])
            for member in range(width):
                kept = noise._exact_chance(table, block, member) if rest else 0
                given.append((core + rest * kept / whole) / width)
        reach = 20 * math.ceil(sigma)
        right = [
            Decimal(1),
            *(2 * (-Decimal(m * m) / (2 * Decimal(sigma) ** 2)).exp() for m in range(1, reach)),
        ]
        given += [Decimal(0)] * (reach - len(given))
        total_given, total_right = sum(given), sum(right)
        distance = sum(abs(g / total_given - r / total_right) for g, r in zip(given, right, strict=True))
    assert distance / 2 < Decimal(2) ** -139


@pytest.mark.parametrize("sigma", [64.0, 5181.3, 2.0**27])
def test_large_noise_has_the_moments_of_a_gaussian(sigma: float) -> None:
    samples = drawn(300_001, sigma) / sigma
    error = 1 / math.sqrt(samples.size)
    assert abs(samples.mean()) < 5 * error
    assert abs(samples.var() - 1) < 5 * error * math.sqrt(2)
    assert abs((samples**3).mean()) < 5 * error * math.sqrt(15)
    assert abs((samples**4).mean() - 3) < 5 * error * math.sqrt(96)


@pytest.mark.parametrize("sigma", [5181.3, 2.0**27])
def test_large_noise_has_the_shape_of_a_gaussian_and_even_low_bits(sigma: float) -> None:
    samples = drawn(300_000, sigma)
    assert stats.kstest(samples / sigma, "norm").pvalue > 1e-6
    assert stats.chisquare(np.bincount(samples & 255, minlength=256)).pvalue > 1e-6
    assert np.abs(samples).max() < 2**31


@pytest.mark.parametrize("sigma", [0.3, 5.0, 1000.0])
def test_the_noise_is_symmetric(sigma: float) -> None:
    samples = drawn(400_000, sigma)
    above, below = int((samples > 0).sum()), int((samples < 0).sum())
    assert abs(above - below) < 5 * math.sqrt(above + below)


@pytest.mark.parametrize("sigma", [5.0, 1000.0, 2.0**27])
def test_the_tails_weigh_what_they_should(sigma: float) -> None:
    samples = np.abs(drawn(1_000_000, sigma, seed=3))
    for factor in (3.0, 4.0):
        expected = 2 * stats.norm.sf((math.floor(factor * sigma) + 0.5) / sigma) * samples.size
        assert abs((samples > factor * sigma).sum() - expected) < 5 * math.sqrt(expected) + 0.01 * expected


@pytest.mark.parametrize("sigma", [0.3, 63.99, 64.0, 2.0**27 - 1, 2.0**27])
def test_the_most_extreme_number_fits_in_32_bits_and_in_14_sigma(sigma: float) -> None:
    table = noise._table(sigma)
    largest = math.ceil(14 * sigma / 2**table.block_bits) << table.block_bits
    assert 14 * sigma <= largest < min(14.04 * sigma + 1, 2**31)
    last_core = (table.bounds[-1] - 1).to_bytes(24, "big")
    word, more = last_core[:8][::-1], last_core[8:][::-1]
    extreme = source_of(word, more, b"\xff" * 4)
    assert discrete_gaussian(1, sigma, extreme).tolist() == [-largest]


def test_a_word_that_equals_a_bound_is_decided_by_more_bits() -> None:
    table = noise._table(100.0)
    place = 7
    word = np.array([table.tops[place]])
    below = noise._entries(table, word, source_of(bytes(16)))
    above = noise._entries(table, word, source_of(b"\xff" * 16))
    at = (table.bounds[place] % 2**128).to_bytes(16, "little")
    just_below = (table.bounds[place] % 2**128 - 1).to_bytes(16, "little")
    assert (below[0], above[0]) == (place, place + 1)
    assert noise._entries(table, word, source_of(at))[0] == place + 1
    assert noise._entries(table, word, source_of(just_below))[0] == place


def test_an_acceptance_near_its_chance_is_decided_by_more_bits() -> None:
    table, block, member = noise._table(1000.0), 20, 7
    chance = noise._exact_chance(table, block, member)
    for number, is_kept in ((chance - 1, True), (chance, False)):
        word, more = (number >> 128).to_bytes(8, "little"), (number % 2**128).to_bytes(16, "little")
        source = source_of(word, more)
        assert noise._rest_is_kept(table, np.array([block]), np.array([member]), source).tolist() == [is_kept]


@pytest.mark.parametrize("sigma", [64.0, 1000.0, 2.0**27])
def test_the_float_chance_of_acceptance_is_right_to_2_to_the_minus_48(sigma: float) -> None:
    table = noise._table(sigma)
    width, blocks = 1 << table.block_bits, len(table.bounds) // 2
    for block in (0, 1, 30, blocks - 1):
        for member in {0, 1, width // 2, width - 2, width - 1}:
            chance = noise._exact_chance(table, block, member)
            for off in (-(2.0**-39), 2.0**-39):  # decided in floating point, without more bits
                number = round(chance / 2**192 * 2**64 + off * 2**64)
                if 0 <= number < 2**64:
                    source = source_of(number.to_bytes(8, "little"))
                    kept = noise._rest_is_kept(table, np.array([block]), np.array([member]), source)
                    assert kept.tolist() == [off < 0]
            first = (block << table.block_bits) + 1
            fall = member * (2 * first + member) / (2 * sigma**2)
            depth = np.expm1(-(width - 1) * (2 * first + width - 1) / (2 * sigma**2))
            assert abs((np.expm1(-fall) - depth) / -depth - chance / 2**192) < 2.0**-48


def test_two_calls_give_different_numbers_whatever_was_seeded() -> None:
    np.random.seed(1)  # does nothing, and must not
    first = discrete_gaussian(1000, 50.0)
    np.random.seed(1)
    assert not np.array_equal(first, discrete_gaussian(1000, 50.0))


def test_the_operating_system_gives_the_right_distribution_too() -> None:
    assert p_value(discrete_gaussian(200_000, 2.0), 2.0) > IMPOSSIBLE


@pytest.mark.parametrize("sigma", [0.0, -1.0, 0.29, 2.0**27 + 1, math.inf, math.nan])
def test_a_sigma_out_of_range_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma must be from"):
        discrete_gaussian(1, sigma)


def test_a_size_may_be_zero_but_not_negative() -> None:
    assert discrete_gaussian(0, 1.0).shape == (0,)
    assert discrete_gaussian(3, 1.0).dtype == np.int64
    with pytest.raises(ValueError, match="size must be"):
        discrete_gaussian(-1, 1.0)


def test_a_source_that_gives_too_little_is_an_error() -> None:
    with pytest.raises(ValueError, match="gave 7 bytes instead of 80"):
        discrete_gaussian(10, 1.0, lambda size_bytes: bytes(7))


def test_the_shares_of_the_honest_sites_make_the_noise_of_the_sum() -> None:
    share = noise_scale(4000.0, 7)
    total = sum(drawn(100_000, share, seed) for seed in range(7))
    estimate, low, high = measured_sigma(total)
    assert low < 4000 < high
    assert abs(estimate / 4000 - 1) < 0.01


@pytest.mark.parametrize(("sigma", "honest"), [(0.0, 1), (-1.0, 1), (math.inf, 1), (math.nan, 1), (1.0, 0)])
def test_a_share_of_nothing_or_for_nobody_is_refused(sigma: float, honest: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        noise_scale(sigma, honest)


@pytest.mark.parametrize("factor", [2 / 3, math.sqrt(9 / 10), 3 / 2])
def test_a_few_thousand_numbers_show_noise_of_a_wrong_size(factor: float) -> None:
    _, low, high = measured_sigma(drawn(8192, 1000.0))
    assert low < 1000 < high
    _, low, high = measured_sigma(drawn(8192, 1000.0 * factor))
    assert not low < 1000 < high


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(400):
        _, low, high = measured_sigma(drawn(50, 30.0, seed), confidence=0.9)
        hits += low <= 30 <= high
    assert 335 <= hits <= 385


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [math.inf]])
def test_what_is_not_a_sample_is_refused(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="samples"):
        measured_sigma(np.array(samples))
    with pytest.raises(ValueError, match="confidence"):
        measured_sigma(np.ones(3), confidence=1.0)


def test_silence_measures_zero() -> None:
    assert measured_sigma(np.zeros(10)) == (0.0, 0.0, 0.0)
