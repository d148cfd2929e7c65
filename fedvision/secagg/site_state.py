"""What a site keeps of a session between messages, and the marks that only move forward.

Both are encoded like messages, so that a damaged file is noticed. Who stores them, and the rule that they
are on disk before an answer leaves, is ``fedvision_sites.vault``'s business.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from fedvision.errors import ProtocolError
from fedvision.secagg.codec import U8, U16, U32, AtMost, Bytes32, message
from fedvision.secagg.messages import MAX_SITES, PairPublic, Purpose, Session, Signed

Phase = Literal["ready", "masked", "beacon", "sketched", "held", "acked", "unmasked", "reported", "over"]
Many = AtMost(MAX_SITES)
Digests = Annotated[tuple[PairPublic, ...], Many]


@message(200)
@dataclass(frozen=True)
class SiteSession:
    """A site's side of one session. Fields that are not known yet are empty.

    Attributes:
        step: The mark at which it was stored; an older one is of a restored folder and is not used.
        phase: What was answered last.
        ready: The site's own ready message.
        nonce, seed, beacon, own_share: Its secrets: nonce, b_i, r_i, and its own share of b_i.
        tau: Names the session once the cohort is known.
        input_digest: SHA-256 of the encoded input, which lies in a file beside, so that masked input and
            sketch are of the same; zeros at level ``sum``.
        cohort: Site and committed beacon hash of every site of the cohort.
        nonces: Site and nonce of every site of the cohort.
        seed_shares: Site and share of its b_j, for every other site of the cohort.
        masked: Site and hash of its masked input, as far as known: the own one, later the roll's.
        beta, deal_seed: The sketch's seed, and that of its dealing at level ``gram``.
        held: The shares of the dealers' rounded sketches at level ``gram``.
        accepted: Site and hash of the accepted set that was acknowledged last.
        root: Its Merkle root.
    """

    step: U32
    session: Session
    phase: Phase
    model: Bytes32
    ready: Signed
    nonce: Bytes32 = field(repr=False)
    seed: Bytes32 = field(repr=False)
    beacon: Bytes32 = field(repr=False)
    own_share: Bytes32 = field(repr=False)
    input_digest: Bytes32 = field(repr=False)
    tau: Annotated[bytes, AtMost(32)] = b""
    cohort: Digests = ()
    nonces: Digests = ()
    seed_shares: Digests = field(default=(), repr=False)
    masked: Digests = ()
    beta: Annotated[bytes, AtMost(32)] = b""
    deal_seed: Annotated[bytes, AtMost(32)] = field(default=b"", repr=False)
    held: Annotated[tuple["HeldShare", ...], Many] = field(default=(), repr=False)
    accepted: Digests = ()
    root: Annotated[bytes, AtMost(32)] = b""


@dataclass(frozen=True)
class HeldShare:
    """The share of a dealer's rounded sketch that this site holds, packed uint64."""

    dealer: U8
    share: Annotated[bytes, AtMost(2048 * 8)] = field(repr=False)


def pairs(items: Mapping[int, bytes]) -> tuple[PairPublic, ...]:
    """Return a mapping from site to 32 bytes as a field of ``SiteSession``."""
    return tuple(PairPublic(site, items[site]) for site in sorted(items))


def mapping(items: tuple[PairPublic, ...]) -> dict[int, bytes]:
    """Return a field made by ``pairs`` as a mapping."""
    return {item.peer: item.key for item in items}


@dataclass(frozen=True)
class Mark:
    """How far a site went for one purpose: the last session it began, the last rounds it sketched and
    unmasked."""

    purpose: Purpose
    round: U32
    attempt: U16
    sketched: U32
    unmasked: U32


@message(201)
@dataclass(frozen=True)
class Marks:
    """The high-water marks of a job at a site.

    Attributes:
        step: Counts every answer.
        openings: Counts the disputes in which the site opened a sketch that was shared only.
        marks: How far it went.
        session: SHA-256 of what the site keeps of the session under way: no older state goes with the marks.
            Set by who stores them; empty before the first session.
    """

    step: U32
    openings: U16
    marks: Annotated[tuple[Mark, ...], AtMost(3)]
    session: Annotated[bytes, AtMost(32)] = b""

    def of(self, purpose: Purpose) -> Mark:
        """Return the mark of a purpose."""
        return next((m for m in self.marks if m.purpose == purpose), Mark(purpose, 0, 0, 0, 0))

    def _with(self, mark: Mark) -> "Marks":
        others = tuple(m for m in self.marks if m.purpose != mark.purpose)
        return replace(self, step=self.step + 1, marks=(*others, mark))

    def begun(self, session: Session) -> "Marks":
        """Return the marks after a session began.

        Raises:
            ProtocolError: This session, a later one, or the sketch or unmasking of its round came before.
        """
        mark = self.of(session.purpose)
        if session.round <= mark.sketched:
            raise ProtocolError("sketched", f"{session}: the input of this round was sketched before")
        if session.round <= mark.unmasked:
            raise ProtocolError("answered", f"{session}: this round was unmasked before")
        if (session.round, session.attempt) <= (mark.round, mark.attempt):
            raise ProtocolError("high-water", f"{session}: this session or a later one began before")
        return self._with(replace(mark, round=session.round, attempt=session.attempt))

    def sketching(self, session: Session) -> "Marks":
        """Return the marks after the sketch of a session left.

        Raises:
            ProtocolError: An input of the round was sketched before.
        """
        mark = self.of(session.purpose)
        if session.round <= mark.sketched:
            raise ProtocolError("sketched", f"{session}: the input of this round was sketched before")
        return self._with(replace(mark, sketched=session.round))

    def opening(self, limit: int) -> "Marks":
        """Return the marks after one more sketch was opened.

        Raises:
            ProtocolError: ``limit`` of them were opened before.
        """
        if self.openings >= limit:
            raise ProtocolError(
                "openings", f"this site opened {limit} sketches in this job, and opens no more"
            )
        return replace(self, step=self.step + 1, openings=self.openings + 1)

    def unmasking(self, session: Session) -> "Marks":
        """Return the marks after the shares of a session left.

        Raises:
            ProtocolError: The round was unmasked before.
        """
        mark = self.of(session.purpose)
        if session.round <= mark.unmasked:
            raise ProtocolError("answered", f"{session}: this round was unmasked before")
        return self._with(replace(mark, unmasked=session.round))

    def stepped(self) -> "Marks":
        """Return the marks after an answer that moves no other mark."""
        return replace(self, step=self.step + 1)
