"""The coordinator's program: what it does next follows from the disk, whatever has died before."""

import shutil
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedvision.audit.log import read_log
from fedvision.errors import StorageError
from fedvision.storage import append_line, read_json, write_json
from fedvision_server import supervisor as module
from fedvision_server.cli import main
from fedvision_server.home import ServerHome
from fedvision_server.queue import open_queue
from fedvision_server.site_records import load_records
from fedvision_server.supervisor import MAX_CRASHES, Child, Supervisor
from tests.server_homes import make_home, write_job

NAMES = ("a", "b", "c")


class Flower:
    """Stands for Flower's Control interface."""

    def __init__(self, port: int, secret: str) -> None:
        self.registered: dict[bytes, int] = {}
        self.running: list[int] = []
        self.started: list[str] = []
        self.is_up = True

    def _check(self) -> None:
        if not self.is_up:
            raise httpx.ConnectError("refused")

    def is_there(self) -> bool:
        return self.is_up

    def nodes(self) -> dict[bytes, int]:
        self._check()
        return dict(self.registered)

    def online(self) -> list[bytes]:
        return list(self.registered)

    def register(self, key: bytes) -> None:
        self.registered[key] = len(self.registered) + 1

    def unregister(self, node: int) -> None:
        self.registered = {key: number for key, number in self.registered.items() if number != node}

    def start(self, job: str) -> int:
        self._check()
        self.started.append(job)
        self.running.append(100 + len(self.started))
        return self.running[-1]

    def has_ended(self, run: int) -> bool:
        self._check()
        return run not in self.running

    def unfinished(self) -> list[int]:
        return list(self.running)

    def stop(self, run: int) -> None:
        self.running.remove(run)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation")
    make_home(folder, NAMES)
    return folder


@pytest.fixture
def home(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServerHome:
    folder = Path(shutil.copytree(template, tmp_path / "federation"))
    write_job(folder / "job.toml")
    asleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(module, "Control", Flower)
    monkeypatch.setattr(module, "ASK_S", 0.0)
    monkeypatch.setattr(module, "commands", lambda home, settings: {"superlink": asleep, "superexec": asleep})
    return ServerHome(folder / "server")


@pytest.fixture
def at_work(home: ServerHome, request: pytest.FixtureRequest) -> Supervisor:
    found = Supervisor(home, lambda text: None)
    request.addfinalizer(lambda: [child.end() for child in found._children])
    return found


def run(home: ServerHome, *words: str) -> None:
    assert main([*words, "--home", str(home.root)]) == 0


def submit(home: ServerHome) -> str:
    run(home, "submit", str(home.root.parent / "job.toml"))
    return open_queue(home).jobs()[-1].id


def end(supervisor: Supervisor, home: ServerHome, job: str, **outcome: Any) -> None:
    """Let the Flower run of a job end, with an outcome or none."""
    if outcome:
        write_json(home.jobs / job / "outcome.json", {"error": "", "hint": "", **outcome})
    supervisor._control.running.clear()
    supervisor.tick()


def state(home: ServerHome, job: str) -> str:
    return open_queue(home).job(job).state


def test_a_job_is_run_to_its_end(home: ServerHome, at_work: Supervisor) -> None:
    at_work.tick()
    job = submit(home)
    at_work.tick()
    assert state(home, job) == "running"
    at_work.tick()
    assert at_work._control.started == [job]
    end(at_work, home, job, state="done")
    assert state(home, job) == "done"
    assert [line.fields["state"] for line in read_log(home.audit) if line.kind == "finished"] == ["done"]
    at_work.tick()
    assert at_work._control.started == [job]


def test_a_job_that_fails_says_why(home: ServerHome, at_work: Supervisor) -> None:
    job = submit(home)
    at_work.tick()
    end(at_work, home, job, state="failed", error="site a refuses the job (denied)")
    assert state(home, job) == "failed"
    assert open_queue(home).job(job).error == "site a refuses the job (denied)"


def test_a_job_whose_process_died_goes_on_and_is_given_up_without_progress(
    home: ServerHome, at_work: Supervisor
) -> None:
    job = submit(home)
    at_work.tick()
    for _ in range(MAX_CRASHES - 1):
        end(at_work, home, job)
        assert state(home, job) == "running"
    append_line(home.jobs / job / "rounds.jsonl", {"event": "round", "round": 1})
    for _ in range(MAX_CRASHES - 1):
        end(at_work, home, job, state="crashed", error="Traceback\nMemoryError")
        assert state(home, job) == "running"
    end(at_work, home, job, state="crashed", error="Traceback\nMemoryError")
    assert state(home, job) == "failed"
    assert open_queue(home).job(job).error == "MemoryError"


def test_an_operator_stops_a_job(
    home: ServerHome, at_work: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(home)
    at_work.tick()
    run(home, "stop", job)
    at_work.tick()
    assert (home.jobs / job / "stop").exists()
    end(at_work, home, job, state="stopped", error="stopped by an operator")
    assert state(home, job) == "stopped"
    run(home, "submit", "--again", job)
    at_work.tick()
    assert state(home, job) == "running"
    assert not (home.jobs / job / "stop").exists()
    run(home, "stop", job)
    monkeypatch.setattr(module, "STOP_GRACE_S", -1.0)
    at_work.tick()  # it does not stop by itself
    at_work.tick()
    assert state(home, job) == "stopped"


def test_a_killed_supervisor_goes_on_with_what_runs_and_stops_what_nobody_knows(
    home: ServerHome, at_work: Supervisor
) -> None:
    job = submit(home)
    at_work.tick()
    control = at_work._control
    control.running.append(7)
    at_work._lock.close()
    after = Supervisor(home, lambda text: None)
    try:
        after._control = control
        after.tick()
        assert control.running == [101]
        assert state(home, job) == "running"
        assert control.started == [job]
    finally:
        for child in after._children:
            child.end()


def test_sites_are_let_in_when_they_are_enrolled_and_shut_out_when_they_are_revoked(
    home: ServerHome, at_work: Supervisor
) -> None:
    at_work.tick()
    assert len(at_work._control.registered) == 3
    run(home, "revoke", "b", "--reason", "test", "--yes")
    at_work.tick()
    keys = {bytes.fromhex(load_records(home)[name].node_key) for name in ("a", "c")}
    assert set(at_work._control.registered) == keys
    assert set(read_json(home.flower / "online.json")) == {"a", "b", "c"}


def test_two_supervisors_in_one_home_are_refused(home: ServerHome, at_work: Supervisor) -> None:
    with pytest.raises(StorageError, match=r"runs in .* already"):
        Supervisor(home, lambda text: None)


def test_programs_that_end_are_started_again_with_growing_pauses(home: ServerHome, tmp_path: Path) -> None:
    child = Child("x", [sys.executable, "-c", ""], {})
    with (tmp_path / "log").open("wb") as log:
        assert child.keep(log)
        assert child.process is not None
        child.process.wait()
        assert not child.keep(log)  # it has ended: a pause first
        assert child.pause_s == 2.0
        child.next_start = 0.0
        assert child.keep(log)
        child.end()
        assert child.process is None


def test_a_superlink_that_is_away_is_waited_for(home: ServerHome, at_work: Supervisor) -> None:
    job = submit(home)
    at_work.tick()
    at_work._control.is_up = False
    at_work.tick()
    assert not at_work.health().is_ok
    at_work._control.is_up = True
    at_work.tick()
    assert at_work.health().is_ok
    assert at_work.health().metrics["fedvision_sites_enrolled"] == 3
    assert state(home, job) == "running"
