"""Whole runs with secure aggregation that are killed, at any message, record or file: nothing is lost."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedvision_server.journal
import fedvision_server.secure
import fedvision_sites.app
from fedvision.config import Job
from fedvision.errors import RoundError, StorageError
from fedvision.secagg.codec import decode
from fedvision.secagg.messages import Transcript
from fedvision.simulation.consortium import server_keys
from fedvision.simulation.one_process import LocalLink
from fedvision.simulation.run import make_plan, site_configs
from fedvision.storage import read_json, read_lines
from fedvision.wire.messages import HelloRequest, Refusal, Reply, Request, TrainRequest
from fedvision_server.journal import Journal
from fedvision_server.round import run_job
from fedvision_sites.work import Site
from tests.federation.test_secure_run import Events, Killed, Lie, Stage, false_sketch, garbage_box, of, stage


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is there after a kill; only a power cut needs a flush, and that takes long."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def four(tiny: Any) -> Stage:
    return stage(tiny, 4)


@pytest.fixture
def five(tiny: Any) -> Stage:
    return stage(tiny, 5)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Note every training at a site, as (site, round)."""
    done: list[tuple[str, int]] = []
    train = Site._train_locally

    def noted(self: Site, request: TrainRequest, *others: Any) -> Any:
        done.append((self.config.name, request.round))
        return train(self, request, *others)

    monkeypatch.setattr(Site, "_train_locally", noted)
    return done


def transcript(stage: Stage, name: str, of_sum: str) -> Transcript:
    return decode((stage.folder(name) / "secagg" / "transcripts" / of_sum).read_bytes(), Transcript)


def check_nothing_lost(stage: Stage, name: str, events: Events, whole: np.ndarray) -> None:
    assert not of(events, "thrown away")
    assert not of(events, "evaluate failed")
    assert not of(events, "attempt")
    assert {event["round"] for event in of(events, "round")} == {1}
    assert np.array_equal(stage.model(name), whole)
    for purpose in ("train", "validate"):
        assert transcript(stage, name, f"{purpose}-0001").session.attempt == 1
    check_clean(stage, name)


def check_clean(stage: Stage, name: str) -> None:
    home = stage.folder(name) / "secagg"
    assert not (home / "journal").exists()
    assert not list((home / "masked").glob("*"))


def in_a_sum(request: Request) -> bool:
    """Whether a request is of a step of a sum: a hello, or a test in the clear, changes nothing."""
    return bool(getattr(request, "charter", ""))


def lives(run: Callable[[], Events], most: int) -> tuple[Events, int]:
    """Start a run again and again until no kill comes; sites are started again too."""
    for number in range(1, most):
        fedvision_sites.app._sites.clear()
        try:
            return run(), number
        except Killed:
            continue
    raise AssertionError(f"no end after {most} starts")


# --- messages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["sum", "sketch", "gram"])
def test_a_server_that_is_killed_at_every_message_of_a_run_loses_nothing(
    four: Stage, trainings: list[tuple[str, int]], level: str
) -> None:
    """Each life takes one answer, loses the next one on its way, and dies."""
    job = four.make_job(level, rounds=1)
    four.run(job, "whole", counts=in_a_sum)
    whole, messages = four.model("whole"), four.link.carried
    trainings.clear()
    events, count = lives(lambda: four.run(job, "killed", kill_at=2, counts=in_a_sum), 2 * messages)
    assert count == messages
    check_nothing_lost(four, "killed", events, whole)
    assert sorted(trainings) == [(site, 1) for site in "abcd"]


@pytest.mark.slow
@pytest.mark.parametrize("level", ["sum", "sketch", "gram"])
def test_a_run_killed_at_any_message_loses_nothing_and_trains_nothing_again(
    four: Stage, trainings: list[tuple[str, int]], level: str
) -> None:
    job = four.make_job(level, rounds=1)
    four.run(job, "whole")
    whole, messages = four.model("whole"), four.link.carried
    for number in range(1, messages + 1):
        name = f"killed-{number}"
        trainings.clear()
        with pytest.raises(Killed):
            four.run(job, name, kill_at=number)
        events = four.run(job, name)
        check_nothing_lost(four, name, events, whole)
        assert sorted(trainings) == [(site, 1) for site in "abcd"], number
        shutil.rmtree(four.folder(name))


# --- records and files ------------------------------------------------------------------------------------


def dying_journal(monkeypatch: pytest.MonkeyPatch, how: str, at: int) -> Callable[[], None]:
    """Kill the server at its ``at``-th record in a life; return what begins a life."""
    seen = 0
    append = Journal._append

    def dying(self: Journal, record: Any) -> None:
        nonlocal seen
        seen += 1
        before = self._path.read_bytes()
        if seen != at:
            return append(self, record)
        if how != "before":
            append(self, record)
        if how == "torn":
            whole = self._path.read_bytes()
            self._path.write_bytes(whole[: len(before) + (len(whole) - len(before)) // 2])
        raise Killed

    def begin() -> None:
        nonlocal seen
        seen = 0

    monkeypatch.setattr(Journal, "_append", dying)
    return begin


@pytest.mark.parametrize(
    ("level", "how"),
    [
        pytest.param("sum", "before", marks=pytest.mark.slow),
        ("sketch", "torn"),
        ("gram", "after"),
        pytest.param("gram", "torn", marks=pytest.mark.slow),
    ],
)
def test_a_server_that_is_killed_at_every_record_of_its_journal_loses_nothing(
    four: Stage, trainings: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, level: str, how: str
) -> None:
    job = four.make_job(level, rounds=1)
    four.run(job, "whole")
    whole = four.model("whole")
    trainings.clear()
    with monkeypatch.context() as patched:
        begin = dying_journal(patched, how, 1 if how == "after" else 2)

        def run() -> Events:
            begin()
            return four.run(job, "killed")

        events, count = lives(run, 200)
    assert count > 30
    check_nothing_lost(four, "killed", events, whole)
    assert sorted(trainings) == [(site, 1) for site in "abcd"]


def dying_writes(monkeypatch: pytest.MonkeyPatch, number: int, written: bool) -> Callable[[], int]:
    """Kill the server at its ``number``-th write or removal of a file of the job; return a count of them."""
    seen = 0

    def counted(work: Callable[..., Any]) -> Callable[..., Any]:
        def write(*arguments: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == number and not written:
                raise Killed
            result = work(*arguments)
            if seen == number:
                raise Killed
            return result

        return write

    for module, names in (
        (fedvision_server.secure, ("write_atomic", "write_json")),
        (fedvision_server.journal, ("write_atomic",)),
        (fedvision_server.federation, ("write_json",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, counted(getattr(module, name)))
    monkeypatch.setattr(Journal, "remove", counted(Journal.remove))
    return lambda: seen


@pytest.mark.parametrize(
    ("level", "written"),
    [("sum", True), pytest.param("sketch", False, marks=pytest.mark.slow)],
)
def test_a_server_that_is_killed_at_any_file_it_writes_loses_nothing(
    four: Stage, level: str, written: bool
) -> None:
    job = four.make_job(level, rounds=1)
    with pytest.MonkeyPatch.context() as patched:
        count = dying_writes(patched, 0, written)
        four.run(job, "whole")
        total, whole = count(), four.model("whole")
    for number in range(1, total + 1):
        with pytest.MonkeyPatch.context() as patched:
            dying_writes(patched, number, written)
            with pytest.raises(Killed):
                four.run(job, "killed")
        events = four.run(job, "killed")
        assert not of(events, "thrown away"), number
        assert np.array_equal(four.model("killed"), whole), number
        check_clean(four, "killed")
        shutil.rmtree(four.folder("killed"))


def test_a_lost_round_stays_lost_and_is_lost_once(five: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A liar and a site that vanishes: killed at every record, the run tells the same story."""
    job = five.make_job("sketch", rounds=2, evaluation__every=2)
    told = five.run(job, "whole", false_sketch("c"))
    with monkeypatch.context() as patched:
        begin = dying_journal(patched, "after", 1)

        def run() -> Events:
            begin()
            return five.run(job, "killed", false_sketch("c"))

        events, count = lives(run, 300)
    assert count > 60
    for kind in ("thrown away", "expelled", "round"):
        assert {e["round"] for e in of(events, kind)} == {e["round"] for e in of(told, kind)} != set(), kind
    assert read_json(five.folder("killed") / "secagg" / "expelled.json") == {"c": "sketch"}
    assert np.array_equal(five.model("killed"), five.model("whole"))
    check_clean(five, "killed")


@pytest.mark.parametrize("level", ["sum", "sketch", "gram"])
def test_an_attempt_that_failed_is_not_gone_through_again(
    five: Stage, trainings: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    job = five.make_job(level, rounds=1)
    five.run(job, "whole", garbage_box("b"))
    trainings.clear()
    with monkeypatch.context() as patched:
        begin = dying_journal(patched, "after", 1)

        def run() -> Events:
            begin()
            return five.run(job, "killed", garbage_box("b"))

        events, _ = lives(run, 300)
    assert {(event["site"], event["rule"]) for event in of(events, "expelled")} == {("b", "box")}
    assert transcript(five, "killed", "train-0001").session.attempt == 2
    assert np.array_equal(five.model("killed"), five.model("whole"))
    assert sorted(trainings) == [(site, 1) for site in "abcde"]
    check_clean(five, "killed")


# --- sites that come and go -------------------------------------------------------------------------------


class Away:
    """A link that is patient: some sites do not answer, until it has paused often enough.

    Args:
        link: Carries what is carried.
        names: Of the nodes.
        away: From site to the refusal it gives instead of an answer; decides on each request.
    """

    def __init__(
        self, link: LocalLink, names: list[str], away: Callable[["Away", str, Request], str]
    ) -> None:
        self.link, self.names, self.away = link, names, away
        self.pauses = 0
        self.asked: list[tuple[str, str]] = []

    def nodes(self) -> list[int]:
        return self.link.nodes()

    def pause(self, seconds: float) -> None:
        self.pauses += 1
        assert self.pauses < 20

    def ask(self, requests: Mapping[int, Request]) -> Iterator[tuple[int, Reply]]:
        for node, request in requests.items():
            name = self.names[node]
            step = getattr(request, "step", type(request).__name__)
            self.asked.append((name, step))
            code = self.away(self, name, request)
            if code:
                yield node, Refusal(request.job_digest, name, getattr(request, "round", 0), code)
            else:
                yield from self.link.ask({node: request})


def run_with(stage: Stage, job: Job, name: str, make_link: Callable[[LocalLink, list[str]], Any]) -> Events:
    """Run a job over another link."""
    plan = dataclasses.replace(make_plan(job), threads=1)
    folder = stage.make_folder(job, name)
    configs = site_configs(plan, folder)
    link = make_link(LocalLink(configs), [config.name for config in configs])
    run_job(job.public(), link, folder, plan.cohort, lambda event: None, server_keys(folder))
    return read_lines(folder / "rounds.jsonl")


def never(link: Away, site: str, request: Request) -> str:
    return ""


def kind_of(request: Request) -> str:
    return str(getattr(request, "step", type(request).__name__))


def test_a_restarted_server_goes_on_with_whoever_is_there_and_the_others_come_back(five: Stage) -> None:
    job = five.make_job("sketch", rounds=2, evaluation__every=2)
    with pytest.raises(Killed):
        five.run(job, kill_at=5 + 5 + 2)  # hellos, enrolments, two sites are ready

    def down(link: Away, site: str, request: Request) -> str:
        return "unreachable" if site == "e" and getattr(request, "round", 1) == 1 else ""

    links: list[Away] = []

    def make(link: LocalLink, names: list[str]) -> Away:
        links.append(Away(link, names, down))
        return links[0]

    events = run_with(five, job, "run", make)
    assert [event["num_sites"] for event in of(events, "round")] == [4, 5]
    assert not of(events, "attempt")
    asked = links[0].asked
    assert not [site for site, step in asked if step in ("HelloRequest", "enrolled")]
    assert next(step for site, step in asked if site == "a") == "mask"  # it was ready before


@pytest.mark.parametrize("level", ["sum", "sketch"])
def test_who_was_late_for_a_step_stays_late_after_a_kill(five: Stage, level: str) -> None:
    """Its cohort was shown to sites already: another one would be another session."""

    def late(folder: Path) -> Lie:
        def lie(site: str, request: Request, reply: Reply) -> Reply:
            is_late = isinstance(request, TrainRequest) and site == "e"
            return Refusal(reply.job_digest, "e", 1, "deadline") if is_late else reply

        return lie

    job = five.make_job(level, rounds=1)
    with pytest.raises(Killed):
        five.run(job, kill_at=5 + 5 + 5 + 2, lie=late)  # at the second masked input
    events = five.run(job)
    assert not of(events, "attempt")
    assert [event["num_sites"] for event in of(events, "round")] == [4]
    assert transcript(five, "run", "train-0001").session.attempt == 1


def test_a_restarted_server_finds_sites_whose_addresses_changed(five: Stage) -> None:
    job = five.make_job("sum", rounds=1)
    five.run(job, "whole")

    class Moved(Away):
        def nodes(self) -> list[int]:
            return [node + 10 for node in self.link.nodes()]

        def ask(self, requests: Mapping[int, Request]) -> Iterator[tuple[int, Reply]]:
            for node, reply in super().ask({node - 10: request for node, request in requests.items()}):
                yield node + 10, reply

    with pytest.raises(Killed):
        five.run(job, kill_at=5 + 5 + 5 + 2)
    events = run_with(five, job, "run", lambda link, names: Moved(link, names, never))
    assert [event["num_sites"] for event in of(events, "round")] == [5]
    assert np.array_equal(five.model(), five.model("whole"))


@pytest.mark.parametrize("level", ["sum", "sketch", "gram"])
def test_a_site_that_misses_a_deadline_is_asked_again_where_nobody_can_do_without_it(
    four: Stage, level: str
) -> None:
    """With four sites all are needed at each step; each of them misses each step once."""
    job = four.make_job(level, rounds=1)
    four.run(job, "whole")
    missed: set[tuple[str, str, str]] = set()

    def late(link: Away, site: str, request: Request) -> str:
        key = (site, kind_of(request), getattr(request, "split", ""))
        if not in_a_sum(request) or key in missed:
            return ""
        missed.add(key)
        return "deadline"

    events = run_with(four, job, "late", lambda link, names: Away(link, names, late))
    assert not of(events, "attempt")
    assert not of(events, "thrown away")
    assert np.array_equal(four.model("late"), four.model("whole"))
    steps = {event["step"] for event in of(events, "waiting") if "step" in event}
    assert steps >= {"ready", "mask", "accept", "unmask"}


def test_a_site_that_is_gone_for_good_is_waited_for_a_while_and_the_attempt_is_repeated(five: Stage) -> None:
    def gone_at_mask(link: Away, site: str, request: Request) -> str:
        first = getattr(request, "round", 0) == 1 and kind_of(request) != "HelloRequest"
        is_gone = first and site in "de" and kind_of(request) not in ("TrainRequest", "enrolled")
        return "deadline" if is_gone and link.pauses < 4 else ""

    job = five.make_job("sum", rounds=1)
    events = run_with(five, job, "run", lambda link, names: Away(link, names, gone_at_mask))
    assert len(of(events, "attempt")) == 1
    assert [event["num_sites"] for event in of(events, "round")] == [5]


class Noisy(Away):
    """A link that yields old replies, replies twice, and replies of nodes that nobody asked."""

    def __init__(self, link: LocalLink, names: list[str]) -> None:
        super().__init__(link, names, never)
        self.old: list[tuple[int, Reply]] = []

    def ask(self, requests: Mapping[int, Request]) -> Iterator[tuple[int, Reply]]:
        yield from self.old[-8:]
        yield 99, Refusal("", "x", 0, "internal")
        for node, reply in super().ask(requests):
            self.old.append((node, reply))
            yield node, reply
            yield node, reply


@pytest.mark.parametrize("level", ["sum", "gram"])
def test_late_and_double_answers_do_not_disturb(four: Stage, level: str) -> None:
    job = four.make_job(level, rounds=1)
    four.run(job, "whole")
    events = run_with(four, job, "noisy", Noisy)
    check_nothing_lost(four, "noisy", events, four.model("whole"))


# --- the first meeting ------------------------------------------------------------------------------------


def test_the_server_waits_for_sites_that_have_not_decided_or_are_not_there(five: Stage) -> None:
    def undecided(link: Away, site: str, request: Request) -> str:
        if isinstance(request, HelloRequest):
            if site == "b" and link.pauses < 3:
                return "waiting"
            if site == "d" and link.pauses < 1:
                return "unreachable"
        is_lost = kind_of(request) == "enrolled" and site == "e" and link.asked.count(("e", "enrolled")) < 2
        return "unreachable" if is_lost else ""

    job = five.make_job("sum", rounds=1)
    links: list[Away] = []

    def make(link: LocalLink, names: list[str]) -> Away:
        links.append(Away(link, names, undecided))
        return links[0]

    events = run_with(five, job, "run", make)
    assert [event["sites"] for event in of(events, "waiting")] == [["b", "d"], ["b"]]
    assert links[0].asked.count(("a", "HelloRequest")) == 1
    assert links[0].asked.count(("e", "enrolled")) == 2
    assert [event["num_sites"] for event in of(events, "round")] == [5]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("denied", "site b denied the job"),
        ("policy", r"site b refuses the job \(policy error\)"),
        ("protocol: roster", r"site b refuses the job \(protocol: roster error\)"),
    ],
)
def test_a_site_that_says_no_ends_the_job_and_is_named(five: Stage, code: str, text: str) -> None:
    def no(link: Away, site: str, request: Request) -> str:
        return code if site == "b" and isinstance(request, HelloRequest) else ""

    with pytest.raises(RoundError, match=text):
        run_with(five, five.make_job("sum", rounds=1), "run", lambda link, names: Away(link, names, no))
    assert not (five.folder() / "federation.json").exists()


def test_a_link_without_patience_waits_for_a_decision_only(
    five: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedvision_server.federation, "PAUSE_S", 0.0)
    seen: list[str] = []

    def undecided(folder: Path) -> Lie:
        def lie(site: str, request: Request, reply: Reply) -> Reply:
            if isinstance(request, HelloRequest) and site == "b":
                seen.append(site)
                if len(seen) < 4:
                    return Refusal(reply.job_digest, "b", 0, "waiting")
            return reply

        return lie

    events = five.run(five.make_job("sum", rounds=1), lie=undecided)
    assert [event["sites"] for event in of(events, "waiting")] == [["b"]]
    assert len(seen) == 4
    assert len(of(events, "round")) == 1


def test_a_meeting_of_another_job_or_a_damaged_one_is_an_error(five: Stage) -> None:
    job = five.make_job("sum", rounds=1)
    five.run(job)
    path = five.folder() / "federation.json"
    content = read_json(path)
    for change in ({"job": "0" * 64}, {"format": 2}, {"sites": {"a": {}}}, {"sites": 3}):
        path.write_text(json.dumps(content | change))
        with pytest.raises(StorageError, match=r"federation\.json is damaged"):
            five.run(job)
