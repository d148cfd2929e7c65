"""The decision file of a job: read with every doubt, written whole or not at all, by one process at a time.

A file is JSON that people can read, 0600, with a checksum. One that is damaged or was edited, or that other
users can read or change, does not count, and nothing here overwrites it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, Field

from fedvision.config import Job, Section
from fedvision.errors import ConfigError, StorageError
from fedvision.secagg.roster import Charter, Hex32, Roster
from fedvision.storage import write_text
from fedvision_sites.policy import DataSet, Finding

Status = Literal["allowed", "waiting", "denied", "refused"]
LARGEST_FILE = 1 << 23
SHORTEST_PREFIX = 6
DAMAGED = "its decision file is damaged or was edited"
OPEN_TO_OTHERS = "its decision file can be read or changed by others"


class Word(Section):
    """What a person said about a job, or the policy by ``automatic``."""

    kind: Literal["allow", "deny"]
    charter: Hex32 | None = Field(description="digest of the charter that it was said about")
    data_set: str = Field(description="name of the data set that it was said about")
    by: str = Field(description="who, in their own words")
    user: str = Field(description="user of the operating system")
    is_automatic: bool
    reason: str
    when: AwareDatetime


class Record(Section):
    """What a decision file says."""

    format: Literal[1] = 1
    job_digest: Hex32
    status: Status = Field(description="when the job was last asked for or decided about")
    findings: tuple[Finding, ...] = Field(description="of the policy, at that time")
    word: Word | None
    first_asked: AwareDatetime
    last_asked: AwareDatetime
    data_set: DataSet
    governance: Hex32 | None = Field(description="the key that signed charter and roster")
    charter_digest: Hex32 | None
    roster_digest: Hex32 | None
    job: Job
    charter: Charter | None
    roster: Roster | None


def path_of(folder: Path, digest: str) -> Path:
    """Return the decision file of a job."""
    return folder / f"{digest}.json"


def digests_in(folder: Path) -> list[str]:
    """Return the digests of all jobs with a decision file, sorted."""
    if not folder.is_dir():
        return []
    return sorted(path.stem for path in folder.iterdir() if re.fullmatch(r"[0-9a-f]{64}\.json", path.name))


def find(folder: Path, digest_prefix: str) -> str:
    """Return the digest of the job that begins with ``digest_prefix``.

    Raises:
        ConfigError: The prefix is too short, no job begins so, or several do.
    """
    prefix, hint = digest_prefix.strip().lower(), "`fedvision-site jobs` lists them"
    if not re.fullmatch(f"[0-9a-f]{{{SHORTEST_PREFIX},64}}", prefix):
        raise ConfigError(
            f"a job is named by {SHORTEST_PREFIX} or more hexadecimal digits of its digest", hint
        )
    found = [digest for digest in digests_in(folder) if digest.startswith(prefix)]
    if not found:
        raise ConfigError(f"no job {prefix} was asked for", hint)
    if len(found) > 1:
        names = ", ".join(digest[:16] for digest in found[:4])
        raise ConfigError(f"{len(found)} jobs begin with {prefix}: {names}", "give more digits")
    return found[0]


def read_record(folder: Path, digest: str) -> Record | str | None:
    """Return the record of a job, None if there is no file, or in words why the file does not count."""
    try:
        handle = os.open(path_of(folder, digest), os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_mode & 0o077 or status.st_uid != os.geteuid():
                return OPEN_TO_OTHERS
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        return None
    except OSError:
        return DAMAGED
    try:
        parsed = json.loads(content) if len(content) <= LARGEST_FILE else None
        if not isinstance(parsed, dict) or parsed.pop("checksum", None) != _checksum(parsed):
            return DAMAGED
        record = Record.model_validate(parsed)
    except (ValueError, RecursionError):
        return DAMAGED
    return record if record.job_digest == digest else DAMAGED


def whole_record(folder: Path, digest: str) -> Record:
    """Return the record of a job.

    Raises:
        ConfigError: Its file is gone, or does not count.
    """
    record = read_record(folder, digest)
    if isinstance(record, Record):
        return record
    raise ConfigError(
        f"job {digest[:16]} is denied: {record or 'its decision file is gone'}",
        f"remove {path_of(folder, digest)}; the job waits anew when the server asks again",
    )


def write_record(folder: Path, record: Record) -> None:
    """Write the record of a job; called within ``locked``.

    Raises:
        StorageError: The folder cannot be written to; an earlier record is as it was.
    """
    content = record.model_dump(mode="json")
    text = json.dumps(content | {"checksum": _checksum(content)}, indent=2)
    write_text(path_of(folder, record.job_digest), text + "\n", 0o600)


def _checksum(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(b"fedvision/decision/v1" + text.encode()).hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time decide.

    Raises:
        StorageError: The folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StorageError(f"cannot write in {folder}: {(error.strerror or str(error)).lower()}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
