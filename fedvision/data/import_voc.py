"""Pascal VOC: ``Annotations/*.xml`` with a box an object, ``JPEGImages``, ``ImageSets/Main/*.txt``.

The corners are taken as they stand. The first VOC data sets counted pixels from 1, both corners within
the box; the tools that write this format today give edges. The difference is one pixel.
"""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from fedvision.data.manifest import Split
from fedvision.data.progress import tracked
from fedvision.data.sources import (
    Box,
    BoxTally,
    Found,
    Source,
    SourceOptions,
    choose_classes,
    file_stem,
    first_names,
    folders_below,
    image_files,
    picture_size,
    relative_name,
    split_in_path,
)
from fedvision.data.splits import split_named
from fedvision.errors import DataError

IMAGE_SETS = "ImageSets/Main"


def _number(element: ElementTree.Element | None, tag: str, path: Path) -> float:
    text = element.findtext(tag) if element is not None else None
    try:
        return float(text or "")
    except ValueError:
        raise DataError(f"{path}: expected a number in <{tag}>, got {text!r}") from None


def _read_annotation(path: Path) -> tuple[tuple[float, float] | None, list[tuple[str, Box]]]:
    """Return the picture's size that the file states, if any, and class and box of each object."""
    try:
        content = path.read_bytes()
        if b"<!ENTITY" in content or b"<!DOCTYPE" in content:
            raise DataError(f"{path}: holds a document type, which no annotation needs")
        root = ElementTree.fromstring(content)  # noqa: S314, entities are refused above
    except OSError as error:
        raise DataError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: not XML: {error}") from None
    size = root.find("size")
    stated = (_number(size, "width", path), _number(size, "height", path)) if size is not None else None
    objects = []
    for entry in root.iter("object"):
        name, box = (entry.findtext("name") or "").strip(), entry.find("bndbox")
        if not name or box is None:
            raise DataError(f"{path}: an object needs <name> and <bndbox>")
        corners = tuple(_number(box, tag, path) for tag in ("xmin", "ymin", "xmax", "ymax"))
        objects.append((name, corners))
    return stated, objects


def _image_sets(folder: Path) -> dict[str, Split]:
    """Return the split of each picture that ``ImageSets/Main`` names; ``trainval`` and others say nothing."""
    splits: dict[str, Split] = {}
    for path in sorted((folder / IMAGE_SETS).glob("*.txt")):
        split = split_named(path.stem)
        if split is None:
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words and splits.setdefault(words[0], split) != split:
                raise DataError(f"{path}: {words[0]} is also in {splits[words[0]]}")
    return splits


def _pictures_beside(annotations: Path) -> dict[str, Path]:
    """Return the pictures that belong to a folder of annotations, by stem."""
    for name in ("JPEGImages", "images", "Images", "."):
        folder = annotations.parent / name
        if folder.is_dir() and (files := image_files(folder)):
            return {file_stem(path): path for path in files}
    return {}


def find_voc(source: Path, options: SourceOptions) -> Source:
    """Read Pascal VOC annotations, wherever below the source their folders lie.

    Args:
        source: A folder with ``Annotations`` in it or further below.
        options: ``classes`` chooses and orders the classes; else all that occur, by name.

    Raises:
        DataError: There is no annotation, a picture is absent, or an annotation is malformed.
    """
    folders = [folder for folder in folders_below(source) if any(folder.glob("*.xml"))]
    if not folders:
        raise DataError(f"{source}: no *.xml below", "Pascal VOC keeps them in Annotations/")
    paths = [(path, folder) for folder in folders for path in sorted(folder.glob("*.xml"))]
    pictures = {folder: _pictures_beside(folder) for folder in folders}
    sets = {folder: _image_sets(folder.parent) for folder in folders}
    read = [
        (path, folder, *_read_annotation(path)) for path, folder in tracked(paths, "reading XML", len(paths))
    ]
    names = sorted({name for *_, objects in read for name, _ in objects})
    if not names:
        raise DataError(f"{source}: no annotation holds an object")
    labels = choose_classes(names, options.classes, source)
    tally, found, absent = BoxTally(), [], []
    for path, folder, stated, objects in tracked(read, "reading pictures", len(read)):
        picture = pictures[folder].get(path.stem)
        if picture is None:
            absent.append(path.stem)
            continue
        size = picture_size(picture)
        # Some tools write 0 x 0 for a size that they do not know.
        if stated not in (None, (0.0, 0.0), size):
            tally.other_size.append(picture.name)
        tally.other_class += sum(name not in labels for name, _ in objects)
        kept = [
            (cut, labels[name])
            for name, box in objects
            if name in labels and (cut := tally.clean(box, size, picture.name))
        ]
        relative = relative_name(picture, source)
        found.append(
            Found(
                (picture,),
                relative,
                boxes=tuple(box for box, _ in kept),
                box_labels=tuple(label for _, label in kept),
                split=sets[folder].get(path.stem) or split_in_path(relative),
            )
        )
    if absent:
        raise DataError(
            f"{source}: no picture for {len(absent)} of {len(read)} annotations ({first_names(absent)})",
            "Pascal VOC keeps them in JPEGImages/ beside Annotations/",
        )
    return Source("detection", 2, tuple(labels), "boxes", tuple(found), tuple(tally.notes()))
