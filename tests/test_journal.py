"""The journal of an attempt: what was written comes back, what was cut off does not, damage is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedvision.errors import StorageError
from fedvision.secagg.attempt import MaskedSum
from fedvision.secagg.codec import encode
from fedvision.secagg.messages import Session
from fedvision.secagg.server import SumRound
from fedvision_server.journal import FRAME, Choice, Closed, Journal, Outcome, Start
from tests.secagg_parties import Consort, ask, gather, honest, true_sum
from tests.secagg_stages import STEPS, bodies_of, taker

SESSION = Session("train", 3, 2)
START = Start(SESSION, bytes(32), bytes([1, 2, 5]), bytes([4]), 1)


def answer(site: int, step: Any = "ready", body: bytes = b"x") -> Outcome:
    return Outcome(step, site, b"", body, 0)


def written(folder: Path) -> tuple[Journal, list[Outcome]]:
    """Return a journal with two steps and a choice."""
    journal = Journal(folder)
    journal.begin(START)
    outcomes = [answer(1), Outcome("ready", 2, b"deadline", b"", 0), answer(5, body=bytes(1000))]
    for outcome in outcomes:
        journal.add(outcome)
    journal.close("ready")
    assert journal.choice(lambda: bytes([7] * 32)) == bytes([7] * 32)
    journal.add(answer(1, "mask"))
    return journal, outcomes


def read_back(folder: Path) -> list[Any]:
    """Return all that a restarted server finds, in the order of ``written``."""
    journal = Journal(folder)
    resumed = journal.resume()
    if resumed is None:
        return []
    found: list[Any] = [resumed[0], *(outcome for outcome, _ in journal.outcomes("ready"))]
    if journal.is_closed("ready"):
        found.append("closed")
        found.append(journal.choice(lambda: bytes(32)))
        found += [outcome for outcome, _ in journal.outcomes("mask")]
        assert not journal.is_closed("mask")
    return found


def test_what_was_written_comes_back_in_its_order(tmp_path: Path) -> None:
    _, outcomes = written(tmp_path)
    whole = [START, *outcomes, "closed", bytes([7] * 32), answer(1, "mask")]
    assert read_back(tmp_path) == whole
    assert read_back(tmp_path) == whole


def test_only_the_last_record_may_not_have_been_told(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(START)
    for site in (1, 2, 5):
        journal.add(answer(site))
    again = Journal(tmp_path)
    assert again.resume() is not None
    assert [told for _, told in again.outcomes("ready")] == [True, True, False]


def test_nothing_comes_back_from_a_journal_that_is_not_there(tmp_path: Path) -> None:
    assert Journal(tmp_path).resume() is None
    journal, _ = written(tmp_path)
    journal.remove()
    assert Journal(tmp_path).resume() is None
    journal.remove()


def test_a_journal_that_was_cut_off_anywhere_loses_its_last_record_only(tmp_path: Path) -> None:
    _, outcomes = written(tmp_path)
    path, whole = tmp_path / "journal", read_back(tmp_path)
    content = path.read_bytes()
    first = FRAME + len(encode(START))
    ends, at = [first], first
    records = [*map(encode, outcomes), encode(Closed("ready")), encode(Choice(bytes([7] * 32)))]
    for record in records:
        at += FRAME + len(record)
        ends.append(at)
    ends.append(len(content))
    for size in range(first, len(content)):
        path.write_bytes(content[:size])
        count = sum(end <= size for end in ends)
        found = read_back(tmp_path)
        if count == len(outcomes) + 2:  # the choice was not made yet: it is drawn now
            assert found == [*whole[:count], bytes(32)]
        else:
            assert found == whole[:count], size
        assert path.stat().st_size >= ends[count - 1]


def test_zeros_after_a_power_cut_are_dropped(tmp_path: Path) -> None:
    written(tmp_path)
    whole, path = read_back(tmp_path), tmp_path / "journal"
    content = path.read_bytes()
    path.write_bytes(content + bytes(5000))
    assert read_back(tmp_path) == whole
    assert path.read_bytes() == content


@given(st.data())
def test_damage_before_the_last_record_is_an_error_and_never_another_story(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    written(folder)
    whole, path = read_back(folder), folder / "journal"
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found = read_back(folder)
    except StorageError as error:
        assert str(path) in str(error)
    else:
        assert found == whole[: len(found)] or found[:-1] == whole[: len(found) - 1]
        assert at >= len(content) - FRAME - len(encode(answer(1, "mask")))


def test_a_journal_that_does_not_go_on_as_the_attempt_does_is_an_error(tmp_path: Path) -> None:
    def at_second_step() -> Journal:
        journal = Journal(tmp_path)
        assert journal.resume() is not None
        return journal

    written(tmp_path)
    wrong: tuple[Callable[[Journal], Any], ...] = (
        lambda journal: list(journal.outcomes("mask")),
        lambda journal: journal.is_closed("ready"),
        lambda journal: journal.choice(lambda: bytes(32)),
        lambda journal: (list(journal.outcomes("ready")), journal.is_closed("mask")),
    )
    for use in wrong:
        with pytest.raises(StorageError, match="is damaged"):
            use(at_second_step())


def test_a_full_disk_is_named_and_the_journal_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, _ = written(tmp_path)
    whole = read_back(tmp_path)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(StorageError, match="no space left on device"):
            journal.add(answer(2, "mask"))
    assert read_back(tmp_path)[: len(whole)] == whole


def test_files_are_for_their_owner_only_and_masked_inputs_of_other_attempts_go(tmp_path: Path) -> None:
    journal, vector = Journal(tmp_path), np.arange(5, dtype=np.uint32)
    store = journal.begin(START)
    store.put(1, vector)
    store.put(1, vector + 1)  # the first one stays
    assert np.array_equal(store.get(1), vector)
    for path in (tmp_path / "journal", *(tmp_path / "masked").iterdir()):
        assert path.stat().st_mode & 0o777 == 0o600
    resumed = Journal(tmp_path).resume()
    assert resumed is not None
    assert np.array_equal(resumed[1].get(1), vector)
    following = journal.begin(Start(Session("train", 3, 21), bytes(32), b"", b"", 0))
    assert not list((tmp_path / "masked").iterdir())
    with pytest.raises(StorageError):
        following.get(1)


# --- an attempt made again from what it was told ----------------------------------------------------------


Told = list[tuple[str, int, tuple[Any, ...]]]


def play_noted(consort: Consort, attempt: SumRound, said: list[bytes], told: Told) -> MaskedSum:
    """Do an attempt and note all that the server says and is told, in order."""
    for step in STEPS[attempt.level]:
        bodies = (
            dict.fromkeys(consort.parties, attempt.offer()) if step == "ready" else bodies_of(attempt, step)
        )
        said += bodies.values()
        take = taker(attempt, step)

        def note(site: int, *sent: Any, step: str = step, take: Callable[..., None] = take) -> None:
            told.append((step, site, tuple(s.copy() if isinstance(s, np.ndarray) else s for s in sent)))
            take(site, *sent)

        ask(consort, step, bodies, note, honest, [])
    return attempt.finish()


@pytest.mark.parametrize("level", ["sum", "sketch", "gram"])
def test_an_attempt_that_is_told_the_same_says_the_same_bytes(level: str) -> None:
    """Guarantee of ``secagg.server``: everything the server says follows from what it was told and drew."""
    consort = gather(7, level)
    attempt = consort.attempt()
    said, told = list[bytes](), Told()
    outcome = play_noted(consort, attempt, said, told)
    assert np.array_equal(outcome.total, true_sum(consort, consort.parties))
    again, repeated = consort.attempt(), list[bytes]()
    for step in STEPS[level]:
        if step == "ready":
            repeated += dict.fromkeys(consort.parties, again.offer()).values()
        elif step == "hold":
            repeated += again.hold(attempt.challenge).values()
        else:
            repeated += bodies_of(again, step).values()
        for noted, site, sent in told:
            if noted == step:
                taker(again, step)(site, *sent)
    assert repeated == said
    assert np.array_equal(again.finish().total, outcome.total)
