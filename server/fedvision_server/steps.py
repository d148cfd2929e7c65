"""The steps of one attempt at a masked sum, in the order of ``secagg.messages``, with the journal.

Rules:
- What a site answers is in the journal before it is taken, and a step has an end there before the next
  message leaves. So after a kill the same code goes through the same steps: what is in the journal is not
  asked for again, and whatever the server says is what it said before.
- A site that refuses, or whose answer is refused, has dropped out; late answers belong to no step.
- With a patient link, sites that are only away are asked again while too few others are there: for as long as
  it takes while they get ready, ``RETRIES`` times after that.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedvision.errors import MessageError, ProtocolError
from fedvision.secagg import holding
from fedvision.secagg.attempt import AttemptError, Disputed, MaskedSum
from fedvision.secagg.dispute import Trial
from fedvision.secagg.masking import MaskVector
from fedvision.secagg.messages import Evidence
from fedvision.secagg.server import SumRound
from fedvision.wire.messages import Refusal, Reply, Request, SecureReply, SecureRequest, Step, as_vector
from fedvision_server.journal import MAX_CODE, Journal, Outcome, VectorStore

if TYPE_CHECKING:
    from fedvision_server.federation import Federation

WAITING = "waiting"
"""The refusal of a site whose people have not decided about the job yet."""
AWAY = frozenset({WAITING, "deadline", "unreachable"})
"""Refusals that say nothing but: not now. A code may have a detail behind a colon: ``waiting: hours``."""
RETRIES = 3
NOTHING: MaskVector = np.zeros(0, np.uint32)
Take = Callable[[int, bytes], None]


def is_away(code: str) -> bool:
    """Return whether a site refuses for now only."""
    return code.partition(":")[0] in AWAY


class Steps:
    """Carries one attempt over the link.

    Args:
        federation: The sites.
        names: Their names by number.
        attempt: The attempt, fresh.
        journal: Its journal, at its begin or with what a killed server wrote.
        store: The journal's masked inputs.
    """

    def __init__(
        self,
        federation: "Federation",
        names: Mapping[int, str],
        attempt: SumRound,
        journal: Journal,
        store: VectorStore,
    ) -> None:
        self._federation = federation
        self._names = names
        self._numbers = {name: number for number, name in names.items()}
        self._attempt = attempt
        self._journal = journal
        self._store = store
        self.is_spent = False
        self.woven_at = 0.0
        self._vector = NOTHING

    def run(
        self,
        asked: Mapping[int, Request],
        on_ready: Callable[[str], None],
        begin_dispute: Callable[[], int],
    ) -> MaskedSum:
        """Do all steps and return the sum, which fits.

        Args:
            asked: What to ask each site first.
            on_ready: Is told each site that has its input.
            begin_dispute: Notes that a dispute is held, and returns how many were in the rounds before.

        Raises:
            AttemptError: The attempt failed; ``is_spent`` says whether its inputs can be used again.
        """
        attempt, quorum = self._attempt, self._attempt.consortium.quorum
        views, level = attempt.views, attempt.level

        def take_ready(site: int, body: bytes) -> None:
            attempt.add_ready(site, body)

        def take_masked(site: int, body: bytes) -> None:
            attempt.add_masked(site, body, self._vector)

        self._gather("ready", asked, take_ready, quorum, lambda site: on_ready(self._names[site]))
        self.woven_at = time.perf_counter()
        self._each("mask", attempt.weave(), take_masked, quorum)
        if level != "sum":
            self._each(
                "beacon", dict.fromkeys(views.masked, attempt.masked_roll()), attempt.add_beacon, quorum
            )
            roll = attempt.beacon_roll()
            self.is_spent = True
            self._each("sketch", dict.fromkeys(views.beacons, roll), attempt.add_sketch, quorum)
        if level == "gram":
            bodies = attempt.hold(self._journal.choice(holding.fresh_challenge))
            needed = max(quorum, 2 * attempt.consortium.charter.max_colluding + 1)
            self._each("hold", bodies, attempt.add_products, needed)
        try:
            accepted = attempt.accept()
        except Disputed as error:
            raise AttemptError(str(error), self._verdict(None, begin_dispute())) from None
        while True:
            is_all = bool(attempt.excluded) and level != "sketch"  # see SumRound.shrink
            needed = len(attempt.inside) if is_all else quorum
            self._each("accept", dict.fromkeys(attempt.inside, accepted), attempt.add_ack, needed)
            if not attempt.needs_shrinking:
                break
            accepted = attempt.shrink()
        roll = attempt.ack_roll()
        self.is_spent = True
        threshold = attempt.consortium.charter.threshold
        self._each("unmask", dict.fromkeys(views.acks, roll), attempt.add_unmask, threshold)
        outcome = attempt.finish()
        if not outcome.fits:
            text = f"{attempt.session}: the sum is not the sum of the sketches"
            raise AttemptError(text, [*attempt.evidence, *self._verdict(outcome, begin_dispute())])
        return outcome

    def _each(self, step: Step, bodies: Mapping[int, bytes], take: Take, needed: int) -> None:
        self._gather(step, self._requests(step, bodies), take, needed)

    def _requests(self, step: Step, bodies: Mapping[int, bytes]) -> dict[int, Request]:
        """Return the request for each site; one object for all that get the same, which is packed once."""
        attempt, digest = self._attempt, self._federation.job.digest()
        charter, made = attempt.consortium.digest.hex(), dict[bytes, Request]()
        for body in bodies.values():
            if body not in made:
                made[body] = SecureRequest(digest, attempt.session.round, charter, step, as_vector(body))
        return {site: made[body] for site, body in bodies.items()}

    def _gather(
        self,
        step: Step,
        requests: Mapping[int, Request],
        take: Take,
        needed: int,
        on_taken: Callable[[int], None] = lambda site: None,
        on_refusal: Callable[[int, str], None] = lambda site, code: None,
    ) -> None:
        """Ask sites for a step and hand each answer to ``take``, those in the journal first."""
        answered, taken = set[int](), set[int]()

        def act(outcome: Outcome, is_told: bool) -> None:
            site, event = outcome.site, {"status": "failed", "reason": outcome.code.decode()}
            if outcome.code:
                on_refusal(site, event["reason"])
            else:
                answered.add(site)
                try:
                    take(site, outcome.body)
                except AttemptError:
                    raise
                except (ProtocolError, MessageError) as error:
                    event = {"status": "refused", "reason": str(error)}
                else:
                    taken.add(site)
                    if not is_told:
                        on_taken(site)
                    return
            if not is_told:
                self._tell(step, site, event)

        for outcome, is_told in self._journal.outcomes(step):
            self._vector = self._store.get(outcome.site) if outcome.has_vector else NOTHING
            act(outcome, is_told)
        if self._journal.is_closed(step):
            return
        tries, told = 0, list[str]()
        while True:
            left = {self._names[site]: request for site, request in requests.items() if site not in answered}
            away = []
            for name, reply in self._federation.ask(left):
                outcome = self._read(step, self._numbers[name], reply)
                self._journal.add(outcome)
                away += [name] if is_away(outcome.code.decode()) else []
                act(outcome, False)
            is_hopeless = not away or len(taken) + len(away) < needed
            is_over = step != "ready" and tries == RETRIES
            if len(taken) >= needed or is_hopeless or is_over or not self._federation.is_patient:
                break
            tries += 1
            if sorted(away) != told:
                told, number = sorted(away), self._attempt.session.round
                self._federation.tell({"event": "waiting", "round": number, "step": step, "sites": told})
            self._federation.pause()
            self._federation.greet()
        self._journal.close(step)

    def _read(self, step: Step, site: int, reply: Reply) -> Outcome:
        """Return a reply as it goes into the journal; its masked input is on disk then."""
        if not isinstance(reply, SecureReply) or reply.step != step:
            code = reply.code if isinstance(reply, Refusal) else ""
            return Outcome(step, site, code.encode("ascii", "replace")[:MAX_CODE] or b"message", b"", 0)
        self._vector = reply.masked
        is_vector = step == "mask" and reply.masked.shape == (self._attempt.length,)
        if is_vector:
            self._store.put(site, reply.masked)
        return Outcome(step, site, b"", reply.body.tobytes(), int(is_vector))

    def _tell(self, step: Step, site: int, event: Mapping[str, str]) -> None:
        about = {"event": "secure", "round": self._attempt.session.round, "step": step}
        self._federation.tell({**about, "site": self._names[site], **event})

    def _verdict(self, outcome: MaskedSum | None, num_disputes: int) -> Sequence[Evidence]:
        """Hold a dispute and return what it proves."""
        trial = Trial(self._attempt, outcome)
        limit = max(1, self._attempt.consortium.charter.max_colluding)

        def excuse(site: int, code: str) -> None:
            if code == "protocol: openings" and num_disputes >= limit:
                trial.excuse(site)

        requests = self._requests("dispute", dict.fromkeys(trial.sites, trial.request()))
        self._gather("dispute", requests, trial.add_report, len(requests), on_refusal=excuse)
        for pair in trial.disputed_pairs():
            for site, peer in (pair, pair[::-1]):

                def take(i: int, body: bytes, peer: int = peer) -> None:
                    trial.add_opening(i, peer, body)

                self._each("open", {site: trial.open_request(site, peer)}, take, 1)
        return trial.verdict()
