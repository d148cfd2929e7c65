"""Files of a run: written whole or not at all.

Rules:
- A file is written to a temporary name in the same folder, flushed to disk, then renamed; so a killed
  process or a full disk never leaves half a file under the real name.
- A line file is appended one whole line at a time; a torn last line (power cut) is dropped on reading
  and overwritten by the next append.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_bytes

from fedvision.errors import StorageError


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"cannot write {path}: {reason.lower()}",
            "free some space or choose another folder; a run goes on with `fedvision simulate --resume`",
        ) from error


def write_atomic(path: Path, content: bytes | memoryview, mode: int = 0o644) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the new one, nothing between.

    Args:
        path: The file; its folder is made if absent.
        content: All of it.
        mode: Permission bits of the new file.

    Raises:
        StorageError: The disk is full or the folder is not writable. The old file is untouched.
    """
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put on disk which files a folder has."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_durably(handle: int, content: bytes, end: int) -> None:
    """Write at the end of an open file, cut what was unfinished there, and put it on disk.

    Args:
        handle: Open for reading and writing.
        content: What is appended.
        end: Where the last whole line ends.

    Raises:
        OSError: The disk is full; the file ends at ``end``.
    """
    try:
        os.ftruncate(handle, end)
        done = 0
        while done < len(content):
            done += os.pwrite(handle, content[done:], end + done)
        os.fsync(handle)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(handle, end)
        raise


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write UTF-8 text atomically, see ``write_atomic``."""
    write_atomic(path, text.encode(), mode)


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """Write indented JSON atomically, see ``write_atomic``."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", mode)


def read_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        StorageError: The file is absent or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {path}: {error}") from None


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line and flush it to disk.

    Raises:
        StorageError: The disk is full or the folder is not writable. The file ends with a whole line.
    """
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(end - 1, 0))
            if end and file.read(1) != b"\n":
                file.seek(0)
                end = file.read().rfind(b"\n") + 1
                file.truncate(end)
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), end)
                raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a line file; a torn last line is left out, an absent file has none.

    Raises:
        StorageError: A line that is not the last is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise StorageError(f"{path}: line {number} is damaged, expected JSON") from None
    return records


def save_tensors(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write named arrays and text metadata as one safetensors file, atomically; same content, same bytes.

    Raises:
        StorageError: The disk is full or the folder is not writable.
    """
    whole = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    # One key only: the library writes several in an order that changes from process to process.
    packed = {"fedvision": json.dumps(dict(sorted(metadata.items())))}
    write_atomic(path, safetensors_bytes(whole, packed))


def load_tensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Read a safetensors file.

    Returns:
        The arrays by name, and the text metadata.

    Raises:
        StorageError: The file is absent or not a whole safetensors file.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
            return tensors, dict(json.loads((file.metadata() or {}).get("fedvision", "{}")))
    except (OSError, ValueError, SafetensorError) as error:
        raise StorageError(f"cannot read {path}: {error}") from error
