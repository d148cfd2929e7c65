"""How metrics, numbers and times are written in reports and on the terminal."""

import math
import re
from collections.abc import Sequence
from typing import TypeGuard

MISSING = "–"
_NAMES = {
    "dice": "Dice",
    "hd95_mm": "HD95 (mm)",
    "asd_mm": "ASD (mm)",
    "voxel_dice": "Voxel Dice",
    "missed": "Missed",
    "map": "mAP",
    "ap50": "AP50",
    "ap75": "AP75",
    "froc": "FROC",
}
_EXPLAINED = {
    "dice": "Dice: overlap with the expert's outline, 0 to 1, mean over classes",
    "hd95_mm": "HD95: 95th percentile of the distance between the outlines, in mm, lower is better",
    "asd_mm": "ASD: average distance between the outlines, in mm, lower is better",
    "voxel_dice": "Voxel Dice: Dice of the voxels of all cases taken together",
    "missed": "Missed: share of the cases where only the expert or only the model has the class",
    "map": "mAP: average precision, mean over overlaps (IoU) 0.5 to 0.95 and over classes, 0 to 1",
    "ap50": "AP50: average precision where an overlap (IoU) of 0.5 counts as found",
    "ap75": "AP75: average precision where an overlap (IoU) of 0.75 counts as found",
    "froc": "FROC: mean sensitivity at 1/8 to 8 false positives an image",
}
_SENSITIVITY = re.compile(r"sensitivity@([0-9.]+)fp(?:/(.*))?")
_FRACTIONS = {0.125: "1/8", 0.25: "1/4", 0.5: "1/2"}


def split_metric(name: str) -> tuple[str, str]:
    """Return the base and the class of a metric: "dice" and "nucleus" of "dice/nucleus"; no class is ""."""
    base, _, of_class = name.partition("/")
    return base, of_class


def false_positives(name: str) -> float | None:
    """Return the false positives an image of "sensitivity@0.5fp", None for another metric."""
    match = _SENSITIVITY.fullmatch(name)
    return float(match.group(1)) if match else None


def metric_label(name: str) -> str:
    """Return a metric's name for people, such as "HD95 (mm)" or "Dice, nucleus"."""
    base, of_class = split_metric(name)
    rate = false_positives(base)
    label = _NAMES.get(base, base) if rate is None else f"Sensitivity at {rate_label(rate)} FP/image"
    return f"{label}, {of_class}" if of_class else label


def metric_explained(name: str) -> str:
    """Return one sentence on a metric, "" for one that is not known here."""
    return _EXPLAINED.get(split_metric(name)[0], "")


def rate_label(rate: float) -> str:
    """Return false positives an image as people write them: 1/8, 1/4, 1/2, 1, 2."""
    return _FRACTIONS.get(rate, f"{rate:g}")


def is_number(value: object) -> TypeGuard[float]:
    """Say whether a value of a record is a finite number; null and NaN mean undefined."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def metric_text(value: object, name: str) -> str:
    """Return a metric's value with its digits: 3 for shares, 2 for mm; a dash where it is undefined."""
    if not is_number(value):
        return MISSING
    return f"{value:.2f}" if split_metric(name)[0].endswith("_mm") else f"{value:.3f}"


def interval_text(interval: object, name: str) -> str:
    """Return a 95 % interval as "0.881 to 0.923", "" where there is none."""
    if not isinstance(interval, Sequence) or len(interval) != 2 or not all(map(is_number, interval)):
        return ""
    return f"{metric_text(interval[0], name)} to {metric_text(interval[1], name)}"


def aligned_texts(values: Sequence[object]) -> list[str]:
    """Return numbers with the same decimals: two significant digits of the smallest, at most 4 decimals."""
    sizes = [abs(value) for value in values if is_number(value) and value != 0]
    decimals = min(max(1 - math.floor(math.log10(min(sizes))), 0), 4) if sizes else 0
    return [f"{value:,.{decimals}f}" if is_number(value) else MISSING for value in values]


def duration_text(seconds: object) -> str:
    """Return seconds as people say them: "0.4 s", "48 s", "3 min 05 s", "2 h 07 min", "3 d 04 h"."""
    if not isinstance(seconds, int | float) or not is_number(seconds) or seconds < 0:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, small, unit, part in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if whole >= large:
            return f"{whole // large} {unit} {whole % large // small:02d} {part}"
    return f"{whole} s"


def counted(number: int, singular: str, plural: str = "") -> str:
    """Return "1 site" or "4 sites"."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence lists them: "a", "a and b", "a, b and c"."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
