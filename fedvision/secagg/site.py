"""A site's side of a masked sum, as pure functions: state and message in, new state and answer out.

What a site refuses, each with the name of its rule:
- ``high-water``: a session that is not later than every one before; ``answered``: a round that was unmasked;
  ``sketched``: one whose input was sketched, because each sketch says something else about it.
- ``phase``: any message out of order, so also a second masked input, ack or unmasking.
- ``model``: another model than the one it trained on. ``session``: a message of another session.
- ``roster``, ``sender``, ``signature``: a key or message that the roster does not bear out.
- ``own-entry``: a list in which its own message is absent or changed.
- ``smallest-cohort``: fewer sites than the smallest cohort or the threshold, at any step.
- ``accepted-set``: an accepted set with a site outside the cohort, one that grows, or without this site.
- ``overlap``: a site both accepted and left out. ``quorum``: too few signatures on the set it agreed to.
- ``beacon``: a beacon number that was not committed. ``input``: a kept input that was changed.

The caller stores the new state and marks before the answer leaves (``fedvision_sites.vault``).
"""

import os
from collections.abc import Sequence
from dataclasses import replace

from fedvision.errors import MessageError, ProtocolError
from fedvision.secagg import holding, schedule, shamir
from fedvision.secagg.codec import encode
from fedvision.secagg.masking import MaskVector, add_masks
from fedvision.secagg.member import (
    SiteMember,
    box_leaf,
    expect_phase,
    move,
    require_ascending,
    require_enough,
    require_session,
    seed_hash,
    vector_digest,
)
from fedvision.secagg.merkle import merkle_root, path_fits
from fedvision.secagg.messages import (
    Accepted,
    Ack,
    AckRoll,
    AckUpload,
    Box,
    Cohort,
    Complaint,
    Masked,
    MaskKey,
    Offer,
    Ready,
    ReadyUpload,
    Reveal,
    SeedShare,
    Session,
    Unmask,
)
from fedvision.secagg.schedule import read_server, read_signed
from fedvision.secagg.site_state import Marks, Phase, SiteSession, mapping, pairs


def begin(
    member: SiteMember, marks: Marks, offer_bytes: bytes, model: bytes, vector: MaskVector
) -> tuple[Marks, SiteSession, bytes]:
    """Answer an offer once the input is there (Bonawitz et al. 2017, fig. 4, round 1).

    Args:
        member: This site.
        marks: Its high-water marks.
        offer_bytes: The server's signed offer.
        model: SHA-256 of the model that the input was made from.
        vector: The encoded input, uint32.

    Returns:
        New marks, the state of the session, and the encoded ``ReadyUpload``.

    Raises:
        ProtocolError: See the module's rules.
        MessageError: The offer is malformed.
    """
    consortium, charter = member.consortium, member.consortium.charter
    offer = read_server(consortium, offer_bytes, Offer)
    session = offer.session
    if not (1 <= session.round <= charter.rounds and 1 <= session.attempt <= charter.max_attempts):
        raise ProtocolError("session", f"{session}: the charter has {charter.rounds} rounds")
    first = session.purpose == "train" and session.round == 1
    if offer.model != model or (first and model.hex() != charter.initial_weights):
        raise ProtocolError("model", f"{session}: the model is not the one that was offered")
    marks = marks.begun(session)
    nonce, seed, beacon = os.urandom(32), os.urandom(32), os.urandom(32)
    shares = shamir.split(seed, charter.threshold, charter.sites)
    context = schedule.session_bytes(session)
    boxes = []
    for peer in charter.sites:
        sealed = b""
        if peer != member.number:
            pair = member.pair_keys[peer]
            sealed = schedule.seal(pair, "share", context, nonce, member.number, peer, shares[peer])
        boxes.append(Box(peer, schedule.share_hash(member.number, peer, shares[peer]), sealed))
    root = merkle_root([box_leaf(box) for box in boxes])
    ready = member.sign(Ready(session, model, nonce, seed_hash(seed), seed_hash(beacon), root))
    state = SiteSession(
        step=marks.step,
        session=session,
        phase="ready",
        model=model,
        ready=ready,
        nonce=nonce,
        seed=seed,
        beacon=beacon,
        own_share=shares[member.number],
        input_digest=bytes(32) if consortium.level(session.purpose) == "sum" else vector_digest(vector),
    )
    return marks, state, encode(ReadyUpload(ready, tuple(boxes)))


def mask(
    member: SiteMember,
    marks: Marks,
    state: SiteSession,
    cohort_bytes: bytes,
    vector: MaskVector,
    threads: int = 1,
) -> tuple[Marks, SiteSession, bytes, MaskVector | None]:
    """Mask the input for exactly the cohort that was shown (Bonawitz et al. 2017, fig. 4, round 2).

    ``vector`` becomes the masked input in place:
    ``y_i = q_i + PRG(self) + sum_{j>i} PRG(k_ij) - sum_{j<i} PRG(k_ij)``.

    Returns:
        New marks, new state, the signed ``Masked`` or ``Complaint``, and the masked input (None with a
        complaint, after which this site is out of the session).

    Raises:
        ProtocolError: See the module's rules.
        MessageError: The message is malformed.
    """
    expect_phase(state, "ready")
    cohort = read_server(member.consortium, cohort_bytes, Cohort)
    if cohort.session != state.session:
        raise ProtocolError("session", f"{state.session}: the cohort is of another session")
    readies = read_cohort(member, state, cohort)
    shares = {member.number: state.own_share}
    for entry in cohort.entries:
        dealer = entry.ready.sender
        if dealer == member.number:
            continue
        try:
            shares[dealer] = open_box(
                member.pair_keys[dealer], state.session, readies[dealer], dealer, member.number, entry.box
            )
        except MessageError:
            marks, state = move(marks, state, "over")
            complaint = Complaint(state.session, dealer, member.secrets[dealer])
            return marks, state, encode(member.sign(complaint)), None
    ordered = [entry.ready for entry in cohort.entries]
    tau = schedule.make_tau(member.consortium, state.session, state.model, ordered)
    _add_own_masks(member, state.seed, tau, list(readies), vector, threads)
    digest = vector_digest(vector)
    marks, state = move(
        marks,
        state,
        "masked",
        tau=tau,
        cohort=pairs({number: ready.beacon_hash for number, ready in readies.items()}),
        nonces=pairs({number: ready.nonce for number, ready in readies.items()}),
        seed_shares=pairs(shares),
        masked=pairs({member.number: digest}),
    )
    return marks, state, encode(member.sign(Masked(tau, digest))), vector


def _add_own_masks(
    member: SiteMember, seed: bytes, tau: bytes, cohort: Sequence[int], vector: MaskVector, threads: int
) -> None:
    """Add a site's own mask and those of its pairs, in place."""
    keys, signs = member.mask_keys([number for number in cohort if number != member.number], tau)
    add_masks(vector, [schedule.self_key(seed, tau), *keys], [1, *signs], threads)


def mask_again(member: SiteMember, state: SiteSession, vector: MaskVector, threads: int = 1) -> MaskVector:
    """Return the masked input of a session once more; ``vector`` becomes it in place.

    Guarantee: it is the one that was signed, byte for byte, or nothing is returned. The masks are a function
    of the session's seed, tau and pair keys, and the same masks on the same input are the same bytes.

    Raises:
        ProtocolError: The input is not the one that was masked before.
    """
    expect_phase(state, "masked")
    _add_own_masks(member, state.seed, state.tau, list(mapping(state.cohort)), vector, threads)
    if vector_digest(vector) != mapping(state.masked)[member.number]:
        raise ProtocolError("input", f"{state.session}: the stored input is not the one that was masked")
    return vector


def read_cohort(member: SiteMember, state: SiteSession, cohort: Cohort) -> dict[int, Ready]:
    """Return the cohort's ready messages by site after all checks of list, signatures and Merkle paths."""
    charter = member.consortium.charter
    require_ascending([entry.ready.sender for entry in cohort.entries], charter.sites, member.number)
    require_enough(member, len(cohort.entries))
    index, count = charter.sites.index(member.number), len(charter.sites)
    readies = {}
    for entry in cohort.entries:
        ready = read_signed(member.consortium, entry.ready, Ready)
        if ready.session != state.session or ready.model != state.model:
            raise ProtocolError("session", f"{state.session}: a ready message is of another session or model")
        if entry.ready.sender == member.number and entry.ready.body != state.ready.body:
            raise ProtocolError("own-entry", f"{state.session}: the site's own ready message was changed")
        fits = path_fits(ready.boxes_root, box_leaf(entry.box), index, count, entry.path)
        if entry.box.receiver != member.number or not fits:
            raise ProtocolError("box", f"{state.session}: a box is not the one that its dealer signed")
        readies[entry.ready.sender] = ready
    return readies


def open_box(pair: bytes, session: Session, ready: Ready, dealer: int, receiver: int, box: Box) -> bytes:
    """Return the share in a box.

    Args:
        pair: K_ij of dealer and receiver.
        session: The session.
        ready: The dealer's ready message.
        dealer: Who sealed the box.
        receiver: Whom it is for.
        box: The box.

    Raises:
        MessageError: It does not open, or is not the share that the dealer committed to.
    """
    context = schedule.session_bytes(session)
    share = schedule.unseal(pair, "share", context, ready.nonce, dealer, receiver, box.sealed)
    if len(share) != 32 or schedule.share_hash(dealer, receiver, share) != box.share_hash:
        raise MessageError("a share is not the one that was committed")
    return share


def acknowledge(
    member: SiteMember, marks: Marks, state: SiteSession, accepted_bytes: bytes
) -> tuple[Marks, SiteSession, bytes]:
    """Agree to an accepted set; reveal the mask keys towards the others of the cohort, and nothing else.

    At level ``sketch`` it may be asked again for a strictly smaller set, when a site of the set has vanished.
    At level ``gram`` two sets would open the difference of two sums of sketches.
    """
    level = member.consortium.level(state.session.purpose)
    last: dict[str, Phase] = {"sum": "masked", "sketch": "sketched", "gram": "held"}
    again: tuple[Phase, ...] = ("acked",) if level == "sketch" else ()
    expect_phase(state, last[level], *again)
    accepted = read_server(member.consortium, accepted_bytes, Accepted)
    require_session(state, accepted.tau)
    cohort, known = set(mapping(state.cohort)), mapping(state.masked)
    digests = {entry.site: entry.digest for entry in accepted.entries}
    inside, outside = set(digests), {item.site for item in accepted.excluded}
    if inside & outside:
        raise ProtocolError("overlap", f"{state.session}: a site is both accepted and left out")
    if inside | outside != cohort or len(inside) != len(accepted.entries):
        raise ProtocolError("accepted-set", f"{state.session}: accepted and left out are not the cohort")
    if list(digests) != sorted(digests) or member.number not in inside:
        raise ProtocolError(
            "accepted-set", f"{state.session}: the set is not ascending or leaves this site out"
        )
    allowed = {"sum": cohort, "sketch": set(known), "gram": {item.dealer for item in state.held}}[level]
    if not inside <= allowed or any(known.get(i, digests[i]) != digests[i] for i in inside):
        raise ProtocolError("accepted-set", f"{state.session}: the set names an input that was not committed")
    if state.phase == "acked" and not inside < set(mapping(state.accepted)):
        raise ProtocolError(
            "accepted-set", f"{state.session}: a second accepted set must be strictly smaller"
        )
    require_enough(member, len(inside))
    root = schedule.accepted_root(accepted.entries)
    peers = sorted(outside)
    keys, _ = member.mask_keys(peers, state.tau)
    reveal = Reveal(state.tau, tuple(map(MaskKey, peers, keys)))
    marks, state = move(marks, state, "acked", accepted=pairs(digests), root=root)
    upload = AckUpload(member.sign(Ack(state.tau, root)), member.sign(reveal))
    return marks, state, encode(upload)


def hear(member: SiteMember, state: SiteSession, accepted_bytes: bytes) -> Accepted:
    """Return the ``Accepted`` message that leaves this site out, of the session that it is in.

    Raises:
        ProtocolError, MessageError: It is not the server's, of another session, or does not leave it out.
    """
    accepted = read_server(member.consortium, accepted_bytes, Accepted)
    require_session(state, accepted.tau)
    if member.number not in {item.site for item in accepted.excluded}:
        raise ProtocolError("accepted-set", f"{state.session}: this site is not left out")
    return accepted


def unmask(
    member: SiteMember, marks: Marks, state: SiteSession, roll_bytes: bytes
) -> tuple[Marks, SiteSession, bytes]:
    """Reveal the shares of the accepted sites' seeds, once, on enough signatures (Bonawitz et al. 2017,
    fig. 4, rounds 3 and 4)."""
    expect_phase(state, "acked")
    roll = read_server(member.consortium, roll_bytes, AckRoll)
    require_session(state, roll.tau)
    inside = mapping(state.accepted)
    senders = [entry.sender for entry in roll.entries]
    if list(senders) != sorted(set(senders)) or not set(senders) <= set(inside):
        raise ProtocolError("quorum", f"{state.session}: a signature is of a site outside the accepted set")
    for entry in roll.entries:
        ack = read_signed(member.consortium, entry, Ack)
        if ack.tau != state.tau or ack.root != state.root:
            raise ProtocolError("quorum", f"{state.session}: a signature is on another accepted set")
    if len(senders) < member.consortium.charter.threshold:
        raise ProtocolError(
            "quorum",
            f"{state.session}: {len(senders)} signatures, "
            f"the threshold is {member.consortium.charter.threshold}",
        )
    marks = marks.unmasking(state.session)
    sum_share = holding.add_held(state.held, inside)
    state = replace(state, step=marks.step, phase="unmasked", held=())
    held = mapping(state.seed_shares)
    shares = tuple(SeedShare(number, held[number]) for number in inside)
    return marks, state, encode(member.sign(Unmask(state.tau, shares, sum_share)))
