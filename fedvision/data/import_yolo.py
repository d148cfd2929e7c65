"""YOLO: a text file a picture, one line an object: class, then centre and size as shares of the picture.

The labels of ``.../images/.../a.jpg`` are ``.../labels/.../a.txt``, or ``a.txt`` beside the picture. A
picture without such a file has no objects. Names are in ``data.yaml`` or ``classes.txt``. A line with more
numbers is an outline (the segmentation form): its bounds are taken.
"""

import re
from pathlib import Path

from fedvision.data.images import file_stem
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
from fedvision.errors import DataError

NAME_FILES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names", "classes.names")


def _plain(text: str) -> str:
    """Return a YAML scalar without its comment and quotes."""
    text = text.strip()
    if text[:1] in {"'", '"'}:
        return text[1 : text.index(text[0], 1)] if text[0] in text[1:] else text[1:]
    return text.split(" #")[0].strip()


def _yaml_names(text: str, path: Path) -> tuple[str, ...]:
    """Return ``names`` of a YOLO data file: a list in brackets, a list in lines, or ``0: name`` lines.

    This reads that one key, not YAML; the rest of the file is of no use here.
    """
    match = re.search(r"^names\s*:[ \t]*(.*)$", text, re.MULTILINE)
    if match is None:
        raise DataError(f"{path}: has no `names`")
    rest = text[match.start(1) :]
    if rest.lstrip()[:1] in {"[", "{"}:
        opened = rest.lstrip()
        closed = opened.find("]" if opened[0] == "[" else "}")
        inner = opened[1:closed].replace("\n", " ")
        parts = re.findall(r"""'[^']*'|"[^"]*"|[^,]+""", inner) if closed > 0 else []
        items = [part.strip() for part in parts if part.strip()]
        if opened[0] == "[":
            return tuple(_plain(item) for item in items)
    else:
        items = []
        for line in rest.splitlines()[1:]:
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            if not line.startswith((" ", "\t", "-")):
                break
            items.append(line.strip())
        if items and all(item.startswith("-") for item in items):
            return tuple(_plain(item[1:]) for item in items)
    pairs = [item.split(":", 1) for item in items]
    try:
        by_number = {int(_plain(pair[0])): _plain(pair[1]) for pair in pairs}
    except (ValueError, IndexError):
        by_number = {}
    if not by_number or sorted(by_number) != list(range(len(by_number))):
        raise DataError(f"{path}: `names` must be a list, or number the classes 0, 1, 2, ...")
    return tuple(by_number[number] for number in range(len(by_number)))


def _class_names(source: Path) -> tuple[tuple[str, ...], Path]:
    """Return the names of the classes and the file that has them."""
    for folder in (source, *sorted(path for path in source.iterdir() if path.is_dir())):
        for name in NAME_FILES:
            path = folder / name
            if not path.is_file():
                continue
            text = path.read_text(encoding="utf-8-sig")
            if path.suffix in {".yaml", ".yml"}:
                return _yaml_names(text, path), path
            return tuple(line.strip() for line in text.splitlines() if line.strip()), path
    raise DataError(f"{source}: neither data.yaml nor classes.txt", "write classes.txt with one name a line")


def _label_file(picture: Path, source: Path) -> Path:
    """Return where the label file of a picture would be."""
    parts = list(picture.relative_to(source).parts[:-1])
    for number in reversed(range(len(parts))):
        if parts[number].lower() == "images":
            parts[number] = "labels" if parts[number] == "images" else "Labels"
            return source.joinpath(*parts, file_stem(picture) + ".txt")
    return picture.with_name(file_stem(picture) + ".txt")


def _read_lines(path: Path, num_classes: int) -> list[tuple[int, Box]]:
    """Return class number and box (x1, y1, x2, y2), as shares of the picture, for each line of a file.

    Raises:
        DataError: A line is not of the form; the message names it.
    """
    objects: list[tuple[int, Box]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file") from None
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        try:
            kind, *values = float(words[0]), *map(float, words[1:])
        except ValueError:
            raise DataError(f"{path}: line {number}: expected numbers, got {line.strip()!r}") from None
        if not kind.is_integer() or not 0 <= kind < num_classes:
            raise DataError(
                f"{path}: line {number}: class {words[0]}, but there are {num_classes} classes (from 0)"
            )
        if len(values) in (4, 5):
            x, y, width, height = values[:4]
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        elif len(values) >= 6 and len(values) % 2 == 0:
            box = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
        else:
            raise DataError(
                f"{path}: line {number}: expected class x y width height, got {len(words)} numbers"
            )
        if max(map(abs, box)) > 2:
            raise DataError(f"{path}: line {number}: shares of the picture are 0..1, got {line.strip()!r}")
        objects.append((int(kind), box))
    return objects


def find_yolo(source: Path, options: SourceOptions) -> Source:
    """Read YOLO labels, in any of the usual arrangements of splits and sites below the source.

    Args:
        source: The folder with ``data.yaml`` or ``classes.txt``.
        options: ``classes`` chooses and orders the classes; else all, as numbered.

    Raises:
        DataError: Names are absent, there is no label file at all, or a line is malformed.
    """
    names, where = _class_names(source)
    labels = choose_classes(names, options.classes, where)
    pictures = image_files(source)
    tally, found, without = BoxTally(), [], []
    for picture in tracked(pictures, "reading labels", len(pictures)):
        path = _label_file(picture, source)
        size = picture_size(picture)
        kept = []
        if path.is_file():
            for number, shares in _read_lines(path, len(names)):
                box = tuple(share * side for share, side in zip(shares, size * 2, strict=True))
                if names[number] not in labels:
                    tally.other_class += 1
                elif cut := tally.clean(box, size, picture.name):
                    kept.append((cut, labels[names[number]]))
        else:
            without.append(picture.name)
        relative = relative_name(picture, source)
        found.append(
            Found(
                (picture,),
                relative,
                boxes=tuple(box for box, _ in kept),
                box_labels=tuple(label for _, label in kept),
                split=split_in_path(relative),
            )
        )
    if len(without) == len(found):
        raise DataError(
            f"{source}: no label file for any of {len(found)} pictures",
            "the labels of images/a.jpg are labels/a.txt",
        )
    notes = tally.notes()
    if without:
        notes.insert(0, f"{len(without)} pictures without a label file: taken as without objects")
    return Source("detection", 2, tuple(labels), "boxes", tuple(found), tuple(notes))
