import math
import struct

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from fedvision.secagg.masking import add_masks, mask_stream
from fedvision.secagg.sketch import (
    BUCKETS,
    NORM_SLACK,
    ROWS,
    TABLES,
    centred,
    is_within,
    sketch,
    sketch_of_mask,
    sketches_of_masks,
    squared_norm,
    without_tail,
)
from tests.vectors.make_primitives import FOLDER, KEY, key_of, text_of, words

SLICE = 1 << 16
sizes = st.sampled_from([1, 2, 100, SLICE - 1, SLICE, SLICE + 1])


def slow_sketch(vector: np.ndarray, beta: bytes) -> list[int]:
    """The sketch as the module's docstring says it, one coordinate at a time."""
    key = HKDFExpand(hashes.SHA256(), 32, b"fedvision/sketch/v1").derive(beta)
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(8 * vector.size))
    buckets = [0] * ROWS
    for index, value in enumerate(vector.tolist()):
        for table, word in enumerate(struct.unpack_from("<4H", stream, 8 * index)):
            sign = -1 if word >> 9 & 1 else 1
            buckets[table * BUCKETS + word % BUCKETS] += sign * value
    return [bucket % 2**32 for bucket in buckets]


def test_the_vectors_are_what_the_code_makes() -> None:
    assert (FOLDER / "sketch.json").read_text() == text_of("sketch")


@pytest.mark.parametrize("size", [1, 17, 3000, SLICE + 3])
def test_every_coordinate_goes_into_one_bucket_of_each_table_with_a_sign(size: int) -> None:
    vector = words(KEY, size)
    found = sketch(vector, key_of("beta"))
    assert found.dtype == np.uint32
    assert found.tolist() == slow_sketch(vector, key_of("beta"))


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(0, 2**32), st.integers(0, 2**32 - 1))
def test_a_sketch_is_linear_modulo_two_to_the_32(size: int, seed: int, factor: int) -> None:
    x, y = words(key_of(seed, 1), size), words(key_of(seed, 2), size)
    beta, times = key_of(seed), np.uint32(factor)
    assert np.array_equal(sketch(x + times * y, beta), sketch(x, beta) + times * sketch(y, beta))


@settings(max_examples=20, deadline=None)
@given(sizes, st.integers(0, 2**32), st.integers(0, 4))
def test_a_masked_sketch_less_the_masks_sketches_is_the_sketch(size: int, seed: int, count: int) -> None:
    x, beta = words(key_of(seed), size), key_of(seed, "beta")
    keys = [key_of(seed, index) for index in range(count)]
    signs = [(-1) ** index for index in range(count)]
    masked = x.copy()
    add_masks(masked, keys, signs)
    found = sketches_of_masks(keys, size, beta)
    assert found.shape == (count, ROWS)
    for key, row in zip(keys, found, strict=True):
        assert np.array_equal(row, sketch(mask_stream(key, size), beta))
        assert np.array_equal(row, sketch_of_mask(key, size, beta))
    left = sketch(masked, beta)
    for sign, row in zip(signs, found, strict=True):
        left -= row * np.uint32(sign % 2**32)
    assert np.array_equal(left, sketch(x, beta))


def test_another_seed_gives_another_sketch_and_the_same_seed_the_same() -> None:
    vector = words(KEY, 5000)
    first = sketch(vector, key_of(1))
    assert np.array_equal(first, sketch(vector, key_of(1)))
    assert np.mean(first == sketch(vector, key_of(2))) < 0.01


def test_buckets_and_signs_are_uniform_and_the_tables_independent() -> None:
    count = 3000
    places, signs = np.zeros((count, TABLES), int), np.zeros((count, TABLES), int)
    for index in range(count):
        found = centred(sketch(np.ones(1, np.uint32), key_of("uniform", index))).reshape(TABLES, BUCKETS)
        assert (np.abs(found).sum(axis=1) == 1).all()
        places[index], signs[index] = np.abs(found).argmax(axis=1), found.sum(axis=1)
    for table in range(TABLES):
        counts = np.bincount(places[:, table], minlength=BUCKETS)
        statistic = ((counts - count / BUCKETS) ** 2 / (count / BUCKETS)).sum()
        assert abs(statistic - (BUCKETS - 1)) < 5 * math.sqrt(2 * (BUCKETS - 1))
        assert abs(signs[:, table].sum()) < 5 * math.sqrt(count)
    for one in range(TABLES):
        for two in range(one):
            assert np.sum(places[:, one] == places[:, two]) < 30  # 3000 / 512, five deviations more
            assert abs(np.sum(signs[:, one] * signs[:, two])) < 5 * math.sqrt(count)


def test_the_last_coordinates_can_be_alone_in_their_buckets() -> None:
    rng = np.random.default_rng(3)
    update = rng.integers(-999, 999, 40_000).astype(np.int32)
    update[-2:] = 0
    tail = np.zeros_like(update)
    tail[-2:] = 77_000, -2_000_000
    for index in range(5):
        beta = key_of("tail", index)
        body, end = (centred(sketch(values.view(np.uint32), beta, 2)) for values in (update, tail))
        assert body @ end == 0
        assert end @ end == TABLES * (77_000**2 + 2_000_000**2)
        whole = centred(sketch((update + tail).view(np.uint32), beta, 2))
        assert whole @ whole == body @ body + end @ end
        ratio = (body @ body) / TABLES / float(update.astype(np.float64) @ update)
        assert abs(ratio - 1) < 0.2


@settings(max_examples=15, deadline=None)
@given(sizes, st.integers(0, 2**32))
def test_masks_are_sketched_alike_with_the_last_coordinates_apart(size: int, seed: int) -> None:
    beta, keys = key_of(seed, "beta"), [key_of(seed, index) for index in range(3)]
    apart = min(2, size - 1)
    found = sketches_of_masks(keys, size, beta, apart)
    for key, row in zip(keys, found, strict=True):
        assert np.array_equal(row, sketch(mask_stream(key, size), beta, apart))


def test_loss_and_weight_are_projected_out_of_a_clear_sketch() -> None:
    rng = np.random.default_rng(4)
    update = rng.integers(-999, 999, 40_000).astype(np.int32)
    update[-2:] = 0
    loud = update.copy()
    loud[-2:] = 77_000, -2_000_000
    beta = key_of("projected")
    rows = np.array([centred(sketch(values.view(np.uint32), beta)) for values in (update, loud)], float)
    plain, cleaned = without_tail(rows, update.size, beta)
    assert np.abs(plain - cleaned).max() < 1e-3
    assert abs(plain @ plain / (rows[0] @ rows[0]) - 1) < 0.02


def test_centring_lifts_to_the_nearest_integers() -> None:
    values = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1], np.uint32)
    assert centred(values).tolist() == [0, 1, 2**31 - 1, -(2**31), -1]


def test_the_threshold_has_the_error_probabilities_of_the_design() -> None:
    """Dense vectors: chi-squared with 2048 degrees, exactly; rejection 2**-20, acceptance at 1.21 2**-40."""
    assert chi2.sf(NORM_SLACK * ROWS, ROWS) < 2.0**-20
    assert chi2.sf(0.995 * NORM_SLACK * ROWS, ROWS) > 2.0**-20
    assert chi2.cdf(NORM_SLACK / 1.21**2 * ROWS, ROWS) < 2.0**-40
    assert chi2.cdf(NORM_SLACK / 1.20**2 * ROWS, ROWS) > 2.0**-40


def test_the_threshold_is_weaker_against_two_equal_coordinates_as_documented() -> None:
    """Each table adds -1, 0 or +1 quarters of the squared norm, with 1/1024, 1022/1024, 1/1024."""
    table = {-1: 1 / 1024, 0: 1022 / 1024, 1: 1 / 1024}
    law = {0: 1.0}
    for _ in range(TABLES):
        law = {
            total: sum(law.get(total - step, 0.0) * chance for step, chance in table.items())
            for total in range(min(law) - 1, max(law) + 2)
        }
    at_most = {k: sum(chance for total, chance in law.items() if total <= k) for k in law}
    assert sum(chance for total, chance in law.items() if 1 + total / 4 > NORM_SLACK) < 2.0**-7.9
    for steps, factor, chance in ((-1, 1.24, 2.0**-7.9), (-2, 1.52, 2.0**-17.3), (-3, 2.15, 2.0**-27.9)):
        assert math.sqrt(NORM_SLACK / (1 + steps / 4)) == pytest.approx(factor, abs=0.01)
        assert at_most[steps] < chance
    assert at_most[-4] == pytest.approx(2.0**-40)


def ratios(values: np.ndarray, runs: int) -> np.ndarray:
    exact = float((values.astype(np.float64) ** 2).sum())
    encoded = values.astype(np.int32).view(np.uint32)
    betas = (key_of("ratio", values.size, run) for run in range(runs))
    return np.array([squared_norm(sketch(encoded, beta)) / exact for beta in betas])


@pytest.mark.parametrize("kind", ["normal", "equal", "heavy tail"])
def test_the_norm_of_a_dense_vector_is_estimated_within_the_slack(kind: str) -> None:
    rng = np.random.default_rng(5)
    values = {
        "normal": rng.normal(0, 1000, 3000),
        "equal": np.full(3000, 777.0),
        "heavy tail": rng.standard_t(3, 3000) * 300,
    }[kind]
    found = ratios(np.rint(values), 300)
    assert abs(found.mean() - 1) < 5 / 32 / math.sqrt(300)
    assert 0.8 / 32 < found.std() < 1.2 / 32
    assert found.max() < NORM_SLACK
    assert found.min() > NORM_SLACK / 1.21**2


@pytest.mark.parametrize(("count", "spread"), [(1, 0.0), (2, 1.0), (16, 0.6), (256, 0.25)])
def test_the_norm_of_a_sparse_vector_is_estimated_without_bias(count: int, spread: float) -> None:
    """Fewer coordinates, heavier tails: one collision of two moves the estimate by a quarter."""
    found = ratios(np.full(count, 1000.0), 600)
    assert abs(found.mean() - 1) < 5 / 32 / math.sqrt(600) + 1e-12
    assert np.abs(found - 1).max() <= max(spread, 1e-12)
    if count == 1:
        assert (found == 1).all()
    if count == 2:
        assert set(np.round(found * 4).astype(int)) <= {3, 4, 5}
        assert np.mean(found != 1) < 1 / 128 + 5 * math.sqrt(1 / 128 / 600)


def test_a_vector_at_the_bound_passes_and_one_a_quarter_longer_does_not() -> None:
    rng = np.random.default_rng(7)
    values = rng.normal(size=4000)
    values *= 1e6 / np.linalg.norm(values)
    for seed in range(50):
        beta = key_of("at the bound", seed)
        for factor, accepted in ((1.0, True), (1.25, False)):
            encoded = np.rint(values * factor).astype(np.int32).view(np.uint32)
            assert is_within(sketch(encoded, beta), 1e6) is accepted


@pytest.mark.parametrize("count", [1, 2, 3, 40, 512, 1024, 5000])
def test_entries_of_half_the_ring_do_not_hide(count: int) -> None:
    """The largest compliant norm is that of three sites; 2**31 added to itself is 0."""
    vector = np.full(count, 1 << 31, np.uint32)
    for seed in range(100):
        assert not is_within(sketch(vector, key_of("half", seed)), 2.0**30 / 3 * 1.1)


def test_two_entries_of_half_the_ring_cancel_in_one_table_with_probability_1_in_512() -> None:
    vector = np.full(2, 1 << 31, np.uint32)
    runs = 4000
    passed = 0
    for seed in range(runs):
        tables = sketch(vector, key_of("two", seed)).reshape(TABLES, BUCKETS)
        passed += int((~tables.any(axis=1)).sum())
    expected = runs * TABLES / BUCKETS
    assert abs(passed - expected) < 5 * math.sqrt(expected)


def test_shifted_rows_would_let_a_poisoned_vector_through_and_our_sketch_does_not() -> None:
    """Why the sketch draws a bucket for each coordinate, not a shift for each row of 512."""

    def rolled_rows(vector: np.ndarray, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        tables = np.zeros((TABLES, BUCKETS), np.uint32)
        for row in vector.reshape(-1, BUCKETS):
            for table in tables:
                table += np.roll(row, rng.integers(BUCKETS)) * np.uint32(rng.choice([1, 2**32 - 1]))
        return tables.ravel()

    poisoned = np.zeros(8 * BUCKETS, np.uint32)
    poisoned[2 * BUCKETS : 4 * BUCKETS] = 1 << 31
    for seed in range(20):
        assert not rolled_rows(poisoned, seed).any()  # whatever the shifts and signs
        assert not is_within(sketch(poisoned, key_of("rolled", seed)), 2.0**30)


def test_wrong_inputs_are_refused() -> None:
    good = np.zeros(5, np.uint32)
    for vector, beta in (
        (good.astype(np.int32), KEY),
        (good.reshape(1, 5), KEY),
        (good, KEY[:31]),
    ):
        with pytest.raises(ValueError):
            sketch(vector, beta)
    with pytest.raises(ValueError):
        sketches_of_masks([KEY[:31]], 5, KEY)
    with pytest.raises(ValueError):
        squared_norm(np.zeros(2047, np.uint32))
