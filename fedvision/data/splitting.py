"""Several sites out of one: patients are dealt to parts, to try a federation of more sites than there are.

    OUT/sites/NAME-1/manifest.json, images/, labels/     a part of the site NAME
    OUT/root-set/manifest.json, images/, labels/         patients taken off first, at none of the sites

Rules:
- A patient stays in the split that they were in, and goes to one part with all of their cases.
- A site gets parts in proportion to its patients, one at least. A site without training cases stays whole.
- The root set is drawn from training patients only, from the sites in proportion to how many they have.
- Files are hard links where the file system allows it, else copies: a part stands alone, as at a hospital.
"""

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedvision.data.images import file_suffix
from fedvision.data.manifest import FILE_NAME, SPLITS, Case, Manifest, pool_manifests, save_manifest
from fedvision.data.progress import tracked
from fedvision.errors import ConfigError, DataError, StorageError
from fedvision.seeds import derive_seed

ROOT_SET = "root-set"


@dataclass(frozen=True)
class Divided:
    """What a division came to, before anything is written.

    Attributes:
        parts: A manifest for each new site, sorted by name; its files are still named where they are.
        root_set: The root set, None if none was asked for.
    """

    parts: tuple[Manifest, ...]
    root_set: Manifest | None


def shares(total: int, sizes: Sequence[int], least: int) -> list[int]:
    """Return whole numbers in proportion to ``sizes`` with sum ``total``, each at least ``least``.

    Each further one goes where most of a size stands behind one of its share (Jefferson's method).

    Raises:
        ValueError: ``total`` is too small.
    """
    if total < least * len(sizes):
        raise ValueError(f"{total} cannot be shared by {len(sizes)} with {least} each")
    given = [least] * len(sizes)
    for _ in range(total - sum(given)):
        given[max(range(len(sizes)), key=lambda k: (sizes[k] / (given[k] + 1), -k))] += 1
    return given


def divide(manifests: Sequence[Manifest], num_sites: int, root_size: int, seed: int) -> Divided:
    """Deal the patients of some sites to more sites.

    Args:
        manifests: Of the sites as they are.
        num_sites: How many sites that train there are to be.
        root_size: Patients of the root set, 0 for none.
        seed: Another seed deals otherwise.

    Raises:
        ConfigError: There are more sites already, or too few patients.
    """
    train = [one for one in manifests if one.in_split("train")]
    whole = [one for one in manifests if not one.in_split("train")]
    if not train:
        raise DataError("no site has a training case")
    if num_sites < len(train):
        raise ConfigError(
            f"{len(train)} sites cannot be made into {num_sites}", f"--sites {len(train)} or more"
        )
    root_set = None
    if root_size:
        train, root_set = take_root_set(train, root_size, seed)
    patients = [len({case.patient for case in one.cases}) for one in train]
    parts = list(whole)
    for one, count in zip(train, shares(num_sites, patients, 1), strict=True):
        parts += divide_site(one, count, seed)
    names = [part.site for part in parts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"two parts would be named {twice[0]}", "rename a site in its manifest.json")
    return Divided(tuple(sorted(parts, key=lambda part: part.site)), root_set)


def _drawn(patients: Iterable[str], seed: int, purpose: str) -> list[str]:
    """Return patients in the order of a hash of seed and name: no library's version changes it."""
    return sorted(set(patients), key=lambda patient: (derive_seed(seed, purpose, patient), patient))


def divide_site(manifest: Manifest, count: int, seed: int) -> list[Manifest]:
    """Return a site's parts, ``NAME-1`` to ``NAME-count``; their sizes differ by one patient a split at most.

    Raises:
        ConfigError: A part would have nobody to train on.
    """
    part_of: dict[str, int] = {}
    for split in SPLITS:
        found = _drawn([case.patient for case in manifest.in_split(split)], seed, f"part {split}")
        if split == "train" and len(found) < count:
            raise ConfigError(
                f"site {manifest.site} has {len(found)} patients to train on, for {count} parts",
                "ask for fewer sites or a smaller root set",
            )
        for patient in found:
            part_of[patient] = len(part_of) % count
    return [
        _with_cases(
            manifest,
            _part_name(manifest.site, number + 1),
            [case for case in manifest.cases if part_of[case.patient] == number],
            f"part {number + 1} of {count} of {manifest.site}",
        )
        for number in range(count)
    ]


def _part_name(site: str, number: int) -> str:
    return f"{site[:60]}-{number}"


def _with_cases(manifest: Manifest, site: str, cases: Sequence[Case], source: str) -> Manifest:
    """Return a manifest with other cases; the folder that paths start from stays."""
    source = "; ".join(text for text in (manifest.source, source) if text)
    return manifest.model_copy(update={"site": site, "cases": tuple(cases), "source": source})


def take_root_set(
    manifests: Sequence[Manifest], num_patients: int, seed: int
) -> tuple[list[Manifest], Manifest]:
    """Take patients off the sites' training cases.

    Args:
        manifests: Sites that train.
        num_patients: How many.
        seed: Of the draw.

    Returns:
        The sites without them, and the root set, whose patients have their site's name in front.

    Raises:
        ConfigError: A site would be left without a training patient.
    """
    trained = [sorted({case.patient for case in one.in_split("train")}) for one in manifests]
    counts = shares(num_patients, [len(found) for found in trained], 0)
    left, taken = [], []
    for one, found, count in zip(manifests, trained, counts, strict=True):
        if count >= len(found):
            raise ConfigError(
                f"a root set of {num_patients} would take all {len(found)} training patients of {one.site}",
                "ask for a smaller --root-set",
            )
        chosen = set(_drawn(found, seed, "root set")[:count])
        left.append(_with_cases(one, one.site, [c for c in one.cases if c.patient not in chosen], ""))
        taken.append(_with_cases(one, one.site, [c for c in one.cases if c.patient in chosen], ""))
    return left, pool_manifests(ROOT_SET, [one for one in taken if one.cases])


def write_division(found: Divided, out: Path) -> list[Path]:
    """Write a division's manifests and link or copy its files; return the folders of the data sets.

    Args:
        found: What to write.
        out: Absent or empty.

    Raises:
        StorageError: ``out`` holds something already, the disk is full or the folder is not writable.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"{out} is not empty", "choose another --out")
    sets = [(part, out / "sites" / part.site) for part in found.parts]
    if found.root_set is not None:
        sets.append((found.root_set, out / ROOT_SET))
    placed = [
        (manifest, folder, case, number)
        for manifest, folder in sets
        for number, case in enumerate(manifest.cases)
    ]
    cases: dict[Path, list[Case]] = {folder: [] for _, folder in sets}
    try:
        for manifest, folder, case, number in tracked(placed, "linking", len(placed)):
            cases[folder].append(_place(manifest, folder, case, number))
        for manifest, folder in sets:
            save_manifest(manifest.model_copy(update={"cases": tuple(cases[folder])}), folder)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return [folder / FILE_NAME for _, folder in sets]


def _place(manifest: Manifest, folder: Path, case: Case, number: int) -> Case:
    """Put the files of a case below ``folder`` and return the case that names them there."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", case.id).strip("_")[:100] or "case"
    named: dict[str, tuple[str, ...]] = {}
    for kind, files in (("image", case.image), ("label", case.label)):
        targets = []
        for channel, name in enumerate(files):
            source = manifest.path(name)
            ending = f"_{channel:04d}" if len(files) > 1 else ""
            target = f"{kind}s/{number:05d}_{stem}{ending}{file_suffix(source)}"
            _link(source, folder / target)
            targets.append(target)
        named[kind] = tuple(targets)
    return case.model_copy(update=named)


def _link(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source.resolve(), target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, target)
    except FileNotFoundError:
        raise DataError(
            f"{source}: no such file", "`fedvision data check` lists all that are missing"
        ) from None
    except OSError as error:
        raise StorageError(f"cannot write {target}: {(error.strerror or str(error)).lower()}") from None
