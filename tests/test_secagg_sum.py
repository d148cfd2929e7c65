"""The masked sum over honest sites that come, stay away and vanish: exact, whatever happens."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvision.secagg.attempt import AttemptError
from fedvision.secagg.member import vector_digest
from fedvision.secagg.roster import threshold_for
from tests.secagg_parties import Vector, gather, run, true_sum, try_liars

STEPS = ("ready", "mask", "beacon", "sketch", "hold", "accept", "unmask")


@pytest.mark.parametrize("level", ["sum", "sketch", "gram"])
@pytest.mark.parametrize("num_sites", [3, 4, 5, 9, 13])
def test_the_sum_of_all_is_exact(level: str, num_sites: int) -> None:
    if level == "gram" and num_sites == 3:
        pytest.skip("gram needs four sites")
    consort = gather(num_sites, level)
    attempt = consort.attempt()
    outcome = run(consort, attempt)
    assert outcome.fits
    assert attempt.inside == tuple(consort.parties)
    assert np.array_equal(outcome.total, true_sum(consort, consort.parties))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_drop_outs_at_random_steps_leave_the_sum_of_the_others_or_nothing(data: st.DataObject) -> None:
    num_sites = data.draw(st.integers(5, 12), label="n")
    level = data.draw(st.sampled_from(["sum", "sketch", "gram"]), label="level")
    sites = range(1, num_sites + 1)
    gone = data.draw(
        st.dictionaries(st.sampled_from(list(sites)), st.sampled_from(STEPS), max_size=5), label="gone"
    )

    def lie(site: int, step: str, answer: bytes, masked: Vector) -> tuple[bytes, Vector] | None:
        return None if site in gone and STEPS.index(step) >= STEPS.index(gone[site]) else (answer, masked)

    consort = gather(num_sites, level)
    attempt = consort.attempt()
    remaining = num_sites - len(gone)
    try:
        outcome = run(consort, attempt, lie)
    except AttemptError as error:
        late = level != "sketch" and len(set(gone.values())) > 1  # one is left out, another one vanishes
        assert remaining < threshold_for(num_sites) or (late and error.absent <= set(gone))
        return
    assert set(attempt.inside) >= set(sites) - set(gone)
    assert np.array_equal(outcome.total, true_sum(consort, attempt.inside))
    assert outcome.fits


def test_a_liar_about_its_sketch_is_named_and_nobody_else() -> None:
    consort = gather(7, "sketch")
    honest_vector = consort.parties[3].vector.copy()
    attempt = consort.attempt()

    def lie(site: int, step: str, answer: bytes, masked: Vector) -> tuple[bytes, Vector]:
        if site == 3 and step == "mask":
            consort.parties[3].vector[:] = (honest_vector.astype(np.int32) // 2).astype(
                np.uint32
            )  # sketches another input than it masked
            state = consort.parties[3].state
            consort.parties[3].state = dataclasses.replace(
                state, input_digest=vector_digest(consort.parties[3].vector)
            )
        return answer, masked

    outcome = run(consort, attempt, lie)
    assert not outcome.fits
    assert try_liars(consort, attempt, outcome, lie) == {3: "row"}
