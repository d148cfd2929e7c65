"""A site's steps at levels ``sketch`` and ``gram``, between masking and the accepted set; see ``site``."""

import os
from dataclasses import replace

from fedvision.errors import MessageError, ProtocolError
from fedvision.secagg import holding, schedule
from fedvision.secagg.codec import encode
from fedvision.secagg.masking import MaskVector
from fedvision.secagg.member import (
    SiteMember,
    expect_phase,
    input_bytes,
    move,
    require_ascending,
    require_enough,
    require_session,
    seed_hash,
    vector_digest,
)
from fedvision.secagg.merkle import path_fits
from fedvision.secagg.messages import (
    SHARE_BYTES,
    Beacon,
    BeaconRoll,
    Complaint,
    Holding,
    Masked,
    MaskedRoll,
    Products,
    SealedShare,
    Sketch,
    SketchUpload,
)
from fedvision.secagg.schedule import read_server, read_signed
from fedvision.secagg.site_state import HeldShare, Marks, SiteSession, mapping, pairs
from fedvision.secagg.sketch import sketch as sketch_of


def reveal_beacon(
    member: SiteMember, marks: Marks, state: SiteSession, roll_bytes: bytes
) -> tuple[Marks, SiteSession, bytes]:
    """Reveal the beacon number, once all inputs are committed; see ``begin`` for the rest."""
    expect_phase(state, "masked")
    if member.consortium.level(state.session.purpose) == "sum":
        raise ProtocolError("phase", f"{state.session}: this sum has no sketch")
    roll = read_server(member.consortium, roll_bytes, MaskedRoll)
    require_session(state, roll.tau)
    numbers = [entry.sender for entry in roll.entries]
    require_ascending(numbers, list(mapping(state.cohort)), member.number)
    require_enough(member, len(numbers))
    digests = {}
    for entry in roll.entries:
        masked = read_signed(member.consortium, entry, Masked)
        require_session(state, masked.tau)
        digests[entry.sender] = masked.digest
    if digests[member.number] != mapping(state.masked)[member.number]:
        raise ProtocolError("own-entry", f"{state.session}: the site's own masked input was changed")
    root = schedule.masked_root(digests)
    marks, state = move(marks, state, "beacon", masked=pairs(digests), root=root)
    return marks, state, encode(member.sign(Beacon(state.tau, root, state.beacon)))


def read_beacons(member: SiteMember, state: SiteSession, roll: BeaconRoll) -> dict[int, bytes]:
    """Return the beacon numbers by site; each must be the one that the site committed to."""
    numbers = [entry.sender for entry in roll.entries]
    require_ascending(numbers, list(mapping(state.masked)), member.number)
    require_enough(member, len(numbers))
    found, committed = {}, mapping(state.cohort)
    for entry in roll.entries:
        beacon = read_signed(member.consortium, entry, Beacon)
        require_session(state, beacon.tau)
        if beacon.root != state.root:
            raise ProtocolError("beacon", f"{state.session}: sites saw different masked inputs")
        if seed_hash(beacon.number) != committed[entry.sender]:
            raise ProtocolError("beacon", f"{state.session}: a beacon number is not the committed one")
        found[entry.sender] = beacon.number
    return found


def send_sketch(
    member: SiteMember, marks: Marks, state: SiteSession, roll_bytes: bytes, vector: MaskVector
) -> tuple[Marks, SiteSession, bytes]:
    """Sketch the input with the map that all beacon numbers draw; see ``begin`` for the rest."""
    expect_phase(state, "beacon")
    roll = read_server(member.consortium, roll_bytes, BeaconRoll)
    require_session(state, roll.tau)
    if vector_digest(vector) != state.input_digest:
        raise ProtocolError("input", f"{state.session}: the stored input is not the one that was committed")
    numbers = read_beacons(member, state, roll)
    beta = schedule.make_beta(state.tau, state.root, numbers)
    values = sketch_of(vector, beta, member.consortium.apart(state.session.purpose))
    members = {number: digest for number, digest in mapping(state.masked).items() if number in numbers}
    seed, shares = b"", tuple[SealedShare, ...]()
    if member.consortium.level(state.session.purpose) == "gram":
        seed = os.urandom(32)
        dealt = holding.deal_to_all(member.consortium, sorted(members), values, seed)
        shares = tuple(_seal_share(member, state, receiver, text) for receiver, text in dealt.items())
    clear = b"" if shares else input_bytes(values)
    message = Sketch(state.tau, beta, clear, holding.commitment(seed), holding.shares_root(shares))
    marks = marks.sketching(state.session)
    state = replace(
        state, step=marks.step, phase="sketched", beta=beta, masked=pairs(members), deal_seed=seed
    )
    return marks, state, encode(SketchUpload(member.sign(message), shares))


def _seal_share(member: SiteMember, state: SiteSession, receiver: int, text: bytes) -> SealedShare:
    """Return one holder's part of a dealing; the site's own part is not sent, only committed."""
    sealed = b""
    if receiver != member.number:
        pair = member.pair_keys[receiver]
        sealed = schedule.seal(pair, "sketch-share", state.tau, state.nonce, member.number, receiver, text)
    return SealedShare(receiver, schedule.share_hash(member.number, receiver, text), sealed)


def hold(
    member: SiteMember, marks: Marks, state: SiteSession, holding_bytes: bytes, vector: MaskVector
) -> tuple[Marks, SiteSession, bytes]:
    """Multiply the shares that were dealt to this site; level ``gram`` (So et al. 2020, on sketches).

    Returns:
        New marks, new state, the signed ``Products``, or a ``Complaint`` about a dealer.
    """
    expect_phase(state, "sketched")
    if member.consortium.level(state.session.purpose) != "gram":
        raise ProtocolError("phase", f"{state.session}: this sum has no shares of sketches")
    message = read_server(member.consortium, holding_bytes, Holding)
    require_session(state, message.tau)
    points = sorted(mapping(state.masked))
    dealers = [entry.sketch.sender for entry in message.entries]
    require_ascending(dealers, points, member.number)
    require_enough(member, len(dealers))
    values = sketch_of(vector, state.beta, member.consortium.apart(state.session.purpose))
    own = holding.deal_to_all(member.consortium, points, values, state.deal_seed)
    texts = {member.number: own[member.number]}
    for entry in message.entries:
        dealer = entry.sketch.sender
        sketch = read_signed(member.consortium, entry.sketch, Sketch)
        require_session(state, sketch.tau)
        index, count = points.index(member.number), len(points)
        fits = path_fits(sketch.shares_root, holding.share_leaf(entry.share), index, count, entry.path)
        if sketch.beta != state.beta or entry.share.receiver != member.number or not fits:
            raise ProtocolError("box", f"{state.session}: a share is not the one that its dealer signed")
        if dealer == member.number:
            continue
        nonce = mapping(state.nonces)[dealer]
        try:
            pair = member.pair_keys[dealer]
            texts[dealer] = holding.open_share(
                member.consortium, pair, state.tau, nonce, dealer, entry.share, len(points)
            )
        except MessageError:
            marks, state = move(marks, state, "over")
            complaint = Complaint(state.session, dealer, member.secrets[dealer])
            return marks, state, encode(member.sign(complaint))
    products, zeros = holding.multiply(member.consortium, texts, message.challenge)
    if bool(message.root) != bool(member.consortium.charter.root_set):
        raise ProtocolError(
            "root-set", f"{state.session}: a root set that the charter does not name, or none"
        )
    root = holding.root_products(texts, message.root)
    basis = holding.basis(message.challenge, [entry.sketch for entry in message.entries], message.root)
    held = tuple(HeldShare(dealer, texts[dealer][:SHARE_BYTES]) for dealer in dealers)
    marks, state = move(marks, state, "held", held=held)
    found = Products(state.tau, basis, bytes(dealers), products, zeros, root)
    return marks, state, encode(member.sign(found))
