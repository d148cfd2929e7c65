"""The queue of jobs: order, signatures, forged rows, kills at any moment, several processes, full disks."""

import hashlib
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pydantic import ValidationError

from fedvision.errors import ConfigError, StorageError
from fedvision.secagg import identity
from fedvision_server import database, job_requests, queue
from fedvision_server.job_requests import Request, Rules, Wanted, read_requests, sign_request
from fedvision_server.queue import Entry, JobQueue, is_meant

OPERATOR, OTHER, AUDITOR = (identity.generate(name) for name in ("operator", "other", "auditor"))
SERVER = identity.generate("server").public
OPERATORS = (OPERATOR.public, OTHER.public)
ENDED = ("done", "failed", "stopped")


def wanted(number: int | str = 1) -> Wanted:
    digest = hashlib.sha256(f"job {number}".encode()).hexdigest()
    return Wanted(name="nuclei", job=digest, charter=digest, sites=("a", "b", "c"), held_out=("d",))


def submitted(jobs: JobQueue, number: int | str = 1) -> Entry:
    return jobs.submit(OPERATOR, jobs.new_id("nuclei"), wanted(number))


def execute(path: Path, statement: str, *values: Any) -> list[tuple[Any, ...]]:
    """Do what somebody who can write the file does."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        return db.execute(statement, values).fetchall()


@pytest.fixture
def jobs(tmp_path: Path) -> JobQueue:
    return JobQueue(tmp_path / "jobs.db", OPERATORS, SERVER)


def runnable(jobs: JobQueue) -> str | None:
    entry = jobs.next_runnable()
    return None if entry is None else entry.id


def test_jobs_run_one_at_a_time_in_the_order_in_which_they_were_submitted(jobs: JobQueue) -> None:
    assert jobs.jobs() == [] and jobs.next_runnable() is None
    first, second = submitted(jobs, 1), submitted(jobs, 2)
    assert (first.id, second.id) == ("0001-nuclei", "0002-nuclei")
    assert (first.state, first.sites, first.held_out) == ("waiting", ("a", "b", "c"), ("d",))
    assert first.operator == OPERATOR.public.hex() and first.wanted == wanted(1)
    assert runnable(jobs) == first.id
    running = jobs.set_running(first.id, 7)
    assert (running.state, running.flower_run, running.attempts) == ("running", 7, 1)
    assert runnable(jobs) == first.id
    with pytest.raises(ConfigError, match="0001-nuclei runs, and one runs at a time"):
        jobs.set_running(second.id, 8)
    assert jobs.set_running(first.id, 9).attempts == 2
    done = jobs.set_done(first.id)
    assert done.state == "done" and done.ended and done.started == running.started
    assert runnable(jobs) == second.id
    jobs.set_failed(second.id, "too few sites")
    assert jobs.next_runnable() is None
    assert [(one.state, one.error) for one in jobs.jobs()] == [("done", ""), ("failed", "too few sites")]


def test_a_failed_job_goes_on_after_the_others(jobs: JobQueue) -> None:
    first, second = submitted(jobs, 1), submitted(jobs, 2)
    jobs.set_running(first.id, 1)
    jobs.set_failed(first.id, "site a is away")
    again = jobs.submit_again(OTHER, first.id)
    assert (again.state, again.error, again.ended, again.flower_run) == ("waiting", "", None, 1)
    assert again.operator == OPERATOR.public.hex()
    assert runnable(jobs) == second.id
    jobs.set_running(second.id, 2)
    jobs.set_done(second.id)
    assert runnable(jobs) == first.id
    with pytest.raises(ConfigError, match="0001-nuclei is waiting"):
        jobs.submit_again(OPERATOR, first.id)


def test_a_job_that_waits_is_stopped_at_once_and_one_that_runs_by_the_supervisor(jobs: JobQueue) -> None:
    first, second = submitted(jobs, 1), submitted(jobs, 2)
    assert jobs.request_stop(OPERATOR, second.id).state == "stopped"
    jobs.set_running(first.id, 1)
    with pytest.raises(ConfigError, match="no operator asked"):
        jobs.set_stopped(first.id)
    assert not jobs.stop_requested(first.id)
    assert jobs.request_stop(OTHER, first.id).state == "running"
    assert jobs.request_stop(OTHER, first.id).stop_requested
    assert jobs.stop_requested(first.id)
    assert runnable(jobs) == first.id  # so that the supervisor stops it
    with pytest.raises(ConfigError, match="it is to be stopped"):
        jobs.set_running(first.id, 2)
    with pytest.raises(ConfigError, match="still being stopped"):
        jobs.submit_again(OPERATOR, first.id)
    assert jobs.set_stopped(first.id).state == "stopped"
    assert jobs.next_runnable() is None
    with pytest.raises(ConfigError, match="is stopped already"):
        jobs.request_stop(OPERATOR, first.id)
    assert not jobs.submit_again(OPERATOR, first.id).stop_requested
    assert runnable(jobs) == first.id
    assert len(execute(jobs.path, "SELECT * FROM requests WHERE job = ?", first.id)) == 3


def test_a_job_that_has_ended_cannot_end_again(jobs: JobQueue) -> None:
    entry = submitted(jobs)
    with pytest.raises(ConfigError, match="is waiting, and cannot become done"):
        jobs.set_done(entry.id)
    jobs.set_running(entry.id, 1)
    jobs.set_done(entry.id)
    for change in (jobs.set_done, lambda name: jobs.set_failed(name, ""), jobs.set_stopped):
        with pytest.raises(ConfigError, match="is done, and cannot become"):
            change(entry.id)
    with pytest.raises(ConfigError, match="cannot be started: it is done"):
        jobs.set_running(entry.id, 2)


def test_only_operators_keys_submit_and_stop(jobs: JobQueue) -> None:
    entry = submitted(jobs)
    for ask in (
        lambda: jobs.submit(AUDITOR, jobs.new_id("x"), wanted(2)),
        lambda: jobs.request_stop(AUDITOR, entry.id),
        lambda: jobs.submit_again(AUDITOR, entry.id),
    ):
        with pytest.raises(ConfigError, match="the key of auditor is not an operator's"):
            ask()
    assert len(jobs.jobs()) == 1 and not jobs.stop_requested(entry.id)


def test_the_same_job_is_not_queued_twice(jobs: JobQueue) -> None:
    entry = submitted(jobs)
    with pytest.raises(ConfigError, match="in the queue already: 0001-nuclei, waiting") as caught:
        jobs.submit(OTHER, jobs.new_id("nuclei"), wanted())
    assert "submit --again 0001-nuclei" in caught.value.hint
    with pytest.raises(ConfigError, match="in the queue already"):
        jobs.check_new(wanted().job)
    jobs.check_new(wanted(2).job)
    with pytest.raises(ConfigError, match="0001-nuclei was submitted before"):
        jobs.submit(OPERATOR, entry.id, wanted(2))
    with pytest.raises(ConfigError, match="'0077-x' is no id of this queue"):
        jobs.submit(OPERATOR, "0077-x", wanted(2))


def test_what_cannot_be_announced_is_not_done(jobs: JobQueue) -> None:
    said = []

    def full() -> None:
        raise StorageError("the audit log cannot be written")

    with pytest.raises(StorageError, match="audit log"):
        jobs.submit(OPERATOR, jobs.new_id("x"), wanted(), full)
    assert jobs.jobs() == []
    entry = jobs.submit(OPERATOR, jobs.new_id("x"), wanted(), lambda: said.append("submit"))
    jobs.request_stop(OPERATOR, entry.id)
    with pytest.raises(StorageError, match="audit log"):
        jobs.submit_again(OPERATOR, entry.id, full)
    assert jobs.job(entry.id).state == "stopped" and jobs.job(entry.id).stop_requested
    jobs.submit_again(OPERATOR, entry.id, lambda: said.append("again"))
    with pytest.raises(ConfigError):
        jobs.submit_again(OPERATOR, entry.id, lambda: said.append("too much"))
    assert said == ["submit", "again"]


def test_a_job_is_meant_by_its_id_or_its_number(jobs: JobQueue) -> None:
    entry = submitted(jobs)
    assert jobs.job("1") == jobs.job("0001") == jobs.job("0001-nuclei") == entry
    assert is_meant("12", "0012-x") and not is_meant("1", "0012-x") and not is_meant("x", "0012-x")
    assert not is_meant("²", "0002-x")
    for absent in ("2", "nuclei", "0001-nucle", ""):
        with pytest.raises(ConfigError, match="there is no job"):
            jobs.job(absent)


def test_long_names_make_short_ids(jobs: JobQueue) -> None:
    assert jobs.new_id("x" * 64) == "0001-" + "x" * 32
    entry = jobs.submit(OPERATOR, "0001-" + "x" * 32, wanted())
    assert runnable(jobs) == entry.id


@pytest.mark.parametrize("run", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_flower_runs_of_64_bits_are_kept(jobs: JobQueue, run: int) -> None:
    entry = submitted(jobs)
    assert jobs.set_running(entry.id, run).flower_run == run == jobs.job(entry.id).flower_run


def test_a_flower_run_of_more_bits_is_refused(jobs: JobQueue) -> None:
    for run in (-1, 2**64):
        with pytest.raises(ValueError, match="flower_run must be in"):
            jobs.set_running("0001-nuclei", run)


# What somebody does who can write the file, but has no operator's key.


def add_row(path: Path, job_id: str, digest: str, state: str = "waiting", **more: Any) -> None:
    columns = {"id": job_id, "digest": digest, "state": state, "queued": 0, "submitted": "now", **more}
    names = ", ".join(columns)
    marks = ", ".join("?" * len(columns))
    execute(path, f"INSERT INTO jobs ({names}) VALUES ({marks})", *columns.values())


def add_request(path: Path, job_id: str, body: object, signature: object) -> None:
    execute(path, "INSERT INTO requests (job, body, signature) VALUES (?, ?, ?)", job_id, body, signature)


def requests_of(path: Path, job_id: str) -> list[tuple[bytes, bytes]]:
    return execute(path, "SELECT body, signature FROM requests WHERE job = ? ORDER BY number", job_id)  # type: ignore[return-value]


def is_inert(jobs: JobQueue, job_id: str) -> bool:
    """Whether a row does nothing, and nobody can be made to believe in it."""
    entry = jobs.job(job_id)
    assert entry.wanted is None and entry.sites == () and entry.operator == ""
    found = jobs.next_runnable()
    for change in (
        lambda: jobs.set_running(job_id, 1),
        lambda: jobs.submit_again(OPERATOR, job_id),
        lambda: jobs.request_stop(OPERATOR, job_id),
        lambda: jobs.set_done(job_id),
    ):
        with pytest.raises(ConfigError, match="without an operator's valid signature"):
            change()
    return found is None or found.id != job_id


def no_request(jobs: JobQueue, job_id: str) -> None:
    pass


def of_a_stranger(jobs: JobQueue, job_id: str) -> None:
    add_request(jobs.path, job_id, *sign_request(AUDITOR, SERVER, "submit", job_id, [], wanted("forged")))


def in_an_operators_name(jobs: JobQueue, job_id: str) -> None:
    body, _ = sign_request(OPERATOR, SERVER, "submit", job_id, [], wanted("forged"))
    add_request(jobs.path, job_id, body, AUDITOR.sign(job_requests.LABEL + body))


def for_another_server(jobs: JobQueue, job_id: str) -> None:
    elsewhere = identity.generate("server").public
    add_request(jobs.path, job_id, *sign_request(OPERATOR, elsewhere, "submit", job_id, [], wanted("forged")))


def of_another_job(jobs: JobQueue, job_id: str) -> None:
    for body, signature in requests_of(jobs.path, "0001-nuclei"):
        add_request(jobs.path, job_id, body, signature)


def under_another_label(jobs: JobQueue, job_id: str) -> None:
    body, _ = sign_request(OPERATOR, SERVER, "submit", job_id, [], wanted("forged"))
    add_request(jobs.path, job_id, body, OPERATOR.sign(b"fedvision/message/v1" + body))


def with_another_digest(jobs: JobQueue, job_id: str) -> None:
    add_request(jobs.path, job_id, *sign_request(OPERATOR, SERVER, "submit", job_id, [], wanted("signed")))


def spelled_otherwise(jobs: JobQueue, job_id: str) -> None:
    body, _ = sign_request(OPERATOR, SERVER, "submit", job_id, [], wanted("forged"))
    body = json.dumps(json.loads(body), indent=1).encode()
    add_request(jobs.path, job_id, body, OPERATOR.sign(job_requests.LABEL + body))


def of_no_form(jobs: JobQueue, job_id: str) -> None:
    for body, signature in ((b"", b""), (b"[]", b"x"), ("text", 7), (b"\xff", b"\0" * 64), (b"{}", "x")):
        add_request(jobs.path, job_id, body, signature)


FORGERIES: list[Callable[[JobQueue, str], None]] = [
    no_request, of_a_stranger, in_an_operators_name, for_another_server, of_another_job, under_another_label,
    with_another_digest, spelled_otherwise, of_no_form,
]  # fmt: skip


@pytest.mark.parametrize("state", ["waiting", "running", "stopped", "nonsense"])
@pytest.mark.parametrize("forge", FORGERIES)
def test_a_forged_row_does_nothing(
    jobs: JobQueue, forge: Callable[[JobQueue, str], None], state: str
) -> None:
    genuine = submitted(jobs)
    job_id = "0000-forged"
    add_row(jobs.path, job_id, wanted("forged").job, state)
    forge(jobs, job_id)
    assert is_inert(jobs, job_id)
    assert runnable(jobs) == genuine.id
    assert jobs.set_running(genuine.id, 3).state == "running"
    assert jobs.submit(OPERATOR, jobs.new_id("n"), wanted("forged")).state == "waiting"


def test_a_job_copied_to_another_id_does_nothing(jobs: JobQueue) -> None:
    genuine = submitted(jobs)
    add_row(jobs.path, "0000-copy", wanted().job)
    of_another_job(jobs, "0000-copy")
    assert is_inert(jobs, "0000-copy") and runnable(jobs) == genuine.id


def test_what_forgeries_are_made_from_would_count_if_it_were_genuine(jobs: JobQueue) -> None:
    submitted(jobs)
    add_row(jobs.path, "0000-forged", wanted("forged").job)
    request = sign_request(OPERATOR, SERVER, "submit", "0000-forged", [], wanted("forged"))
    add_request(jobs.path, "0000-forged", *request)
    assert runnable(jobs) == "0000-forged"


def test_rows_with_values_of_other_types_are_read_and_do_nothing(jobs: JobQueue) -> None:
    submitted(jobs)
    add_row(jobs.path, "0000-x", b"\0", "running", flower_run="%s", attempts="many", error=b"\xff", ended=3)  # type: ignore[arg-type]
    add_row(jobs.path, b"0000-y", "x", "running", queued="x")  # type: ignore[arg-type]
    statement = (
        "INSERT INTO jobs (id, digest, state, queued, submitted) VALUES (CAST(? AS TEXT), '', '', 0, '')"
    )
    execute(jobs.path, statement, b"\xff\xfe")
    assert [one.state for one in jobs.jobs() if one.wanted] == ["waiting"]
    assert runnable(jobs) == "0001-nuclei"


def test_any_changed_byte_of_a_request_is_found(jobs: JobQueue) -> None:
    entry = submitted(jobs)
    ((body, signature),) = requests_of(jobs.path, entry.id)
    rules = Rules(OPERATORS, SERVER)
    assert len(read_requests([(body, signature)], entry.id, rules)) == 1
    for place in range(len(body)):
        changed = body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
        assert not read_requests([(changed, signature)], entry.id, rules), place
    for place in range(len(signature)):
        changed = signature[:place] + bytes([signature[place] ^ 1]) + signature[place + 1 :]
        assert not read_requests([(body, changed)], entry.id, rules), place


def test_a_forged_stop_stops_nothing_and_a_forged_row_hides_no_stop(jobs: JobQueue) -> None:
    entry = submitted(jobs)
    jobs.set_running(entry.id, 1)
    ours = read_requests(requests_of(jobs.path, entry.id), entry.id, Rules(OPERATORS, SERVER))
    add_request(jobs.path, entry.id, *sign_request(AUDITOR, SERVER, "stop", entry.id, ours))
    assert not jobs.stop_requested(entry.id)
    jobs.request_stop(OPERATOR, entry.id)
    add_request(jobs.path, entry.id, b"{}", b"x")
    assert jobs.stop_requested(entry.id)


def test_an_old_request_to_go_on_does_not_count_twice(jobs: JobQueue) -> None:
    entry = submitted(jobs)
    jobs.request_stop(OPERATOR, entry.id)
    jobs.submit_again(OPERATOR, entry.id)
    jobs.request_stop(OPERATOR, entry.id)
    first, _, again, _ = requests_of(jobs.path, entry.id)
    for copied in (again, first, again):
        add_request(jobs.path, entry.id, *copied)
    execute(jobs.path, "UPDATE jobs SET state = 'waiting'")
    assert jobs.job(entry.id).stop_requested
    assert jobs.next_runnable() is None
    with pytest.raises(ConfigError, match="it is to be stopped"):
        jobs.set_running(entry.id, 1)


def test_the_requests_of_an_operator_who_left_count_no_more(jobs: JobQueue) -> None:
    entry = submitted(jobs)
    later = JobQueue(jobs.path, [OTHER.public], SERVER)
    assert later.next_runnable() is None and later.job(entry.id).wanted is None
    with pytest.raises(ConfigError, match="without an operator's valid signature"):
        later.request_stop(OTHER, entry.id)
    assert JobQueue(jobs.path).next_runnable() is None
    assert runnable(jobs) == entry.id


def test_a_request_says_what_to_run_or_what_it_follows() -> None:
    body, _ = sign_request(OPERATOR, SERVER, "submit", "0001-x", [], wanted())
    content = json.loads(body)
    assert Request.model_validate(content).wanted == wanted()
    for change in (
        {"wanted": None},
        {"previous": "0" * 64},
        {"action": "stop"},
        {"nonce": "0"},
        {"id": "../x"},
        {"id": "0001-../x"},
        {"more": 1},
        {"format": 2},
    ):
        with pytest.raises(ValidationError):
            Request.model_validate(content | change)


# The file.


def test_the_file_is_for_its_owner_only(jobs: JobQueue) -> None:
    submitted(jobs)
    with closing(sqlite3.connect(jobs.path)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        modes = {path.name: path.stat().st_mode & 0o777 for path in jobs.path.parent.iterdir()}
    assert modes == {"jobs.db": 0o600, "jobs.db-wal": 0o600, "jobs.db-shm": 0o600}


def test_commits_are_flushed_to_disk(jobs: JobQueue) -> None:
    with database.writing(jobs.path, queue.SCHEMA) as db:
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_a_newer_file_is_refused_and_not_touched(jobs: JobQueue) -> None:
    submitted(jobs)
    execute(jobs.path, "PRAGMA user_version = 2")
    for use in (jobs.jobs, jobs.next_runnable, lambda: jobs.new_id("x")):
        with pytest.raises(StorageError, match="newer version, format 2, this one knows 1") as caught:
            use()
        assert caught.value.hint == "update fedvision on this machine"
    assert execute(jobs.path, "PRAGMA user_version") == [(2,)]


def test_an_older_file_is_migrated_by_whoever_first_writes(
    jobs: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = submitted(jobs)
    old = queue.SCHEMA

    def add_note(db: sqlite3.Connection) -> None:
        db.execute("ALTER TABLE jobs ADD COLUMN note TEXT NOT NULL DEFAULT 'none'")

    def add_colour(db: sqlite3.Connection) -> None:
        db.execute("ALTER TABLE jobs ADD COLUMN colour TEXT")

    new = database.Schema(
        old.what, old.application_id, 3, old.statements, migrations={1: add_note, 2: add_colour}
    )
    monkeypatch.setattr(queue, "SCHEMA", new)
    with pytest.raises(StorageError, match="older version, format 1, expected 3") as caught:
        jobs.jobs()
    assert "fedvision-server run" in caught.value.hint
    jobs.set_running(entry.id, 5)
    assert execute(jobs.path, "SELECT note, flower_run FROM jobs") == [("none", 5)]
    assert execute(jobs.path, "PRAGMA user_version") == [(3,)]
    assert runnable(jobs) == entry.id


def test_a_migration_that_fails_leaves_the_old_file(jobs: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted(jobs)
    before = execute(jobs.path, "SELECT * FROM jobs")
    old = queue.SCHEMA

    def breaks(db: sqlite3.Connection) -> None:
        db.execute("DROP TABLE jobs")
        db.execute("SELECT nonsense")

    new = database.Schema(old.what, old.application_id, 2, old.statements, migrations={1: breaks})
    monkeypatch.setattr(queue, "SCHEMA", new)
    with pytest.raises(StorageError):
        jobs.new_id("x")
    assert execute(jobs.path, "SELECT * FROM jobs") == before
    assert execute(jobs.path, "PRAGMA user_version") == [(1,)]


@pytest.mark.parametrize("content", [b"", b"not a database, but long enough to be read as one" * 90])
def test_a_file_that_is_no_queue_is_refused(jobs: JobQueue, content: bytes) -> None:
    jobs.path.write_bytes(content)
    for use in (jobs.jobs, lambda: jobs.new_id("x")):
        with pytest.raises(StorageError, match=r"is not a queue of jobs|cannot read"):
            use()
    assert jobs.path.read_bytes() == content


def test_another_programs_database_is_refused(jobs: JobQueue) -> None:
    execute(jobs.path, "CREATE TABLE jobs (x)")
    with pytest.raises(StorageError, match="is not a queue of jobs"):
        jobs.new_id("x")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    jobs = JobQueue(tmp_path / "absent" / "jobs.db", OPERATORS, SERVER)
    assert jobs.jobs() == []
    with pytest.raises(StorageError, match="absent"):
        jobs.new_id("x")


def test_a_back_up_is_whole_while_others_write(jobs: JobQueue, tmp_path: Path) -> None:
    entry = submitted(jobs)
    with closing(sqlite3.connect(jobs.path, isolation_level=None)) as db:
        db.execute("UPDATE jobs SET error = 'in the write-ahead log'")
        database.back_up(jobs.path, tmp_path / "copy.db")
    copy = JobQueue(tmp_path / "copy.db", OPERATORS, SERVER)
    assert [(one.id, one.error) for one in copy.jobs()] == [(entry.id, "in the write-ahead log")]
    assert (tmp_path / "copy.db").stat().st_mode & 0o777 == 0o600
    with pytest.raises(StorageError, match="exists"):
        database.back_up(jobs.path, tmp_path / "copy.db")


def test_a_change_that_is_broken_off_leaves_no_trace(jobs: JobQueue) -> None:
    submitted(jobs)
    with pytest.raises(RuntimeError), database.writing(jobs.path, queue.SCHEMA) as db:
        db.execute("DELETE FROM jobs")
        raise RuntimeError
    assert len(jobs.jobs()) == 1


# Other processes. They get the keys in files, as the programs do.

PRELUDE = """
import hashlib, os, random, resource, signal, sys, time
from pathlib import Path
from fedvision.errors import FedvisionError, StorageError
from fedvision.secagg import identity
from fedvision_server.job_requests import Wanted
from fedvision_server.queue import JobQueue
folder, number = Path(sys.argv[1]), sys.argv[2]
operator = identity.load(folder / "operator.pem")
jobs = JobQueue(folder / "jobs.db", [operator.public], bytes.fromhex(sys.argv[3]))
def wanted(name):
    digest = hashlib.sha256(f"job {name}".encode()).hexdigest()
    return Wanted(name="n", job=digest, charter=digest, sites=("a", "b", "c"))
"""


@pytest.fixture
def shared(tmp_path: Path) -> JobQueue:
    identity.save(OPERATOR, tmp_path / "operator.pem")
    return JobQueue(tmp_path / "jobs.db", [OPERATOR.public], SERVER)


def start(jobs: JobQueue, number: int, script: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(script)]
    return subprocess.Popen(
        [*command, str(jobs.path.parent), str(number), SERVER.hex()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def check_whole(jobs: JobQueue) -> list[Entry]:
    """Check that the file is in one piece, and that every job is there with its requests."""
    assert execute(jobs.path, "PRAGMA integrity_check") == [("ok",)]
    found = jobs.jobs()
    assert all(one.wanted is not None for one in found)
    assert len({one.id for one in found}) == len(found)
    assert sum(one.state == "running" for one in found) <= 1
    assert {job for (job,) in execute(jobs.path, "SELECT job FROM requests")} == {one.id for one in found}
    for one in found:
        rows = requests_of(jobs.path, one.id)
        assert len(read_requests(rows, one.id, Rules([OPERATOR.public], SERVER))) == len(rows)
    return found


def test_processes_that_all_start_at_once_share_one_queue(shared: JobQueue) -> None:
    script = """
        for index in range(10):
            entry = jobs.submit(operator, jobs.new_id("n"), wanted(f"{number}-{index}"))
            print(entry.id)
            try:
                jobs.set_running(entry.id, 1)
            except FedvisionError:
                continue
            time.sleep(random.random() / 50)
            assert [one.id for one in jobs.jobs() if one.state == "running"] == [entry.id]
            jobs.set_done(entry.id)
    """
    processes = [start(shared, number, script) for number in range(4)]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    ids = [line for out, _ in said for line in out.split()]
    found = check_whole(shared)
    assert sorted(ids) == sorted(one.id for one in found) and len(set(ids)) == 40
    assert {one.state for one in found} <= {"waiting", "done"} and any(one.state == "done" for one in found)


def test_a_process_that_is_killed_leaves_a_whole_queue_and_loses_nothing(shared: JobQueue) -> None:
    script = """
        random.seed(int(number))
        for index in range(10_000):
            entry = jobs.submit(operator, jobs.new_id("n"), wanted(f"{number}-{index}"))
            print("waiting", entry.id, flush=True)
            jobs.set_running(entry.id, index)
            print("running", entry.id, flush=True)
            if random.random() < 0.5:
                jobs.set_done(entry.id)
                print("done", entry.id, flush=True)
            else:
                jobs.request_stop(operator, entry.id)
                jobs.set_stopped(entry.id)
                print("stopped", entry.id, flush=True)
    """
    order = ("waiting", "running", "done", "stopped")
    rng = random.Random(5)
    total = 0
    for number in range(8):
        process = start(shared, number, script)
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(rng.random() * 0.15)
        process.kill()
        rest, error = process.communicate()
        assert process.returncode < 0, error
        said: dict[str, str] = {}
        for line in (first + rest).splitlines():
            state, job_id = line.split()
            said[job_id] = state
        found = {one.id: one for one in check_whole(shared)}
        for job_id, state in said.items():
            assert order.index(found[job_id].state) >= order.index(state)
        total += len(said)
        for one in found.values():  # what the supervisor does after it was killed
            if one.state == "running":
                (shared.set_stopped if one.stop_requested else shared.set_done)(one.id)
            elif one.state == "waiting":
                shared.request_stop(OPERATOR, one.id)
    assert total > 8 and all(one.state in ENDED for one in shared.jobs())


def test_a_full_disk_is_said_and_changes_nothing(shared: JobQueue) -> None:
    submitted(shared)
    script = """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        size = (folder / "jobs.db").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 4096, size + 4096))
        for index in range(1000):
            try:
                job_id = jobs.new_id("n")
                jobs.submit(operator, job_id, wanted(f"{number}-{index}"))
                print(job_id)
            except StorageError as error:
                print(error, error.hint, sep="|", file=sys.stderr)
                break
    """
    process = start(shared, 1, script)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "cannot write" in error and "free some space" in error and "Traceback" not in error
    assert [one.id for one in check_whole(shared)][1:] == out.split()
    assert submitted(shared, "after").state == "waiting"


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user")
def test_a_user_who_may_only_read_sees_the_jobs() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        Path(name).chmod(0o755)
        identity.save(OPERATOR, Path(name) / "operator.pem")
        read_as_nobody(JobQueue(Path(name) / "jobs.db", [OPERATOR.public], SERVER))


def read_as_nobody(shared: JobQueue) -> None:
    entry = submitted(shared)
    shared.path.chmod(0o644)
    script = """
        os.setuid(65534)
        print([one.id for one in jobs.jobs()])
        try:
            jobs.new_id("x")
        except StorageError as error:
            print(error)
    """
    for is_open in (False, True):
        process = start(shared, 0, script)
        if is_open:
            with database.writing(shared.path, queue.SCHEMA):
                out, error = process.communicate(timeout=120)
        else:
            out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert out.startswith(f"['{entry.id}']\ncannot ")


# Any order of calls against a model of a few lines.


class QueueMachine(RuleBasedStateMachine):
    """Does what commands and the supervisor do, in any order, and remembers what must be."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.jobs = JobQueue(Path(self.folder.name) / "jobs.db", OPERATORS, SERVER)
        self.states: dict[str, str] = {}
        self.order: list[str] = []
        self.stopping: set[str] = set()

    def teardown(self) -> None:
        self.folder.cleanup()

    def running(self) -> list[str]:
        return [name for name, state in self.states.items() if state == "running"]

    def attempt(self, is_allowed: bool, change: Callable[[], object]) -> bool:
        if is_allowed:
            change()
        else:
            with pytest.raises(ConfigError):
                change()
        return is_allowed

    @rule()
    def submit(self) -> None:
        entry = submitted(self.jobs, len(self.states))
        self.states[entry.id] = "waiting"
        self.order.append(entry.id)

    @precondition(lambda self: self.states)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.states)))
        others = [one for one in self.running() if one != name]
        allowed = self.states[name] in ("waiting", "running") and not others and name not in self.stopping
        if self.attempt(allowed, lambda: self.jobs.set_running(name, 1)):
            self.states[name] = "running"

    @precondition(lambda self: self.states)
    @rule(data=st.data(), how=st.sampled_from(["done", "failed", "stopped"]))
    def end(self, data: st.DataObject, how: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.states)))
        state = self.states[name]
        allowed = state == "running" or (how == "failed" and state == "waiting")
        allowed = allowed and (how != "stopped" or name in self.stopping)
        changes: dict[str, Callable[[], object]] = {
            "done": lambda: self.jobs.set_done(name),
            "failed": lambda: self.jobs.set_failed(name, "why"),
            "stopped": lambda: self.jobs.set_stopped(name),
        }
        if self.attempt(allowed, changes[how]):
            self.states[name] = how

    @precondition(lambda self: self.states)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.states)))
        state = self.states[name]
        if self.attempt(state in ("waiting", "running"), lambda: self.jobs.request_stop(OTHER, name)):
            self.stopping.add(name)
            self.states[name] = "stopped" if state == "waiting" else state

    @precondition(lambda self: self.states)
    @rule(data=st.data())
    def again(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.states)))
        allowed = self.states[name] in ("failed", "stopped")
        if self.attempt(allowed, lambda: self.jobs.submit_again(OTHER, name)):
            self.states[name] = "waiting"
            self.stopping.discard(name)
            self.order.remove(name)
            self.order.append(name)

    @rule()
    def forge(self) -> None:
        if self.jobs.path.exists():
            execute(
                self.jobs.path,
                "INSERT OR IGNORE INTO jobs (id, digest, state, queued, submitted) "
                "VALUES ('0000-f', ?, 'running', 0, '')",
                wanted(0).job,
            )

    @invariant()
    def agrees(self) -> None:
        found = {one.id: one for one in self.jobs.jobs() if one.wanted}
        assert {name: one.state for name, one in found.items()} == self.states
        assert {name for name, one in found.items() if one.stop_requested} == self.stopping
        waiting = [name for name in self.order if self.states[name] == "waiting"]
        assert runnable(self.jobs) == next(iter([*self.running(), *waiting]), None)


TestAnyOrderOfCalls = QueueMachine.TestCase
TestAnyOrderOfCalls.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
