import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedvision.defence.evidence import QUARANTINED_AT, STEADY_ROUNDS, WARNED_AT, Mean, Past, Record
from fedvision.errors import DefenceError

scores = st.floats(-2, 2)


def after(*outside: bool) -> Record:
    record = Record()
    for is_outside in outside:
        record = record.after_round(is_outside)
    return record


def test_a_site_is_warned_first_and_quarantined_after_three_rounds_outside_in_a_row() -> None:
    assert after(False, False).standing == "good"
    assert after(True).standing == "warned"
    assert after(True, True).standing == "warned"
    assert after(True, True, True).standing == "quarantined"
    assert after(True, True, True).num_outside == 3


def test_a_site_that_is_outside_now_and_then_is_never_quarantined() -> None:
    every_third = after(*[number % 3 == 0 for number in range(60)])
    assert every_third.standing != "quarantined"
    assert after(True, False, False).standing == "good"
    assert after(True, False, True, False, True).momentum <= QUARANTINED_AT


@given(st.lists(st.booleans(), max_size=30))
def test_momentum_is_a_share_and_quarantine_lasts(outside: list[bool]) -> None:
    record = after(*outside)
    assert 0 <= record.momentum <= 1
    assert record.num_rounds == len(outside)
    assert (record.momentum > WARNED_AT) <= (record.standing != "good")
    if record.standing == "quarantined":
        for _ in range(20):
            record = record.after_round(False)
        assert record.standing == "quarantined"


@given(st.lists(st.tuples(scores, st.floats(0.01, 1)), min_size=1, max_size=20))
def test_a_mean_lies_between_its_scores(rounds: list[tuple[float, float]]) -> None:
    mean = Mean()
    for score, weight in rounds:
        mean = mean.after(score, weight)
    assert min(score for score, _ in rounds) - 1e-3 <= mean.value <= max(score for score, _ in rounds) + 1e-3
    assert mean.rounds == len(rounds)


def test_rounds_that_move_the_model_more_count_more_and_late_ones_more_than_early_ones() -> None:
    assert Mean().after(1.0, 3.0).after(0.0, 1.0).value > 0.5
    assert Mean().after(1.0, 1.0).after(0.0, 1.0).value < 0.5
    assert Mean().value == 0.0
    assert STEADY_ROUNDS >= 2


def test_lifting_a_quarantine_begins_anew() -> None:
    past = Past({3: after(True, True, True), 1: after(True)})
    assert past.quarantined == (3,)
    assert past.lifted(3).quarantined == ()
    assert past.lifted(3).of(3) == Record()
    assert past.lifted(3).of(1) == past.of(1)
    assert past.quarantined == (3,)


@given(
    st.dictionaries(
        st.integers(1, 255), st.tuples(st.lists(st.booleans(), max_size=6), st.lists(scores, max_size=4))
    )
)
def test_what_is_kept_survives_writing_and_reading(
    content: dict[int, tuple[list[bool], list[float]]],
) -> None:
    records = {}
    for site, (outside, values) in content.items():
        record = after(*outside)
        for value in values:
            record = record.with_score("opposition", value, 0.5)
        records[site] = record
    past = Past().updated(records)
    text = json.dumps(past.to_json())
    assert Past.from_json(json.loads(text)) == past
    assert json.dumps(Past.from_json(json.loads(text)).to_json()) == text


GOOD: dict[str, Any] = {
    "momentum": 0.3, "standing": "warned", "rounds": 2, "outside": 1, "means": {"opposition": [0.5, 1.0, 2]}
}  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {"one": GOOD},
        {"01": GOOD},
        {"-1": GOOD},
        {"9999": GOOD},
        {"1": {}},
        {"1": {**GOOD, "more": 1}},
        {"1": {**GOOD, "momentum": "0.3"}},
        {"1": {**GOOD, "momentum": float("nan")}},
        {"1": {**GOOD, "momentum": 10**400}},
        {"1": {**GOOD, "momentum": True}},
        {"1": {**GOOD, "standing": "expelled"}},
        {"1": {**GOOD, "standing": 3}},
        {"1": {**GOOD, "rounds": -1}},
        {"1": {**GOOD, "rounds": 1.0}},
        {"1": {**GOOD, "means": []}},
        {"1": {**GOOD, "means": {"opposition": [0.5, 1.0]}}},
        {"1": {**GOOD, "means": {"opposition": [0.5, None, 2]}}},
    ],
)
def test_a_past_that_is_none_is_refused(content: object) -> None:
    assert Past.from_json({"1": GOOD}).of(1).mean("opposition").value == 0.5
    with pytest.raises(DefenceError):
        Past.from_json(content)
