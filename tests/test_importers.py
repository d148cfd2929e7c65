"""Importers of masks, and what happens to files: small sources in every layout, and real ones."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from fedvision.data.assignment import Assignment
from fedvision.data.sources import SourceOptions
from fedvision.errors import ConfigError, DataError, StorageError
from tests.source_files import is_sound, mask, only, picture, real, run, science_bowl, text, visits, volume


def decathlon(source: Path, names: list[str], channels: int = 1, **changes: Any) -> Path:
    rng = np.random.default_rng(0)
    shape = (6, 7, 8) if channels == 1 else (6, 7, 8, channels)
    for name in names:
        volume(source / "imagesTr" / f"{name}.nii.gz", rng.random(shape).astype(np.float32))
        volume(source / "labelsTr" / f"{name}.nii.gz", rng.integers(0, 3, (6, 7, 8)).astype(np.uint8))
    content = {
        "labels": {"0": "background", "1": "liver", "2": "tumour"},
        "training": [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names
        ],
        "test": ["./imagesTs/liver_9.nii.gz"],
    }
    text(source / "dataset.json", json.dumps(content | changes))
    return source


def test_a_decathlon_task_is_imported_where_it_is(tmp_path: Path) -> None:
    source = decathlon(tmp_path / "Task03", [f"liver_{number}" for number in range(10)], channels=2)
    imported = run("msd", source, tmp_path / "out")
    manifest = only(imported)
    assert manifest.classes == ("liver", "tumour")
    assert (manifest.spatial_dims, manifest.label_kind, manifest.source) == (
        3,
        "semantic",
        "imported from Task03 (msd)",
    )
    assert [len(manifest.in_split(split)) for split in ("train", "val", "test")] == [7, 1, 2]
    assert manifest.cases[0].image == ((source / "imagesTr" / "liver_0.nii.gz").as_posix(),)
    assert is_sound(tmp_path / "out")
    assert any("no labels" in note for note in imported.notes)
    assert any("patient of its own" in note for note in imported.notes)


def test_nnunets_files_a_channel_and_its_second_dataset_json_are_read(tmp_path: Path) -> None:
    source = decathlon(
        tmp_path, ["case_1", "case_2"], labels={"background": 0, "liver": 1, "tumour": 2}, training=None
    )
    content = json.loads((source / "dataset.json").read_text())
    del content["training"]
    text(source / "dataset.json", json.dumps(content))
    for name in ("case_1", "case_2"):
        (source / "imagesTr" / f"{name}.nii.gz").rename(source / "imagesTr" / f"{name}_0000.nii.gz")
        volume(source / "imagesTr" / f"{name}_0001.nii.gz", np.ones((6, 7, 8), dtype=np.float32))
    manifest = only(run("msd", source, source))
    assert [case.id for case in manifest.cases] == ["case_1", "case_2"]
    assert manifest.cases[0].image == ("../imagesTr/case_1_0000.nii.gz", "../imagesTr/case_1_0001.nii.gz")
    assert is_sound(source)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"labels": {"0": "background", "1": "a", "3": "b"}}, r"without a gap, got \[1, 3\]"),
        ({"labels": {"background": 0, "whole": [1, 2]}}, "must be whole numbers"),
        ({"labels": {}}, "must name the value"),
        ({"training": ["imagesTr/x.nii.gz"]}, "pairs of image and label"),
        ({"training": [{"image": "i.nii.gz", "label": "l.nii.gz"}]}, "1 of 1 label files are absent"),
        ({"training": []}, "names no training case"),
    ],
)
def test_a_wrong_dataset_json_is_explained(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    source = decathlon(tmp_path / "in", ["c1"], **changes)
    with pytest.raises(DataError, match=told):
        run("msd", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Images beside masks


def test_folders_of_images_and_masks_with_splits_and_endings(tmp_path: Path) -> None:
    for split, count in {"train": 3, "valid": 1, "test": 2}.items():
        for number in range(count):
            picture(tmp_path / "in" / split / "images" / f"{split}_{number}.jpg")
            mask(tmp_path / "in" / split / "masks" / f"{split}_{number}_mask.png", (255,))
    picture(tmp_path / "in" / "test" / "images" / "unlabelled.png")
    imported = run("masks", tmp_path / "in", tmp_path / "out", options=SourceOptions(("polyp",)))
    manifest = only(imported)
    assert Counter(case.split for case in manifest.cases) == {"train": 3, "val": 1, "test": 2}
    assert (manifest.label_kind, manifest.classes) == ("binary", ("polyp",))
    assert "1 images without a mask left out (unlabelled.png)" in imported.notes
    assert "splits are the source's own" in imported.notes
    assert is_sound(tmp_path / "out")


def test_masks_of_several_values_need_a_word_from_the_user(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / "in" / "images" / f"{number}.png")
        mask(tmp_path / "in" / "labels" / f"{number}.png", (1, 2))
    with pytest.raises(DataError, match=r"the masks hold the values 1, 2: are they classes or objects\?"):
        run("masks", tmp_path / "in", tmp_path / "out")
    classes = only(run("masks", tmp_path / "in", tmp_path / "out", options=SourceOptions(("x", "y"))))
    assert classes.label_kind == "semantic"
    objects = run("masks", tmp_path / "in", tmp_path / "b", options=SourceOptions(("x",), "instance"))
    assert only(objects).label_kind == "instance"
    with pytest.raises(DataError, match="instance masks have one class"):
        run("masks", tmp_path / "in", tmp_path / "c", options=SourceOptions(("x", "y"), "instance"))
    with pytest.raises(DataError, match="need the names of their classes"):
        run("masks", tmp_path / "in", tmp_path / "c", options=SourceOptions((), "semantic"))


def test_volumes_and_tiff_stacks_beside_masks_are_three_dimensional(tmp_path: Path) -> None:
    volume(tmp_path / "n" / "images" / "v.nii.gz", np.ones((4, 5, 6), dtype=np.float32))
    volume(tmp_path / "n" / "labels" / "v.nii.gz", np.ones((4, 5, 6), dtype=np.uint8))
    assert only(run("masks", tmp_path / "n", tmp_path / "n-out")).spatial_dims == 3
    for kind in ("images", "labels"):
        (tmp_path / "t" / kind).mkdir(parents=True)
        tifffile.imwrite(
            tmp_path / "t" / kind / "v.tif", np.ones((5, 8, 9), dtype=np.uint8), photometric="minisblack"
        )
    manifest = only(run("masks", tmp_path / "t", tmp_path / "t-out"))
    assert (manifest.spatial_dims, manifest.classes) == (3, ("foreground",))
    assert is_sound(tmp_path / "t-out")


def test_sites_are_the_first_folders_and_files_below_root_are_relative(tmp_path: Path) -> None:
    for site in ("Hospital A", "b"):
        for number in range(4):
            picture(tmp_path / site / "images" / f"{number}.png", value=len(site))
            mask(tmp_path / site / "labels" / f"{number}.png")
    imported = run("masks", tmp_path, tmp_path, Assignment(sites_from_folders=True))
    assert [one.site for one in imported.manifests] == ["Hospital-A", "b"]
    assert imported.manifests[0].cases[0].image == ("../Hospital A/images/0.png",)
    assert imported.manifests[1].cases[0].image == ("images/0.png",)
    assert imported.manifests[1].cases[0].id == "b/images/0"  # the bare name is at both sites
    moved = tmp_path.rename(tmp_path.parent / f"{tmp_path.name}-moved")
    assert is_sound(moved)


def test_folders_that_are_no_sites_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "train" / "images" / "1.png")
    mask(tmp_path / "in" / "train" / "labels" / "1.png")
    with pytest.raises(DataError, match="its folders are not sites: it holds train/"):
        run("masks", tmp_path / "in", tmp_path / "out", Assignment(sites_from_folders=True))


def test_a_folder_a_case_with_a_file_an_object(tmp_path: Path) -> None:
    source = science_bowl(tmp_path / "in", ["aa", "bb", "cc"])
    imported = run("dsb", source, tmp_path / "out")
    manifest = only(imported)
    assert [case.id for case in manifest.cases] == ["aa", "bb", "cc"]
    assert (manifest.label_kind, manifest.classes, len(manifest.cases[0].label)) == (
        "binary",
        ("nucleus",),
        2,
    )
    assert "1 cases without masks left out (x)" in imported.notes
    assert is_sound(tmp_path / "out")
    with pytest.raises(DataError, match="no folders `images` and `labels`") as caught:
        run("masks", source, tmp_path / "other")
    assert "`dsb`" in caught.value.hint


def test_a_manifest_that_is_there_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    source = visits(tmp_path / "in")
    run("masks", source, tmp_path / "out")
    before = (tmp_path / "out" / "a" / "manifest.json").read_bytes()
    with pytest.raises(DataError, match="has a manifest for a"):
        run("masks", source, tmp_path / "out", Assignment(site="a", seed=5))
    assert (tmp_path / "out" / "a" / "manifest.json").read_bytes() == before
    run("masks", source, tmp_path / "out", Assignment(site="a", seed=5), overwrite=True)
    assert (tmp_path / "out" / "a" / "manifest.json").read_bytes() != before


@pytest.mark.parametrize("mode", ["copy", "link"])
def test_files_can_be_copied_or_linked(tmp_path: Path, mode: Any) -> None:
    source = science_bowl(tmp_path / "in", ["a b", "c"])
    manifest = only(run("dsb", source, tmp_path / "out", files=mode))
    assert manifest.cases[0].image == ("images/a_b.png",)
    assert manifest.cases[0].label == ("labels/a_b_0000.png", "labels/a_b_0001.png")
    target = tmp_path / "out" / "a" / "labels" / "a_b_0001.png"
    assert target.is_symlink() == (mode == "link")
    assert target.read_bytes() == (source / "a b" / "masks" / "two.png").read_bytes()
    assert is_sound(tmp_path / "out")


def test_a_failed_copy_leaves_nothing_behind(tmp_path: Path) -> None:
    source = science_bowl(tmp_path / "in", ["aa", "bb", "cc"])
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "labels").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        run("dsb", source, tmp_path / "out", files="copy")
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert left == [tmp_path / "out" / "a" / "labels"]


def test_an_unknown_format_and_an_absent_source_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown format 'dicom'"):
        run("dicom", tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="no such file or folder"):
        run("voc", tmp_path / "gone", tmp_path / "out")
    for name in ("masks", "dsb", "coco", "voc", "yolo", "msd"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match="empty"):
            run(name, tmp_path / "empty", tmp_path / "out")


def test_real_nuclei_are_imported(tmp_path: Path) -> None:
    how = Assignment(sites_from="manifest.csv:domain", split_from="manifest.csv:split")
    imported = run("masks", real("dsb2018_nuclei"), tmp_path, how, SourceOptions(("nucleus",), "instance"))
    assert {
        one.site: [len(one.in_split(s)) for s in ("train", "val", "test")] for one in imported.manifests
    } == {
        "brightfield_1024": [0, 0, 4],
        "fluo_256": [56, 8, 16],
        "fluo_360": [42, 6, 12],
        "fluo_696x520": [16, 3, 5],
        "histology_320x256": [28, 4, 8],
    }
    sample = run("dsb", real("dsb2018_nuclei") / "original_layout_sample", tmp_path / "b")
    assert len(only(sample).cases) == 10
    assert is_sound(tmp_path / "b")


def test_real_hippocampi_are_imported(tmp_path: Path) -> None:
    how = Assignment(sites_from="manifest.csv:intensity_cohort", split_from="manifest.csv:split")
    imported = run("msd", real("msd_hippocampus"), tmp_path, how)
    assert {one.site: len(one.cases) for one in imported.manifests} == {
        "A_uint8": 55,
        "B_mid": 172,
        "C_large": 33,
    }
    assert imported.manifests[0].classes == ("Anterior", "Posterior")
