"""The server against sites that lie, fail or stay away, over the real messages."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvision.errors import RoundError
from fedvision.simulation.one_process import LocalLink
from fedvision.simulation.run import make_plan, site_configs
from fedvision.storage import load_tensors, read_lines
from fedvision.wire.messages import EvaluateReply, HelloReply, Refusal, Reply, Request, TrainReply
from fedvision_server.aggregate import mean_site, worst_site
from fedvision_server.federation import Cohort
from fedvision_server.round import run_job

Lie = Callable[[Reply], Reply]


class LyingLink:
    """Carries messages as ``LocalLink`` does, but changes what one site sends."""

    def __init__(self, link: LocalLink, liar: int, lie: Lie) -> None:
        self.link, self.liar, self.lie = link, liar, lie

    def nodes(self) -> list[int]:
        return self.link.nodes()

    def ask(self, requests: Mapping[int, Request]) -> Iterator[tuple[int, Reply]]:
        for node, reply in self.link.ask(requests):
            yield node, self.lie(reply) if node == self.liar else reply


def run_with(tiny: Any, folder: Path, lie: Lie, **changes: Any) -> list[dict[str, Any]]:
    job = tiny.changed(rounds=1, **changes)
    plan = dataclasses.replace(make_plan(job), threads=1)
    link = LyingLink(LocalLink(site_configs(plan, folder)), 1, lie)
    run_job(job.public(), link, folder, plan.cohort, lambda event: None)
    return read_lines(folder / "rounds.jsonl")


def train_lie(**changes: Any) -> Lie:
    def lie(reply: Reply) -> Reply:
        if isinstance(reply, TrainReply):
            made = {key: value(reply) if callable(value) else value for key, value in changes.items()}
            return dataclasses.replace(reply, **made)
        return reply

    return lie


@pytest.mark.parametrize(
    ("lie", "status"),
    [
        (train_lie(update=lambda r: r.update * np.float32(1000)), "refused"),
        (train_lie(update=lambda r: np.full_like(r.update, np.nan)), "refused"),
        (train_lie(update=lambda r: r.update[:-1]), "refused"),
        (train_lie(update=lambda r: r.update.astype(np.float64)), "refused"),
        (train_lie(num_samples=0), "refused"),
        (train_lie(num_samples=2**40), "refused"),
        (train_lie(round=7), "failed"),
        (train_lie(site="a"), "failed"),
        (train_lie(job_digest="another"), "failed"),
    ],
)
def test_a_site_that_breaks_a_rule_is_left_out_and_the_round_goes_on(
    tiny, tmp_path: Path, lie: Lie, status: str
) -> None:
    folder = tmp_path / "run"
    events = run_with(tiny, folder, lie)
    assert {e["site"]: e["status"] for e in events if e["event"] == "train"} == {
        "a": "accepted",
        "b": status,
        "c": "accepted",
    }
    assert [e["num_sites"] for e in events if e["event"] == "round"] == [2]
    honest = tmp_path / "honest"
    run_with(
        tiny, honest, lambda r: Refusal(r.job_digest, "b", 1, "gone") if isinstance(r, TrainReply) else r
    )
    for name, value in load_tensors(folder / "model.safetensors")[0].items():
        assert np.array_equal(value, load_tensors(honest / "model.safetensors")[0][name]), name


def test_statistics_that_break_a_rule_are_left_out(tiny, tmp_path: Path) -> None:
    def lie(reply: Reply) -> Reply:
        if isinstance(reply, EvaluateReply):
            return dataclasses.replace(reply, statistics=np.full_like(reply.statistics, np.inf))
        return reply

    events = run_with(tiny, tmp_path / "run", lie)
    assert {e["site"] for e in events if e["event"] == "validate"} == {"a", "c"}
    assert {e["site"] for e in events if e["event"] == "evaluate failed"} == {"b"}


def test_two_sites_with_one_name_stop_the_run(tiny, tmp_path: Path) -> None:
    with pytest.raises(RoundError, match="two sites are named a"):
        run_with(tiny, tmp_path / "run", lambda r: dataclasses.replace(r, site="a"))


def test_a_site_that_refuses_the_job_is_named_with_its_code(tiny, tmp_path: Path) -> None:
    with pytest.raises(RoundError, match=r"site b refuses the job \(policy error\)"):
        run_with(tiny, tmp_path / "run", lambda r: Refusal(r.job_digest, "b", 0, "policy"))


def test_a_training_site_that_has_become_empty_stops_the_run(tiny, tmp_path: Path) -> None:
    def lie(reply: Reply) -> Reply:
        return dataclasses.replace(reply, num_train=0) if isinstance(reply, HelloReply) else reply

    with pytest.raises(RoundError, match="site b has no training case"):
        run_with(tiny, tmp_path / "run", lie)


def test_a_site_that_does_not_answer_is_named(tiny, tmp_path: Path) -> None:
    job = tiny.changed(rounds=1)
    plan = make_plan(job, 1)
    cohort = Cohort(("a", "elsewhere"), ("a",), ("a",))
    with pytest.raises(RoundError, match="site elsewhere does not answer"):
        run_job(job.public(), LocalLink(site_configs(plan, tmp_path)), tmp_path, cohort, lambda event: None)


def test_a_metric_that_is_undefined_at_a_site_does_not_count() -> None:
    nan = float("nan")
    by_site = {"a": {"map": 0.5, "ap/x": nan}, "b": {"map": 0.3, "ap/x": 0.2}, "c": {"map": nan, "ap/x": nan}}
    assert mean_site(by_site) == {"map": pytest.approx(0.4), "ap/x": pytest.approx(0.2)}
    assert worst_site(by_site, "map") == "b"
    assert worst_site({"c": by_site["c"]}, "map") is None
