import errno
import os
from pathlib import Path

import numpy as np
import pytest

from fedvision import storage
from fedvision.errors import StorageError


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    storage.write_json(path, {"a": 1})
    storage.write_json(path, {"a": 2})
    assert storage.read_json(path) == {"a": 2}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_full_disk_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    storage.write_text(path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="no space left"):
        storage.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_torn_last_line_is_dropped_on_reading_and_overwritten_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    storage.append_line(path, {"n": 1})
    with path.open("ab") as file:
        file.write(b'{"n": 2, "half')
    assert storage.read_lines(path) == [{"n": 1}]
    storage.append_line(path, {"n": 3})
    assert storage.read_lines(path) == [{"n": 1}, {"n": 3}]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"n": 1}\nnonsense\n{"n": 3}\n')
    with pytest.raises(StorageError, match="line 2"):
        storage.read_lines(path)


def test_tensors_come_back_with_their_metadata(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    storage.save_tensors(path, {"a": value.T}, {"round": "3"})
    again = tmp_path / "again.safetensors"
    storage.save_tensors(again, {"a": value.T}, {"round": "3"})
    assert again.read_bytes() == path.read_bytes()
    tensors, metadata = storage.load_tensors(path)
    assert np.array_equal(tensors["a"], value.T)
    assert metadata == {"round": "3"}


def test_a_cut_off_tensor_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    storage.save_tensors(path, {"a": np.zeros(100, np.float32)}, {})
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(StorageError):
        storage.load_tensors(path)
