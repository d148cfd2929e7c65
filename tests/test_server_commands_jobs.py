"""``fedvision-server submit``, ``status``, ``stop`` and ``logs``, as people use them."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedvision.audit.log import read_log, verify_log
from fedvision.cli.app import main as library_main
from fedvision.secagg import identity
from fedvision.secagg.identity import Identity, parse_public
from fedvision.storage import append_line, write_json
from fedvision_server import job_log
from fedvision_server.chartering import load_job_folder
from fedvision_server.cli import main
from fedvision_server.home import ServerHome
from fedvision_server.job_status import event_text
from fedvision_server.queue import JobQueue, open_queue
from tests.server_homes import NAMES, enrol, full_disk, make_home, write_job

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation")
    make_home(folder)
    return folder


@pytest.fixture
def home(template: Path, tmp_path: Path, capsys: Captured) -> ServerHome:
    """A copy of the folder of a coordinator with four sites, and two job files beside it."""
    folder = Path(shutil.copytree(template, tmp_path / "federation"))
    write_job(folder / "job.toml")
    write_job(folder / "other.toml", seed=2)
    capsys.readouterr()
    return ServerHome(folder / "server")


def run(home: ServerHome, *said: object) -> int:
    return main([*map(str, said), "--home", str(home.root)])


def told(capsys: Captured, home: ServerHome, *said: object) -> str:
    """Return what a command prints, after it was seen to work."""
    capsys.readouterr()
    assert run(home, *said) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: Captured, home: ServerHome, *said: object) -> str:
    """Return what a command says on stderr, after it was seen to fail without a traceback."""
    capsys.readouterr()
    before = {path: path.read_bytes() for path in (home.jobs_db, home.audit) if path.exists()}
    requests = num_requests(home)
    assert run(home, *said) == 2
    output = capsys.readouterr()
    assert "fedvision-server: error: " in output.err and "Traceback" not in output.err
    assert num_requests(home) == requests
    assert home.audit.read_bytes() == before[home.audit]
    return output.err


def num_requests(home: ServerHome) -> int:
    if not home.jobs_db.exists():
        return 0
    with closing(sqlite3.connect(home.jobs_db)) as db:
        (count,) = db.execute("SELECT COUNT(*) FROM requests").fetchone()
    return int(count)


def job_file(home: ServerHome, name: str = "job.toml") -> Path:
    return home.root.parent / name


def queue(home: ServerHome) -> JobQueue:
    return open_queue(home)


def operator(home: ServerHome) -> Identity:
    return identity.load(home.operator)


def kinds(home: ServerHome) -> list[str]:
    return [entry.kind for entry in read_log(home.audit)]


# submit


def test_a_submitted_job_waits_and_can_be_run(home: ServerHome, capsys: Captured) -> None:
    out = told(capsys, home, "submit", job_file(home), "--held-out", "delft")
    assert "0001-tiny: submitted, starts when the server runs\n" in out
    assert "train: aachen, bergen, cork\nheld out: delft\n" in out
    entry = queue(home).next_runnable()
    assert entry is not None and (entry.id, entry.sites, entry.held_out) == (
        "0001-tiny",
        NAMES[:3],
        ("delft",),
    )
    assert entry.operator == operator(home).public.hex()
    ready = load_job_folder(home, "0001-tiny")
    assert f"charter: {ready.keys.consortium.digest.hex()}\n" in out
    out = told(capsys, home, "submit", job_file(home, "other.toml"), "--sites", "aachen, bergen,delft")
    assert "0002-tiny: submitted, after 0001-tiny\ntrain: aachen, bergen, delft\n" in out


def test_what_was_asked_for_stands_in_the_audit_log(home: ServerHome, capsys: Captured) -> None:
    before = len(kinds(home))
    told(capsys, home, "submit", job_file(home))
    told(capsys, home, "stop", 1)
    told(capsys, home, "submit", "--again", 1)
    entries = list(read_log(home.audit))[before:]
    assert [entry.kind for entry in entries] == ["charter", "submitted", "stopped", "submitted"]
    wanted = queue(home).job("1").wanted
    assert wanted is not None
    assert entries[0].fields == {"job": "0001-tiny", "digest": wanted.charter}
    fields = {"job": "0001-tiny", "digest": wanted.job, "operator": operator(home).public.hex()}
    assert entries[1].fields == fields | {"charter": wanted.charter, "sites": [*NAMES], "held_out": []}
    assert entries[3].fields == fields | {"again": True}
    verify_log(home.audit, parse_public(home.server_pub.read_text())[1])


def test_the_same_job_is_not_submitted_twice(home: ServerHome, capsys: Captured) -> None:
    told(capsys, home, "submit", job_file(home))
    error = refused(capsys, home, "submit", job_file(home), "--sites", "aachen,bergen,cork")
    assert "the same job is in the queue already: 0001-tiny, waiting" in error
    assert "hint: `submit --again 0001-tiny`" in error
    assert [path.name for path in home.jobs.iterdir()] == ["0001-tiny"]


def test_another_key_than_an_operators_submits_and_stops_nothing(home: ServerHome, capsys: Captured) -> None:
    told(capsys, home, "submit", job_file(home))
    auditor = home.root.parent / "auditor.pem"
    identity.save(identity.generate("auditor"), auditor)
    text = home.config.read_text()
    key = identity.load(auditor).public.hex()
    home.config.write_text(text.replace("auditors = []", f'auditors = ["{key}"]'))
    assert key in home.config.read_text()
    for path in (auditor, home.governance, home.server_key):
        for said in (
            ("submit", job_file(home, "other.toml")),
            ("submit", "--again", "1"),
            ("stop", "1"),
        ):
            error = refused(capsys, home, *said, "--key", path)
            assert "is not an operator's" in error and "server.toml lists as operators" in error
    assert queue(home).job("1").state == "waiting"
    assert [path.name for path in home.jobs.iterdir()] == ["0001-tiny"]
    assert "0001-tiny" in told(capsys, home, "status")


def test_a_key_that_is_given_counts(home: ServerHome, capsys: Captured) -> None:
    elsewhere = home.root.parent / "me.pem"
    home.operator.rename(elsewhere)
    error = refused(capsys, home, "submit", job_file(home))
    assert "operator.pem" in error
    told(capsys, home, "submit", job_file(home), "--key", elsewhere)
    elsewhere.chmod(0o644)
    assert "others can read" in refused(capsys, home, "stop", 1, "--key", elsewhere)


SMALL = {"model__args": {"channels": [4, 8], "strides": [2]}}


@pytest.mark.parametrize(
    ("changes", "said", "text"),
    [
        ({"model__nmae": "UNet"}, (), "unknown key `model.nmae`"),
        ({"colour": "red"}, (), "unknown key `colour`"),
        ({"rounds": 0}, (), "`rounds`"),
        ({"aggregation__secure": False}, (), "aggregation.secure is false"),
        ({"secure_aggregation__weight_cap": None}, (), "weight_cap is missing"),
        ({}, ("--sites", "aachen,bergen"), "at least 3 sites"),
        ({}, ("--sites", "aachen,essen,cork"), "site essen is not enrolled"),
        ({}, ("--held-out", "delft,delft"), "site delft is named twice"),
        ({"secure_aggregation__level": "sketch", **SMALL}, (), "weights or more"),
    ],
)  # fmt: skip
def test_a_job_that_cannot_run_is_refused_and_leaves_nothing(
    home: ServerHome, capsys: Captured, changes: dict[str, Any], said: tuple[str, ...], text: str
) -> None:
    path = write_job(home.root.parent / "bad.toml", **changes)
    assert text in refused(capsys, home, "submit", path, *said)
    assert not home.jobs.exists() or not list(home.jobs.iterdir())


def test_arguments_that_do_not_go_together_are_refused(home: ServerHome, capsys: Captured) -> None:
    told(capsys, home, "submit", job_file(home))
    assert "exclude each other" in refused(capsys, home, "submit", "1", "--again", "--charter", "x")
    assert "are for a new job" in refused(capsys, home, "submit", "1", "--again", "--sites", "aachen")
    assert "cannot read" in refused(capsys, home, "submit", "absent.toml")
    assert "there is no job 7" in refused(capsys, home, "submit", "--again", "7")
    assert "0001-tiny is waiting" in refused(capsys, home, "submit", "--again", "1")


def test_a_home_that_is_none_is_said(tmp_path: Path, capsys: Captured) -> None:
    for said in (("submit", "job.toml"), ("stop", "1"), ("status",), ("status", "1"), ("logs", "1")):
        assert run(ServerHome(tmp_path), *said) == 2
        error = capsys.readouterr().err
        assert "server.toml" in error and "fedvision-server init" in error and "Traceback" not in error


def test_a_full_disk_is_said_and_nothing_is_submitted(home: ServerHome, capsys: Captured) -> None:
    told(capsys, home, "submit", job_file(home))
    with full_disk(1000):
        assert run(home, "submit", job_file(home, "other.toml")) == 2
    error = capsys.readouterr().err
    assert "cannot write" in error and "free some space" in error
    assert [one.id for one in queue(home).jobs()] == ["0001-tiny"]
    assert [path.name for path in home.jobs.iterdir()] == ["0001-tiny"]
    told(capsys, home, "submit", job_file(home, "other.toml"))


def test_a_job_goes_on_with_again(home: ServerHome, capsys: Captured) -> None:
    told(capsys, home, "submit", job_file(home))
    told(capsys, home, "submit", job_file(home, "other.toml"))
    jobs = queue(home)
    jobs.set_running("0001-tiny", 5)
    jobs.set_failed("0001-tiny", "too few sites")
    assert "0001-tiny: submitted again, after 0002-tiny" in told(capsys, home, "submit", "--again", "1")
    entry = queue(home).job("1")
    assert (entry.state, entry.attempts, entry.error) == ("waiting", 1, "")


def test_a_job_does_not_go_on_with_a_revoked_site(home: ServerHome, capsys: Captured) -> None:
    told(capsys, home, "submit", job_file(home))
    told(capsys, home, "stop", 1)
    assert run(home, "revoke", "cork", "--reason", "left", "--yes") == 0
    assert "site cork was revoked" in refused(capsys, home, "submit", "--again", "1")


# governance on another machine


def test_a_charter_is_signed_on_the_machine_of_governance(
    home: ServerHome, capsys: Captured, monkeypatch: Any
) -> None:
    vault = home.root.parent / "vault"
    vault.mkdir()
    key = Path(shutil.move(home.governance, vault / "governance.pem"))
    out = told(capsys, home, "submit", job_file(home), "--held-out", "delft")
    assert "0001-tiny: a draft, its charter is to be signed" in out
    draft, roster = (Path(line.split(": ")[1]) for line in out.splitlines()[1:3])
    assert queue(home).jobs() == [] and "charter" not in kinds(home)
    assert "0001-tiny  draft" in told(capsys, home, "status")
    assert "there is no job 0001-tiny" in refused(capsys, home, "stop", "0001-tiny")
    for path in (draft, roster):
        shutil.copy(path, vault)
    monkeypatch.chdir(vault)
    said = ["keys", "sign", draft.name, "--roster", roster.name, "--key", key.name, "--yes"]
    assert library_main(said) == 0
    signed = vault / "charter-draft.signed.json"
    assert "0003" in refused(capsys, home, "submit", "--charter", signed, "0003")
    out = told(capsys, home, "submit", "--charter", signed, "1")
    assert "0001-tiny: submitted, starts when the server runs" in out and "held out: delft" in out
    assert load_job_folder(home, "0001-tiny").cohort.held_out == ("delft",)
    assert not draft.exists()
    assert kinds(home)[-2:] == ["charter", "submitted"]
    assert "does not wait for a charter" in refused(capsys, home, "submit", "--charter", signed, "1")


def test_nobody_but_an_operator_makes_a_draft(home: ServerHome, capsys: Captured) -> None:
    key = Path(shutil.move(home.governance, home.root.parent / "governance.pem"))
    assert "is not an operator's" in refused(capsys, home, "submit", job_file(home), "--key", key)
    assert not home.jobs.exists() or not list(home.jobs.iterdir())


# stop


def test_a_job_that_waits_is_stopped_at_once(home: ServerHome, capsys: Captured) -> None:
    told(capsys, home, "submit", job_file(home))
    assert told(capsys, home, "stop", "0001") == "0001-tiny: stopped\n"
    assert queue(home).job("1").state == "stopped"
    assert "0001-tiny is stopped already" in refused(capsys, home, "stop", "1")
    assert "there is no job 2" in refused(capsys, home, "stop", "2")


def test_a_job_that_runs_is_asked_to_stop(home: ServerHome, capsys: Captured) -> None:
    told(capsys, home, "submit", job_file(home))
    queue(home).set_running("0001-tiny", 1)
    assert told(capsys, home, "stop", "1").startswith("0001-tiny: will stop after the message")
    assert queue(home).stop_requested("0001-tiny")
    assert "0001-tiny  stopping" in told(capsys, home, "status")


# status


LOST = {"event": "secure", "round": 1, "step": "ready", "site": "cork", "status": "failed"}
EVENTS: list[dict[str, Any]] = [
    {"event": "train", "round": 1, "site": "aachen", "status": "accepted"},
    {**LOST, "reason": "unreachable"},
    {"event": "attempt", "round": 1, "purpose": "train", "attempt": 1, "reason": "cork is absent"},
    {"event": "round", "round": 1, "num_sites": 3, "seconds": 2.5, "validation": None, "is_best": True},
    {"event": "expelled", "round": 2, "site": "delft", "rule": "norm", "evidence": "train-0002-1-site-4"},
]


def running(home: ServerHome, capsys: Captured, events: list[dict[str, Any]]) -> None:
    """Submit a job and let it have come some way."""
    told(capsys, home, "submit", job_file(home))
    queue(home).set_running("0001-tiny", 77)
    for event in events:
        append_line(home.jobs / "0001-tiny" / "rounds.jsonl", event)


def test_status_without_a_job_says_what_to_do(home: ServerHome, capsys: Captured) -> None:
    assert "no job yet" in told(capsys, home, "status")
    assert told(capsys, home, "status", "--json") == "[]\n"
    assert "there is no job 1" in refused(capsys, home, "status", "1")


def test_status_lists_jobs_with_round_state_and_last_event(home: ServerHome, capsys: Captured) -> None:
    running(home, capsys, EVENTS)
    told(capsys, home, "submit", job_file(home, "other.toml"))
    found = json.loads(told(capsys, home, "status", "--json"))
    assert [(one["id"], one["state"], one["round"], one["rounds"]) for one in found] == [
        ("0001-tiny", "running", 1, 2),
        ("0002-tiny", "waiting", 0, 2),
    ]
    assert found[0]["last_event"] == "round 2: delft expelled, rule norm"
    assert found[0]["online"] is None and found[0]["sites"] == [*NAMES]
    lines = told(capsys, home, "status").splitlines()
    assert lines[0].split() == ["job", "state", "round", "sites", "last", "event", "at", "(UTC)"]
    assert lines[1].startswith("0001-tiny  running  1/2")


def test_status_of_a_job_lists_its_sites(home: ServerHome, capsys: Captured) -> None:
    running(home, capsys, EVENTS)
    out = told(capsys, home, "status", "1")
    rows = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert "attempt 1" not in rows["cork"] and "cork failed at step ready: unreachable" in rows["cork"]
    assert "expelled" in rows["delft"] and "trains" in rows["aachen"]
    found = json.loads(told(capsys, home, "status", "0001-tiny", "--json"))
    assert found["folder"] == str(home.jobs / "0001-tiny")
    assert [(one["name"], one["role"], one["is_online"]) for one in found["by_site"]] == [
        ("aachen", "trains", None),
        ("bergen", "trains", None),
        ("cork", "trains", None),
        ("delft", "expelled", None),
    ]


def test_status_tells_which_sites_were_there_in_the_last_minute(home: ServerHome, capsys: Captured) -> None:
    running(home, capsys, EVENTS)
    home.flower.mkdir(exist_ok=True)
    now = time.time()
    write_json(home.flower / "online.json", {"aachen": now, "bergen": now - 30, "cork": now - 90, "x": now})
    assert "2/4" in told(capsys, home, "status")
    found = json.loads(told(capsys, home, "status", "1", "--json"))
    assert [one["is_online"] for one in found["by_site"]] == [True, True, False, False]
    for damaged in ("{", "[]", '{"aachen": "now"}'):
        (home.flower / "online.json").write_text(damaged)
        assert "0001-tiny" in told(capsys, home, "status")


def test_status_reads_the_end_of_a_long_record_only(home: ServerHome, capsys: Captured) -> None:
    running(home, capsys, [])
    record = home.jobs / "0001-tiny" / "rounds.jsonl"
    train = {"event": "train", "site": "aachen", "status": "accepted"}
    lines = [{"event": "round", "round": 1, "num_sites": 4}, *[{**train, "round": 2}] * 3000]
    record.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "ro')
    (found,) = json.loads(told(capsys, home, "status", "--json"))
    assert (found["round"], found["last_event"]) == (1, "round 2: aachen trained")


def test_a_forged_row_is_shown_as_not_signed(home: ServerHome, capsys: Captured) -> None:
    told(capsys, home, "submit", job_file(home))
    with closing(sqlite3.connect(home.jobs_db, isolation_level=None)) as db:
        db.execute(
            "INSERT INTO jobs (id, digest, state, queued, submitted) VALUES (?, ?, 'running', 0, '')",
            ("0000-\x1b[31mx", "0" * 64),
        )
    out = told(capsys, home, "status")
    assert "not signed" in out and "\x1b" not in out
    assert "not signed" in told(capsys, home, "status", "0")


def test_damaged_folders_do_not_keep_status_from_the_other_jobs(home: ServerHome, capsys: Captured) -> None:
    running(home, capsys, EVENTS)
    told(capsys, home, "submit", job_file(home, "other.toml"))
    (home.jobs / "0001-tiny" / "job.toml").write_text("damaged")
    assert "1/?" in told(capsys, home, "status")
    told(capsys, home, "status", "1")
    shutil.rmtree(home.jobs / "0001-tiny")
    assert "0/?" in told(capsys, home, "status")


def test_names_and_reasons_cannot_drive_the_terminal(home: ServerHome, capsys: Captured) -> None:
    reason = "\x1b[2J[bold]gone[/]"
    events = [
        {"event": "secure", "round": 1, "step": "mask", "site": "cork", "status": "failed", "reason": reason}
    ]
    running(home, capsys, events)
    for said in (("status",), ("status", "1"), ("logs", "1")):
        out = told(capsys, home, *said)
        assert "\x1b" not in out and "[bold]gone[/]" in "".join(out.split())


BLIND = "round 1: the model could not be judged: nan"


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (EVENTS[0], "round 1: aachen trained"),
        (EVENTS[1], "round 1: cork failed at step ready: unreachable"),
        (EVENTS[2], "round 1: attempt 1 at the training sum given up: cork is absent"),
        (EVENTS[3], "round 1: done with 3 sites, 2.5 s"),
        (EVENTS[4], "round 2: delft expelled, rule norm"),
        ({**EVENTS[0], "status": "refused", "reason": "norm"}, "round 1: aachen refused: norm"),
        ({"event": "evaluate failed", "round": 1, "reason": "nan"}, BLIND),
        ({"event": "validate", "round": 1, "site": "a", "metrics": {}}, "round 1: a judged the model"),
        ({"event": "thrown away", "round": 4, "reason": "lie"}, "round 4: thrown away: lie"),
        ({"event": "waiting", "sites": ["a", "b"]}, "waiting for a and b"),
        ({"event": "something new", "site": "a", "status": "late"}, "a something new late"),
    ],
)  # fmt: skip
def test_events_in_words(event: dict[str, Any], text: str) -> None:
    assert event_text(event) == text


# logs


def test_logs_have_a_line_for_each_round_and_each_thing_that_went_wrong(
    home: ServerHome, capsys: Captured
) -> None:
    running(home, capsys, EVENTS)
    queue(home).set_failed("0001-tiny", "too few sites")
    lines = told(capsys, home, "logs", "1").splitlines()
    assert lines[0].startswith("0001-tiny: submitted 20") and lines[1].endswith("Flower runs so far: 1")
    assert lines[2:6] == [
        "round 1: cork failed at step ready: unreachable",
        "round 1: attempt 1 at the training sum given up: cork is absent",
        "round 1/2; 3 of 4 sites; cork failed: unreachable; 2.5 s",
        "round 2: delft expelled, rule norm",
    ]
    assert lines[6].startswith("0001-tiny: failed 20") and lines[6].endswith(": too few sites")
    assert len(lines) == 7


def test_what_went_wrong_in_one_round_is_not_told_of_the_next(home: ServerHome, capsys: Captured) -> None:
    second = [{**EVENTS[0], "round": 2}, {**EVENTS[3], "round": 2, "num_sites": 4}]
    running(home, capsys, [*EVENTS[:4], *second])
    assert told(capsys, home, "logs", "1").splitlines()[-1] == "round 2/2; 4 of 4 sites; 2.5 s"


def test_logs_follow_a_job_to_its_end(
    home: ServerHome, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_log, "POLL_S", 0.01)
    running(home, capsys, EVENTS[:1])

    def go_on() -> None:
        record = home.jobs / "0001-tiny" / "rounds.jsonl"
        time.sleep(0.1)
        with record.open("a") as file:
            file.write(json.dumps(EVENTS[3])[:20])  # half a line, as a reader may see it
            file.flush()
            time.sleep(0.1)
            file.write(json.dumps(EVENTS[3])[20:] + "\n")
        append_line(record, EVENTS[4])
        queue(home).set_done("0001-tiny")

    writer = threading.Thread(target=go_on)
    writer.start()
    lines = told(capsys, home, "logs", "1", "--follow").splitlines()
    writer.join()
    assert lines[2].startswith("round 1/2; 3 of 4 sites")
    assert lines[3] == "round 2: delft expelled, rule norm"
    assert lines[4].startswith("0001-tiny: done")


def test_logs_of_a_job_that_waits(home: ServerHome, capsys: Captured) -> None:
    told(capsys, home, "submit", job_file(home))
    assert told(capsys, home, "logs", "1").splitlines()[1:] == ["0001-tiny: waits"]
    assert "there is no job 5" in refused(capsys, home, "logs", "5")


# roles


def test_no_private_key_is_needed_to_look(home: ServerHome, capsys: Captured) -> None:
    running(home, capsys, EVENTS)
    for path in (home.governance, home.operator, home.server_key):
        path.unlink()
    for said in (("status",), ("status", "1"), ("logs", "1")):
        assert "0001-tiny" in told(capsys, home, *said)


def test_a_new_site_takes_part_in_the_next_job(home: ServerHome, capsys: Captured) -> None:
    from fedvision_sites.cli import main as site_main
    from tests.conftest import write_site

    told(capsys, home, "submit", job_file(home))
    folder = home.root.parent
    data = write_site(folder / "data", "essen")
    assert site_main(["init", str(folder / "essen"), "--name", "essen", "--data", str(data)]) == 0
    enrol(folder, "essen")
    assert "delft, essen" in told(capsys, home, "submit", job_file(home, "other.toml"))
    assert load_job_folder(home, "0001-tiny").numbers == (1, 2, 3, 4)
    assert load_job_folder(home, "0002-tiny").numbers == (1, 2, 3, 4, 5)


@pytest.mark.slow
def test_the_program_itself_submits_and_shows(home: ServerHome) -> None:
    def program(*said: object) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", "from fedvision_server.cli import run; run()", *map(str, said)]
        return subprocess.run(words, cwd=home.root, capture_output=True, text=True, env=os.environ)

    assert program("submit", job_file(home)).returncode == 0
    assert program("status").stdout.splitlines()[1].startswith("0001-tiny  waiting  0/2")
    assert program("stop", "0009").returncode == 2


def test_status_and_stop_do_not_load_pytorch() -> None:
    code = "import sys; from fedvision_server import cli, job_status, job_tables, queue, rosters; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
