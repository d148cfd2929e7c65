import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedvision.config import Job, parse_job
from fedvision.data.manifest import Case, Manifest, load_manifest, save_manifest
from fedvision.errors import ConfigError, DataError
from fedvision.tasks import initial_network, local_names
from fedvision.training.root import LEAST_CASES, kinds_of, open_root_set, root_update, shortest_mean
from fedvision.updates.clipping import l2_norm
from fedvision.updates.layout import FloatVector, flatten, layout_of
from fedvision_server.cli import main
from fedvision_server.home import ServerHome
from fedvision_server.root_sets import load_root_record, served_root_set
from tests.conftest import tiny_content, write_site


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a root set of 12 cases."""
    return write_site(tmp_path, "root", (12, 0, 0))


def job_for(folder: Path, **changes: object) -> Job:
    """Return the tiny job, see ``tiny_content``."""
    return parse_job(tiny_content(folder.parent, **changes), "tiny")


def start_of(job: Job) -> FloatVector:
    """Return the weights that a job starts from."""
    network = initial_network(job)
    return flatten(network, layout_of(network, local_names(network, job)))


def rewrite_masks(folder: Path, value: int) -> None:
    """Fill every mask with one value."""
    for path in folder.glob("*-mask.png"):
        Image.fromarray(np.full((32, 32), value, np.uint8)).save(path)


def test_the_digest_names_every_file_and_not_the_place(folder: Path, tmp_path: Path) -> None:
    digest = open_root_set(folder).digest
    assert len(digest) == 64
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert open_root_set(tmp_path / "elsewhere", digest).digest == digest
    for name in ("train3.png", "train3-mask.png"):
        path = tmp_path / "elsewhere" / name
        content = path.read_bytes()
        path.write_bytes(content + b"\0")
        with pytest.raises(DataError, match="is not the one that was added"):
            open_root_set(tmp_path / "elsewhere", digest)
        path.write_bytes(content)
    manifest = load_manifest(tmp_path / "elsewhere")
    save_manifest(manifest.model_copy(update={"cases": manifest.cases[1:]}), tmp_path / "elsewhere")
    with pytest.raises(DataError, match="is not the one that was added"):
        open_root_set(tmp_path / "elsewhere", digest)


def test_a_missing_file_is_told(folder: Path) -> None:
    digest = open_root_set(folder).digest
    (folder / "train0.png").unlink()
    with pytest.raises(DataError, match=r"cannot read .*train0\.png"):
        open_root_set(folder, digest)


def test_a_root_set_that_is_too_small_is_refused(tmp_path: Path) -> None:
    small = write_site(tmp_path, "small", (LEAST_CASES - 1, 0, 0))
    with pytest.raises(DataError, match="too small: 9 cases, at least 10"):
        open_root_set(small)


def test_a_root_set_of_few_patients_is_refused(folder: Path) -> None:
    manifest = load_manifest(folder)
    cases = tuple(case.model_copy(update={"patient": f"p{i % 4}"}) for i, case in enumerate(manifest.cases))
    save_manifest(manifest.model_copy(update={"cases": cases}), folder)
    with pytest.raises(DataError, match="too small: its cases are of 4 patients, at least 5"):
        open_root_set(folder)


def test_a_class_without_a_case_is_named(folder: Path) -> None:
    manifest = load_manifest(folder)
    save_manifest(manifest.model_copy(update={"classes": ("disc", "ring")}), folder)
    with pytest.raises(DataError, match="no case with class ring"):
        open_root_set(folder)


@pytest.mark.parametrize(
    ("value", "words"), [(1, "nearly all foreground"), (0, "no case with class disc")], ids=["full", "empty"]
)
def test_masks_without_an_outline_are_refused(folder: Path, value: int, words: str) -> None:
    rewrite_masks(folder, value)
    with pytest.raises(DataError, match=words):
        open_root_set(folder)


def test_masks_that_are_mostly_empty_are_refused(folder: Path) -> None:
    kept = (folder / "train0-mask.png").read_bytes()
    rewrite_masks(folder, 0)
    (folder / "train0-mask.png").write_bytes(kept)
    with pytest.raises(DataError, match="labels do not fit: 11 of 12 masks are all background"):
        open_root_set(folder)


def test_a_mask_of_another_size_is_refused(folder: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "train4-mask.png")
    with pytest.raises(DataError, match="labels or files do not fit: case train4"):
        open_root_set(folder)


def write_boxes(folder: Path, box: tuple[float, ...], count: int = 12) -> Path:
    """Write a root set for a detection, each picture with the same box."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    cases = []
    for index in range(count):
        Image.fromarray(rng.integers(0, 255, (32, 40), np.uint8)).save(folder / f"{index}.png")
        cases.append(
            Case(
                id=str(index),
                patient=str(index),
                split="train",
                image=(f"{index}.png",),
                boxes=(box,),
                box_labels=(1,),
            )
        )
    manifest = Manifest(
        site="root",
        task="detection",
        spatial_dims=2,
        classes=("cell",),
        label_kind="boxes",
        cases=tuple(cases),
    )
    save_manifest(manifest, folder)
    return folder


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ((50.0, 4.0, 60.0, 12.0), "labels or files do not fit: case 0: .* is outside the image"),
        ((9.0, 4.0, 9.0, 12.0), "labels or files do not fit: case 0: .* has no area"),
        ((0.0, 0.0, 40.0, 32.0), "12 of 12 images have a box that is nearly all foreground"),
    ],
    ids=["outside", "empty", "whole"],
)
def test_boxes_that_do_not_fit_are_refused(tmp_path: Path, box: tuple[float, ...], words: str) -> None:
    with pytest.raises(DataError, match=words):
        open_root_set(write_boxes(tmp_path / "root", box))


def test_boxes_that_fit_are_taken(tmp_path: Path) -> None:
    assert len(open_root_set(write_boxes(tmp_path / "root", (4.0, 4.0, 20.0, 16.0))).cases) == 12


def test_the_root_update_is_deterministic_and_clipped(folder: Path) -> None:
    root = open_root_set(folder)
    job = job_for(folder, aggregation__clip_norm=0.01)
    weights = start_of(job)
    first = root_update(root, job, initial_network(job), weights, 1)
    again = root_update(open_root_set(folder), job, initial_network(job), weights, 1)
    assert first.dtype == np.float32
    assert first.shape == weights.shape
    np.testing.assert_array_equal(first, again)
    assert 0.009 < l2_norm(first) <= 0.01
    assert not np.array_equal(first, root_update(root, job, initial_network(job), weights, 2))


def test_the_root_update_points_as_a_site_with_like_cases_does(folder: Path, tmp_path: Path) -> None:
    from fedvision.data.readers import CaseStore
    from fedvision.training.loop import train
    from fedvision.updates.layout import load_vector

    job = job_for(folder, training__steps=20)
    network = initial_network(job)
    layout, weights = layout_of(network), start_of(job)
    ours = root_update(open_root_set(folder), job, network, weights, 1)
    manifest = load_manifest(write_site(tmp_path / "sites", "a", (12, 0, 0)))
    load_vector(network, layout, weights)
    train(network, job, CaseStore(manifest, job), manifest.cases, 1, "a", next(network.parameters()).device)
    theirs = flatten(network, layout) - weights
    assert ours @ theirs > 0.5 * l2_norm(ours) * l2_norm(theirs)


def test_cases_are_of_one_kind_by_what_their_patients_have_in_front(folder: Path) -> None:
    cases = load_manifest(folder).cases
    names = ["ct/a", "ct/b", "mr/a", "mr/b/2", "us/a", "c"]
    named = [case.model_copy(update={"patient": name}) for case, name in zip(cases, names, strict=False)]
    kinds = [[case.patient for case in kind] for kind in kinds_of(named)]
    assert kinds == [["ct/a", "ct/b"], ["mr/a", "mr/b/2"], ["us/a", "c"]]
    assert [len(kind) for kind in kinds_of(cases)] == [len(cases)]


@given(st.integers(1, 6), st.integers(2, 9), st.floats(-0.9, 0.9), st.integers(0, 2**31))
def test_the_shortest_mean_goes_with_every_vector(count: int, size: int, common: float, seed: int) -> None:
    drawn = np.random.default_rng(seed).standard_normal((count, size))
    drawn[:, 0] += 3 * common
    rows = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    shares = shortest_mean(rows @ rows.T)
    mean = shares @ rows
    assert (shares >= -1e-12).all() and abs(shares.sum() - 1) < 1e-9
    assert (rows @ mean >= mean @ mean - 2e-3).all()
    assert np.linalg.norm(mean) <= np.linalg.norm(rows.mean(axis=0)) + 1e-9


def test_a_rare_kind_is_not_outvoted() -> None:
    rows = np.eye(4)
    rows[3] = [-0.3, -0.3, -0.3, np.sqrt(1 - 0.27)]  # against three that agree
    rows[1], rows[2] = [0.9, np.sqrt(1 - 0.81), 0, 0], [0.9, 0, np.sqrt(1 - 0.81), 0]
    assert rows.mean(axis=0) @ rows[3] < 0.05 < 0.2 < (shortest_mean(rows @ rows.T) @ rows) @ rows[3]


def test_cases_are_read_once(folder: Path) -> None:
    root, job = open_root_set(folder), job_for(folder)
    root_update(root, job, initial_network(job), start_of(job), 1)
    store = root.store(job)
    size = store.size_bytes
    for path in folder.glob("*.png"):
        path.unlink()
    root_update(root, job, initial_network(job), start_of(job), 2)
    assert root.store(job) is store
    assert store.size_bytes == size > 0


def test_a_file_that_changes_after_the_set_was_opened_is_found_before_a_case_is_used(folder: Path) -> None:
    root, job = open_root_set(folder), job_for(folder)
    shutil.copy(folder / "train1-mask.png", folder / "train0-mask.png")
    with pytest.raises(DataError, match="a file or the manifest changed"):
        root_update(root, job, initial_network(job), start_of(job), 1)


def test_a_root_set_for_another_job_is_refused(folder: Path) -> None:
    job = job_for(folder, task__classes=["tumour"])
    with pytest.raises(ConfigError, match=r"classes is .'disc'. in its manifest, .'tumour'. in the job"):
        open_root_set(folder).store(job)


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    """Return a coordinator's folder without sites."""
    place = tmp_path / "server"
    assert main(["init", str(place), "--name", "liver-ct", "--address", "127.0.0.1:9443"]) == 0
    return ServerHome(place)


def test_a_root_set_is_added_shown_and_removed(
    home: ServerHome, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["root-set", "add", str(folder), "--home", str(home.root)]) == 0
    digest = open_root_set(folder).digest
    printed = capsys.readouterr()
    assert f"digest:   {digest}" in printed.out
    assert "12 cases of 6 patients" in printed.out
    assert f"root_set = {digest[:16]}" in printed.err
    served = served_root_set(home, digest)
    assert served is not None
    assert served.digest == digest
    assert main(["root-set", "show", "--home", str(home.root)]) == 0
    assert "files:    unchanged" in capsys.readouterr().out
    assert main(["root-set", "add", str(folder), "--home", str(home.root)]) == 0
    assert "in force already" in capsys.readouterr().err
    assert main(["root-set", "remove", "--home", str(home.root), "--yes"]) == 0
    assert load_root_record(home) is None
    assert served_root_set(home) is None
    assert main(["root-set", "show", "--home", str(home.root)]) == 2
    assert "has no root set" in capsys.readouterr().err
    assert (folder / "manifest.json").exists()


def test_a_changed_file_is_found_before_the_root_set_is_used(
    home: ServerHome, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["root-set", "add", str(folder), "--home", str(home.root)]) == 0
    shutil.copy(folder / "train1-mask.png", folder / "train0-mask.png")
    with pytest.raises(DataError, match="is not the one that was added"):
        served_root_set(home)
    assert main(["root-set", "show", "--home", str(home.root)]) == 2
    assert "a file or the manifest changed" in capsys.readouterr().err


def test_another_root_set_than_the_charters_is_not_used(home: ServerHome, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"the charter names the root set 0000.*, there is none"):
        served_root_set(home, "0" * 64)
    assert main(["root-set", "add", str(folder), "--home", str(home.root)]) == 0
    with pytest.raises(ConfigError, match="the one in force is"):
        served_root_set(home, "0" * 64)


def test_a_refused_set_leaves_the_old_one_in_force(
    home: ServerHome, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["root-set", "add", str(folder), "--home", str(home.root)]) == 0
    before = load_root_record(home)
    small = write_site(tmp_path, "small", (3, 0, 0))
    assert main(["root-set", "add", str(small), "--home", str(home.root)]) == 2
    assert "too small: 3 cases" in capsys.readouterr().err
    assert load_root_record(home) == before


def test_a_damaged_record_is_told(home: ServerHome, folder: Path) -> None:
    assert main(["root-set", "add", str(folder), "--home", str(home.root)]) == 0
    path = home.root / "root-set.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"digest": "no"}))
    with pytest.raises(ConfigError, match=r"root-set\.json"):
        load_root_record(home)
