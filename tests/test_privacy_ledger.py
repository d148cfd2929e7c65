"""The privacy ledger: what was spent stays spent, whatever happens to the program, the disk or the file."""

import errno
import hashlib
import json
import math
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedvision.errors import FedvisionError, ProtocolError, StorageError, VerificationError
from fedvision.privacy.accounting import Mechanism, epsilon
from fedvision.privacy.ledger import Entry, Ledger, read_ledger, verify
from fedvision.secagg.identity import Identity, generate
from fedvision.secagg.identity import verify as check_signature

SITE, STRANGER = generate("utrecht"), generate("utrecht")
_filled: dict[int, tuple[bytes, bytes]] = {}
"""Ledger and marks with so many rounds: to write them once is enough."""
many_files = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def digest(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


def entry(round_: int = 1, job: str = "a", **changes: object) -> Entry:
    fields = {
        "data_set": "brats", "manifest": digest("manifest"), "group": "all",
        "job": digest(job), "round": round_,
        "sampling_rate": 0.05, "noise_honest": 1.5, "noise_broken": 0.5, "steps": 1,
        "delta": 1e-3,
    }  # fmt: skip
    return Entry.model_validate(fields | changes)


def opened(folder: Path, identity: Identity = SITE) -> Ledger:
    return Ledger(folder / "state" / "privacy.jsonl", folder / "guard", identity)


def filled(folder: Path, count: int = 6) -> Ledger:
    ledger = opened(folder)
    if count not in _filled:
        for number in range(1, count + 1):
            ledger.reserve(entry(number))
        _filled[count] = ledger.path.read_bytes(), mark_of(folder).read_bytes()
    for file, content in zip((ledger.path, mark_of(folder)), _filled[count], strict=True):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    return ledger


def lines_of(ledger: Ledger) -> list[bytes]:
    return ledger.path.read_bytes().splitlines(keepends=True)


def mark_of(folder: Path) -> Path:
    return folder / "guard" / "privacy-ledger"


def spelled(content: dict) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def signed(content: dict, identity: Identity = SITE) -> bytes:
    """Return a line with its end, whatever it says, with a good signature."""
    content = {key: value for key, value in content.items() if key != "signature"}
    covered = b"fedvision/privacy-ledger/v1" + hashlib.sha256(spelled(content)).digest()
    return spelled({**content, "signature": identity.sign(covered).hex()}) + b"\n"


def resigned(lines: list[bytes], first: int, identity: Identity = SITE) -> list[bytes]:
    """Return the lines with numbers, chain and signatures made good again from one on: the owner rewrites."""
    done = lines[:first]
    for number, line in enumerate(lines[first:], start=first + 1):
        previous = hashlib.sha256(done[-1][:-1]).hexdigest() if done else "00" * 32
        done.append(signed(json.loads(line) | {"number": number, "previous": previous}, identity))
    return done


def changed(ledger: Ledger, lines: list[bytes]) -> None:
    ledger.path.write_bytes(b"".join(lines))


def refused(call: Callable[[], object]) -> VerificationError:
    with pytest.raises(VerificationError) as caught:
        call()
    assert f"(rule {caught.value.rule})" in str(caught.value)
    return caught.value


def assert_found(folder: Path, number: int | None = None) -> VerificationError:
    """Check that a newly opened ledger is refused for reading and writing, and left alone."""
    before = opened(folder).path.read_bytes(), mark_of(folder).read_bytes()
    refused(lambda: opened(folder).reserve(entry(99)))
    error = refused(lambda: opened(folder).mechanisms("brats"))
    if number is not None:
        assert error.file.endswith("privacy.jsonl") and f"line {number}: " in str(error)
    assert (opened(folder).path.read_bytes(), mark_of(folder).read_bytes()) == before
    return error


def in_a_child(call: Callable[[], object]) -> Callable[[], int]:
    """Run something in another process; what is returned waits for its exit status."""
    child = os.fork()
    if not child:
        try:
            call()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def num_steps(mechanisms: list[Mechanism], delta: float) -> float:
    """Stand in for an accountant: one epsilon a step."""
    return float(sum(one.steps for one in mechanisms))


def test_a_line_has_one_spelling_and_holds_what_was_reserved(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    assert ledger.mechanisms("brats") == [] and ledger.rows() == []
    assert ledger.reserve(entry()) == (1, True, "")
    (line,) = lines_of(ledger)
    content = json.loads(line)
    assert line == spelled(content) + b"\n" == signed(content)
    assert content["format"] == content["number"] == 1 and content["previous"] == "00" * 32
    assert content["key"] == SITE.public.hex() and content["content"] == entry().model_dump()
    (read,) = read_ledger(ledger.path)
    assert read.line.content == entry() and read.digest == hashlib.sha256(line[:-1]).digest()
    assert json.loads(mark_of(tmp_path).read_bytes()) == {
        "format": 1,
        "number": 1,
        "digest": read.digest.hex(),
    }
    for file in (ledger.path, mark_of(tmp_path), ledger.path.with_name("privacy.jsonl.lock")):
        assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling_rate": 0}, {"sampling_rate": 1.01}, {"sampling_rate": math.nan}, {"noise_honest": -1},
        {"noise_honest": math.inf}, {"noise_broken": 1.6}, {"noise_broken": math.nan}, {"steps": 0},
        {"steps": 1.5}, {"round": -1}, {"job": "a"}, {"manifest": "AB" * 32}, {"data_set": "../x"},
        {"group": ""}, {"attempt": 2},
    ],
)  # fmt: skip
def test_what_cannot_be_accounted_is_no_entry(changes: dict) -> None:
    with pytest.raises(ValidationError):
        Entry.model_validate(entry().model_dump() | changes)


def test_a_round_counts_once_however_often_it_is_attempted(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 3)
    assert ledger.reserve(entry(2)) == (2, False, "")
    assert opened(tmp_path).reserve(entry(2)) == (2, False, "")
    assert opened(tmp_path).reserve(entry(2, job="b")) == (4, True, "")
    assert ledger.mechanisms("brats") == [Mechanism(0.05, 0.5, 4)]


@pytest.mark.parametrize(
    "changes",
    [
        {"data_set": "lits"}, {"manifest": digest("other")}, {"group": "women"}, {"sampling_rate": 0.04},
        {"noise_honest": 1.6}, {"noise_broken": 0.4}, {"steps": 2},
    ],
)  # fmt: skip
def test_a_round_that_differs_from_what_was_reserved_is_refused(tmp_path: Path, changes: dict) -> None:
    ledger = filled(tmp_path, 3)
    before = ledger.path.read_bytes()
    for again in (ledger, opened(tmp_path)):
        with pytest.raises(
            ProtocolError, match=rf"round 2 .* another {next(iter(changes))}, line 2"
        ) as caught:
            again.reserve(entry(2, **changes))
        assert caught.value.rule == "privacy-reserved"
    assert ledger.path.read_bytes() == before


def test_what_was_spent_is_added_up_by_parameters_for_both_cases(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 3)
    ledger.reserve(entry(1, job="b", steps=7))
    ledger.reserve(entry(2, job="b", noise_honest=2.0))
    ledger.reserve(entry(3, job="b", sampling_rate=0.01))
    ledger.reserve(entry(1, job="c", data_set="lits"))
    assert ledger.mechanisms("brats") == [Mechanism(0.01, 0.5, 1), Mechanism(0.05, 0.5, 11)]
    assert opened(tmp_path).mechanisms("brats", case="honest") == [
        Mechanism(0.01, 1.5, 1), Mechanism(0.05, 1.5, 10), Mechanism(0.05, 2.0, 1),
    ]  # fmt: skip
    assert ledger.mechanisms("lits") == [Mechanism(0.05, 0.5, 1)]
    assert ledger.mechanisms("kits") == []
    with pytest.raises(ValueError, match="case"):
        ledger.mechanisms("brats", case="both")  # type: ignore[arg-type]


def test_what_everybody_spent_counts_for_each_group_and_all_groups_for_everybody(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    for number, group in enumerate(["all", "women", "men", "men"]):
        ledger.reserve(entry(number, group=group, steps=10**number))
    steps = {group: ledger.spent("brats", 1e-5, num_steps, group) for group in ("all", "women", "men", "x")}
    assert steps == {"all": 1111, "women": 11, "men": 1101, "x": 1}


def test_the_accountant_is_asked_with_the_delta_and_only_for_what_it_can_count(tmp_path: Path) -> None:
    ledger, asked = opened(tmp_path), []

    def accountant(mechanisms: list[Mechanism], delta: float) -> float:
        asked.append((mechanisms, delta))
        return 3.5

    assert ledger.spent("brats", 1e-5, accountant) == 0.0 and not asked
    ledger.reserve(entry(1))
    assert ledger.spent("brats", 1e-5, accountant) == 3.5
    assert asked == [([Mechanism(0.05, 0.5, 1)], 1e-5)]
    ledger.reserve(entry(2, noise_broken=0))
    assert ledger.spent("brats", 1e-5, accountant) == math.inf
    assert ledger.spent("brats", 1e-5, accountant, case="honest") == 3.5


def test_two_jobs_cost_what_the_accountant_says_of_both_together(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 40)
    first = ledger.spent("brats", 1e-5, epsilon, case="honest")
    assert first == epsilon([Mechanism(0.05, 1.5, 40)], 1e-5)
    plan = [Mechanism(0.05, 1.5, 40)]
    both = ledger.check_limit("brats", plan, 8.0, 1e-5, epsilon, job=digest("b"), case="honest")
    assert both == epsilon([Mechanism(0.05, 1.5, 80)], 1e-5) and first < both < 2 * first
    with pytest.raises(ProtocolError, match="privacy-limit"):
        ledger.check_limit("brats", plan, 8.0, 1e-5, epsilon, job=digest("b"))


def test_a_job_that_would_pass_the_limit_as_a_whole_is_refused(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 40)
    plan = [Mechanism(0.05, 0.5, 30), Mechanism(0.01, 0.5, 30)]

    def check(limit: float, job: str = "b", **more: object) -> float:
        return ledger.check_limit("brats", plan, limit, 1e-5, num_steps, job=digest(job), **more)  # type: ignore[arg-type]

    assert check(100) == 100
    with pytest.raises(ProtocolError) as caught:
        check(99.5)
    assert caught.value.rule == "privacy-limit" and "site's own" in caught.value.hint
    for part in ("brats", "epsilon 100 ", "delta 1e-05", "40 spent", "60 wanted", "99.5 allowed", "broken"):
        assert part in str(caught.value)
    # What the job reserved itself is a part of its plan, and is not counted twice.
    for number in range(1, 31):
        ledger.reserve(entry(number, job="b"))
    assert check(100) == 100 and check(130, job="c") == 130
    # What it reserved besides its plan is.
    ledger.reserve(entry(31, job="b"))
    ledger.reserve(entry(32, job="b", noise_broken=0.4))
    assert check(102) == 102
    with pytest.raises(ProtocolError, match="62 wanted"):
        check(101)
    assert ledger.check_limit("lits", plan, 60, 1e-5, num_steps, job=digest("d")) == 60


@pytest.mark.parametrize(
    ("limit", "answer"), [(math.nan, 1.0), (8.0, math.nan), (8.0, math.inf), (8.0, 8.01)]
)
def test_a_limit_or_an_epsilon_that_is_no_number_refuses(tmp_path: Path, limit: float, answer: float) -> None:
    with pytest.raises(ProtocolError, match="privacy-limit"):
        opened(tmp_path).check_limit(
            "brats", [Mechanism(0.05, 1.0, 1)], limit, 1e-5, lambda _, __: answer, job=digest("a")
        )


def test_a_job_without_noise_passes_every_limit(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="epsilon inf"):
        opened(tmp_path).check_limit(
            "brats", [Mechanism(0.05, 0.0, 1)], 1e9, 1e-5, num_steps, job=digest("a")
        )


def test_a_changed_data_set_has_the_same_patients_and_a_warning(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 2)
    new = entry(1, job="b", manifest=digest("new"))
    receipt = ledger.reserve(new)
    assert receipt.is_new and "brats has changed" in receipt.warning and "still counts" in receipt.warning
    assert (
        ledger.reserve(new).warning == ledger.reserve(entry(2, job="b", manifest=digest("new"))).warning == ""
    )
    assert "has changed" in opened(tmp_path).reserve(entry(3, job="b")).warning
    assert ledger.reserve(entry(1, job="c", data_set="lits", manifest=digest("x"))).warning == ""
    assert ledger.spent("brats", 1e-5, num_steps) == 5


def test_the_table_has_a_row_for_each_job_and_mechanism(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 3)
    ledger.reserve(entry(1, job="b", steps=4))
    ledger.reserve(entry(4))
    first, second = opened(tmp_path).rows()
    assert first[:8] == ("brats", "all", digest("a"), 0.05, 1.5, 0.5, 4, 4)
    assert second[:8] == ("brats", "all", digest("b"), 0.05, 1.5, 0.5, 1, 4)
    times = [json.loads(line)["time"] for line in lines_of(ledger)]
    assert (first.first, first.last) == (times[0], times[4])


def test_verify_counts_the_lines_of_the_key_it_is_given(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    assert verify(ledger.path, SITE.public, check_signature) == 6
    assert refused(lambda: verify(ledger.path, STRANGER.public, check_signature)).rule == "ledger-signature"
    ledger.path.write_bytes(b"")
    assert verify(ledger.path, SITE.public, check_signature) == 0
    ledger.path.unlink()
    with pytest.raises(StorageError, match="cannot read"):
        verify(ledger.path, SITE.public, check_signature)


EDITS = {
    "format": 2, "number": 7, "time": "2020-01-01T00:00:00Z", "key": "11" * 32, "previous": "11" * 32,
    "signature": "11" * 64, "data_set": "lits", "manifest": digest("x"), "group": "women", "job": digest("x"),
    "round": 9, "sampling_rate": 0.001, "noise_honest": 9.0, "noise_broken": 1.0, "steps": 2,
}  # fmt: skip


@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize("field", EDITS)
def test_an_edit_of_any_field_is_found(tmp_path: Path, field: str, place: int) -> None:
    ledger = filled(tmp_path)
    lines = lines_of(ledger)
    content = json.loads(lines[place])
    (content if field in content else content["content"])[field] = EDITS[field]
    edited = spelled(content) + b"\n"
    assert edited != lines[place]
    changed(ledger, [*lines[:place], edited, *lines[place + 1 :]])
    error = refused(lambda: verify(ledger.path, SITE.public, check_signature))
    assert error.file == str(ledger.path)
    assert f"line {place + 1}: " in str(error) or f"line {place + 2}: " in str(error)
    error = assert_found(tmp_path)
    assert f"line {place + 1}: " in str(error) or f"line {place + 2}: " in str(error)
    # Signed again by its owner, and all that follows: verify cannot see it, the marks do.
    if field not in ("format", "key"):
        changed(ledger, resigned([*lines[:place], edited, *lines[place + 1 :]], place))
        if ledger.path.read_bytes() != b"".join(lines):
            assert verify(ledger.path, SITE.public, check_signature) == 6
            assert assert_found(tmp_path, 6).rule == "other-ledger"


def test_a_ledger_in_use_finds_an_edit_too(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    assert ledger.spent("brats", 1e-5, num_steps) == 6
    lines = lines_of(ledger)
    changed(ledger, [lines[0].replace(b'"steps":1', b'"steps":2'), *lines[1:]])
    refused(lambda: ledger.mechanisms("brats"))
    refused(lambda: ledger.reserve(entry(7)))
    changed(ledger, lines)
    assert ledger.reserve(entry(7)).number == 7
    ledger.path.unlink()
    assert refused(lambda: ledger.reserve(entry(8))).rule == "old-ledger"


@many_files
@given(data=st.data())
def test_any_changed_byte_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("byte")
    ledger = filled(folder, 2)
    content = bytearray(ledger.path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1), "place")
    content[place] = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[place]), "byte")
    ledger.path.write_bytes(content)
    assert_found(folder)


@pytest.mark.parametrize(
    "kept",
    [
        [1, 2, 3, 4, 5], [0, 1, 3, 4, 5], [0, 1, 2, 3, 4], [1, 0, 2, 3, 4, 5], [0, 1, 2, 3, 5, 4], [],
        [0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 5], [5, 4, 3, 2, 1, 0], [0],
    ],
    ids=str,
)  # fmt: skip
def test_removed_repeated_and_moved_lines_are_found(tmp_path: Path, kept: list[int]) -> None:
    ledger = filled(tmp_path)
    lines = [lines_of(ledger)[one] for one in kept]
    changed(ledger, lines)
    error = assert_found(tmp_path)
    if kept == list(range(len(kept))):
        assert error.rule == "old-ledger" and f"ends with line {len(kept)}, but 6 were" in str(error)
        assert verify(ledger.path, SITE.public, check_signature) == len(kept)
    else:
        assert error.rule == "ledger-chain" and error.file == str(ledger.path)
        assert refused(lambda: verify(ledger.path, SITE.public, check_signature)).rule == "ledger-chain"
    # Numbers and chain made good by the owner of the key: the marks show it, but for a line after the last,
    # as a crash leaves one: it counts too much.
    changed(ledger, resigned(lines, 0))
    if kept == [0, 1, 2, 3, 4, 5, 5]:
        assert opened(tmp_path).spent("brats", 1e-5, num_steps) == 7
    else:
        assert assert_found(tmp_path).rule in ("old-ledger", "other-ledger")


@pytest.mark.parametrize("place", [0, 3, 5])
def test_a_line_of_another_key_is_found(tmp_path: Path, place: int) -> None:
    ledger = filled(tmp_path)
    lines = lines_of(ledger)
    for key in (SITE, STRANGER):  # in the site's name, and in its own
        foreign = signed(json.loads(lines[place]) | {"key": key.public.hex()}, STRANGER)
        changed(ledger, [*lines[:place], foreign, *lines[place + 1 :]])
        error = refused(lambda: verify(ledger.path, SITE.public, check_signature))
        assert f"line {place + 1}: " in str(error) or f"line {place + 2}: " in str(error)
        assert_found(tmp_path)
    # After the last line that is marked, where a crash might have left one.
    extra = signed(
        json.loads(lines[5]) | {"number": 7, "previous": hashlib.sha256(lines[5][:-1]).hexdigest()}, STRANGER
    )
    changed(ledger, [*lines, extra])
    assert assert_found(tmp_path, 7).rule == "ledger-signature"


def test_lines_of_another_key_between_the_sites_own_are_found_though_all_signatures_fit(
    tmp_path: Path,
) -> None:
    lines = lines_of(filled(tmp_path))
    foreign = json.loads(lines[2]) | {"key": STRANGER.public.hex()}
    ledger = opened(tmp_path)
    changed(ledger, resigned([*lines[:2], signed(foreign, STRANGER), *lines[3:]], 3))
    error = refused(lambda: verify(ledger.path, SITE.public, check_signature))
    assert error.rule == "ledger-signature" and "line 3: of another key" in str(error)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(format=True),
        lambda c: c.update(number=1.0),
        lambda c: c.update(extra=1),
        lambda c: c.pop("time"),
        lambda c: c.update(time="2026-02-30T12:00:00Z"),
        lambda c: c.update(content={}),
        lambda c: c["content"].update(sampling_rate=1),
        lambda c: c["content"].update(sampling_rate=0.0),
        lambda c: c["content"].update(steps=True),
        lambda c: c["content"].update(steps=-5),
        lambda c: c["content"].update(noise_broken=2.0),
        lambda c: c["content"].pop("group"),
        lambda c: c["content"].update(data_set="x" * 5000),
        lambda c: c.update(content={"key_before": "ab" * 32, "marked": -1}),
    ],
)
def test_a_signed_line_of_the_wrong_form_does_not_count(
    tmp_path: Path, change: Callable[[dict], object]
) -> None:
    ledger = filled(tmp_path, 1)
    content = json.loads(ledger.path.read_bytes())
    change(content)
    ledger.path.write_bytes(signed(content))
    error = refused(lambda: verify(ledger.path, SITE.public, check_signature))
    assert error.rule == "ledger-line" and "line 1: " in str(error)
    assert_found(tmp_path, 1)


def test_another_spelling_of_a_line_does_not_count(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 1)
    line = ledger.path.read_bytes()
    for other in (line.replace(b":1,", b": 1,", 1), line.replace(b"0.05", b"0.050"), line[:-1] + b" \n"):
        assert other != line
        ledger.path.write_bytes(other)
        assert "another spelling" in str(refused(lambda: verify(ledger.path, SITE.public, check_signature)))


@pytest.mark.parametrize("left", [1, 100, -1])
def test_an_unfinished_last_line_is_dropped_only_if_no_mark_names_it(tmp_path: Path, left: int) -> None:
    ledger = filled(tmp_path, 2)
    older = mark_of(tmp_path).read_bytes()
    ledger.reserve(entry(3))
    lines = lines_of(ledger)
    changed(ledger, [*lines[:2], lines[2][:left]])
    assert assert_found(tmp_path).rule == "old-ledger"
    mark_of(tmp_path).write_bytes(older)
    again = opened(tmp_path)
    assert again.spent("brats", 1e-5, num_steps) == 2
    assert again.reserve(entry(4)) == (3, True, "")
    assert verify(again.path, SITE.public, check_signature) == 3
    assert [read.line.content for read in read_ledger(again.path)] == [entry(1), entry(2), entry(4)]


def test_a_first_line_that_was_never_finished_is_dropped(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    assert ledger.rows() == []
    ledger.path.write_bytes(b'{"content')
    assert ledger.rows() == []
    assert ledger.reserve(entry()).number == 1 and verify(ledger.path, SITE.public, check_signature) == 1


def test_a_restored_older_ledger_is_found_and_the_newest_copy_goes_on(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 3)
    backup = ledger.path.read_bytes()
    ledger.reserve(entry(4))
    newest = ledger.path.read_bytes()
    ledger.path.write_bytes(backup)
    error = assert_found(tmp_path)
    assert error.rule == "old-ledger" and "newest copy" in error.hint
    # Nobody can take it over: what is missing was spent.
    refused(lambda: opened(tmp_path).take_over(SITE.public, check_signature))
    assert ledger.path.read_bytes() == backup
    ledger.path.unlink()
    assert refused(lambda: opened(tmp_path).reserve(entry(9))).rule == "old-ledger"
    assert not ledger.path.exists()
    ledger.path.write_bytes(newest)
    assert opened(tmp_path).reserve(entry(5)).number == 5


def test_lost_or_damaged_marks_are_an_error_until_the_sites_people_take_the_ledger_over(
    tmp_path: Path,
) -> None:
    ledger = filled(tmp_path, 3)
    mark, before = mark_of(tmp_path), ledger.path.read_bytes()
    for damage in (b"", b"{}", mark.read_bytes()[:-1], b'{"digest":"00","format":1,"number":3}'):
        mark.write_bytes(damage)
        assert assert_found(tmp_path).rule == "lost-marks"
    ledger.path.unlink()
    assert refused(lambda: opened(tmp_path).reserve(entry(4))).rule == "lost-marks"
    ledger.path.write_bytes(before)
    mark.unlink()
    for call in (lambda: opened(tmp_path).reserve(entry(4)), opened(tmp_path).rows):
        error = refused(call)
        assert error.rule == "lost-marks" and "take it over" in error.hint and "never delete" in error.hint
    assert not mark.exists() and ledger.path.read_bytes() == before
    again = opened(tmp_path)
    assert again.take_over(SITE.public, check_signature) == 4
    assert json.loads(lines_of(again)[3])["content"] == {"key_before": SITE.public.hex(), "marked": None}
    assert again.reserve(entry(4)).number == 5
    assert opened(tmp_path).spent("brats", 1e-5, num_steps) == 4
    assert verify(again.path, SITE.public, check_signature) == 5


def test_a_damaged_ledger_is_not_taken_over(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 3)
    mark_of(tmp_path).unlink()
    lines = lines_of(ledger)
    for wrong in (
        [lines[0], lines[2]],
        [lines[0].replace(b'"steps":1', b'"steps":2'), *lines[1:]],
        resigned(lines, 0, STRANGER),
    ):
        changed(ledger, wrong)
        refused(lambda: opened(tmp_path).take_over(SITE.public, check_signature))
        assert not mark_of(tmp_path).exists() and lines_of(ledger) == wrong


def test_restored_older_marks_are_found(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 3)
    backup = mark_of(tmp_path).read_bytes()
    ledger.reserve(entry(4))
    ledger.reserve(entry(5))
    mark_of(tmp_path).write_bytes(backup)
    error = assert_found(tmp_path)
    assert error.rule == "old-marks" and "line 3" in str(error) and "has 5" in str(error)
    assert opened(tmp_path).take_over(SITE.public, check_signature) == 6
    assert json.loads(lines_of(ledger)[5])["content"]["marked"] == 3
    assert ledger.reserve(entry(6)).number == 7


def test_a_new_key_of_the_site_takes_the_ledger_over_and_nothing_is_forgotten(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 3)
    new = generate("utrecht")
    error = refused(lambda: opened(tmp_path, new).reserve(entry(4)))
    assert error.rule == "ledger-signature" and "take the ledger over" in error.hint
    refused(lambda: opened(tmp_path, new).take_over(STRANGER.public, check_signature))
    after = opened(tmp_path, new)
    assert after.take_over(SITE.public, check_signature) == 4
    assert after.reserve(entry(2)) == (2, False, "")
    assert after.reserve(entry(4)) == (5, True, "")
    assert after.spent("brats", 1e-5, num_steps) == 4
    assert verify(ledger.path, new.public, check_signature) == 5
    refused(lambda: verify(ledger.path, SITE.public, check_signature))
    refused(lambda: ledger.reserve(entry(5)))


def test_taking_over_nothing_begins_a_ledger(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    assert ledger.take_over(SITE.public, check_signature) == 0
    ledger.path.write_bytes(b"")
    assert refused(lambda: ledger.reserve(entry())).rule == "lost-marks"
    assert ledger.take_over(SITE.public, check_signature) == 0
    assert ledger.reserve(entry()).number == 1


def test_processes_that_reserve_at_once_lose_and_double_nothing(tmp_path: Path) -> None:
    def reserve_all(job: str) -> None:
        ledger = opened(tmp_path)
        for number in range(25):
            ledger.reserve(entry(number, job=job))
            ledger.reserve(entry(number, job="of all"))

    waits = [in_a_child(lambda job=job: reserve_all(job)) for job in "abc"]
    assert [wait() for wait in waits] == [0, 0, 0]
    ledger = opened(tmp_path)
    assert verify(ledger.path, SITE.public, check_signature) == 4 * 25
    assert sorted((row.job, row.rounds) for row in ledger.rows()) == sorted(
        (digest(job), 25) for job in ("a", "b", "c", "of all")
    )


def test_processes_that_check_and_reserve_in_one_go_never_pass_the_limit(tmp_path: Path) -> None:
    def spend(job: str) -> None:
        ledger = opened(tmp_path)
        for number in range(20):
            one = entry(number, job=f"{job}{number}")
            with ledger.held():
                try:
                    ledger.check_limit("brats", [Mechanism(0.05, 0.5, 1)], 10, 1e-5, num_steps, job=one.job)
                except ProtocolError:
                    continue
                ledger.reserve(one)

    waits = [in_a_child(lambda job=job: spend(job)) for job in "abc"]
    assert [wait() for wait in waits] == [0, 0, 0]
    assert opened(tmp_path).spent("brats", 1e-5, num_steps) == 10


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("call", ["ftruncate", "pwrite", "fsync", "replace", "second fsync"])
def test_a_process_killed_at_any_step_only_counts_too_much(tmp_path: Path, call: str, moment: str) -> None:
    filled(tmp_path, 2)

    def killed() -> None:
        ledger = opened(tmp_path)
        ledger.rows()
        holder, name = (Path, call) if call == "replace" else (os, call.split()[-1])
        original, calls = getattr(holder, name), []

        def killing(*arguments: object) -> object:
            calls.append(name)
            if call.startswith("second") and len(calls) < 2:
                return original(*arguments)
            if moment == "after":
                original(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
            return None

        setattr(holder, name, killing)
        ledger.reserve(entry(3))

    assert in_a_child(killed)() == -signal.SIGKILL
    is_written = call not in ("ftruncate", "pwrite") or (call, moment) == ("pwrite", "after")
    count = 3 if is_written else 2
    assert opened(tmp_path).spent("brats", 1e-5, num_steps) == count
    assert json.loads(mark_of(tmp_path).read_bytes())["number"] == count
    assert opened(tmp_path).reserve(entry(3)) == (3, not is_written, "")
    assert opened(tmp_path).reserve(entry(4)).number == 4
    assert verify(opened(tmp_path).path, SITE.public, check_signature) == 4
    assert opened(tmp_path).spent("brats", 1e-5, num_steps) == 4


def test_two_crashes_between_line_and_mark_are_both_marked(tmp_path: Path) -> None:
    filled(tmp_path, 1)

    def killed(number: int) -> None:
        ledger = opened(tmp_path)
        ledger.rows()
        Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,method-assign]
        ledger.reserve(entry(number))

    for number in (2, 3):
        assert in_a_child(lambda number=number: killed(number))() == -signal.SIGKILL
    assert opened(tmp_path).spent("brats", 1e-5, num_steps) == 3


def test_a_full_disk_in_mid_line_leaves_whole_lines(tmp_path: Path) -> None:
    """The limit on a file's size makes the system write a part of the line, as a full disk does."""
    ledger = filled(tmp_path, 2)
    before, mark = ledger.path.read_bytes(), mark_of(tmp_path).read_bytes()

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, resource.RLIM_INFINITY))
        again = opened(tmp_path)
        with pytest.raises(StorageError, match=r"cannot write .*too large") as caught:
            again.reserve(entry(3))
        assert "before it is written down" in caught.value.hint
        assert again.path.read_bytes() == before
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert again.spent("brats", 1e-5, num_steps) == 2
        assert again.reserve(entry(4)).number == 3

    assert in_a_child(full)() == 0
    assert mark_of(tmp_path).read_bytes() != mark
    assert verify(ledger.path, SITE.public, check_signature) == 3
    assert ledger.reserve(entry(5)).number == 4


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_does_not_flush_refuses_the_round_and_does_not_forget_it_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    ledger = filled(tmp_path, 2)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path if call == "replace" else os, call, full)
        with pytest.raises(StorageError, match="no space left"):
            ledger.reserve(entry(3))
    # The line was taken back, or it is there without its mark: then it counts.
    is_there = call == "replace"
    for again in (ledger, opened(tmp_path)):
        assert again.spent("brats", 1e-5, num_steps) == 2 + is_there
    assert ledger.reserve(entry(3)) == (3, not is_there, "")
    assert verify(ledger.path, SITE.public, check_signature) == 3


def test_a_folder_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("in the way")
    with pytest.raises(FedvisionError, match="cannot lock"):
        opened(tmp_path).reserve(entry())


def test_ten_thousand_rounds_are_read_and_added_up_quickly(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 1)
    lines, previous = lines_of(ledger), b""
    first = json.loads(lines[0])
    for number in range(2, 10_001):
        previous = hashlib.sha256(lines[-1][:-1]).digest()
        content = first["content"] | {"round": number}
        lines.append(signed(first | {"number": number, "previous": previous.hex(), "content": content}))
    changed(ledger, lines)
    mark = {"format": 1, "number": 10_000, "digest": hashlib.sha256(lines[-1][:-1]).hexdigest()}
    mark_of(tmp_path).write_bytes(spelled(mark))
    start = time.process_time()
    again = opened(tmp_path)
    assert again.mechanisms("brats") == [Mechanism(0.05, 0.5, 10_000)]
    opening = time.process_time() - start
    # Who has it open does not read it again for each round.
    start = time.process_time()
    for number in range(10_001, 10_021):
        assert again.reserve(entry(number)).number == number
    assert opening < 5 and time.process_time() - start < opening
    assert again.mechanisms("brats") == [Mechanism(0.05, 0.5, 10_020)]
