"""Folders of images beside folders of masks, and the layout of the 2018 Data Science Bowl.

- ``masks``: somewhere below the source, folders ``images`` and ``labels`` (or ``masks``, ...) lie side by
  side, and an image and its mask have the same name. Any format, 2D or 3D.
- ``dsb``: one folder a case with ``images/`` holding one picture and ``masks/`` one file an object.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from fedvision.data.images import NIFTI_SUFFIXES, TIFF_SUFFIXES, file_stem, file_suffix, read_grid
from fedvision.data.progress import tracked
from fedvision.data.sources import (
    Found,
    LabelKind,
    Source,
    SourceOptions,
    first_names,
    folders_below,
    image_files,
    relative_name,
    split_in_path,
)
from fedvision.errors import DataError

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "imagestr", "jpegimages")
MASK_FOLDERS = (
    "labels", "label", "masks", "mask", "labelstr", "annotations", "segmentations", "segmentation", "gt",
    "groundtruth", "ground_truth", "segmentationclass",
)  # fmt: skip
MASK_ENDINGS = ("_mask", "_masks", "_label", "_labels", "_seg", "_segmentation", "_gt")
LOOKED_AT = 40


def _mask_table(folder: Path) -> dict[str, Path]:
    """Return the masks of a folder by the name that their image has, sub-folders included."""
    table: dict[str, Path] = {}
    for path in image_files(folder):
        place = path.parent.relative_to(folder).as_posix()
        stem = file_stem(path)
        table[f"{place}/{stem}"] = path
        for ending in MASK_ENDINGS:
            if stem.lower().endswith(ending):
                table.setdefault(f"{place}/{stem[: -len(ending)]}", path)
    return table


def _pairs_in(folder: Path) -> tuple[list[tuple[Path, Path]], list[Path]]:
    """Return pairs of image and mask in the sub-folders of one folder, and the images without a mask."""
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    tables = [_mask_table(path) for path in inside if path.name.lower() in MASK_FOLDERS]
    pairs, alone = [], []
    for images in (path for path in inside if path.name.lower() in IMAGE_FOLDERS):
        files = image_files(images)
        keys = [f"{path.parent.relative_to(images).as_posix()}/{file_stem(path)}" for path in files]
        table = max(tables, key=lambda t: sum(key in t for key in keys), default={})
        for path, key in zip(files, keys, strict=True):
            if key in table:
                pairs.append((path, table[key]))
            else:
                alone.append(path)
    return pairs, alone


def _dims_of(path: Path) -> Literal[2, 3]:
    """Return 3 for a volume and 2 for a picture; a TIFF stack is a volume."""
    if file_suffix(path) in NIFTI_SUFFIXES:
        return 3
    if file_suffix(path) in TIFF_SUFFIXES:
        try:
            read_grid(path, 2)
        except DataError:
            read_grid(path, 3)
            return 3
    return 2


def _values_of(masks: list[Path], dims: int) -> set[int]:
    """Return the values above 0 in some masks, spread over the list."""
    step = max(1, len(masks) // LOOKED_AT)
    some = masks[::step]
    values: set[int] = set()
    for path in tracked(some, "looking at masks", len(some)):
        values.update(int(value) for value in np.unique(read_grid(path, dims, is_mask=True).array[:3]))
    return values - {0}


def _kind_and_classes(
    options: SourceOptions, masks: list[Path], dims: int
) -> tuple[LabelKind, tuple[str, ...], list[str]]:
    """Decide what a mask value means.

    Returns:
        The kind, the classes, and notes on what was assumed.

    Raises:
        DataError: The masks hold several values and the user has not said what they mean.
    """
    kind, classes = options.label_kind, options.classes
    if kind == "boxes":
        raise DataError("masks are semantic, binary or instance, got boxes")
    if kind in ("binary", "instance") and len(classes) > 1:
        raise DataError(
            f"{kind} masks have one class, got {', '.join(classes)}", "give --label-kind semantic or one name"
        )
    if kind == "semantic" and not classes:
        raise DataError("semantic masks need the names of their classes", "give --classes, value 1 first")
    if kind is None and len(classes) > 1:
        kind = "semantic"
    notes = []
    if kind is None:
        values = _values_of(masks, dims)
        if len(values) > 1:
            shown = ", ".join(map(str, sorted(values)[:5])) + (", ..." if len(values) > 5 else "")
            raise DataError(
                f"the masks hold the values {shown}: are they classes or objects?",
                "give --label-kind semantic and --classes, or --label-kind instance",
            )
        kind = "binary"
        notes.append("the masks hold one value above 0: taken as binary")
    if not classes:
        classes = ("foreground",)
        notes.append("no --classes given: the class is called foreground")
    return kind, classes, notes


def find_masks(source: Path, options: SourceOptions) -> Source:
    """Read folders of images beside folders of masks with equal names.

    Raises:
        DataError: No pair is found, or the meaning of the mask values is not known.
    """
    found, alone, strange = [], [], []
    for folder in folders_below(source):
        pairs, single = _pairs_in(folder)
        if single and not pairs:
            strange.append(relative_name(folder, source))
            continue
        alone += [path.name for path in single]
        for image, mask in pairs:
            relative = relative_name(image, source)
            found.append(Found((image,), relative, (mask,), split=split_in_path(relative)))
    if not found:
        raise DataError(
            f"{source}: no folders `images` and `labels` (or `masks`) with files of equal names",
            "one folder a case with images/ and masks/ is the format `dsb`" if strange else "",
        )
    dims = _dims_of(found[0].image[0])
    kind, classes, notes = _kind_and_classes(options, [case.label[0] for case in found], dims)
    if alone:
        notes.append(f"{len(alone)} images without a mask left out ({first_names(alone)})")
    if strange:
        notes.append(
            f"{len(strange)} folders left out, no mask there is named as an image ({first_names(strange)})"
        )
    return Source("segmentation", dims, classes, kind, tuple(found), tuple(notes))


def find_dsb(source: Path, options: SourceOptions) -> Source:
    """Read one folder a case: ``images/`` with one picture, ``masks/`` with one file an object.

    Raises:
        DataError: There is no such folder, or one has several pictures.
    """
    found, alone = [], []
    for folder in folders_below(source):
        if not (folder / "images").is_dir():
            continue
        images = image_files(folder / "images")
        masks = image_files(folder / "masks") if (folder / "masks").is_dir() else []
        if not masks:
            alone.append(folder.name)
            continue
        if len(images) != 1:
            raise DataError(
                f"{folder / 'images'}: expected one picture, got {len(images)}",
                "folders of images beside folders of masks are the format `masks`",
            )
        relative = relative_name(images[0], source)
        found.append(
            Found((images[0],), relative, tuple(masks), split=split_in_path(relative), name=folder.name)
        )
    if not found:
        raise DataError(f"{source}: no folder with images/ and masks/ in it")
    if len(options.classes) > 1 or options.label_kind not in (None, "binary"):
        raise DataError(
            "the format `dsb` has one class and binary masks", "give --classes one name, such as nucleus"
        )
    notes = []
    if alone:
        notes.append(f"{len(alone)} cases without masks left out ({first_names(alone)})")
    return Source("segmentation", 2, options.classes or ("nucleus",), "binary", tuple(found), tuple(notes))
