"""The audit log: whatever is done to a line shows, and nothing that happens to a program breaks the chain."""

import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedvision.audit.lines import BLOCK, LARGEST_LINE, spelled
from fedvision.audit.log import (
    EMPTY,
    KINDS,
    AuditLog,
    Head,
    check_log,
    parts,
    peer_heads,
    read_log,
    rotate,
    verify_log,
)
from fedvision.cli import audit_log
from fedvision.errors import FedvisionError, StorageError, VerificationError
from fedvision.secagg.identity import Identity, generate, load, save

SERVER, SITE = generate("coordinator"), generate("utrecht")
Captured = pytest.CaptureFixture[str]
Lines = list[bytes]

values = st.one_of(
    st.text(max_size=30),
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.none(),
    st.lists(st.text(max_size=10), max_size=4),
)
many_files = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def filled(path: Path, count: int = 6, identity: Identity = SERVER) -> AuditLog:
    """Return a log with some lines."""
    log = AuditLog(path, identity, "server" if identity is SERVER else identity.name)
    for number in range(1, count + 1):
        log.append("round-opened", job="0badc0de", round=number, sites=["lyon", "utrecht"], epsilon=None)
    return log


def lines_of(path: Path) -> Lines:
    return path.read_bytes().splitlines(keepends=True)


def known_heads(path: Path) -> dict[int, bytes]:
    """Return the head after each line."""
    return {n: hashlib.sha256(line[:-1]).digest() for n, line in enumerate(lines_of(path), start=1)}


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("six") / "audit.jsonl"
    filled(path)
    return path


def signed(content: dict, identity: Identity = SERVER) -> bytes:
    """Return a line with its end, whatever it says, with a good signature."""
    content = {key: value for key, value in content.items() if key != "signature"}
    covered = b"fedvision/audit/v1" + hashlib.sha256(spelled(content)).digest()
    return spelled({**content, "signature": identity.sign(covered).hex()}) + b"\n"


def assert_refused(
    tmp_path: Path, content: bytes, known: dict[int, bytes] | None = None
) -> VerificationError:
    changed = tmp_path / "changed.jsonl"
    changed.write_bytes(content)
    with pytest.raises(VerificationError) as caught:
        verify_log(changed, SERVER.public, known or {})
    assert caught.value.file == str(changed)
    assert caught.value.rule.startswith("audit-") and f"(rule {caught.value.rule})" in str(caught.value)
    return caught.value


def test_a_line_has_one_spelling_and_holds_what_was_written(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "new" / "audit.jsonl", SERVER, "server")
    assert log.head() == EMPTY == Head(0, bytes(32))
    log.append("excluded", site="utrecht", reason="late", seconds=1.5, round=3, is_final=False, nothing=None)
    (line,) = lines_of(log.path)
    content = json.loads(line)
    assert content["count"] == content["format"] == 1 and content["previous"] == "00" * 32
    assert (content["party"], content["kind"]) == ("server", "excluded")
    assert content["fields"] == {
        "site": "utrecht", "reason": "late", "seconds": 1.5, "round": 3, "is_final": False, "nothing": None,
    }  # fmt: skip
    assert line == json.dumps(content, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    assert abs(time.time() - next(read_log(log.path)).time.timestamp()) < 60
    assert log.head() == verify_log(log.path, SERVER.public) == Head(1, hashlib.sha256(line[:-1]).digest())
    assert log.path.stat().st_mode & 0o007 == 0


@many_files
@given(fields=st.dictionaries(st.from_regex(r"[a-j][a-z0-9_]{0,9}", fullmatch=True), values, max_size=4))
def test_what_is_written_is_read_and_holds(tmp_path: Path, fields: dict) -> None:
    path = tmp_path / "audit.jsonl"
    path.unlink(missing_ok=True)
    log = AuditLog(path, SERVER, "server")
    log.append("policy", **fields)
    log.append("deny", **fields)
    first, second = read_log(path)
    assert spelled(first.fields) == spelled(second.fields) == spelled(fields)
    assert verify_log(path, SERVER.public).count == 2


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("gossip", {}),
        ("policy", {"path": Path("x")}),
        ("policy", {"value": float("nan")}),
        ("policy", {"value": float("inf")}),
        ("policy", {"value": 2**63}),
        ("policy", {"value": b"x"}),
        ("policy", {"value": {"a": 1}}),
        ("policy", {"value": ("a", "b")}),
        ("policy", {"value": ["a", 1]}),
        ("policy", {"Value": 1}),
        ("policy", {"value": "x" * LARGEST_LINE}),
        ("policy", {"log_key": SITE.public.hex()}),
        ("key-change", {"log_key": SITE.public.hex(), "log_key_before": SERVER.public.hex()}),
        ("peer-head", {"name": "utrecht", "count": 3}),
        ("peer-head", {"name": "utrecht", "count": True, "digest": "ab" * 32}),
        ("peer-head", {"name": "utrecht", "count": 3, "digest": "AB" * 32}),
        ("peer-head", {"name": "utrecht", "count": 3, "digest": "00" * 32}),
        ("peer-head", {"name": "a/b", "count": 3, "digest": "ab" * 32}),
    ],
)
def test_what_cannot_be_a_line_is_refused_and_nothing_is_written(
    tmp_path: Path, kind: str, fields: dict
) -> None:
    log = filled(tmp_path / "audit.jsonl", 1)
    before = log.path.read_bytes()
    with pytest.raises(ValueError):
        log.append(kind, **fields)
    assert log.path.read_bytes() == before


def test_every_kind_can_be_written(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", SERVER, "server")
    for kind in sorted(KINDS - {"peer-head"}):
        log.append(kind)
    log.remember("utrecht", Head(3, b"\1" * 32), round=2)
    assert verify_log(log.path, SERVER.public).count == len(KINDS) == 22


@many_files
@given(data=st.data())
def test_any_changed_byte_is_found(six: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(six.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1), "place")
    content[place] = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[place]), "byte")
    number = six.read_bytes()[:place].count(b"\n") + 1
    if place == len(content) - 1:
        # The end of the last line is gone: it counts as not written, as after a power cut.
        assert_refused(tmp_path, bytes(content), known_heads(six))
    else:
        error = assert_refused(tmp_path, bytes(content))
        assert f"line {number}: " in str(error) or f"line {number + 1}: " in str(error)


@many_files
@given(data=st.data())
def test_any_removed_inserted_or_repeated_piece_is_found(
    six: Path, tmp_path: Path, data: st.DataObject
) -> None:
    content = six.read_bytes()
    begin = data.draw(st.integers(0, len(content)), "begin")
    end = data.draw(st.integers(begin, len(content)), "end")
    new = data.draw(st.one_of(st.binary(max_size=20), st.just(content[begin:end] * 2)), "new")
    changed = content[:begin] + new + content[end:]
    if changed == content:
        return
    whole = changed[: changed.rfind(b"\n") + 1]
    if b"\n" + whole in b"\n" + content:
        # A run of whole lines is left, and a torn line after it: a cut end, or a part of a log.
        left = tmp_path / "left.jsonl"
        left.write_bytes(changed)
        found = check_log(left, SERVER.public)
        assert found.head.count - found.start.count == whole.count(b"\n")
        if whole != content:
            assert_refused(tmp_path, changed, known_heads(six))
    else:
        assert_refused(tmp_path, changed)


@many_files
@given(data=st.data())
def test_lines_that_are_missing_repeated_or_moved_are_found(
    six: Path, tmp_path: Path, data: st.DataObject
) -> None:
    lines = lines_of(six)
    chosen = data.draw(st.lists(st.integers(0, 5), max_size=9), "chosen")
    content = b"".join(lines[one] for one in chosen)
    if chosen and chosen == list(range(chosen[0], chosen[-1] + 1)):
        # A run of lines from somewhere: a part of a log, and what is missing shows only by what others know.
        path = tmp_path / "part.jsonl"
        path.write_bytes(content)
        found = check_log(path, SERVER.public)
        assert (found.start.count, found.head.count) == (chosen[0], chosen[-1] + 1)
    elif chosen:
        assert assert_refused(tmp_path, content).rule in ("audit-count", "audit-previous")
    if chosen != list(range(6)):
        assert_refused(tmp_path, content, known_heads(six))


def test_an_edited_line_that_is_signed_again_breaks_the_chain_or_what_others_know(tmp_path: Path) -> None:
    """The owner of the key rewrites the history: only the other side's memory shows it."""
    old, new = filled(tmp_path / "old" / "audit.jsonl"), filled(tmp_path / "new" / "audit.jsonl", 3)
    new.append("released", model="another")
    while new.head().count < 6:
        new.append("round-opened", job="0badc0de", round=new.head().count + 1)
    assert verify_log(new.path, SERVER.public).count == 6
    error = assert_refused(tmp_path, new.path.read_bytes(), {4: known_heads(old.path)[4]})
    assert error.rule == "audit-known" and "line 4: " in str(error)
    # Only one line replaced by one that is signed again, the rest left.
    lines = lines_of(old.path)
    mixed = b"".join([*lines[:3], lines_of(new.path)[3], *lines[4:]])
    assert assert_refused(tmp_path, mixed).rule == "audit-previous"


def test_a_cut_end_is_a_good_log_alone_and_is_found_by_what_others_remember(
    six: Path, tmp_path: Path
) -> None:
    known = known_heads(six)
    for count in range(7):
        cut = tmp_path / "cut.jsonl"
        cut.write_bytes(b"".join(lines_of(six)[:count]))
        assert verify_log(cut, SERVER.public).count == count
        assert verify_log(cut, SERVER.public, {n: known[n] for n in range(1, count + 1)}).count == count
        if count < 6:
            error = assert_refused(tmp_path, cut.read_bytes(), {6: known[6]})
            assert error.rule == "audit-known" and f"ends with line {count}" in str(error)


def test_the_head_of_an_empty_log_can_be_remembered(six: Path, tmp_path: Path) -> None:
    assert verify_log(six, SERVER.public, {0: bytes(32)}).count == 6
    assert_refused(tmp_path, six.read_bytes(), {0: b"\1" * 32})


def test_a_log_that_is_not_there_does_not_hold(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read"):
        verify_log(tmp_path / "audit.jsonl", SERVER.public)
    with pytest.raises(StorageError, match="no file"):
        verify_log(parts(tmp_path / "audit.jsonl"), SERVER.public)


@pytest.mark.parametrize("place", range(6))
def test_a_line_of_another_partys_key_is_found(tmp_path: Path, place: int) -> None:
    path = tmp_path / "audit.jsonl"
    filled(path)
    lines = lines_of(path)
    content = json.loads(lines[place]) | {"fields": {"site": "lyon"}}
    lines[place] = signed(content, SITE)
    error = assert_refused(tmp_path, b"".join(lines))
    assert error.rule == "audit-signature" and f"line {place + 1}: " in str(error)
    # Where it is the last line, its owner would go on writing after it.
    path.write_bytes(b"".join(lines[: place + 1]))
    with pytest.raises(StorageError, match="not of this party's key"):
        AuditLog(path, SERVER, "server").append("started")
    # The same line with the right signature, but of another party.
    lines[place] = signed(content | {"party": "utrecht"})
    assert assert_refused(tmp_path, b"".join(lines)).rule in ("audit-party", "audit-previous")


def test_a_log_of_another_key_is_refused_at_its_first_line(six: Path) -> None:
    with pytest.raises(VerificationError, match=r"line 1: .*audit-signature") as caught:
        verify_log(six, SITE.public)
    assert "party's key" in caught.value.hint


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(format=2),
        lambda c: c.update(format=True),
        lambda c: c.update(format=1.0),
        lambda c: c.update(extra=1),
        lambda c: c.pop("time"),
        lambda c: c.update(time="2026-02-30T12:00:00Z"),
        lambda c: c.update(time="2026-02-03 12:00:00"),
        lambda c: c.update(count=True),
        lambda c: c.update(count=1.0),
        lambda c: c.update(count=0),
        lambda c: c.update(previous="11" * 32),
        lambda c: c.update(party="../x"),
        lambda c: c.update(kind="gossip"),
        lambda c: c.update(kind=["policy"]),
        lambda c: c.update(fields=[]),
        lambda c: c.update(fields={"a": {"b": 1}}),
    ],
)
def test_a_signed_line_of_the_wrong_form_does_not_count(
    tmp_path: Path, change: Callable[[dict], object]
) -> None:
    path = tmp_path / "audit.jsonl"
    filled(path, 1)
    content = json.loads(path.read_bytes())
    change(content)
    error = assert_refused(tmp_path, signed(content))
    assert error.rule == "audit-line" and "line 1: " in str(error)


def test_a_signed_line_that_is_too_long_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    filled(path, 1)
    content = json.loads(path.read_bytes())
    content["fields"] = {"text": ""}
    rest = LARGEST_LINE - len(signed(content)) + 1
    path.write_bytes(signed(content | {"fields": {"text": "x" * rest}}))
    assert verify_log(path, SERVER.public).count == 1
    error = assert_refused(tmp_path, signed(content | {"fields": {"text": "x" * (rest + 1)}}))
    assert "longer than a line may be" in str(error)


@many_files
@given(content=st.binary(max_size=300))
def test_arbitrary_bytes_are_no_log(tmp_path: Path, content: bytes) -> None:
    assert_refused(tmp_path, content + b"\n")


@pytest.mark.parametrize("line", [b"[" * 60_000, b"1" * 60_000, b'{"count":' + b"9" * 50_000, b"x" * 200_000])
def test_hostile_lines_are_refused_and_not_continued(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "audit.jsonl"
    log = filled(path, 1)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(VerificationError, match="line 2"):
        verify_log(path, SERVER.public)
    before = path.read_bytes()
    with pytest.raises(StorageError, match="damaged"):
        log.append("started")
    assert path.read_bytes() == before


def test_an_empty_line_at_the_end_is_not_taken_for_an_empty_log(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = filled(path, 2)
    path.write_bytes(path.read_bytes() + b"\n")
    for call in (lambda: log.append("started"), log.head):
        with pytest.raises(StorageError, match="damaged"):
            call()


def test_a_line_torn_at_any_byte_is_dropped_by_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    filled(path, 3)
    content = path.read_bytes()
    two = len(b"".join(lines_of(path)[:2]))
    for end in [two, two + 1, *range(two + 2, len(content) - 2, 7), len(content) - 2, len(content) - 1]:
        path.write_bytes(content[:end])
        log = AuditLog(path, SERVER, "server")
        assert log.head().count == verify_log(path, SERVER.public).count == 2
        assert check_log(path, SERVER.public).torn_bytes == end - two
        log.append("stopped")
        assert verify_log(path, SERVER.public) == log.head()
        assert path.read_bytes().startswith(content[:two]) and len(lines_of(path)) == 3


@pytest.mark.parametrize("tear", [b"{", b'{"count":1', bytes(3 * BLOCK)])
def test_a_torn_first_line_is_dropped(tmp_path: Path, tear: bytes) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(tear)
    log = AuditLog(path, SERVER, "server")
    assert log.head() == EMPTY
    log.append("started")
    assert verify_log(path, SERVER.public).count == len(lines_of(path)) == 1


def test_lines_longer_than_a_block_are_continued(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", SERVER, "server")
    for length in (LARGEST_LINE - 600, BLOCK, 1, BLOCK - 400, BLOCK - 401, 2 * BLOCK):
        log.append("policy", text="x" * length)
    assert verify_log(log.path, SERVER.public) == log.head()
    assert log.head().count == 6


def test_an_append_does_not_read_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = filled(tmp_path / "audit.jsonl", 60)
    read: list[int] = []
    pread = os.pread

    def counted(handle: int, size: int, place: int) -> bytes:
        read.append(size)
        return pread(handle, size, place)

    monkeypatch.setattr(os, "pread", counted)
    log.append("started")
    assert log.path.stat().st_size > 5 * BLOCK
    assert sum(read) <= BLOCK


def script(tmp_path: Path, body: str) -> list[str]:
    """Return a command that runs ``body`` with a log of the server's key."""
    key = tmp_path / "keys" / "server.pem"
    if not key.exists():
        save(Identity(SERVER.private, "server"), key)
    start = f"""
        import os, resource, signal, sys
        from pathlib import Path
        from fedvision.audit.log import AuditLog, rotate
        from fedvision.secagg.identity import load
        path = Path({str(tmp_path / "audit.jsonl")!r})
        log = AuditLog(path, load(Path({str(key)!r})), "server")
    """
    return [sys.executable, "-c", textwrap.dedent(start) + textwrap.dedent(body)]


def test_processes_that_write_at_once_make_one_chain(tmp_path: Path) -> None:
    command = script(tmp_path, "for n in range(40): log.append('started', who=sys.argv[1], n=n)")
    running = [subprocess.Popen([*command, str(one)]) for one in range(3)]
    log = AuditLog(tmp_path / "audit.jsonl", SERVER, "server")
    heads = []
    while any(one.poll() is None for one in running):
        heads.append(log.head())
        rotate(log.path) if len(heads) % 5 == 4 else time.sleep(0.01)
    assert [one.wait() for one in running] == [0, 0, 0]
    files = parts(log.path)
    assert len(files) > 1
    # Every head that was seen while they wrote is in the log.
    known = {head.count: head.digest for head in heads}
    assert verify_log(files, SERVER.public, known) == log.head()
    written = [(entry.fields["who"], entry.fields["n"]) for entry in read_log(files)]
    assert sorted(written) == sorted((str(one), n) for one in range(3) for n in range(40))


@pytest.mark.parametrize("call", ["ftruncate", "pwrite", "fsync", "close"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_process_killed_at_any_step_leaves_a_log_that_goes_on(
    tmp_path: Path, call: str, moment: str
) -> None:
    body = f"""
        log.append("started")
        original = os.{call}
        def killing(*arguments):
            if {moment!r} == "after":
                original(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        os.{call} = killing
        log.append("finished")
    """
    assert subprocess.run(script(tmp_path, body)).returncode == -signal.SIGKILL
    log = AuditLog(tmp_path / "audit.jsonl", SERVER, "server")
    count = verify_log(log.path, SERVER.public).count
    assert count == (2 if call in ("fsync", "close") or (call, moment) == ("pwrite", "after") else 1)
    log.append("started")
    assert verify_log(log.path, SERVER.public).count == count + 1 == log.head().count


def test_a_full_disk_in_mid_line_leaves_whole_lines(tmp_path: Path) -> None:
    """The limit on a file's size makes the system write a part of the line, as a full disk does."""
    body = """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for n in range(3): log.append("started", n=n)
        end = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (end + 100, resource.RLIM_INFINITY))
        try:
            log.append("started", n=3)
        except Exception as error:
            print(type(error).__name__, error, error.hint)
        assert path.stat().st_size == end
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        log.append("started", n=4)
    """
    done = subprocess.run(script(tmp_path, body), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "StorageError" in done.stdout and "too large" in done.stdout and "free some space" in done.stdout
    path = tmp_path / "audit.jsonl"
    assert verify_log(path, SERVER.public).count == 4
    assert [entry.fields["n"] for entry in read_log(path)] == [0, 1, 2, 4]


def test_a_disk_that_does_not_flush_is_an_error_and_the_line_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = filled(tmp_path / "audit.jsonl", 2)
    before = log.path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="no space left"):
        log.append("started")
    assert log.path.read_bytes() == before


def test_another_partys_log_or_another_name_is_not_continued(tmp_path: Path) -> None:
    log = filled(tmp_path / "audit.jsonl", 1)
    before = log.path.read_bytes()
    for wrong in (AuditLog(log.path, SITE, "server"), AuditLog(log.path, SERVER, "utrecht")):
        for call in (lambda wrong=wrong: wrong.append("started"), wrong.head):
            with pytest.raises(StorageError, match="not of this party's key"):
                call()
    assert log.path.read_bytes() == before
    with pytest.raises(ValueError):
        AuditLog(log.path, SERVER, "a/b")


def test_rotated_parts_are_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    assert rotate(path) is None
    log = filled(path, 3)
    assert rotate(path) == tmp_path / "audit-0001.jsonl"
    assert log.head().count == 3 and not path.exists()
    assert rotate(path) is None
    filled(path, 2)
    assert rotate(path) == tmp_path / "audit-0002.jsonl"
    path.write_bytes(b'{"count"')  # Torn: the part before is continued.
    assert log.head().count == 5
    log.append("started")
    files = parts(path)
    assert [file.name for file in files] == ["audit-0001.jsonl", "audit-0002.jsonl", "audit.jsonl"]
    assert verify_log(files, SERVER.public) == log.head() and log.head().count == 6
    assert check_log(files, SERVER.public).start == EMPTY
    # The last alone begins where its first line says.
    alone = check_log(path, SERVER.public)
    assert alone.start == verify_log(files[:2], SERVER.public) and alone.head == log.head()
    known = {entry.count: entry.digest for entry in read_log(files)}
    assert verify_log(path, SERVER.public, {5: known[5], 6: known[6]}).count == 6
    with pytest.raises(VerificationError, match="audit-known"):
        verify_log(path, SERVER.public, {5: b"\1" * 32})
    with pytest.raises(VerificationError, match="audit-not-covered"):
        verify_log(path, SERVER.public, {3: known[3]})
    # A part that is missing, or in the wrong place.
    for wrong in ([files[0], files[2]], [files[1], files[0], files[2]], [*files, files[2]]):
        with pytest.raises(VerificationError, match="audit-count"):
            verify_log(wrong, SERVER.public)
    # A torn line counts only at the very end.
    files[0].write_bytes(files[0].read_bytes()[:-1])
    with pytest.raises(VerificationError, match="line 3: "):
        verify_log(files, SERVER.public)


def test_reading_the_head_and_rotating_wait_for_who_writes(tmp_path: Path) -> None:
    log = filled(tmp_path / "audit.jsonl", 1)
    done: list[object] = []
    with (tmp_path / "audit.jsonl.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = [
            threading.Thread(target=lambda: done.append(log.head())),
            threading.Thread(target=lambda: done.append(rotate(log.path))),
        ]
        for thread in waiting:
            thread.start()
        time.sleep(0.2)
        assert done == []
    for thread in waiting:
        thread.join(10)
    assert len(done) == 2


def test_parts_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in (
        "audit-10000.jsonl",
        "audit-9999.jsonl",
        "audit-0002.jsonl",
        "audit-x.jsonl",
        "audit-1.jsonl",
    ):
        (tmp_path / name).touch()
    assert [file.name for file in parts(tmp_path / "audit.jsonl")] == [
        "audit-0002.jsonl",
        "audit-9999.jsonl",
        "audit-10000.jsonl",
    ]


def test_a_new_key_continues_the_log(tmp_path: Path) -> None:
    log = filled(tmp_path / "audit.jsonl", 2)
    new, third = generate("coordinator"), generate("coordinator")
    log.change_key(new)
    with pytest.raises(StorageError, match="handed over"):
        AuditLog(log.path, SERVER, "server").append("started")
    log = AuditLog(log.path, new, "server")
    # Before the new key has signed anything, nothing here is its owner's.
    with pytest.raises(VerificationError, match="no line is signed"):
        verify_log(log.path, new.public)
    log.append("started")
    log.change_key(third)
    log.append("started")
    for key in (SERVER, new, third):
        assert verify_log(log.path, key.public) == log.head()
    assert check_log(log.path, third.public).num_keys == 3
    with pytest.raises(VerificationError, match="none of those"):
        verify_log(log.path, SITE.public)
    # Somebody else's line about a new key hands nothing over.
    other = filled(tmp_path / "other.jsonl", 1, SITE)
    other.change_key(SERVER)
    with pytest.raises(VerificationError, match="audit-signature"):
        verify_log(other.path, SERVER.public)
    # The old key cannot sign after it has handed over, nor can a key hand over that is not this log's.
    lines = lines_of(log.path)
    content = json.loads(lines[3])
    for number, wrong in (
        (4, signed(content, SERVER)),
        (
            5,
            signed(
                json.loads(lines[4])
                | {"fields": {"log_key": third.public.hex(), "log_key_before": SITE.public.hex()}},
                new,
            ),
        ),
    ):
        error = assert_refused(tmp_path, b"".join([*lines[: number - 1], wrong]))
        assert error.rule == "audit-signature" and f"line {number}: " in str(error)


def test_what_one_side_rewrites_the_other_remembers(tmp_path: Path) -> None:
    """Both tell their heads in each round; then the server rewrites, the site cuts, and each is found."""
    server = AuditLog(tmp_path / "server.jsonl", SERVER, "server")
    site = AuditLog(tmp_path / "site.jsonl", SITE, "utrecht")
    for number in range(1, 5):
        server.append("round-opened", round=number)
        site.remember("server", server.head(), round=number)
        site.append("allow", round=number)
        server.remember("utrecht", site.head(), round=number)
        server.append("round-closed", round=number)
    of_site, of_server = peer_heads(server.path)["utrecht"], peer_heads(site.path)["server"]
    assert sorted(of_site) == [2, 4, 6, 8] and sorted(of_server) == [1, 4, 7, 10]
    assert verify_log(site.path, SITE.public, of_site) == site.head()
    assert verify_log(server.path, SERVER.public, of_server) == server.head()
    # The site's log loses its last line, then gets another.
    site.path.write_bytes(b"".join(lines_of(site.path)[:-1]))
    with pytest.raises(VerificationError, match="audit-known"):
        verify_log(site.path, SITE.public, of_site)
    site.append("deny", round=4)
    with pytest.raises(VerificationError, match=r"line 8: .*audit-known"):
        verify_log(site.path, SITE.public, of_site)
    # It tells the new head: the server then holds two for one line, which is itself the proof.
    server.remember("utrecht", site.head(), round=5)
    with pytest.raises(VerificationError, match="utrecht told another head for line 8") as caught:
        peer_heads(server.path)
    assert f"line {server.head().count}: " in str(caught.value)


@pytest.mark.parametrize(("count", "digest"), [(-1, b"\1" * 32), (1, bytes(32)), (0, b"\1" * 32), (1, b"x")])
def test_a_head_is_whole(count: int, digest: bytes) -> None:
    with pytest.raises(ValueError):
        Head(count, digest)


def run(*arguments: str) -> int:
    """Run the command as a program does, and return its exit status."""
    app = typer.Typer()
    app.add_typer(audit_log.app, name="audit-log")
    try:
        return int(app(args=["audit-log", *arguments], standalone_mode=False) or 0)
    except FedvisionError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AuditLog:
    """Start in the folder of a site that has a log."""
    identity = Identity(SITE.private, "identity")
    save(identity, tmp_path / "keys" / "identity.pem")
    monkeypatch.chdir(tmp_path)
    log = AuditLog(tmp_path / "audit.jsonl", load(tmp_path / "keys" / "identity.pem"), "utrecht")
    log.append("enrolment", federation="lung-ct")
    log.append("allow", job="0badc0de", by="anna")
    return log


def test_verify_says_what_holds_and_what_is_not_shown(home: AuditLog, capsys: Captured) -> None:
    assert run("verify") == 0
    output = capsys.readouterr().out
    assert "the log of utrecht holds, 2 lines" in output
    assert home.head().digest.hex() in output
    assert "Not checked: whether its end was cut off" in output
    rotate(home.path)
    home.append("started")
    assert run("verify") == 0
    assert "audit-0001.jsonl, audit.jsonl: the log of utrecht holds, 3 lines" in capsys.readouterr().out
    Path("audit-0001.jsonl").unlink()
    assert run("verify", "--home", str(home.path.parent), "--key", "keys/identity.pub") == 0
    assert "Not checked: lines 1 to 2" in capsys.readouterr().out
    home.path.write_bytes(home.path.read_bytes() + b"{")
    assert run("verify") == 0
    assert "unfinished line of 1 bytes" in capsys.readouterr().out


def test_verify_exits_with_1_and_names_file_line_and_rule(home: AuditLog, capsys: Captured) -> None:
    home.path.write_bytes(home.path.read_bytes().replace(b"anna", b"otto"))
    assert run("verify") == 1
    error = capsys.readouterr().err
    assert "audit.jsonl: line 2: " in error and "(rule audit-signature)" in error


def test_verify_against_the_other_side(home: AuditLog, capsys: Captured) -> None:
    other = AuditLog(Path("server.jsonl"), SERVER, "server")
    other.append("started")
    assert run("verify", "--against", "server.jsonl") == 2
    assert "remembers nothing of utrecht" in capsys.readouterr().err
    other.remember("utrecht", home.head())
    assert run("verify", "--against", "server.jsonl") == 0
    assert "remembers it at 1 points, the last at line 2: all agree" in capsys.readouterr().out
    home.path.write_bytes(lines_of(home.path)[0])
    assert run("verify") == 0
    capsys.readouterr()
    assert run("verify", "--against", "server.jsonl") == 1
    assert "others remember line 2 (rule audit-known)" in capsys.readouterr().err


def test_verify_says_what_it_needs(home: AuditLog, capsys: Captured) -> None:
    assert run("verify", "absent.jsonl") == 2
    assert "absent.jsonl is not there" in capsys.readouterr().err
    save(Identity(SERVER.private, "server"), Path("keys/server.pem"))
    assert run("verify") == 2
    assert "several keys" in capsys.readouterr().err and not run("verify", "--key", "keys/identity.pub")
    assert run("verify", "--home", "keys") == 2
    capsys.readouterr()
    Path("keys/server.pub").unlink()
    Path("keys/identity.pub").unlink()
    assert run("verify") == 2
    assert "--key FILE.pub" in capsys.readouterr().err


def test_show_prints_what_was_asked_for(home: AuditLog, capsys: Captured) -> None:
    home.append(
        "deny",
        job="feed",
        reason="\x1b[2J\u202eevil [red]text[/]",
        rules=["least-cohort", "hours"],
        ok=False,
        digest="ab" * 32,
    )
    assert run("show") == 0
    output = capsys.readouterr().out
    assert "enrolment" in output and "federation=lung-ct" in output and "by=anna" in output
    flat = "".join(output.split())
    assert "[red]text[/]" in flat and "\\x1b[2J\\u202eevil" in flat and "\x1b" not in output
    assert "rules=least-cohort,hours" in flat and "ok=no" in flat and "digest=abababababababab.." in flat
    assert run("show", "--kind", "allow", "--kind", "deny") == 0
    output = capsys.readouterr().out
    assert "enrolment" not in output and "anna" in output and "deny" in output
    assert run("show", "--since", "2100-01-01") == 0
    assert capsys.readouterr().out.strip() == "no line"
    assert run("show", "--since", "2020-01-01T10:00") == 0
    assert "anna" in capsys.readouterr().out
    assert run("show", "--kind", "gossip") == 2
    assert run("show", "--since", "yesterday") == 2


def test_show_prints_what_can_be_read_before_a_damaged_line(home: AuditLog, capsys: Captured) -> None:
    home.path.write_bytes(lines_of(home.path)[0] + b"damaged\n")
    assert run("show") == 1
    output = capsys.readouterr()
    assert "enrolment" in output.out and "line 2: not JSON" in output.err


def test_rotate_begins_a_new_file(home: AuditLog, capsys: Captured) -> None:
    assert run("rotate") == 0
    assert "audit.jsonl is now audit-0001.jsonl" in capsys.readouterr().out
    assert run("rotate") == 0
    assert "no line in it" in capsys.readouterr().out
    home.append("started")
    assert run("show") == 0
    assert "enrolment" in capsys.readouterr().out
