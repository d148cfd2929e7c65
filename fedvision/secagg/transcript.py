"""The signed record of a session, and everything about it that can be checked again afterwards.

What a transcript proves: each listed site, with the key of the roster, signed exactly one masked input for
exactly this charter, model, round and cohort; enough sites agreed to the accepted set; the sum is the one
that the server signed; and at level ``sketch`` it is the sum that the sites' own sketches add up to.
What it cannot prove: that an input was made from patients' images by honest training, that a site which is
not listed was really absent, and at level ``sum`` that the server added the masked inputs it received.
"""

from dataclasses import dataclass

import numpy as np

from fedvision.errors import ProtocolError
from fedvision.secagg import schedule
from fedvision.secagg.attempt import MaskedSum
from fedvision.secagg.masking import MaskVector
from fedvision.secagg.member import seed_hash, vector_digest
from fedvision.secagg.messages import (
    SERVER,
    Accepted,
    Ack,
    Beacon,
    Masked,
    Offer,
    Ready,
    Result,
    Signed,
    Sketch,
    Transcript,
)
from fedvision.secagg.schedule import Consortium, read_signed
from fedvision.secagg.server import SumRound
from fedvision.secagg.sketch import sketch


def make_transcript(attempt: SumRound, outcome: MaskedSum) -> Transcript:
    """Return the transcript of a finished attempt, with the server's signature on the result."""
    views = attempt.views
    root = schedule.accepted_root(attempt.accepted)
    attempt.say(Result(attempt.session, attempt.tau, attempt.model, root, vector_digest(outcome.total)))
    said = attempt.said

    def ordered(messages: dict[int, Signed]) -> tuple[Signed, ...]:
        return tuple(messages[site] for site in sorted(messages))

    return Transcript(
        attempt.session,
        said["Offer"],
        ordered(views.ready),
        ordered(views.masked),
        ordered(views.beacons),
        ordered(views.sketches),
        said["Accepted"],
        ordered(views.acks),
        said["Result"],
    )


@dataclass(frozen=True)
class Checked:
    """What a transcript proves.

    Attributes:
        model: SHA-256 of the model that the inputs were made from.
        level: The level that ran.
        cohort: Sites whose masks were woven together.
        accepted: Sites whose inputs were added.
        num_signatures: How many signatures were verified.
        has_sum: Whether the sum itself was at hand and has the signed hash.
        sketch_fits: Whether the sum fits the sketches; None where that cannot be checked.
    """

    model: bytes
    level: str
    cohort: tuple[int, ...]
    accepted: tuple[int, ...]
    num_signatures: int
    has_sum: bool
    sketch_fits: bool | None


def check_transcript(consortium: Consortium, transcript: Transcript, total: MaskVector | None) -> Checked:
    """Verify every signature, Merkle root and hash of a session again.

    Args:
        consortium: Roster and charter, verified.
        transcript: What was kept.
        total: The sum, uint32; None where it was not kept.

    Raises:
        ProtocolError: The first thing that does not hold, with its rule.
        MessageError: A message is malformed.
    """
    session = transcript.session
    offer = read_signed(consortium, transcript.offer, Offer, SERVER)
    readies = {entry.sender: read_signed(consortium, entry, Ready) for entry in transcript.readies}
    _require(offer.session == session, "session", f"{session}: the offer is of another session")
    _require(list(readies) == sorted(readies), "roster", f"{session}: the cohort is not ascending")
    for site, ready in readies.items():
        same = ready.session == session and ready.model == offer.model
        _require(same, "session", f"{session}: site number {site} was ready for another session or model")
    tau = schedule.make_tau(consortium, session, offer.model, transcript.readies)
    digests = {}
    for entry in transcript.masked:
        masked = read_signed(consortium, entry, Masked)
        _require(masked.tau == tau, "session", f"{session}: a masked input is of another session or cohort")
        digests[entry.sender] = masked.digest
    _require(set(digests) <= set(readies), "roster", f"{session}: a masked input from outside the cohort")
    accepted = read_signed(consortium, transcript.accepted, Accepted, SERVER)
    inside = {entry.site: entry.digest for entry in accepted.entries}
    known = all(digests.get(site) == digest for site, digest in inside.items())
    _require(known and accepted.tau == tau, "accepted-set", f"{session}: an accepted input was not signed")
    _require(
        len(inside) >= consortium.quorum, "smallest-cohort", f"{session}: {len(inside)} sites are too few"
    )
    root = schedule.accepted_root(accepted.entries)
    for entry in transcript.acks:
        ack = read_signed(consortium, entry, Ack)
        agrees = ack.tau == tau and ack.root == root and entry.sender in inside
        _require(agrees, "quorum", f"{session}: a signature is on another accepted set")
    signers = {entry.sender for entry in transcript.acks}
    enough = len(signers) >= consortium.charter.threshold and len(signers) == len(transcript.acks)
    _require(enough, "quorum", f"{session}: {len(signers)} sites agreed, too few")
    result = read_signed(consortium, transcript.result, Result, SERVER)
    same = (result.session, result.tau, result.model, result.accepted_root) == (
        session, tau, offer.model, root,
    )  # fmt: skip
    _require(same, "result", f"{session}: the result is of another session or accepted set")
    if total is not None:
        fits = vector_digest(total) == result.sum_digest
        _require(fits, "sum", f"{session}: the stored sum does not have the signed hash")
    sketch_fits = _check_sketches(consortium, transcript, tau, set(inside), total)
    signed = (transcript.readies, transcript.masked, transcript.beacons, transcript.sketches, transcript.acks)
    return Checked(
        offer.model,
        consortium.level(session.purpose),
        tuple(readies),
        tuple(inside),
        3 + sum(map(len, signed)),
        total is not None,
        sketch_fits,
    )


def _check_sketches(
    consortium: Consortium, transcript: Transcript, tau: bytes, inside: set[int], total: MaskVector | None
) -> bool | None:
    """Check the beacon and that the accepted sketches add up to the sketch of the sum."""
    session, level = transcript.session, consortium.level(transcript.session.purpose)
    if level == "sum":
        _require(not transcript.beacons and not transcript.sketches, "phase", f"{session}: has no sketch")
        return None
    commitments = {
        entry.sender: read_signed(consortium, entry, Ready).beacon_hash for entry in transcript.readies
    }
    digests = {entry.sender: read_signed(consortium, entry, Masked).digest for entry in transcript.masked}
    root, numbers = schedule.masked_root(digests), {}
    for entry in transcript.beacons:
        beacon = read_signed(consortium, entry, Beacon)
        fits = seed_hash(beacon.number) == commitments.get(entry.sender)
        _require(
            fits and beacon.root == root and beacon.tau == tau, "beacon", f"{session}: a beacon is wrong"
        )
        numbers[entry.sender] = beacon.number
    beta = schedule.make_beta(tau, root, numbers)
    claimed, seen = np.zeros(2048, np.uint32), set()
    for entry in transcript.sketches:
        sent = read_signed(consortium, entry, Sketch)
        _require(sent.tau == tau and sent.beta == beta, "beacon", f"{session}: a sketch is of another map")
        if entry.sender in inside and sent.values:
            claimed += np.frombuffer(sent.values, "<u4").astype(np.uint32)
            seen.add(entry.sender)
    if level != "sketch" or total is None:
        return None
    _require(seen == inside, "sketch", f"{session}: an accepted site sent no sketch")
    fits = bool(np.array_equal(sketch(total, beta), claimed))
    _require(fits, "sketch", f"{session}: the sum is not the sum of the accepted sketches")
    return True


def _require(holds: bool, rule: str, text: str) -> None:
    if not holds:
        raise ProtocolError(rule, text)
