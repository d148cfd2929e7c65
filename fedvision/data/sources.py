"""What every importer finds in a source, in one form, before sites, patients and splits are known."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fedvision.data.images import IMAGE_SUFFIXES, file_stem, file_suffix
from fedvision.data.manifest import Split
from fedvision.data.splits import split_named
from fedvision.errors import DataError

Box = tuple[float, ...]
LabelKind = Literal["semantic", "binary", "instance", "boxes"]


@dataclass(frozen=True)
class SourceOptions:
    """What the user said about the source.

    Attributes:
        classes: Names of the foreground classes; () to take the source's own.
        label_kind: What a mask value means; None to look.
    """

    classes: tuple[str, ...] = ()
    label_kind: LabelKind | None = None


@dataclass(frozen=True)
class Found:
    """One image with its label.

    Attributes:
        image: One file, or one a channel.
        relative: The first image file below the source, with "/", for people and for joins.
        label: Mask files; () for detection.
        boxes: In the manifest's form; None for segmentation.
        box_labels: One a box, 1 is the first class; None for segmentation.
        split: The source's own, None if it has none.
    """

    image: tuple[Path, ...]
    relative: str
    label: tuple[Path, ...] = ()
    boxes: tuple[Box, ...] | None = None
    box_labels: tuple[int, ...] | None = None
    split: Split | None = None
    name: str = ""

    @property
    def stem(self) -> str:
        """The case's name in the source: of its folder or list if that has one, else of its file."""
        return self.name or file_stem(self.image[0])


@dataclass(frozen=True)
class Source:
    """A whole data set as its owner laid it out.

    Attributes:
        task: "segmentation" or "detection".
        spatial_dims: 2 or 3.
        classes: Foreground classes in the order of their label values.
        label_kind: As in the manifest.
        found: In the order of their paths.
        notes: What the user should know, such as how many boxes were dropped and why.
    """

    task: Literal["segmentation", "detection"]
    spatial_dims: Literal[2, 3]
    classes: tuple[str, ...]
    label_kind: LabelKind
    found: tuple[Found, ...]
    notes: tuple[str, ...] = ()


def image_files(folder: Path) -> list[Path]:
    """Return the image files in a folder and below, sorted; hidden files are no images."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(place, name)
            for name in sorted(names)
            if not name.startswith(".") and file_suffix(Path(name)) in IMAGE_SUFFIXES
        ]
    return found


def folders_below(source: Path) -> list[Path]:
    """Return the source and every folder below it, sorted, without hidden ones."""
    found = []
    for place, folders, _ in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found.append(Path(place))
    return found


def relative_name(path: Path, source: Path) -> str:
    """Return the path below the source with "/", or the whole path if it is elsewhere."""
    try:
        return path.relative_to(source).as_posix()
    except ValueError:
        return path.as_posix()


def split_in_path(relative: str) -> Split | None:
    """Return the split that the last telling folder of a relative path names, or None."""
    named = [split for part in relative.split("/")[:-1] if (split := split_named(part))]
    return named[-1] if named else None


def picture_size(path: Path) -> tuple[int, int]:
    """Return (columns, rows) of a picture from its header alone.

    Raises:
        DataError: The file is absent or is no picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return picture.size
    except FileNotFoundError:
        raise DataError(f"{path}: no such file", "is the source complete?") from None
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}", "is the file complete?") from None


def choose_classes(own: Sequence[str], wanted: Sequence[str], where: Path) -> dict[str, int]:
    """Return the label of each class that is imported, from 1.

    Args:
        own: The source's classes.
        wanted: The user's choice and order among them; () for all.
        where: For the error.

    Raises:
        DataError: The user named a class that the source lacks, or a class stands twice.
    """
    chosen = tuple(wanted or own)
    for name in chosen:
        if name not in own:
            raise DataError(f"{where}: has no class {name!r}", f"its classes are {', '.join(own)}")
    if len(set(chosen)) != len(chosen):
        raise DataError(f"{where}: a class stands twice in {', '.join(chosen)}")
    return {name: number for number, name in enumerate(chosen, start=1)}


@dataclass
class BoxTally:
    """Cleans boxes of pictures and counts what it had to do, for the notes."""

    empty: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    other_class: int = 0
    other_size: list[str] = field(default_factory=list)

    def clean(self, box: Box, size: tuple[int, int], picture: str) -> Box | None:
        """Cut a box (x1, y1, x2, y2) at the picture's edge; None if nothing of it is left.

        Args:
            box: In pixels; the order of its corners does not matter.
            size: Columns and rows of the picture.
            picture: For the note.
        """
        x1, x2 = sorted((box[0], box[2]))
        y1, y2 = sorted((box[1], box[3]))
        if not all(abs(edge) < 1e7 for edge in (x1, y1, x2, y2)) or x2 - x1 <= 0 or y2 - y1 <= 0:
            self.empty.append(picture)
            return None
        inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(size[0])), min(y2, float(size[1])))
        if inside[2] - inside[0] <= 0 or inside[3] - inside[1] <= 0:
            self.outside.append(picture)
            return None
        # Half a pixel is what rounding in the source explains.
        if max(abs(new - old) for new, old in zip(inside, (x1, y1, x2, y2), strict=True)) > 0.5:
            self.cut.append(picture)
        return tuple(round(edge, 2) for edge in inside)

    def notes(self) -> list[str]:
        """Return one line for each kind of fault that was met."""
        lines = []
        for pictures, what in (
            (self.empty, "without area dropped"),
            (self.outside, "outside the picture dropped"),
            (self.cut, "cut at the picture's edge"),
        ):
            if pictures:
                lines.append(
                    f"{len(pictures)} box{'es' * (len(pictures) > 1)} {what} ({first_names(pictures)})"
                )
        if self.other_class:
            lines.append(f"{self.other_class} boxes of classes that were not asked for left out")
        if self.other_size:
            lines.append(
                f"{len(self.other_size)} pictures have another size than their annotation says; "
                f"check their boxes ({first_names(self.other_size)})"
            )
        return lines


def first_names(names: Iterable[str]) -> str:
    """Return up to three distinct names, long ones shortened, and dots if there are more."""
    unique = list(dict.fromkeys(names))
    shown = [name if len(name) <= 44 else f"{name[:20]}...{name[-20:]}" for name in unique[:3]]
    return ", ".join(shown) + (", ..." if len(unique) > 3 else "")
