"""SQLite files that several programs use at once, and that survive being killed at any moment.

Rules:
- A new file appears whole: with its tables, its format version and mode 0600.
- Every change is one transaction, on disk when it is committed (write-ahead log, ``synchronous = FULL``).
- A file of a newer format is refused; an older one is migrated by whoever first writes, step by step, in one
  transaction.
- To read takes read access only.
"""

import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedvision.errors import StorageError
from fedvision.storage import sync_folder

PATIENCE_S = 30.0
Migration = Callable[[sqlite3.Connection], None]


@dataclass(frozen=True)
class Schema:
    """What a file holds.

    Attributes:
        what: For error texts, such as "queue of jobs".
        application_id: Marks the file, 1 to 2**31 - 1.
        version: The present format, from 1.
        statements: Make the tables of the present format.
        migrations: By format: what makes the next one of it.
    """

    what: str
    application_id: int
    version: int
    statements: tuple[str, ...]
    migrations: Mapping[int, Migration] = field(default_factory=dict)


@contextlib.contextmanager
def writing(path: Path, schema: Schema) -> Iterator[sqlite3.Connection]:
    """Give a connection in a transaction, which is committed at the end or leaves no trace.

    Raises:
        StorageError: The disk is full, the file is damaged, of a newer format or of another program, or
            somebody else holds it.
    """
    with _explained(path), contextlib.closing(_open(path, schema)) as db:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
            db.execute("COMMIT")
        except BaseException:
            _roll_back(db)
            raise


@contextlib.contextmanager
def reading(path: Path, schema: Schema) -> Iterator[sqlite3.Connection]:
    """Give a connection that sees one state of an existing file and cannot change it.

    Raises:
        StorageError: As ``writing``; or the file is of an older format.
    """
    with _explained(path), contextlib.closing(_open_to_read(path, schema)) as db:
        db.execute("BEGIN")
        yield db


def back_up(path: Path, target: Path) -> None:
    """Write a copy as it is at this moment, while others go on writing. Copying the file itself may miss
    changes that still lie in the write-ahead log.

    Args:
        path: An existing file.
        target: A file that is not there yet; mode 0600.

    Raises:
        StorageError: The disk is full, or ``target`` exists.
    """
    with _explained(target):
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with (
            contextlib.closing(_connect(path, "ro")) as db,
            contextlib.closing(_connect(target, "rw")) as copy,
        ):
            db.backup(copy)


def _open(path: Path, schema: Schema) -> sqlite3.Connection:
    if not path.exists():
        _create(path, schema)
    db = _connect(path, "rw")
    try:
        db.execute("PRAGMA synchronous = FULL")
        if _version(db, path, schema) < schema.version:
            _migrate(db, path, schema)
    except BaseException:
        db.close()
        raise
    return db


def _create(path: Path, schema: Schema) -> None:
    """Make the file under another name and link it into place; of several who do, one wins."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    os.close(handle)
    try:
        with contextlib.closing(_connect(Path(name), "rw")) as db:
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("BEGIN IMMEDIATE")
            for statement in schema.statements:
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {schema.application_id}")
            db.execute(f"PRAGMA user_version = {schema.version}")
            db.execute("COMMIT")
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        for left in path.parent.glob(f"{Path(name).name}*"):
            left.unlink(missing_ok=True)
    sync_folder(path.parent)


def _open_to_read(path: Path, schema: Schema) -> sqlite3.Connection:
    db = _connect(path, "ro")
    try:
        try:
            version = _version(db, path, schema)
        except sqlite3.OperationalError:
            if path.with_name(f"{path.name}-wal").exists():
                raise
            # Nobody has it open, and this user may not make the files by which it is shared.
            db.close()
            db = _connect(path, "ro&immutable=1")
            version = _version(db, path, schema)
        if version < schema.version:
            raise StorageError(
                f"{path} is of an older version, format {version}, expected {schema.version}",
                "`fedvision-server run` brings it up to date when it starts",
            )
    except BaseException:
        db.close()
        raise
    return db


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    db = sqlite3.connect(uri, timeout=PATIENCE_S, isolation_level=None, uri=True)
    db.text_factory = lambda content: content.decode("utf-8", "replace")  # whoever wrote it: it can be read
    return db


def _version(db: sqlite3.Connection, path: Path, schema: Schema) -> int:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (application,) = db.execute("PRAGMA application_id").fetchone()
    if application != schema.application_id or version < 1:
        raise StorageError(f"{path} is not a {schema.what}", "it is empty, or another program's database")
    if version > schema.version:
        raise StorageError(
            f"{path} was written by a newer version, format {version}, this one knows {schema.version}",
            "update fedvision on this machine",
        )
    return int(version)


def _migrate(db: sqlite3.Connection, path: Path, schema: Schema) -> None:
    """Bring an older file up to date; whoever comes second finds it done."""
    db.execute("BEGIN IMMEDIATE")
    try:
        for step in range(_version(db, path, schema), schema.version):
            schema.migrations[step](db)
        db.execute(f"PRAGMA user_version = {schema.version}")
        db.execute("COMMIT")
    except BaseException:
        _roll_back(db)
        raise


def _roll_back(db: sqlite3.Connection) -> None:
    if db.in_transaction:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what SQLite says into an error for the user."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise StorageError(f"cannot write {path}: {reason}", "free some space or check whose it is") from None
    except sqlite3.Error as error:
        text, hint = _reason(error.sqlite_errorcode & 0xFF if hasattr(error, "sqlite_errorcode") else 0)
        raise StorageError(f"{text} {path}: {error}", hint) from None


def _reason(code: int) -> tuple[str, str]:
    """Return what could not be done and what to do, by SQLite's primary result code."""
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return "cannot write", "nothing was changed; free some space on its disk"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return "cannot get hold of", "another program has kept it for too long; try again"
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return "cannot read", "it is damaged; put back the last back-up of it"
    return "cannot use", "the file and its folder must be this user's"
