"""The layout of the Medical Segmentation Decathlon, and nnU-Net's raw data, which descends from it.

- Decathlon: ``dataset.json`` with a list ``training`` of image and label pairs, ``labels`` from value to
  name, several modalities as the fourth axis of one file.
- nnU-Net: ``labels`` from name to value, one file a channel (``<case>_0000``, ``_0001``, ...), and in its
  second version no list: the cases are what lies in ``labelsTr``.

Both keep test images without labels, which are of no use here and are left out.
"""

import json
from pathlib import Path
from typing import Any

from fedvision.data.images import NIFTI_SUFFIXES, file_stem, file_suffix
from fedvision.data.sources import (
    Found,
    Source,
    SourceOptions,
    choose_classes,
    first_names,
    image_files,
    relative_name,
    split_in_path,
)
from fedvision.errors import DataError


def _class_names(labels: Any, where: Path) -> tuple[str, ...]:
    """Return the foreground classes in the order of their values, from either form of ``labels``."""
    if not isinstance(labels, dict) or not labels:
        raise DataError(f"{where}: `labels` must name the value of each class")
    try:
        if all(str(key).isdigit() for key in labels):
            by_value = {int(key): str(name) for key, name in labels.items()}
        else:
            by_value = {int(value): str(name) for name, value in labels.items()}
    except (TypeError, ValueError):
        raise DataError(
            f"{where}: `labels` must be whole numbers, got {labels}", "regions of nnU-Net are not supported"
        ) from None
    by_value.pop(0, None)
    if sorted(by_value) != list(range(1, len(by_value) + 1)):
        raise DataError(
            f"{where}: label values must be 1, 2, 3, ... without a gap, got {sorted(by_value)}",
            "renumber the masks and dataset.json",
        )
    return tuple(by_value[value] for value in sorted(by_value))


def _channel_files(image: Path) -> tuple[Path, ...]:
    """Return the files of an image: itself, or nnU-Net's one file a channel."""
    if image.is_file():
        return (image,)
    stem, suffix = file_stem(image), file_suffix(image)
    files: list[Path] = []
    while (path := image.with_name(f"{stem}_{len(files):04d}{suffix}")).is_file():
        files.append(path)
    if not files:
        raise DataError(f"{image}: no such file", "is the source complete?")
    return tuple(files)


def _pairs(content: dict[str, Any], source: Path, where: Path) -> list[tuple[Path, Path]]:
    """Return image and label of every training case as the source names them."""
    listed = content.get("training")
    if listed is None:
        return [(source / "imagesTr" / label.name, label) for label in image_files(source / "labelsTr")]
    pairs = []
    for entry in listed if isinstance(listed, list) else [listed]:
        if not isinstance(entry, dict) or not {"image", "label"} <= set(entry):
            raise DataError(f"{where}: `training` must list pairs of image and label, got {entry!r}")
        pairs.append((source / str(entry["image"]), source / str(entry["label"])))
    return pairs


def find_msd(source: Path, options: SourceOptions) -> Source:
    """Read a data set in the layout of the Medical Segmentation Decathlon or of nnU-Net.

    Args:
        source: The folder with ``dataset.json``, or that file.
        options: ``classes`` renames the classes, in the order of their values.

    Raises:
        DataError: ``dataset.json`` is absent or wrong, or a file that it names is absent.
    """
    where = source if source.is_file() else source / "dataset.json"
    source = where.parent
    try:
        content = json.loads(where.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"cannot read {where}: {(error.strerror or str(error)).lower()}",
            "a Decathlon task holds dataset.json",
        ) from None
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{where}: expected an object with `labels` and `training`")
    classes = _class_names(content.get("labels"), where)
    if options.classes:
        if len(options.classes) != len(classes):
            raise DataError(
                f"{where}: has {len(classes)} classes ({', '.join(classes)}), "
                f"got {len(options.classes)} names"
            )
        classes = options.classes
    choose_classes(classes, (), where)
    pairs = _pairs(content, source, where)
    if not pairs:
        raise DataError(f"{where}: names no training case")
    absent = [label.name for _, label in pairs if not label.is_file()]
    if absent:
        raise DataError(
            f"{where}: {len(absent)} of {len(pairs)} label files are absent ({first_names(absent)})",
            "is the source complete?",
        )
    found = []
    for image, label in pairs:
        files = _channel_files(image)
        relative = relative_name(files[0], source)
        found.append(Found(files, relative, (label,), split=split_in_path(relative), name=file_stem(label)))
    notes = []
    if content.get("test") or (source / "imagesTs").is_dir():
        notes.append("the source's test images have no labels and are left out")
    is_volume = file_suffix(found[0].image[0]) in NIFTI_SUFFIXES
    return Source("segmentation", 3 if is_volume else 2, classes, "semantic", tuple(found), tuple(notes))
