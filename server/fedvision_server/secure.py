"""Secure sums of a run, attempt by attempt, and the record of them. The steps of an attempt are ``steps``.

    secagg/roster.json, charter.json, governance.pub   what the consortium signed
    secagg/attempts.json                               the last attempt begun, for each purpose; was it lost?
    secagg/journal, masked/                            the attempt under way, see ``journal``
    secagg/enrolled.json                               the sites that have everybody's enrolments
    secagg/transcripts/train-0003                      the signed record of a finished sum
    secagg/judgements/, decisions.json                 what the rules said of each round, see ``defence``
    secagg/sums/train-0003                             the sum, little-endian uint32
    secagg/disputes/0003                               that the sum of a round was disputed
    secagg/evidence/train-0003-1-site-4                a proven lie
    secagg/expelled.json                               sites that are out, and why
    secagg/paused.json                                 sites that vanished in a lost round: out up to a round

Rules:
- An attempt is on disk before its offer leaves, and so is each message before anything is made of it. A
  server that was killed goes on with the attempt in its journal, where it was: no round is lost for that.
- A site whose lie is proven is out for the rest of the job, and the attempt is done again without it. Where
  the inputs were sketched or unmasked already, they are spent, and the whole round is thrown away.
- A site that vanished in round r, which was lost for that, is not asked to train up to round 2r, as long as
  enough others are left. So an unlucky site comes back, and one that does it on purpose costs log2(R) of R
  rounds.
- A sum that was finished is not asked for again.
"""

import functools
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from fedvision.defence.spelling import read_judgement
from fedvision.errors import DefenceError, MessageError, ProtocolError, RoundError, StorageError
from fedvision.secagg import schedule
from fedvision.secagg.attempt import AttemptError, MaskedSum
from fedvision.secagg.codec import decode, encode
from fedvision.secagg.identity import Identity
from fedvision.secagg.masking import MaskVector
from fedvision.secagg.messages import Documents, EnrolmentRoll, Evidence, Purpose, Session, Signed, Transcript
from fedvision.secagg.schedule import Consortium
from fedvision.secagg.server import SumRound
from fedvision.secagg.transcript import check_transcript, make_transcript
from fedvision.storage import read_json, write_atomic, write_json
from fedvision.wire.messages import HelloReply, Refusal, Request, SecureReply, SecureRequest, as_vector
from fedvision_server.defence import Defence
from fedvision_server.journal import Journal, Start, VectorStore
from fedvision_server.steps import Steps, is_away

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


class SecureServer:
    """The server's part in secure aggregation over a whole job.

    Args:
        keys: Consortium and the server's key.
        folder: The run folder.
        federation: The sites, met.

    Raises:
        RoundError: A site of the charter was not met, or the enrolments are not in order.
    """

    def __init__(self, keys: ServerKeys, folder: Path, federation: "Federation") -> None:
        self._keys = keys
        self._folder = folder / "secagg"
        self._federation = federation
        self._journal = Journal(self._folder)
        self.consortium = keys.consortium
        roster = self.consortium.roster
        self.names = {number: roster.member(number).name for number in self.consortium.charter.sites}
        self.numbers = {name: number for number, name in self.names.items()}
        self.expelled: dict[str, str] = self._load("expelled.json", {})
        self._paused: dict[str, int] = self._load("paused.json", {})
        self._enrolled: list[str] = self._load("enrolled.json", [])
        self._lost_rounds = 0
        self.defence = Defence(self._folder, self.consortium.charter, self.consortium.encoding)
        self._enrolments, self._publics = self._read_enrolments(federation.sizes)

    def _load(self, name: str, otherwise: Any) -> Any:
        path = self._folder / name
        return read_json(path) if path.exists() else otherwise

    def _read_enrolments(
        self, replies: Mapping[str, HelloReply]
    ) -> tuple[tuple[Signed, ...], dict[tuple[int, int], bytes]]:
        """Return the sites' enrolments, and the keys in them."""
        try:
            sites = [self.names[number] for number in self.consortium.charter.sites]
            entries = tuple(decode(replies[site].enrolment.tobytes(), Signed) for site in sites)
            return entries, schedule.read_enrolments(self.consortium, entries)
        except KeyError as error:
            raise RoundError(f"site {error.args[0]} of the charter does not answer") from None
        except (ProtocolError, MessageError) as error:
            raise RoundError(f"the sites' enrolments are not in order: {error}") from None

    def spread_enrolments(self) -> None:
        """Give everybody's enrolments to each site that has not got them; one that is away gets them later.

        Raises:
            RoundError: A site does not take them.
        """
        lacking = [site for site in self.numbers if site not in self._enrolled and site not in self.expelled]
        if not lacking:
            return
        roll = EnrolmentRoll(self._enrolments)
        body = as_vector(encode(schedule.sign(self.consortium, self._keys.identity, 0, roll)))
        digest = self._federation.job.digest()
        request = SecureRequest(digest, 0, self.consortium.digest.hex(), "enrolled", body)
        for site, reply in self._federation.ask(dict.fromkeys(lacking, request)):
            if isinstance(reply, SecureReply):
                self._enrolled = sorted([*self._enrolled, site])
                write_json(self._folder / "enrolled.json", self._enrolled)
            elif not (isinstance(reply, Refusal) and is_away(reply.code)):
                raise RoundError(
                    f"site {site} did not take the list of enrolments", f"the log of {site} says why"
                )

    def add_up(
        self,
        purpose: Purpose,
        number: int,
        model: bytes,
        sites: Sequence[str],
        length: int,
        request: Offered,
        on_ready: Callable[[str], None],
        root: MaskVector | None = None,
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
            root: The root set's update, see ``defence.root_input``; None where the charter names none.

        Raises:
            ThrownAway: The inputs were sketched or unmasked, but there is no sum: another round is needed.
            RoundError: Too few sites, attempt after attempt.
        """
        kept, begun = self._kept(purpose, number, length), self._resumed(purpose, number, model)
        if kept is not None:
            if begun is not None:
                self._journal.remove()
            return kept
        last, unexplained = "", 0
        absent = {site for site, until in self._paused.items() if purpose == "train" and number <= until}
        before, _, is_lost = self._begun().get(purpose, [0, 0, 0])
        if before == number and is_lost:
            self.lose(f"{purpose} round {number}: the sum was lost before the server was stopped", False)
        while begun is not None or (begun := self._next(purpose, number, model, sites, absent, unexplained)):
            start, store = begun
            absent |= self._named(start.absent)
            unexplained, left = start.unexplained, self._named(start.sites)
            try:
                return self._attempt(start, store, length, request, on_ready, root)
            except AttemptError as error:
                last, begun = str(error), None
                absent |= self._named(error.absent)
                event = {"event": "attempt", "round": number, "purpose": purpose}
                event |= {"attempt": start.session.attempt, "status": "failed", "reason": last}
                self._federation.tell(event)
                remaining = left - self.expelled.keys()
                unexplained += remaining == left
                if len(remaining) < self.consortium.quorum or unexplained == MAX_UNEXPLAINED:
                    break
        self._journal.remove()
        raise RoundError(
            f"{purpose} round {number}: no sum could be made: {last or 'no attempt is left'}",
            "rounds.jsonl says which site failed at which step, and each site's log.jsonl why",
        )

    def _named(self, numbers: Iterable[int]) -> set[str]:
        return {self.names[number] for number in numbers}

    def _numbered(self, names: Iterable[str]) -> bytes:
        return bytes(sorted(self.numbers[name] for name in names))

    def _begun(self) -> dict[str, list[int]]:
        """Return round and attempt begun last for each purpose, and whether its inputs are spent in vain."""
        found: dict[str, list[int]] = self._load("attempts.json", {})
        return found

    def _note(self, session: Session, is_lost: bool) -> None:
        noted = [session.round, session.attempt, int(is_lost)]
        write_json(self._folder / "attempts.json", {**self._begun(), session.purpose: noted})

    def next_number(self, purpose: Purpose) -> int:
        """Return the number for a sum that has no round: the last one's, or one more if that is lost."""
        number, _, is_lost = self._begun().get(purpose, [1, 0, 0])
        return number + is_lost

    def _resumed(self, purpose: Purpose, number: int, model: bytes) -> tuple[Start, VectorStore] | None:
        """Return the attempt that was under way when the server was stopped, if it is at this sum."""
        found = self._journal.resume()
        is_it = found is not None and (found[0].session.purpose, found[0].session.round, found[0].model) == (
            purpose, number, model,
        )  # fmt: skip
        return found if is_it else None

    def _next(
        self,
        purpose: Purpose,
        number: int,
        model: bytes,
        sites: Sequence[str],
        absent: Collection[str],
        unexplained: int,
    ) -> tuple[Start, VectorStore] | None:
        """Begin the next attempt, which is on disk then; None if the charter allows no more."""
        before, attempt, _ = self._begun().get(purpose, [0, 0, 0])
        session = Session(purpose, number, attempt + 1 if before == number else 1)
        if session.attempt > self.consortium.charter.max_attempts:
            return None
        self._federation.greet()
        self.spread_enrolments()
        decided = self._named(self.defence.expelled(number)) if purpose == "train" else set()
        left = [site for site in sites if site not in self.expelled and site not in decided]
        present = [site for site in left if site not in absent]
        left = present if len(present) >= self.consortium.quorum else left
        self._note(session, is_lost=False)
        start = Start(session, model, self._numbered(left), self._numbered(absent), unexplained)
        return start, self._journal.begin(start)

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
        start: Start,
        store: VectorStore,
        length: int,
        request: Offered,
        on_ready: Callable[[str], None],
        root: MaskVector | None,
    ) -> SecureSum:
        """Do one attempt, or the rest of it, and act on its evidence.

        Raises:
            AttemptError: It failed before the inputs were spent. ThrownAway: After that.
        """
        attempt = SumRound(
            self.consortium,
            self._publics,
            self._keys.identity,
            start.session,
            start.model,
            length,
            self.consortium.encoding.norm_bound,
            store,
            len(os.sched_getaffinity(0)),
            functools.partial(self.defence.select, start.session.round) if self.defence.is_on else None,
            root,
        )
        steps = Steps(self._federation, self.names, attempt, self._journal, store)
        offered = request(self.consortium.digest.hex(), attempt.offer())

        def begin_dispute() -> int:
            """Note a dispute and return how many there were before this round's."""
            path = self._folder / "disputes" / f"{start.session.round:04d}"
            write_json(path, {"sites": list(start.sites)})
            return len(list(path.parent.glob("*"))) - 1

        try:
            outcome = steps.run(dict.fromkeys(start.sites, offered), on_ready, begin_dispute)
        except DefenceError as error:
            self._note(start.session, is_lost=True)
            self._journal.remove()
            self.lose(f"{start.session}: {error}", is_explained=False)
        except AttemptError as error:
            self._expel(start.session, error.evidence)
            if steps.is_spent:
                is_paused = start.session.purpose == "train" and self._pause(
                    error.absent, start.session.round
                )
                self._note(start.session, is_lost=True)
                self._journal.remove()
                self.lose(str(error), bool(error.evidence) or is_paused)
            raise
        self._tell_excluded(attempt)
        self._expel(start.session, attempt.evidence)
        self._keep(attempt, outcome)
        self._journal.remove()
        self._tell_sites(attempt)
        sites = tuple(self.names[site] for site in attempt.inside)
        return SecureSum(outcome.total, sites, attempt.level, time.perf_counter() - steps.woven_at)

    def _pause(self, absent: Collection[int], number: int) -> bool:
        """Leave sites out of training for as many rounds as there were; return whether there are any."""
        self._paused |= {self.names[site]: 2 * number for site in absent}
        write_json(self._folder / "paused.json", self._paused)
        return bool(absent)

    def _tell_excluded(self, attempt: SumRound) -> None:
        found = read_judgement(attempt.judgement)
        for site, why in attempt.excluded.items():
            event: dict[str, Any] = {"event": attempt.session.purpose, "round": attempt.session.round}
            reason = f"{why}: {found[site].reason}" if why == "by the rules" else why
            self._federation.tell({**event, "site": self.names[site], "status": "refused", "reason": reason})
        for site, one in found.items():
            if one.standing != self.defence.past(attempt.session.round).of(site).standing:
                event = {"event": "standing", "round": attempt.session.round, "site": self.names[site]}
                self._federation.tell({**event, "standing": one.standing, "momentum": one.momentum})
        if found:
            judgement = json.loads(attempt.judgement)
            event = {"event": "judgement", "round": attempt.session.round}
            self._federation.tell({**event, "names": {str(i): self.names[i] for i in found}, **judgement})

    def _tell_sites(self, attempt: SumRound) -> None:
        """Tell the sites that were left out why; the others have it from the accepted set."""
        told = [
            site for site, why in attempt.excluded.items() if why in ("by the rules", "norm above the bound")
        ]
        body, session = as_vector(encode(attempt.said["Accepted"])), attempt.session
        digest, charter = self._federation.job.digest(), self.consortium.digest.hex()
        request = SecureRequest(digest, session.round, charter, "told", body)
        for _ in self._federation.ask({self.names[site]: request for site in told}):
            pass  # whether it hears is its own affair

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
        if attempt.measured is not None:
            self.defence.keep(attempt.session.round, attempt.measured, attempt.judgement)
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
