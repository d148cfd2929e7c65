import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedvision.errors import MessageError
from fedvision.secagg.encoding import MAX_SITES, Encoding, decode_statistics, encode_statistics
from tests.vectors.make_primitives import FOLDER, KEY, key_of, text_of

sites = st.integers(3, MAX_SITES)
unit_vectors = arrays(
    np.float32, st.integers(1, 40), elements=st.floats(-1, 1, width=32, allow_subnormal=False)
)


def lifted(encoded: np.ndarray) -> np.ndarray:
    return encoded.view(np.int32).astype(np.int64)


def scaled_to(update: np.ndarray, norm: float) -> np.ndarray:
    """Scale to a norm, from below."""
    length = float(np.linalg.norm(update.astype(np.float64)))
    if length == 0:
        return update
    return (update.astype(np.float64) * (norm / length * (1 - 2**-22))).astype(np.float32)


def test_the_vectors_are_what_the_code_makes() -> None:
    assert (FOLDER / "encoding.json").read_text() == text_of("encoding")


@pytest.mark.parametrize(("num_sites", "noise"), [(3, 0.0), (10, 0.0), (255, 0.0), (10, 1.5), (200, 4.0)])
def test_the_scale_leaves_room_for_all_sites_and_eight_deviations_of_noise(
    num_sites: int, noise: float
) -> None:
    scale = Encoding(num_sites, 1, 1.0, 1, noise_multiplier=noise).scale
    assert scale == math.floor(2**30 / (num_sites + 8 * noise))
    assert (num_sites + 8 * noise) * scale <= 2**30
    assert num_sites * (scale + 1) + 8 * noise * scale < 2**31


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_of_any_number_of_sites_decode_exactly(sign: int) -> None:
    """All mass in one coordinate, all sites the same sign, largest weight, largest metric."""
    for num_sites in range(3, MAX_SITES + 1):
        coded = Encoding(num_sites, 4, 0.7, 1000, (3.0,))
        update = np.zeros(4, np.float32)
        update[num_sites % 4] = sign * np.nextafter(np.float32(0.7), np.float32(0))
        sent = [coded.encode(update, 1000, [3.0], key_of(num_sites, site)) for site in range(num_sites)]
        total = np.zeros(coded.length, np.uint32)
        for vector in sent:
            total += vector
        assert np.array_equal(lifted(total), sum(lifted(vector) for vector in sent)), num_sites
        assert np.abs(lifted(total)).max() < 2**30 + num_sites
        found = coded.decode(total)
        assert np.abs(found.mean_update - update).max() <= 0.7 / coded.scale
        assert found.metrics[0] == pytest.approx(3.0, abs=3.0 * 17 / coded.scale)
        assert found.total_weight == num_sites


@settings(max_examples=200, deadline=None)
@given(sites, unit_vectors, st.floats(1e-6, 1e6), st.integers(1, 5000), st.binary(min_size=32, max_size=32))
def test_an_encoded_vector_keeps_to_its_bounds(
    num_sites: int, update: np.ndarray, clip_norm: float, num_samples: int, key: bytes
) -> None:
    coded = Encoding(num_sites, update.size, clip_norm, 1000, (1.0, 2.0))
    update = scaled_to(update, clip_norm)
    values = lifted(coded.encode(update, num_samples, [0.5, 9.0], key))
    share = min(num_samples, 1000) / 1000
    assert np.abs(values).max() <= coded.scale + 1
    assert np.linalg.norm(values.astype(np.float64)) <= coded.norm_bound
    exact = update.astype(np.float64) * (share * coded.scale / clip_norm)
    assert np.abs(values[: update.size] - exact).max() < 1 + 1e-6
    for found, part in zip(values[-3:-1], (0.5, 1.0), strict=True):
        assert abs(found - part * share * coded.scale / 16) < 1 + 1e-6
    assert values[-1] == min(num_samples, 1000) * (coded.scale // 2 // 1000)


def test_a_coordinate_at_the_bound_never_passes_it() -> None:
    """Three sites have the largest scale, above 2**28: more than float32's 24 bits can count."""
    coded = Encoding(3, 1, 3.0, 1)
    assert coded.scale > 2**28
    for norm in (3.0, 3.0 * (1 + 9e-7)):
        for sign in (1, -1):
            update = np.array([sign * norm], np.float32)
            found = [int(lifted(coded.encode(update, 1, [], key_of(key)))[0]) for key in range(300)]
            assert max(abs(value) for value in found) <= coded.scale + 1
            assert min(abs(value) for value in found) >= coded.scale - 1


@pytest.mark.parametrize("part", [0.9, 0.3000001, 1e-3, 2.0**-27, 3e-10, -0.3000001, -3e-10])
def test_rounding_has_no_direction(part: float) -> None:
    """Large and small coordinates: the mean over many roundings is the exact value, five deviations."""
    coded = Encoding(3, 1, 1.0, 1)
    exact = Fraction(float(np.float32(part))) * coded.scale
    update = np.array([part], np.float32)
    runs = 4000
    total = sum(int(lifted(coded.encode(update, 1, [], key_of(part, run)))[0]) for run in range(runs))
    fraction = float(exact - math.floor(exact))
    deviation = math.sqrt(fraction * (1 - fraction) / runs)
    assert abs(float(Fraction(total, runs) - exact)) <= 5 * deviation + 2**-16


def test_rounding_has_no_direction_over_the_coordinates_of_a_long_update() -> None:
    size = 400_000
    coded = Encoding(200, size, 5.0, 1)
    update = np.full(size, 5.0 / math.sqrt(size) * 0.99, np.float32)
    values = lifted(coded.encode(update, 1, [], KEY))[:size]
    exact = Fraction(float(update[0])) * coded.scale / 5
    fraction = float(exact - math.floor(exact))
    assert 0.05 < fraction < 0.95
    assert abs(float(values.mean()) - float(exact)) < 5 * math.sqrt(fraction * (1 - fraction) / size)
    # Neighbours are rounded independently
    up = values > exact
    both = np.mean(up[1:] & up[:-1])
    assert abs(both - fraction**2) < 5 * fraction / math.sqrt(size)


def test_roundings_with_other_keys_differ_and_zero_stays_zero() -> None:
    coded = Encoding(10, 1000, 1.0, 1)
    update = np.full(1000, 0.01, np.float32)
    assert not np.array_equal(coded.encode(update, 1, [], key_of(1)), coded.encode(update, 1, [], key_of(2)))
    assert not coded.encode(np.zeros(1000, np.float32), 1, [], KEY)[:-1].any()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(3, 12), st.integers(1, 10**6))
def test_a_sum_decodes_to_the_weighted_means(data: st.DataObject, num_sites: int, weight_cap: int) -> None:
    coded = Encoding(num_sites, 6, 2.0, weight_cap, (5.0,))
    total, updates, samples, metrics = np.zeros(coded.length, np.uint32), [], [], []
    for site in range(data.draw(st.integers(1, num_sites))):
        updates.append(scaled_to(np.random.default_rng(site).normal(size=6).astype(np.float32), 2.0))
        samples.append(data.draw(st.integers(1, 2 * weight_cap)))
        metrics.append(data.draw(st.floats(0, 5)))
        total += coded.encode(updates[-1], samples[-1], metrics[-1:], key_of(site))
    found = coded.decode(total)
    shares = np.array([min(count, weight_cap) / weight_cap for count in samples])
    units = coded.scale * shares.sum()
    assert found.total_weight == pytest.approx(shares.sum(), rel=1e-12)
    mean = np.average(updates, axis=0, weights=shares)
    assert np.abs(found.mean_update - mean).max() <= 2.0 * len(samples) / units * (1 + 1e-6)
    assert found.metrics[0] == pytest.approx(
        np.average(metrics, weights=shares), abs=5.0 * 16 * len(samples) / units + 1e-9
    )
    assert 0 <= found.metrics[0] <= 5


def test_a_weight_cap_above_the_resolution_rounds_weights_and_never_to_zero() -> None:
    coded = Encoding(255, 1, 1.0, 10**9)
    update = np.ones(1, np.float32)
    steps = coded.scale // 2
    for samples, step in ((1, 1), (10**9, steps), (5 * 10**9, steps), (10**9 // 2, round(steps / 2))):
        values = lifted(coded.encode(update, samples, [], KEY))
        assert values[-1] == step
        assert abs(values[0] - step * coded.scale / steps) <= 1


@pytest.mark.parametrize(
    "update",
    [
        [1.00001, 0, 0],
        [0.8, 0.8, 0],
        [np.nan, 0, 0],
        [np.inf, 0, 0],
        [0, -np.inf, 0],
        [3e38, 3e38, 3e38],
        [0, 0],
        [[0, 0, 0]],
    ],
)
def test_an_update_that_is_not_compliant_is_refused(update: list) -> None:
    with pytest.raises(ValueError):
        Encoding(5, 3, 1.0, 1).encode(np.array(update, np.float32), 1, [], KEY)


def test_other_wrong_inputs_are_refused() -> None:
    coded = Encoding(5, 3, 1.0, 10, (1.0,))
    good = np.zeros(3, np.float32)
    for update, samples, metrics, key in (
        (good.astype(np.float64), 1, [0.5], KEY),
        (good, 0, [0.5], KEY),
        (good, 1, [], KEY),
        (good, 1, [0.5, 0.5], KEY),
        (good, 1, [math.nan], KEY),
        (good, 1, [math.inf], KEY),
        (good, 1, [0.5], KEY[:16]),
    ):
        with pytest.raises(ValueError):
            coded.encode(update, samples, metrics, key)
    for change in (
        {"num_sites": 2},
        {"num_sites": 256},
        {"size": 0},
        {"clip_norm": 0.0},
        {"clip_norm": math.nan},
        {"weight_cap": 0},
        {"metric_caps": (0.0,)},
        {"metric_caps": (math.inf,)},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
    ):
        with pytest.raises(ValueError):
            Encoding(**{"num_sites": 5, "size": 3, "clip_norm": 1.0, "weight_cap": 10, **change})


@pytest.mark.parametrize("bad", json.loads((FOLDER / "encoding.json").read_text())["bad_sums"])
def test_a_sum_that_no_sites_can_have_made_is_refused(bad: dict) -> None:
    coded = Encoding(3, 5, 2.0, 100, (4.0, 1.0))
    with pytest.raises(MessageError):
        coded.decode(np.array(bad["total"], np.uint32))


@given(arrays(np.uint32, st.integers(0, 8), elements=st.integers(0, 2**32 - 1)))
def test_arbitrary_sums_decode_or_raise_a_message_error(total: np.ndarray) -> None:
    try:
        found = Encoding(3, 2, 2.0, 100, (4.0, 1.0)).decode(total)
    except MessageError:
        return
    assert np.isfinite(found.mean_update).all()
    assert 0 < found.total_weight <= 3
    assert np.linalg.norm(found.mean_update) <= 2.0 * (1 + 1e-12)
    for value, cap in zip(found.metrics, (4.0, 1.0), strict=True):
        assert math.isnan(value) or 0 <= value <= cap


@given(
    arrays(np.float64, st.integers(0, 30), elements=st.floats(-(2.0**38), 2.0**38, exclude_max=True)),
    st.integers(1, 255),
)
def test_sums_of_statistics_are_exact(values: np.ndarray, count: int) -> None:
    values = values[np.abs(values) < 2.0**38]
    encoded = encode_statistics(values)
    assert encoded.dtype == np.uint32
    assert encoded.shape == (3 * values.size,)
    found = decode_statistics(encoded * np.uint32(count), values.shape)
    for value, total in zip(values, found, strict=True):
        assert total == float(count * Fraction(round(Fraction(value) * 2**20), 2**20))


@given(st.lists(st.floats(-(2.0**37), 2.0**37), min_size=1, max_size=255))
def test_statistics_of_different_sites_add_up_exactly(values: list[float]) -> None:
    total = np.zeros(3, np.uint32)
    for value in values:
        total += encode_statistics(np.array(value))
    exact = sum(Fraction(round(Fraction(value) * 2**20), 2**20) for value in values)
    assert decode_statistics(total, ()) == float(exact)


def test_statistics_keep_their_shape() -> None:
    values = np.arange(12.0).reshape(2, 3, 2) - 5
    assert np.array_equal(decode_statistics(encode_statistics(values), (2, 3, 2)), values)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**38, -(2.0**38)])
def test_statistics_that_do_not_fit_are_refused(value: float) -> None:
    with pytest.raises(ValueError):
        encode_statistics(np.array([0.0, value]))


@given(arrays(np.uint32, st.integers(0, 7), elements=st.integers(0, 2**32 - 1)))
def test_arbitrary_sums_of_statistics_decode_or_raise_a_message_error(total: np.ndarray) -> None:
    try:
        found = decode_statistics(total, (2,))
    except MessageError:
        return
    assert np.abs(found).max() <= 255 * 2.0**38 + 2**9
