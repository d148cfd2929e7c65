"""``fedvision data split``: who goes where, which files, and what is refused."""

from collections import Counter
from pathlib import Path

import pytest

from fedvision.cli.app import main
from fedvision.data.manifest import SPLITS, Manifest, find_manifests, load_manifest
from fedvision.data.splitting import divide, shares, write_division
from fedvision.errors import ConfigError, StorageError
from tests.conftest import write_site


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two sites that train, 16 and 8 patients to train on, and one that tests only; two cases a patient."""
    write_site(tmp_path / "in", "large", (32, 8, 8))
    write_site(tmp_path / "in", "small", (16, 4, 4))
    write_site(tmp_path / "in", "judge", (0, 0, 4))
    return tmp_path / "in"


def manifests(root: Path) -> list[Manifest]:
    return list(find_manifests(root).values())


def test_every_patient_is_at_one_part_in_the_split_of_before(root: Path) -> None:
    found = divide(manifests(root), 6, 0, seed=3)
    assert [part.site for part in found.parts] == [
        "judge", "large-1", "large-2", "large-3", "large-4", "small-1", "small-2"
    ]  # fmt: skip
    for name in ("large", "small"):
        before = load_manifest(root / name)
        parts = [part for part in found.parts if part.site.startswith(name)]
        cases = [case for part in parts for case in part.cases]
        assert sorted(case.id for case in cases) == sorted(case.id for case in before.cases)
        split_of = {case.id: case.split for case in before.cases}
        assert all(case.split == split_of[case.id] for case in cases)
        seen = Counter(p for part in parts for p in {case.patient for case in part.cases})
        assert set(seen.values()) == {1}
        for split in SPLITS:
            sizes = [len({case.patient for case in part.in_split(split)}) for part in parts]
            assert max(sizes) - min(sizes) <= 1


def test_the_seed_decides_and_the_order_of_files_does_not(root: Path) -> None:
    first, other = divide(manifests(root), 6, 3, seed=1), divide(manifests(root)[::-1], 6, 3, seed=1)
    assert {p.site: {c.id for c in p.cases} for p in first.parts} == {
        p.site: {c.id for c in p.cases} for p in other.parts
    }
    changed = divide(manifests(root), 6, 3, seed=2)
    assert [p.cases for p in first.parts] != [p.cases for p in changed.parts]


def test_parts_are_in_proportion_and_everybody_gets_one() -> None:
    assert shares(10, [80, 60, 24, 40], 1) == [4, 3, 1, 2]
    assert shares(3, [1000, 1, 1], 1) == [1, 1, 1]
    assert shares(5, [10, 0], 0) == [5, 0]
    with pytest.raises(ValueError, match="cannot be shared"):
        shares(1, [1, 1], 1)


def test_a_root_set_is_drawn_from_training_patients_and_is_at_no_site(root: Path) -> None:
    found = divide(manifests(root), 5, 6, seed=0)
    assert found.root_set is not None
    taken = {case.patient for case in found.root_set.cases}
    assert len(taken) == 6 and {case.split for case in found.root_set.cases} == {"train"}
    assert Counter(name.split("/")[0] for name in taken) == {"large": 4, "small": 2}
    left = {f"{part.site[:5]}/{case.patient}" for part in found.parts for case in part.cases}
    assert not taken & left


def test_files_stand_alone_and_an_existing_folder_is_left_as_it_is(root: Path, tmp_path: Path) -> None:
    write_division(divide(manifests(root), 4, 2, seed=0), tmp_path / "out")
    written = find_manifests(tmp_path / "out" / "sites")
    assert len(written) == 5
    one = load_manifest(tmp_path / "out" / "root-set")
    for manifest in (*written.values(), one):
        for case in manifest.cases:
            for name in (*case.image, *case.label):
                assert not Path(name).is_absolute() and (manifest.folder / name).is_file()
    assert sum(len(one.cases) for one in (*written.values(), one)) == 76
    with pytest.raises(StorageError, match="is not empty"):
        write_division(divide(manifests(root), 4, 2, seed=0), tmp_path / "out")


def test_a_missing_file_leaves_nothing_behind(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "small" / "train3.png").unlink()
    assert main(["data", "split", str(root), "--sites", "4", "--out", str(tmp_path / "out")]) == 2
    assert "train3.png: no such file" in "".join(capsys.readouterr().err.splitlines())
    assert not (tmp_path / "out").exists()


def test_too_few_patients_or_sites_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="2 sites cannot be made into 1"):
        divide(manifests(root), 1, 0, seed=0)
    with pytest.raises(ConfigError, match="patients to train on"):
        divide(manifests(root), 40, 0, seed=0)
    with pytest.raises(ConfigError, match="would take all"):
        divide(manifests(root), 2, 24, seed=0)


def test_the_command_prints_the_new_sites_and_where_they_are(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["data", "split", str(root), "--sites", "4", "--root-set", "3", "--out", str(out)]
    assert main(command) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[1].split() == ["judge", "4", "2", "0", "0", "4"]
    assert told.out.splitlines()[-1].split() == ["root-set", "6", "3", "6", "0", "0"]
    assert f"data.root: {out / 'sites'}" in told.err and f"data.root_set: {out / 'root-set'}" in told.err
    assert main(command) == 2
    assert main(["data", "split", "--help"]) == 0
    assert "--root-set" in capsys.readouterr().out
