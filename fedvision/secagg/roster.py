"""Roster and charter: who takes part, and by which rules; each counts only with governance's signature.

    roster    a federation's sites with number, name and Ed25519 key, and the server's key
    charter   one job of that federation: its model and weights by digest, who is enrolled, all parameters

Rules:
- What the protocol's guarantees rest on is checked here, so that no reader accepts a document that breaks it:
  threshold, scale, smallest cohort, one key a party.
- Who holds the governance key can add sites that do not exist, so it must not be the server's or a site's.
- A charter counts only beside the roster that it names by digest.
- A party that has seen a roster takes no earlier one of that federation: ``check_succession``.

How a signed document is written and read: ``fedvision.secagg.documents``.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, overload

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from fedvision.config import Name, PositiveInt, RuleName, Section
from fedvision.errors import ConfigError, MessageError, ProtocolError
from fedvision.secagg import documents
from fedvision.secagg.documents import Refused, canonical_json
from fedvision.secagg.identity import Identity, is_sound
from fedvision.storage import write_atomic

Kind = Literal["roster", "charter"]
Level = Literal["sum", "sketch", "gram"]
Release = Literal["split_presence", "validation_sums", "test_sums", "test_by_site", "judgements"]

MAX_SITES = 255
MIN_SITES = 3
NORM_SLACK = 1.16
SMALLEST_COHORT = 5
SMALLEST_SKETCHED = 10_000
"""Weights. Of fewer, some are alone in a bucket of a sketch of the update, and so known exactly."""
SUM_BITS = 30


def _sound_key(key: str) -> str:
    if not is_sound(bytes.fromhex(key)):
        raise ValueError("not a public key that a party can own")
    return key


Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Key = Annotated[Hex32, AfterValidator(_sound_key)]
SiteNumber = Annotated[int, Field(ge=1, le=MAX_SITES)]


def threshold_for(num_sites: int, max_colluding: int | None = None) -> int:
    """Return t, the least sites that must agree and answer: floor((n + m) / 2) + 1, and n for n = 3 and 4.

    Guarantee: ``2 * t > n + m``, so two different accepted sets cannot both be opened; no smaller t has it.

    Args:
        num_sites: n, the enrolled sites.
        max_colluding: m, from 0 to ``colluding_bound(n)``; None for that bound.

    Raises:
        ValueError: ``num_sites`` is not in 3..255, or ``max_colluding`` is more than the bound.
    """
    most = colluding_bound(num_sites)
    max_colluding = most if max_colluding is None else max_colluding
    if not 0 <= max_colluding <= most:
        raise ValueError(f"max_colluding must be in 0..{most}, got {max_colluding}")
    return num_sites if num_sites <= 4 else (num_sites + max_colluding) // 2 + 1


def colluding_bound(num_sites: int) -> int:
    """Return ceil(n/3) - 1: a charter's m, the most sites that may collude with the server, is at most that.

    Raises:
        ValueError: ``num_sites`` is not in 3..255.
    """
    _check_num_sites(num_sites)
    return -(-num_sites // 3) - 1


def level_for(setting: Level | Literal["auto"], num_sites: int, size: int) -> Level:
    """Return a job's level: its setting, or for ``auto`` sum below 5 sites, sketch below 10, then gram.

    Small models get sum: of ``size`` weights about ``4 size exp(-size / 512)`` stand alone in a bucket of a
    sketch, and are known exactly.

    Raises:
        ConfigError: A sketch is wanted of fewer than ``SMALLEST_SKETCHED`` weights.
    """
    if size < SMALLEST_SKETCHED:
        if setting in ("sketch", "gram"):
            raise ConfigError(
                f'level "{setting}" needs a model of {SMALLEST_SKETCHED} weights or more, this one has '
                f"{size}: the sketch of a small update tells single weights of it",
                'write secure_aggregation.level = "sum", or take a larger network',
            )
        return "sum"
    if setting != "auto":
        return setting
    return "sum" if num_sites < 5 else "sketch" if num_sites < 10 else "gram"


def scale_for(num_sites: int, noise: float = 0.0) -> int:
    """Return S = floor(2**30 / (n + 8 z)), the fixed-point scale: n inputs and their noise never wrap.

    Args:
        num_sites: n.
        noise: z, the standard deviation of all sites' noise together, in clip norms of an input.

    Raises:
        ValueError: ``num_sites`` is not in 3..255.
    """
    _check_num_sites(num_sites)
    return math.floor((1 << SUM_BITS) / (num_sites + 8 * noise))


def input_noise(noise_share: float, num_sites: int, patient_clip_norm: float, clip_norm: float) -> float:
    """Return z, the standard deviation of the noise of all sites together, in clip norms of an input.

    Args:
        noise_share: Of one site's noise, in ``patient_clip_norm``.
        num_sites: n.
        patient_clip_norm: Largest norm of what one patient adds.
        clip_norm: Largest norm of an input.
    """
    return noise_share * math.sqrt(num_sites) * patient_clip_norm / clip_norm


def _check_num_sites(num_sites: int) -> None:
    if not MIN_SITES <= num_sites <= MAX_SITES:
        raise ValueError(f"num_sites must be in {MIN_SITES}..{MAX_SITES}, got {num_sites}")


class Member(Section):
    """A site of a federation."""

    number: SiteNumber = Field(description="also its point in secret sharing; kept from roster to roster")
    name: Name = Field(description="short name of the site")
    key: Key = Field(description="Ed25519 identity key, hexadecimal")


class Roster(Section):
    """The sites of a federation and its server."""

    format: Literal[1] = Field(1, description="version of this file format")
    federation: Name = Field(description="short name of the federation")
    serial: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="1, 2, ... of a federation's rosters; absent, or 0, for one that is never replaced"
    )
    sites: tuple[Member, ...] = Field(
        min_length=1, max_length=MAX_SITES, description="its sites in the order of their numbers"
    )
    server: Key = Field(description="Ed25519 identity key of the server, hexadecimal")

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        numbers = [one.number for one in self.sites]
        if len(set(numbers)) != len(numbers):
            raise ValueError("two sites have the same number")
        if numbers != sorted(numbers):
            raise ValueError("sites must be in the order of their numbers")
        if len({one.name.casefold() for one in self.sites}) != len(numbers):
            raise ValueError("two sites have the same name (capitals make no difference)")
        if len({one.key for one in self.sites}) != len(numbers):
            raise ValueError("two sites have the same key")
        if self.server in {one.key for one in self.sites}:
            raise ValueError("the server's key is also a site's")
        return self

    @model_serializer(mode="wrap")
    def _spelled(self, content: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out a serial of 0, so that a roster without one has the spelling that it always had."""
        found: dict[str, Any] = content(self)
        if self.serial == 0:
            del found["serial"]
        return found

    def digest(self) -> bytes:
        """Return SHA-256("fedvision/roster/v1" | canonical JSON), 32 bytes."""
        return hashlib.sha256(b"fedvision/roster/v1" + canonical_json(self)).digest()

    def member(self, number: int) -> Member:
        """Return the site with this number.

        Raises:
            ConfigError: There is none.
        """
        for one in self.sites:
            if one.number == number:
                return one
        raise ConfigError(f"the roster of {self.federation} has no site number {number}")

    def number_of(self, name: str) -> int:
        """Return the number of the site with this name.

        Raises:
            ConfigError: There is none.
        """
        for one in self.sites:
            if one.name == name:
                return one.number
        raise ConfigError(
            f"the roster of {self.federation} has no site {ascii(name)[1:-1][:64]}",
            "governance adds a site: `fedvision keys sign`",
        )


class Charter(Section):
    """The rules of one job: what every site checks against its own job file and policy before it enrols."""

    format: Literal[2] = Field(2, description="version of this file format")
    federation: Name = Field(description="as in the roster")
    roster: Hex32 = Field(description="digest of the roster")
    job: Hex32 = Field(description="digest of the job")
    layout: Hex32 = Field(description="digest of the layout of the weights")
    size: PositiveInt = Field(description="coordinates of the update")
    initial_weights: Hex32 = Field(description="SHA-256 of the first global weights, little-endian float32")
    sites: tuple[SiteNumber, ...] = Field(
        min_length=MIN_SITES, max_length=MAX_SITES, description="numbers of the enrolled sites, ascending"
    )
    max_colluding: Annotated[int, Field(ge=0)] = Field(
        description="m: an update stays hidden from the server and up to so many sites that help it; at most "
        "ceil(n/3) - 1"
    )
    threshold: int = Field(
        description="how many sites must agree to a sum: floor((n + m) / 2) + 1 of n, n for 3 and 4"
    )
    smallest_cohort: Annotated[int, Field(ge=MIN_SITES, le=MAX_SITES)] = Field(
        SMALLEST_COHORT, description="least sites whose updates are added up"
    )
    smallest_cohort_waiver: bool = Field(
        False, description="a smallest cohort below 5 is meant: what a sum of so few hides is little"
    )
    rounds: Annotated[int, Field(ge=1, lt=2**32)] = Field(description="rounds of the job")
    max_attempts: Annotated[int, Field(ge=1, lt=2**16)] = Field(
        3, description="attempts at a sum, each with fresh masks"
    )
    level: Level = Field(
        description="what the server learns of a single update: nothing, a sketch, inner products"
    )
    clip_norm: Annotated[float, Field(gt=0)] = Field(description="largest L2 norm of an update")
    scale: PositiveInt = Field(description="fixed-point steps in a clip norm, floor(2**30 / n)")
    weight_cap: PositiveInt = Field(description="training cases from which a site's weight does not grow")
    metric_caps: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), description="upper bounds of the training metrics that are added up with the updates"
    )
    patient_clip_norm: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="largest L2 norm of what one patient adds to a site's input; 0 where nobody bounds it",
    )
    noise_multiplier: Annotated[float, Field(ge=0, le=1000)] = Field(
        0.0,
        description="standard deviation of the noise in any sum, without what colluding sites add to it, in "
        "`patient_clip_norm`; 0 for none",
    )
    norm_slack: Annotated[float, Field(ge=NORM_SLACK, le=NORM_SLACK)] = Field(
        NORM_SLACK, description="threshold on a sketched squared norm, in squared norm bounds"
    )
    rules: tuple[RuleName, ...] = Field(
        (), description="by which rules the server leaves out updates, beside the bound on their norm"
    )
    max_malicious: Annotated[float, Field(ge=0, le=0.45)] = Field(
        0.2, description="share of the sites that the rules take to attack together"
    )
    root_set: Hex32 | Literal[""] = Field(
        "", description="digest of the root set, whose update the rules may compare with; empty without one"
    )
    releases: tuple[Release, ...] = Field((), description="what else sites release, by name")
    statistics_size: Annotated[int, Field(ge=0)] = Field(
        0, description="numbers in a site's evaluation statistics"
    )
    resamples: Annotated[int, Field(ge=0)] = Field(0, description="bootstrap resamples of test statistics")

    @model_validator(mode="after")
    def _keeps_the_guarantees(self) -> Self:
        n = len(self.sites)
        if list(self.sites) != sorted(set(self.sites)):
            raise ValueError("sites must be ascending, each once")
        least, most = min(1, colluding_bound(n)), colluding_bound(n)
        if not least <= self.max_colluding <= most:
            raise ValueError(
                f"max_colluding must be in {least}..{most} for {n} sites, got {self.max_colluding}"
            )
        threshold = threshold_for(n, self.max_colluding)
        for key, value, formula, needed in (
            ("threshold", self.threshold, "floor((n + m) / 2) + 1, n for 3 and 4", threshold),
            ("scale", self.scale, "floor(2^30/(n + 8z)), z the noise", scale_for(n, self.input_noise)),
        ):
            if value != needed:
                raise ValueError(f"{key} must be {needed} ({formula}) for {n} sites, got {value}")
        if self.smallest_cohort > n:
            raise ValueError(f"smallest_cohort is {self.smallest_cohort}, but there are {n} sites only")
        if self.smallest_cohort < SMALLEST_COHORT and not self.smallest_cohort_waiver:
            raise ValueError(
                f"smallest_cohort below {SMALLEST_COHORT} needs smallest_cohort_waiver = true, "
                f"got {self.smallest_cohort}"
            )
        if self.level == "gram" and self.max_colluding < 1:
            raise ValueError(
                f'level "gram" needs at least 4 sites, got {n}: with 3, a share of a sketch is the sketch'
            )
        if self.rules and self.level == "sum":
            raise ValueError('rules need level "sketch" or "gram": at "sum" the server sees no update at all')
        if (self.noise_multiplier > 0) != (self.patient_clip_norm > 0):
            raise ValueError("noise_multiplier and patient_clip_norm go together")
        if self.noise_multiplier > 0 and (self.level != "sum" or self.weight_cap != 1):
            raise ValueError('noise in shares needs level "sum" and weight_cap 1')
        if "root_cosine" in self.rules and not self.root_set:
            raise ValueError("rule root_cosine needs a root set")
        if len(set(self.rules)) != len(self.rules):
            raise ValueError("rules has a name twice")
        if len(set(self.releases)) != len(self.releases):
            raise ValueError("releases has a name twice")
        if bool(self.rules) != ("judgements" in self.releases):
            raise ValueError("rules and the release of judgements go together: all sites see what they say")
        if set(self.releases) - {"split_presence", "judgements"} and self.statistics_size == 0:
            raise ValueError("releases of sums need statistics_size > 0")
        return self

    @property
    def quorum(self) -> int:
        """The least sites whose inputs may be added: the larger of smallest cohort and threshold."""
        return max(self.smallest_cohort, self.threshold)

    @property
    def num_honest(self) -> int:
        """How many sites that do not collude are in any sum, at least: the noise is shared among so many."""
        return self.quorum - self.max_colluding

    @property
    def noise_share(self) -> float:
        """Standard deviation of the noise that each site adds, in ``patient_clip_norm``; 0 for none."""
        return self.noise_multiplier / math.sqrt(self.num_honest)

    @property
    def input_noise(self) -> float:
        """Standard deviation of the noise of all enrolled sites together, in clip norms of an input."""
        return input_noise(self.noise_share, len(self.sites), self.patient_clip_norm, self.clip_norm)

    def digest(self) -> bytes:
        """Return SHA-256("fedvision/charter/v1" | canonical JSON), 32 bytes."""
        return hashlib.sha256(b"fedvision/charter/v1" + canonical_json(self)).digest()


def sign_document(document: Roster | Charter, governance: Identity) -> dict[str, Any]:
    """Return ``document`` with governance's signature: ``kind, document, governance, signature``.

    Raises:
        ConfigError: The governance key is also the server's or a site's.
    """
    if isinstance(document, Charter):
        return documents.signed(document, "charter", governance)
    try:
        _check_apart(document, governance.public)
    except Refused as refused:
        raise ConfigError(refused.text, refused.hint) from None
    return documents.signed(document, "roster", governance)


def save_signed(path: Path, signed: Mapping[str, Any]) -> None:
    """Write what ``sign_document`` returned, atomically; its bytes are ``documents.document_bytes``.

    Raises:
        StorageError: The folder is not writable.
    """
    write_atomic(path, documents.document_bytes(signed))


def load_roster(path: Path, governance_key: bytes) -> Roster:
    """Read a roster.

    Guarantee: it was signed by the owner of ``governance_key``, and not a byte was changed since.

    Args:
        path: A file that ``save_signed`` wrote.
        governance_key: The key that the caller has pinned, 32 bytes.

    Raises:
        ConfigError: Naming the file, and the field where it is one.
    """
    try:
        return _read_roster(documents.content_of(path), governance_key)
    except Refused as refused:
        raise refused.of_file(path) from None


def load_charter(path: Path, governance_key: bytes, roster: Roster) -> Charter:
    """Read a charter of a job of the sites in ``roster``.

    Guarantee: as ``load_roster``, and it names this roster by its digest and enrols sites of it only.

    Raises:
        ConfigError: Naming the file, and the field where it is one.
    """
    try:
        return _read_charter(documents.content_of(path), governance_key, roster)
    except Refused as refused:
        raise refused.of_file(path) from None


def load_draft(path: Path, roster: Roster) -> Charter:
    """Read a charter that is not signed yet, the plain JSON of its fields, for the sites in ``roster``.

    Raises:
        ConfigError: Naming the file, and the field where it is one.
    """
    try:
        found = documents.parse_object(documents.content_of(path))
        if "signature" in found:
            raise Refused("already signed", hint="`fedvision keys verify` shows what it says")
        charter = documents.validated(Charter, found)
        _check_enrolment(charter, roster)
        return charter
    except Refused as refused:
        raise refused.of_file(path) from None


@overload
def parse_signed(
    content: str | bytes, kind: Literal["roster"], governance_key: bytes, roster: None = None
) -> Roster: ...
@overload
def parse_signed(
    content: str | bytes, kind: Literal["charter"], governance_key: bytes, roster: Roster | None = None
) -> Charter: ...
def parse_signed(
    content: str | bytes, kind: Kind, governance_key: bytes, roster: Roster | None = None
) -> Roster | Charter:
    """Return the document that came in a message.

    Guarantee: as ``load_roster`` and ``load_charter``; for arbitrary bytes, a document or ``MessageError``.

    Args:
        content: The bytes of the signed document.
        kind: Which one is allowed here.
        governance_key: The key that the caller has pinned, 32 bytes.
        roster: For a charter: the roster that it must agree with. Without it the caller uses
            ``check_enrolment`` before it looks up a site.

    Raises:
        MessageError: Its text holds no value of the document.
    """
    try:
        if kind == "roster":
            return _read_roster(content, governance_key)
        return _read_charter(content, governance_key, roster)
    except Refused as refused:
        raise MessageError(f"{kind}: {refused.public}") from None


def check_succession(known: Roster, offered: Roster) -> bool:
    """Check that a roster may take the place of the one that this party knows.

    Guarantee: who knows a roster with a serial takes none that governance signed before it, and no second one
    with the same serial; so a site that was revoked does not come back with an old file.

    Args:
        known: The newest roster that this party has verified.
        offered: Another one, verified with the same key.

    Returns:
        Whether ``offered`` is newer; False if it is the same one.

    Raises:
        ProtocolError: Of another federation, older, or another one with the same serial.
    """
    if offered.federation != known.federation:
        raise ProtocolError("roster-federation", "the roster is of another federation")
    if offered.digest() == known.digest():
        return False
    if offered.serial < known.serial:
        raise ProtocolError(
            "roster-old",
            f"the roster has serial {offered.serial}, this party knows serial {known.serial}",
            "ask the coordinator for the newest kit",
        )
    if offered.serial == known.serial:
        raise ProtocolError(
            "roster-two",
            f"governance signed two rosters with serial {known.serial}",
            "ask governance which one counts, by telephone; one of them must be replaced by a newer one",
        )
    return True


def check_enrolment(charter: Charter, roster: Roster) -> None:
    """Check that a charter is one for this roster.

    Raises:
        MessageError: Another federation or roster, or a site that is not in it.
    """
    try:
        _check_enrolment(charter, roster)
    except Refused as refused:
        raise MessageError(f"charter: {refused.public}") from None


def _read_roster(content: str | bytes, governance_key: bytes) -> Roster:
    roster = documents.read_signed(content, "roster", Roster, governance_key)
    _check_apart(roster, governance_key)
    return roster


def _read_charter(content: str | bytes, governance_key: bytes, roster: Roster | None) -> Charter:
    charter = documents.read_signed(content, "charter", Charter, governance_key)
    if roster is not None:
        _check_enrolment(charter, roster)
    return charter


def _check_apart(roster: Roster, governance_key: bytes) -> None:
    if governance_key.hex() in {roster.server, *(one.key for one in roster.sites)}:
        raise Refused(
            "the governance key is also the server's or a site's", hint="governance needs a key of its own"
        )


def _check_enrolment(charter: Charter, roster: Roster) -> None:
    if charter.federation != roster.federation:
        raise Refused(
            "`federation` is not the roster's",
            f"`federation`: the charter is for {charter.federation}, the roster for {roster.federation}",
        )
    if charter.roster != roster.digest().hex():
        raise Refused(
            "`roster` is not the digest of the roster",
            hint="they do not belong together: a renewed roster needs a charter that was made for it",
        )
    unknown = sorted(set(charter.sites) - {one.number for one in roster.sites})
    if unknown:
        raise Refused(
            "`sites` has a number that is not in the roster",
            f"`sites`: the roster has no site number {unknown[0]}",
        )
