"""Readers: files of every kind to tensors, and one clear line for every file that is wrong."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from fedvision.data.images import read_raw
from fedvision.data.readers import CaseStore, read_case
from fedvision.errors import DataError
from tests.reader_files import job_for, manifest_for, read, save_picture, save_volume, write_picture


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A folder with a 6 x 8 picture and its mask, classes 1 and 2."""
    return write_picture(tmp_path)


def test_a_picture_has_rows_then_columns(picture: Path) -> None:
    sample = read(manifest_for(picture), job_for(2, ["x", "y"]))
    assert sample.image.shape == (1, 6, 8)
    assert sample.image.dtype == torch.float32
    assert sample.label is not None and sample.label.dtype == torch.uint8
    assert sample.label[0, 1] == 1 and sample.label[5, 7] == 2 and sample.label.sum() == 3
    assert sample.spacing_mm == (1.0, 1.0)
    assert sample.image.flatten().diff().min() > 0  # as written, row by row


def test_an_opaque_alpha_channel_is_dropped_and_colour_becomes_luminance(picture: Path) -> None:
    colour = np.zeros((6, 8, 4), dtype=np.uint8)
    colour[..., 1], colour[..., 3] = 200, 255
    save_picture(picture / "image.png", colour)
    sample = read(manifest_for(picture), job_for(2, ["x", "y"], intensity="unit"))
    assert torch.allclose(sample.image, torch.full((1, 6, 8), 0.587 * 200 / 255))


def test_a_transparent_picture_is_refused(picture: Path) -> None:
    save_picture(picture / "image.png", np.full((6, 8, 4), 100, dtype=np.uint8))
    with pytest.raises(DataError, match=r"image.png has 4 channels, task.in_channels is 1"):
        read(manifest_for(picture), job_for(2, ["x", "y"]))


def test_grey_is_repeated_for_a_colour_network(picture: Path) -> None:
    sample = read(manifest_for(picture), job_for(2, ["x", "y"], in_channels=3))
    assert sample.image.shape == (3, 6, 8)
    assert torch.equal(sample.image[0], sample.image[2])


def test_a_palette_picture_is_colour_as_image_and_indices_as_mask(picture: Path) -> None:
    indexed = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), mode="P")
    indexed.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255] + [0] * 759)
    indexed.save(picture / "image.png")
    indexed.save(picture / "mask.png")
    sample = read(manifest_for(picture), job_for(2, ["x", "y"], in_channels=3, intensity="unit"))
    assert sample.image[:, 0, 1].tolist() == [1, 0, 0]
    assert sample.label is not None and sample.label.tolist() == [[0, 1], [2, 1]]


@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
def test_a_16_bit_tiff_keeps_its_values(picture: Path, compression: str | None) -> None:
    values = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    options = (
        {} if compression is None else {"compression": f"tiff_{compression}".replace("zlib", "adobe_deflate")}
    )
    Image.fromarray(values).save(picture / "image.tif", **options)
    manifest = manifest_for(picture, case={"image": ["image.tif"]})
    assert np.array_equal(read_raw(manifest, manifest.cases[0]).image[0], values)
    sample = read(manifest, job_for(2, ["x", "y"], intensity="unit"))
    assert torch.allclose(sample.image[0], torch.from_numpy(values / 65535.0).float())


def test_a_colour_tiff_of_separate_planes_is_read(picture: Path) -> None:
    planes = np.random.default_rng(0).integers(0, 255, (3, 6, 8)).astype(np.uint8)
    tifffile.imwrite(picture / "image.tif", planes, photometric="rgb", planarconfig="separate")
    manifest = manifest_for(picture, case={"image": ["image.tif"]})
    assert np.array_equal(read_raw(manifest, manifest.cases[0]).image, planes)


def test_a_tiff_stack_is_a_volume(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "v.tif", np.arange(60, dtype=np.uint16).reshape(3, 4, 5), photometric="minisblack"
    )
    tifffile.imwrite(tmp_path / "m.tif", np.ones((3, 4, 5), dtype=np.uint8), photometric="minisblack")
    manifest = manifest_for(tmp_path, spatial_dims=3, case={"image": ["v.tif"], "label": ["m.tif"]})
    sample = read(manifest, job_for(3, ["x", "y"]))
    assert sample.image.shape == (1, 3, 4, 5)


def test_channels_come_from_several_files_or_a_fourth_axis(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((4, 5, 6, 2)).astype(np.float32)
    save_volume(tmp_path / "both.nii.gz", values)
    save_volume(tmp_path / "t1.nii.gz", values[..., 0])
    save_volume(tmp_path / "t2.nii", values[..., 1])
    save_volume(tmp_path / "m.nii.gz", np.ones((4, 5, 6), dtype=np.uint8))
    job = job_for(3, ["x", "y"], in_channels=2)
    one = read(
        manifest_for(tmp_path, spatial_dims=3, case={"image": ["both.nii.gz"], "label": ["m.nii.gz"]}), job
    )
    two = read(
        manifest_for(
            tmp_path, spatial_dims=3, case={"image": ["t1.nii.gz", "t2.nii"], "label": ["m.nii.gz"]}
        ),
        job,
    )
    assert one.image.shape == (2, 4, 5, 6)
    assert torch.equal(one.image, two.image)
    assert one.spacing_mm == (1.0, 2.0, 3.0)


def test_image_and_mask_are_turned_to_ras_together(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    affine = np.array([[0, 0, -3.0, 9], [-1.0, 0, 0, 1], [0, 2.0, 0, 0], [0, 0, 0, 1]])
    save_volume(tmp_path / "v.nii.gz", values, affine)
    save_volume(tmp_path / "m.nii.gz", (values == 23).astype(np.uint8), affine)
    case = {"image": ["v.nii.gz"], "label": ["m.nii.gz"]}
    sample = read(manifest_for(tmp_path, spatial_dims=3, case=case), job_for(3, ["x", "y"]))
    assert sample.image.shape == (1, 4, 2, 3)  # right, anterior, superior
    assert sample.spacing_mm == (3.0, 1.0, 2.0)
    assert sample.label is not None
    assert sample.label.nonzero().tolist() == [[0, 0, 2]]
    assert sample.image[0, 0, 0, 2] == sample.image.max()


def test_boxes_of_volumes_keep_the_files_axis_order(tmp_path: Path) -> None:
    affine = np.diag([-2.0, -2.0, 2.0, 1.0])
    save_volume(tmp_path / "v.nii.gz", np.random.default_rng(0).random((8, 9, 10)).astype(np.float32), affine)
    case = {"image": ["v.nii.gz"], "label": [], "boxes": [[1, 2, 3, 4, 6, 8]], "box_labels": [2]}
    manifest = manifest_for(tmp_path, task="detection", label_kind="boxes", spatial_dims=3, case=case)
    raw = read_raw(manifest, manifest.cases[0])
    job = job_for(3, ["x", "y"], "detection", spacing_mm=[1, 2, 4])
    sample = read(manifest, job)
    assert sample.image.shape == (1, 16, 9, 5) and raw.image.shape == (1, 8, 9, 10)
    assert sample.boxes is not None and sample.boxes.tolist() == [[2, 2, 1.5, 8, 6, 4]]
    assert sample.box_labels is not None and sample.box_labels.tolist() == [2]
    assert sample.label is None


def test_boxes_are_cut_at_the_edge_and_may_be_none(picture: Path) -> None:
    case: dict[str, Any] = {"label": [], "boxes": [[-2, 1, 20, 5]], "box_labels": [1]}
    manifest = manifest_for(picture, task="detection", label_kind="boxes", case=case)
    sample = read(manifest, job_for(2, ["x", "y"], "detection"))
    assert sample.boxes is not None and sample.boxes.tolist() == [[0, 1, 8, 5]]
    case |= {"boxes": [], "box_labels": []}
    empty = read(
        manifest_for(picture, task="detection", label_kind="boxes", case=case),
        job_for(2, ["x", "y"], "detection"),
    )
    assert empty.boxes is not None and empty.boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("boxes", "labels", "told"),
    [
        (None, None, "has no `boxes`"),
        ([[1, 1, 1, 3]], [1], "is empty or outside"),
        ([[9, 1, 12, 3]], [1], "is empty or outside"),
        ([[1, 1, 2, 3]], [3], "box label 3 is no class"),
        ([[1, 1, 2, 3]], [], "1 boxes but 0 box_labels"),
        ([[1, 1, 2]], [1], "needs 4 numbers"),
    ],
)
def test_a_bad_box_is_refused(picture: Path, boxes: Any, labels: Any, told: str) -> None:
    case = {"label": [], "boxes": boxes, "box_labels": labels}
    manifest = manifest_for(picture, task="detection", label_kind="boxes", case=case)
    with pytest.raises(DataError, match=told):
        read(manifest, job_for(2, ["x", "y"], "detection"))


def test_resampling_reports_the_voxel_size_it_reached(tmp_path: Path) -> None:
    save_volume(tmp_path / "v.nii.gz", np.random.default_rng(0).random((8, 8, 8)).astype(np.float32))
    mask = np.zeros((8, 8, 8), dtype=np.uint8)
    mask[2:6, 2:6, 2:6] = 2
    save_volume(tmp_path / "m.nii.gz", mask)
    case = {"image": ["v.nii.gz"], "label": ["m.nii.gz"]}
    job = job_for(3, ["x", "y"], spacing_mm=[2.0, 2.0, 2.2])
    sample = read(manifest_for(tmp_path, spatial_dims=3, case=case), job)
    assert sample.image.shape == (1, 4, 8, 11)
    assert sample.spacing_mm == pytest.approx((2.0, 2.0, 24 / 11))
    assert sample.label is not None
    assert set(sample.label.unique().tolist()) == {0, 2}
    assert int((sample.label == 2).sum()) == pytest.approx(64 * 11 / 16, rel=0.15)
    assert sample.image.mean() == pytest.approx(0, abs=1e-5)


def test_pictures_cannot_be_resampled(picture: Path) -> None:
    with pytest.raises(DataError, match="does not say how large a pixel is"):
        read(manifest_for(picture), job_for(2, ["x", "y"], spacing_mm=[1.0, 1.0]))


def test_instance_and_binary_masks_become_one_class(picture: Path) -> None:
    objects = np.zeros((6, 8), dtype=np.uint16)
    objects[0, 0], objects[3, 3] = 700, 3
    save_picture(picture / "mask.png", objects)
    other = np.zeros((6, 8), dtype=np.uint8)
    other[5, 5] = 255
    save_picture(picture / "mask2.png", other)
    manifest = manifest_for(picture, label_kind="instance", classes=["x"])
    sample = read(manifest, job_for(2, ["x"]))
    assert sample.label is not None and sample.label.nonzero().tolist() == [[0, 0], [3, 3]]
    manifest = manifest_for(
        picture, label_kind="binary", classes=["x"], case={"label": ["mask.png", "mask2.png"]}
    )
    united = read(manifest, job_for(2, ["x"]))
    assert united.label is not None and united.label.nonzero().tolist() == [[0, 0], [3, 3], [5, 5]]


def test_a_label_value_that_is_no_class_is_named_with_its_file(picture: Path) -> None:
    mask = np.zeros((6, 8), dtype=np.uint8)
    mask[1, 1] = 255
    save_picture(picture / "mask.png", mask)
    with pytest.raises(
        DataError, match=r"mask.png: mask value 255 is no class, expected 0 background, 1 x, 2 y"
    ):
        read(manifest_for(picture), job_for(2, ["x", "y"]))


@pytest.mark.parametrize(
    ("values", "told"),
    [(0.5, "must be integers, got 0.5"), (-1, "must be >= 0, got -1"), (np.nan, "not finite")],
)
def test_a_mask_must_hold_whole_numbers(tmp_path: Path, values: float, told: str) -> None:
    mask = np.zeros((4, 4, 4), dtype=np.float32)
    mask[0, 0, 0] = values
    save_volume(tmp_path / "v.nii.gz", np.ones((4, 4, 4), dtype=np.float32))
    save_volume(tmp_path / "m.nii.gz", mask)
    case = {"image": ["v.nii.gz"], "label": ["m.nii.gz"]}
    with pytest.raises(DataError, match=told):
        read(manifest_for(tmp_path, spatial_dims=3, case=case), job_for(3, ["x", "y"]))


def test_a_mask_of_another_shape_is_refused(picture: Path) -> None:
    save_picture(picture / "mask.png", np.zeros((8, 6), dtype=np.uint8))
    with pytest.raises(DataError, match=r"mask.png: shape \(8, 6\), but image.png has \(6, 8\)"):
        read(manifest_for(picture), job_for(2, ["x", "y"]))


def test_a_mask_elsewhere_in_space_is_refused(tmp_path: Path) -> None:
    save_volume(tmp_path / "v.nii.gz", np.ones((4, 4, 4), dtype=np.float32))
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    case = {"image": ["v.nii.gz"], "label": ["m.nii.gz"]}
    manifest = manifest_for(tmp_path, spatial_dims=3, case=case)
    affine[0, 3] = 0.05  # a twentieth of a voxel: rounding in a header
    save_volume(tmp_path / "m.nii.gz", np.ones((4, 4, 4), dtype=np.uint8), affine)
    read(manifest, job_for(3, ["x", "y"]))
    affine[0, 3] = 5
    save_volume(tmp_path / "m.nii.gz", np.ones((4, 4, 4), dtype=np.uint8), affine)
    with pytest.raises(DataError, match=r"lies 5 mm away from v.nii.gz"):
        read(manifest, job_for(3, ["x", "y"]))


def test_an_image_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    values = np.ones((4, 4, 4), dtype=np.float32)
    values[1, 1, 1] = np.nan
    save_volume(tmp_path / "v.nii.gz", values)
    save_volume(tmp_path / "m.nii.gz", np.ones((4, 4, 4), dtype=np.uint8))
    case = {"image": ["v.nii.gz"], "label": ["m.nii.gz"]}
    with pytest.raises(DataError, match=r"v.nii.gz: the image holds a value that is not finite"):
        read(manifest_for(tmp_path, spatial_dims=3, case=case), job_for(3, ["x", "y"]))


def test_a_damaged_file_is_one_line_that_names_it(picture: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job2, job3 = job_for(2, ["x", "y"]), job_for(3, ["x", "y"])
    whole = (picture / "image.png").read_bytes()
    for name, content in {
        "image.png": whole[: len(whole) // 2],
        "text.jpg": b"hello",
        "cut.tif": b"II*\0\x08\0\0\0",
        "empty.png": b"",
    }.items():
        (picture / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: cannot be read: ") as caught:
            read(manifest_for(picture, case={"image": [name]}), job2)
        assert "\n" not in str(caught.value)
    save_volume(picture / "v.nii.gz", np.random.default_rng(0).random((8, 8, 8)).astype(np.float32))
    packed = (picture / "v.nii.gz").read_bytes()
    plain = gzip.decompress(packed)
    for name, content in {
        "cut.nii.gz": packed[: len(packed) // 2],
        "header.nii.gz": packed[:40],
        "cut.nii": plain[:600],
        "wild.nii": b"x" * 400,
    }.items():
        (picture / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: "):
            read(manifest_for(picture, spatial_dims=3, case={"image": [name]}), job3)
    output = capfd.readouterr()
    assert output.out + output.err == ""


def test_an_absent_file_and_an_unknown_format_are_named(picture: Path) -> None:
    job = job_for(2, ["x", "y"])
    with pytest.raises(DataError, match=r"gone.png: no such file"):
        read(manifest_for(picture, case={"image": ["gone.png"]}), job)
    (picture / "image.xyz").write_bytes(b"1")
    with pytest.raises(DataError, match=r"unknown image format '.xyz'"):
        read(manifest_for(picture, case={"image": ["image.xyz"]}), job)


def test_a_data_set_of_other_dimensions_than_the_job_is_refused(picture: Path) -> None:
    with pytest.raises(DataError, match=r"the data has 2 axes, task.spatial_dims is 3"):
        read(manifest_for(picture), job_for(3, ["x", "y"]))


def test_a_segmentation_case_without_a_mask_is_refused(picture: Path) -> None:
    with pytest.raises(DataError, match="case one has no mask"):
        read(manifest_for(picture, case={"label": []}), job_for(2, ["x", "y"]))


def test_the_store_reads_once_and_drops_the_least_recently_used(tmp_path: Path) -> None:
    cases = []
    for name in "abc":
        save_picture(tmp_path / f"{name}.png", np.full((10, 10), ord(name), dtype=np.uint8))
        save_picture(tmp_path / f"{name}-mask.png", np.zeros((10, 10), dtype=np.uint8))
        case = {
            "id": name,
            "patient": name,
            "split": "train",
            "image": [f"{name}.png"],
            "label": [f"{name}-mask.png"],
        }
        cases.append(case)
    manifest = manifest_for(tmp_path, cases=cases)
    job = job_for(2, ["x", "y"])
    size = read_case(manifest, manifest.cases[0], job).size_bytes
    assert size == 10 * 10 * 5  # float32 image, uint8 mask
    store = CaseStore(manifest, job, limit_bytes=2 * size)
    first, second, third = manifest.cases
    kept = store.load(first)
    assert store.load(first) is kept
    other = store.load(second)
    assert store.load(first) is kept
    store.load(third)
    assert store.size_bytes == 2 * size
    assert store.load(first) is kept  # used after the second, so the second went
    assert store.load(second) is not other
    nothing = CaseStore(manifest, job, limit_bytes=0)
    assert nothing.load(first) is not nothing.load(first)
    assert nothing.size_bytes == 0
