import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvision.secagg.shamir import evaluate, recover, recover_many, split
from tests.vectors.make_primitives import FOLDER, key_of, text_of


def slow_product(a: int, b: int) -> int:
    """Multiply in GF(2**8) by shift and add, FIPS 197, section 4.2."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        a = a << 1 ^ (0x11B if a & 0x80 else 0)
        b >>= 1
    return product


def slow_share(coefficients: list[bytes], point: int) -> bytes:
    """Evaluate the polynomials term by term."""
    total, power = [0] * 32, 1
    for row in coefficients:
        total = [value ^ slow_product(power, byte) for value, byte in zip(total, row, strict=True)]
        power = slow_product(power, point)
    return bytes(total)


def test_the_vectors_are_what_the_code_makes() -> None:
    assert (FOLDER / "shamir.json").read_text() == text_of("shamir")


def test_the_vectors_are_polynomials_over_the_field_of_aes() -> None:
    assert slow_product(0x57, 0x83) == 0xC1  # FIPS 197, section 4.2
    for case in json.loads((FOLDER / "shamir.json").read_text())["cases"]:
        coefficients = [bytes.fromhex(row) for row in case["coefficients"]]
        for point, share in case["shares"].items():
            assert slow_share(coefficients, int(point)).hex() == share


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.data())
def test_any_threshold_of_shares_gives_the_secret_back(secret: bytes, data: st.DataObject) -> None:
    points = data.draw(st.lists(st.integers(1, 255), min_size=1, max_size=40, unique=True))
    threshold = data.draw(st.integers(1, len(points)))
    shares = split(secret, threshold, points)
    assert list(shares) == points
    chosen = data.draw(st.permutations(points))[:threshold]
    assert recover({point: shares[point] for point in chosen}) == secret


def test_the_largest_federation_recovers_the_secrets_of_all_sites_at_once() -> None:
    points = list(range(1, 256))
    secrets = [key_of(index) for index in range(20)]
    dealt = [split(secret, 171, points) for secret in secrets]
    chosen = points[::-1][:171]
    shares = np.array([[np.frombuffer(d[point], np.uint8) for d in dealt] for point in chosen])
    assert recover_many(chosen, shares) == secrets


def test_one_share_of_two_takes_every_value_once_whatever_the_secret() -> None:
    """Exhaustive over one byte: t = 2, all 256 coefficients."""
    for secret in (0, 1, 0x53, 255):
        coefficients = np.array([[secret] * 256, range(256)], np.uint8)
        for row in evaluate(coefficients, [1, 2, 17, 255]):
            assert np.array_equal(np.sort(row), np.arange(256))


def test_two_shares_of_three_take_every_pair_of_values_once_whatever_the_secret() -> None:
    """Exhaustive over one byte: t = 3, all 65536 pairs of coefficients."""
    high, low = np.divmod(np.arange(65536), 256)
    for secret in (0, 0xAB):
        coefficients = np.array([np.full(65536, secret), high, low], np.uint8)
        rows = evaluate(coefficients, [1, 2, 255]).astype(np.int64)
        for one, two in itertools.combinations(rows, 2):
            assert np.array_equal(np.sort(one * 256 + two), np.arange(65536))


def test_too_few_shares_or_a_wrong_one_give_another_secret() -> None:
    secret = key_of("secret")
    shares = split(secret, 3, [1, 2, 3, 4])
    assert recover({point: shares[point] for point in (1, 2)}) != secret
    for bit in (0, 100, 255):
        wrong = bytearray(shares[2])
        wrong[bit // 8] ^= 1 << bit % 8
        assert recover({1: shares[1], 2: bytes(wrong), 4: shares[4]}) != secret
    assert recover({1: shares[1], 3: shares[2], 4: shares[4]}) != secret  # a share under another number


def test_a_secret_is_never_split_twice_in_the_same_way() -> None:
    first, second = (split(bytes(32), 2, [1, 2]) for _ in range(2))
    assert first[1] != second[1]
    assert len({bytes(first[1])[i] for i in range(32)}) > 16  # every byte has a polynomial of its own


@pytest.mark.parametrize(
    ("secret", "threshold", "points"),
    [
        (bytes(31), 2, [1, 2]),
        (bytes(32), 0, [1, 2]),
        (bytes(32), 3, [1, 2]),
        (bytes(32), 2, [1, 1]),
        (bytes(32), 2, [0, 1]),
        (bytes(32), 2, [1, 256]),
    ],
)
def test_a_split_that_would_not_hold_is_refused(secret: bytes, threshold: int, points: list[int]) -> None:
    with pytest.raises(ValueError):
        split(secret, threshold, points)


def test_shares_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError):
        recover({})
    with pytest.raises(ValueError):
        recover({1: bytes(32), 2: bytes(31)})
    for points, shares in (
        ([1], np.zeros((2, 1, 32), np.uint8)),
        ([1, 1], np.zeros((2, 1, 32), np.uint8)),
        ([1, 2], np.zeros((2, 32), np.uint8)),
        ([1, 2], np.zeros((2, 1, 32), np.int64)),
    ):
        with pytest.raises(ValueError):
            recover_many(points, shares)
