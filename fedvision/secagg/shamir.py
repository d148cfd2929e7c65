"""Shamir's secret sharing of 32-byte secrets over GF(2**8), byte by byte.

Rules:
- The field is GF(2**8) with the polynomial x^8 + x^4 + x^3 + x + 1 (0x11b), as in AES.
- A site's point is its number, 1..255. The secret is the value at 0.
- Every byte of a secret has a polynomial of its own, so a share has as many bytes as the secret.
- Shares carry no check of their own: a wrong share gives a wrong secret, and the caller compares the
  secret with its commitment.

The multiplication is a table of 64 KiB, so its time may depend on the secret. Shares are dealt and secrets
recovered on the party's own machine, a few times a round.

Source: Shamir 1979.
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

SECRET_BYTES = 32
_POLYNOMIAL = 0x11B
ByteArray = NDArray[np.uint8]


def _make_tables() -> tuple[ByteArray, ByteArray]:
    """Return products, shape (256, 256), and inverses, shape (256,), of the field; 0 has inverse 0."""
    powers = []
    value = 1
    for _ in range(255):
        powers.append(value)
        value ^= value << 1  # times 3, which generates the field
        if value & 0x100:
            value ^= _POLYNOMIAL
    logs = np.zeros(256, np.int64)
    logs[powers] = np.arange(255)
    table = np.array(powers * 2, np.uint8)
    products = table[logs[:, None] + logs]
    products[0, :] = products[:, 0] = 0
    inverses = table[(255 - logs) % 255]
    inverses[0] = 0
    return products, inverses


_PRODUCTS, _INVERSES = _make_tables()
_ROWS = [row.tobytes() for row in _PRODUCTS]


def _check_points(points: Sequence[int]) -> None:
    if len(set(points)) != len(points) or any(not 1 <= point <= 255 for point in points):
        raise ValueError("points must differ from each other and lie in 1..255")


def evaluate(coefficients: ByteArray, points: Sequence[int]) -> ByteArray:
    """Return the values of k polynomials at the points, by Horner's rule.

    Args:
        coefficients: Shape (t, k), uint8, constant term first.
        points: Where, 1..255.

    Returns:
        Shape (n, k), uint8.
    """
    at = np.array(points, np.uint8)[:, None]
    values = np.zeros((len(points), coefficients.shape[1]), np.uint8)
    for row in coefficients[::-1]:
        values = _PRODUCTS[at, values] ^ row
    return values


def split(secret: bytes, threshold: int, points: Sequence[int]) -> dict[int, bytes]:
    """Split ``secret`` so that any ``threshold`` shares give it back.

    Guarantee: any ``threshold - 1`` shares are uniform and independent of the secret; the coefficients
    come from the operating system's generator.

    Args:
        secret: 32 bytes.
        threshold: Shares needed, 1..len(points).
        points: Distinct numbers 1..255, one for each share.

    Returns:
        The share, 32 bytes, by point.

    Raises:
        ValueError: A wrong length, threshold or point.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret must have {SECRET_BYTES} bytes, got {len(secret)}")
    _check_points(points)
    if not 1 <= threshold <= len(points):
        raise ValueError(f"threshold must be in 1..{len(points)}, got {threshold}")
    drawn = secret + os.urandom((threshold - 1) * SECRET_BYTES)
    shares = evaluate(np.frombuffer(drawn, np.uint8).reshape(threshold, SECRET_BYTES), points)
    return {point: row.tobytes() for point, row in zip(points, shares, strict=True)}


def _weights_at_zero(points: Sequence[int]) -> list[int]:
    """Return the Lagrange weights that give the value at 0 from the values at ``points``."""
    at = np.array(points, np.uint8)
    weights = []
    for index, own in enumerate(at):
        weight = 1
        for other in np.delete(at, index):
            weight = _PRODUCTS[weight, _PRODUCTS[other, _INVERSES[other ^ own]]]
        weights.append(int(weight))
    return weights


def recover_many(points: Sequence[int], shares: ByteArray) -> list[bytes]:
    """Return the secrets whose shares the same sites hold; the weights are computed once.

    Args:
        points: The sites' points: exactly the threshold of them, distinct, 1..255.
        shares: Shape (t, k, 32), uint8: row i holds the shares of the k secrets at ``points[i]``.

    Returns:
        The k secrets, 32 bytes each. With fewer shares than the threshold, or a wrong one, they are
        other bytes.

    Raises:
        ValueError: A wrong shape or point.
    """
    _check_points(points)
    if shares.dtype != np.uint8 or shares.ndim != 3 or shares.shape[::2] != (len(points), SECRET_BYTES):
        raise ValueError(f"shares must be uint8 of shape ({len(points)}, k, {SECRET_BYTES})")
    total = np.zeros(shares.shape[1] * SECRET_BYTES, np.uint8)
    for weight, row in zip(_weights_at_zero(points), shares, strict=True):
        # bytes.translate is the fastest table look-up at hand
        total ^= np.frombuffer(row.tobytes().translate(_ROWS[weight]), np.uint8)
    return [row.tobytes() for row in total.reshape(-1, SECRET_BYTES)]


def recover(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret of exactly threshold shares, by point; see ``recover_many``.

    Raises:
        ValueError: No share, a point outside 1..255, or a share that is not 32 bytes.
    """
    if not shares or any(len(share) != SECRET_BYTES for share in shares.values()):
        raise ValueError(f"shares must have {SECRET_BYTES} bytes and there must be one at least")
    rows = np.frombuffer(b"".join(shares.values()), np.uint8).reshape(len(shares), 1, SECRET_BYTES)
    return recover_many(list(shares), rows)[0]
