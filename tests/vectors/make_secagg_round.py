"""Make the test vectors of whole rounds of secure aggregation, byte for byte.

    python -m tests.vectors.make_secagg_round

writes ``secagg_round.json`` beside this file: one round of three sites at levels ``sum`` and ``sketch``, one
of four at ``gram``, with fixed keys and fixed randomness. For every message it holds the SHA-256, and the
bytes where they are few. The test runs it and compares. A vector that changes means that sites of another
version no longer understand each other: never edit one.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedvision.secagg import identity, schedule
from fedvision.secagg.codec import encode
from fedvision.secagg.member import SiteMember
from fedvision.secagg.messages import Enrolment, PairPublic, Session
from fedvision.secagg.roster import Charter, Member, Roster, colluding_bound, scale_for, threshold_for
from fedvision.secagg.schedule import Consortium
from fedvision.secagg.server import SumRound
from fedvision.secagg.transcript import make_transcript
from tests.secagg_parties import MODEL, Consort, MemoryStore, Party, ask, honest
from tests.secagg_stages import STEPS, bodies_of, taker

FILE = Path(__file__).with_name("secagg_round.json")
SITES = {"sum": 3, "sketch": 3, "gram": 4}
SIZE = 10
LARGEST_SHOWN = 400


def key_of(*purpose: object) -> bytes:
    """Return 32 bytes that depend on the purpose only."""
    return hashlib.sha256(repr(purpose).encode()).digest()


def private(name: str) -> identity.Identity:
    """Return a fixed identity."""
    return identity.Identity(Ed25519PrivateKey.from_private_bytes(key_of("identity", name)), name)


@contextmanager
def fixed_randomness() -> Iterator[None]:
    """Let the operating system's generator give SHA-256 of a counter."""
    true, drawn = os.urandom, 0

    def urandom(count: int) -> bytes:
        nonlocal drawn
        drawn += 1
        blocks = [key_of("urandom", drawn, block) for block in range(-(-count // 32))]
        return b"".join(blocks)[:count]

    os.urandom = urandom
    try:
        yield
    finally:
        os.urandom = true


def fixed_consort(level: str) -> Consort:
    """Return a consortium of which every byte is fixed."""
    numbers = range(1, SITES[level] + 1)
    identities = {number: private(f"site-{number}") for number in numbers}
    server = private("server")
    members = tuple(
        Member(number=number, name=one.name, key=one.public.hex()) for number, one in identities.items()
    )
    roster = Roster(federation="vectors", sites=members, server=server.public.hex())
    charter = Charter(
        federation="vectors",
        roster=roster.digest().hex(),
        job=key_of("job").hex(),
        layout=key_of("layout").hex(),
        size=SIZE,
        initial_weights=MODEL.hex(),
        sites=tuple(numbers),
        max_colluding=colluding_bound(len(numbers)),
        threshold=threshold_for(len(numbers)),
        smallest_cohort=3,
        smallest_cohort_waiver=True,
        rounds=1,
        max_attempts=1,
        level=level,
        clip_norm=1.0,
        scale=scale_for(len(numbers)),
        weight_cap=10,
        metric_caps=(16.0,),
    )
    consortium = Consortium(roster, charter)
    secrets, enrolments = {}, []
    for number, one in identities.items():
        secrets[number] = {peer: key_of("pair", number, peer) for peer in numbers if peer != number}
        keys = tuple(PairPublic(peer, schedule.public_of(key)) for peer, key in secrets[number].items())
        enrolments.append(schedule.sign(consortium, one, number, Enrolment(keys)))
    publics = schedule.read_enrolments(consortium, enrolments)
    parties = {}
    for number, one in identities.items():
        update = (np.arange(SIZE, dtype=np.float32) - number) / np.float32(40)
        vector = consortium.encoding.encode(update, number, [0.5 * number], key_of("rounding", number))
        parties[number] = Party(SiteMember(consortium, number, one, secrets[number], publics), vector)
    return Consort(consortium, server, parties, publics, tuple(enrolments))


def shown(data: bytes) -> dict[str, Any]:
    """Return what stands in the file for some bytes."""
    found: dict[str, Any] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return found | {"hex": data.hex()} if len(data) <= LARGEST_SHOWN else found


def make_round(level: str) -> dict[str, Any]:
    """Return the record of one honest round."""
    with fixed_randomness():
        consort = fixed_consort(level)
        consortium = consort.consortium
        record: dict[str, Any] = {
            "charter": consortium.digest.hex(),
            "pair_keys": {
                f"{number}-{peer}": key.hex()
                for number, party in consort.parties.items()
                for peer, key in party.member.pair_keys.items()
                if number < peer
            },
            "enrolments": [shown(encode(entry)) for entry in consort.enrolments],
            "inputs": {str(number): party.vector.tolist() for number, party in consort.parties.items()},
            "steps": [],
        }
        length, bound = consortium.encoding.length, consortium.encoding.norm_bound
        session = Session("train", 1, 1)
        attempt = SumRound(
            consortium, consort.publics, consort.server, session, MODEL, length, bound, MemoryStore()
        )
        for step in STEPS[level]:
            record["steps"].append(make_step(consort, attempt, step))
        outcome = attempt.finish()
        record |= {
            "tau": attempt.tau.hex(),
            "beta": attempt.beta.hex(),
            "gram": attempt.gram.tolist(),
            "sum": outcome.total.tolist(),
            "fits": outcome.fits,
            "transcript": shown(encode(make_transcript(attempt, outcome))),
        }
    return record


def make_step(consort: Consort, attempt: SumRound, step: str) -> dict[str, Any]:
    """Do a step and return what the server and every site sent."""
    bodies = dict.fromkeys(consort.parties, attempt.offer()) if step == "ready" else bodies_of(attempt, step)
    sent: dict[str, Any] = {}
    take: Callable[..., None] = taker(attempt, step)

    def note(site: int, name: str, answer: bytes, masked: np.ndarray) -> tuple[bytes, np.ndarray] | None:
        sent[str(site)] = shown(answer) | ({"masked": masked.tolist()} if masked.size else {})
        return honest(site, name, answer, masked)

    ask(consort, step, bodies, take, note, [])
    return {"step": step, "server": {str(site): shown(body) for site, body in bodies.items()}, "sites": sent}


def text_of() -> str:
    """Return the content of the file as it must be."""
    return json.dumps({level: make_round(level) for level in SITES}, indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text_of())
