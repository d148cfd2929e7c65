import json
import struct

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvision.secagg.masking import SLICE, LongKeystream, add_masks, keystream, mask_stream
from tests.vectors.make_primitives import FOLDER, KEY, key_of, text_of, words

SIZES = st.sampled_from([1, 3, SLICE - 1, SLICE, SLICE + 1, 3 * SLICE + 5])
seeds = st.integers(0, 2**32)


def test_the_vectors_are_what_the_code_makes() -> None:
    assert (FOLDER / "masking.json").read_text() == text_of("masking")


def test_the_golden_words_are_those_of_the_specification() -> None:
    assert mask_stream(KEY, 4).tolist() == [3053490418, 3500099882, 1788539817, 2155294429]
    derived = HKDF(hashes.SHA256(), 32, bytes(16), b"fv/pair/v1|0,1").derive(KEY)
    assert derived.hex() == "a41b8ddc790c374b87f0b1ca9c6a2b33f9946b60e93d459b41e58000dca5286e"


@pytest.mark.parametrize("size", [0, 1, 5, SLICE - 1, SLICE, SLICE + 1, 2 * SLICE + 3])
def test_a_mask_is_the_little_endian_keystream_of_any_length(size: int) -> None:
    cipher = Cipher(algorithms.AES(KEY), modes.CTR(bytes(16))).encryptor()
    expected = struct.unpack(f"<{size}I", cipher.update(bytes(4 * size)))
    stream = mask_stream(KEY, size)
    assert stream.dtype == np.uint32
    assert stream.tolist() == list(expected)


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.lists(st.integers(0, 70) | st.just(4 * SLICE + 1), max_size=9))
def test_a_long_keystream_is_aes_256_ctr_for_every_division_into_pieces(key: bytes, sizes: list[int]) -> None:
    stream, pieces = LongKeystream(key), [np.full(size, 255, np.uint8) for size in sizes]
    for piece in pieces:
        stream.fill(piece)
    found = b"".join(piece.tobytes() for piece in pieces)
    assert found == Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(sum(sizes)))


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_keystream_has_a_key_of_32_bytes(size: int) -> None:
    for make in (keystream, LongKeystream):
        with pytest.raises(ValueError):
            make(bytes(size))


def test_threads_that_add_to_the_same_slices_lose_nothing() -> None:
    keys, size = [key_of("busy", index) for index in range(32)], 5 * SLICE
    vector = np.zeros(size, np.uint32)
    for _ in range(5):
        add_masks(vector, keys, [1] * 32, threads=16)
        add_masks(vector, keys, [-1] * 32)
    assert not vector.any()


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(3, 7), SIZES, st.integers(1, 4))
def test_masks_cancel_in_the_sum_over_all_sites(seed: int, num_sites: int, size: int, threads: int) -> None:
    total = np.zeros(size, np.uint32)
    for own in range(num_sites):
        peers = [peer for peer in range(num_sites) if peer != own]
        masked = np.zeros(size, np.uint32)
        keys = [key_of(seed, min(own, peer), max(own, peer)) for peer in peers]
        add_masks(masked, keys, [1 if peer > own else -1 for peer in peers], threads)
        assert np.count_nonzero(masked) >= 0.99 * size
        total += masked
    assert not total.any()


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(0, 6), SIZES, st.integers(1, 5), st.randoms(use_true_random=False))
def test_the_result_is_the_sum_of_signed_streams_for_every_order_and_number_of_threads(
    seed: int, count: int, size: int, threads: int, random: object
) -> None:
    keys = [key_of(seed, index) for index in range(count)]
    signs = [1 if key[0] % 2 else -1 for key in keys]
    start = words(key_of(seed), min(size, 500))
    start = np.resize(start, size)
    expected = start.copy()
    for key, sign in zip(keys, signs, strict=True):
        expected += mask_stream(key, size) * np.uint32(sign % 2**32)
    pairs = list(zip(keys, signs, strict=True))
    random.shuffle(pairs)  # type: ignore[attr-defined]
    add_masks(start, [key for key, _ in pairs], [sign for _, sign in pairs], threads)
    assert np.array_equal(start, expected)


def test_a_machine_of_the_other_byte_order_gets_the_same_numbers() -> None:
    start = words(KEY, SLICE + 9)
    other = start.astype(start.dtype.newbyteorder("S"))
    keys, signs = [key_of(1), key_of(2)], [1, -1]
    add_masks(start, keys, signs)
    add_masks(other, keys, signs, threads=2)
    assert other.tobytes() == start.byteswap().tobytes()
    assert np.array_equal(other, start)


def test_an_addition_wraps_and_a_second_one_with_the_other_sign_takes_it_back() -> None:
    vector = np.full(1000, 2**32 - 1, np.uint32)
    add_masks(vector, [KEY], [1])
    assert np.array_equal(vector, mask_stream(KEY, 1000) - np.uint32(1))
    add_masks(vector, [KEY], [-1])
    assert (vector == 2**32 - 1).all()


@pytest.mark.parametrize("bad", json.loads((FOLDER / "masking.json").read_text())["bad"])
def test_wrong_keys_and_signs_are_refused_and_leave_the_vector_alone(bad: dict) -> None:
    vector = np.arange(10, dtype=np.uint32)
    with pytest.raises(ValueError) as refused:
        add_masks(vector, [bytes.fromhex(key) for key in bad["keys"]], bad["signs"])
    assert np.array_equal(vector, np.arange(10))
    assert not any(key[:16] in str(refused.value) for key in bad["keys"])


@pytest.mark.parametrize(
    "vector", [np.zeros(4, np.int32), np.zeros(4, np.uint64), np.zeros((2, 2), np.uint32), np.zeros(4)]
)
def test_a_vector_of_another_type_or_shape_is_refused(vector: np.ndarray) -> None:
    with pytest.raises(ValueError):
        add_masks(vector, [KEY], [1])
    with pytest.raises(ValueError):
        add_masks(np.zeros(4, np.uint32), [KEY], [1], threads=0)


@pytest.mark.parametrize("bit", [0, 7, 100, 255])
def test_one_bit_of_the_key_changes_half_of_the_mask(bit: int) -> None:
    changed = bytearray(KEY)
    changed[bit // 8] ^= 1 << (bit % 8)
    size = 100_000
    difference = mask_stream(KEY, size) ^ mask_stream(bytes(changed), size)
    flipped = int(np.unpackbits(difference.view(np.uint8)).sum())
    # The number of flipped bits is binomial (32 size, 1/2), five standard deviations
    assert abs(flipped - 16 * size) < 5 * (8 * size) ** 0.5


def test_a_masked_vector_of_zeros_looks_uniform() -> None:
    vector = np.zeros(1 << 18, np.uint32)
    add_masks(vector, [key_of(index) for index in range(3)], [1, -1, 1])
    counts = np.bincount(vector.view(np.uint8), minlength=256)
    expected = vector.nbytes / 256
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert abs(statistic - 255) < 5 * (2 * 255) ** 0.5
    assert len(np.unique(vector.view(np.uint64))) == vector.size // 2
