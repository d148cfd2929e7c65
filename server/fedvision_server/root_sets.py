"""Which root set a server uses: one file ``root-set.json`` in its folder, with a path and a digest.

The data set itself stays where it is. The digest goes into the charter of every job that is submitted from
then on; jobs that run keep the set that their charter names.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fedvision.config import Name, Section
from fedvision.errors import ConfigError
from fedvision.secagg import documents
from fedvision.secagg.documents import Refused
from fedvision.secagg.roster import Hex32
from fedvision.storage import write_json
from fedvision.training.root import RootSet, open_root_set
from fedvision_server.home import ServerHome

FILE_NAME = "root-set.json"


class RootRecord(Section):
    """What the server knows of its root set."""

    format: Literal[1] = Field(1, description="version of this file format")
    folder: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="absolute path of the data set"
    )
    digest: Hex32 = Field(description="over the manifest and every file")
    name: Name = Field(description="as its manifest says")
    num_cases: Annotated[int, Field(ge=1)]
    num_patients: Annotated[int, Field(ge=1)]
    classes: tuple[str, ...]
    added: Annotated[str, Field(max_length=40)] = Field(description="when, UTC")


def load_root_record(home: ServerHome) -> RootRecord | None:
    """Return what the server knows of its root set, None without one.

    Raises:
        ConfigError: The file is damaged.
    """
    path = home.root / FILE_NAME
    if not path.exists():
        return None
    try:
        return documents.validated(RootRecord, documents.parse_object(documents.content_of(path)))
    except Refused as refused:
        raise refused.of_file(path) from None


def served_root_set(home: ServerHome, digest: str = "") -> RootSet | None:
    """Return the server's root set, ready for use; None without one.

    Every file is hashed, so a set that changed since it was added is found here, before it is used.

    Args:
        home: The server's folder.
        digest: What a job's charter names; "" for whatever set is in force.

    Raises:
        ConfigError: The record is damaged, or the set in force is not the one that the charter names.
        DataError: A file of the set changed or is gone.
    """
    record = load_root_record(home)
    if record is None or (digest and record.digest != digest):
        if not digest:
            return None
        found = "there is none" if record is None else f"the one in force is {record.digest[:16]}"
        raise ConfigError(
            f"the charter names the root set {digest[:16]}, {found}",
            "`fedvision-server root-set add` puts it back in force",
        )
    return open_root_set(Path(record.folder), record.digest)


def add_root_set(home: ServerHome, folder: Path) -> tuple[RootRecord, bool]:
    """Check a data set, hash it, and put it in force as the root set.

    Returns:
        The record, and whether it is another set than the one before.

    Raises:
        DataError: It cannot serve, see ``fedvision.training.root.check_root_set``.
        StorageError: The server's folder is not writable.
    """
    before = load_root_record(home)
    root = open_root_set(folder)
    record = RootRecord(
        folder=str(root.folder),
        digest=root.digest,
        name=root.manifest.site,
        num_cases=len(root.cases),
        num_patients=len({case.patient for case in root.cases}),
        classes=root.manifest.classes,
        added=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_json(home.root / FILE_NAME, record.model_dump(mode="json"), 0o600)
    return record, before is None or before.digest != record.digest


def remove_root_set(home: ServerHome) -> RootRecord:
    """Take the root set out of force; the data set itself is left alone.

    Raises:
        ConfigError: There is none.
    """
    record = load_root_record(home)
    if record is None:
        raise ConfigError("this server has no root set", "`fedvision-server root-set add DATASET` adds one")
    (home.root / FILE_NAME).unlink()
    return record
