"""CountSketch of a vector modulo 2**32: 2048 numbers that keep its norm and commute with the masks.

Four tables of 512 buckets. For each coordinate and table a 9-bit bucket and a sign are drawn from AES-CTR;
the coordinate is added to its bucket, or subtracted. Rules:
- The map is linear modulo 2**32, so sketches add up and subtract exactly as the vectors do.
- It is drawn from the seed beta after the inputs are committed, so no input can be fitted to it.
- Coordinate j takes bytes 8j to 8j + 7 of the AES-256-CTR stream of ``HKDF-Expand(beta,
  "fedvision/sketch/v1")``, a little-endian 16-bit word for each table in turn: bits 0 to 8 are the bucket,
  bit 9 set means minus, the others are not used.
- At level ``gram`` the last two coordinates of a vector, a site's loss and weight, have buckets of their own:
  510 and 511 of every table, with plus. Whatever else falls there goes to 254 and 255. So inner products are
  those of the updates plus those of the last two coordinates, with no mixed terms: a weight of half a clip
  norm would else drown a small update. Not at level ``sketch``, where the buckets are seen.

What the norm test says. The mean of the tables' squared norms has the mean of the true squared norm and a
standard deviation of 1/32 of it at most.
- Where no few coordinates hold most of the norm, it is distributed as chi-squared with 2048 degrees: a
  threshold of 1.16 rejects a vector at the bound with probability 2**-20 and accepts one at 1.21 times the
  bound with probability 2**-40.
- Where two coordinates hold all of the norm, they share a bucket of one table with probability 1/128, and
  the test is off by a quarter: rejection at the bound 2**-8, acceptance up to 1.24 times the bound 2**-8, up
  to 1.52 times 2**-17, up to 2.16 times 2**-28. Updates of networks do not look like this; attacks may.
- Entries near 2**31 can cancel in a bucket, but only against one another: every bucket that one falls in
  alone exceeds any bound. All of them cancel in a table with probability 1/512 at most, in four 2**-36;
  with the last coordinates apart 1/256 and 2**-32.
  (Shifting whole rows of 512 coordinates instead would be faster, but two full rows of 2**31 cancel always.)

Sources: Charikar, Chen, Farach-Colton 2002, section 3; design, section "The sketch".
"""

from collections.abc import Iterator, Sequence

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from numpy.typing import NDArray
from scipy.sparse import coo_array

from fedvision.secagg.masking import KEY_BYTES, LongKeystream, MaskVector

TABLES = 4
BUCKETS = 512
ROWS = TABLES * BUCKETS
TAIL = 2
"""Coordinates at a vector's end that have buckets of their own at level ``gram``: loss and weight."""
NORM_SLACK = 1.16
PROOF_SLACK = 2.25
"""A squared norm above this many squared bounds is a lie; below, an honest vector with nearly all of its norm
in two coordinates may have met with a collision (2**-8 at ``NORM_SLACK``, 2**-25 here)."""
"""Largest accepted squared norm, in squared norm bounds."""

_SLICE = 1 << 16
_PICKED = np.uint64(0x03FF_03FF_03FF_03FF)
_TABLE_STARTS = np.uint64(0x0C00_0800_0400_0000)
"""A table has 1024 rows here, 512 for each sign: a 16-bit word becomes its row by one AND and one OR."""


def _signed_maps(size: int, beta: bytes) -> Iterator[tuple[int, coo_array]]:
    """Yield the map of each slice of coordinates, with its first coordinate; shape (4096, slice), uint32.

    A matrix holds until the next is asked for: they share their memory.
    """
    if len(beta) != KEY_BYTES:
        raise ValueError(f"beta must have {KEY_BYTES} bytes, got {len(beta)}")
    stream = LongKeystream(HKDFExpand(hashes.SHA256(), KEY_BYTES, b"fedvision/sketch/v1").derive(beta))
    words = np.empty(min(size, _SLICE), "<u8")
    for start in range(0, size, _SLICE):
        count = min(_SLICE, size - start)
        if start == 0 or count < _SLICE:
            columns = np.repeat(np.arange(count, dtype=np.int32), TABLES)
            entries = (np.ones(columns.size, np.uint32), (np.zeros_like(columns), columns))
            matrix = coo_array(entries, shape=(2 * ROWS, count))
        part = words[:count]
        stream.fill(part)
        part &= _PICKED
        part |= _TABLE_STARTS
        matrix.row[...] = part.view("<u2")
        yield start, matrix


def _fold(signed: MaskVector, tails: MaskVector) -> MaskVector:
    """Return plus minus minus, with the last coordinates in buckets of their own: shape (k, 2048)."""
    halves = signed.reshape(-1, TABLES, 2, BUCKETS)
    tables = halves[:, :, 0] - halves[:, :, 1]
    apart = tails.shape[1]
    if apart:
        tables[:, :, BUCKETS // 2 - apart : BUCKETS // 2] += tables[:, :, -apart:]
        tables[:, :, -apart:] = tails[:, None]
    return tables.reshape(-1, ROWS)


def sketch(vector: MaskVector, beta: bytes, apart: int = 0) -> MaskVector:
    """Return the sketch of ``vector``.

    Guarantee: ``sketch(x + y) == sketch(x) + sketch(y)`` modulo 2**32, for the same beta.

    Args:
        vector: Shape (d,), uint32, d > ``apart``.
        beta: 32 bytes.
        apart: How many of the last coordinates have buckets of their own.

    Returns:
        Shape (2048,), uint32: the buckets of the first table, then of the others.

    Raises:
        ValueError: beta is not 32 bytes, or the vector is not uint32 of one dimension.
    """
    if vector.ndim != 1 or vector.dtype != np.uint32:
        raise ValueError(f"vector must be uint32 of one dimension, got {vector.dtype} {vector.shape}")
    total = np.zeros(2 * ROWS, np.uint32)
    size = vector.size - apart
    for start, matrix in _signed_maps(size, beta):
        total += matrix @ vector[start : start + matrix.shape[1]]
    return _fold(total, vector[None, size:])[0]


def sketches_of_masks(keys: Sequence[bytes], size: int, beta: bytes, apart: int = 0) -> MaskVector:
    """Return ``sketch(mask_stream(key, size), beta, apart)`` for every key, shape (len(keys), 2048), uint32.

    The masks are never held whole, and the map is drawn once for all keys.

    Raises:
        ValueError: A key or beta is not 32 bytes.
    """
    streams = [LongKeystream(key) for key in keys]
    totals = np.zeros((len(keys), 2 * ROWS), np.uint32)
    words = np.empty(min(size, _SLICE), "<u4")
    tails = np.zeros((len(keys), apart), np.uint32)
    for _, matrix in _signed_maps(size - apart, beta):
        part = words[: matrix.shape[1]]
        for total, stream in zip(totals, streams, strict=True):
            stream.fill(part)
            total += matrix @ part.astype(np.uint32, copy=False)
    for tail, stream in zip(tails, streams, strict=True):
        last = np.empty(tail.size, "<u4")
        stream.fill(last)
        tail[:] = last
    return _fold(totals, tails)


def sketch_of_mask(key: bytes, size: int, beta: bytes) -> MaskVector:
    """Return ``sketch(mask_stream(key, size), beta)``, shape (2048,); see ``sketches_of_masks``."""
    return sketches_of_masks([key], size, beta)[0]


def without_tail(rows: NDArray[np.float64], size: int, beta: bytes) -> NDArray[np.float64]:
    """Return sketches without the part that the last two coordinates, loss and weight, can have in them.

    Each row is projected onto what is orthogonal to the sketches of these two coordinates. So their mixed
    terms with an update vanish from inner products, whatever they are, and of the update's own sketch no more
    than 2 of 2048 dimensions.

    Args:
        rows: Centred sketches of vectors with ``apart`` 0, shape (n, 2048).
        size: Number of coordinates d of the vectors, > 2.
        beta: 32 bytes.
    """
    ends = np.zeros((TAIL, ROWS))
    for index in range(TAIL):
        vector = np.zeros(size, np.uint32)
        vector[size - TAIL + index] = 1
        ends[index] = centred(sketch(vector, beta))
    inverse = np.linalg.inv(ends @ ends.T)
    projected: NDArray[np.float64] = rows - (rows @ ends.T) @ inverse @ ends
    return projected


def centred(values: MaskVector) -> NDArray[np.int64]:
    """Return the integers in -2**31..2**31 - 1 with these residues modulo 2**32, int64, same shape."""
    return values.astype(np.int32).astype(np.int64)


def squared_norm(values: MaskVector) -> float:
    """Return the estimate of a vector's squared L2 norm from its sketch: the mean over the four tables.

    Args:
        values: Shape (2048,), uint32.
    """
    if values.shape != (ROWS,):
        raise ValueError(f"a sketch must have shape ({ROWS},), got {values.shape}")
    lifted = centred(values).astype(np.float64)
    return float(lifted @ lifted) / TABLES


def is_within(values: MaskVector, norm_bound: float, slack: float = NORM_SLACK) -> bool:
    """Say whether a sketch is that of a vector of norm ``norm_bound`` or less, up to the slack.

    Guarantee: see the module's docstring for the probabilities of both errors.
    """
    return squared_norm(values) <= slack * norm_bound**2
