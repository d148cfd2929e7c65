"""A site's part in secure aggregation: enrols, begins sessions, answers steps, and keeps the vault.

The steps themselves are ``fedvision.secagg.site``. Rules:
- Roster and charter count only with the signature of the governance key that this site has pinned, and the
  charter only if it says what the job says.
- What a step changes is stored in the ``Vault`` before its answer is returned.
- The last request is answered again, as often as it is asked, with the bytes of before: an answer may have
  been lost on its way, or together with the server. See ``SecureSite.answer``.
"""

import dataclasses
import functools
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedvision.config import Job
from fedvision.defence.spelling import read_judgement
from fedvision.errors import ConfigError, ProtocolError
from fedvision.secagg import dispute, identity, schedule, site_sketch
from fedvision.secagg import site as protocol
from fedvision.secagg.codec import decode, encode
from fedvision.secagg.masking import MaskVector
from fedvision.secagg.member import SiteMember
from fedvision.secagg.messages import (
    Accepted,
    Documents,
    Enrolment,
    EnrolmentRoll,
    Offer,
    PairPublic,
    Session,
)
from fedvision.secagg.roster import level_for, parse_signed
from fedvision.secagg.schedule import Consortium, read_server
from fedvision.storage import append_line
from fedvision.training.charter import colluding_for, rules_for
from fedvision.updates.layout import Layout
from fedvision.wire.messages import SecureReply, SecureRequest, as_vector
from fedvision_sites.vault import EnrolmentFile, SessionFile, Vault, pin_job

NOTHING = np.zeros(0, np.uint32)


@dataclass(frozen=True)
class SecureConfig:
    """Where a site's keys and marks lie, and whom it trusts.

    Attributes:
        identity: File of its Ed25519 key.
        governance: The pinned public key of the consortium's governance, 32 bytes.
        guard: Folder of the high-water marks, outside of the state folder.
    """

    identity: Path
    governance: bytes = field(repr=False)
    guard: Path


def check_documents(
    config: SecureConfig, name: str, job: Job, layout: Layout, documents_bytes: bytes
) -> Consortium:
    """Return roster and charter, after every check that a site can make before it decides.

    Args:
        config: Keys and trust.
        name: This site's name in the roster.
        job: The job; what the charter says must agree with it.
        layout: Of the job's network.
        documents_bytes: The encoded ``Documents``.

    Raises:
        ProtocolError, MessageError: A document is not signed by the pinned key, or not what it must be.
        StorageError: The site's own key cannot be read.
    """
    consortium = read_documents(decode(documents_bytes, Documents), config.governance)
    own = identity.load(config.identity)
    number = consortium.roster.number_of(name)
    if bytes.fromhex(consortium.roster.member(number).key) != own.public:
        raise ProtocolError("roster", "the roster has another key for this site")
    check_charter(consortium, job, layout)
    return consortium


def enrol(
    config: SecureConfig, name: str, state: Path, job: Job, layout: Layout, documents_bytes: bytes
) -> bytes:
    """Check roster and charter, make a key for each peer, and return the signed ``Enrolment``.

    Asked again, it returns the same enrolment. Arguments are those of ``check_documents``, and ``state``, the
    site's folder of the job.

    Returns:
        The encoded, signed ``Enrolment``; nothing for a site that the charter does not enrol, because it
        only tests.

    Raises:
        ProtocolError, MessageError, StorageError: See ``check_documents``.
    """
    consortium = check_documents(config, name, job, layout, documents_bytes)
    documents = decode(documents_bytes, Documents)
    own, number = identity.load(config.identity), consortium.roster.number_of(name)
    pin_job(config.guard, job.digest(), consortium.digest)
    if number not in consortium.charter.sites:
        return b""
    vault = Vault(state, config.guard, consortium.digest)
    found = vault.enrolment()
    if found is None:
        secrets, publics = schedule.make_pair_keys([i for i in consortium.charter.sites if i != number])
        message = Enrolment(tuple(PairPublic(peer, key) for peer, key in publics.items()))
        signed = schedule.sign(consortium, own, number, message)
        pairs = tuple(PairPublic(peer, key) for peer, key in secrets.items())
        found = EnrolmentFile(number, documents.roster, documents.charter, pairs, signed, EnrolmentRoll(()))
    if not found.roll.entries:
        vault.save_enrolment(found)
    return encode(found.own)


def read_documents(documents: Documents, governance: bytes) -> Consortium:
    """Return roster and charter after their signatures were verified.

    Raises:
        MessageError: A document is malformed, not signed by ``governance``, or of another roster.
    """
    roster = parse_signed(documents.roster, "roster", governance)
    charter = parse_signed(documents.charter, "charter", governance, roster)
    return Consortium(roster, charter)


def check_charter(consortium: Consortium, job: Job, layout: Layout) -> None:
    """Check that a charter says what the job says.

    Raises:
        ProtocolError: A field differs; it is named.
    """
    charter = consortium.charter
    try:
        level = level_for(job.secure_aggregation.level, len(charter.sites), layout.size)
    except ConfigError:
        raise ProtocolError("charter-level", "the model is too small for sketches of updates") from None
    for field_name, theirs, ours in (
        ("job", charter.job, job.digest()),
        ("layout", charter.layout, layout.digest),
        ("size", charter.size, layout.size),
        ("clip_norm", charter.clip_norm, job.aggregation.clip_norm),
        ("rounds", charter.rounds, job.rounds),
        ("level", charter.level, level),
        ("smallest_cohort", charter.smallest_cohort, job.secure_aggregation.smallest_cohort),
    ):
        if theirs != ours:
            raise ProtocolError(f"charter-{field_name}", f"{field_name} of the charter is not the job's")
    noise = (0.0, 0.0)
    if job.privacy.mode == "distributed":
        noise = (job.privacy.clip_norm, job.privacy.noise_multiplier)
    if (charter.patient_clip_norm, charter.noise_multiplier) != noise:
        raise ProtocolError("charter-noise", "the noise of the charter is not the job's")
    try:
        colluding = colluding_for(job, len(charter.sites))
    except ConfigError:
        raise ProtocolError("charter-max_colluding", "the job's max_colluding is too large") from None
    if charter.max_colluding != colluding:
        raise ProtocolError("charter-max_colluding", "max_colluding of the charter is not the job's")
    try:
        rules = rules_for(job, level, len(charter.sites), bool(charter.root_set))
    except ConfigError:
        raise ProtocolError("charter-rules", "the job's rules need what the charter does not have") from None
    if charter.rules != rules or charter.max_malicious != job.defence.max_malicious:
        raise ProtocolError("charter-rules", "the rules of the charter are not the job's")
    if charter.root_set and job.defence.root == "off":
        raise ProtocolError("charter-root_set", "the charter names a root set, the job wants none")
    cap = job.secure_aggregation.weight_cap
    if job.aggregation.weighting == "uniform":
        cap = 1
    if cap is not None and charter.weight_cap != cap:
        raise ProtocolError("charter-weight_cap", "weight_cap of the charter is not the job's")
    releases = "test_by_site" in charter.releases
    if releases != ("test" in job.secure_aggregation.release):
        raise ProtocolError("charter-releases", "releases of the charter are not the job's")


class SecureSite:
    """One site in one job, over the lifetime of a process.

    Args:
        config: Keys and trust.
        name: The site's name.
        state: Its state folder.
        charter: SHA-256 of the charter in hexadecimal, as requests carry it.
        threads: CPU threads for masks.

    Raises:
        ProtocolError: The site is not enrolled under this charter.
    """

    def __init__(self, config: SecureConfig, name: str, state: Path, charter: str, threads: int) -> None:
        if not re.fullmatch("[0-9a-f]{64}", charter):
            raise ProtocolError("charter", "a charter is named by 64 hexadecimal digits")
        digest = bytes.fromhex(charter)
        self._config = config
        self._name = name
        self._threads = threads
        self._log = state / "log.jsonl"
        self._vault = Vault(state, config.guard, digest)
        found = self._vault.enrolment()
        if found is None:
            raise ProtocolError("roster", "this site is not enrolled under that charter")
        self._enrolment = found
        self.consortium = read_documents(Documents(found.roster, found.charter), config.governance)

    def save_roll(self, data: bytes) -> None:
        """Check and keep everybody's enrolments, from the server's signed ``EnrolmentRoll``.

        Raises:
            ProtocolError, MessageError: See ``schedule.read_enrolments``; or this site's own was changed.
        """
        roll = read_server(self.consortium, data, EnrolmentRoll)
        publics = schedule.read_enrolments(self.consortium, roll.entries)
        own = self._enrolment
        for item in own.secrets:
            if publics[own.number, item.peer] != schedule.public_of(item.key):
                raise ProtocolError("own-entry", "this site's enrolment was changed")
        if own.roll.entries and own.roll != roll:
            raise ProtocolError("roster", "the enrolments are not those of before")
        self._enrolment = EnrolmentFile(own.number, own.roster, own.charter, own.secrets, own.own, roll)
        self._vault.save_enrolment(self._enrolment)

    @functools.cached_property
    def member(self) -> SiteMember:
        """This site with its keys.

        Raises:
            ProtocolError: Enrolment is not complete.
        """
        found = self._enrolment
        publics = schedule.read_enrolments(self.consortium, found.roll.entries)
        secrets = {item.peer: item.key for item in found.secrets}
        own = identity.load(self._config.identity)
        return SiteMember(self.consortium, found.number, own, secrets, publics)

    def read_offer(self, offer: bytes) -> Session:
        """Return the session of an offer.

        Raises:
            ProtocolError, MessageError: The offer is not the server's.
        """
        return read_server(self.consortium, offer, Offer).session

    def repeated(self, offer: bytes, model: bytes) -> bytes | None:
        """Return the ``ReadyUpload`` of before, if this very offer is what was answered last; else None."""
        session, marks = self.read_offer(offer), self._vault.marks()
        mark = marks.of(session.purpose)
        if (session.round, session.attempt) != (mark.round, mark.attempt):
            return None
        found = self._vault.last(marks)
        return found.answer if found.request == request_digest("ready", offer + model) else None

    def open_session(self, offer: bytes) -> Session:
        """Return the session of an offer, if this site may begin it; called before the work is done.

        Raises:
            ProtocolError: The offer is not the server's, or the session is not later than all before.
        """
        session = self.read_offer(offer)
        self._vault.marks().begun(session)
        return session

    def pending(self, session: Session, model: bytes) -> MaskVector | None:
        """Return the input that an earlier attempt left, None where there is none."""
        return self._vault.load_input(session, model)

    def keep(self, session: Session, model: bytes, vector: MaskVector) -> None:
        """Keep the input of a round until it ends."""
        self._vault.save_input(session, model, vector)

    def begin(self, offer: bytes, model: bytes, vector: MaskVector) -> bytes:
        """Return the ``ReadyUpload`` of a session; see ``fedvision.secagg.site.begin``."""
        marks, state, answer = protocol.begin(self.member, self._vault.marks(), offer, model, vector)
        self._vault.save(marks, SessionFile(state, request_digest("ready", offer + model), answer))
        return answer

    def answer(self, request: SecureRequest) -> SecureReply:
        """Do one step after ``begin``, or answer the last one again.

        Guarantee: what was answered last is answered again with the same bytes, and only for a request of the
        same step and the same bytes; marks and session stay as they are. The answer is read from disk; a
        masked input, which is too large to be kept twice, is made again from the kept input and keys, and
        returned only if it has the hash that was signed. So whoever asks again learns nothing that the
        answer did not tell: no mask covers two inputs, no key, share or number leaves that had not left,
        and nothing new is signed.

        Raises:
            ProtocolError, MessageError: The step is refused.
        """
        marks, body, masked = self._vault.marks(), request.body.tobytes(), NOTHING
        last, member, step = self._vault.last(marks), self.member, request.step
        state, asked = last.session, request_digest(request.step, body)
        if last.request == asked:
            if state.phase == "masked":
                masked = protocol.mask_again(member, state, self._input(state), self._threads)
            return self._reply(request, last.answer, masked)
        if step == "told":
            self._note(protocol.hear(member, state, body), state.session)
            return self._reply(request, b"", NOTHING)
        if step == "mask":
            marks, state, answer, vector = protocol.mask(
                member, marks, state, body, self._input(state), self._threads
            )
            masked = NOTHING if vector is None else vector
        elif step == "beacon":
            marks, state, answer = site_sketch.reveal_beacon(member, marks, state, body)
        elif step == "sketch":
            marks, state, answer = site_sketch.send_sketch(member, marks, state, body, self._input(state))
        elif step == "hold":
            marks, state, answer = site_sketch.hold(member, marks, state, body, self._input(state))
        elif step == "accept":
            marks, state, answer = protocol.acknowledge(member, marks, state, body)
        elif step == "unmask":
            marks, state, answer = protocol.unmask(member, marks, state, body)
        elif step == "dispute":
            marks, state, answer = dispute.report(member, marks, state, body, self._input(state))
        elif step == "open":
            length = self._input(state).size
            marks, state, answer = dispute.open_pair(member, marks, state, body, length)
        else:
            raise ProtocolError("phase", f"no such step after {state.phase}")
        self._vault.save(marks, SessionFile(state, asked, answer))
        if step == "accept":
            self._note(read_server(self.consortium, body, Accepted), state.session)
        return self._reply(request, answer, masked)

    def _note(self, accepted: Accepted, session: Session) -> None:
        """Write into the site's own log what the rules found about it."""
        number = self._enrolment.number
        reason = next((item.reason for item in accepted.excluded if item.site == number), "")
        found = read_judgement(accepted.judgement).get(number)
        if reason or found:
            told = dataclasses.asdict(found) if found else None
            append_line(self._log, {"round": session.round, "left_out": reason, "judgement": told})

    def _reply(self, request: SecureRequest, answer: bytes, masked: MaskVector) -> SecureReply:
        body = as_vector(answer)
        return SecureReply(request.job_digest, self._name, request.round, request.step, body, masked)

    def _input(self, state: protocol.SiteSession) -> MaskVector:
        found = self._vault.load_input(state.session, state.model)
        if found is None:
            raise ProtocolError("input", f"{state.session}: the site's input is gone")
        return found


def request_digest(step: str, body: bytes) -> bytes:
    """Return the SHA-256 that tells whether a request is the one of before."""
    return hashlib.sha256(step.encode() + b"|" + body).digest()
