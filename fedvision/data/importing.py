"""A data set in a foreign layout to manifests, one a site.

Rules:
- Images and masks stay where they are unless the user asks for copies or links.
- Everything is read and decided before anything is written; the manifests are written last.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from fedvision.data.assignment import Assignment, assign
from fedvision.data.images import file_suffix
from fedvision.data.import_coco import find_coco
from fedvision.data.import_masks import find_dsb, find_masks
from fedvision.data.import_msd import find_msd
from fedvision.data.import_voc import find_voc
from fedvision.data.import_yolo import find_yolo
from fedvision.data.manifest import FILE_NAME, Case, Manifest, save_manifest
from fedvision.data.progress import tracked
from fedvision.data.sources import Found, Source, SourceOptions, first_names
from fedvision.errors import ConfigError, DataError, StorageError

FORMATS: dict[str, Callable[[Path, SourceOptions], Source]] = {
    "msd": find_msd,
    "masks": find_masks,
    "dsb": find_dsb,
    "coco": find_coco,
    "voc": find_voc,
    "yolo": find_yolo,
}
FileMode = Literal["reference", "copy", "link"]


@dataclass(frozen=True)
class Imported:
    """What an import came to.

    Attributes:
        manifests: One a site, sorted by name; their paths are already those of the output.
        notes: What the user should know.
    """

    manifests: tuple[Manifest, ...]
    notes: tuple[str, ...]


def _named_path(path: Path, folder: Path, root: Path) -> str:
    """Return how a manifest in ``folder`` names a file: relative below ``root``, else absolute."""
    path = Path(os.path.abspath(path))  # noqa: PTH100, a link stays a link
    if path.is_relative_to(root):
        return Path(os.path.relpath(path, folder)).as_posix()
    return path.as_posix()


def _target_names(found: Found, case_id: str) -> list[tuple[Path, str]]:
    """Return where each file of a case goes below its site's folder when files are copied or linked."""
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", case_id).strip("._") or "case"
    targets = []
    for kind, files in (("images", found.image), ("labels", found.label)):
        for number, path in enumerate(files):
            ending = f"_{number:04d}" if len(files) > 1 else ""
            targets.append((path, f"{kind}/{stem}{ending}{file_suffix(path)}"))
    return targets


@contextlib.contextmanager
def _taken_back_on_failure() -> Iterator[list[Path]]:
    """Give a list for files that are made, and remove them again if the block fails."""
    made: list[Path] = []
    try:
        yield made
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise


def _place_files(plan: Sequence[tuple[Path, Path]], mode: FileMode, made: list[Path]) -> None:
    """Copy or link files to their targets.

    Raises:
        StorageError: The disk is full or the folder is not writable.
    """
    for path, target in tracked(plan, "copying" if mode == "copy" else "linking", len(plan)):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_symlink() or not target.exists():
                made.append(target)
            target.unlink(missing_ok=True)
            if mode == "copy":
                shutil.copyfile(path, target)
            else:
                target.symlink_to(path.resolve())
        except OSError as error:
            raise StorageError(
                f"cannot write {target}: {(error.strerror or str(error)).lower()}",
                "without --files the manifest points to the files where they are",
            ) from None


def read_source(format_name: str, source: Path, options: SourceOptions) -> Source:
    """Read a data set in a foreign layout.

    Raises:
        ConfigError: The format is unknown.
        DataError: The source is absent or not of the format.
    """
    if format_name not in FORMATS:
        raise ConfigError(f"unknown format {format_name!r}", f"one of {', '.join(FORMATS)}")
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if source.is_file() and format_name not in ("coco", "msd"):
        raise DataError(f"{source}: the format {format_name} needs a folder, got a file")
    return FORMATS[format_name](source, options)


def import_data(
    format_name: str,
    source: Path,
    root: Path,
    options: SourceOptions,
    how: Assignment,
    *,
    files: FileMode = "reference",
    overwrite: bool = False,
) -> Imported:
    """Write ``root/SITE/manifest.json`` for every site of a data set in a foreign layout.

    Guarantee: if an error is raised, no new manifest is left behind, nor a new copy or link.

    Args:
        format_name: A key of ``FORMATS``.
        source: Its folder, or its file for formats that are one file.
        root: Made if absent; may be the source itself.
        options: Classes and the meaning of masks.
        how: Sites, patients and splits.
        files: ``reference`` leaves the files where they are, ``copy`` and ``link`` put copies or symbolic
            links below the site's folder.
        overwrite: Replace manifests that are there.

    Raises:
        ConfigError: The choices contradict each other.
        DataError: The source is not of the format, or a manifest is there already.
        StorageError: The disk is full or the folder is not writable.
    """
    how.check()
    content = read_source(format_name, source, options)
    assigned = assign(content, how, source if source.is_dir() else source.parent)
    root = root.resolve()
    names = sorted(set(assigned.sites))
    there = [name for name in names if (root / name / FILE_NAME).exists()]
    if there and not overwrite:
        raise DataError(
            f"{root}: has a manifest for {first_names(there)}",
            "--overwrite replaces it, or choose another --out",
        )
    cases: dict[str, list[Case]] = {name: [] for name in names}
    plan: list[tuple[Path, Path]] = []
    for found, case_id, patient, site, split in zip(
        content.found, assigned.ids, assigned.patients, assigned.sites, assigned.splits, strict=True
    ):
        folder = root / site
        if files == "reference":
            image = tuple(_named_path(path, folder, root) for path in found.image)
            label = tuple(_named_path(path, folder, root) for path in found.label)
        else:
            targets = _target_names(found, case_id)
            plan += [(path, folder / name) for path, name in targets]
            image = tuple(name for _, name in targets[: len(found.image)])
            label = tuple(name for _, name in targets[len(found.image) :])
        try:
            case = Case(
                id=case_id,
                patient=patient,
                split=split,
                image=image,
                label=label,
                boxes=found.boxes,
                box_labels=found.box_labels,
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise DataError(f"{found.relative}: {first['loc'][0]}: {first['msg'].lower()}") from None
        cases[site].append(case)
    if len({target for _, target in plan}) != len(plan):
        raise DataError("two cases would get one file name", "use --files reference")
    manifests = tuple(
        Manifest(
            site=name,
            task=content.task,
            spatial_dims=content.spatial_dims,
            classes=content.classes,
            label_kind=content.label_kind,
            source=f"imported from {source.name or source.resolve().name} ({format_name})",
            cases=tuple(cases[name]),
        )
        for name in names
    )
    with _taken_back_on_failure() as made:
        _place_files(plan, files, made)
        if not overwrite:
            made += [root / name / FILE_NAME for name in names]
        for manifest in manifests:
            save_manifest(manifest, root / manifest.site)
    return Imported(manifests, assigned.notes)
