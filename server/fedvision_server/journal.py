"""The journal of an attempt at a masked sum: what the server was told and drew, on disk before it acts on it.

    secagg/journal                      the attempt under way: one record after the other
    secagg/masked/train-0003-1-site-4   a masked input that came, until the attempt is over

``SumRound`` is a function of what it is given, in order. So a server that was killed goes through the same
steps again, and the journal answers for the sites and for the random generator up to where it ends; what the
server then says is byte for byte what it said before, and only sites that have not answered are asked.

Rules:
- A record is on disk when the method that writes it returns; a masked input is before its record is.
- A step ends with a record of its own, written before anything is made of it: who did not answer by then
  did not answer, whenever the server is killed afterwards.
- A record that was cut off is dropped: nothing was made of it. Damage before the last record is an error.
- The journal of an attempt is replaced by that of the next, and removed when the sum, or that there is none,
  is on disk.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np

from fedvision.errors import MessageError, StorageError
from fedvision.secagg.codec import U8, AtMost, Bytes32, decode, encode, kind_of, message
from fedvision.secagg.masking import MaskVector
from fedvision.secagg.messages import MAX_SITES, Session
from fedvision.storage import write_atomic
from fedvision.wire.messages import Step

PRIVATE = 0o600
MAX_CODE = 200


@message(220)
@dataclass(frozen=True)
class Start:
    """An attempt begins.

    Attributes:
        sites: Numbers of the sites that are asked.
        absent: Numbers of those that did not do their part in earlier attempts at this sum.
        unexplained: How many of these attempts failed with no lie proven.
    """

    session: Session
    model: Bytes32
    sites: Annotated[bytes, AtMost(MAX_SITES)]
    absent: Annotated[bytes, AtMost(MAX_SITES)]
    unexplained: U8


@message(221)
@dataclass(frozen=True)
class Outcome:
    """What came of asking a site for a step.

    Attributes:
        code: Why there is no answer; empty where there is one.
        body: The answer as it came, before any check.
        has_vector: 1 where a masked input came with it, which lies in a file of its own.
    """

    step: Step
    site: U8
    code: Annotated[bytes, AtMost(MAX_CODE)]
    body: Annotated[bytes, AtMost(1 << 28)] = field(repr=False)
    has_vector: U8


@message(222)
@dataclass(frozen=True)
class Closed:
    """A step is over."""

    step: Step


@message(223)
@dataclass(frozen=True)
class Choice:
    """Random bytes that the server drew."""

    value: Bytes32


Record = Start | Outcome | Closed | Choice
T = TypeVar("T", Start, Outcome, Closed, Choice)
FRAME = 4 + 4 + 32
"""Bytes in front of a record: its length, a check of the length, its SHA-256."""


class VectorStore:
    """Keeps the masked inputs of one attempt in a folder; see ``secagg.attempt.Store``."""

    def __init__(self, folder: Path, session: Session) -> None:
        self._folder = folder
        self._prefix = _prefix(session)

    def _path(self, site: int) -> Path:
        return self._folder / f"{self._prefix}{site}"

    def put(self, site: int, vector: MaskVector) -> None:
        """Keep a vector; the first one of a site stays."""
        if not self._path(site).exists():
            content = np.ascontiguousarray(vector, "<u4").data.cast("B")
            write_atomic(self._path(site), content, PRIVATE)

    def get(self, site: int) -> MaskVector:
        """Return it, mapped from disk.

        Raises:
            StorageError: It is gone.
        """
        try:
            return np.memmap(self._path(site), "<u4", mode="r")
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot read {self._path(site)}: {error}") from None


class Journal:
    """Writes the journal of an attempt, and reads it back after a kill.

    Args:
        folder: The ``secagg`` folder of a run.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "journal"
        self._masked = folder / "masked"
        self._left: list[tuple[int, int]] = []
        """Where the records lie that are still to be gone through: offset and length."""

    def begin(self, start: Start) -> VectorStore:
        """Start the journal of an attempt in the place of the last one's.

        Raises:
            StorageError: The disk is full.
        """
        write_atomic(self._path, _framed(encode(start)), PRIVATE)
        self._left = []
        store = VectorStore(self._masked, start.session)
        self._clear(start.session)
        return store

    def resume(self) -> tuple[Start, VectorStore] | None:
        """Return the attempt that was under way when the server was stopped, None if there was none.

        Raises:
            StorageError: The journal is damaged before its last record.
        """
        if not self._path.exists():
            return None
        self._left = list(self._scan())
        start = self._next(Start)
        if start is None:
            raise self._damaged("it does not begin with an attempt")
        self._clear(start.session)
        return start, VectorStore(self._masked, start.session)

    def remove(self) -> None:
        """Remove the journal of an attempt that is over, and its masked inputs."""
        self._path.unlink(missing_ok=True)
        self._left = []
        self._clear(None)

    def outcomes(self, step: Step) -> Iterator[tuple[Outcome, bool]]:
        """Yield what came of a step before the server was stopped, and whether anything came after it."""
        while (found := self._next(Outcome)) is not None:
            if found.step != step:
                raise self._damaged(f"step {found.step} where {step} was expected")
            yield found, bool(self._left)

    def is_closed(self, step: Step) -> bool:
        """Whether the step was over when the server was stopped; called after ``outcomes``.

        Raises:
            StorageError: The journal does not go on as the attempt does.
        """
        found = self._next(Closed)
        if (found is None and self._left) or (found is not None and found.step != step):
            raise self._damaged(f"no end of step {step}")
        return found is not None

    def add(self, outcome: Outcome) -> None:
        """Write what came of asking a site."""
        self._append(outcome)

    def close(self, step: Step) -> None:
        """Write that a step is over."""
        self._append(Closed(step))

    def choice(self, draw: Callable[[], bytes]) -> bytes:
        """Return the random bytes that were drawn here before, or draw and keep them.

        Raises:
            StorageError: The journal does not go on as the attempt does.
        """
        found = self._next(Choice)
        if found is None:
            if self._left:
                raise self._damaged("no random choice where one was made")
            found = Choice(draw())
            self._append(found)
        return found.value

    def _append(self, record: Record) -> None:
        try:
            with self._path.open("ab") as file:
                file.write(_framed(encode(record)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(
                f"cannot write {self._path}: {(error.strerror or str(error)).lower()}",
                "free some space; the job goes on where it stopped",
            ) from error

    def _next(self, kind: type[T]) -> T | None:
        """Return the next record and go on, if there is one and it is of this kind."""
        if not self._left:
            return None
        offset, length = self._left[0]
        with self._path.open("rb") as file:
            file.seek(offset)
            content = file.read(length)
        if kind_of(content) is not kind:
            return None
        self._left.pop(0)
        try:
            return decode(content, kind)
        except MessageError as error:
            raise self._damaged(str(error)) from None

    def _scan(self) -> Iterator[tuple[int, int]]:
        """Yield offset and length of each record, and cut off a torn last one."""
        with self._path.open("r+b") as file:
            size, at = file.seek(0, os.SEEK_END), 0
            while at < size:
                file.seek(at)
                frame = file.read(FRAME)
                length = int.from_bytes(frame[:4], "big")
                is_whole = len(frame) == FRAME and frame[4:8] == _check(frame[:4])
                content = file.read(length) if is_whole else b""
                if not is_whole or len(content) != length or _frame(content) != frame:
                    is_last = len(frame) < FRAME or (is_whole and at + FRAME + length >= size)
                    if not is_last and any(frame + file.read()):
                        raise self._damaged(f"the record at byte {at}")
                    file.truncate(at)
                    os.fsync(file.fileno())
                    return
                yield at + FRAME, length
                at += FRAME + length

    def _clear(self, but: Session | None) -> None:
        """Remove masked inputs, but for those of one session."""
        prefix = _prefix(but) if but else None
        for path in self._masked.glob("*"):
            if prefix is None or not path.name.startswith(prefix):
                path.unlink()

    def _damaged(self, what: str) -> StorageError:
        return StorageError(
            f"{self._path} is damaged: {what}", "remove it to go on with another attempt at the sum"
        )


def _prefix(session: Session) -> str:
    return f"{session.purpose}-{session.round:04d}-{session.attempt}-site-"


def _check(length: bytes) -> bytes:
    return hashlib.sha256(length).digest()[:4]


def _frame(content: bytes) -> bytes:
    length = len(content).to_bytes(4, "big")
    return length + _check(length) + hashlib.sha256(content).digest()


def _framed(content: bytes) -> bytes:
    return _frame(content) + content
