import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvision.errors import MessageError
from fedvision.secagg import gram
from fedvision.secagg.sketch import NORM_SLACK, ROWS, sketch
from tests.vectors.make_primitives import FOLDER, KEY, key_of, text_of, words

FIELD = math.prod(gram.PRIMES)


def collusion(num_sites: int) -> int:
    return -(-num_sites // 3) - 1


def deal_all(
    values: dict[int, np.ndarray], degree: int, points: list[int]
) -> dict[int, dict[int, np.ndarray]]:
    """Return shares by holder and dealer."""
    dealt = {dealer: gram.deal(v, degree, points, key_of("deal", dealer)) for dealer, v in values.items()}
    return {holder: {dealer: dealt[dealer][holder] for dealer in values} for holder in points}


def deal_zeros(dealers: list[int], degree: int, points: list[int]) -> dict[int, dict[int, np.ndarray]]:
    """Return shares of zeros by holder and dealer."""
    count = gram.zero_count(len(dealers), degree)
    dealt = {i: gram.deal_zero(count, 2 * degree, points, key_of("zero", i)) for i in dealers}
    return {holder: {dealer: dealt[dealer][holder] for dealer in dealers} for holder in points}


def answers_of(values: dict[int, np.ndarray], points: list[int]) -> dict[int, np.ndarray]:
    degree = collusion(len(points))
    held, zeros = deal_all(values, degree, points), deal_zeros(sorted(values), degree, points)
    return {h: gram.products(held[h], [gram.extract_zeros(zeros[h], degree)]) for h in points}


def add_to(share: np.ndarray, amount: int) -> np.ndarray:
    """Add a number to every element of the field in ``share``."""
    numbers = np.full(share.shape, amount, np.int64)
    return gram.add_shares([share, gram.deal(numbers, 0, [1], KEY)[1]])


def test_the_vectors_are_what_the_code_makes() -> None:
    assert (FOLDER / "gram.json").read_text() == text_of("gram")


def test_the_primes_are_the_largest_of_21_bits_and_the_field_fits_63() -> None:
    def is_prime(number: int) -> bool:
        return all(number % divisor for divisor in range(2, math.isqrt(number) + 1))

    found = [number for number in range(2**21 - 1, 2**21 - 25, -1) if is_prime(number)]
    assert tuple(found[:3]) == gram.PRIMES
    assert 2**62 < FIELD < 2**63


@settings(max_examples=60, deadline=None)
@given(st.floats(1, 1e9), st.integers(0, 2**32))
def test_a_sketch_is_rounded_to_the_nearest_unit(norm_bound: float, seed: int) -> None:
    values = words(key_of(seed), ROWS)
    found = gram.round_sketch(values, norm_bound)
    exact = [
        Fraction(int(v) - (int(v) >> 31 << 32)) * 4096 / Fraction(norm_bound) for v in values[:50].tolist()
    ]
    for number, value in zip(found.tolist(), exact, strict=False):
        assert abs(number - value) <= Fraction(1, 2) + abs(value) * Fraction(1, 2**51)


def test_ties_are_rounded_to_even_numbers() -> None:
    values = np.array([1, 3, 5, 2**32 - 1, 2**32 - 3], np.uint32)
    assert gram.round_sketch(values, 2 * 4096.0).tolist() == [0, 2, 2, 0, -2]


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(3, 14), st.integers(1, 60), st.sampled_from([3, 200, 2**13, 2**21]))
def test_the_inner_products_are_exact(data: st.DataObject, n: int, size: int, largest: int) -> None:
    points = sorted(data.draw(st.lists(st.integers(1, 255), min_size=n, max_size=n, unique=True)))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    values = {point: rng.integers(-largest, largest + 1, size) for point in points}
    answers = answers_of(values, points)
    degree = collusion(n)
    kept = data.draw(st.permutations(points))[: data.draw(st.integers(2 * degree + 1, n))]
    found = gram.interpolate({holder: answers[holder] for holder in kept}, 2 * degree)
    rows = np.array([values[point] for point in points])
    assert np.array_equal(gram.gram_matrix(found, n), rows @ rows.T)


def test_the_longest_sketches_of_many_sites_are_multiplied_exactly() -> None:
    points = list(range(1, 41))
    signs = np.where(words(KEY, 40 * ROWS) % 2 == 0, 1, -1).reshape(40, ROWS)
    rows = signs * (2**21 - 1)
    found = gram.interpolate(answers_of(dict(zip(points, rows, strict=True)), points), 26)
    assert np.array_equal(gram.gram_matrix(found, 40), rows @ rows.T)


def test_the_sum_of_several_zeros_hides_as_one_does() -> None:
    points = [1, 2, 3, 4]
    values = {point: np.arange(5) * point for point in points}
    held = deal_all(values, 1, points)
    zeros = [gram.deal_zero(10, 2, points, key_of("several", dealer)) for dealer in range(3)]
    answers = {h: gram.products(held[h], [zero[h] for zero in zeros]) for h in points}
    bare = {h: gram.products(held[h], []) for h in points}
    assert np.array_equal(gram.interpolate(answers, 2), gram.interpolate(bare, 2))
    assert not any((answers[h] == bare[h]).any() for h in points)


def test_the_sum_of_all_vectors_can_be_opened_alone() -> None:
    points = [1, 4, 6, 9, 200]
    values = {point: np.arange(-3, 4) * point**2 for point in points}
    held = deal_all(values, 1, points)
    opened = gram.interpolate({h: gram.add_shares(held[h].values()) for h in points}, 1)
    assert np.array_equal(opened, sum(values.values()))


@pytest.mark.parametrize("n", [4, 7, 10, 31])
def test_shares_of_as_many_sites_as_may_collude_say_nothing(n: int) -> None:
    """The shares at any m points are the uniform coefficients times an invertible matrix, plus a constant."""
    degree = collusion(n)
    rng = np.random.default_rng(n)
    for prime in gram.PRIMES:
        for _ in range(5):
            points = rng.choice(np.arange(1, 256), degree, replace=False)
            matrix = [[pow(int(point), power, prime) for power in range(1, degree + 1)] for point in points]
            determinant = round_determinant(matrix, prime)
            assert determinant % prime != 0


def round_determinant(matrix: list[list[int]], prime: int) -> int:
    """Return the determinant modulo a prime, by elimination."""
    rows, result = [list(row) for row in matrix], 1
    for column in range(len(rows)):
        pivot = next((r for r in range(column, len(rows)) if rows[r][column] % prime), None)
        if pivot is None:
            return 0
        if pivot != column:
            rows[column], rows[pivot], result = rows[pivot], rows[column], -result
        result = result * rows[column][column] % prime
        inverse = pow(rows[column][column], -1, prime)
        for r in range(column + 1, len(rows)):
            factor = rows[r][column] * inverse % prime
            rows[r] = [(a - factor * b) % prime for a, b in zip(rows[r], rows[column], strict=True)]
    return result


@pytest.mark.parametrize("constant", [0, 1, -(2**20), 2**61])
def test_a_share_is_uniform_whatever_was_shared(constant: int) -> None:
    count = 1 << 17
    share = gram.deal(np.full(count, constant), 1, [3, 5], key_of("uniform", constant))[5]
    for index, prime in enumerate(gram.PRIMES):
        residues = (share >> np.uint64(21 * index)) & np.uint64(2**21 - 1)
        assert residues.max() < prime
        counts = np.bincount((residues * np.uint64(256) // np.uint64(prime)).astype(int), minlength=256)
        statistic = ((counts - count / 256) ** 2 / (count / 256)).sum()
        assert abs(statistic - 255) < 5 * math.sqrt(2 * 255)


def test_coefficients_are_residues_without_a_reduction() -> None:
    """21 bits that are no residue are left out, about ten in two million; reduced they would be biased."""
    for index, prime in enumerate(gram.PRIMES):
        drawn = gram._uniform(KEY, b"label", index, (3, 1 << 20))
        assert drawn.shape == (3, 1 << 20)
        assert drawn.max() < prime
        assert not np.array_equal(drawn, gram._uniform(KEY, b"other", index, (3, 1 << 20)))


@settings(deadline=None)
@given(
    st.sampled_from(gram.PRIMES), st.lists(st.integers(-(2**32), 2**32 - 1), min_size=1), st.integers(-2, 2)
)
def test_reduction_is_exact_up_to_the_largest_float64_integers(
    prime: int, quotients: list[int], offset: int
) -> None:
    numbers = [max(-(2**53), min(quotient * prime + offset, 2**53)) for quotient in quotients]
    found = gram._modulo(np.array(numbers, np.float64), prime)
    assert found.tolist() == [number % prime for number in numbers]


def test_the_residues_of_an_element_are_independent() -> None:
    share = gram.deal(np.zeros(1 << 16, np.int64), 1, [1, 2], KEY)[1]
    parts = [((share >> np.uint64(21 * i)) & np.uint64(2**21 - 1)).astype(float) for i in range(3)]
    for one, two in itertools.combinations(parts, 2):
        assert abs(np.corrcoef(one, two)[0, 1]) < 5 / 256


def test_the_same_seed_deals_the_same_and_zeros_have_polynomials_of_their_own() -> None:
    points = [1, 2, 3, 4]
    first = gram.deal(np.zeros(9, np.int64), 2, points, KEY)
    again = gram.deal(np.zeros(9, np.int64), 2, points, KEY)
    zeros = gram.deal_zero(9, 2, points, KEY)
    other = gram.deal(np.zeros(9, np.int64), 2, points, key_of("other"))
    for point in points:
        assert np.array_equal(first[point], again[point])
        assert not (first[point] == zeros[point]).any()
        assert not (first[point] == other[point]).any()
    assert not gram.interpolate(zeros, 2).any()


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([4, 7, 10, 13]))
def test_lying_holders_are_detected_up_to_the_number_that_may_collude(data: st.DataObject, n: int) -> None:
    points, degree = list(range(1, n + 1)), collusion(n)
    values = {point: np.arange(4) - point for point in points}
    answers = answers_of(values, points)
    liars = data.draw(st.lists(st.sampled_from(points), min_size=1, max_size=degree, unique=True))
    pair = data.draw(st.integers(0, n * (n + 1) // 2 - 1))
    for liar in liars:
        shift = np.zeros(n * (n + 1) // 2, np.int64)
        shift[pair] = data.draw(st.integers(1, 2**40))
        answers[liar] = gram.add_shares([answers[liar], gram.deal(shift, 0, [1], KEY)[1]])
    with pytest.raises(MessageError):
        gram.interpolate(answers, 2 * degree)


def test_a_dealer_of_garbage_is_detected() -> None:
    """Shares of degree m + 1, or random ones, of a single site out of seven."""
    points = list(range(1, 8))
    values = {point: np.arange(6) + point for point in points}
    zeros = deal_zeros(points, 2, points)
    for garbage in (
        gram.deal(values[3], 3, points, KEY),
        {h: gram.deal(values[3], 2, points, key_of("garbage", h))[h] for h in points},
    ):
        held = deal_all(values, 2, points)
        for holder in points:
            held[holder][3] = garbage[holder]
        answers = {h: gram.products(held[h], [gram.extract_zeros(zeros[h], 2)]) for h in points}
        with pytest.raises(MessageError):
            gram.interpolate(answers, 4)


def test_a_dealer_whose_zeros_are_none_is_named() -> None:
    points = list(range(1, 8))
    zeros = deal_zeros(points, 2, points)
    checks = {h: gram.combine(list(zeros[h].values()), KEY) for h in points}
    assert not gram.interpolate(checks, 4).any()
    for amount, where in ((1, 0), (-(2**26), 3), (gram.PRIMES[1] * gram.PRIMES[2], 1), (5, -1)):
        shifted = {h: dict(zeros[h]) for h in points}
        for holder in points:
            number = np.zeros(zeros[holder][5].size, np.int64)
            number[where] = amount
            shifted[holder][5] = gram.add_shares([zeros[holder][5], gram.deal(number, 0, [1], KEY)[1]])
        checks = {h: gram.combine(list(shifted[h].values()), KEY) for h in points}
        assert np.flatnonzero(gram.interpolate(checks, 4)).tolist() == [points.index(5)]


def test_a_combination_of_many_zeros_is_linear_and_exact() -> None:
    rows = [gram.deal(np.full(5000, 2**61), 1, [1, 2], key_of("combine", i)) for i in range(2)]
    found = {h: gram.combine([row[h] for row in rows], KEY) for h in (1, 2)}
    added = {h: gram.combine([gram.add_shares(row[h] for row in rows)], KEY) for h in (1, 2)}
    for holder in (1, 2):
        assert gram.add_shares([found[holder][:1], found[holder][1:]]) == added[holder]
    assert gram.combine([], KEY).shape == (0,)


def test_extracted_zeros_are_zeros_and_depend_on_every_dealer() -> None:
    points, degree = list(range(1, 11)), 3
    zeros = deal_zeros(points, degree, points)
    made = {h: gram.extract_zeros(zeros[h], degree) for h in points}
    assert made[1].shape == (55,)
    assert not gram.interpolate(made, 2 * degree).any()
    for dealer in points:
        changed = dict(zeros[4])
        changed[dealer] = add_to(changed[dealer], 1)
        assert not (gram.extract_zeros(changed, degree) == made[4]).any()


def test_extracted_zeros_are_independent_if_the_rest_is_honest() -> None:
    """Any n - m columns of the n - m rows are invertible: honest dealers alone make them uniform."""
    n, degree = 7, 2
    for prime in gram.PRIMES:
        for columns in itertools.combinations(range(1, n + 1), n - degree):
            matrix = [[pow(column, row, prime) for column in columns] for row in range(n - degree)]
            assert round_determinant(matrix, prime) % prime != 0


def isotropic() -> np.ndarray:
    """Return a long vector whose squared norm is the field's size, so 0 in the field."""
    rest, entries = FIELD, []
    while rest > 50:
        entries.append(math.isqrt(rest))
        rest -= entries[-1] ** 2
    vector = np.zeros(200, np.int64)
    vector[: len(entries) + rest] = entries + [1] * rest
    assert sum(int(entry) ** 2 for entry in vector) == FIELD
    return vector


def test_a_vector_that_wraps_in_the_field_contradicts_the_honest_ones() -> None:
    points = list(range(1, 8))
    rng = np.random.default_rng(3)
    values = {point: rng.integers(-180, 181, 200) for point in points}
    values[2] = isotropic()
    matrix = gram.gram_matrix(gram.interpolate(answers_of(values, points), 4), 7)
    assert matrix[1, 1] == 0
    assert gram.over_bound(matrix) == ()
    assert not gram.is_consistent(matrix)


def test_a_coalition_that_wraps_gains_nothing_in_its_joint_norm() -> None:
    """Where honest sketches are 0, Cauchy-Schwarz is blind; then the joint vector is small by itself."""
    points = list(range(1, 8))
    long, rng = isotropic(), np.random.default_rng(4)
    honest = rng.integers(-180, 181, (7, 200)) * (long == 0)
    values = {point: honest[index] for index, point in enumerate(points)}
    values[1], values[2] = honest[0] + long, honest[1] - long
    held = deal_all(values, 2, points)
    matrix = gram.gram_matrix(gram.interpolate(answers_of(values, points), 4), 7)
    assert gram.over_bound(matrix) == ()
    assert gram.is_consistent(matrix)
    joint = values[1] + values[2]
    assert joint @ joint == matrix[:2, :2].sum() <= 4 * matrix.diagonal()[:2].max()
    # One alone is found when the sum is opened: it is not the sketch of what was sent
    opened = gram.interpolate({h: gram.add_shares([held[h][p] for p in points[1:]]) for h in points}, 2)
    assert np.abs(opened).max() > 2**21 * 7


def test_the_diagonal_bound_is_the_norm_test_in_units_of_the_rounded_sketch() -> None:
    limit = math.floor(4 * NORM_SLACK * 2**24)
    matrix = np.diag([limit, limit + 1, 0, -1, 5])
    assert gram.over_bound(matrix) == (1, 3)
    values = np.rint(np.random.default_rng(0).normal(0, 1e5, 5000)).astype(np.int64)
    bound = float(np.linalg.norm(values))
    for factor, rejected in ((1, ()), (1.25, (0,))):
        encoded = np.rint(values * factor).astype(np.int32).view(np.uint32)
        rounded = gram.round_sketch(sketch(encoded, KEY), bound)
        assert gram.over_bound(np.array([[rounded @ rounded]])) == rejected


def test_inner_products_of_real_vectors_are_consistent_and_others_are_not() -> None:
    rows = np.random.default_rng(1).integers(-(2**13), 2**13, (6, 30))
    rows[5] = 3 * rows[4]
    matrix = rows @ rows.T
    assert gram.is_consistent(matrix)
    for i, j, value in ((0, 1, matrix[0, 0] + matrix[1, 1]), (4, 5, matrix[4, 5] + 100000)):
        wrong = matrix.copy()
        wrong[i, j] = wrong[j, i] = value
        assert not gram.is_consistent(wrong)
    assert not gram.is_consistent(-matrix)
    assert gram.is_consistent(np.zeros((0, 0), np.int64))


def test_numbers_that_are_no_field_elements_are_refused() -> None:
    good = gram.deal(np.arange(3), 1, [1, 2], KEY)
    for position, index in itertools.product(range(3), range(3)):
        bad = good[1].copy()
        bad[position] = np.uint64(gram.PRIMES[index] << 21 * index)
        with pytest.raises(MessageError):
            gram.add_shares([good[2], bad])
        with pytest.raises(MessageError):
            gram.interpolate({1: bad, 2: good[2]}, 1)
        with pytest.raises(MessageError):
            gram.products({1: bad, 2: good[2]}, [])
    with pytest.raises(MessageError):
        gram.add_shares([np.full(3, 2**64 - 1, np.uint64)])


def test_shares_of_another_shape_or_type_are_refused() -> None:
    good = gram.deal(np.arange(3), 1, [1, 2, 3], KEY)
    for bad in (good[2][:2], good[2].astype(np.int64), good[2].reshape(1, 3)):
        with pytest.raises(MessageError):
            gram.add_shares([good[1], bad])
        with pytest.raises(MessageError):
            gram.interpolate({1: good[1], 2: bad, 3: good[3]}, 1)
        with pytest.raises(MessageError):
            gram.products({1: good[1], 2: bad}, [])
    with pytest.raises(MessageError):
        gram.products(good, [good[1][:2]])
    with pytest.raises(MessageError):
        gram.extract_zeros(good, 1)


def test_dealings_and_openings_that_cannot_work_are_refused() -> None:
    good = gram.deal(np.arange(3), 1, [1, 2], KEY)
    for call in (
        lambda: gram.deal(np.arange(3), 2, [1, 2], KEY),
        lambda: gram.deal(np.arange(3), -1, [1, 2], KEY),
        lambda: gram.deal(np.arange(3), 1, [1, 1], KEY),
        lambda: gram.deal(np.arange(3), 1, [0, 1], KEY),
        lambda: gram.deal(np.arange(3), 1, [1, 256], KEY),
        lambda: gram.interpolate({1: good[1]}, 1),
        lambda: gram.interpolate({0: good[1], 1: good[2]}, 1),
        lambda: gram.interpolate({}, 0),
        lambda: gram.add_shares([]),
        lambda: gram.zero_count(4, 2),
        lambda: gram.round_sketch(np.zeros(3, np.uint32), 0.0),
        lambda: gram.gram_matrix(np.zeros(4, np.int64), 2),
        lambda: gram.products({1: np.zeros(2049, np.uint64)}, []),
    ):
        with pytest.raises(ValueError):
            call()
