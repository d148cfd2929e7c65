"""The server's steps at levels ``sketch`` and ``gram``, between masking and the accepted set; see ``server``.

The order of calls: ``masked_roll``, ``add_beacon``..., ``beacon_roll``, ``add_sketch``..., at level ``gram``
``hold``, ``add_products``..., then ``judge``; once the masks are off, ``sum_fits``.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedvision.errors import MessageError, ProtocolError
from fedvision.secagg import holding, schedule
from fedvision.secagg.attempt import AttemptError, Disputed, Measured
from fedvision.secagg.codec import decode, kind_of
from fedvision.secagg.gram import over_bound, products_in_the_clear, round_sketch
from fedvision.secagg.masking import MaskVector
from fedvision.secagg.member import seed_hash
from fedvision.secagg.merkle import merkle_paths
from fedvision.secagg.messages import (
    SKETCH_BYTES,
    Beacon,
    BeaconRoll,
    Complaint,
    Evidence,
    Holding,
    HoldingEntry,
    MaskedRoll,
    Products,
    Ready,
    Signed,
    Sketch,
    SketchUpload,
)
from fedvision.secagg.roster import colluding_bound
from fedvision.secagg.schedule import read_signed
from fedvision.secagg.server_complaint import judge_complaint
from fedvision.secagg.server_state import Attempt, by_site
from fedvision.secagg.sketch import PROOF_SLACK, is_within
from fedvision.secagg.sketch import sketch as sketch_of


def masked_roll(attempt: Attempt) -> bytes:
    """Return the list of all hashes of masked inputs, for the sites in ``views.masked``.

    Raises:
        AttemptError: Too few masked inputs came.
    """
    attempt.require_enough(attempt.views.masked, "masked inputs came")
    for site in set(attempt.cohort) - set(attempt.views.masked):
        attempt.excluded[site] = "no masked input"
    attempt.root = schedule.masked_root(attempt.views.digests)
    return attempt.say(MaskedRoll(attempt.tau, by_site(attempt.views.masked)))


def add_beacon(attempt: Attempt, site: int, data: bytes) -> None:
    """Take a site's signed ``Beacon``.

    Raises:
        ProtocolError, MessageError: It is refused; the site counts as dropped out.
    """
    if site not in attempt.views.masked or site in attempt.views.beacons:
        raise ProtocolError("phase", f"{attempt.session}: a beacon number that was not asked for")
    signed = decode(data, Signed)
    beacon = read_signed(attempt.consortium, signed, Beacon, site)
    attempt.require_session(beacon.tau)
    ready = read_signed(attempt.consortium, attempt.views.ready[site], Ready, site)
    if beacon.root != attempt.root or seed_hash(beacon.number) != ready.beacon_hash:
        raise ProtocolError("beacon", f"{attempt.session}: a beacon number is not the committed one")
    attempt.views.beacons[site] = signed
    attempt.views.numbers[site] = beacon.number


def beacon_roll(attempt: Attempt) -> bytes:
    """Fix the sketch's seed and return the list of all beacon numbers, for those in ``views.beacons``.

    Raises:
        AttemptError: Too few beacon numbers came.
    """
    attempt.require_enough(attempt.views.beacons, "beacon numbers came")
    for site in set(attempt.views.masked) - set(attempt.views.beacons):
        attempt.excluded[site] = "no beacon"
    attempt.beta = schedule.make_beta(attempt.tau, attempt.root, attempt.views.numbers)
    if attempt.root_update is not None:
        attempt.root_sketch = holding.root_bytes(
            round_sketch(sketch_of(attempt.root_update, attempt.beta, attempt.apart), attempt.norm_bound)
        )
    return attempt.say(BeaconRoll(attempt.tau, by_site(attempt.views.beacons)))


def add_sketch(attempt: Attempt, site: int, data: bytes) -> None:
    """Take a site's ``SketchUpload``.

    Raises:
        ProtocolError, MessageError: It is refused; the site counts as dropped out.
    """
    if site not in attempt.views.beacons or site in attempt.views.sketches:
        raise ProtocolError("phase", f"{attempt.session}: a sketch that was not asked for")
    upload = decode(data, SketchUpload)
    sketch = read_signed(attempt.consortium, upload.sketch, Sketch, site)
    attempt.require_session(sketch.tau)
    if sketch.beta != attempt.beta:
        raise ProtocolError("beacon", f"{attempt.session}: a sketch of another map")
    if attempt.level == "gram":
        receivers = tuple(share.receiver for share in upload.shares)
        if sketch.values or receivers != tuple(sorted(attempt.views.beacons)):
            raise ProtocolError("box", f"{attempt.session}: there must be one share for each site of the set")
        if holding.shares_root(upload.shares) != sketch.shares_root:
            raise ProtocolError("box", f"{attempt.session}: the shares are not the signed ones")
        attempt.views.sealed[site] = {share.receiver: share for share in upload.shares}
    else:
        if len(sketch.values) != SKETCH_BYTES or upload.shares:
            raise MessageError("a sketch must have 2048 values and no shares")
        attempt.views.values[site] = np.frombuffer(sketch.values, "<u4").astype(np.uint32)
    attempt.views.sketches[site] = upload.sketch


def hold(attempt: Attempt, challenge: bytes = b"") -> dict[int, bytes]:
    """Return each holder's ``Holding`` message; level ``gram``.

    Args:
        challenge: 32 bytes that no dealer could know, see ``holding.fresh_challenge``; drawn if absent.

    Raises:
        AttemptError: Too few sketches were shared.
    """
    dealers, points = sorted(attempt.views.sketches), sorted(attempt.views.beacons)
    attempt.require_enough(dealers, "sketches were shared")
    attempt.challenge = challenge or holding.fresh_challenge()
    paths = {
        d: merkle_paths([holding.share_leaf(attempt.views.sealed[d][p]) for p in points]) for d in dealers
    }
    messages = {}
    for site in dealers:
        index = points.index(site)
        entries = tuple(
            HoldingEntry(attempt.views.sketches[d], attempt.views.sealed[d][site], paths[d][index])
            for d in dealers
        )
        messages[site] = attempt.say(Holding(attempt.tau, attempt.challenge, attempt.root_sketch, entries))
    return messages


def add_products(attempt: Attempt, site: int, data: bytes) -> None:
    """Take a site's signed ``Products``, or its ``Complaint`` about a dealer.

    Raises:
        ProtocolError, MessageError: It is refused; the site counts as dropped out.
        AttemptError: A complaint was made: this attempt is over, its evidence names who lied.
    """
    if site not in attempt.views.sketches or site in attempt.views.products:
        raise ProtocolError("phase", f"{attempt.session}: products that were not asked for")
    signed = decode(data, Signed)
    if kind_of(signed.body) is Complaint:
        judge_complaint(attempt, site, signed)
    products = read_signed(attempt.consortium, signed, Products, site)
    attempt.require_session(products.tau)
    dealers = sorted(attempt.views.sketches)
    sketches = [attempt.views.sketches[dealer] for dealer in dealers]
    if products.basis != holding.basis(attempt.challenge, sketches, attempt.root_sketch):
        raise ProtocolError("session", f"{attempt.session}: products of other dealings")
    if list(products.dealers) != dealers or len(products.zeros) != 8 * len(dealers):
        raise ProtocolError("roster", f"{attempt.session}: products of other dealers")
    if len(products.values) != 8 * (len(dealers) * (len(dealers) + 1) // 2):
        raise MessageError("there must be one product for each pair of dealers")
    if len(products.root) != (8 * len(dealers) if attempt.root_sketch else 0):
        raise MessageError("there must be one product with the root set for each dealer")
    attempt.views.products[site] = signed
    attempt.views.product_shares[site] = products.values
    attempt.views.zero_shares[site] = products.zeros
    attempt.views.root_shares[site] = products.root


def judge(attempt: Attempt) -> None:
    """Leave out the sites that sent no sketch, those whose norm is above the bound, and those that the
    charter's rules leave out.

    Raises:
        AttemptError: Too few sites multiplied shares; level ``gram``.
        Disputed: The shares contradict each other; level ``gram``.
    """
    for site in set(attempt.views.beacons) - set(attempt.views.sketches):
        attempt.excluded[site] = "no sketch"
    if attempt.level == "gram":
        _judge_gram(attempt)
    else:
        _judge_sketches(attempt)


def _judge_gram(attempt: Attempt) -> None:
    """Read the inner products from the shares; leave out sites by their norm, and then by the rules."""
    dealers = sorted(attempt.views.sketches)
    needed = 2 * attempt.consortium.charter.max_colluding + 1
    if len(attempt.views.products) < max(needed, attempt.consortium.quorum):
        raise AttemptError(
            f"{attempt.session}: {len(attempt.views.products)} sites multiplied shares, too few",
            attempt.evidence,
            set(dealers) - set(attempt.views.products),
        )
    try:
        attempt.gram = holding.read_gram(
            attempt.consortium, len(dealers), attempt.views.product_shares, attempt.views.zero_shares
        )
        root = _read_root(attempt)
    except MessageError as error:
        raise Disputed(f"{attempt.session}: {error}") from None
    proof = tuple(attempt.views.products[site] for site in sorted(attempt.views.products))
    for index in over_bound(attempt.gram):
        attempt.excluded[dealers[index]] = "norm above the bound"
    charter = attempt.consortium.charter
    liars = colluding_bound(len(charter.sites))  # so few cannot lie unnoticed about what all see as one
    is_proof = len(proof) > 2 * charter.max_colluding + liars
    for index in over_bound(attempt.gram, PROOF_SLACK) if is_proof else ():
        attempt.evidence.append(Evidence(dealers[index], "norm", proof))
    for site in set(dealers) - set(attempt.views.products):
        attempt.excluded.setdefault(site, "no shares")
    _apply_rules(attempt, dealers, attempt.gram, root)


def _read_root(attempt: Attempt) -> NDArray[np.int64] | None:
    if not attempt.root_sketch:
        return None
    return holding.read_root(attempt.consortium, attempt.gram, attempt.root_sketch, attempt.views.root_shares)


def _judge_sketches(attempt: Attempt) -> None:
    """Leave out sites by the norm of the sketches that they sent, and then by the rules."""
    for site, values in attempt.views.values.items():
        if not is_within(values, attempt.norm_bound):
            attempt.excluded[site] = "norm above the bound"
        if not is_within(values, attempt.norm_bound, PROOF_SLACK):
            proof = (attempt.views.masked[site], attempt.views.sketches[site])
            attempt.evidence.append(Evidence(site, "norm", proof))
    inside = sorted(attempt.views.values.keys() - attempt.excluded.keys())
    if attempt.select is None or not inside:
        return
    gram, root = products_in_the_clear(
        [attempt.views.values[site] for site in inside],
        holding.root_values(attempt.root_sketch),
        attempt.length,
        attempt.beta,
        attempt.norm_bound,
    )
    _apply_rules(attempt, inside, gram, root if attempt.root_sketch else None)


def _apply_rules(
    attempt: Attempt, sites: Sequence[int], gram: NDArray[np.int64], root: NDArray[np.int64] | None
) -> None:
    """Leave out the sites that the charter's rules leave out, of those that are not out already."""
    left = [index for index, site in enumerate(sites) if site not in attempt.excluded]
    most = len(left) - attempt.consortium.quorum
    if attempt.select is None or most < 0:
        return
    public = holding.root_values(attempt.root_sketch)
    attempt.measured = Measured(
        tuple(sites[index] for index in left),
        gram[np.ix_(left, left)],
        None if root is None else root[left],
        int(public @ public),
        most,
    )
    selected = attempt.select(attempt.measured)
    attempt.judgement = selected.judgement
    for site in sorted(selected.excluded):
        attempt.excluded[site] = "by the rules"


def sum_fits(attempt: Attempt, total: MaskVector) -> bool:
    """Whether a sum without masks is the sum of the accepted sites' sketches."""
    found = sketch_of(total, attempt.beta, attempt.apart)
    if attempt.level == "gram":
        return holding.sum_fits(attempt.consortium, len(attempt.inside), attempt.views.sum_shares, found)
    claimed = np.zeros(2048, np.uint32)
    for site in attempt.inside:
        claimed += attempt.views.values[site]
    return bool(np.array_equal(found, claimed))
