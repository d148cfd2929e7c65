"""An auditor reads what is recorded, by a signed request that counts once, and can do nothing else."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fedvision.audit.log import parts, read_log, rotate, verify_log
from fedvision.secagg import identity
from fedvision.secagg.identity import Identity, parse_public
from fedvision.storage import read_lines
from fedvision_server.auditing import SUMS, load_request, save_request, sign_request
from fedvision_server.cli import main
from fedvision_server.home import ServerHome
from fedvision_server.job_requests import LABEL, Request
from tests.server_homes import make_home, write_job
from tests.test_server_commands_jobs import Captured, job_file, refused, told

Auditor = tuple[Identity, Path]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation")
    make_home(folder)
    return folder


@pytest.fixture
def home(template: Path, tmp_path: Path, capsys: Captured) -> ServerHome:
    """A copy of the folder of a coordinator with four sites, and a job file beside it."""
    folder = Path(shutil.copytree(template, tmp_path / "federation"))
    write_job(folder / "job.toml")
    capsys.readouterr()
    return ServerHome(folder / "server")


@pytest.fixture
def auditor(home: ServerHome) -> Auditor:
    """An auditor that the settings list, and the file of the private key."""
    path = home.root.parent / "auditor.pem"
    made = identity.generate("auditor")
    identity.save(made, path)
    text = home.config.read_text()
    assert "auditors = []" in text
    home.config.write_text(text.replace("auditors = []", f'auditors = ["{made.public.hex()}"]'))
    return made, path


def server(home: ServerHome) -> bytes:
    return parse_public(home.server_pub.read_text())[1]


def ask(home: ServerHome, auditor: Auditor, capsys: Captured, name: str = "request.json") -> Path:
    """Make a request as an auditor does who has the server's public key and nothing else."""
    path = home.root.parent / name
    said = ["audit", "request", "--key", auditor[1], "--server", home.server_pub, "--out", path]
    assert main([*map(str, said)]) == 0
    capsys.readouterr()
    return path


def test_an_auditor_gets_the_log_rosters_charters_and_records_of_jobs(
    home: ServerHome,
    auditor: Auditor,
    capsys: Captured,
) -> None:
    told(capsys, home, "submit", job_file(home))
    told(capsys, home, "stop", 1)
    rotate(home.audit)
    (home.jobs / "0001-tiny" / "rounds.jsonl").write_text('{"event": "round", "round": 1}\n')
    request, out = ask(home, auditor, capsys), home.root.parent / "records"
    shown = told(capsys, home, "audit", "export", request, "--out", out)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert f"records: {out}, {len(names)} files\n" in shown
    assert names >= {
        "audit.jsonl", "audit-0001.jsonl", "roster.json", "rosters/0004.json", "keys/server.pub",
        "keys/governance.pub", "requests.jsonl", "jobs/0001-tiny/job.toml", "jobs/0001-tiny/rounds.jsonl",
        "jobs/0001-tiny/secagg/charter.json", SUMS,
    }  # fmt: skip
    assert subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=out).returncode == 0
    assert out.stat().st_mode & 0o777 == 0o700

    log = parts(out / "audit.jsonl")
    assert verify_log(log, server(home)).count == len(list(read_log(parts(home.audit))))
    last = list(read_log(log))[-1]
    assert (last.kind, last.fields) == (
        "released",
        {
            "what": "records for an auditor",
            "auditor": auditor[0].public.hex(),
            "request": load_request(request).request.digest,
            "sums": hashlib.sha256((out / SUMS).read_bytes()).hexdigest(),
        },
    )
    asked = read_lines(out / "requests.jsonl")
    operator = identity.load(home.operator).public
    for line in asked:
        assert identity.verify(operator, bytes.fromhex(line["signature"]), LABEL + line["body"].encode())
    assert [Request.model_validate_json(line["body"]).action for line in asked] == ["submit", "stop"]


def test_no_secret_model_sum_or_masked_input_is_handed_over(
    home: ServerHome,
    auditor: Auditor,
    capsys: Captured,
) -> None:
    told(capsys, home, "submit", job_file(home))
    folder = home.jobs / "0001-tiny"
    for name in ("model.safetensors", "secagg/journal", "secagg/sums/train-0001", "secagg/masked/train-1"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not for auditors")
    (folder / "secagg" / "transcripts").mkdir()
    (folder / "secagg" / "transcripts" / "train-0001").symlink_to(home.server_key)
    (home.rosters / "0009.draft.json").write_text("{}")
    out = home.root.parent / "records"
    told(capsys, home, "audit", "export", "--key", auditor[1], "--out", out)
    private = [path.read_bytes() for path in home.root.rglob("*") if path.suffix in (".pem", ".key")]
    assert len(private) >= 5
    for path in out.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert b"not for auditors" not in content and b"PRIVATE" not in content
        assert not [one for one in private if one in content], path
        assert path.suffix not in (".pem", ".key") and "draft" not in path.name
    assert not (out / "jobs/0001-tiny/secagg/transcripts").exists()


def unlisted(home: ServerHome, auditor: Auditor) -> Identity:
    return identity.load(home.operator)


def of_governance(home: ServerHome, auditor: Auditor) -> Identity:
    return identity.load(home.governance)


@pytest.mark.parametrize("who", [unlisted, of_governance], ids=["operator", "governance"])
def test_a_key_that_is_not_listed_as_an_auditors_gets_nothing(
    home: ServerHome,
    auditor: Auditor,
    who: Callable[[ServerHome, Auditor], Identity],
    capsys: Captured,
    tmp_path: Path,
) -> None:
    out = tmp_path / "records"
    save_request(tmp_path / "request.json", sign_request(who(home, auditor), server(home)))
    error = refused(capsys, home, "audit", "export", tmp_path / "request.json", "--out", out)
    assert "is not an auditor's" in error and "server.toml lists as auditors" in error
    assert not out.exists()


def test_a_request_that_is_forged_or_for_another_server_or_told_twice_is_refused(
    home: ServerHome,
    auditor: Auditor,
    capsys: Captured,
    tmp_path: Path,
) -> None:
    path, out = tmp_path / "bad.json", tmp_path / "records"
    good = sign_request(auditor[0], server(home))

    def refusal(content: object) -> str:
        path.write_text(json.dumps(content))
        return refused(capsys, home, "audit", "export", path, "--out", out)

    dumped = good.model_dump(mode="json")
    stranger = sign_request(identity.generate("stranger"), server(home)).model_dump(mode="json")
    forged = {**dumped, "signature": stranger["signature"]}
    assert "not signed by the auditor that it names" in refusal(forged)
    changed = {**dumped, "request": {**dumped["request"], "nonce": "0" * 32}}
    assert "not signed by the auditor that it names" in refusal(changed)
    other = sign_request(auditor[0], identity.generate("server").public).model_dump(mode="json")
    assert "for another server" in refusal(other)
    assert "format" in refusal({**dumped, "request": {**dumped["request"], "format": 2}})
    assert "more" in refusal({**dumped, "more": 1})
    assert not out.exists()
    save_request(tmp_path / "request.json", good)
    told(capsys, home, "audit", "export", tmp_path / "request.json", "--out", out)
    again = refused(capsys, home, "audit", "export", tmp_path / "request.json", "--out", tmp_path / "again")
    assert "answered before" in again
    rotate(home.audit)
    again = refused_after_rotation(capsys, home, tmp_path / "request.json", tmp_path / "again")
    assert "answered before" in again and not (tmp_path / "again").exists()


def refused_after_rotation(capsys: Captured, home: ServerHome, request: Path, out: Path) -> str:
    capsys.readouterr()
    said = ["audit", "export", request, "--out", out, "--home", home.root]
    assert main([*map(str, said)]) == 2
    return capsys.readouterr().err


def test_an_auditors_key_submits_and_stops_nothing_and_is_no_operators(
    home: ServerHome,
    auditor: Auditor,
    capsys: Captured,
) -> None:
    told(capsys, home, "submit", job_file(home))
    write_job(job_file(home, "other.toml"), seed=5)
    for said in (("submit", job_file(home, "other.toml")), ("submit", "--again", "1"), ("stop", "1")):
        assert "is not an operator's" in refused(capsys, home, *said, "--key", auditor[1])
    key = auditor[0].public.hex()
    text = home.config.read_text()
    home.config.write_text(text.replace("operators = [", f'operators = ["{key}", '))
    error = refused(capsys, home, "submit", job_file(home, "other.toml"), "--key", auditor[1])
    assert "each role has a key of its own" in error


def test_what_exists_is_not_overwritten_and_one_of_key_and_request_is_given(
    home: ServerHome,
    auditor: Auditor,
    capsys: Captured,
    tmp_path: Path,
) -> None:
    assert "exists" in refused(capsys, home, "audit", "export", "--key", auditor[1], "--out", tmp_path)
    assert "or --key" in refused(capsys, home, "audit", "export", "--out", tmp_path / "records")
    request = ask(home, auditor, capsys)
    both = ("audit", "export", request, "--key", auditor[1], "--out", tmp_path / "records")
    assert "or --key" in refused(capsys, home, *both)
    assert not (tmp_path / "records").exists()
