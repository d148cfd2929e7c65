"""Inner products of the sites' sketches without the sketches: Shamir sharing over a field of 63 bits.

Each site rounds its sketch to units of ``norm_bound / 4096`` and deals Shamir shares of degree m to all n
sites of the set (``deal``), and shares of zeros (``deal_zero``). A holder multiplies the shares of each pair
of sites, adds up the 2048 products, adds its share of a zero, and sends one number a pair (``products``). The
server interpolates the n(n+1)/2 numbers and learns the inner products alone.

Why these parameters:
- Degree ``m = ceil(n / 3) - 1``: m colluding sites hold m shares of a polynomial of degree m, which are
  uniform whatever the sketch is. m is what the whole protocol allows to collude, so sharing to all sites fits
  it, and there is no choice of holders that somebody could steer.
- A product has degree 2m. Since ``3m + 1 <= n``, at least 2m + 1 of 3m + 1 answers are honest, and these
  alone fix the polynomial. So if up to m holders lie, the answers lie on no polynomial of degree 2m and
  ``interpolate`` says so. It cannot say who lied: to correct m errors takes 4m + 1 answers.
- A dealer whose shares lie on no polynomial of degree m is found in the same way: multiplied by the unknown
  polynomial of an honest site they lie on none of degree 2m, but for a chance of about 2**-63.
- Zeros of degree 2m hide all of a product's polynomial but its value at 0. From n dealt zeros, m of them
  chosen by colluding sites, n - m uniform ones are made, so that a site deals n(n+1)/2 / (n - m) and not one
  for each pair (``extract_zeros``). A dealer who deals something else than zeros could shift any inner
  product: ``combine`` tells, unless he guesses a field element of one prime.
- Exactness: primes below 2**21, so entries of float64 matrices are, and 2048 products stay below 2**53.
- Wrapping in the field. A dishonest dealer may share a vector so long that its squared norm wraps to a small
  number. It gains nothing: the sum of all dealt vectors is opened (``add_shares``, then ``interpolate`` with
  degree m) and must be the sketch of the accepted sum up to rounding. So the joint vector of a coalition M
  has entries below 2**22, its squared norm is below 2**56 and does not wrap: it is the sum of the coalition's
  entries of the Gram matrix. Each of these is T at most by the bound on the diagonal and Cauchy-Schwarz, so
  the sum is ``|M|**2 * T`` at most, as if all had kept to the bound. Where the sum is not opened, the joint
  squared norm is within ``|M|**2 * T`` or a multiple of the field away from it, which a vector chosen without
  regard to the field hits with a probability of about ``2 * |M|**2 * T / 2**63``.

Sources: Shamir 1979; Ben-Or, Goldwasser, Wigderson 1988, section 3 (products); Damgard, Nielsen 2007,
section 3 (extraction); So et al. 2020 (distances from shares).
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from numpy.typing import NDArray

from fedvision.errors import MessageError
from fedvision.secagg.masking import MaskVector, keystream
from fedvision.secagg.sketch import NORM_SLACK, ROWS, TABLES, centred, without_tail

ShareVector = NDArray[np.uint64]
IntegerVector = NDArray[np.int64]
Residues = NDArray[np.float64]
"""Integers modulo one prime, 0 to prime - 1, as float64 for exact matrix products."""

PRIMES = (2097143, 2097133, 2097131)
"""The three largest primes below 2**21; an element of the field is r0 | r1 << 21 | r2 << 42."""
UNITS = 1 << 12
"""Units of one norm bound."""

_BITS = 21
_MODULUS = math.prod(PRIMES)


def round_sketch(values: MaskVector, norm_bound: float) -> IntegerVector:
    """Return a sketch in units of ``norm_bound / 4096``, rounded to nearest, ties to even.

    A plain function of its input: ``rint(centred(values) * 4096 / norm_bound)`` in float64, in this order, so
    that everybody who knows the sketch gets the same integers.

    Args:
        values: Shape (2048,), uint32.
        norm_bound: Largest L2 norm of a compliant encoded vector, > 0.

    Returns:
        Shape (2048,), int64.
    """
    if not norm_bound > 0:
        raise ValueError(f"norm_bound must be > 0, got {norm_bound}")
    return np.rint(centred(values) * float(UNITS) / norm_bound).astype(np.int64)


def products_in_the_clear(
    sketches: Sequence[MaskVector], root: IntegerVector, size: int, beta: bytes, norm_bound: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return what level ``gram`` would open of sketches that are seen, less loss and weight.

    Args:
        sketches: Shape (2048,) each, uint32.
        root: The root set's rounded sketch, int64; empty without one.
        size: Number of coordinates of the inputs.
        beta: The seed of the sketches.
        norm_bound: Largest L2 norm of a compliant encoded vector, > 0.

    Returns:
        The Gram matrix of the rounded sketches, and each one's inner product with the root's.
    """
    rows = np.array([centred(values) for values in sketches], np.float64).reshape(-1, ROWS)
    rows = without_tail(rows, size, beta)
    rounded = np.rint(rows * float(UNITS) / norm_bound).astype(np.int64)
    return rounded @ rounded.T, rounded @ root if root.size else np.zeros(len(rounded), np.int64)


def deal(values: IntegerVector, degree: int, points: Sequence[int], seed: bytes) -> dict[int, ShareVector]:
    """Return Shamir shares of ``values`` for each point.

    Guarantee: any ``degree`` shares are uniform and independent of the values, to anyone who does not know
    the seed; the same seed gives the same shares, so opening it proves what was dealt.

    Args:
        values: Shape (k,), int64: a rounded sketch.
        degree: Degree of the polynomials, less than the number of points.
        points: Distinct site numbers, 1..255.
        seed: 32 bytes, fresh and secret.

    Returns:
        Packed field elements, shape (k,), by point.
    """
    return _deal(values, degree, points, seed, b"fedvision/gram/v1")


def deal_zero(count: int, degree: int, points: Sequence[int], seed: bytes) -> dict[int, ShareVector]:
    """Return Shamir shares of ``count`` zeros for each point; see ``deal``.

    Args:
        count: Number of zeros; see ``zero_count``.
        degree: Degree of the polynomials: that of products, 2m.
        points: Distinct site numbers, 1..255.
        seed: 32 bytes; may be the seed of ``deal``, the polynomials are others.
    """
    return _deal(np.zeros(count, np.int64), degree, points, seed, b"fedvision/gram-zero/v1")


def _deal(
    constants: IntegerVector, degree: int, points: Sequence[int], seed: bytes, label: bytes
) -> dict[int, ShareVector]:
    _check_points(points)
    if not 0 <= degree < len(points):
        raise ValueError(f"degree must be in 0..{len(points) - 1}, got {degree}")
    residues = []
    for index, prime in enumerate(PRIMES):
        higher = _uniform(seed, label, index, (degree, constants.size))
        powers = _power_matrix(points, degree + 1, prime)[:, 1:]
        residues.append(_modulo(powers @ higher + constants % prime, prime))
    return dict(zip(points, _pack(residues), strict=True))


def zero_count(num_sites: int, degree: int) -> int:
    """Return how many zeros each site deals: enough for all pairs of ``num_sites`` sites, and one to check.

    Args:
        num_sites: Sites that deal, and whose pairs are multiplied.
        degree: m, the degree of their sketches' shares and the number of sites that may collude.
    """
    if not 0 <= 2 * degree < num_sites:
        raise ValueError(f"{num_sites} sites cannot multiply shares of degree {degree}")
    pairs = num_sites * (num_sites + 1) // 2
    return -(-pairs // (num_sites - degree)) + 1


def extract_zeros(zero_shares: Mapping[int, ShareVector], degree: int) -> ShareVector:
    """Return one holder's shares of a zero for each pair, from what all sites dealt to it.

    Guarantee: the zeros are uniform sharings, independent of each other, if at most ``degree`` dealers
    collude: a Vandermonde matrix of n - m rows is invertible on the columns of any n - m honest dealers
    (Damgard and Nielsen 2007, section 3).

    Args:
        zero_shares: Shape (zero_count,) for each dealer, by number.
        degree: m, the number of sites that may collude.

    Returns:
        Shape (n * (n + 1) / 2,).

    Raises:
        MessageError: A dealer's shares are not ``zero_count`` elements of the field.
    """
    rows = _rows(zero_shares, zero_count(len(zero_shares), degree))[:, :-1]
    num_sites = len(rows)
    residues = []
    for index, prime in enumerate(PRIMES):
        powers = _power_matrix(range(1, num_sites + 1), num_sites - degree, prime)
        made = _modulo(powers.T @ _unpack(rows, index), prime)
        residues.append(made.ravel()[: num_sites * (num_sites + 1) // 2])
    return _pack(residues)


def combine(zero_shares: Sequence[ShareVector], challenge: bytes) -> ShareVector:
    """Return one holder's shares of a random combination of each dealer's zeros.

    Guarantee: it interpolates (degree 2m) to zero for a dealer of zeros, and with probability 2**-20 at most
    for any other, provided that nobody knew the challenge when dealing. The dealer's last zero has weight 1
    and is used nowhere else, so the combination tells nothing about the others.

    Args:
        zero_shares: What each dealer dealt to this holder, shape (count,) each.
        challenge: 32 bytes, drawn after all zeros are committed.

    Returns:
        Shape (len(zero_shares),).

    Raises:
        MessageError: Shares are of different lengths or not elements of the field.
    """
    count = max((share.size for share in zero_shares), default=0)
    rows = _rows(dict(enumerate(zero_shares)), count)
    residues = []
    for index, prime in enumerate(PRIMES):
        weights = np.append(
            _uniform(challenge, b"fedvision/gram-zero-check/v1", index, (max(count, 1) - 1,)), 1.0
        )
        values = _unpack(rows, index)
        total = np.zeros(len(rows))
        for start in range(0, count, ROWS):  # so many products are exact
            part = slice(start, start + ROWS)
            total += _modulo(values[:, part] @ weights[part], prime)
        residues.append(_modulo(total, prime))
    return _pack(residues)


def products(shares: Mapping[int, ShareVector], zero_shares: Iterable[ShareVector]) -> ShareVector:
    """Return one holder's shares of the inner products of all pairs of sites, with zeros added.

    Args:
        shares: What each site dealt to this holder, shape (k,), k <= 2048, by site number.
        zero_shares: This holder's shares of zeros for the pairs; one vector from ``extract_zeros``, or
            several whose sum counts. Shape (n * (n + 1) / 2,) each.

    Returns:
        Shape (n * (n + 1) / 2,): pairs i <= j in ascending order of numbers, row by row.

    Raises:
        MessageError: Shares are of another shape or not elements of the field.
    """
    size = max((share.size for share in shares.values()), default=0)
    if size > ROWS:
        raise ValueError(f"products are exact up to {ROWS} coordinates, got {size}")
    rows = _rows(shares, size)
    upper = np.triu_indices(len(rows))
    zeros = _rows(dict(enumerate(zero_shares)), len(upper[0]))
    residues = []
    for index, prime in enumerate(PRIMES):
        values = _unpack(rows, index)
        total = _modulo(values @ values.T, prime)[upper]
        for zero in zeros:
            total += _unpack(zero, index)
        residues.append(_modulo(total, prime))
    return _pack(residues)


def public_products(shares: Mapping[int, ShareVector], public: IntegerVector) -> ShareVector:
    """Return one holder's shares of each site's inner product with a vector that everybody knows.

    They lie on polynomials of the degree of the dealing, m, whose other coefficients are inner products of
    uniform vectors with ``public``: all holders' shares together tell the inner product and no more.

    Args:
        shares: What each site dealt to this holder, shape (k,), k <= 2048, by site number.
        public: Shape (k,), int64.

    Returns:
        Shape (n,), in ascending order of numbers.

    Raises:
        MessageError: Shares are of another shape or not elements of the field.
    """
    if public.size > ROWS:
        raise ValueError(f"products are exact up to {ROWS} coordinates, got {public.size}")
    rows = _rows(shares, public.size)
    residues = []
    for index, prime in enumerate(PRIMES):
        known = (public % prime).astype(np.float64)
        residues.append(_modulo(_unpack(rows, index) @ known, prime))
    return _pack(residues)


def add_shares(shares: Iterable[ShareVector]) -> ShareVector:
    """Return the element-wise sum in the field: shares of the sum of what was shared.

    Raises:
        MessageError: Shares are of different lengths or not elements of the field.
    """
    given = list(shares)
    if not given:
        raise ValueError("there must be one share at least")
    rows = _rows(dict(enumerate(given)), given[0].size)
    return _pack([_modulo(_unpack(rows, index).sum(axis=0), prime) for index, prime in enumerate(PRIMES)])


def interpolate(shares: Mapping[int, ShareVector], degree: int) -> IntegerVector:
    """Return what was shared, from the shares by point.

    Guarantee: all shares lie on polynomials of this degree, or ``MessageError`` is raised. Among
    ``degree + 1 + e`` shares up to e false ones never pass, as long as ``degree + 1`` are right.

    Args:
        shares: Shape (k,) each, by point; ``degree + 1`` of them at least.
        degree: Degree of the polynomials.

    Returns:
        Shape (k,), int64: the values at 0, centred: between -2**62 and 2**62.

    Raises:
        MessageError: The shares lie on no polynomials of this degree, or are malformed.
        ValueError: There are too few.
    """
    points = sorted(shares)
    _check_points(points)
    if degree < 0 or len(points) <= degree:
        raise ValueError(f"degree {degree} needs {degree + 1} shares, got {len(points)}")
    rows = _rows(shares, shares[points[0]].size)
    known, further = points[: degree + 1], points[degree + 1 :]
    constants = []
    for index, prime in enumerate(PRIMES):
        values = _unpack(rows, index)
        found = _modulo(_lagrange_matrix(known, [0, *further], prime) @ values[: degree + 1], prime)
        if not np.array_equal(found[1:], values[degree + 1 :]):
            raise MessageError("shares do not lie on one polynomial")
        constants.append(found[0].astype(np.int64))
    return _lift(constants)


def gram_matrix(values: IntegerVector, num_sites: int) -> NDArray[np.int64]:
    """Return the symmetric matrix of the pairs in the order of ``products``, shape (n, n)."""
    upper = np.triu_indices(num_sites)
    if values.shape != upper[0].shape:
        raise ValueError(f"{num_sites} sites have {upper[0].size} pairs, got shape {values.shape}")
    gram = np.zeros((num_sites, num_sites), np.int64)
    gram[upper] = values
    gram.T[upper] = values
    return gram


def over_bound(gram: NDArray[np.int64], slack: float = NORM_SLACK) -> tuple[int, ...]:
    """Return the rows whose squared norm no compliant sketch has: above 4 * slack * 2**24, or negative.

    The diagonal adds up four tables, each with the squared norm in units of ``(norm_bound / 4096)**2``.
    """
    largest = TABLES * slack * UNITS**2
    diagonal = np.diagonal(gram)
    return tuple(np.flatnonzero((diagonal < 0) | (diagonal > largest)).tolist())


def is_consistent(gram: NDArray[np.int64]) -> bool:
    """Say whether every pair keeps to Cauchy-Schwarz; if not, somebody dealt a vector that wraps."""
    values = gram.astype(np.float64)
    diagonal = np.diagonal(values)
    bound = np.outer(diagonal, diagonal) * (1 + 1e-9)
    return bool((diagonal >= 0).all() and (values**2 <= bound).all())


def _check_points(points: Sequence[int]) -> None:
    if len(set(points)) != len(points) or any(not 1 <= point <= 255 for point in points):
        raise ValueError("points must differ from each other and lie in 1..255")


def _rows(shares: Mapping[int, ShareVector], size: int) -> NDArray[np.uint64]:
    """Return the shares in ascending order of their keys, shape (n, size)."""
    if any(share.dtype != np.uint64 or share.shape != (size,) for share in shares.values()):
        raise MessageError(f"shares must be uint64 of shape ({size},)")
    return np.array([shares[key] for key in sorted(shares)], np.uint64).reshape(len(shares), size)


def _pack(residues: Sequence[Residues]) -> ShareVector:
    packed = residues[0].astype(np.uint64)
    for index in (1, 2):
        packed |= residues[index].astype(np.uint64) << np.uint64(_BITS * index)
    return packed


def _unpack(shares: ShareVector, index: int) -> Residues:
    """Return the residues of one prime.

    Raises:
        MessageError: A residue is not below its prime.
    """
    residues = shares >> np.uint64(_BITS * index)
    if index < 2:
        residues &= np.uint64((1 << _BITS) - 1)
    if (residues >= PRIMES[index]).any():
        raise MessageError("a share is not an element of the field")
    return residues.astype(np.float64)


def _modulo(values: NDArray[np.float64], prime: int) -> Residues:
    """Reduce integers of at most 2**53 in absolute value, in place."""
    values -= np.floor(values * (1.0 / prime)) * prime  # the quotient may be wrong by 1
    values[values < 0] += prime
    values[values >= prime] -= prime
    return values


def _uniform(seed: bytes, label: bytes, index: int, shape: tuple[int, ...]) -> Residues:
    """Return uniform residues of a prime: 21 bits of each keystream word, those too large left out."""
    cipher = keystream(HKDFExpand(hashes.SHA256(), 32, label + bytes([index])).derive(seed))
    count = math.prod(shape)
    drawn = np.empty(0)
    while drawn.size < count:
        words = np.frombuffer(cipher.update(bytes(4 * (count - drawn.size + 64))), "<u4")
        words = words & np.uint32((1 << _BITS) - 1)
        drawn = np.concatenate([drawn, words[words < PRIMES[index]]])
    return drawn[:count].reshape(shape)


def _power_matrix(points: Iterable[int], count: int, prime: int) -> Residues:
    """Return the powers 0..count - 1 of each point, shape (len(points), count)."""
    return np.array([[pow(point, power, prime) for power in range(count)] for point in points], np.float64)


def _lagrange_matrix(known: Sequence[int], wanted: Sequence[int], prime: int) -> Residues:
    """Return the matrix that takes values at ``known`` to values at ``wanted``: (len(wanted), len(known))."""
    scales = [pow(math.prod(own - other for other in known if other != own), -1, prime) for own in known]
    rows = []
    for at in wanted:
        whole = math.prod(at - other for other in known) % prime
        inverses = (pow(at - own, -1, prime) for own in known)
        rows.append(
            [whole * scale * inverse % prime for scale, inverse in zip(scales, inverses, strict=True)]
        )
    return np.array(rows, np.float64)


def _lift(residues: Sequence[IntegerVector]) -> IntegerVector:
    """Return the centred integers with these residues (Garner's algorithm; all steps below 2**63)."""
    first, second, third = PRIMES
    step = (residues[1] - residues[0]) * pow(first, -1, second) % second
    low = residues[0] + first * step
    step = (residues[2] - low % third) * pow(first * second, -1, third) % third
    whole = low + first * second * step
    return np.where(whole > _MODULUS // 2, whole - _MODULUS, whole)
