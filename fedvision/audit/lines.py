"""The form of the audit log's lines: one spelling, checked in full before a field is used.

What a line holds and what the log promises: ``fedvision.audit.log``.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fedvision.errors import StorageError, VerificationError
from fedvision.secagg.identity import is_sound

FORMAT = 1
KINDS = frozenset({
    "allow", "charter", "decision", "deny", "enrolment", "excluded", "expelled", "finished", "key-change",
    "peer-head", "policy", "privacy-reserved", "privacy-taken-over", "refused", "released", "revocation",
    "roster", "round-closed", "round-opened", "started", "stopped", "submitted",
})  # fmt: skip
LABEL = b"fedvision/audit/v1"
LARGEST_LINE = 1 << 16
"""Bytes, without the line end."""
BLOCK = 4096
KEYS = frozenset({"count", "fields", "format", "kind", "party", "previous", "signature", "time"})
FIELD = re.compile(r"[a-z][a-z0-9_]{0,63}")
PARTY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
HEX_32 = re.compile(r"[0-9a-f]{64}")
HEX_64 = re.compile(r"[0-9a-f]{128}")
TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
NEW_KEY, OLD_KEY = "log_key", "log_key_before"
"""Fields of the line that hands the log over to another key; nobody but ``change_key`` writes them."""
ZEROS = bytes(32)

Value = str | int | float | bool | None | list[str]


@dataclass(frozen=True)
class Head:
    """How far a log is.

    Attributes:
        count: Number of lines, over all parts.
        digest: SHA-256 of the last one, 32 bytes; zeros if there is none.
    """

    count: int
    digest: bytes

    def __post_init__(self) -> None:
        if self.count < 0 or len(self.digest) != 32 or (self.count == 0) != (self.digest == ZEROS):
            raise ValueError(f"no head of a log: count {self.count}, {len(self.digest)} bytes")


EMPTY = Head(0, ZEROS)


@dataclass(frozen=True)
class Entry:
    """A line that has the right form; who wrote it is not checked yet.

    Attributes:
        file: Where it is.
        number: Of the line in this file, from 1.
        count: Of the line in the log, from 1.
        time: In UTC.
        party: Who claims to have written it.
        kind: One of ``KINDS``.
        fields: What happened.
        previous: SHA-256 of the line before, 32 bytes.
        digest: SHA-256 of this line, 32 bytes.
        covered: What the signature covers.
        signature: 64 bytes.
    """

    file: Path
    number: int
    count: int
    time: datetime
    party: str
    kind: str
    fields: Mapping[str, Value]
    previous: bytes
    digest: bytes
    covered: bytes
    signature: bytes

    @property
    def head(self) -> Head:
        """The head of the log that ends with this line."""
        return Head(self.count, self.digest)

    def wrong(self, rule: str, message: str, hint: str = "") -> VerificationError:
        """Return the error that names this line."""
        return VerificationError(self.file, rule, f"line {self.number}: {message}", hint)


def spelled(content: Mapping[str, Any]) -> bytes:
    """Return the one spelling of a line, without its end."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def covered(content: Mapping[str, Any]) -> bytes:
    """Return what the signature of a line is over; ``content`` has no signature."""
    return LABEL + hashlib.sha256(spelled(content)).digest()


def _is_value(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(one, str) for one in value)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return abs(value) < 1 << 63
    return value is None or isinstance(value, str)


def check_fields(kind: object, fields: Mapping[str, Any]) -> None:
    """Check what a caller wants to write, or what a line says.

    Raises:
        ValueError: With the rule, without the value.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError("kind must be one of KINDS")
    for name, value in fields.items():
        if not FIELD.fullmatch(name):
            raise ValueError("the name of a field must be small letters, digits and _")
        if not _is_value(value):
            raise ValueError(
                f"field {name} must be a text, a finite number, true, false, null or a list of texts, "
                f"got {type(value).__name__}"
            )
    if kind == "peer-head":
        count, digest = fields.get("count"), fields.get("digest")
        whole = type(count) is int and count >= 0 and isinstance(digest, str) and HEX_32.fullmatch(digest)
        if not whole or (count == 0) != (digest == ZEROS.hex()) or not is_party(fields.get("name")):
            raise ValueError("a peer-head must have name, count (>= 0) and digest (64 hex digits)")
    if NEW_KEY in fields or OLD_KEY in fields:
        keys = [fields.get(NEW_KEY), fields.get(OLD_KEY)]
        if kind != "key-change" or not all(
            isinstance(key, str) and HEX_32.fullmatch(key) and is_sound(bytes.fromhex(key)) for key in keys
        ):
            raise ValueError(f"{NEW_KEY} and {OLD_KEY} must be keys, in a key-change")


def is_party(name: object) -> bool:
    """Return whether ``name`` can be that of a party."""
    return isinstance(name, str) and PARTY.fullmatch(name) is not None


def parsed(line: bytes, file: Path, number: int) -> Entry:
    """Return a line, without its end, after every check that needs no other line and no key.

    Raises:
        VerificationError: It is not exactly what ``append`` writes.
    """

    def wrong(message: str, hint: str = "") -> VerificationError:
        return VerificationError(file, "audit-line", f"line {number}: {message}", hint)

    if len(line) > LARGEST_LINE:
        raise wrong("longer than a line may be")
    try:
        content = json.loads(line.decode("ascii"))
    except (ValueError, RecursionError):
        raise wrong("not JSON") from None
    if isinstance(content, dict) and content.get("format") not in (None, FORMAT):
        raise wrong(f"the format is not {FORMAT}", "written by another version of fedvision?")
    if not isinstance(content, dict) or content.keys() != KEYS:
        raise wrong("not the keys of a line")
    try:
        again = spelled(content)
    except (ValueError, RecursionError):
        again = b""
    if again != line:
        raise wrong("another spelling than that which was signed")
    count, fields, time = content["count"], content["fields"], content["time"]
    texts = [content["previous"], content["signature"], time]
    if type(content["format"]) is not int or type(count) is not int or not 1 <= count < 1 << 63:
        raise wrong("a number is out of range")
    if not all(
        isinstance(text, str) and pattern.fullmatch(text)
        for text, pattern in zip(texts, (HEX_32, HEX_64, TIME), strict=True)
    ):
        raise wrong("a hash, signature or time has the wrong form")
    if not is_party(content["party"]) or not isinstance(fields, dict):
        raise wrong("the party or the fields have the wrong form")
    try:
        when = datetime.fromisoformat(time)
        check_fields(content["kind"], fields)
    except ValueError as error:
        raise wrong(str(error)) from None
    previous = bytes.fromhex(content["previous"])
    if (count == 1) != (previous == ZEROS):
        raise wrong("zeros stand before the first line, and only there")
    signature = bytes.fromhex(content.pop("signature"))
    return Entry(
        file, number, count, when, content["party"], content["kind"], fields, previous,
        hashlib.sha256(line).digest(), covered(content), signature,
    )  # fmt: skip


def last_line(handle: int, file: Path) -> tuple[bytes | None, int]:
    """Read the end of an open log, and no more of it than needed.

    Returns:
        The last whole line without its end, None if there is none; and where the next one begins.

    Raises:
        StorageError: What ends there is too long for lines.
    """
    place = os.fstat(handle).st_size
    tail = b""
    while place and tail.count(b"\n") < 2:
        if len(tail) > 2 * (LARGEST_LINE + 1):
            raise StorageError(
                f"{file}: the end of the audit log is damaged", "look at it, and mend it by hand"
            )
        start = max(place - BLOCK, 0)
        tail = os.pread(handle, place - start, start) + tail
        place = start
    end = tail.rfind(b"\n")
    if end < 0:
        return None, 0
    return tail[tail.rfind(b"\n", 0, end) + 1 : end], place + end + 1


def _raw_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of each line, with its end; the last may lack it."""
    try:
        with file.open("rb") as stream:
            number = 0
            while line := stream.readline(LARGEST_LINE + 2):
                number += 1
                yield number, line
    except OSError as error:
        raise StorageError(f"cannot read {file}: {(error.strerror or str(error)).lower()}") from None


def read_log(files: Path | Sequence[Path]) -> Iterator[Entry]:
    """Yield the lines of one or several files; each has the right form, no key or chain is checked.

    An unfinished line at the end of the last file (power cut) is left out.

    Raises:
        StorageError: A file cannot be read.
        VerificationError: A line is not what ``append`` writes.
    """
    listed = [files] if isinstance(files, Path) else list(files)
    for file in listed:
        for number, line in _raw_lines(file):
            if line.endswith(b"\n"):
                yield parsed(line[:-1], file, number)
            elif file != listed[-1] or len(line) > LARGEST_LINE:
                raise VerificationError(file, "audit-line", f"line {number}: has no end")


def torn_bytes(file: Path) -> int:
    """Return the length of an unfinished last line, 0 if there is none.

    Raises:
        StorageError: The file cannot be read.
    """
    try:
        with file.open("rb") as stream:
            _, end = last_line(stream.fileno(), file)
            return os.fstat(stream.fileno()).st_size - end
    except OSError as error:
        raise StorageError(f"cannot read {file}: {(error.strerror or str(error)).lower()}") from None
