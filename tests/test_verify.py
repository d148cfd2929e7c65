"""A finished run verifies; whatever is changed in it afterwards is found and named."""

import contextlib
import dataclasses
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedvision.audit import verify
from fedvision.audit.verify import Verification, verify_run
from fedvision.cli.app import main
from fedvision.config import dump_job, load_job
from fedvision.errors import ConfigError, VerificationError
from fedvision.secagg import identity, server_sketch
from fedvision.secagg.codec import decode, encode
from fedvision.secagg.identity import parse_public
from fedvision.secagg.messages import Evidence, Transcript
from fedvision.secagg.roster import load_charter, load_roster, save_signed, sign_document
from fedvision.secagg.site_state import Marks
from fedvision.simulation.again import train_again
from fedvision.storage import append_line, load_tensors, read_json, read_lines, save_tensors, write_json
from fedvision.tasks import initial_network
from fedvision_server import round as round_module
from fedvision_sites import work
from fedvision_sites.vault import SessionFile
from tests.secure_runs import make_disputed_run, make_run

Change = Callable[[Path], None]


def governance(run: Path) -> tuple[str, bytes]:
    path = run / "secagg" / "governance.pub"
    return parse_public(path.read_text(), str(path))


def check(run: Path, key: tuple[str, bytes] | None = None) -> Verification:
    return verify_run(run, key or governance(run), lambda what, done, total: None)


@contextlib.contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    """Give a file another content for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def failing(run: Path) -> VerificationError:
    failure = check(run).failure
    assert failure is not None
    return failure


@pytest.fixture(scope="module", params=["sum", "sketch", "gram"])
def of_level(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four sites at each level. Changed and put back by tests."""
    level = request.param
    return make_run(tmp_path_factory.mktemp(level), 4, secure_aggregation__level=level)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three sites at level sketch. Changed and put back by tests."""
    return make_run(tmp_path_factory.mktemp("finished"), secure_aggregation__level="sketch")


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_finished_run_verifies_at_every_level(of_level: Path) -> None:
    found = check(of_level)
    assert found.failure is None
    assert {item.status for item in found.checks} == {"passed"}
    assert found.is_pinned and found.level == load_level(of_level)
    per_sum = 3 + 3 * 4
    sketches = {"sum": 0, "sketch": 8, "gram": 8}[found.level]
    assert found.num_signatures == 2 + 4 * per_sum + 2 * sketches + 4
    assert any("byte for byte" in line for line in found.proves)
    assert any("its input is its own word" in line for line in found.does_not_prove)


def load_level(run: Path) -> str:
    level: str = read_json(run / "secagg" / "charter.json")["document"]["level"]
    return level


SIGNED = ("secagg/transcripts/*", "secagg/sums/*", "secagg/charter.json", "secagg/roster.json")
MADE = ("model.safetensors", "checkpoints/*")


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_byte_is_found_and_its_file_is_named(of_level: Path, data: st.DataObject) -> None:
    paths = sorted(path for pattern in SIGNED + MADE for path in of_level.glob(pattern))
    path = data.draw(st.sampled_from(paths), label="file")
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1), label="byte")
    content[at] ^= data.draw(st.integers(1, 255), label="change")
    with changed(path, bytes(content)):
        assert failing(of_level).file == str(path)
    assert check(of_level).failure is None


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_file_that_is_cut_or_longer_is_found(finished: Path, data: st.DataObject) -> None:
    paths = sorted(path for pattern in SIGNED + MADE for path in finished.glob(pattern))
    path = data.draw(st.sampled_from(paths), label="file")
    content = path.read_bytes()
    kept = data.draw(st.integers(0, len(content)), label="kept")
    tail = data.draw(st.binary(min_size=kept == len(content), max_size=5), label="tail")
    if content[:kept] + tail != content:
        with changed(path, content[:kept] + tail):
            assert failing(finished).file == str(path)


@pytest.mark.parametrize(
    "name",
    [
        "secagg/roster.json",
        "secagg/charter.json",
        "secagg/transcripts/train-0002",
        "secagg/transcripts/validate-0001",
        "secagg/sums/train-0001",
        "checkpoints/round-0002.safetensors",
        "model.safetensors",
    ],
)
def test_a_missing_file_is_named(finished: Path, tmp_path: Path, name: str) -> None:
    kept = tmp_path / "kept"
    (finished / name).rename(kept)
    try:
        failure = failing(finished)
        assert failure.file == str(finished / name)
        assert failure.rule == "absent"
    finally:
        kept.rename(finished / name)


def test_another_governance_key_is_refused(finished: Path) -> None:
    other = identity.generate("consortium")
    found = check(finished, ("consortium", other.public))
    assert isinstance(found.failure, VerificationError)
    assert found.failure.rule == "governance"
    assert [item.status for item in found.checks] == ["failed"] + ["not checked"] * 6
    assert found.proves == found.does_not_prove == ()


def test_who_signs_everything_anew_is_found_only_with_the_pinned_key(copied: Path) -> None:
    """A run that somebody took over fits together; so without a pinned key nothing is said of who signed."""
    trusted, other = governance(copied), identity.generate("governance")
    home = copied / "secagg"
    roster = load_roster(home / "roster.json", trusted[1])
    charter = load_charter(home / "charter.json", trusted[1], roster)
    for name, document in (("roster", roster), ("charter", charter)):
        save_signed(home / f"{name}.json", sign_document(document, other))
    (home / "governance.pub").write_text(identity.public_line("governance", other.public) + "\n")
    shutil.rmtree(copied / "sites")
    unpinned = verify_run(copied, None, lambda what, done, total: None)
    assert unpinned.failure is None
    assert not unpinned.is_pinned
    assert unpinned.does_not_prove[0].startswith("Who signed")
    pinned = check(copied, trusted).failure
    assert pinned is not None and pinned.rule == "governance"


def test_other_initial_weights_than_the_charter_names_are_found(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with another version of PyTorch, which draws other numbers from the same seed."""

    def drawn_otherwise(job: Any) -> Any:
        return initial_network(job.model_copy(update={"seed": 1}))

    monkeypatch.setattr(verify, "initial_network", drawn_otherwise)
    failure = failing(finished)
    assert failure.rule == "initial-weights" and "environment.json" in failure.hint


def test_a_server_that_accepts_an_update_over_the_bound_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = work.encode_update

    def large(*arguments: Any) -> Any:
        vector = honest(*arguments)
        if arguments[-1] == ("b", 1):
            vector[:-2] = 1 << 26
        return vector

    monkeypatch.setattr(work, "encode_update", large)
    monkeypatch.setattr(server_sketch, "is_within", lambda *arguments: True)
    run = make_run(tmp_path, secure_aggregation__level="sketch")
    monkeypatch.undo()
    failure = failing(run)
    assert (failure.file, failure.rule) == (str(run / "secagg" / "transcripts" / "train-0001"), "norm")


def swap(one: Path, other: Path) -> None:
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the events of a line file."""
    records = read_lines(path)
    for record in records:
        change(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records if record))


def say(**values: Any) -> Change:
    def change(run: Path) -> None:
        def one(record: dict[str, Any]) -> None:
            if record["event"] == "round" and record["round"] == 2:
                record |= values

        rewrite(run / "rounds.jsonl", one)

    return change


def throw_away(run: Path) -> None:
    def one(record: dict[str, Any]) -> None:
        if record["event"] == "round" and record["round"] == 2:
            record.clear()
            record |= {"event": "thrown away", "round": 2, "reason": "so they say"}

    rewrite(run / "rounds.jsonl", one)


def swap_rounds(run: Path) -> None:
    for kind in ("transcripts", "sums"):
        swap(run / "secagg" / kind / "train-0001", run / "secagg" / kind / "train-0002")


def another_model(run: Path) -> None:
    tensors, metadata = load_tensors(run / "model.safetensors")
    name = next(iter(tensors))
    value = tensors[name].copy()
    value.flat[0] = np.nextafter(value.flat[0], np.float32(1))
    save_tensors(run / "model.safetensors", {**tensors, name: value}, metadata)


def another_round_in_the_metadata(run: Path) -> None:
    tensors, metadata = load_tensors(run / "model.safetensors")
    save_tensors(run / "model.safetensors", tensors, metadata | {"round": "1"})


def another_seed(run: Path) -> None:
    job = load_job(run / "job.toml")
    (run / "job.toml").write_text(dump_job(job.model_copy(update={"seed": 1})))


def not_secure(run: Path) -> None:
    job = load_job(run / "job.toml")
    aggregation = job.aggregation.model_copy(update={"secure": False})
    (run / "job.toml").write_text(dump_job(job.model_copy(update={"aggregation": aggregation})))


def one_transcript_more(run: Path) -> None:
    for kind in ("transcripts", "sums"):
        shutil.copy(run / "secagg" / kind / "train-0002", run / "secagg" / kind / "train-0003")


def fewer_acks(run: Path) -> None:
    path = run / "secagg" / "transcripts" / "train-0002"
    transcript = decode(path.read_bytes(), Transcript)
    path.write_bytes(encode(dataclasses.replace(transcript, acks=transcript.acks[:-1])))


def a_file_beside(run: Path) -> None:
    (run / "secagg" / "transcripts" / "notes.txt").write_text("mine")


def a_checkpoint_more(run: Path) -> None:
    folder = run / "checkpoints"
    shutil.copy(folder / "round-0002.safetensors", folder / "round-0007.safetensors")


@pytest.mark.parametrize(
    ("change", "file", "rule"),
    [
        (say(train_loss=0.1), "rounds.jsonl", "record"),
        (say(update_norm=0.1), "rounds.jsonl", "record"),
        (say(num_sites=5), "rounds.jsonl", "record"),
        (say(level="off"), "rounds.jsonl", "record"),
        (say(validation=None), "secagg/transcripts/validate-0002", "record"),
        (say(validation={"mean_site": {"dice": 1.0}, "pooled": {}}), "rounds.jsonl", "record"),
        (throw_away, "secagg/transcripts/validate-0002", "record"),
        (swap_rounds, "secagg/transcripts/train-0001", "session"),
        (another_model, "model.safetensors", "model"),
        (another_round_in_the_metadata, "model.safetensors", "metadata"),
        (another_seed, "secagg/charter.json", "charter-job"),
        (not_secure, "job.toml", "charter-job"),
        (one_transcript_more, "secagg/transcripts/train-0003", "record"),
        (fewer_acks, "secagg/transcripts/train-0002", "quorum"),
        (a_file_beside, "secagg/transcripts/notes.txt", "name"),
        (a_checkpoint_more, "checkpoints/round-0007.safetensors", "record"),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_what_does_not_follow_is_found(copied: Path, change: Change, file: str, rule: str) -> None:
    change(copied)
    with pytest.raises(VerificationError) as caught:
        raise failing(copied)
    assert (caught.value.file, caught.value.rule) == (str(copied / file), rule)


def test_a_record_that_ends_early_is_found(copied: Path) -> None:
    lines = (copied / "rounds.jsonl").read_text().splitlines(True)
    (copied / "rounds.jsonl").write_text("".join(line for line in lines if '"round": 2' not in line))
    with pytest.raises(VerificationError, match=r"not all of its 2 rounds \(rule record\)"):
        check(copied)


def test_the_best_round_of_the_final_result_must_be_the_best(copied: Path) -> None:
    test = read_json(copied / "test.json")
    write_json(copied / "test.json", test | {"round": 3 - test["round"]})
    assert failing(copied).rule == "best-round"


def test_a_server_that_steps_further_than_the_job_says_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = round_module.server_step

    def twice(state: Any, mean_update: Any, job: Any) -> Any:
        return honest(state, 2 * mean_update, job)

    monkeypatch.setattr(round_module, "server_step", twice)
    run = make_run(tmp_path)
    failure = failing(run)
    assert (failure.file, failure.rule) == (str(run / "secagg" / "transcripts" / "validate-0001"), "model")


@pytest.mark.parametrize(("last", "rule"), [(3, ""), (1, "record")])
def test_a_sum_may_be_put_aside_only_if_nothing_can_be_read_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int, rule: str
) -> None:
    """Site c claims a weight that it cannot have, so that the sum of round 1 is of no use."""
    honest = work.encode_update

    def heavy(*arguments: Any) -> Any:
        vector = honest(*arguments)
        if arguments[-1] == ("c", 1):
            vector[-1] *= last
        return vector

    monkeypatch.setattr(work, "encode_update", heavy)
    run = make_run(tmp_path)
    if rule:

        def one(record: dict[str, Any]) -> None:
            if record["event"] == "round" and record["round"] == 1:
                record |= {"event": "thrown away", "reason": "so they say"}

        rewrite(run / "rounds.jsonl", one)
        for name in ("transcripts", "sums"):
            (run / "secagg" / name / "validate-0001").unlink()
    else:
        assert [e["round"] for e in read_lines(run / "rounds.jsonl") if e["event"] == "thrown away"] == [1]
    failure = check(run).failure
    assert (failure.rule if failure else "") == rule


def one_of(run: Path, pattern: str) -> Path:
    return sorted(run.glob(pattern))[0]


def another_input(run: Path) -> None:
    path = one_of(run, "sites/b/secagg/*/input-*")
    path.write_bytes(bytes(path.stat().st_size))


def another_key(run: Path) -> None:
    public = identity.public_line("b", identity.generate("b").public)
    (run / "sites" / "b" / "b.pub").write_text(public + "\n")


def another_session(run: Path) -> None:
    path = one_of(run, "sites/b/secagg/*/session")
    found = decode(path.read_bytes(), SessionFile)
    content = encode(dataclasses.replace(found, session=dataclasses.replace(found.session, root=bytes(32))))
    path.write_bytes(content)
    marks = next(path for path in (run / "guards" / "b").iterdir() if "-" not in path.name)
    known = decode(marks.read_bytes(), Marks)
    marks.write_bytes(encode(dataclasses.replace(known, session=hashlib.sha256(content).digest())))


def enrolled_under_another_charter(run: Path) -> None:
    path = one_of(run, "sites/b/secagg/*/enrolment")
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"kind": "charter"', b'"kind": "charteR"'))


def more_unmasked_than_recorded(run: Path) -> None:
    path = next(path for path in (run / "guards" / "b").iterdir() if "-" not in path.name)
    marks = decode(path.read_bytes(), Marks)
    further = tuple(dataclasses.replace(mark, unmasked=9) for mark in marks.marks)
    path.write_bytes(encode(dataclasses.replace(marks, marks=further)))


def another_model_released(run: Path) -> None:
    one_of(run, "guards/b/released-*").write_bytes(bytes(32))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (more_unmasked_than_recorded, "unmasked"),
        (another_model_released, "site-files"),
        (another_input, "inputs"),
        (another_key, "roster"),
        (another_session, "site-session"),
        (enrolled_under_another_charter, "enrolment"),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_a_site_whose_own_folder_says_something_else_is_heard(
    copied: Path, change: Change, rule: str
) -> None:
    change(copied)
    assert failing(copied).rule == rule


@pytest.mark.parametrize("pattern", ["sites/b/secagg/*/session", "guards/b", "sites/b/secagg/*/input-*"])
def test_what_a_site_lost_in_a_crash_is_no_lie(copied: Path, pattern: str) -> None:
    path = one_of(copied, pattern)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert check(copied).failure is None


def test_without_the_sites_folders_the_rest_is_checked(copied: Path) -> None:
    shutil.rmtree(copied / "sites")
    shutil.rmtree(copied / "guards")
    found = check(copied)
    assert found.failure is None
    assert found.checks[-1].status == "not checked"


def test_results_that_no_site_releases_alone_follow_from_one_sum(tmp_path: Path) -> None:
    run = make_run(tmp_path, secure_aggregation__release=[])
    assert check(run).failure is None
    assert not any("Results by site" in line for line in check(run).does_not_prove)
    test = read_json(run / "test.json")
    test["pooled"]["metrics"]["dice"] += 0.01
    write_json(run / "test.json", test)
    assert failing(run).file == str(run / "test.json")


def test_without_stored_sums_only_signatures_are_checked_and_that_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path, secure_aggregation__keep_sums=False)
    assert not list((run / "secagg" / "sums").glob("[tv]*"))
    found = check(run)
    assert found.failure is None
    assert {item.name: item.status for item in found.checks}["arithmetic"] == "not checked"
    assert any("How the model was made" in line for line in found.does_not_prove)
    assert not any("byte for byte" in line for line in found.proves)
    another_model(run)
    assert failing(run).file == str(run / "model.safetensors")
    write_json(run / "repair.json", {"format": 1, "is_changed": True})  # then it was never offered
    assert any("What the repair did" in line for line in check(run).does_not_prove)
    (run / "model.safetensors").write_bytes(b"half a file")
    assert failing(run).rule == "format"


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def test_of_an_unfinished_run_what_is_done_is_checked(tmp_path: Path) -> None:
    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "judged" and event["round"] == 2:
            raise Killed

    with pytest.raises(Killed):
        make_run(tmp_path, observe=kill)
    run = tmp_path / "run"
    found = check(run)
    assert found.failure is None
    assert "1 round done again" in found.checks[2].detail
    assert "no model yet" in found.checks[3].detail


@pytest.fixture(scope="module")
def disputed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which b and d lied, each in a way of its own, and round 2 was thrown away."""
    return make_disputed_run(tmp_path_factory.mktemp("disputed"))


def test_a_thrown_away_round_and_the_evidence_against_liars_verify(disputed: Path) -> None:
    found = check(disputed)
    assert found.failure is None
    details = {item.name: item.detail for item in found.checks}
    assert "thrown away: round 2" in details["sums"]
    assert "b (norm)" in details["evidence"]
    assert "d (sketch)" in details["evidence"]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_byte_of_evidence_is_found(disputed: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted((disputed / "secagg" / "evidence").iterdir())))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    with changed(path, bytes(content)):
        assert failing(disputed).rule in ("signature", "format", "roster", "sender", "name", "evidence")


def test_an_honest_site_cannot_be_framed_with_its_own_messages(disputed: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(disputed, tmp_path / "run"))
    transcript = decode((run / "secagg" / "transcripts" / "train-0001").read_bytes(), Transcript)
    sent = {
        entry.sender: (masked, entry)
        for masked, entry in zip(transcript.masked, transcript.sketches, strict=True)
    }
    name = "train-0001-1-site-1"
    (run / "secagg" / "evidence" / name).write_bytes(encode(Evidence(1, "norm", sent[1])))
    expelled = read_json(run / "secagg" / "expelled.json")
    write_json(run / "secagg" / "expelled.json", expelled | {"a": "norm"})
    event = {"event": "expelled", "round": 1, "site": "a", "rule": "norm", "evidence": name}
    append_line(run / "rounds.jsonl", event)
    failure = failing(run)
    assert (failure.file, failure.rule) == (str(run / "secagg" / "evidence" / name), "evidence")


def test_a_site_that_is_out_without_evidence_is_found(disputed: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(disputed, tmp_path / "run"))
    for path in (run / "secagg" / "evidence").glob("*-site-2"):
        path.unlink()
    assert failing(run).file == str(run / "secagg" / "expelled.json")


def test_a_run_without_secure_aggregation_and_a_folder_that_is_no_run_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path, aggregation__secure=False)
    with pytest.raises(ConfigError, match="without secure aggregation"):
        verify_run(run, None, lambda what, done, total: None)
    with pytest.raises(ConfigError, match="not a run folder"):
        verify_run(tmp_path, None, lambda what, done, total: None)


def test_training_again_gives_the_same_sums(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert train_again(run, lambda event: None, "one-process") == 4


def test_an_input_that_is_not_from_training_is_found_by_training_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = work.encode_update

    def turned(*arguments: Any) -> Any:
        vector = honest(*arguments)
        if arguments[-1] == ("c", 2):
            vector[:-2] = -vector[:-2]
        return vector

    monkeypatch.setattr(work, "encode_update", turned)
    run = make_run(tmp_path)
    monkeypatch.undo()
    assert check(run).failure is None
    with pytest.raises(VerificationError, match="training again gives another sum") as caught:
        train_again(run, lambda event: None, "one-process")
    assert caught.value.file == str(run / "secagg" / "sums" / "train-0002")


def test_a_run_with_absences_cannot_be_repeated(disputed: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be repeated"):
        train_again(disputed, lambda event: None, "one-process")


def run_command(*words: object) -> tuple[int, str, str]:
    """Run ``fedvision verify``; return exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["verify", *map(str, words)])
    return status, out.getvalue(), err.getvalue()


def test_the_command_prints_checks_and_what_they_prove(finished: Path) -> None:
    pinned = finished / "secagg" / "governance.pub"
    status, out, err = run_command(finished, "--governance", pinned)
    assert (status, err) == (0, "")
    for words in ("roster and charter", "What this proves", "What it does not prove", "Verified, with"):
        assert words in out
    assert "taken from the run itself" not in out
    status, out, _ = run_command(finished)
    assert status == 0 and "taken from the run itself" in out


def test_the_command_names_file_and_rule_in_one_line_and_exits_with_1(finished: Path) -> None:
    path = finished / "secagg" / "sums" / "train-0001"
    with changed(path, path.read_bytes()[:-4] + b"abcd"):
        status, out, err = run_command(finished)
        as_json, text, _ = run_command(finished, "--json")
    assert status == as_json == 1
    assert err == f"fedvision: error: {path}: not the sum that the server signed (rule sum)\n"
    assert "What this proves" not in out
    found = json.loads(text)
    assert not found["verified"] and found["proves"] == []
    failed = [item for item in found["checks"] if item["status"] == "failed"]
    assert [(item["file"], item["rule"]) for item in failed] == [(str(path), "sum")]


def test_the_result_as_json_says_whether_the_key_was_pinned(finished: Path) -> None:
    status, out, _ = run_command(finished, "--json", "--governance", finished / "secagg" / "governance.pub")
    found = json.loads(out)
    assert status == 0
    assert found["verified"] and found["governance_pinned"]
    assert found["signatures"] > 0 and len(found["checks"]) == 7


def test_what_is_not_a_run_exits_with_2(tmp_path: Path) -> None:
    status, out, err = run_command(tmp_path)
    assert status == 2 and out == ""
    assert "not a run folder" in err
