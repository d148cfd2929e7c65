"""The checks: every fault that is planted is found, and a sound data set is left in peace."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fedvision.config import Job, parse_job
from fedvision.data.checks import Finding, check_site, check_sites, check_sites_for_job
from fedvision.data.demo import make_demo
from fedvision.data.manifest import Manifest, find_manifests, parse_manifest, save_manifest
from fedvision.errors import DataError

COUNTS = {"train": 6, "val": 1, "test": 2}


def write_pictures(folder: Path, name: str = "a", task: str = "segmentation", **changes: Any) -> Manifest:
    """Write a sound site of 9 pictures; ``changes`` replace keys of cases, such as ``train0={...}``."""
    rng = np.random.default_rng([*name.encode()])
    (folder / name).mkdir(parents=True)
    cases = []
    for split, count in COUNTS.items():
        for number in range(count):
            case_id = f"{split}{number}"
            Image.fromarray(rng.integers(0, 255, (10, 12)).astype(np.uint8)).save(
                folder / name / f"{case_id}.png"
            )
            mask = np.zeros((10, 12), dtype=np.uint8)
            mask[2:5, 3:6] = 1
            Image.fromarray(mask).save(folder / name / f"{case_id}-m.png")
            case: dict[str, Any] = {
                "id": case_id,
                "patient": f"{name}-{case_id}",
                "split": split,
                "image": [f"{case_id}.png"],
            }
            if task == "segmentation":
                case["label"] = [f"{case_id}-m.png"]
            else:
                case |= {"boxes": [[3, 2, 6, 5]], "box_labels": [1]}
            cases.append(case | changes.pop(case_id, {}))
    content = {
        "site": name,
        "task": task,
        "spatial_dims": 2,
        "classes": ["x"],
        "label_kind": "semantic" if task == "segmentation" else "boxes",
        "cases": [case for case in cases if case["split"] is not None],
    }
    assert not changes or set(changes) <= set(content)
    manifest = parse_manifest(content | changes, folder / name / "manifest.json")
    save_manifest(manifest, folder / name)
    return manifest


def job_for(root: Path, **data: Any) -> Job:
    return parse_job(
        {
            "name": "t",
            "rounds": 1,
            "task": {"kind": "segmentation", "classes": ["x"]},
            "data": {"root": str(root), **data},
            "model": {"name": "UNet"},
            "training": {"steps": 1, "patch_size": [8, 8]},
            "aggregation": {"clip_norm": 1.0},
        },
        "test",
    )


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_sound_site_has_no_findings(tmp_path: Path, task: str) -> None:
    assert check_site(write_pictures(tmp_path, task=task)) == []


def replace_image(array: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: Image.fromarray(array.astype(np.uint8)).save(folder / "train1.png")


def replace_mask(array: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: Image.fromarray(array.astype(np.uint8)).save(folder / "train1-m.png")


@pytest.mark.parametrize(
    ("spoil", "level", "told"),
    [
        (lambda folder: (folder / "train1.png").unlink(), "error", "train1.png: no such file"),
        (
            lambda folder: (folder / "train1.png").write_bytes(b"\x89PNG"),
            "error",
            "train1.png: cannot be read",
        ),
        (replace_mask(np.ones((12, 10))), "error", "shape (12, 10), but train1.png has (10, 12)"),
        (replace_mask(np.full((10, 12), 7)), "error", "mask value 7 is no class"),
        (replace_image(np.full((10, 12), 9)), "warning", "the image is constant"),
    ],
)
def test_a_bad_file_is_found(tmp_path: Path, spoil: Callable[[Path], None], level: str, told: str) -> None:
    manifest = write_pictures(tmp_path)
    spoil(tmp_path / "a")
    finding = only(check_site(manifest))
    assert (finding.level, finding.site, finding.case) == (level, "a", "train1")
    assert told in finding.text


@pytest.mark.parametrize(
    ("boxes", "level", "told"),
    [
        ([[3, 2, 3, 5]], "error", "has no area"),
        ([[5, 2, 3, 5]], "error", "has no area"),
        ([[12, 2, 14, 5]], "error", "is outside the image"),
        ([[10, 2, 14, 5]], "warning", "reaches beyond the image"),
        ([[1, 2, 3]], "error", "needs 4 numbers"),
        (None, "error", "no `boxes`"),
    ],
)
def test_a_bad_box_is_found(tmp_path: Path, boxes: Any, level: str, told: str) -> None:
    manifest = write_pictures(tmp_path, task="detection", train1={"boxes": boxes})
    finding = only(check_site(manifest))
    assert (finding.level, finding.case) == (level, "train1")
    assert told in finding.text


def test_a_box_label_that_is_no_class_is_found(tmp_path: Path) -> None:
    manifest = write_pictures(tmp_path, task="detection", train1={"box_labels": [2]})
    assert only(check_site(manifest)).text == "box label 2 is no class, there are 1"


def test_a_patient_in_two_splits_is_an_error(tmp_path: Path) -> None:
    manifest = write_pictures(tmp_path, train1={"patient": "p"}, test0={"patient": "p"})
    finding = only(check_site(manifest))
    assert (finding.level, finding.text) == ("error", "patient p is in train and test")


def test_the_same_picture_in_two_splits_is_an_error_and_in_one_a_warning(tmp_path: Path) -> None:
    manifest = write_pictures(tmp_path, train1={"image": ["train0.png"]}, test0={"image": ["train2.png"]})
    first, second = check_site(manifest)
    assert (first.level, first.case) == ("error", "test0")
    assert first.text == "the same image as train2, but in test and not train"
    assert (second.level, second.case, second.text) == ("warning", "train1", "the same image as train0")


def test_a_leak_between_sites_is_found(tmp_path: Path) -> None:
    first = write_pictures(tmp_path, "a")
    second = write_pictures(tmp_path, "b")
    picture = (tmp_path / "a" / "train0.png").read_bytes()
    (tmp_path / "b" / "test1.png").write_bytes(picture)
    finding = only(check_sites({"a": first, "b": second}))
    assert (finding.level, finding.site, finding.case) == ("error", "b", "test1")
    assert finding.text == "the same image as train0 at a, but in test and not train"


def test_sites_that_do_not_agree_are_found(tmp_path: Path) -> None:
    first = write_pictures(tmp_path, "a")
    second = write_pictures(tmp_path, "b", classes=["y"], train0={"patient": "a-train0"})
    error, warning = check_sites({"a": first, "b": second})
    assert error.text == "classes is ('y',), at a it is ('x',)"
    assert warning.text == "1 patient names are also at another site (a-train0)"


def test_empty_splits_and_tiny_sites_are_told(tmp_path: Path) -> None:
    gone = {f"train{number}": {"split": None} for number in range(3)}
    few = write_pictures(
        tmp_path, "few", **gone, val0={"split": None}, test0={"split": None}, test1={"split": None}
    )
    texts = [one.text for one in check_site(few)]
    assert texts == ["only 3 patients to train on", "no validation case", "no test case"]
    gone |= {f"train{number}": {"split": None} for number in range(6)}
    judge = write_pictures(tmp_path, "judge", **gone)
    finding = only(check_site(judge))
    assert (finding.level, finding.text) == ("warning", "no training case")
    nothing = write_pictures(tmp_path, "none", **gone, test0={"split": None}, test1={"split": None})
    assert check_site(nothing)[0].level == "error"


def test_a_test_only_site_must_be_held_out_by_the_job(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a")
    judge = write_pictures(tmp_path, "judge", **{f"train{number}": {"split": None} for number in range(6)})
    assert check_site(judge, job_for(tmp_path, sites=["a"], held_out=["judge"])) == []
    finding = only(check_site(judge, job_for(tmp_path)))
    assert (finding.level, finding.hint) == ("error", "name the site in data.held_out")


def test_a_class_that_never_trains_and_empty_masks_are_told(tmp_path: Path) -> None:
    manifest = write_pictures(tmp_path, classes=["x", "y"])
    Image.fromarray(np.zeros((10, 12), dtype=np.uint8)).save(tmp_path / "a" / "train1-m.png")
    texts = [one.text for one in check_site(manifest)]
    assert texts == ["class y is in no training case", "1 of 9 masks are all background (train1)"]


def test_data_that_do_not_fit_the_job_are_found(tmp_path: Path) -> None:
    manifest = write_pictures(tmp_path, classes=["y"])
    Image.fromarray(np.zeros((10, 12, 4), dtype=np.uint8) + 9).save(tmp_path / "a" / "train1.png")
    texts = [one.text for one in check_site(manifest, job_for(tmp_path))]
    assert texts == [
        "the job's task.classes is x, the manifest's y",
        "case train1: train1.png has 4 channels, task.in_channels is 1",
    ]


def test_volumes_with_odd_spacing_and_damage_are_found(tmp_path: Path) -> None:
    manifest = find_manifests(make_demo(tmp_path, "segmentation", size="tiny", num_sites=1))["north"]
    odd, flipped, spoiled = (manifest.path(case.image[0]) for case in manifest.cases[:3])
    label = manifest.path(manifest.cases[0].label[0])
    for path in (odd, label):
        image = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), np.diag([4.0, 4.0, 20.0, 1.0])), path)
    content = flipped.read_bytes()
    flipped.write_bytes(content[:-6] + bytes([content[-6] ^ 1]) + content[-5:])  # in the checksum
    image = nibabel.load(spoiled)
    values = image.get_fdata(dtype=np.float32)
    values[3, 3, 3] = np.inf
    nibabel.save(nibabel.Nifti1Image(values, image.affine), spoiled)
    findings = {one.case: one for one in check_site(manifest) if one.case}
    assert list(findings) == [case.id for case in (*manifest.cases[1:3], manifest.cases[0])]
    damaged, infinite, spaced = findings.values()
    assert "damaged: CRC check failed" in damaged.text and damaged.level == "error"
    assert "not finite" in infinite.text and infinite.level == "error"
    assert spaced.text == "voxels of 4 x 4 x 20 mm, most others are near 4 x 4 x 5.5"


def test_a_run_stops_at_an_error_and_goes_on_after_a_warning(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a")
    write_pictures(tmp_path, "b", train1={"image": ["train0.png"]})
    write_pictures(tmp_path, "unused", train1={"patient": "p"}, test0={"patient": "p"})
    output = io.StringIO()
    check_sites_for_job(job_for(tmp_path, sites=["a", "b"]), Console(file=output, width=200))
    assert output.getvalue() == "warning: b/train1: the same image as train0\n"
    with pytest.raises(DataError, match=r"site unused, patient p is in train and test") as caught:
        check_sites_for_job(job_for(tmp_path), Console(file=output))
    assert "fedvision data check" in caught.value.hint
