"""The data of a site in one row: how much there is, of what size, with which intensities and labels."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedvision.data.facts import CaseFacts
from fedvision.data.manifest import SPLITS, Manifest

COLUMNS = ("site", "cases", "patients", "split", "size", "voxel (mm)", "intensity", "labels")


def _span(values: Sequence[float], digits: str = "g") -> str:
    """Return one number, or the least and the largest."""
    low, high = min(values), max(values)
    return f"{low:{digits}}" if low == high else f"{low:{digits}}-{high:{digits}}"


def label_unit(manifest: Manifest, facts: Sequence[CaseFacts]) -> str:
    """Return what a label's size is given in: ``mL``, ``% of the image`` or ``boxes``."""
    if manifest.task == "detection":
        return "boxes"
    return "mL" if any(one.has_spacing for one in facts) else "% of the image"


def label_sizes(manifest: Manifest, facts: Sequence[CaseFacts]) -> NDArray[np.float64]:
    """Return the size of each class in each readable case, in ``label_unit``.

    Returns:
        Shape (cases, classes).
    """
    unit = label_unit(manifest, facts)
    rows = []
    for one in facts:
        if one.problem is not None:
            continue
        factor = 1.0
        if unit == "mL":
            factor = float(np.prod(one.spacing_mm)) / 1000
        elif unit == "% of the image":
            factor = 100 / float(np.prod(one.shape))
        rows.append([factor * size for size in one.class_sizes])
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(manifest.classes))


def _label_summary(manifest: Manifest, facts: Sequence[CaseFacts]) -> str:
    """Return for each class how much of it there is, in the cases that have it, a line each."""
    unit, sizes = label_unit(manifest, facts), label_sizes(manifest, facts)
    parts = []
    for number, name in enumerate(manifest.classes):
        of_class = sizes[:, number]
        present = of_class[of_class > 0]
        if unit == "boxes":
            parts.append(f"{name} {int(of_class.sum())}")
        elif not present.size:
            parts.append(f"{name} in none")
        else:
            amount = f"{name} {np.median(present):.3g} {'%' if unit.startswith('%') else unit}"
            parts.append(amount if present.size == of_class.size else f"{amount} in {present.size}")
    return "\n".join(parts)


def summary_row(manifest: Manifest, facts: Sequence[CaseFacts]) -> tuple[str, ...]:
    """Return the row of a site in the table of ``COLUMNS``.

    Args:
        manifest: Of the site; cases, patients and splits are counted in it.
        facts: Of all or some of its cases; the rest of the row is about them.
    """
    known = [one for one in facts if one.problem is None]
    counts = "/".join(str(len(manifest.in_split(split))) for split in SPLITS)
    patients = str(len({case.patient for case in manifest.cases}))
    row = (manifest.site, str(len(manifest.cases)), patients, counts)
    if not known:
        return (*row, "unreadable", "", "", "")
    sizes = " x ".join(_span(axis) for axis in zip(*(one.shape for one in known), strict=True))
    channels = _span([one.num_channels for one in known])
    spacings = [one.spacing_mm for one in known if one.has_spacing]
    spacing = " x ".join(_span(axis, ".3g") for axis in zip(*spacings, strict=True)) if spacings else "-"
    middle = np.median([one.percentiles for one in known], axis=0)
    intensity = f"{middle[1]:.4g} ({middle[0]:.4g} to {middle[2]:.4g})"
    size = sizes if channels == "1" else f"{sizes}, {channels} channels"
    return (*row, size, spacing, intensity, _label_summary(manifest, known))
