"""The defence in whole runs: who is left out, what is written and told, what people decide."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvision.audit.verify import verify_run
from fedvision.config import parse_job
from fedvision.errors import ConfigError, DataError, DefenceError
from fedvision.report.page import write_report
from fedvision.secagg.agreement import load_consortium
from fedvision.secagg.identity import parse_public
from fedvision.secagg.roster import threshold_for
from fedvision.simulation.run import make_plan, run_federation, start_run
from fedvision.storage import read_json, read_lines, write_json
from fedvision.training.charter import check_left_out, rules_for
from fedvision_server.defence import Defence
from fedvision_sites import work
from fedvision_sites.release import ReleasedUpdate
from tests.conftest import tiny_content, write_site

SITES = "abcdefghijkl"


@pytest.fixture
def reversed_site(monkeypatch: pytest.MonkeyPatch) -> str:
    """Site j sends its update the other way round, twice as long, at the most at the clip norm."""
    honest = work.Site._train_locally

    def lying(site: Any, request: Any, prepared: Any, cases: Any) -> Any:
        released, result = honest(site, request, prepared, cases)
        if site.config.name != "j":
            return released, result
        update = (-2 * released.update).astype(np.float32)
        bound = prepared.job.aggregation.clip_norm
        update *= np.float32(min(1.0, 0.999 * bound / float(np.linalg.norm(update))))
        return ReleasedUpdate(update, released.norm_before, 1.0), result

    monkeypatch.setattr(work.Site, "_train_locally", lying)
    return "j"


def run_job(folder: Path, num_sites: int = 10, **changes: Any) -> Path:
    """Run a tiny job of three rounds; all sites have the same images, so that honest updates agree."""
    for name in SITES[:num_sites]:
        write_site(folder / "data", name)
    settings: dict[str, Any] = {"rounds": 3, "aggregation__secure": True, "aggregation__weighting": "uniform"}
    job = parse_job(tiny_content(folder / "data", **(settings | changes)), "tiny")
    start_run(dataclasses.replace(make_plan(job), threads=1), folder / "run")
    run_federation(
        dataclasses.replace(make_plan(job), threads=1), folder / "run", lambda e: None, "one-process"
    )
    return folder / "run"


def left_out(run: Path) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for event in read_lines(run / "rounds.jsonl"):
        if event["event"] == "judgement":
            out = {event["names"][str(one["site"])] for one in event["sites"] if one["excluded"]}
            found[event["round"]] = out
    return found


def check(run: Path) -> Any:
    path = run / "secagg" / "governance.pub"
    return verify_run(run, parse_public(path.read_text(), str(path)), lambda what, done, total: None)


@pytest.mark.parametrize("level", ["gram", "sketch"])
def test_a_site_that_goes_against_the_others_is_left_out_and_knows_why(
    tmp_path: Path, reversed_site: str, level: str
) -> None:
    run = run_job(tmp_path, secure_aggregation__level=level, defence__rules=["norm", "opposition"])
    found = left_out(run)
    assert found == {1: {"j"}, 2: {"j"}, 3: {"j"}}
    events = read_lines(run / "rounds.jsonl")
    refused = [one for one in events if one["event"] == "train" and one["status"] == "refused"]
    assert {one["site"] for one in refused} == {"j"} and "opposition" in refused[0]["reason"]
    assert [one["standing"] for one in events if one["event"] == "standing"] == ["warned", "quarantined"]
    own = [one for one in read_lines(run / "sites" / "j" / "log.jsonl") if "judgement" in one]
    assert [one["left_out"] for one in own] == ["by the rules"] * 3
    assert own[0]["judgement"]["reason"].startswith("opposition")
    other = [one for one in read_lines(run / "sites" / "a" / "log.jsonl") if "judgement" in one]
    assert [one["left_out"] for one in other] == [""] * 3
    assert check(run).failure is None
    assert "Who was left out, and why" in write_report(run).read_text(encoding="utf-8")


def test_a_judgement_that_was_changed_afterwards_is_found(tmp_path: Path, reversed_site: str) -> None:
    run = run_job(tmp_path, rounds=2, secure_aggregation__level="sketch", defence__rules=["opposition"])
    path = run / "secagg" / "judgements" / "train-0002.json"
    content = read_json(path)
    for change in (
        {"gram": (np.array(content["gram"]) + 1).tolist()},
        {"most_excluded": content["most_excluded"] - 1, "sites": content["sites"][::-1]},
        {"judgement": {**content["judgement"], "limits": [9.0]}},
    ):
        write_json(path, content | change)
        failure = check(run).failure
        assert failure is not None and failure.rule == "judgement"
    path.unlink()
    failure = check(run).failure
    assert failure is not None and failure.rule == "judgement"


def test_a_person_lifts_a_quarantine_and_expels_a_site(tmp_path: Path, reversed_site: str) -> None:
    run = run_job(tmp_path, secure_aggregation__level="gram", defence__rules=["opposition"])
    consortium = load_consortium(run)
    defence = Defence(run / "secagg", consortium.charter, consortium.encoding)
    number = consortium.roster.number_of("j")
    assert defence.quarantined(4) == (number,)
    defence.decide(number, "lift", 4)
    assert defence.quarantined(4) == () and defence.quarantined(3) == ()
    defence.decide(number, "expel", 5)
    assert defence.expelled(4) == frozenset() and defence.expelled(5) == {number}


def test_without_secure_aggregation_the_same_site_is_left_out(tmp_path: Path, reversed_site: str) -> None:
    run = run_job(tmp_path, aggregation__secure=False, defence__rules=["norm", "opposition"])
    assert left_out(run) == {1: {"j"}, 2: {"j"}, 3: {"j"}}
    assert not (run / "defence" / "updates").exists()


def test_no_rule_leaves_nobody_out_and_writes_no_judgement(tmp_path: Path, reversed_site: str) -> None:
    run = run_job(tmp_path, rounds=1, secure_aggregation__level="gram", defence__rules=[])
    assert left_out(run) == {} and not (run / "secagg" / "judgements").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"defence__rules": ["root_cosine"]}, "there is no root set"),
        ({"defence__rules": ["norm"], "secure_aggregation__level": "sum"}, "needs level"),
        (
            {"defence__rules": ["norm"], "defence__max_malicious": 0.21},
            "max_malicious = 0.21 needs a root set",
        ),
        ({"secure_aggregation__max_colluding": 2}, "with 5 sites it is 1 at most"),
    ],
)
def test_rules_that_cannot_be_used_are_refused_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    settings: dict[str, Any] = {
        "secure_aggregation__level": "sketch",
        "secure_aggregation__smallest_cohort": 5,
    }
    with pytest.raises(ConfigError, match=told):
        run_job(tmp_path, 5, **(settings | changes))


def test_more_attackers_than_a_rule_or_a_sum_can_do_without_are_refused() -> None:
    tiny = tiny_content(Path("sites"), aggregation__secure=True, defence__max_malicious=0.45)
    krum = parse_job(tiny | {"defence": {"rules": ["multi_krum"], "max_malicious": 0.45}}, "tiny")
    with pytest.raises(ConfigError, match="multi_krum needs 7 sites"):
        rules_for(krum, "sketch", 5, has_root=True)
    with pytest.raises(ConfigError, match="is 4 of 10 sites, but a sum can do without 3 only"):
        check_left_out(krum, 10, threshold_for(10))
    check_left_out(krum, 10, threshold_for(10, 1))


def test_a_root_set_that_is_too_small_is_refused(tmp_path: Path) -> None:
    write_site(tmp_path / "root", "r")
    with pytest.raises(DataError, match="too small"):
        run_job(tmp_path, 5, data__root_set=str(tmp_path / "root" / "r"))


def test_numbers_that_no_updates_have_cost_the_round_and_not_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Defence.select

    def broken(self: Any, number: int, measured: Any) -> Any:
        if number == 2:
            raise DefenceError("the numbers of site 3 are not finite")
        return honest(self, number, measured)

    monkeypatch.setattr(Defence, "select", broken)
    run = run_job(tmp_path, secure_aggregation__level="gram", defence__rules=["norm"])
    thrown = [one for one in read_lines(run / "rounds.jsonl") if one["event"] == "thrown away"]
    assert [one["round"] for one in thrown] == [2] and "site 3" in thrown[0]["reason"]
    assert json.loads((run / "test.json").read_text())["round"] in (1, 3)
    assert check(run).failure is None
