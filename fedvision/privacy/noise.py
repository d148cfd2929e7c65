"""Noise on the integers: the discrete Gaussian, drawn from the operating system's generator.

Floating-point Gaussian noise leaks through its low bits (Mironov 2012), so noise is added to integers: the
discrete Gaussian gives an integer k with probability proportional to exp(-k**2 / (2 sigma**2)) (Canonne,
Kamath, Steinke 2020, "The Discrete Gaussian for Differential Privacy"). All widths here are in steps of the
grid on which the sum is encoded.

How a number is drawn. The magnitudes 1, 2, ... are cut into blocks of ``width`` neighbours, at least 32 and
below 64 blocks in a sigma (``width`` is 1 below sigma 64). The probability of a block is split into a core,
``width`` times that of its last and least likely member, and a rest, what an even spread of the first
member's probability has beyond that. One entry of {zero, cores, rests} is drawn from a table, then a member
of the block and a sign, evenly. A core or a zero is kept; a rest (about one in fifty) is kept with
probability (p(member) - p(last)) / (p(first) - p(last)), which makes every member's probability exactly
p(member) times one constant; what is not kept is drawn again from the start.

What is exact:
- No probability is compared in floating point unless the comparison is safe. A number that 64 random bits
  cannot decide gets 128 more and is compared with a bound of 192 bits; so does an acceptance within 2**-40
  of its float value, whose error is below 2**-48 (two ``expm1`` of small arguments and three operations).
- Distance to the exact distribution, total variation for one number: below 2**-139. Magnitudes above
  14 sigma are never given, which is at most 2 exp(-14**2 / 2) < 2**-140 (Canonne, Kamath, Steinke 2020:
  the discrete Gaussian has subgaussian tails of the same sigma); the bounds are rounded down to 2**-192 and
  there are fewer than 2**11 of them; an acceptance is wrong by at most 2**-191.
- For 10**7 coordinates, 100 sites and 10**5 rounds that is below 2**-92 (1e-27) in delta.

Not hidden: the time that a call takes depends, very slightly, on how many draws were repeated.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

RandomBytes = Callable[[int], bytes]

MIN_SIGMA = 0.3
MAX_SIGMA = 2.0**27
TAIL = 14
"""Magnitudes beyond this many sigma are never given; 14.04 * 2**27 is below 2**31."""

_DIGITS = 100
_WORD_BITS, _MORE_BITS = 64, 128
_ALL_BITS = _WORD_BITS + _MORE_BITS
_UNSAFE = 2.0**-40
_PIECE = 1 << 16
"""Numbers drawn at a time, so that the temporaries stay in cache."""


@dataclass(frozen=True)
class _Table:
    """The entries zero, core 0, rest 0, core 1, rest 1, ... by the upper bounds of their probabilities.

    Args:
        sigma: Standard deviation in steps.
        block_bits: A block holds ``2**block_bits`` magnitudes; block j starts at ``1 + j * 2**block_bits``.
        bounds: Sums of the probabilities of the entries in units of 2**-192, without the last, which is 1.
    """

    sigma: float
    block_bits: int
    bounds: list[int]
    tops: NDArray[np.uint64] = field(init=False)

    def __post_init__(self) -> None:
        largest = (1 << _WORD_BITS) - 1  # a bound of 1, before an empty last rest: left to all 192 bits
        tops = np.array([min(bound >> _MORE_BITS, largest) for bound in self.bounds], dtype=np.uint64)
        object.__setattr__(self, "tops", tops)


def discrete_gaussian(size: int, sigma: float, random_bytes: RandomBytes = os.urandom) -> NDArray[np.int64]:
    """Draw independent numbers of the discrete Gaussian.

    Guarantee: with perfect random bytes, each number is within 2**-139 in total variation of the exact
    discrete Gaussian, and all of them fit in 32 bits with a sign: none is beyond 14.04 sigma.

    Args:
        size: How many, >= 0.
        sigma: The parameter of the distribution in steps, from 0.3 to 2**27. From 1 on it is also the
            standard deviation, to 6 digits and better.
        random_bytes: Gives that many random bytes. Only a test passes its own; nobody passes a seed.

    Returns:
        Shape (size,).

    Raises:
        ValueError: ``size`` or ``sigma`` is out of range, or the source gave too few bytes.
    """
    if size < 0:
        raise ValueError(f"size must be >= 0, got {size}")
    if not MIN_SIGMA <= sigma <= MAX_SIGMA:
        raise ValueError(f"sigma must be from {MIN_SIGMA} to 2**27 steps, got {sigma}")
    table = _table(float(sigma))
    numbers = np.empty(size, dtype=np.int64)
    filled = 0
    while filled < size:
        kept = _draw(table, min(_PIECE, size - filled), random_bytes)
        numbers[filled : filled + kept.size] = kept
        filled += kept.size
    return numbers


def noise_scale(sigma: float, honest: int) -> float:
    """Return what each site adds so that ``honest`` sites together add noise of ``sigma``.

    Args:
        sigma: Standard deviation of the noise of the sum, > 0, in any unit.
        honest: Sites of every sum that surely add their share and do not give it away, >= 1.

    Raises:
        ValueError: An argument is out of range.
    """
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be > 0 and finite, got {sigma}")
    if honest < 1:
        raise ValueError(f"honest must be >= 1, got {honest}")
    return sigma / math.sqrt(honest)


def measured_sigma(samples: NDArray[np.generic], confidence: float = 0.999) -> tuple[float, float, float]:
    """Estimate the standard deviation of noise around zero, with its chi-square interval.

    For parameters that no forward pass reads: their gradient is zero, so a sum of them is noise only. It
    finds an honest mistake, such as a missing share, not a site that cheats.

    Args:
        samples: Any shape, at least one number, finite. The interval is that of a Gaussian: right for a
            discrete Gaussian of sigma >= 1 and for sums of them.
        confidence: Probability that the interval holds the truth, between 0 and 1.

    Returns:
        The estimate, and the lower and the upper end of the interval, in the unit of the samples.

    Raises:
        ValueError: No samples, a sample that is not finite, or a confidence out of range.
    """
    from scipy.special import chdtri  # half of scipy loads with it: not for every command

    values = np.asarray(samples, dtype=np.float64).ravel()
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError("samples must hold at least one number, all finite")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    squares = float(values @ values)
    tail = (1 - confidence) / 2
    low, high = (math.sqrt(squares / chdtri(values.size, level)) for level in (tail, 1 - tail))
    return math.sqrt(squares / values.size), low, high


@lru_cache(maxsize=16)
def _table(sigma: float) -> _Table:
    block_bits = max(0, math.frexp(sigma / 32)[1] - 1)
    width = 1 << block_bits
    blocks = math.ceil(TAIL * sigma / width)
    with localcontext(prec=_DIGITS):
        weights = [Decimal(1)]
        for block in range(blocks):
            first, last = _weight(block * width + 1, sigma), _weight((block + 1) * width, sigma)
            weights += [2 * width * last, 2 * width * (first - last)]  # 2: both signs
        total = sum(weights)
        sums = accumulate(weights[:-1])
        bounds = [int(upper / total * 2**_ALL_BITS) for upper in sums]
    return _Table(sigma, block_bits, bounds)


def _weight(magnitude: int, sigma: float) -> Decimal:
    """Return exp(-magnitude**2 / (2 sigma**2)) to the precision of the current context."""
    return (-Decimal(magnitude * magnitude) / (2 * Decimal(sigma) ** 2)).exp()


def _draw(table: _Table, count: int, random_bytes: RandomBytes) -> NDArray[np.int64]:
    """Draw ``count`` times and return what was kept, shape (at most count,)."""
    entries = _entries(table, _words(count, "<u8", random_bytes), random_bytes)
    bits = _words(count, "<u4", random_bytes)
    member = (bits & np.uint32((1 << table.block_bits) - 1)).astype(np.int64)
    block = (entries - 1) >> 1
    numbers = (block << table.block_bits) + 1 + member
    numbers[entries == 0] = 0
    np.negative(numbers, out=numbers, where=bits >> np.uint32(31) == 1)
    rests = np.flatnonzero((entries & 1 == 0) & (entries > 0))
    if rests.size == 0:
        return numbers
    is_kept = np.ones(count, dtype=bool)
    is_kept[rests] = _rest_is_kept(table, block[rests], member[rests], random_bytes)
    return numbers[is_kept]


def _entries(table: _Table, words: NDArray[np.uint64], random_bytes: RandomBytes) -> NDArray[np.int64]:
    """Return the entry of each word: how many bounds are at most the random number that it begins."""
    entries = np.searchsorted(table.tops, words, side="right").astype(np.int64)
    is_open = table.tops[np.maximum(entries - 1, 0)] == words  # equal in 64 bits, about one in 2**53
    for place in np.flatnonzero(is_open):
        number = _longer(int(words[place]), random_bytes)
        entries[place] = bisect_right(table.bounds, number)
    return entries


def _rest_is_kept(
    table: _Table, block: NDArray[np.int64], member: NDArray[np.int64], random_bytes: RandomBytes
) -> NDArray[np.bool_]:
    """Decide for each rest, given its block and its member of the block, whether it is kept."""
    width = 1 << table.block_bits
    first = (block << table.block_bits) + 1
    # p(first + m) / p(first) = exp(-fall(m)); the products are exact, below 2**63
    fall = member * (2 * first + member) / (2 * table.sigma**2)
    whole_fall = (width - 1) * (2 * first + width - 1) / (2 * table.sigma**2)
    depth = np.expm1(-whole_fall)
    chance = (np.expm1(-fall) - depth) / -depth
    words = _words(block.size, "<u8", random_bytes)
    distance = words * 2.0**-_WORD_BITS - chance
    is_kept: NDArray[np.bool_] = distance < 0
    for place in np.flatnonzero(np.abs(distance) <= _UNSAFE):
        number = _longer(int(words[place]), random_bytes)
        is_kept[place] = number < _exact_chance(table, int(block[place]), int(member[place]))
    return is_kept


def _exact_chance(table: _Table, block: int, member: int) -> int:
    """Return the probability that a rest is kept, in units of 2**-192."""
    start = block << table.block_bits
    with localcontext(prec=_DIGITS):
        first = _weight(start + 1, table.sigma)
        last = _weight(start + (1 << table.block_bits), table.sigma)
        chance = (_weight(start + 1 + member, table.sigma) - last) / (first - last)
        return int(chance * 2**_ALL_BITS)


def _longer(word: int, random_bytes: RandomBytes) -> int:
    """Return a number of 192 random bits that begins with the 64 bits of ``word``."""
    return word << _MORE_BITS | int.from_bytes(_exactly(_MORE_BITS // 8, random_bytes), "little")


def _words(count: int, word: str, random_bytes: RandomBytes) -> NDArray[np.unsignedinteger]:
    kind = np.dtype(word)
    return np.frombuffer(_exactly(count * kind.itemsize, random_bytes), dtype=kind)


def _exactly(size_bytes: int, random_bytes: RandomBytes) -> bytes:
    given = random_bytes(size_bytes)
    if len(given) != size_bytes:
        raise ValueError(f"the source of randomness gave {len(given)} bytes instead of {size_bytes}")
    return given
