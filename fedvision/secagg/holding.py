"""Level ``gram``: what a dealer gives to a holder, and what a holder makes of it; bytes around ``gram``.

A dealing is a plain function of the sketch and a 32-byte seed, to which the dealer commits. So when
something does not fit, the dealer opens seed and sketch, and everybody can compute every share again.

Every site deals zeros too; drawn together they hide all of a product but its value. Whether they are zeros is
shown by one combination of each dealer's zeros, drawn by the server after all dealings are committed; one
zero more, in no product, keeps the combination itself from saying anything.
"""

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from fedvision.errors import MessageError
from fedvision.secagg import gram, schedule
from fedvision.secagg.masking import MaskVector
from fedvision.secagg.merkle import merkle_root
from fedvision.secagg.messages import SHARE_BYTES, SealedShare, Signed
from fedvision.secagg.schedule import Consortium
from fedvision.secagg.site_state import HeldShare


def deal_to_all(
    consortium: Consortium, points: Sequence[int], values: MaskVector, seed: bytes
) -> dict[int, bytes]:
    """Return what a dealer gives to each of ``points``: its share of the rounded sketch, and of zeros.

    Args:
        consortium: Its charter sets degree and norm bound.
        points: The set that deals and holds, ascending.
        values: The sketch, shape (2048,), uint32.
        seed: 32 bytes, secret until a dispute.
    """
    degree = consortium.charter.max_colluding
    rounded = gram.round_sketch(values, consortium.encoding.norm_bound)
    shares = gram.deal(rounded, degree, points, seed)
    zeros = gram.deal_zero(gram.zero_count(len(points), degree), 2 * degree, points, seed)
    return {point: _bytes(shares[point]) + _bytes(zeros[point]) for point in points}


def _bytes(values: gram.ShareVector) -> bytes:
    return values.astype("<u8", copy=False).tobytes()


def _values(data: bytes) -> gram.ShareVector:
    return np.frombuffer(data, "<u8").astype(np.uint64)


def commitment(seed: bytes) -> bytes:
    """Return the commitment to a dealing's seed; zeros where nothing is dealt."""
    return schedule.digest_of("deal", seed) if seed else bytes(32)


def share_leaf(share: SealedShare) -> bytes:
    """Return what a sealed share is in the Merkle tree."""
    return bytes([share.receiver]) + share.share_hash + share.sealed


def shares_root(shares: Sequence[SealedShare]) -> bytes:
    """Return the Merkle root over a dealing; zeros where nothing is dealt."""
    return merkle_root([share_leaf(share) for share in shares]) if shares else bytes(32)


def open_share(
    consortium: Consortium,
    pair: bytes,
    tau: bytes,
    nonce: bytes,
    dealer: int,
    share: SealedShare,
    num_points: int,
) -> bytes:
    """Return what a dealer gave to a holder.

    Raises:
        MessageError: It does not open, is not what was committed, or has the wrong length.
    """
    receiver, degree = share.receiver, consortium.charter.max_colluding
    text = schedule.unseal(pair, "sketch-share", tau, nonce, dealer, receiver, share.sealed)
    if len(text) != SHARE_BYTES + 8 * gram.zero_count(num_points, degree):
        raise MessageError("a share of a sketch has another length")
    if schedule.share_hash(dealer, receiver, text) != share.share_hash:
        raise MessageError("a share is not the one that was committed")
    gram.add_shares([_values(text)])  # every element is one of the field
    return text


def multiply(consortium: Consortium, texts: Mapping[int, bytes], challenge: bytes) -> tuple[bytes, bytes]:
    """Return a holder's shares of all inner products, and of the drawn combination of each dealer's zeros.

    Args:
        consortium: Its charter sets the degree.
        texts: What each dealer gave to this holder.
        challenge: Draws the combination.
    """
    shares = {dealer: _values(text[:SHARE_BYTES]) for dealer, text in texts.items()}
    zeros = {dealer: _values(text[SHARE_BYTES:]) for dealer, text in texts.items()}
    degree = consortium.charter.max_colluding
    needed = gram.zero_count(len(texts), degree)  # fewer than were dealt, where dealers are gone
    first = {dealer: np.append(values[: needed - 1], values[-1:]) for dealer, values in zeros.items()}
    found = gram.products(shares, [gram.extract_zeros(first, degree)])
    return _bytes(found), _bytes(gram.combine([zeros[dealer] for dealer in sorted(zeros)], challenge))


def root_bytes(values: gram.IntegerVector) -> bytes:
    """Return the root set's rounded sketch as a ``Holding`` message carries it."""
    return values.astype("<i4").tobytes()


def root_values(root: bytes) -> gram.IntegerVector:
    """Return the numbers of such a message, shape (2048,), int64; none for none."""
    return np.frombuffer(root, "<i4").astype(np.int64)


def root_products(texts: Mapping[int, bytes], root: bytes) -> bytes:
    """Return a holder's shares of each dealer's inner product with the root set's sketch.

    Args:
        texts: What each dealer gave to this holder.
        root: As in the ``Holding`` message; nothing gives nothing.

    Raises:
        MessageError: It has another length, or is longer than any compliant update's.
    """
    if not root:
        return b""
    if len(root) != SHARE_BYTES // 2:
        raise MessageError("the sketch of the root set's update has another length")
    public = root_values(root)
    if np.abs(public).max() > 1 << 20 or gram.over_bound(np.array([[public @ public]])):
        raise MessageError("the sketch of the root set's update is too long")
    shares = {dealer: _values(text[:SHARE_BYTES]) for dealer, text in texts.items()}
    return _bytes(gram.public_products(shares, public))


def read_root(
    consortium: Consortium, matrix: np.ndarray, root: bytes, shares: Mapping[int, bytes]
) -> np.ndarray:
    """Return each dealer's inner product with the root set's sketch, shape (dealers,), int64.

    Args:
        consortium: Its charter sets the degree.
        matrix: The Gram matrix of the dealers.
        root: The sketch, as in the ``Holding`` message.
        shares: Each holder's ``Products.root``.

    Raises:
        MessageError: The shares lie on no polynomial, or no vectors have such products: somebody lied.
    """
    found = gram.interpolate(
        {holder: _values(data) for holder, data in shares.items()}, consortium.charter.max_colluding
    )
    public = root_values(root).astype(np.float64)
    bound = np.diagonal(matrix).astype(np.float64) * float(public @ public) * (1 + 1e-9)
    inside = np.setdiff1d(np.arange(len(matrix)), gram.over_bound(matrix))
    if (found[inside].astype(np.float64) ** 2 > bound[inside]).any():
        raise MessageError("no vectors have these inner products with the root set's")
    return found


def add_held(held: Iterable[HeldShare], inside: Collection[int]) -> bytes:
    """Return a holder's share of the sum of the accepted sketches; nothing where it holds none."""
    shares = [_values(item.share) for item in held if item.dealer in inside]
    return _bytes(gram.add_shares(shares)) if shares else b""


def read_gram(
    consortium: Consortium, num_dealers: int, products: Mapping[int, bytes], zeros: Mapping[int, bytes]
) -> np.ndarray:
    """Return the Gram matrix of the rounded sketches, shape (dealers, dealers), int64.

    Args:
        consortium: Its charter sets the degree.
        num_dealers: How many sketches were shared.
        products: Each holder's shares of the products.
        zeros: Each holder's shares of the combinations of zeros.

    Raises:
        MessageError: The shares lie on no polynomial, the zeros are none, or no vectors have such products:
            somebody lied.
    """
    degree = 2 * consortium.charter.max_colluding
    values = gram.interpolate({holder: _values(data) for holder, data in products.items()}, degree)
    if gram.interpolate({holder: _values(data) for holder, data in zeros.items()}, degree).any():
        raise MessageError("the zeros that were dealt are none")
    matrix = gram.gram_matrix(values, num_dealers)
    over = set(gram.over_bound(matrix))
    inside = [index for index in range(num_dealers) if index not in over]
    if not gram.is_consistent(matrix[np.ix_(inside, inside)]):
        raise MessageError("no vectors have these inner products")
    return matrix


def sum_fits(
    consortium: Consortium, num_inside: int, sum_shares: Mapping[int, bytes], sketch: MaskVector
) -> bool:
    """Whether the opened sum of the rounded sketches is the sketch of the sum, up to the rounding.

    Args:
        consortium: Its charter sets degree and norm bound.
        num_inside: How many sketches were added; each was rounded by half a unit at most.
        sum_shares: Each holder's share of the sum.
        sketch: Of the unmasked sum, shape (2048,), uint32.
    """
    shares = {holder: _values(data) for holder, data in sum_shares.items()}
    try:
        claimed = gram.interpolate(shares, consortium.charter.max_colluding)
    except MessageError:
        return False
    unit = consortium.encoding.norm_bound / gram.UNITS
    exact = gram.centred(sketch) / unit
    return bool(np.abs(exact - claimed).max() <= num_inside / 2 + 1e-6)


def basis(challenge: bytes, sketches: Sequence[Signed], root: bytes) -> bytes:
    """Return the hash of what products are made from: challenge, dealers' messages, root sketch."""
    leaves = [bytes([signed.sender]) + signed.body for signed in sketches]
    return schedule.digest_of("holding", challenge, merkle_root(leaves), hashlib.sha256(root).digest())


def fresh_challenge() -> bytes:
    """Return 32 bytes that no dealer could know."""
    return os.urandom(32)
