import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvision.defence.evidence import Past, Record
from fedvision.defence.geometry import Geometry, from_gram, from_sketches, from_vectors
from fedvision.defence.judge import LONGEST_REASON, Judgement, judge
from fedvision.defence.rules import RULES
from fedvision.errors import DefenceError
from tests.test_defence_geometry import CLIP_NORM, SIZE, sketched
from tests.test_defence_rules import geometry, kinds

ALL = ("norm", "clones", "opposition", "spectral")


def reversed_ones(seed: int = 1, rows: tuple[int, ...] = (1, 5)) -> np.ndarray:
    """Honest updates but for some rows, which undo the mean of the others with noise of their own."""
    vectors = kinds(seed)
    mean = np.delete(vectors, rows, axis=0).mean(0)
    length = np.median(np.linalg.norm(vectors, axis=1))
    for row in rows:
        noise = np.random.default_rng(row).normal(size=SIZE)
        direction = -mean / np.linalg.norm(mean) + 0.5 * noise / np.linalg.norm(noise)
        vectors[row] = length * direction / np.linalg.norm(direction)
    return vectors


def test_attackers_are_left_out_with_numbers_for_a_reason() -> None:
    found = judge(geometry(reversed_ones()), ALL, 0.2, 3)
    assert found.excluded == (2, 6)
    assert found.accepted == (1, 3, 4, 5, 7, 8, 9, 10)
    one = found.sites[1]
    assert one.site == 2
    assert one.reason.startswith("opposition 0.")
    assert "> 0.6" in one.reason
    assert one.standing == "warned"
    assert one.cosine < -0.5 < found.sites[0].cosine
    assert found.sites[0].reason == ""
    assert found.sites[0].standing == "good"


@pytest.mark.parametrize("seed", range(4))
def test_clear_updates_sketches_and_inner_products_give_the_same_decisions(seed: int) -> None:
    pasts = [Past(), Past(), Past()]
    for number in range(4):
        vectors = reversed_ones(10 * seed + number) * np.float32(0.7**number)
        clear, gram, unit = sketched(vectors, number)
        geometries = (
            geometry(vectors),
            from_sketches(range(1, 11), clear, 0.25),
            from_gram(range(1, 11), gram, unit, 0.25),
        )
        found = [judge(one, ALL, 0.2, 3, past) for one, past in zip(geometries, pasts, strict=True)]
        assert [one.excluded for one in found] == [(2, 6)] * 3
        pasts = [one.past for one in found]
    assert [past.quarantined for past in pasts] == [(2, 6)] * 3


@pytest.mark.parametrize("is_sketched", [False, True])
def test_honest_sites_of_a_rare_kind_are_never_warned(is_sketched: bool) -> None:
    past = Past()
    for number in range(8):
        vectors = kinds(number) * np.float32(0.8**number)
        clear = sketched(vectors, number)[0] if is_sketched else None
        one = geometry(vectors) if clear is None else from_sketches(range(1, 11), clear, 0.25)
        found = judge(one, ALL, 0.2, 3, past)
        assert found.excluded == ()
        past = found.past
    assert all(record.standing == "good" for record in past.records.values())


def test_no_more_are_left_out_than_the_protocol_can_do_without() -> None:
    vectors = kinds(1)
    vectors[[0, 2, 4, 6]] = CLIP_NORM * np.array([[2.0], [3.0], [2.5], [4.0]]) * np.eye(4, SIZE)
    found = judge(geometry(vectors), ALL, 0.4, 3)
    assert found.excluded == (3, 5, 7)
    kept = found.sites[0]
    assert not kept.is_excluded
    assert kept.reason.startswith("kept, at most 3 may be left out; norm 2 > 1.1")
    assert judge(geometry(vectors), ALL, 0.4, 0).excluded == ()


def test_a_weak_but_steady_pull_against_the_others_adds_up() -> None:
    past, seen = Past(), []
    for number in range(4):
        vectors = kinds(number)
        mean = vectors[2:].mean(0)
        mean *= np.median(np.linalg.norm(vectors, axis=1)) / np.linalg.norm(mean)
        noise = np.random.default_rng(100 + number).normal(size=SIZE)
        vectors[0] = -0.55 * mean + 0.85 * noise * np.linalg.norm(mean) / np.linalg.norm(noise)
        found = judge(geometry(vectors), ("opposition",), 0.2, 3, past)
        past = found.past
        seen.append(found.excluded)
        assert found.sites[0].scores[0] is not None
        assert found.sites[0].scores[0] < found.limits[0]
    assert seen[0] == ()
    assert seen[1:] == [(1,)] * 3
    assert found.sites[0].reason.endswith("over 4 rounds")
    assert past.of(1).standing == "quarantined"


def test_two_who_undo_the_work_of_all_do_not_make_a_third_look_so() -> None:
    vectors = np.zeros((10, 12))
    vectors[:7, 0] = 0.9
    vectors[range(7), range(2, 9)] = np.sqrt(1 - 0.9**2)
    vectors[7, :2] = -0.39, 0.92  # of another kind
    vectors[8:, :2] = -0.7, -0.71
    one = from_vectors(range(1, 11), vectors, 2.0)
    assert RULES["opposition"](one, 0.2).outside.nonzero()[0].tolist() == [7, 8, 9]
    assert judge(one, ("opposition",), 0.2, 3).excluded == (9, 10)


def test_quarantined_sites_are_left_out_first_and_not_judged() -> None:
    held = Record(0.7, "quarantined", 5, 4)
    found = judge(geometry(reversed_ones()), ALL, 0.2, 2, Past({10: held}))
    assert len(found.excluded) == 2
    assert 10 in found.excluded
    site = found.sites[9]
    assert site.scores == (None,) * 4
    assert site.reason == "in quarantine, outside in 4 of 5 rounds"
    assert found.past.of(10) == held
    assert judge(geometry(kinds()), ALL, 0.2, 2, Past({10: held}).lifted(10)).excluded == ()


def test_after_quarantine_too_few_to_compare_are_accepted() -> None:
    vectors = kinds()[:5]
    past = Past({number: Record(0.7, "quarantined", 3, 3) for number in (1, 2)})
    found = judge(geometry(vectors), ALL, 0.2, 2, past)
    assert found.excluded == (1, 2)


def test_no_rules_accept_everybody() -> None:
    found = judge(geometry(reversed_ones()), (), 0.2, 3)
    assert found.excluded == ()
    assert found.limits == ()


def test_rules_that_cannot_be_used_are_refused() -> None:
    few = geometry(kinds()[:3])
    with pytest.raises(DefenceError, match="there is no rule 'median'"):
        judge(few, ("median",), 0.2, 0)
    with pytest.raises(DefenceError, match="rule spectral needs 4 sites in a round, got 3"):
        judge(few, ("spectral",), 0.2, 0)
    with pytest.raises(DefenceError, match="needs a root set"):
        judge(few, ("root_cosine",), 0.2, 0)
    with pytest.raises(ValueError, match="most_excluded"):
        judge(few, ("norm",), 0.2, 3)


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(7, 12),
    most=st.integers(0, 4),
    share=st.sampled_from([0.1, 0.2, 0.3, 0.4]),
    sizes=st.lists(st.floats(0, 8), min_size=12, max_size=12),
)
@settings(max_examples=60)
def test_a_judgement_keeps_its_promises_on_any_updates(
    seed: int, count: int, most: int, share: float, sizes: list[float]
) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, 12)) * np.array(sizes[:count])[:, None]
    root = rng.normal(size=12)
    one = from_vectors(range(1, count + 1), vectors, 2.0, root)
    rules = [rule for rule in RULES if rule != "multi_krum" or count >= 11]
    past = Past()
    for _ in range(4):
        found = judge(one, rules, share, most, past)
        assert len(found.excluded) <= most
        assert sorted(found.excluded + found.accepted) == list(range(1, count + 1))
        assert found == judge(one, rules, share, most, past)
        text = json.dumps(found.to_json())
        assert Judgement.from_json(json.loads(text)) == found
        assert json.dumps(Judgement.from_json(json.loads(text)).to_json()) == text
        for site in found.sites:
            assert site.reason.isascii()
            assert len(site.reason) <= LONGEST_REASON
            assert bool(site.reason) >= site.is_excluded
        past = found.past


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_the_order_of_the_sites_changes_no_decision(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(10, 30)) + rng.normal(size=30)
    vectors[:2] *= -rng.uniform(0.5, 4, size=(2, 1))
    order = rng.permutation(10)
    gram = vectors @ vectors.T / 100
    one = judge(Geometry(tuple(range(1, 11)), gram), ALL, 0.2, 3)
    sites = tuple(int(row) + 1 for row in order)
    other = judge(Geometry(sites, gram[np.ix_(order, order)]), ALL, 0.2, 3)
    assert one.excluded == other.excluded


def content() -> dict[str, Any]:
    return judge(geometry(reversed_ones()), ALL, 0.2, 3).to_json()


CHANGES: list[tuple[list[Any], Any]] = [
    ([], None), (["rules"], ["median"] * 4), (["rules"], "norm"), (["rules", 0], ["norm"]),
    (["limits"], [1.0]), (["limits", 0], None), (["limits", 0], "1"), (["mean_limits"], []),
    (["sites"], {}), (["past"], []), (["sites", 0], []), (["sites", 0, "site"], "1"),
    (["sites", 0, "site"], True), (["sites", 0, "excluded"], 1), (["sites", 0, "norm"], None),
    (["sites", 0, "norm"], float("inf")), (["sites", 0, "scores"], [1.0]),
    (["sites", 0, "scores", 0], "x"), (["sites", 0, "means"], None), (["sites", 0, "reason"], "x" * 121),
    (["sites", 0, "reason"], "\u00e4"), (["sites", 0, "reason"], 5), (["sites", 0, "standing"], "bad"),
    (["sites", 0, "root_cosine"], []), (["extra"], 1), (["sites", 0, "extra"], 1),
]  # fmt: skip


@pytest.mark.parametrize(("where", "value"), CHANGES)
def test_a_judgement_that_is_none_is_refused(where: list[Any], value: object) -> None:
    whole: Any = copy.deepcopy(content())
    assert Judgement.from_json(whole).excluded == (2, 6)
    if where:
        part = whole
        for key in where[:-1]:
            part = part[key]
        part[where[-1]] = value
    else:
        whole = value
    with pytest.raises(DefenceError):
        Judgement.from_json(whole)
