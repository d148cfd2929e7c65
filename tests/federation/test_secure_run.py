"""Whole runs with secure aggregation: sites that lie or stay away, kills at any moment, wrong papers."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedvision_sites.work
from fedvision.config import Job
from fedvision.errors import ConfigError, RoundError
from fedvision.secagg import identity, schedule
from fedvision.secagg.codec import decode, encode
from fedvision.secagg.member import box_leaf
from fedvision.secagg.merkle import merkle_root
from fedvision.secagg.messages import Evidence, Ready, ReadyUpload, Signed, Sketch, SketchUpload
from fedvision.simulation.consortium import governance_key, load_consortium, make_consortium, server_keys
from fedvision.simulation.one_process import LocalLink
from fedvision.simulation.run import make_plan, site_configs, start_run, weight_cap
from fedvision.storage import load_tensors, read_json, read_lines
from fedvision.wire.messages import HelloReply, Refusal, Reply, Request, SecureReply, TrainRequest, as_vector
from fedvision_server.round import run_job
from tests.conftest import write_site

Lie = Callable[[str, Request, Reply], Reply]
Events = list[dict[str, Any]]


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def honest(site: str, request: Request, reply: Reply) -> Reply:
    return reply


class LyingLink:
    """Carries messages as ``LocalLink`` does, but changes what sites send, and dies when it is told to."""

    def __init__(
        self,
        link: LocalLink,
        names: list[str],
        lie: Lie,
        kill_at: int = 0,
        counts: Callable[[Request], bool] = lambda request: True,
    ) -> None:
        self.link, self.names, self.lie, self.kill_at, self.counts = link, names, lie, kill_at, counts
        self.carried = 0

    def nodes(self) -> list[int]:
        return self.link.nodes()

    def ask(self, requests: Mapping[int, Request]) -> Iterator[tuple[int, Reply]]:
        for node, request in requests.items():
            for answered, reply in self.link.ask({node: request}):
                self.carried += self.counts(request)
                if self.carried == self.kill_at and self.counts(request):
                    raise Killed
                yield answered, self.lie(self.names[node], request, reply)


@dataclasses.dataclass
class Stage:
    """Sites on disk and a job for them."""

    root: Path
    make_job: Callable[..., Job]

    def run(
        self,
        job: Job,
        name: str = "run",
        lie: Callable[[Path], Lie] = lambda folder: honest,
        observe: Callable[[dict[str, Any]], None] = lambda event: None,
        kill_at: int = 0,
        prepare: Callable[[Path], None] = lambda folder: None,
        counts: Callable[[Request], bool] = lambda request: True,
    ) -> Events:
        """Run a job to its end, or resume it, and return the events on disk."""
        plan = dataclasses.replace(make_plan(job), threads=1)
        folder = self.make_folder(job, name, prepare)
        configs = site_configs(plan, folder)
        names = [config.name for config in configs]
        self.link = LyingLink(LocalLink(configs), names, lie(folder), kill_at, counts)
        run_job(job.public(), self.link, folder, plan.cohort, observe, server_keys(folder))
        return read_lines(folder / "rounds.jsonl")

    def make_folder(
        self, job: Job, name: str = "run", prepare: Callable[[Path], None] = lambda folder: None
    ) -> Path:
        """Return a run folder with papers and keys, made if it is not there."""
        plan, folder = dataclasses.replace(make_plan(job), threads=1), self.folder(name)
        if not folder.exists():
            start_run(plan, folder)
            make_consortium(plan, weight_cap(plan), folder)
            prepare(folder)
        return folder

    def folder(self, name: str = "run") -> Path:
        return self.root.parent / name

    def model(self, name: str = "run") -> np.ndarray:
        tensors, _ = load_tensors(self.folder(name) / "model.safetensors")
        return np.concatenate([tensors[key].ravel() for key in sorted(tensors)])


def stage(tiny: Any, num_sites: int) -> Stage:
    """Return a stage of as many sites, each with two cases to train on; two of them validate."""
    for name in "abc":
        shutil.rmtree(tiny.root / name)
    for index, name in enumerate("abcdefghi"[:num_sites]):
        write_site(tiny.root, name, (2, 1 if index < 2 else 0, 0))
    return Stage(tiny.root, tiny.secure)


@pytest.fixture
def three(tiny: Any) -> Stage:
    return stage(tiny, 3)


@pytest.fixture
def seven(tiny: Any) -> Stage:
    return stage(tiny, 7)


def of(events: Events, kind: str) -> Events:
    return [event for event in events if event["event"] == kind]


# --- lies -------------------------------------------------------------------------------------------------


def resigned(folder: Path, site: str, message: object) -> Signed:
    """Return a message with the site's true signature."""
    consortium = load_consortium(folder)
    own = identity.load(folder / "sites" / site / "identity.pem")
    return schedule.sign(consortium, own, consortium.roster.number_of(site), message)


def false_sketch(*liars: str, rounds: tuple[int, ...] = ()) -> Callable[[Path], Lie]:
    """Return a lie: a sketch whose numbers are all one too large."""

    def make(folder: Path) -> Lie:
        def lie(site: str, request: Request, reply: Reply) -> Reply:
            is_due = isinstance(reply, SecureReply) and reply.step == "sketch"
            if not is_due or site not in liars or (rounds and reply.round != rounds[liars.index(site)]):
                return reply
            upload = decode(reply.body.tobytes(), SketchUpload)
            sketch = decode(upload.sketch.body, Sketch)
            values = (np.frombuffer(sketch.values, "<u4") + np.uint32(1)).astype("<u4").tobytes()
            signed = resigned(folder, site, dataclasses.replace(sketch, values=values))
            return dataclasses.replace(reply, body=as_vector(encode(SketchUpload(signed, ()))))

        return lie

    return make


def garbage_box(*liars: str) -> Callable[[Path], Lie]:
    """Return a lie: a sealed share that does not open."""

    def make(folder: Path) -> Lie:
        def lie(site: str, request: Request, reply: Reply) -> Reply:
            if not isinstance(reply, SecureReply) or reply.step != "ready" or site not in liars:
                return reply
            upload = decode(reply.body.tobytes(), ReadyUpload)
            at = 0 if upload.boxes[0].sealed else 1
            boxes = list(upload.boxes)
            boxes[at] = dataclasses.replace(boxes[at], sealed=bytes(48))
            root = merkle_root([box_leaf(box) for box in boxes])
            ready = dataclasses.replace(decode(upload.ready.body, Ready), boxes_root=root)
            body = encode(ReadyUpload(resigned(folder, site, ready), tuple(boxes)))
            return dataclasses.replace(reply, body=as_vector(body))

        return lie

    return make


def test_a_site_that_lies_about_its_sketch_is_out_with_evidence_and_the_run_goes_on(seven: Stage) -> None:
    job = seven.make_job("sketch", rounds=2)
    events = seven.run(job, lie=false_sketch("c"))
    (out,) = of(events, "expelled")
    assert (out["site"], out["rule"], out["round"]) == ("c", "sketch", 1)
    assert [event["round"] for event in of(events, "thrown away")] == [1]
    assert [(e["round"], e["num_sites"]) for e in of(events, "round")] == [(2, 6)]
    home = seven.folder() / "secagg"
    assert read_json(home / "expelled.json") == {"c": "sketch"}
    evidence = decode((home / "evidence" / out["evidence"]).read_bytes(), Evidence)
    consortium = load_consortium(seven.folder())
    assert (consortium.roster.member(evidence.site).name, evidence.rule) == ("c", "sketch")
    for signed in evidence.messages:
        assert signed.sender == evidence.site
        assert identity.verify(
            consortium.key_of(signed.sender),
            signed.signature,
            b"fedvision/message/v1" + consortium.digest + bytes([signed.sender]) + signed.body,
        )
    assert (seven.folder() / "test.json").exists()
    assert not [event for event in of(events, "train") if event["site"] == "c" and event["round"] == 2]


@pytest.mark.parametrize("rounds", [(1, 1), (1, 2), (2, 3)])
def test_two_liars_waste_two_rounds_at_most(seven: Stage, rounds: tuple[int, int]) -> None:
    job = seven.make_job("sketch", rounds=4, evaluation__every=4)
    events = seven.run(job, lie=false_sketch("c", "f", rounds=rounds))
    wasted = [event["round"] for event in of(events, "thrown away")]
    assert wasted == sorted(set(rounds))
    assert {event["site"] for event in of(events, "expelled")} == {"c", "f"}
    assert len(of(events, "round")) == 4 - len(wasted)
    assert of(events, "round")[-1]["num_sites"] == 5


@pytest.mark.parametrize("level", ["sum", "sketch", "gram"])
def test_garbage_shares_cost_an_attempt_and_no_round(seven: Stage, level: str) -> None:
    job = seven.make_job(level, rounds=1)
    events = seven.run(job, lie=garbage_box("b", "e"))
    assert {(event["site"], event["rule"]) for event in of(events, "expelled")} == {
        ("b", "box"),
        ("e", "box"),
    }
    assert len(of(events, "attempt")) == 2
    assert not of(events, "thrown away")
    assert [event["num_sites"] for event in of(events, "round")] == [5]


def lying_encoder(
    monkeypatch: pytest.MonkeyPatch, liar: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Give one site software that encodes something else."""
    encode_update = fedvision_sites.work.encode_update

    def encode_lie(released: Any, cases: int, loss: float, job: Job, consortium: Any, key: Any) -> np.ndarray:
        vector = encode_update(released, cases, loss, job, consortium, key)
        return (
            change(vector.view(np.int32).astype(np.int64)).astype(np.int32).view(np.uint32)
            if key[0] == liar
            else vector
        )

    monkeypatch.setattr(fedvision_sites.work, "encode_update", encode_lie)


def heavy(vector: np.ndarray) -> np.ndarray:
    """More weight than all sites can have."""
    vector[-1] = 12 * abs(vector[-1])
    return vector


def negative(vector: np.ndarray) -> np.ndarray:
    """So little weight that the sum of all is negative."""
    vector[-1] = -9 * abs(vector[-1])
    return vector


def absurd_loss(vector: np.ndarray) -> np.ndarray:
    """A training loss far outside of its range."""
    vector[-2] = -8 * vector[-1]
    return vector


@pytest.mark.parametrize("level", ["sum", "sketch", "gram"])
@pytest.mark.parametrize("change", [heavy, negative, absurd_loss])
def test_a_lie_about_weight_or_loss_does_not_stop_the_run(
    seven: Stage, monkeypatch: pytest.MonkeyPatch, level: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    lying_encoder(monkeypatch, "d", change)
    job = seven.make_job(level, rounds=1)
    events = seven.run(job)
    assert of(events, "round") or of(events, "thrown away")
    for event in of(events, "round"):
        assert event["update_norm"] <= job.aggregation.clip_norm * (1 + 1e-6)


def cancelling(vector: np.ndarray) -> np.ndarray:
    """Nothing but a weight that cancels the weights of all the others, within the norm bound."""
    vector[:-1] = 0
    vector[-1] = -8 * abs(vector[-1])
    return vector


def test_a_site_that_lies_about_its_weight_wastes_no_round(
    seven: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    lying_encoder(monkeypatch, "d", cancelling)
    job = seven.make_job("sketch", rounds=4, evaluation__every=4, secure_aggregation__weight_cap=20)
    events = seven.run(job)
    assert not of(events, "expelled")
    assert not of(events, "thrown away")
    assert len(of(events, "weight")) == 4


@pytest.mark.parametrize("value", [1e9, -1e9])
def test_a_lie_in_statistics_does_not_stop_the_run(
    seven: Stage, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    judge = fedvision_sites.work.Site._judge

    def lie(self: Any, request: Any, prepared: Any) -> Any:
        found = judge(self, request, prepared)
        return (
            dataclasses.replace(found, statistics=found.statistics + value)
            if self.config.name == "d"
            else found
        )

    monkeypatch.setattr(fedvision_sites.work.Site, "_judge", lie)
    events = seven.run(seven.make_job("sum", rounds=2))
    assert len(of(events, "round")) == 2


# --- kills ------------------------------------------------------------------------------------------------


def kill_at(number: int) -> Callable[[dict[str, Any]], None]:
    """Return an observer that kills the run at its ``number``-th event."""
    seen = 0

    def observe(event: dict[str, Any]) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            raise Killed

    return observe


@pytest.mark.parametrize(("level", "rounds"), [("sum", 2), ("sketch", 1)])
def test_a_run_killed_at_any_event_resumes_to_the_same_model(three: Stage, level: str, rounds: int) -> None:
    job = three.make_job(level, rounds=rounds)
    seen: Events = []
    three.run(job, "whole", observe=seen.append)
    whole = three.model("whole")
    for number in range(1, len(seen) + 1):
        with pytest.raises(Killed):
            three.run(job, f"killed-{number}", observe=kill_at(number))
        three.run(job, f"killed-{number}")
        assert np.array_equal(three.model(f"killed-{number}"), whole), seen[number - 1]
        shutil.rmtree(three.folder(f"killed-{number}"))


def test_two_runs_of_one_seed_are_the_same_bit_for_bit(three: Stage) -> None:
    network = {"model__args": {"channels": [20, 48], "strides": [2], "num_res_units": 0}}
    for name, level in (("first", "sum"), ("second", "sum"), ("third", "sketch"), ("fourth", "sketch")):
        three.run(three.make_job(level, rounds=1, **network), name)
        assert np.array_equal(three.model(name), three.model("first"))
    three.run(three.make_job("sum", rounds=1, seed=3, **network), "other")
    assert not np.array_equal(three.model("first"), three.model("other"))


# --- wrong papers, absent sites ---------------------------------------------------------------------------


def test_a_job_below_its_smallest_cohort_does_not_start(three: Stage) -> None:
    with pytest.raises(ConfigError, match="smallest_cohort is 5"):
        three.run(three.make_job("sum", secure_aggregation={"smallest_cohort": 5}))


def test_too_few_sites_in_a_round_stop_the_run_and_name_the_charter(seven: Stage) -> None:
    job = seven.make_job("sum", rounds=2, secure_aggregation={"smallest_cohort": 6, "level": "sum"})

    def absent(folder: Path) -> Lie:
        def lie(site: str, request: Request, reply: Reply) -> Reply:
            gone = isinstance(request, TrainRequest) and request.round == 1 and site in "ab"
            return Refusal(reply.job_digest, site, 1, "gone") if gone else reply

        return lie

    with pytest.raises(RoundError, match="5 sites are ready, the charter needs 6"):
        seven.run(job, lie=absent)
    events = seven.run(job)
    assert [event["num_sites"] for event in of(events, "round")] == [7, 7]


def test_a_site_that_misses_a_round_is_in_the_next(seven: Stage) -> None:
    def absent(folder: Path) -> Lie:
        def lie(site: str, request: Request, reply: Reply) -> Reply:
            gone = isinstance(request, TrainRequest) and request.round == 1 and site == "b"
            return Refusal(reply.job_digest, site, 1, "gone") if gone else reply

        return lie

    events = seven.run(seven.make_job("sketch", rounds=2), lie=absent)
    assert [event["num_sites"] for event in of(events, "round")] == [6, 7]


def gone(*where: tuple[str, str]) -> Callable[[Path], Lie]:
    """Return the silence of sites from a step on, given as (site, step)."""

    def make(folder: Path) -> Lie:
        def lie(site: str, request: Request, reply: Reply) -> Reply:
            due = isinstance(reply, SecureReply) and (site, reply.step) in where
            return Refusal(reply.job_digest, site, 1, "gone") if due and reply.round == 1 else reply

        return lie

    return make


def test_two_sites_that_vanish_again_and_again_do_not_stop_a_run_at_level_gram(seven: Stage) -> None:
    def vanishing(folder: Path) -> Lie:
        def lie(site: str, request: Request, reply: Reply) -> Reply:
            step = getattr(reply, "step", "")
            due = (site, step) in (("g", "mask"), ("b", "accept"))
            return Refusal(reply.job_digest, site, getattr(request, "round", 0), "gone") if due else reply

        return lie

    events = seven.run(seven.make_job("gram", rounds=4, evaluation__every=4), lie=vanishing)
    assert [event["round"] for event in of(events, "thrown away")] == [1, 3]
    assert [(event["round"], event["num_sites"]) for event in of(events, "round")] == [(2, 5), (4, 5)]


@pytest.mark.parametrize(
    ("where", "missing"),
    [
        ([("g", "mask")], "g"),
        ([("g", "accept")], ""),
        ([("g", "unmask")], ""),
        ([("b", "mask"), ("g", "mask")], "bg"),
        ([("b", "accept"), ("g", "mask")], "bg"),
        ([("b", "unmask"), ("g", "mask")], "g"),
    ],
    ids=lambda value: "-".join(map("".join, value)),
)
def test_a_site_that_vanishes_at_a_step_leaves_the_sum_of_the_others(
    seven: Stage, where: list[tuple[str, str]], missing: str
) -> None:
    job = seven.make_job("sum", rounds=1)
    events = seven.run(job, "vanished", gone(*where))
    assert [event["num_sites"] for event in of(events, "round")] == [7 - len(missing)]
    seven.run(job, "absent", gone(*((site, "ready") for site in missing)))
    assert np.array_equal(seven.model("vanished"), seven.model("absent"))


def new_key(site: str) -> Callable[[Path], None]:
    """Return what gives a site a key that the roster does not have."""

    def prepare(folder: Path) -> None:
        path = folder / "sites" / site / "identity.pem"
        path.unlink()
        path.with_suffix(".pub").unlink(missing_ok=True)
        for pub in path.parent.glob("*.pub"):
            pub.unlink()
        identity.save(identity.generate(site), path)

    return prepare


def test_a_site_with_another_key_than_the_rosters_refuses_and_with_the_right_one_takes_part(
    three: Stage,
) -> None:
    job = three.make_job("sum", rounds=1)
    kept: dict[str, bytes] = {}

    def prepare(folder: Path) -> None:
        kept["key"] = (folder / "sites" / "b" / "identity.pem").read_bytes()
        new_key("b")(folder)

    with pytest.raises(RoundError, match=r"site b refuses the job \(protocol: roster error\)"):
        three.run(job, prepare=prepare)
    path = three.folder() / "sites" / "b" / "identity.pem"
    path.write_bytes(kept["key"])
    assert len(of(three.run(job), "round")) == 1


def test_a_site_that_pinned_another_governance_refuses(three: Stage) -> None:
    job = three.make_job("sum", rounds=1)

    def other_governance(folder: Path) -> None:
        stranger = identity.generate("governance")
        line = identity.public_line("governance", stranger.public) + "\n"
        (folder / "secagg" / "stranger.pub").write_text(line)

    folder = three.make_folder(job, "first", other_governance)
    plan = dataclasses.replace(make_plan(job), threads=1)
    configs = site_configs(plan, folder)
    stranger = identity.parse_public((folder / "secagg" / "stranger.pub").read_text())[1]
    assert stranger != governance_key(folder)
    assert configs[1].secure is not None
    configs[1] = dataclasses.replace(
        configs[1], secure=dataclasses.replace(configs[1].secure, governance=stranger)
    )
    with pytest.raises(RoundError, match=r"site b refuses the job \(message error\)"):
        run_job(
            job.public(), LocalLink(configs), folder, plan.cohort, lambda event: None, server_keys(folder)
        )


def test_an_enrolment_that_is_anothers_stops_the_run_before_any_training(three: Stage) -> None:
    seen: dict[str, Any] = {}

    def copied(folder: Path) -> Lie:
        def lie(site: str, request: Request, reply: Reply) -> Reply:
            if isinstance(reply, HelloReply) and reply.enrolment.size:
                seen[site] = reply.enrolment
                if site == "b":
                    return dataclasses.replace(reply, enrolment=seen["a"])
            return reply

        return lie

    job = three.make_job("sum", rounds=1)
    with pytest.raises(RoundError, match=r"enrolments are not in order.*rule roster"):
        three.run(job, lie=copied)
    assert len(of(three.run(job), "round")) == 1
