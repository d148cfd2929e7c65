"""Rules under secure aggregation: what is measured, who is left out, what a site hears, false products."""

import numpy as np
import pytest

from fedvision.errors import MessageError, ProtocolError
from fedvision.secagg import gram, holding
from fedvision.secagg import site as steps
from fedvision.secagg.attempt import Measured, Selected
from fedvision.secagg.codec import encode
from fedvision.secagg.messages import Holding, Products, Session
from fedvision.secagg.server import SumRound
from fedvision.secagg.sketch import TAIL, sketch
from fedvision_server.defence import geometry_of
from tests.secagg_parties import MODEL, Consort, MemoryStore, Vector, gather, resign, run, true_sum
from tests.secagg_stages import named, opened, play, reach, refuses, resay

RULES = {"rules": ("norm", "root_cosine"), "releases": ("judgements",), "root_set": "ab" * 32}
Answer = tuple[bytes, Vector]


def select_nobody(measured: Measured) -> Selected:
    return Selected(frozenset(), b"{}")


def attempt_of(consort: Consort, select: object = select_nobody, seed: int = 5) -> SumRound:
    """Return an attempt that knows a root set's update."""
    encoding = consort.consortium.encoding
    update = np.random.default_rng(seed).normal(size=encoding.length)
    update[encoding.size :] = 0
    root = np.rint(update / np.linalg.norm(update) * encoding.scale * 0.9).astype(np.int32).view(np.uint32)
    bound, session = float(encoding.norm_bound), Session("train", 1, 1)
    return SumRound(
        consort.consortium, consort.publics, consort.server, session, MODEL, encoding.length, bound,
        MemoryStore(), 1, select, root,
    )  # fmt: skip


def test_what_is_measured_at_level_gram_are_the_inner_products_of_the_rounded_sketches() -> None:
    consort = gather(7, "gram", **RULES)
    attempt = attempt_of(consort)
    assert run(consort, attempt).fits
    bound = consort.consortium.encoding.norm_bound
    rows = np.array(
        [gram.round_sketch(sketch(p.vector, attempt.beta, TAIL), bound) for p in consort.parties.values()]
    )
    public = holding.root_values(attempt.root_sketch)
    measured = attempt.measured
    assert measured is not None and measured.sites == (1, 2, 3, 4, 5, 6, 7)
    assert np.array_equal(measured.gram, rows @ rows.T)
    assert measured.root is not None and np.array_equal(measured.root, rows @ public)
    assert measured.root_square == public @ public
    assert measured.most_excluded == 7 - consort.consortium.quorum


def test_what_is_measured_at_level_sketch_has_no_loss_and_no_weight_in_it() -> None:
    """Short updates with a weight of half a clip norm: mixed terms would be as large as the updates."""
    charter = {**RULES, "weight_cap": 1, "size": 12_000}
    consort = gather(9, "sketch", **charter)
    encoding, rng = consort.consortium.encoding, np.random.default_rng(1)
    updates = rng.normal(size=(9, 12_000)) + rng.normal(size=12_000)
    updates *= 0.02 / np.linalg.norm(updates, axis=1, keepdims=True)
    for row, party in enumerate(consort.parties.values()):
        party.vector = encoding.encode(updates[row].astype(np.float32), 3, [float(row)], rng.bytes(32))
    attempt = attempt_of(consort)
    assert run(consort, attempt).fits and attempt.measured is not None
    found = geometry_of(attempt.measured, encoding, has_tail=False)
    assert np.abs(found.gram - updates @ updates.T).max() < 0.1 * 0.02**2
    assert np.abs(found.root_cosines()).max() < 0.1


def test_what_is_measured_at_level_gram_is_as_good() -> None:
    charter = {**RULES, "weight_cap": 1, "size": 12_000}
    consort = gather(10, "gram", **charter)
    encoding, rng = consort.consortium.encoding, np.random.default_rng(1)
    updates = rng.normal(size=(10, 12_000)) + rng.normal(size=12_000)
    updates *= 0.02 / np.linalg.norm(updates, axis=1, keepdims=True)
    for row, party in enumerate(consort.parties.values()):
        party.vector = encoding.encode(updates[row].astype(np.float32), 3, [0.5], rng.bytes(32))
    attempt = attempt_of(consort)
    assert run(consort, attempt).fits and attempt.measured is not None
    found = geometry_of(attempt.measured, encoding, has_tail=True)
    assert np.abs(found.gram - updates @ updates.T).max() < 0.1 * 0.02**2


@pytest.mark.parametrize("level", ["sketch", "gram"])
def test_who_is_left_out_is_not_in_the_sum_and_hears_of_it(level: str) -> None:
    consort = gather(10, level, **RULES)
    attempt = attempt_of(consort, lambda measured: Selected(frozenset({2, 9}), b'{"x":1}'))
    outcome = run(consort, attempt)
    assert outcome.fits and attempt.excluded == {2: "by the rules", 9: "by the rules"}
    assert np.array_equal(outcome.total, true_sum(consort, [1, 3, 4, 5, 6, 7, 8, 10]))
    party = consort.parties[9]
    assert party.state is not None
    accepted = encode(attempt.said["Accepted"])
    heard = steps.hear(party.member, party.state, accepted)
    assert heard.judgement == b'{"x":1}' and [item.site for item in heard.excluded] == [2, 9]
    with pytest.raises(ProtocolError) as caught:
        steps.hear(consort.parties[1].member, consort.parties[1].state, accepted)  # type: ignore[arg-type]
    assert caught.value.rule == "accepted-set"


def test_a_holder_that_lies_about_the_root_set_is_named() -> None:
    consort = gather(10, "gram", **RULES)

    def lie(site: int, step: str, answer: bytes, masked: Vector) -> Answer:
        if site == 4 and step == "hold":
            values = np.frombuffer(opened(answer, Products).root, "<u8").copy()
            values[3] ^= np.uint64(1)
            return resign(consort, 4, answer, Products, root=values.tobytes()), masked
        return answer, masked

    found, outcome = named(consort, attempt_of(consort), lie)
    assert found == {4: "products"} and outcome is None


def test_a_site_refuses_a_root_set_that_its_charter_does_not_name() -> None:
    consort = gather(7, "gram")
    _, bodies = reach(consort, "hold")
    message = resay(consort, bodies[3], Holding, root=np.ones(2048, "<i4").tobytes())
    refuses(consort.parties[3], "hold", message, "root-set")


@pytest.mark.parametrize(
    "root",
    [b"", np.ones(2047, "<i4").tobytes(), np.full(2048, 1 << 20, "<i4").tobytes()],
    ids=["none", "short", "long"],
)
def test_a_site_refuses_a_root_set_that_is_absent_or_no_update(root: bytes) -> None:
    consort = gather(7, "gram", **RULES)
    attempt = attempt_of(consort)
    bodies = play(consort, attempt, stop="hold")
    party = consort.parties[3]
    with pytest.raises(MessageError if root else ProtocolError):
        party.step("hold", resay(consort, bodies[3], Holding, root=root))


def test_the_rules_see_nobody_whose_norm_is_above_the_bound() -> None:
    consort = gather(7, "gram", **RULES)
    party = consort.parties[2]
    party.vector[:40] = (party.vector[:40].astype(np.int32) * 3).astype(np.uint32)
    attempt = attempt_of(consort)
    run(consort, attempt)
    assert attempt.measured is not None and attempt.measured.sites == (1, 3, 4, 5, 6, 7)
    assert attempt.measured.most_excluded == 6 - consort.consortium.quorum
