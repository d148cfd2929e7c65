"""The messages of one masked sum, as they are signed and sent. ``server`` is sender 0, sites are 1..255.

    enrol once a job   site -> all     Enrolment     a fresh X25519 public key for each other site
    1 offer            server -> site  Offer         the model's hash, round and attempt
      ready            site -> server  ReadyUpload   nonce, commitments, sealed shares of the self-mask seed
    2 cohort           server -> site  Cohort        all ready messages, and the boxes for this site
      masked           site -> server  Masked        hash of the masked input (the input beside it)
                       or              Complaint     a box does not open; the pair's key proves it
    3 masked roll      server -> site  MaskedRoll    all hashes of masked inputs        (sketch and gram)
      beacon           site -> server  Beacon        its random number, bound to the roll
    4 beacon roll      server -> site  BeaconRoll    all random numbers                 (sketch and gram)
      sketch           site -> server  Sketch        the sketch of its input, in the clear or in shares
    5 holding          server -> site  Holding       the shares dealt to this site              (gram)
      products         site -> server  Products      its shares of all inner products
    6 accepted         server -> site  Accepted      whose inputs are added, and why others are not
      ack              site -> server  AckUpload     signature on that set; mask keys of those left out
    7 acks             server -> site  AckRoll       enough signatures on one set
      unmask           site -> server  Unmask        its shares of the self-mask seeds of the accepted
    - dispute          server -> site  Dispute       the sum does not fit the sketches
      report           site -> server  Report        sketches of its pair masks
      open             server -> site  OpenPair      two reports that contradict each other
      opening          site -> server  Opening       the disputed pair's secret key

Every message travels as ``Signed``: the signature covers the charter, the sender and the whole message.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fedvision.secagg.codec import U8, U16, U32, AtMost, Bytes32, Bytes64, message

MAX_SITES = 255
SERVER = 0
Purpose = Literal["train", "validate", "test"]
Reason = Literal[
    "no masked input",
    "no beacon",
    "no sketch",
    "norm above the bound",
    "no shares",
    "vanished",
    "by the rules",
]
SKETCH_BYTES = 2048 * 4
SHARE_BYTES = 2048 * 8
MAX_PAIRS = MAX_SITES * (MAX_SITES + 1) // 2
Many = AtMost(MAX_SITES)


@message(1)
@dataclass(frozen=True)
class Signed:
    """An encoded message with its sender's Ed25519 signature."""

    sender: U8
    body: Annotated[bytes, AtMost(1 << 28)] = field(repr=False)
    signature: Bytes64 = field(repr=False)


@dataclass(frozen=True)
class Session:
    """Which sum: what for, in which round, at which attempt (from 1)."""

    purpose: Purpose
    round: U32
    attempt: U16

    def __str__(self) -> str:
        return f"{self.purpose} round {self.round} attempt {self.attempt}"


@dataclass(frozen=True)
class PairPublic:
    """The X25519 key that a site made for one peer."""

    peer: U8
    key: Bytes32


@message(2)
@dataclass(frozen=True)
class Enrolment:
    """A site's public keys for a job, one for each other enrolled site, by ascending number."""

    keys: Annotated[tuple[PairPublic, ...], Many]


@message(3)
@dataclass(frozen=True)
class EnrolmentRoll:
    """All enrolments of a job."""

    entries: Annotated[tuple[Signed, ...], Many]


@message(4)
@dataclass(frozen=True)
class Offer:
    """The server opens a session on a model."""

    session: Session
    model: Bytes32


@dataclass(frozen=True)
class Box:
    """One share of a site's self-mask seed, sealed to ``receiver``; no bytes for the site's own share."""

    receiver: U8
    share_hash: Bytes32
    sealed: Annotated[bytes, AtMost(48)]


@message(5)
@dataclass(frozen=True)
class Ready:
    """A site has an input and commits to its self-mask seed, its beacon number and its boxes."""

    session: Session
    model: Bytes32
    nonce: Bytes32
    seed_hash: Bytes32
    beacon_hash: Bytes32
    boxes_root: Bytes32


@message(6)
@dataclass(frozen=True)
class ReadyUpload:
    """A ready message with its boxes, by ascending receiver."""

    ready: Signed
    boxes: Annotated[tuple[Box, ...], Many]


@dataclass(frozen=True)
class CohortEntry:
    """One site's ready message, and the box for the site that this is sent to, with its Merkle path."""

    ready: Signed
    box: Box
    path: Annotated[tuple[Bytes32, ...], AtMost(8)]


@message(7)
@dataclass(frozen=True)
class Cohort:
    """The sites whose masks are woven together, by ascending number."""

    session: Session
    entries: Annotated[tuple[CohortEntry, ...], Many]


@message(8)
@dataclass(frozen=True)
class Masked:
    """The SHA-256 of a masked input, little-endian uint32."""

    tau: Bytes32
    digest: Bytes32


@message(9)
@dataclass(frozen=True)
class Complaint:
    """A box of ``accused`` does not open or holds another share than committed; ``secret`` proves it."""

    session: Session
    accused: U8
    secret: Bytes32 = field(repr=False)


@message(10)
@dataclass(frozen=True)
class MaskedRoll:
    """All signed hashes of masked inputs, by ascending sender."""

    tau: Bytes32
    entries: Annotated[tuple[Signed, ...], Many]


@message(11)
@dataclass(frozen=True)
class Beacon:
    """A site's beacon number, revealed after all inputs are committed by ``root``."""

    tau: Bytes32
    root: Bytes32
    number: Bytes32


@message(12)
@dataclass(frozen=True)
class BeaconRoll:
    """All signed beacon numbers, by ascending sender."""

    tau: Bytes32
    entries: Annotated[tuple[Signed, ...], Many]


@dataclass(frozen=True)
class SealedShare:
    """One holder's shares of a rounded sketch (and of zeros), sealed."""

    receiver: U8
    share_hash: Bytes32
    sealed: Annotated[bytes, AtMost(SHARE_BYTES + MAX_PAIRS * 8 + 24)] = field(repr=False)


@message(13)
@dataclass(frozen=True)
class Sketch:
    """The sketch of a site's input: in the clear, or only the commitment to how its shares were dealt."""

    tau: Bytes32
    beta: Bytes32
    values: Annotated[bytes, AtMost(SKETCH_BYTES)] = field(repr=False)
    deal_hash: Bytes32
    shares_root: Bytes32


@message(14)
@dataclass(frozen=True)
class SketchUpload:
    """A sketch message with the sealed shares, none at level ``sketch``."""

    sketch: Signed
    shares: Annotated[tuple[SealedShare, ...], Many]


@dataclass(frozen=True)
class HoldingEntry:
    """One dealer's sketch message, and its sealed share for the holder, with its Merkle path."""

    sketch: Signed
    share: SealedShare
    path: Annotated[tuple[Bytes32, ...], AtMost(8)]


@message(15)
@dataclass(frozen=True)
class Holding:
    """What all dealers gave to one holder, by ascending dealer.

    ``challenge`` draws the combination of the zeros that shows whether they are zeros. ``root`` is the sketch
    of the root set's update, rounded like a site's, little-endian int32; empty without a root set.
    """

    tau: Bytes32
    challenge: Bytes32
    root: Annotated[bytes, AtMost(SKETCH_BYTES)] = field(repr=False)
    entries: Annotated[tuple[HoldingEntry, ...], Many]


@message(16)
@dataclass(frozen=True)
class Products:
    """A holder's shares of the inner products of all pairs of ``dealers``, upper triangle by rows, and of
    one drawn combination of each dealer's zeros; and of each dealer's inner product with the root set's
    sketch, if there is one. ``basis`` binds the dealings, the challenge and that sketch."""

    tau: Bytes32
    basis: Bytes32
    dealers: Annotated[bytes, Many]
    values: Annotated[bytes, AtMost(MAX_PAIRS * 8)] = field(repr=False)
    zeros: Annotated[bytes, AtMost(MAX_SITES * 8)] = field(repr=False)
    root: Annotated[bytes, AtMost(MAX_SITES * 8)] = field(repr=False)


@dataclass(frozen=True)
class AcceptedEntry:
    """A site whose masked input is added."""

    site: U8
    digest: Bytes32


@dataclass(frozen=True)
class Exclusion:
    """A site of the cohort whose input is not added, and why."""

    site: U8
    reason: Reason


@message(17)
@dataclass(frozen=True)
class Accepted:
    """The accepted set, by ascending number, and the others of the cohort.

    ``judgement`` says what the charter's rules found about each site, with their numbers, as
    ``defence.judge.Judgement`` writes it; empty where they were not applied.
    """

    tau: Bytes32
    entries: Annotated[tuple[AcceptedEntry, ...], Many]
    excluded: Annotated[tuple[Exclusion, ...], Many]
    judgement: Annotated[bytes, AtMost(1 << 19)] = field(repr=False)


@message(18)
@dataclass(frozen=True)
class Ack:
    """A site agrees to the accepted set of this Merkle root."""

    tau: Bytes32
    root: Bytes32


@dataclass(frozen=True)
class MaskKey:
    """The mask key of this round between the sender and ``site``."""

    site: U8
    key: Bytes32 = field(repr=False)


@message(19)
@dataclass(frozen=True)
class Reveal:
    """The mask keys towards the sites left out."""

    tau: Bytes32
    keys: Annotated[tuple[MaskKey, ...], Many]


@message(20)
@dataclass(frozen=True)
class AckUpload:
    """An ack and what comes with it."""

    ack: Signed
    reveal: Signed


@message(21)
@dataclass(frozen=True)
class AckRoll:
    """Signatures on one accepted set, by ascending sender."""

    tau: Bytes32
    entries: Annotated[tuple[Signed, ...], Many]


@dataclass(frozen=True)
class SeedShare:
    """A share of the self-mask seed of ``site``."""

    site: U8
    share: Bytes32 = field(repr=False)


@message(22)
@dataclass(frozen=True)
class Unmask:
    """A site's shares of the seeds of all accepted sites, by ascending number, and at level ``gram`` its
    share of the sum of their rounded sketches."""

    tau: Bytes32
    shares: Annotated[tuple[SeedShare, ...], Many]
    sum_share: Annotated[bytes, AtMost(SHARE_BYTES)] = field(repr=False)


@message(23)
@dataclass(frozen=True)
class Dispute:
    """The round is thrown away; the server asks for reports."""

    tau: Bytes32
    beta: Bytes32


@dataclass(frozen=True)
class PairSketch:
    """The sketch of the mask between the sender and ``site``."""

    site: U8
    values: Annotated[bytes, AtMost(SKETCH_BYTES)] = field(repr=False)


@message(24)
@dataclass(frozen=True)
class Report:
    """Sketches of a site's input and of its pair masks in the cohort; the seed of its dealing at ``gram``."""

    tau: Bytes32
    beta: Bytes32
    own: Annotated[bytes, AtMost(SKETCH_BYTES)] = field(repr=False)
    pairs: Annotated[tuple[PairSketch, ...], Many]
    deal_seed: Annotated[bytes, AtMost(32)] = field(repr=False)


@message(25)
@dataclass(frozen=True)
class OpenPair:
    """The other site's signed report, which contradicts the receiver's."""

    tau: Bytes32
    report: Signed


@message(26)
@dataclass(frozen=True)
class Opening:
    """The X25519 secret key that the sender made for ``peer``."""

    tau: Bytes32
    peer: U8
    secret: Bytes32 = field(repr=False)


@message(27)
@dataclass(frozen=True)
class Result:
    """What the server made of a session: the sum of the accepted inputs, by its SHA-256."""

    session: Session
    tau: Bytes32
    model: Bytes32
    accepted_root: Bytes32
    sum_digest: Bytes32


@message(28)
@dataclass(frozen=True)
class Documents:
    """The signed roster and charter of a job, as their files hold them."""

    roster: Annotated[bytes, AtMost(1 << 20)]
    charter: Annotated[bytes, AtMost(1 << 20)]


@message(29)
@dataclass(frozen=True)
class Transcript:
    """A finished session: what its parties signed.

    Attributes:
        offer, accepted, result: Of the server.
        readies, masked, beacons, sketches, acks: Of the sites, by ascending number; the beacons and sketches
            are empty at level ``sum``, and the sketches hold no values at level ``gram``.
    """

    session: Session
    offer: Signed
    readies: Annotated[tuple[Signed, ...], Many]
    masked: Annotated[tuple[Signed, ...], Many]
    beacons: Annotated[tuple[Signed, ...], Many]
    sketches: Annotated[tuple[Signed, ...], Many]
    accepted: Signed
    acks: Annotated[tuple[Signed, ...], Many]
    result: Signed


Rule = Literal[
    "box",
    "share",
    "seed",
    "norm",
    "sketch",
    "mask-key",
    "row",
    "pair",
    "not opened",
    "silent",
    "deal",
    "products",
]


@message(30)
@dataclass(frozen=True)
class Evidence:
    """A lie that its author signed.

    Attributes:
        site: Who lied.
        rule: Which rule was broken.
        messages: The signed messages that prove it, in the order of the protocol.
    """

    site: U8
    rule: Rule
    messages: Annotated[tuple[Signed, ...], AtMost(1024)] = field(repr=False)
