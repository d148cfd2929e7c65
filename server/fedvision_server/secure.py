"""Secure sums of a run: carries the protocol's steps over the link, attempt by attempt, and keeps the record.

    secagg/roster.json, charter.json, governance.pub   what the consortium signed
    secagg/attempts.json                               the last attempt begun, for each purpose
    secagg/transcripts/train-0003                      the signed record of a finished sum
    secagg/sums/train-0003                             the sum, little-endian uint32
    secagg/disputes/0003                               that the sum of a round was disputed
    secagg/evidence/train-0003-1-site-4                a proven lie
    secagg/expelled.json                               sites that are out, and why
    secagg/paused.json                                 sites that vanished in a lost round: out up to a round

Rules:
- An attempt is on disk before its offer leaves; a server that was killed begins another, with fresh masks.
- A site whose lie is proven is out for the rest of the job, and the attempt is done again without it. Where
  the inputs were sketched or unmasked already, they are spent, and the whole round is thrown away.
- A site that vanished in round r, which was lost for that, is not asked to train up to round 2r, as long as
  enough others are left. So an unlucky site comes back, and one that does it on purpose costs log2(R) of R
  rounds.
- A sum that was finished is not asked for again; one that was not, when the server was killed, is lost if
  its inputs were spent.
"""

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from fedvision.errors import MessageError, ProtocolError, RoundError, StorageError
from fedvision.secagg import schedule
from fedvision.secagg.attempt import AttemptError, Disputed, MaskedSum
from fedvision.secagg.codec import decode, encode
from fedvision.secagg.dispute import Trial
from fedvision.secagg.identity import Identity
from fedvision.secagg.masking import MaskVector
from fedvision.secagg.messages import Documents, EnrolmentRoll, Evidence, Purpose, Session, Signed, Transcript
from fedvision.secagg.schedule import Consortium
from fedvision.secagg.server import SumRound
from fedvision.secagg.transcript import check_transcript, make_transcript
from fedvision.storage import read_json, write_atomic, write_json
from fedvision.wire.messages import HelloReply, Refusal, Request, SecureReply, SecureRequest, Step, as_vector

if TYPE_CHECKING:
    from fedvision_server.federation import Federation

logger = logging.getLogger(__name__)
Offered = Callable[[str, bytes], Request]
MAX_UNEXPLAINED = 3
"""Attempts of a round that may fail, and rounds in a row that may be lost, with no lie proven."""


@dataclass(frozen=True)
class ServerKeys:
    """What the server needs for secure aggregation.

    Attributes:
        consortium: Roster and charter, verified.
        documents: The same as signed.
        identity: The server's key.
    """

    consortium: Consortium
    documents: Documents = field(repr=False)
    identity: Identity = field(repr=False)


class ThrownAway(RoundError):
    """The inputs of a round are spent, but there is no sum that can be used: it cannot be redone."""


@dataclass(frozen=True)
class SecureSum:
    """A finished sum.

    Attributes:
        total: uint32.
        sites: Names of the accepted sites.
        level: What ran.
        seconds: Wall time from the last ready site to the sum.
    """

    total: MaskVector = field(repr=False)
    sites: tuple[str, ...]
    level: str
    seconds: float


class DiskStore:
    """Keeps masked inputs in a folder until the end of a round; see ``secagg.server.Store``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, site: int, vector: MaskVector) -> None:
        """Keep a vector."""
        self._folder.mkdir(parents=True, exist_ok=True)
        vector.astype("<u4", copy=False).tofile(self._folder / str(site))

    def get(self, site: int) -> MaskVector:
        """Return it, mapped from disk."""
        return np.memmap(self._folder / str(site), "<u4", mode="r")

    def clear(self) -> None:
        """Remove all."""
        for path in self._folder.glob("*") if self._folder.exists() else ():
            path.unlink()


class SecureServer:
    """The server's part in secure aggregation over a whole job.

    Args:
        keys: Consortium and the server's key.
        folder: The run folder.
        federation: The sites, met.
        replies: What they said to hello, by name.
    """

    def __init__(self, keys: ServerKeys, folder: Path, federation: "Federation") -> None:
        self._keys = keys
        self._folder = folder / "secagg"
        self._federation = federation
        self._store = DiskStore(self._folder / "masked")
        self.consortium = keys.consortium
        roster = self.consortium.roster
        self.names = {number: roster.member(number).name for number in self.consortium.charter.sites}
        self.numbers = {name: number for number, name in self.names.items()}
        expelled = self._folder / "expelled.json"
        self.expelled: dict[str, str] = read_json(expelled) if expelled.exists() else {}
        paused = self._folder / "paused.json"
        self._paused: dict[str, int] = read_json(paused) if paused.exists() else {}
        self._lost_rounds = 0
        self._publics = self._enrol(federation.sizes)

    def _enrol(self, replies: Mapping[str, HelloReply]) -> dict[tuple[int, int], bytes]:
        """Gather the sites' enrolments and give everybody all of them.

        Raises:
            RoundError: A site is absent, or its enrolment is not in order.
        """
        sites = [self.names[number] for number in self.consortium.charter.sites]
        try:
            entries = tuple(decode(replies[site].enrolment.tobytes(), Signed) for site in sites)
            publics = schedule.read_enrolments(self.consortium, entries)
        except KeyError as error:
            raise RoundError(f"site {error.args[0]} of the charter does not answer") from None
        except (ProtocolError, MessageError) as error:
            raise RoundError(f"the sites' enrolments are not in order: {error}") from None
        roll = self._say(EnrolmentRoll(entries))
        done = set(self._gather("enrolled", 0, dict.fromkeys(sites, roll), lambda site, reply: None))
        for site in sites:
            if site not in done:
                raise RoundError(
                    f"site {site} did not take the list of enrolments", f"the log of {site} says why"
                )
        return publics

    def _say(self, message: object) -> bytes:
        return encode(schedule.sign(self.consortium, self._keys.identity, 0, message))

    def _gather(
        self,
        step: Step,
        number: int,
        bodies: Mapping[str, bytes],
        take: Callable[[int, SecureReply], None],
        requests: Mapping[str, Request] | None = None,
        on_refusal: Callable[[int, str], None] = lambda site, code: None,
    ) -> Iterator[str]:
        """Ask sites for a step, hand each answer to ``take``, and yield the sites whose answer it took."""
        digest, charter = self._federation.job.digest(), self.consortium.digest.hex()
        made: dict[bytes, Request] = {}
        if requests is None:
            for body in bodies.values():
                if body not in made:
                    made[body] = SecureRequest(digest, number, charter, step, as_vector(body))
            requests = {site: made[body] for site, body in bodies.items()}
        for site, reply in self._federation.ask(requests):
            event = {"event": "secure", "round": number, "step": step, "site": site}
            if not isinstance(reply, SecureReply) or reply.step != step:
                reason = reply.code if isinstance(reply, Refusal) else "message"
                on_refusal(self.numbers[site], reason)
                self._federation.tell({**event, "status": "failed", "reason": reason})
                continue
            try:
                take(self.numbers[site], reply)
            except AttemptError:
                raise
            except (ProtocolError, MessageError) as error:
                self._federation.tell({**event, "status": "refused", "reason": str(error)})
                continue
            yield site

    def add_up(
        self,
        purpose: Purpose,
        number: int,
        model: bytes,
        sites: Sequence[str],
        length: int,
        request: Offered,
        on_ready: Callable[[str], None],
    ) -> SecureSum:
        """Return the sum of the sites' inputs, after as many attempts as it takes.

        Args:
            purpose: What is summed.
            number: The round.
            model: SHA-256 of the model that the inputs are made from.
            sites: Whom to ask.
            length: Number of coordinates of an input.
            request: Makes the request that a session starts with, from charter and offer.
            on_ready: Is told each site that has its input.

        Raises:
            ThrownAway: The inputs were sketched or unmasked, but there is no sum: another round is needed.
            RoundError: Too few sites, attempt after attempt.
        """
        kept = self._kept(purpose, number, length)
        if kept is not None:
            return kept
        last, unexplained = "", 0
        absent = {site for site, until in self._paused.items() if purpose == "train" and number <= until}
        for session in self._attempts(purpose, number):
            left = [site for site in sites if site not in self.expelled]
            present = [site for site in left if site not in absent]
            left = present if len(present) >= self.consortium.quorum else left
            try:
                return self._attempt(session, model, left, length, request, on_ready)
            except AttemptError as error:
                last = str(error)
                absent |= {self.names[site] for site in error.absent}
                event = {"event": "attempt", "round": number, "purpose": purpose, "attempt": session.attempt}
                self._federation.tell({**event, "status": "failed", "reason": last})
                remaining = [site for site in left if site not in self.expelled]
                unexplained += remaining == left
                if len(remaining) < self.consortium.quorum or unexplained == MAX_UNEXPLAINED:
                    break
            finally:
                self._store.clear()
        raise RoundError(
            f"{purpose} round {number}: no sum could be made: {last or 'no attempt is left'}",
            "rounds.jsonl says which site failed at which step, and each site's log.jsonl why",
        )

    def _begun(self) -> dict[str, list[int]]:
        """Return round and attempt begun last for each purpose, and whether its inputs were spent."""
        path = self._folder / "attempts.json"
        return read_json(path) if path.exists() else {}

    def _note(self, session: Session, is_spent: bool) -> None:
        noted = [session.round, session.attempt, int(is_spent)]
        write_json(self._folder / "attempts.json", {**self._begun(), session.purpose: noted})

    def next_number(self, purpose: Purpose) -> int:
        """Return the number for a sum that has no round: the last one's, or one more if that is lost."""
        number, _, is_spent = self._begun().get(purpose, [1, 0, 0])
        is_kept = (self._folder / "transcripts" / f"{purpose}-{number:04d}").exists()
        return number + 1 if is_spent and not is_kept else number

    def _attempts(self, purpose: Purpose, number: int) -> Iterator[Session]:
        before, attempt, is_spent = self._begun().get(purpose, [0, 0, 0])
        if before == number and is_spent:
            self.lose(f"{purpose} round {number}: the server was stopped while it made the sum", False)
        attempt = attempt if before == number else 0
        while attempt < self.consortium.charter.max_attempts:
            attempt += 1
            session = Session(purpose, number, attempt)
            self._note(session, is_spent=False)
            yield session

    def lose(self, text: str, is_explained: bool) -> NoReturn:
        """Give up a round whose inputs are spent.

        Raises:
            ThrownAway: See above. RoundError: It happened again and again, with no lie proven.
        """
        self._lost_rounds = 0 if is_explained else self._lost_rounds + 1
        if self._lost_rounds == MAX_UNEXPLAINED:
            raise RoundError(
                f"{text}; this is the {MAX_UNEXPLAINED}rd round in a row that is lost",
                "rounds.jsonl says which site failed at which step, and each site's log.jsonl why",
            )
        raise ThrownAway(text)

    def _attempt(
        self,
        session: Session,
        model: bytes,
        sites: Sequence[str],
        length: int,
        request: Offered,
        on_ready: Callable[[str], None],
    ) -> SecureSum:
        """Do one attempt and act on its evidence.

        Raises:
            AttemptError: It failed before the inputs were spent. ThrownAway: After that.
        """
        attempt = SumRound(
            self.consortium,
            self._publics,
            self._keys.identity,
            session,
            model,
            length,
            self.consortium.encoding.norm_bound,
            self._store,
            len(os.sched_getaffinity(0)),
        )
        try:
            return self._steps(attempt, sites, request, on_ready)
        except AttemptError as error:
            self._expel(session, error.evidence)
            if self._begun()[session.purpose][2]:
                is_paused = session.purpose == "train" and self._pause(error.absent, session.round)
                self.lose(str(error), bool(error.evidence) or is_paused)
            raise

    def _pause(self, absent: Collection[int], number: int) -> bool:
        """Leave sites out of training for as many rounds as there were; return whether there are any."""
        self._paused |= {self.names[site]: 2 * number for site in absent}
        write_json(self._folder / "paused.json", self._paused)
        return bool(absent)

    def _steps(
        self,
        attempt: SumRound,
        sites: Sequence[str],
        request: Offered,
        on_ready: Callable[[str], None],
    ) -> SecureSum:
        """Do all steps of one attempt, in the order of ``secagg.messages``."""
        session, number = attempt.session, attempt.session.round
        offered = request(self.consortium.digest.hex(), attempt.offer())

        def each(step: Step, bodies: Mapping[int, bytes], take: Callable[[int, bytes], None]) -> None:
            named = {self.names[site]: body for site, body in bodies.items()}
            list(self._gather(step, number, named, lambda site, reply: take(site, reply.body.tobytes())))

        def take_ready(site: int, reply: SecureReply) -> None:
            attempt.add_ready(site, reply.body.tobytes())

        def take_masked(site: int, reply: SecureReply) -> None:
            attempt.add_masked(site, reply.body.tobytes(), reply.masked)

        for site in self._gather("ready", number, {}, take_ready, dict.fromkeys(sites, offered)):
            on_ready(site)
        started = time.perf_counter()
        bodies = {self.names[site]: body for site, body in attempt.weave().items()}
        list(self._gather("mask", number, bodies, take_masked))
        if attempt.level != "sum":
            each("beacon", dict.fromkeys(attempt.views.masked, attempt.masked_roll()), attempt.add_beacon)
            roll = attempt.beacon_roll()
            self._note(session, is_spent=True)
            each("sketch", dict.fromkeys(attempt.views.beacons, roll), attempt.add_sketch)
        if attempt.level == "gram":
            each("hold", attempt.hold(), attempt.add_products)
        try:
            accepted = attempt.accept()
        except Disputed as error:
            raise AttemptError(str(error), self._verdict(attempt, None)) from None
        each("accept", dict.fromkeys(attempt.inside, accepted), attempt.add_ack)
        while attempt.needs_shrinking:
            accepted = attempt.shrink()
            each("accept", dict.fromkeys(attempt.inside, accepted), attempt.add_ack)
        roll = attempt.ack_roll()
        self._note(session, is_spent=True)
        each("unmask", dict.fromkeys(attempt.views.acks, roll), attempt.add_unmask)
        outcome = attempt.finish()
        if not outcome.fits:
            text = f"{session}: the sum is not the sum of the sketches"
            raise AttemptError(text, [*attempt.evidence, *self._verdict(attempt, outcome)])
        self._tell_excluded(attempt)
        self._expel(session, attempt.evidence)
        self._keep(attempt, outcome)
        sites = tuple(self.names[site] for site in attempt.inside)
        return SecureSum(outcome.total, sites, attempt.level, time.perf_counter() - started)

    def _tell_excluded(self, attempt: SumRound) -> None:
        for site, reason in attempt.excluded.items():
            event = {"event": attempt.session.purpose, "round": attempt.session.round}
            self._federation.tell({**event, "site": self.names[site], "status": "refused", "reason": reason})

    def _verdict(self, attempt: SumRound, outcome: MaskedSum | None) -> list[Evidence]:
        """Hold a dispute and return what it proves."""
        trial, number = Trial(attempt, outcome), attempt.session.round
        limit = max(1, self.consortium.charter.max_colluding)
        held = len(list((self._folder / "disputes").glob("*")))
        write_json(self._folder / "disputes" / f"{number:04d}", {"sites": trial.sites})

        def take_report(site: int, reply: SecureReply) -> None:
            trial.add_report(site, reply.body.tobytes())

        def excuse(site: int, code: str) -> None:
            if code == "protocol: openings" and held >= limit:
                trial.excuse(site)

        bodies = {self.names[site]: trial.request() for site in trial.sites}
        list(self._gather("dispute", number, bodies, take_report, on_refusal=excuse))
        for pair in trial.disputed_pairs():
            for site, peer in (pair, pair[::-1]):

                def take(i: int, reply: SecureReply, peer: int = peer) -> None:
                    trial.add_opening(i, peer, reply.body.tobytes())

                list(self._gather("open", number, {self.names[site]: trial.open_request(site, peer)}, take))
        return trial.verdict()

    def _expel(self, session: Session, evidence: Sequence[Evidence]) -> None:
        for item in evidence:
            name = self.names[item.site]
            if name in self.expelled:
                continue
            where = f"{session.purpose}-{session.round:04d}-{session.attempt}-site-{item.site}"
            write_atomic(self._folder / "evidence" / where, encode(item))
            self.expelled[name] = item.rule
            write_json(self._folder / "expelled.json", self.expelled)
            self._federation.tell(
                {
                    "event": "expelled",
                    "round": session.round,
                    "site": name,
                    "rule": item.rule,
                    "evidence": where,
                }
            )

    def _keep(self, attempt: SumRound, outcome: MaskedSum) -> None:
        """Put a finished sum and its transcript on disk; with the transcript it is finished."""
        name = f"{attempt.session.purpose}-{attempt.session.round:04d}"
        little = np.ascontiguousarray(outcome.total, "<u4")
        write_atomic(self._folder / "sums" / name, little.data.cast("B"))
        write_atomic(self._folder / "transcripts" / name, encode(make_transcript(attempt, outcome)))

    def _kept(self, purpose: Purpose, number: int, length: int) -> SecureSum | None:
        """Return a sum that was finished before the server was stopped, None where there is none.

        Raises:
            StorageError: It is damaged.
        """
        name = f"{purpose}-{number:04d}"
        path, sum_path = self._folder / "transcripts" / name, self._folder / "sums" / name
        if not (path.exists() and sum_path.exists()):
            return None
        total = np.fromfile(sum_path, "<u4").astype(np.uint32, copy=False)
        try:
            checked = check_transcript(self.consortium, decode(path.read_bytes(), Transcript), total)
        except (ProtocolError, MessageError) as error:
            raise StorageError(f"{path} is damaged: {error}") from None
        if total.shape != (length,):
            raise StorageError(f"{sum_path} is damaged: {total.size} numbers, expected {length}")
        sites = tuple(self.names[site] for site in checked.accepted)
        return SecureSum(total, sites, checked.level, 0.0)

    def count_as_done(self) -> None:
        """Note that a round led to a new model: lost rounds are counted from here."""
        self._lost_rounds = 0

    def forget_sum(self, purpose: Purpose, number: int) -> None:
        """Remove the sum of a round that is on disk in full, unless sums are to be kept."""
        if not self._federation.job.secure_aggregation.keep_sums:
            (self._folder / "sums" / f"{purpose}-{number:04d}").unlink(missing_ok=True)
