"""A consortium in memory: real keys, real messages, no files; tests drive it message by message."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedvision.errors import MessageError, ProtocolError
from fedvision.secagg import identity, schedule, site_sketch
from fedvision.secagg import site as steps
from fedvision.secagg.attempt import MaskedSum
from fedvision.secagg.codec import decode, encode
from fedvision.secagg.dispute import Trial, open_pair, report
from fedvision.secagg.messages import Enrolment, PairPublic, Purpose, Session, Signed
from fedvision.secagg.roster import Charter, Member, Roster, colluding_bound, scale_for, threshold_for
from fedvision.secagg.schedule import Consortium
from fedvision.secagg.server import SumRound
from fedvision.secagg.site_state import Marks, SiteSession

MODEL = bytes(range(32))
Vector = np.ndarray


@dataclass
class Party:
    """A site with its state in memory. A test makes a liar of it by changing ``step``'s answer."""

    member: steps.SiteMember
    vector: Vector
    marks: Marks = field(default_factory=lambda: Marks(0, 0, ()))
    state: SiteSession | None = None

    def begin(self, offer: bytes, model: bytes = MODEL) -> bytes:
        self.marks, self.state, answer = steps.begin(self.member, self.marks, offer, model, self.vector)
        return answer

    def step(self, name: str, body: bytes) -> tuple[bytes, Vector]:
        """Do a step as ``fedvision_sites.secure`` does; return the answer and the masked input."""
        assert self.state is not None
        masked = np.zeros(0, np.uint32)
        arguments = (self.member, self.marks, self.state, body)
        if name == "mask":
            self.marks, self.state, answer, found = steps.mask(*arguments, self.vector.copy())
            masked = masked if found is None else found
        elif name == "beacon":
            self.marks, self.state, answer = site_sketch.reveal_beacon(*arguments)
        elif name == "sketch":
            self.marks, self.state, answer = site_sketch.send_sketch(*arguments, self.vector)
        elif name == "hold":
            self.marks, self.state, answer = site_sketch.hold(*arguments, self.vector)
        elif name == "accept":
            self.marks, self.state, answer = steps.acknowledge(*arguments)
        elif name == "unmask":
            self.marks, self.state, answer = steps.unmask(*arguments)
        elif name == "dispute":
            self.marks, self.state, answer = report(*arguments, self.vector)
        elif name == "open":
            self.marks, self.state, answer = open_pair(*arguments, self.vector.size)
        else:
            raise ValueError(name)
        return answer, masked


class MemoryStore:
    """Keeps masked inputs in a dict."""

    def __init__(self) -> None:
        self.vectors: dict[int, Vector] = {}

    def put(self, site: int, vector: Vector) -> None:
        self.vectors[site] = vector.copy()

    def get(self, site: int) -> Vector:
        return self.vectors[site]


@dataclass
class Consort:
    """All parties of a job."""

    consortium: Consortium
    server: identity.Identity
    parties: dict[int, Party]
    publics: dict[tuple[int, int], bytes]
    enrolments: tuple[Signed, ...]

    def attempt(
        self, number: int = 1, attempt: int = 1, purpose: Purpose = "train", model: bytes = MODEL
    ) -> SumRound:
        """Return a fresh attempt of the server."""
        length = next(iter(self.parties.values())).vector.size
        session = Session(purpose, number, attempt)
        bound = float(self.consortium.encoding.norm_bound)
        return SumRound(
            self.consortium, self.publics, self.server, session, model, length, bound, MemoryStore()
        )


def gather(
    num_sites: int, level: str = "sum", size: int = 40, smallest_cohort: int = 3, **charter: object
) -> Consort:
    """Return a consortium of ``num_sites`` whose inputs are random compliant vectors."""
    names = [f"site-{number}" for number in range(1, num_sites + 1)]
    identities = {number: identity.generate(name) for number, name in enumerate(names, 1)}
    server = identity.generate("server")
    members = tuple(
        Member(number=number, name=one.name, key=one.public.hex()) for number, one in identities.items()
    )
    roster = Roster(federation="test", sites=members, server=server.public.hex())
    settings: dict[str, object] = {
        "federation": "test",
        "roster": roster.digest().hex(),
        "job": "0" * 64,
        "layout": "1" * 64,
        "size": size,
        "initial_weights": MODEL.hex(),
        "sites": tuple(identities),
        "max_colluding": colluding_bound(num_sites),
        "threshold": threshold_for(num_sites),
        "smallest_cohort": smallest_cohort,
        "smallest_cohort_waiver": smallest_cohort < 5,
        "rounds": 100,
        "max_attempts": 100,
        "level": level,
        "clip_norm": 1.0,
        "scale": scale_for(num_sites),
        "weight_cap": 10,
        "metric_caps": (16.0,),
    }
    consortium = Consortium(roster, Charter(**{**settings, **charter}))  # type: ignore[arg-type]
    secrets, enrolments = {}, []
    for number, one in identities.items():
        secrets[number], publics = schedule.make_pair_keys([i for i in identities if i != number])
        message = Enrolment(tuple(PairPublic(peer, key) for peer, key in publics.items()))
        enrolments.append(schedule.sign(consortium, one, number, message))
    publics = schedule.read_enrolments(consortium, enrolments)
    rng = np.random.default_rng(num_sites)
    parties = {}
    for number, one in identities.items():
        update = rng.normal(size=size)
        update = (update / np.linalg.norm(update)).astype(np.float32) * np.float32(0.99)
        vector = consortium.encoding.encode(update, int(rng.integers(1, 20)), [1.5], rng.bytes(32))
        member = steps.SiteMember(consortium, number, one, secrets[number], publics)
        parties[number] = Party(member, vector)
    return Consort(consortium, server, parties, publics, tuple(enrolments))


Lie = Callable[[int, str, bytes, Vector], tuple[bytes, Vector] | None]
"""From site, step, honest answer and masked input to what is sent; None is silence."""


def honest(site: int, step: str, answer: bytes, masked: Vector) -> tuple[bytes, Vector] | None:
    """Send what the protocol says."""
    return answer, masked


def ask(
    consort: Consort,
    step: str,
    bodies: Mapping[int, bytes],
    take: Callable[..., None],
    lie: Lie,
    refused: list[tuple[int, str, str]],
) -> None:
    """Carry one step: what sites or server refuse is noted as (site, step, rule), not raised."""
    for site, body in bodies.items():
        party = consort.parties[site]
        try:
            if step == "ready":
                answer, masked = party.begin(body), np.zeros(0, np.uint32)
            else:
                answer, masked = party.step(step, body)
        except ProtocolError as error:
            refused.append((site, step, f"site: {error.rule}"))
            continue
        sent = lie(site, step, answer, masked)
        if sent is None:
            continue
        try:
            take(site, *sent) if step == "mask" else take(site, sent[0])
        except ProtocolError as error:
            refused.append((site, step, f"server: {error.rule}"))
        except MessageError:
            refused.append((site, step, "server: message"))


def run(
    consort: Consort,
    attempt: SumRound,
    lie: Lie = honest,
    refused: list[tuple[int, str, str]] | None = None,
    sites: Iterable[int] | None = None,
) -> MaskedSum:
    """Run an attempt to its sum, as ``fedvision_server.secure`` does.

    Raises:
        AttemptError: It cannot be finished.
    """
    notes = [] if refused is None else refused
    who = list(consort.parties if sites is None else sites)

    def each(step: str, bodies: Mapping[int, bytes], take: Callable[..., None]) -> None:
        ask(consort, step, bodies, take, lie, notes)

    each("ready", dict.fromkeys(who, attempt.offer()), attempt.add_ready)
    each("mask", attempt.weave(), attempt.add_masked)
    if attempt.level != "sum":
        each("beacon", dict.fromkeys(attempt.views.masked, attempt.masked_roll()), attempt.add_beacon)
        each("sketch", dict.fromkeys(attempt.views.beacons, attempt.beacon_roll()), attempt.add_sketch)
    if attempt.level == "gram":
        each("hold", attempt.hold(), attempt.add_products)
    accepted = attempt.accept()
    each("accept", dict.fromkeys(attempt.inside, accepted), attempt.add_ack)
    while attempt.needs_shrinking:
        accepted = attempt.shrink()
        each("accept", dict.fromkeys(attempt.inside, accepted), attempt.add_ack)
    each("unmask", dict.fromkeys(attempt.views.acks, attempt.ack_roll()), attempt.add_unmask)
    return attempt.finish()


def try_liars(
    consort: Consort, attempt: SumRound, outcome: MaskedSum | None, lie: Lie = honest
) -> dict[int, str]:
    """Hold the dispute about a sum that does not fit; return the rule that each liar broke."""
    trial, notes = Trial(attempt, outcome), []
    ask(consort, "dispute", dict.fromkeys(trial.sites, trial.request()), trial.add_report, lie, notes)
    for pair in trial.disputed_pairs():
        for site, peer in (pair, pair[::-1]):

            def take(one: int, body: bytes, peer: int = peer) -> None:
                trial.add_opening(one, peer, body)

            ask(consort, "open", {site: trial.open_request(site, peer)}, take, lie, notes)
    return {item.site: item.rule for item in trial.verdict()}


def true_sum(consort: Consort, sites: Iterable[int]) -> Vector:
    """Return the sum of inputs mod 2**32."""
    total = np.zeros(next(iter(consort.parties.values())).vector.size, np.uint32)
    for site in sites:
        total += consort.parties[site].vector
    return total


def resign(consort: Consort, site: int, signed_bytes: bytes, kind: type, **changes: object) -> bytes:
    """Return a site's signed message with some fields changed and a fresh signature."""
    signed = decode(signed_bytes, Signed)
    message = dataclasses.replace(decode(signed.body, kind), **changes)
    return encode(consort.parties[site].member.sign(message))
