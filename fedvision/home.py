"""What the folders of the two programs have in common: a lock for commands, and settings read from TOML."""

import contextlib
import fcntl
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from fedvision.errors import ConfigError, StorageError
from fedvision.secagg.documents import Refused, validated

M = TypeVar("M", bound=BaseModel)


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keep other commands from changing a program's folder at the same time.

    Raises:
        StorageError: The folder is not writable.
    """
    try:
        handle = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StorageError(f"cannot write in {root}: {(error.strerror or '').lower()}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def read_settings(path: Path, model: type[M], program: str) -> M:
    """Read the settings of a program.

    Args:
        path: A TOML file.
        model: Its keys and rules.
        program: Whose ``init`` writes such files.

    Raises:
        ConfigError: There is none, or it is wrong; the text names the key.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {(error.strerror or str(error)).lower()}",
            f"--home names the folder that `{program} init` made",
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    try:
        return validated(model, content)
    except Refused as refused:
        hint = refused.hint or f"every key is explained in the file that `{program} init` writes"
        raise ConfigError(f"{path}: {refused.text}", hint) from None
