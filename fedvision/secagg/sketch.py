"""first version"""

from collections.abc import Iterator, Sequence

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from numpy.typing import NDArray
from scipy.sparse import csc_array

from fedvision.secagg.masking import MaskVector, keystream, mask_stream

TABLES = 4
BUCKETS = 512
ROWS = TABLES * BUCKETS
NORM_SLACK = 1.16
_SLICE = 1 << 15


def _maps(size: int, beta: bytes) -> Iterator[tuple[slice, csc_array]]:
    key = HKDFExpand(hashes.SHA256(), 32, b"fedvision/sketch/v1").derive(beta)
    cipher = keystream(key)
    zeros = bytes(8 * _SLICE)
    words = np.empty(_SLICE, "<u8")
    ones = np.ones(TABLES * _SLICE, np.uint32)
    starts = np.arange(0, TABLES * _SLICE + 1, TABLES, dtype=np.int32)
    for first in range(0, size, _SLICE):
        part = slice(first, min(first + _SLICE, size))
        count = part.stop - first
        cipher.update_into(zeros[: 8 * count], memoryview(words).cast("B")[: 8 * count])
        picked = words[:count] & np.uint64(0x03FF03FF03FF03FF)
        picked |= np.uint64(0x0C00080004000000)
        indices = picked.astype("<u8").view("<u2").astype(np.int32)
        shape = (2 * ROWS, count)
        yield part, csc_array((ones[: TABLES * count], indices, starts[: count + 1]), shape=shape)


def _fold(signed: NDArray[np.uint32]) -> NDArray[np.uint32]:
    pairs = signed.reshape(TABLES, 2, BUCKETS, -1)
    return (pairs[:, 0] - pairs[:, 1]).reshape(ROWS, -1)


def sketch(vector: MaskVector, beta: bytes) -> MaskVector:
    total = np.zeros(2 * ROWS, np.uint32)
    for part, matrix in _maps(vector.size, beta):
        total += matrix @ vector[part]
    return _fold(total)[:, 0]


def sketches_of_masks(keys: Sequence[bytes], size: int, beta: bytes) -> MaskVector:
    return np.array([sketch(mask_stream(key, size), beta) for key in keys])


def sketch_of_mask(key: bytes, size: int, beta: bytes) -> MaskVector:
    return sketches_of_masks([key], size, beta)[0]


def centred(values: MaskVector) -> NDArray[np.int64]:
    return values.astype(np.uint32).view(np.int32).astype(np.int64)


def squared_norm(values: MaskVector) -> float:
    lifted = centred(values).astype(np.float64)
    return float(lifted @ lifted) / TABLES


def is_within(values: MaskVector, norm_bound: float) -> bool:
    return squared_norm(values) <= NORM_SLACK * norm_bound**2
