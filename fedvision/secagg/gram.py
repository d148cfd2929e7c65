"""Inner products of the sites' sketches without the sketches: Shamir sharing over a field of 63 bits.

Each site rounds its sketch to units of ``norm_bound / 4096`` and deals Shamir shares of degree m to all n
sites of the set. A holder multiplies the shares of each pair of sites, adds up the 2048 products, adds the
shares of zeros that the sites dealt for this pair, and sends one number a pair. The server interpolates the
n(n+1)/2 numbers and learns the inner products alone.

Why these parameters:
- Degree ``m = ceil(n / 3) - 1``: m colluding sites hold m shares of a polynomial of degree m, which are
  uniform whatever the sketch is. m is the bound on collusion of the whole protocol, so dealing to all sites
  needs no choice of holders that somebody could steer.
- A product has degree 2m. Since ``3m + 1 <= n``, of 3m + 1 answers at least 2m + 1 are honest, and these
  alone fix the polynomial. So if m holders lie, the answers lie on no polynomial of degree 2m and
  ``interpolate`` says so. It does not say who lied: correcting m errors would need 4m + 1 answers.
- A dealer whose shares lie on no polynomial of degree m is found in the same way: times the unknown
  polynomial of an honest site they give no polynomial of degree 2m, but for a chance of 2**-63.
- Zeros of degree 2m hide all of a product's polynomial but its value at 0. One honest dealer suffices. The
  dealers of zeros are trusted to deal zeros unless their shares are checked (see ``deal_zero``).
- The field has almost 2**63 elements, three primes below 2**21: float64 matrix products are exact (entries
  below 2**21, 2048 terms, sums below 2**53). Honest inner products are below 2**27.
- Wrapping in the field. A dishonest dealer may share a vector so long that its squared norm wraps to a small
  number. It can gain nothing: the sum of all shared vectors is opened (``add_shares`` and ``interpolate``
  with degree m) and must be the sketch of the accepted sum, up to rounding. So the coalition's joint vector
  v has entries below 2**22, and its squared norm is below 2**56: it does not wrap and is the sum of the
  coalition's entries of the Gram matrix. The diagonal bound T and Cauchy-Schwarz bound each of them by T, so
  the joint squared norm is at most T * |M|**2, as if each of the |M| sites had kept to the bound. Without
  that opening it holds up to a chance of about ``2 * |M|**2 * T / 2**63`` for vectors that are drawn without
  knowing the honest ones.

Sources: Shamir 1979; Ben-Or, Goldwasser, Wigderson 1988, section 3 (products of shares, zeros to
re-randomise); So et al. 2020 (distances from shares).
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from numpy.typing import NDArray

from fedvision.errors import MessageError
from fedvision.secagg.masking import MaskVector, keystream
from fedvision.secagg.sketch import NORM_SLACK, ROWS, TABLES, centred

ShareVector = NDArray[np.uint64]
IntegerVector = NDArray[np.int64]
_Residues = NDArray[np.float64]

PRIMES = (2097143, 2097133, 2097131)
"""The three largest primes below 2**21; an element is packed as r0 | r1 << 21 | r2 << 42."""
_BITS = 21
_MODULUS = PRIMES[0] * PRIMES[1] * PRIMES[2]
UNITS = 1 << 12
"""Units of one norm bound."""
_LARGEST_DIAGONAL = int(TABLES * NORM_SLACK * UNITS**2)


def round_sketch(values: MaskVector, norm_bound: float) -> IntegerVector:
    """Return a sketch in units of ``norm_bound / 4096``, rounded to the nearest integer, ties to even.

    A plain function of its input: ``rint(centred * 4096 / norm_bound)`` in float64, in this order, so that
    everybody who knows the sketch gets the same integers.

    Args:
        values: Shape (2048,), uint32.
        norm_bound: Largest norm of a compliant encoded vector, > 0.
    """
    if not norm_bound > 0:
        raise ValueError(f"norm_bound must be > 0, got {norm_bound}")
    return np.rint(centred(values) * float(UNITS) / norm_bound).astype(np.int64)


def _modulo(values: NDArray[np.float64], prime: int) -> _Residues:
    """Return ``values`` mod ``prime`` for integers of at most 2**53 in absolute value, in place."""
    values -= (
        np.floor(values * (1.0 / prime)) * prime
    )  # now in -prime..2 prime - 1: the quotient may be off by 1
    values[values < 0] += prime
    values[values >= prime] -= prime
    return values


def _pack(residues: Sequence[_Residues]) -> ShareVector:
    packed = residues[0].astype(np.uint64)
    for index in (1, 2):
        packed |= residues[index].astype(np.uint64) << np.uint64(_BITS * index)
    return packed


def _unpack(shares: ShareVector, index: int) -> _Residues:
    """Return the residues of one prime, checked.

    Raises:
        MessageError: A residue is not below its prime.
    """
    shifted = shares >> np.uint64(_BITS * index)
    if index < 2:
        shifted &= np.uint64((1 << _BITS) - 1)
    if (shifted >= PRIMES[index]).any():
        raise MessageError("a share is not an element of the field")
    return shifted.astype(np.float64)


def _check_points(points: Sequence[int]) -> None:
    if len(set(points)) != len(points) or any(not 1 <= point <= 255 for point in points):
        raise ValueError("points must differ from each other and lie in 1..255")


def _draw(seed: bytes, label: bytes, index: int, count: int) -> _Residues:
    """Return ``count`` uniform residues of a prime: 21 bits of each keystream word, too large ones left out."""
    key = HKDFExpand(hashes.SHA256(), 32, label + bytes([index])).derive(seed)
    cipher = keystream(key)
    drawn = np.empty(0)
    while drawn.size < count:
        missing = count - drawn.size + 64
        words = np.frombuffer(cipher.update(bytes(4 * missing)), "<u4") & np.uint32((1 << _BITS) - 1)
        drawn = np.concatenate([drawn, words[words < PRIMES[index]]])
    return drawn[:count]


def _deal(
    constants: IntegerVector, degree: int, points: Sequence[int], seed: bytes, label: bytes
) -> NDArray[np.uint64]:
    _check_points(points)
    if not 0 <= degree < len(points):
        raise ValueError(f"degree must be in 0..{len(points) - 1}, got {degree}")
    residues = []
    for index, prime in enumerate(PRIMES):
        drawn = _draw(seed, label, index, degree * constants.size).reshape(degree, constants.size)
        powers = np.array([[pow(point, k, prime) for k in range(degree + 1)] for point in points], np.float64)
        values = powers[:, 1:] @ drawn + (constants % prime)
        residues.append(_modulo(values, prime))
    return _pack(residues)


def deal(values: IntegerVector, degree: int, points: Sequence[int], seed: bytes) -> dict[int, ShareVector]:
    rows = _deal(values, degree, points, seed, b"fedvision/gram/v1")
    return dict(zip(points, rows, strict=True))


def deal_zero(count: int, degree: int, points: Sequence[int], seed: bytes) -> dict[int, ShareVector]:
    rows = _deal(np.zeros(count, np.int64), degree, points, seed, b"fedvision/gram-zero/v1")
    return dict(zip(points, rows, strict=True))


def products(shares: Mapping[int, ShareVector], zero_shares: Iterable[ShareVector]) -> ShareVector:
    rows = np.stack([shares[site] for site in sorted(shares)])
    upper = np.triu_indices(len(rows))
    zeros = list(zero_shares)
    residues = []
    for index, prime in enumerate(PRIMES):
        values = _unpack(rows, index)
        total = _modulo(values @ values.T, prime)[upper]
        for zero in zeros:
            total += _unpack(zero, index)
        residues.append(_modulo(total, prime))
    return _pack(residues)


def add_shares(shares: Iterable[ShareVector]) -> ShareVector:
    totals: list[_Residues] = []
    for share in shares:
        parts = [_unpack(share, index) for index in range(3)]
        totals = [a + b for a, b in zip(totals, parts, strict=True)] if totals else parts
    if not totals:
        raise ValueError("there must be one share at least")
    return _pack([_modulo(total, prime) for total, prime in zip(totals, PRIMES, strict=True)])


def _lagrange(known: Sequence[int], wanted: Sequence[int], prime: int) -> NDArray[np.float64]:
    """Return the matrix (wanted, known) that takes values at ``known`` to values at ``wanted``."""
    weights = []
    for own in known:
        product = 1
        for other in known:
            if other != own:
                product = product * (own - other) % prime
        weights.append(pow(product, -1, prime))
    rows = []
    for at in wanted:
        whole = 1
        for other in known:
            whole = whole * (at - other) % prime
        rows.append(
            [whole * w * pow(at - own, -1, prime) % prime for own, w in zip(known, weights, strict=True)]
        )
    return np.array(rows, np.float64).reshape(len(wanted), len(known))


def interpolate(shares: Mapping[int, ShareVector], degree: int) -> IntegerVector:
    points = sorted(shares)
    _check_points(points)
    if degree < 0 or len(points) <= degree:
        raise ValueError(f"degree {degree} needs {degree + 1} shares, got {len(points)}")
    rows = np.stack([shares[point] for point in points])
    known, further = points[: degree + 1], points[degree + 1 :]
    at_zero = []
    for index, prime in enumerate(PRIMES):
        values = _unpack(rows, index)
        found = _modulo(_lagrange(known, [0, *further], prime) @ values[: degree + 1], prime)
        if not np.array_equal(found[1:], values[degree + 1 :]):
            raise MessageError("shares do not lie on one polynomial")
        at_zero.append(found[0].astype(np.int64))
    return _combine(at_zero)


def _combine(residues: Sequence[IntegerVector]) -> IntegerVector:
    """Return the centred integers with these residues (Garner)."""
    first, second, third = PRIMES
    step = (residues[1] - residues[0]) * pow(first, -1, second) % second
    low = residues[0] + first * step
    step = (residues[2] - low % third) * pow(first * second, -1, third) % third
    whole = low + first * second * step
    return np.where(whole > _MODULUS // 2, whole - _MODULUS, whole)


def gram_matrix(values: IntegerVector, num_sites: int) -> NDArray[np.int64]:
    upper = np.triu_indices(num_sites)
    if values.shape != (len(upper[0]),):
        raise ValueError(f"{num_sites} sites have {len(upper[0])} pairs, got shape {values.shape}")
    gram = np.zeros((num_sites, num_sites), np.int64)
    gram[upper] = values
    return gram + np.triu(gram, 1).T


def over_bound(gram: NDArray[np.int64]) -> tuple[int, ...]:
    diagonal = np.diagonal(gram)
    return tuple(int(i) for i in np.flatnonzero((diagonal < 0) | (diagonal > _LARGEST_DIAGONAL)))


def is_consistent(gram: NDArray[np.int64]) -> bool:
    values = gram.astype(np.float64)
    diagonal = np.diagonal(values)
    if (diagonal < 0).any():
        return False
    return bool((values**2 <= np.outer(diagonal, diagonal) * (1 + 1e-9)).all())
