"""Importers of boxes: small sources in every layout, their faults, and real ones."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedvision.data.assignment import Assignment
from fedvision.data.import_yolo import _yaml_names
from fedvision.data.sources import SourceOptions
from fedvision.errors import DataError
from tests.source_files import is_sound, only, picture, real, run, text


def coco_file(path: Path, names: list[str], annotations: list[dict[str, Any]], **changes: Any) -> Path:
    content = {
        "images": [
            {"id": 10 + n, "file_name": name, "width": 30, "height": 20} for n, name in enumerate(names)
        ],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "cell"}, {"id": 3, "name": "platelet"}],
    }
    return text(path, json.dumps(content | changes))


def test_coco_splits_boxes_and_faults(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for name in ("a", "b", "c", "d"):
        picture(source / ("train2017" if name < "c" else "val2017") / f"{name}.png")
    picture(source / "train2017" / "odd.png", (40, 40))
    coco_file(
        source / "annotations" / "instances_train2017.json",
        ["a.png", "b.png", "odd.png"],
        [
            {"image_id": 10, "category_id": 7, "bbox": [1, 2, 10.5, 5]},
            {"image_id": 10, "category_id": 3, "bbox": [25, 15, 10, 10]},
            {"image_id": 10, "category_id": 3, "bbox": [5, 5, 0, 4]},
            {"image_id": 10, "category_id": 3, "bbox": [5, 5, -3, 4]},
            {"image_id": 11, "category_id": 7, "bbox": [50, 2, 3, 3]},
            {"image_id": 11, "category_id": 7, "bbox": [0, 0, 30, 20], "iscrowd": 1},
        ],
    )
    coco_file(source / "annotations" / "instances_val2017.json", ["c.png", "d.png"], [])
    text(
        source / "annotations" / "captions_train2017.json",
        json.dumps({"images": [], "annotations": [{"caption": ""}]}),
    )
    imported = run("coco", source, tmp_path / "out")
    manifest = only(imported)
    assert manifest.classes == ("platelet", "cell")  # by id
    assert {case.id: case.split for case in manifest.cases} == {
        "a": "train",
        "b": "train",
        "odd": "train",
        "c": "val",
        "d": "val",
    }
    assert manifest.cases[0].boxes == ((1.0, 2.0, 11.5, 7.0), (25.0, 15.0, 30.0, 20.0))
    assert manifest.cases[0].box_labels == (2, 1)
    assert manifest.cases[1].boxes == ()
    notes = "\n".join(imported.notes)
    assert "1 crowd regions left out" in notes
    assert "2 boxes without area dropped (a.png)" in notes
    assert "1 box outside the picture dropped (b.png)" in notes
    assert "1 box cut at the picture's edge (a.png)" in notes
    assert "1 pictures have another size" in notes
    assert "has no test split" in notes
    assert is_sound(tmp_path / "out")


def test_one_coco_file_with_chosen_classes(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    annotations = [
        {"image_id": 10, "category_id": 7, "bbox": [1, 2, 3, 4]},
        {"image_id": 10, "category_id": 3, "bbox": [1, 2, 3, 4]},
    ]
    path = coco_file(tmp_path / "in" / "all.json", ["a.png"], annotations)
    imported = run("coco", path, tmp_path / "out", options=SourceOptions(("cell",)))
    assert only(imported).classes == ("cell",)
    assert only(imported).cases[0].box_labels == (1,)
    assert "1 boxes of classes that were not asked for left out" in imported.notes
    with pytest.raises(DataError, match="has no class 'virus'"):
        run("coco", path, tmp_path / "b", options=SourceOptions(("virus",)))


@pytest.mark.parametrize(
    ("annotation", "told"),
    [
        ({"image_id": 10, "category_id": 99, "bbox": [1, 2, 3, 4]}, "annotation 0 needs an image_id"),
        ({"image_id": 10, "category_id": 7, "bbox": [1, 2, 3]}, "annotation 0 needs an image_id"),
    ],
)
def test_a_malformed_coco_annotation_is_named(tmp_path: Path, annotation: dict[str, Any], told: str) -> None:
    picture(tmp_path / "a.png")
    path = coco_file(tmp_path / "x.json", ["a.png"], [annotation])
    with pytest.raises(DataError, match=told):
        run("coco", path, tmp_path / "out")


def test_a_picture_that_a_coco_file_names_must_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.png: no such picture below"):
        run("coco", coco_file(tmp_path / "x.json", ["gone.png"], []), tmp_path / "out")


def voc_xml(objects: list[tuple[str, tuple[float, ...]]], size: tuple[int, int] = (30, 20)) -> str:
    entries = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{b[0]}</xmin><ymin>{b[1]}</ymin><xmax>{b[2]}</xmax>"
        f"<ymax>{b[3]}</ymax></bndbox></object>"
        for name, b in objects
    )
    return (
        f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{entries}</annotation>"
    )


def pascal(source: Path) -> Path:
    for name, objects in {
        "a": [("cell", (1, 2, 11, 7)), ("virus", (5, 5, 5, 5))],
        "b": [("virus", (3, 3, 9, 9))],
        "c": [],
    }.items():
        picture(source / "VOC" / "JPEGImages" / f"{name}.jpg")
        text(source / "VOC" / "Annotations" / f"{name}.xml", voc_xml(objects))
    for split, names in {"train": "a", "val": "b", "test": "c", "trainval": "a\nb"}.items():
        text(source / "VOC" / "ImageSets" / "Main" / f"{split}.txt", names + "\n")
    return source


def test_pascal_voc_with_its_image_sets(tmp_path: Path) -> None:
    imported = run("voc", pascal(tmp_path / "in"), tmp_path / "out")
    manifest = only(imported)
    assert manifest.classes == ("cell", "virus")
    assert [case.split for case in manifest.cases] == ["train", "val", "test"]
    assert manifest.cases[0].boxes == ((1.0, 2.0, 11.0, 7.0),)
    assert manifest.cases[1].box_labels == (2,)
    assert "1 box without area dropped (a.jpg)" in imported.notes
    assert is_sound(tmp_path / "out")


def test_a_voc_case_in_no_list_stops_the_import(tmp_path: Path) -> None:
    source = pascal(tmp_path / "in")
    (source / "VOC" / "ImageSets" / "Main" / "test.txt").unlink()
    with pytest.raises(DataError, match=r"1 of 3 cases are in no split of the source \(c\)"):
        run("voc", source, tmp_path / "out")
    drawn = run("voc", source, tmp_path / "out", Assignment(site="a", fractions=(0.5, 0.25, 0.25)))
    assert Counter(case.split for case in only(drawn).cases) == {"train": 1, "val": 1, "test": 1}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("<annotation><object><name>x</name></object></annotation>", "needs <name> and <bndbox>"),
        ("<annotation>", "not XML"),
        ('<!DOCTYPE x [<!ENTITY a "aaaa">]><annotation/>', "document type"),
        (
            voc_xml([("x", (1, 2, 3, 4))]).replace("<xmin>1<", "<xmin>one<"),
            "expected a number in <xmin>, got 'one'",
        ),
    ],
)
def test_a_malformed_voc_file_is_named(tmp_path: Path, content: str, told: str) -> None:
    source = pascal(tmp_path / "in")
    text(source / "VOC" / "Annotations" / "b.xml", content)
    with pytest.raises(DataError, match=told) as caught:
        run("voc", source, tmp_path / "out")
    assert "b.xml" in str(caught.value)


def yolo(source: Path) -> Path:
    text(source / "classes.txt", "cell\nvirus\n")
    for site in ("east", "west"):
        for split in ("train", "val", "test"):
            for number in range(2):
                name = f"{site}-{split}-{number}"
                picture(source / site / "images" / split / f"{name}.jpg")
                if number == 0:
                    lines = "1 0.5 0.5 0.2 0.4 0.93\n"
                    text(source / site / "labels" / split / f"{name}.txt", lines)
    return source


def test_yolo_with_sites_splits_outlines_and_empty_pictures(tmp_path: Path) -> None:
    source = yolo(tmp_path / "in")
    line = source / "east" / "labels" / "train" / "east-train-0.txt"
    line.write_text("1 0.5 0.5 0.2 0.4\n0 0.1 0.1 0.4 0.1 0.4 0.3\n0 0.9 0.5 0 0.1\n\n")
    imported = run("yolo", source, tmp_path / "out", Assignment(sites_from_folders=True))
    east = imported.manifests[0]
    assert [one.site for one in imported.manifests] == ["east", "west"]
    assert east.classes == ("cell", "virus")
    first = next(case for case in east.cases if case.id == "east-train-0")
    assert first.boxes == ((12.0, 6.0, 18.0, 14.0), (3.0, 2.0, 12.0, 6.0))
    assert first.box_labels == (2, 1)
    assert next(case for case in east.cases if case.id == "east-train-1").boxes == ()
    assert Counter(case.split for case in east.cases) == {"train": 2, "val": 2, "test": 2}
    assert "6 pictures without a label file: taken as without objects" in imported.notes
    assert "1 box without area dropped (east-train-0.jpg)" in imported.notes
    assert is_sound(tmp_path / "out")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("2 0.5 0.5 0.1 0.1", "line 1: class 2, but there are 2 classes"),
        ("nan 0.5 0.5 0.1 0.1", "line 1: class nan"),
        ("0 0.5 0.5 0.1", "line 1: expected class x y width height, got 4 numbers"),
        ("0 a b c d", "line 1: expected numbers"),
        ("0 50 50 10 10", "shares of the picture are 0..1"),
    ],
)
def test_a_malformed_yolo_line_is_named(tmp_path: Path, line: str, told: str) -> None:
    source = yolo(tmp_path / "in")
    text(source / "east" / "labels" / "train" / "east-train-0.txt", line)
    with pytest.raises(DataError, match=told) as caught:
        run("yolo", source, tmp_path / "out")
    assert "east-train-0.txt" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        "path: x\nnames: ['red cell', \"virus\"]\nnc: 2\n",
        "names: [red cell, virus]  # two\n",
        "names:\n  - red cell\n  - virus # small\nnc: 2\n",
        "names:\n- 'red cell'\n- virus\ntrain: x\n",
        "# names: [a]\nnames:\n  0: red cell\n  1: virus\ntrain: images\n",
        "names: {0: red cell, 1: 'virus'}\n",
        "names: [\n  'red cell',\n  'virus',\n]\n",
    ],
)
def test_every_way_to_write_yolo_names_is_read(content: str) -> None:
    assert _yaml_names(content, Path("data.yaml")) == ("red cell", "virus")


@pytest.mark.parametrize("content", ["nc: 2\n", "names:\nnc: 2\n", "names:\n  1: a\n  2: b\n"])
def test_yolo_names_that_say_nothing_are_refused(content: str) -> None:
    with pytest.raises(DataError, match="names"):
        _yaml_names(content, Path("data.yaml"))


def test_real_blood_cells_are_imported(tmp_path: Path) -> None:
    imported = run("yolo", real("bloodcells_3site"), tmp_path, Assignment(sites_from_folders=True))
    totals = {}
    for manifest in imported.manifests:
        assert [len(manifest.in_split(split)) for split in ("train", "val", "test")] == [150, 44, 27]
        labels = Counter(label for case in manifest.cases for label in case.box_labels or ())
        totals[manifest.site] = [labels[1], labels[2], labels[3]]
    assert totals == {
        "bccd": [231, 5130, 246],
        "pbc_barcelona": [241, 3627, 150],
        "raabin_iran": [233, 2780, 11],
    }


def test_real_bccd_is_imported_without_its_two_empty_boxes(tmp_path: Path) -> None:
    imported = run("voc", real("bccd"), tmp_path)
    manifest = only(imported)
    assert [len(manifest.in_split(split)) for split in ("train", "val", "test")] == [205, 87, 72]
    assert sum(len(case.boxes or ()) for case in manifest.cases) == 4886
    assert "2 boxes without area dropped (BloodImage_00338.jpg, BloodImage_00343.jpg)" in imported.notes
