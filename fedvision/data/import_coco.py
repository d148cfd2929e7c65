"""COCO: one JSON file with images, categories and annotations for a whole split.

A source is such a file, or a folder with several, one a split (``instances_train.json``,
``valid/_annotations.coco.json``, ...). A box is [x, y, width, height] with x along the columns.
"""

import json
from pathlib import Path
from typing import Any

from fedvision.data.images import IMAGE_SUFFIXES
from fedvision.data.progress import tracked
from fedvision.data.sources import (
    Box,
    BoxTally,
    Found,
    Source,
    SourceOptions,
    choose_classes,
    image_files,
    picture_size,
    relative_name,
    split_in_path,
)
from fedvision.data.splits import SPLIT_NAMES
from fedvision.errors import DataError


def _load(path: Path) -> dict[str, Any] | None:
    """Return the content of a COCO detection file, or None if the file is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    except ValueError:
        return None
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= set(content):
        return None
    annotations = content["annotations"]
    if annotations and not any(isinstance(entry, dict) and "bbox" in entry for entry in annotations):
        return None
    return content


def _coco_files(source: Path) -> dict[Path, dict[str, Any]]:
    """Return the COCO files of a source; of several kinds, the ones named ``instances``."""
    if source.is_file():
        content = _load(source)
        if content is None:
            raise DataError(
                f"{source}: not a COCO file", "it needs images, annotations with bbox, and categories"
            )
        return {source: content}
    paths = [path for path in sorted(source.rglob("*.json")) if not path.name.startswith(".")]
    files = {path: content for path in paths if (content := _load(path)) is not None}
    instances = {path: content for path, content in files.items() if path.name.startswith("instances")}
    if not files:
        raise DataError(
            f"{source}: no COCO file below", "it needs images, annotations with bbox, and categories"
        )
    return instances or files


def _split_of(path: Path, source: Path) -> Any:
    """Return the split that a COCO file is of, from its folders or its name."""
    inside = split_in_path(relative_name(path, source))
    words = path.stem.lower().replace("-", "_").replace(".", "_").split("_")
    named = [SPLIT_NAMES[bare] for word in words if (bare := word.rstrip("0123456789")) in SPLIT_NAMES]
    return named[-1] if named else inside


class _Pictures:
    """Finds the pictures that a COCO file names; they lie beside it or anywhere below the source."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._by_name: dict[str, list[Path]] | None = None

    def find(self, name: str, beside: Path) -> Path:
        """Return the path of a picture.

        Raises:
            DataError: It is nowhere, or at several places.
        """
        for place in (beside, self._folder, self._folder / "images", beside / "images"):
            if (place / name).is_file():
                return place / name
        if self._by_name is None:
            self._by_name = {}
            for path in image_files(self._folder):
                self._by_name.setdefault(path.name, []).append(path)
        places = self._by_name.get(Path(name).name, [])
        if len(places) > 1:
            places = [path for path in places if path.as_posix().endswith("/" + name)] or places
        if len(places) != 1:
            what = f"{len(places)} pictures have that name" if places else "no such picture"
            raise DataError(f"{beside}: {name}: {what} below {self._folder}", "is the source complete?")
        return places[0]


def _classes_of(files: dict[Path, dict[str, Any]]) -> dict[Any, str]:
    """Return class names by category id; every file must say the same."""
    first: dict[Any, str] = {}
    for path, content in files.items():
        try:
            names = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        except (TypeError, KeyError):
            raise DataError(f"{path}: a category needs `id` and `name`") from None
        if first and names != first:
            raise DataError(
                f"{path}: its categories differ from those of {next(iter(files)).name}",
                "import the files one by one, with --classes",
            )
        first = names
    return dict(sorted(first.items(), key=lambda item: str(item[0]).zfill(12)))


def find_coco(source: Path, options: SourceOptions) -> Source:
    """Read COCO detection files. Crowd regions are left out: they are no single object.

    Args:
        source: A COCO file or a folder with some.
        options: ``classes`` chooses and orders the categories; else all, by id.

    Raises:
        DataError: There is no COCO file, a picture is absent, or an annotation is malformed.
    """
    files = _coco_files(source)
    names = _classes_of(files)
    labels = choose_classes(tuple(names.values()), options.classes, source)
    folder = source.parent if source.is_file() else source
    pictures, tally = _Pictures(folder), BoxTally()
    found: list[Found] = []
    notes: list[str] = []
    crowds = 0
    for path, content in files.items():
        boxes_of: dict[Any, list[tuple[Box, int]]] = {}
        for number, entry in enumerate(content["annotations"]):
            try:
                x, y, width, height = (float(value) for value in entry["bbox"])
                name, image_id = names[entry["category_id"]], entry["image_id"]
            except (TypeError, KeyError, ValueError):
                raise DataError(
                    f"{path}: annotation {number} needs an image_id, the category_id of a category, "
                    "and a bbox of 4 numbers"
                ) from None
            if entry.get("iscrowd"):
                crowds += 1
            elif name not in labels:
                tally.other_class += 1
            else:
                # A negative width is a fault of the source: it becomes a box without area.
                corner = (x + max(width, 0.0), y + max(height, 0.0))
                boxes_of.setdefault(image_id, []).append(((x, y, *corner), labels[name]))
        entries = content["images"]
        for entry in tracked(entries, f"reading {path.name}", len(entries)):
            try:
                file_name, image_id = str(entry["file_name"]), entry["id"]
            except (TypeError, KeyError):
                raise DataError(f"{path}: an image needs `id` and `file_name`") from None
            if Path(file_name).suffix.lower() not in IMAGE_SUFFIXES:
                raise DataError(f"{path}: {file_name}: unknown image format")
            picture = pictures.find(file_name, path.parent)
            size = picture_size(picture)
            if (entry.get("width", size[0]), entry.get("height", size[1])) != size:
                tally.other_size.append(picture.name)
            kept = [
                (cut, k)
                for box, k in boxes_of.get(image_id, ())
                if (cut := tally.clean(box, size, picture.name))
            ]
            found.append(
                Found(
                    (picture,),
                    relative_name(picture, folder),
                    boxes=tuple(box for box, _ in kept),
                    box_labels=tuple(label for _, label in kept),
                    split=_split_of(path, folder),
                )
            )
    if not found:
        raise DataError(f"{source}: names no image")
    if crowds:
        notes.append(f"{crowds} crowd regions left out")
    return Source("detection", 2, tuple(labels), "boxes", tuple(found), (*notes, *tally.notes()))
