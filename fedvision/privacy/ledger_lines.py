"""The form of the privacy ledger's lines: one spelling, checked in full before a field is used.

What a line holds and what the ledger promises: ``fedvision.privacy.ledger``.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from fedvision.config import PositiveInt, Section
from fedvision.errors import StorageError, VerificationError
from fedvision.privacy.spending import Entry, Hex32
from fedvision.storage import append_durably, sync_folder

FORMAT: Literal[1] = 1
LABEL = b"fedvision/privacy-ledger/v1"
LARGEST_LINE = 4096
"""Bytes, without the line end."""
ZEROS = bytes(32)

Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
Time = Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")]
CheckSignature = Callable[[bytes, bytes, bytes], bool]
"""``fedvision.secagg.identity.verify``: of public key, signature, message."""


class TakenOver(Section):
    """That the site's people went on with a ledger of another key, or with one whose marks were lost."""

    key_before: Hex32 = Field(description="the key of the line before")
    marked: Annotated[int, Field(ge=0)] | None = Field(description="number in the marks; null if lost")


class Line(Section):
    """A line of the ledger."""

    format: Literal[1]
    number: PositiveInt
    time: Time
    key: Hex32
    previous: Hex32
    content: Entry | TakenOver
    signature: Hex64


class Read(NamedTuple):
    """A line with its SHA-256, and where it ends in the file."""

    line: Line
    digest: bytes
    end: int


def spelled(content: Section, without: str = "") -> bytes:
    """Return the one spelling of a line or a mark, without its end."""
    fields: dict[str, Any] = content.model_dump(exclude={without})
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def covered(line: Line) -> bytes:
    """Return what the signature of a line is over."""
    return LABEL + hashlib.sha256(spelled(line, without="signature")).digest()


def wrong(path: Path, number: int, rule: str, message: str, hint: str = "") -> VerificationError:
    """Return the error that names a line."""
    return VerificationError(path, rule, f"line {number}: {message}", hint)


@contextlib.contextmanager
def explained(path: Path, verb: str) -> Iterator[None]:
    """Turn what the system refuses into a ``StorageError``."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot {verb} {path}: {(error.strerror or str(error)).lower()}",
            "no round is trained before it is written down: free some space, or make the folder writable",
        ) from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from writing a ledger."""
    with explained(path, "lock"):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with explained(path, "lock"):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def read_ledger(path: Path) -> Iterator[Read]:
    """Yield the lines, one after the other, each with the right form and chained to the one before.

    No signature is checked. An unfinished last line is left out.

    Raises:
        StorageError: The file cannot be read.
        VerificationError: It names the first line that is wrong.
    """
    before: Read | None = None
    with explained(path, "read"), path.open("rb") as file:
        number, end = 0, 0
        while (raw := file.readline(LARGEST_LINE + 1)).endswith(b"\n"):
            number, end = number + 1, end + len(raw)
            line = _parsed(path, number, raw[:-1])
            _check_chained(path, number, line, before)
            before = Read(line, hashlib.sha256(raw[:-1]).digest(), end)
            yield before
        if len(raw) > LARGEST_LINE:
            raise wrong(path, number + 1, "ledger-line", "longer than a line may be")


def verify(path: Path, public_key: bytes, check_signature: CheckSignature) -> int:
    """Check every line of a ledger: form, chain, key and signature.

    Guarantee: if it returns n, the owner of ``public_key`` wrote or took over n lines in this order. Without
    that key nobody can change, add, remove or move a line of them, but for cutting off the end: that shows by
    the marks only, see ``Ledger``.

    Args:
        path: The ledger.
        public_key: The site's present one, 32 bytes.
        check_signature: ``fedvision.secagg.identity.verify``.

    Returns:
        The number of lines.

    Raises:
        StorageError: The file cannot be read.
        VerificationError: It names file, line and what is wrong.
    """
    last: Line | None = None
    for last, _, _ in read_ledger(path):
        key, signature = bytes.fromhex(last.key), bytes.fromhex(last.signature)
        if not check_signature(key, signature, covered(last)):
            raise wrong(path, last.number, "ledger-signature", "the signature does not fit")
    if last is None:
        return 0
    if last.key != public_key.hex():
        raise wrong(path, last.number, "ledger-signature", "signed by another key than the given one")
    return last.number


def checked_entries(path: Path, check_signature: CheckSignature) -> list[Entry]:
    """Return the entries of a ledger, after every line was checked; whose keys they are is not.

    Raises:
        StorageError: The file cannot be read.
        VerificationError: It names file, line and what is wrong.
    """
    lines = [read.line for read in read_ledger(path)]
    if lines:
        verify(path, bytes.fromhex(lines[-1].key), check_signature)
    return [line.content for line in lines if isinstance(line.content, Entry)]


def _parsed(path: Path, number: int, raw: bytes) -> Line:
    try:
        line = Line.model_validate_json(raw, strict=True)
        datetime.fromisoformat(line.time)
    except ValidationError as error:
        place = ".".join(str(one) for one in error.errors()[0]["loc"]) or "the JSON"
        raise wrong(path, number, "ledger-line", f"{place} has not the form of a line") from None
    except ValueError:
        raise wrong(path, number, "ledger-line", "time is not a date") from None
    if spelled(line) != raw:
        raise wrong(path, number, "ledger-line", "another spelling than that which was signed")
    return line


def _check_chained(path: Path, number: int, line: Line, before: Read | None) -> None:
    if line.number != number:
        raise wrong(
            path,
            number,
            "ledger-chain",
            f"its number is {line.number}: a line was removed, repeated or moved",
        )
    if line.previous != (before.digest if before else ZEROS).hex():
        raise wrong(
            path, number, "ledger-chain",
            "the line before is not the one that it follows: one of the two was changed or replaced",
        )  # fmt: skip
    signed_before = line.content.key_before if isinstance(line.content, TakenOver) else line.key
    if before and before.line.key != signed_before:
        raise wrong(path, number, "ledger-signature", "of another key than the line before")


def write_line(path: Path, line: Line, end: int) -> Read:
    """Write a line at ``end``, where the last whole one ends, and flush it; what follows there is dropped.

    Raises:
        StorageError: The disk is full or the folder is not writable. The file ends with the line before.
    """
    raw = spelled(line)
    content = raw + b"\n"
    with explained(path, "write"):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            append_durably(handle, content, end)
        finally:
            os.close(handle)
        if end == 0:
            sync_folder(path.parent)
    return Read(line, hashlib.sha256(raw).digest(), end + len(content))
