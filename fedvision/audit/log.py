"""The audit log of a party: one signed JSON line for each thing that matters, chained by hashes.

A line, in the one spelling that counts (sorted keys, no spaces, ASCII):

    count      1 for the first line, then without a gap
    fields     what happened; texts, numbers, true, false, null, lists of texts
    format     1
    kind       one of ``KINDS``
    party      "server" or a site's name
    previous   SHA-256 of the line before, zeros for the first
    signature  Ed25519 of "fedvision/audit/v1" | SHA-256 of the line without it
    time       UTC, to the second

Rules:
- A head is the number of lines and the SHA-256 of the last one. It stands for the whole history before it.
- The parties exchange heads and write the other's into their own log (``peer-head``). So neither can rewrite
  what happened before such a line alone: the other remembers it (``peer_heads``, ``verify_log``'s ``known``).
- Nobody sees from a log alone that its end was cut off, or that it was deleted: what is left is a good log.
  Only a head that somebody else remembers shows it.
- A line is on disk before ``append`` returns, and before its head is given to anybody.
- Fields hold names of parties, digests, counts and rules: no file name, no patient, no value of an update.
- A new key continues the log: the old key signs a line that names it (``AuditLog.change_key``).
- ``rotate`` renames ``audit.jsonl`` to ``audit-0001.jsonl`` and so on; the chain goes on in the next file.
  The newest part must stay in the folder: the first line of the next file is chained to it.
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedvision.audit.chain import Checked, check_log, peer_heads, verify_log
from fedvision.audit.lines import (
    EMPTY,
    FORMAT,
    KINDS,
    LARGEST_LINE,
    NEW_KEY,
    OLD_KEY,
    Entry,
    Head,
    Value,
    check_fields,
    covered,
    is_party,
    last_line,
    parsed,
    read_log,
    spelled,
)
from fedvision.errors import StorageError, VerificationError
from fedvision.secagg.identity import Identity, verify
from fedvision.storage import append_durably, sync_folder

__all__ = [
    "EMPTY", "KINDS", "AuditLog", "Checked", "Entry", "Head", "check_log", "parts", "peer_heads", "read_log",
    "rotate", "verify_log",
]  # fmt: skip


class AuditLog:
    """Writes a party's audit log.

    Any number of processes and threads may write the same log at once. Each line is chained to the line that
    is last on disk at that moment, and ``append`` reads no more than that one.

    Args:
        path: The file, usually ``audit.jsonl``; it and its folder are made with the first line.
        identity: The party's key; also the only key whose log is continued.
        party: "server" or a site's name.
    """

    def __init__(self, path: Path, identity: Identity, party: str) -> None:
        if not is_party(party):
            raise ValueError("party must be a name, as in a roster")
        self.path, self.party = path, party
        self._identity = identity

    def append(self, kind: str, **fields: Value) -> None:
        """Write one line.

        Guarantee: when this returns, the line is on disk, signed, and chained to the one before. When it
        raises, or the process is killed, the log is as it was, or (killed only) has the whole line. An
        unfinished line that a power cut left is dropped first.

        Args:
            kind: One of ``KINDS``.
            **fields: What happened: names of parties, digests, counts, rules. Never the name of a file, a
                patient, or a value of an update.

        Raises:
            ValueError: An unknown kind, a field of another type, or more than ``LARGEST_LINE`` bytes.
            StorageError: The disk is full, the folder is not writable, or the last line is not of this key.
        """
        if NEW_KEY in fields or OLD_KEY in fields:
            raise ValueError(f"{NEW_KEY} and {OLD_KEY} are written by change_key")
        self._append(kind, fields)

    def remember(self, peer: str, head: Head, **fields: Value) -> None:
        """Write down the head of another party's log, as it sent it, see ``append``.

        Args:
            peer: "server" or a site's name.
            head: What it sent; the caller has checked that it is from this peer.
            **fields: What else is to stand there, such as ``job`` and ``round``.
        """
        self.append("peer-head", **{**fields, "name": peer, "count": head.count, "digest": head.digest.hex()})

    def change_key(self, new: Identity) -> None:
        """Hand the log over to another key of this party; this object writes with it from now on.

        The new key must be on disk before: after this line, the old key cannot continue the log. Where the
        old key is lost, the log ends; move its files away and begin another.
        """
        fields: dict[str, Value] = {NEW_KEY: new.public.hex(), OLD_KEY: self._identity.public.hex()}
        self._append("key-change", fields)
        self._identity = new

    def head(self) -> Head:
        """Return the head, ``EMPTY`` if there is no line.

        Guarantee: the lines that it stands for are on disk, so the head may be given to another party.

        Raises:
            StorageError: The log cannot be read, or the last line is not of this key.
        """
        with _locked(self.path, fcntl.LOCK_SH):
            if not self.path.exists():
                return self._newest_part()
            handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(handle)  # The writer may have been killed between its write and its fsync.
                line, _ = last_line(handle, self.path)
            finally:
                os.close(handle)
            return self._head(line, self.path) if line is not None else self._newest_part()

    def _append(self, kind: str, fields: Mapping[str, Value]) -> None:
        check_fields(kind, fields)
        with _locked(self.path, fcntl.LOCK_EX):
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
            try:
                last, end = last_line(handle, self.path)
                head = self._head(last, self.path) if last is not None else self._newest_part()
                line = self._line(head, kind, fields)
                append_durably(handle, line + b"\n", end)
            finally:
                os.close(handle)
            if last is None:
                sync_folder(self.path.parent)

    def _line(self, head: Head, kind: str, fields: Mapping[str, Value]) -> bytes:
        content: dict[str, Any] = {
            "format": FORMAT,
            "party": self.party,
            "count": head.count + 1,
            "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "kind": kind,
            "fields": dict(fields),
            "previous": head.digest.hex(),
        }
        content["signature"] = self._identity.sign(covered(content)).hex()
        line = spelled(content)
        if len(line) > LARGEST_LINE:
            raise ValueError(f"a line must have at most {LARGEST_LINE} bytes, got {len(line)}")
        return line

    def _newest_part(self) -> Head:
        """Return the head of the newest part that ``rotate`` made."""
        parts = _numbered(self.path)
        if not parts:
            return EMPTY
        with parts[-1].open("rb") as file:
            line, _ = last_line(file.fileno(), parts[-1])
        return EMPTY if line is None else self._head(line, parts[-1])

    def _head(self, line: bytes, file: Path) -> Head:
        """Return the head of the log that ends with ``line``, if this key may continue it."""
        hint = "look at it with `audit-log verify`; move it away only when you know what happened"
        try:
            entry = parsed(line, file, 0)
        except VerificationError:
            raise StorageError(f"{file}: the last line of the audit log is damaged", hint) from None
        own = self._identity.public
        if entry.fields.get(NEW_KEY, own.hex()) != own.hex():
            raise StorageError(f"{file}: the audit log was handed over to another key", hint)
        signer = bytes.fromhex(str(entry.fields[OLD_KEY])) if OLD_KEY in entry.fields else own
        if entry.party != self.party or not verify(signer, entry.signature, entry.covered):
            raise StorageError(f"{file}: the last line of the audit log is not of this party's key", hint)
        return entry.head


@contextlib.contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    """Hold the lock of a log, and turn what the system refuses into a ``StorageError``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, how)
            yield
        finally:
            os.close(lock)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {(error.strerror or str(error)).lower()}",
            "nothing goes on without its audit log: free some space, or make the folder writable",
        ) from error


def _numbered(path: Path) -> list[Path]:
    """Return the parts that ``rotate`` made, oldest first."""
    name = re.compile(re.escape(path.stem) + r"-([0-9]{4,})" + re.escape(path.suffix))
    found = ((name.fullmatch(one.name), one) for one in path.parent.glob(f"{path.stem}-*{path.suffix}"))
    return [one for _, one in sorted((int(match[1]), one) for match, one in found if match)]


def parts(path: Path) -> list[Path]:
    """Return the files of a log that are there, oldest first: ``audit-0001.jsonl`` ... ``audit.jsonl``."""
    return [*_numbered(path), *([path] if path.exists() else [])]


def rotate(path: Path) -> Path | None:
    """Give the file a number, so that the next line begins a new one; the chain goes on.

    Returns:
        The file's new name, such as ``audit-0001.jsonl``; None if there is no line in it.

    Raises:
        StorageError: The folder is not writable.
    """
    with _locked(path, fcntl.LOCK_EX):
        if not path.exists():
            return None
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            line, end = last_line(handle, path)
            os.ftruncate(handle, end)
            os.fsync(handle)
        finally:
            os.close(handle)
        if line is None:
            return None
        before = _numbered(path)
        number = int(before[-1].stem.rpartition("-")[2]) + 1 if before else 1
        new = path.with_name(f"{path.stem}-{number:04}{path.suffix}")
        path.rename(new)
        sync_folder(path.parent)
        return new
