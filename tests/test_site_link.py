"""The server's link and the sites' workers, joined by a stand-in for Flower that loses messages."""

import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.supercore.task_identity import TaskIdentity

from fedvision.audit.log import AuditLog, peer_heads, read_log, verify_log
from fedvision.config import load_job, parse_job
from fedvision.errors import Stopped, VerificationError
from fedvision.secagg import identity
from fedvision.secagg.codec import encode
from fedvision.simulation.run import make_plan, run_federation, start_run
from fedvision.storage import load_tensors, read_json, read_lines
from fedvision.wire.envelope import SERVER, Seal, open_seal, sealed
from fedvision.wire.messages import HelloRequest, Refusal, as_vector
from fedvision.wire.records import pack
from fedvision_server.chartering import load_job_folder
from fedvision_server.cli import main as server_main
from fedvision_server.deployed import SiteLink, node_keys, noted_in, run_in_folder
from fedvision_server.home import Deadlines, ServerHome
from fedvision_server.queue import open_queue
from fedvision_sites.cli import main as site_main
from fedvision_sites.home import SiteHome
from fedvision_sites.worker import Worker
from tests.conftest import tiny_content
from tests.server_homes import make_home, write_job

NAMES = ("a", "b", "c")
Change = Callable[[str, RecordDict], RecordDict | None]


class StandIn:
    """Flower's Grid with workers behind it.

    Args:
        server: The coordinator.
        sites: The sites' folders by name.
        change: Is given a site's name and its sealed reply; returns what arrives, None for nothing.
    """

    def __init__(
        self, server: ServerHome, sites: dict[str, SiteHome], change: Change = lambda name, reply: reply
    ) -> None:
        self.keys = {
            name: bytes.fromhex(read_json(server.sites / f"{name}.json")["node_key"]) for name in sites
        }
        self.homes = sites
        self.workers = {name: start_worker(home) for name, home in sites.items()}
        self.numbers = {name: 1000 + index for index, name in enumerate(sites)}
        self.started = dict.fromkeys(sites, time.time() - 10)
        self.online = set(sites)
        self.change = change
        self.asked: list[tuple[str, RecordDict]] = []
        self.errors: set[str] = set()
        self._open: dict[str, tuple[str, Message]] = {}

    def get_nodes(self) -> list[Any]:
        return [
            SimpleNamespace(
                node_id=self.numbers[name],
                public_key=self.keys[name],
                last_activated_at=datetime.fromtimestamp(self.started[name], UTC).isoformat(),
            )
            for name in sorted(self.online)
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            name = next(key for key, node in self.numbers.items() if node == message.metadata.dst_node_id)
            ids.append(f"message-{len(self.asked)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.asked.append((name, message.content))
            self._open[ids[-1]] = (name, message)
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        replies = []
        for message_id in ids:
            name, message = self._open.get(message_id, ("", None))
            if message is None or name not in self.online:
                continue
            del self._open[message_id]
            if name in self.errors:
                self.errors.remove(name)
                replies.append(Message(Error(1, "gone"), reply_to=message))
                continue
            content = self.workers[name].answer(message.content)
            content = content and self.change(name, content)
            if content is not None:
                replies.append(Message(content, reply_to=message))
        return replies

    def restart(self, name: str) -> None:
        """Start a site's program again."""
        self.workers[name] = start_worker(self.homes[name])
        self.started[name] = time.time() + 0.01


def start_worker(home: SiteHome) -> Worker:
    settings = home.settings()
    return Worker(home, settings, AuditLog(home.audit, identity.load(home.identity), settings.site.name))


@dataclasses.dataclass
class Stage:
    """A coordinator with a submitted job, and its sites."""

    server: ServerHome
    sites: dict[str, SiteHome]
    job: str

    @property
    def folder(self) -> Path:
        return self.server.jobs / self.job

    def run(self, grid: StandIn) -> dict[str, Any]:
        """Run the job as Flower's ServerApp does; return its outcome."""
        run_in_folder(grid, self.server, self.job)  # type: ignore[arg-type]
        return read_json(self.folder / "outcome.json")

    def link(self, grid: StandIn, **seconds: int) -> SiteLink:
        """Return a link with short deadlines."""
        started = load_job_folder(self.server, self.job)
        roster = started.keys.consortium.roster
        own = identity.load(self.server.server_key)
        return SiteLink(
            grid,  # type: ignore[arg-type]
            self.folder,
            roster,
            node_keys(self.server, roster),
            started.numbers,
            own,
            AuditLog(self.server.audit, own, SERVER),
            Deadlines(**{"hello_s": 1, "train_s": 1, "step_s": 1, **seconds}),
        )

    def weights(self) -> np.ndarray:
        tensors, _ = load_tensors(self.folder / "model.safetensors")
        return np.concatenate([tensors[key].ravel() for key in sorted(tensors)])


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation")
    server = make_home(folder, NAMES)
    digits = identity.fingerprint(identity.parse_public(server.governance_pub.read_text())[1])
    for name in NAMES:
        kit, own = str(folder / f"{name}.kit.json"), folder / name
        assert site_main(["join", kit, "--home", str(own), "--governance", digits]) == 0
        text = (own / "site.toml").read_text(encoding="utf-8")
        for before, after in (("automatic = false", "automatic = true"), ("cohort = 5", "cohort = 3")):
            assert text.count(before) == 1
            text = text.replace(before, after)
        (own / "site.toml").write_text(text, encoding="utf-8")
    job = write_job(folder / "job.toml", secure_aggregation__weight_cap=4)
    assert server_main(["submit", str(job), "--home", str(server.root)]) == 0
    return folder


@pytest.fixture
def stage(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Three sites that allow what keeps to their policy, and a job of two rounds."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1, raising=False)
    folder = Path(shutil.copytree(template, tmp_path / "federation"))
    sites = {name: SiteHome(folder / name) for name in NAMES}
    server = ServerHome(folder / "server")
    (entry,) = open_queue(server).jobs()
    return Stage(server, sites, entry.id)


def test_a_deployed_job_makes_the_model_that_the_simulation_makes(stage: Stage, template: Path) -> None:
    outcome = stage.run(StandIn(stage.server, stage.sites))
    assert outcome == {"format": 1, "state": "done", "error": "", "hint": ""}
    job = load_job(stage.folder / "job.toml")
    data = job.model_copy(update={"data": parse_job(tiny_content(template / "data"), "x").data})
    plan = dataclasses.replace(make_plan(data), threads=1)
    start_run(plan, stage.folder.parent / "simulated")
    run_federation(plan, stage.folder.parent / "simulated", lambda event: None, "one-process")
    simulated = dataclasses.replace(stage, job="simulated")
    assert np.array_equal(stage.weights(), simulated.weights())


def test_both_sides_hold_the_others_log_to_its_word(stage: Stage) -> None:
    stage.run(StandIn(stage.server, stage.sites))
    server, site = stage.server, stage.sites["b"]
    keys = {SERVER: server.server_pub, "b": site.identity_pub}
    public = {name: identity.parse_public(path.read_text())[1] for name, path in keys.items()}
    known = peer_heads(site.audit)[SERVER]
    assert len(known) >= 2
    verify_log(server.audit, public[SERVER], known)
    verify_log(site.audit, public["b"], peer_heads(server.audit)["b"])
    lines = server.audit.read_bytes().splitlines(keepends=True)
    server.audit.write_bytes(b"".join(lines[: max(known) - 1]))
    with pytest.raises(VerificationError):
        verify_log(server.audit, public[SERVER], known)


def test_the_audit_logs_say_which_rounds_were_and_what_left(stage: Stage) -> None:
    stage.run(StandIn(stage.server, stage.sites))
    lines = list(read_log(stage.server.audit))
    rounds = [line.fields for line in lines if line.kind == "round-closed"]
    assert [(one["round"], one["num_sites"], one["level"]) for one in rounds] == [
        (1, 3, "sum"),
        (2, 3, "sum"),
    ]
    assert [line.fields["round"] for line in lines if line.kind == "round-opened"] == [1, 2]
    (released,) = (line.fields["model"] for line in lines if line.kind == "released")
    assert released == hashlib.sha256((stage.folder / "model.safetensors").read_bytes()).hexdigest()
    own = list(read_log(stage.sites["a"].audit))
    assert [line.fields["round"] for line in own if line.kind == "round-opened"] == [1, 2]
    left = [(line.fields["round"], line.fields["what"]) for line in own if line.kind == "released"]
    assert left.count((1, "masked input")) == 2  # the update, and the results of validation
    assert left[-1] == (2, "test sums")


def test_the_audit_log_says_who_was_left_out_and_why(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", identity.generate("server"), SERVER)
    note = noted_in(log, "0001-x")
    for event in (
        {"event": "train", "round": 1, "site": "a", "status": "refused", "reason": "norm above the bound"},
        {"event": "train", "round": 1, "site": "b", "status": "accepted"},
        {"event": "expelled", "round": 1, "site": "a", "rule": "sketch", "evidence": "x"},
        {"event": "thrown away", "round": 1, "reason": "the sum is not the sum of the sketches"},
        {"event": "waiting", "round": 0, "sites": ["c"]},
    ):
        note(event)
    assert [line.kind for line in read_log(tmp_path / "audit.jsonl")] == [
        "excluded",
        "expelled",
        "round-closed",
    ]


def as_other(stage: Stage, name: str, reply: RecordDict) -> RecordDict:
    """Seal a reply with another site's key."""
    own = identity.load(stage.sites["c"].identity)
    seal, _ = open_seal(reply, identity.load(stage.sites[name].identity).public)
    return sealed(reply, seal, own)


def as_itself_under_another_name(stage: Stage, name: str, reply: RecordDict) -> RecordDict:
    seal, _ = open_seal(reply, identity.load(stage.sites[name].identity).public)
    return sealed(reply, dataclasses.replace(seal, sender="c"), identity.load(stage.sites[name].identity))


def to_another_request(stage: Stage, name: str, reply: RecordDict) -> RecordDict:
    seal, _ = open_seal(reply, identity.load(stage.sites[name].identity).public)
    return sealed(
        reply, dataclasses.replace(seal, answers="0" * 64), identity.load(stage.sites[name].identity)
    )


def with_another_field(stage: Stage, name: str, reply: RecordDict) -> RecordDict:
    return RecordDict({**reply, "message": ConfigRecord({**reply["message"], "round": 7})})


def unsealed(stage: Stage, name: str, reply: RecordDict) -> RecordDict:
    fields = {key: value for key, value in reply["message"].items() if not key.startswith("seal.")}
    return RecordDict({"message": ConfigRecord(fields)})


def nothing_sensible(stage: Stage, name: str, reply: RecordDict) -> RecordDict:
    return RecordDict({"message": ConfigRecord({"x": 1})})


@pytest.mark.parametrize(
    "change",
    [
        as_other,
        as_itself_under_another_name,
        to_another_request,
        with_another_field,
        unsealed,
        nothing_sensible,
    ],
)
def test_a_reply_that_is_not_the_sites_own_does_not_count(
    stage: Stage, change: Callable[[Stage, str, RecordDict], RecordDict]
) -> None:
    grid = StandIn(
        stage.server, stage.sites, lambda name, reply: change(stage, name, reply) if name == "a" else reply
    )
    replies = dict(stage.link(grid).ask(hellos(stage)))
    assert isinstance(replies[1], Refusal) and replies[1].code == "message"
    assert {replies[2].site, replies[3].site} == {"b", "c"}
    assert any(line.kind == "refused" and line.fields["site"] == "a" for line in read_log(stage.server.audit))


def hellos(stage: Stage) -> dict[int, HelloRequest]:
    """Return the first request of the job, for each site."""
    started = load_job_folder(stage.server, stage.job)
    job, documents = started.job, as_vector(encode(started.keys.documents))
    request = HelloRequest(job.to_json(), job.digest(), started.keys.consortium.charter.layout, documents)
    return dict.fromkeys(started.numbers, request)


def test_a_reply_to_an_earlier_request_does_not_count(stage: Stage) -> None:
    kept: list[RecordDict] = []

    def repeat(name: str, reply: RecordDict) -> RecordDict:
        if name == "a":
            kept.append(reply)
            return kept[0]
        return reply

    link = stage.link(StandIn(stage.server, stage.sites, repeat))
    assert dict(link.ask(hellos(stage)))[1].site == "a"
    second = dict(link.ask(hellos(stage)))[1]
    assert isinstance(second, Refusal) and second.code == "message"


def test_a_site_does_nothing_that_the_server_did_not_ask_it_or_asked_before(stage: Stage) -> None:
    grid = StandIn(stage.server, stage.sites)
    dict(stage.link(grid).ask(hellos(stage)))
    asked = dict(grid.asked)
    worker = grid.workers["a"]
    server, other = identity.load(stage.server.server_key), identity.load(stage.sites["b"].identity)
    seal, _ = open_seal(asked["a"], server.public)
    later = dataclasses.replace(seal, number=time.time_ns())
    for refused in (
        asked["a"],  # once more
        asked["b"],  # for somebody else
        sealed(asked["a"], later, other),
        sealed(asked["a"], dataclasses.replace(later, sender="b"), server),
        sealed(asked["a"], dataclasses.replace(later, receiver="b"), server),
        sealed(asked["a"], dataclasses.replace(later, answers="0" * 64), server),
        sealed(asked["a"], dataclasses.replace(seal, number=seal.number - 1), server),
        pack(next(iter(hellos(stage).values()))),
        RecordDict(),
    ):
        assert worker.answer(refused) is None
        assert start_worker(stage.sites["a"]).answer(refused) is None
    assert worker.answer(sealed(asked["a"], later, server)) is not None


def test_a_sealed_message_that_cannot_be_read_is_refused_with_a_code(stage: Stage) -> None:
    worker = start_worker(stage.sites["a"])
    server = identity.load(stage.server.server_key)
    for number, fields in enumerate(({"x": 1}, {"format": 3, "kind": "refusal"}), 1):
        seal = Seal(SERVER, "a", number, "", 0, "0" * 64)
        reply = worker.answer(sealed(RecordDict({"message": ConfigRecord(fields)}), seal, server))
        assert reply is not None
        open_seal(reply, identity.load(stage.sites["a"].identity).public)
        assert dict(reply["message"])["code"] == "message"


def test_a_job_of_another_name_than_its_digest_writes_nowhere_else(stage: Stage) -> None:
    worker = start_worker(stage.sites["a"])
    server = identity.load(stage.server.server_key)
    request = next(iter(hellos(stage).values()))
    for number, digest in enumerate(("../../x", "", "0" * 65, "G" * 64, "0" * 64), 1):
        wrong = pack(dataclasses.replace(request, job_digest=digest))
        reply = worker.answer(sealed(wrong, Seal(SERVER, "a", number, "", 0, "0" * 64), server))
        assert reply is not None and dict(reply["message"])["kind"] == "refusal"
    assert {path.name for path in stage.sites["a"].jobs.glob("*")} <= {"0" * 16}


def test_a_site_that_is_away_is_waited_for_and_given_up_at_the_deadline(stage: Stage) -> None:
    grid = StandIn(stage.server, stage.sites)
    grid.online.discard("b")
    replies = dict(stage.link(grid).ask(hellos(stage)))
    assert isinstance(replies[2], Refusal) and replies[2].code == "deadline"
    grid.online.add("b")
    assert dict(stage.link(grid).ask(hellos(stage)))[2].site == "b"


def test_a_request_is_sent_again_to_a_site_that_went_away_or_started_again(stage: Stage) -> None:
    grid = StandIn(stage.server, stage.sites)
    grid.errors = {"a"}
    lost: list[str] = []

    def lose_once(name: str, reply: RecordDict) -> RecordDict | None:
        if name == "b" and not lost:
            lost.append(name)
            grid.restart("b")
            return None
        return reply

    grid.change = lose_once
    replies = dict(stage.link(grid, hello_s=20).ask(hellos(stage)))
    assert [replies[number].site for number in (1, 2, 3)] == ["a", "b", "c"]
    assert [name for name, _ in grid.asked].count("a") == 2
    assert [name for name, _ in grid.asked].count("b") == 2


def test_a_run_survives_that_every_site_starts_again_at_every_message(stage: Stage) -> None:
    grid = StandIn(stage.server, stage.sites)
    count = 0

    def restart(name: str, reply: RecordDict) -> RecordDict | None:
        nonlocal count
        count += 1
        if count % 5 == 0:  # the reply is lost with the program
            grid.restart(name)
            return None
        return reply

    grid.change = restart
    assert stage.run(grid)["state"] == "done"
    events = read_lines(stage.folder / "rounds.jsonl")
    assert [event["num_sites"] for event in events if event["event"] == "round"] == [3, 3]


def test_a_stop_file_ends_a_run_that_waits_and_it_goes_on_without_it(stage: Stage) -> None:
    grid = StandIn(stage.server, stage.sites)
    grid.online.clear()
    (stage.folder / "stop").touch()
    with pytest.raises(Stopped):
        dict(stage.link(grid).ask(hellos(stage)))
    assert stage.run(grid)["state"] == "stopped"
    (stage.folder / "stop").unlink()
    grid.online = set(NAMES)
    assert stage.run(grid)["state"] == "done"


def test_a_revoked_site_is_asked_nothing(stage: Stage) -> None:
    grid = StandIn(stage.server, stage.sites)
    assert server_main(["revoke", "b", "--reason", "test", "--home", str(stage.server.root), "--yes"]) == 0
    replies = dict(stage.link(grid).ask(hellos(stage)))
    assert isinstance(replies[2], Refusal) and replies[2].code == "deadline"
    assert "b" not in [name for name, _ in grid.asked]


def test_a_tightened_policy_counts_at_once(stage: Stage) -> None:
    grid = StandIn(stage.server, stage.sites)
    dict(stage.link(grid).ask(hellos(stage)))
    config = stage.sites["a"].config
    config.write_text(config.read_text().replace("largest_rounds = 500", "largest_rounds = 1"))
    replies = dict(stage.link(grid).ask(hellos(stage)))
    assert isinstance(replies[1], Refusal) and replies[1].code == "policy: largest-rounds"
    config.write_text("not a configuration")
    replies = dict(stage.link(grid).ask(hellos(stage)))
    assert isinstance(replies[1], Refusal) and replies[1].code == "config"
    assert replies[2].site == "b"
