"""Dice and surface distances: one case to a vector of sums, sums to metrics.

Definitions, for each class of a case:
- Dice = 2 |P and T| / (|P| + |T|) over voxels; P predicted, T the expert's.
- The surface of a mask is its voxels that have a face on the outside; beyond the image is outside. Every
  surface voxel of one mask has a distance in mm to the nearest surface voxel of the other.
- HD95 is the larger of the two 95th percentiles (P to T, T to P; linear interpolation between ranks). ASD is
  the mean over all distances of both directions. These are the definitions of MONAI's metrics.
- A class that neither P nor T has is not counted. If only one of them has it, Dice is 0, surface distances
  are undefined and not counted, and the class is ``missed``.

The statistics of a case are sums, so adding vectors pools cases: "dice" is always a mean over cases, whether
of one site or of all. For a case that was judged only by Dice (validation) the surface part is 0.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FIELDS = (
    "dice", "counted", "missed", "intersection", "predicted", "labelled", "hd95_mm", "asd_mm", "surfaces",
)  # fmt: skip
"""The sums of one class: Dice over ``counted`` cases, in how many of these the class is ``missed``, voxels in
both masks and in each, and HD95 and ASD over ``surfaces`` cases."""
TAIL = ("cases", "final_cases")
"""The sums after those of the classes: cases, and cases judged in the final test."""

_CHUNK = 2**22


@dataclass(frozen=True)
class ClassJudgement:
    """One class of one case. A distance is NaN where it is undefined or was not asked for.

    Attributes:
        dice: In [0, 1]; NaN if neither mask has the class.
        missed: Whether exactly one of the masks has the class.
        intersection: Voxels in both masks.
        predicted: Voxels in the predicted mask.
        labelled: Voxels in the expert's mask.
        hd95_mm: 95th percentile Hausdorff distance.
        asd_mm: Average symmetric surface distance.
    """

    dice: float
    missed: bool
    intersection: int
    predicted: int
    labelled: int
    hd95_mm: float
    asd_mm: float


def confusion(prediction: NDArray[np.uint8], label: NDArray[np.uint8], num_values: int) -> NDArray[np.int64]:
    """Count voxels by predicted value (row) and the expert's value (column).

    Args:
        prediction: Values below ``num_values``.
        label: Likewise, of the same shape.
        num_values: Classes and background.
    """
    total = np.zeros(num_values**2, dtype=np.int64)
    predicted, labelled = prediction.ravel(), label.ravel()
    for start in range(0, predicted.size, _CHUNK):
        pair = predicted[start : start + _CHUNK].astype(np.intp) * num_values
        total += np.bincount(pair + labelled[start : start + _CHUNK], minlength=num_values**2)
    return total.reshape(num_values, num_values)


def surface_points(mask: NDArray[np.bool_], spacing_mm: tuple[float, ...]) -> NDArray[np.float64]:
    """Return the positions in mm of the surface voxels of a mask, shape (N, dims).

    Args:
        mask: With at least one voxel set.
        spacing_mm: Voxel size along each axis, > 0.
    """
    from scipy.ndimage import binary_erosion

    axes = range(mask.ndim)
    extents = [np.flatnonzero(mask.any(axis=tuple(a for a in axes if a != axis))) for axis in axes]
    box = tuple(slice(extent[0], extent[-1] + 1) for extent in extents)
    cropped = mask[box]
    surface = cropped & ~binary_erosion(cropped)
    corner = np.array([extent[0] for extent in extents])
    return (np.argwhere(surface) + corner) * np.asarray(spacing_mm)


def surface_distances(
    prediction: NDArray[np.bool_], label: NDArray[np.bool_], spacing_mm: tuple[float, ...]
) -> tuple[float, float]:
    """Return HD95 and average symmetric surface distance in mm of two masks that both have voxels."""
    from scipy.spatial import KDTree

    ours, theirs = surface_points(prediction, spacing_mm), surface_points(label, spacing_mm)
    to_label = KDTree(theirs).query(ours)[0]
    to_prediction = KDTree(ours).query(theirs)[0]
    hd95 = max(np.percentile(to_label, 95), np.percentile(to_prediction, 95))
    asd = (to_label.sum() + to_prediction.sum()) / (len(to_label) + len(to_prediction))
    return float(hd95), float(asd)


def judge(
    prediction: NDArray[np.uint8],
    label: NDArray[np.uint8],
    num_classes: int,
    spacing_mm: tuple[float, ...],
    with_surfaces: bool,
) -> list[ClassJudgement]:
    """Compare a predicted mask with the expert's, class by class.

    Args:
        prediction: Class indices, 0 is background.
        label: Likewise, of the same shape.
        num_classes: Classes without background.
        spacing_mm: Voxel size along each axis.
        with_surfaces: Whether to measure surface distances.
    """
    counts = confusion(prediction, label, num_classes + 1)
    judged = []
    for value in range(1, num_classes + 1):
        both, ours, theirs = int(counts[value, value]), int(counts[value].sum()), int(counts[:, value].sum())
        distances = (math.nan, math.nan)
        if with_surfaces and ours and theirs:
            distances = surface_distances(prediction == value, label == value, spacing_mm)
        dice = 2 * both / (ours + theirs) if ours + theirs else math.nan
        judged.append(ClassJudgement(dice, (ours > 0) != (theirs > 0), both, ours, theirs, *distances))
    return judged


def statistics_of(judged: list[ClassJudgement], is_final: bool) -> NDArray[np.float64]:
    """Return the statistics of one case: ``FIELDS`` for each class, then ``TAIL``."""
    numbers: list[float] = []
    for j in judged:
        is_counted, is_measured = not math.isnan(j.dice), not math.isnan(j.hd95_mm)
        numbers += [
            j.dice if is_counted else 0.0,
            is_counted,
            j.missed,
            j.intersection,
            j.predicted,
            j.labelled,
        ]
        numbers += [j.hd95_mm, j.asd_mm, 1.0] if is_measured else [0.0, 0.0, 0.0]
    return np.array([*numbers, 1.0, float(is_final)], dtype=np.float64)


def size_of_statistics(num_classes: int) -> int:
    """Return the length of a statistics vector."""
    return num_classes * len(FIELDS) + len(TAIL)


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator > 0 else math.nan


def metrics_of(
    statistics: NDArray[np.float64], classes: tuple[str, ...], with_surfaces: bool
) -> dict[str, float]:
    """Return metrics by name from added-up statistics; one that is undefined is NaN.

    Always: ``dice`` and ``dice/<class>``. If cases of the final test are in the sums, also
    ``voxel_dice/<class>`` (Dice of all cases' voxels taken together), ``missed/<class>`` (share of the
    counted cases in which only one of the masks has the class) and, ``with_surfaces``, ``hd95_mm`` and
    ``asd_mm``, each also by class. A name without a class is the mean over the classes where it is defined.

    Args:
        statistics: Shape (``size_of_statistics(len(classes))``,), sums over any cases.
        classes: Without background.
        with_surfaces: Whether the job asks for surface distances.
    """
    table = statistics[: -len(TAIL)].reshape(len(classes), len(FIELDS))
    sums = [dict(zip(FIELDS, row.tolist(), strict=True)) for row in table]
    by_class = {"dice": [_ratio(s["dice"], s["counted"]) for s in sums]}
    alone: dict[str, list[float]] = {}
    if statistics[-1] > 0:
        if with_surfaces:
            by_class["hd95_mm"] = [_ratio(s["hd95_mm"], s["surfaces"]) for s in sums]
            by_class["asd_mm"] = [_ratio(s["asd_mm"], s["surfaces"]) for s in sums]
        alone["voxel_dice"] = [_ratio(2 * s["intersection"], s["predicted"] + s["labelled"]) for s in sums]
        alone["missed"] = [_ratio(s["missed"], s["counted"]) for s in sums]
    metrics: dict[str, float] = {}
    for name, values in by_class.items():
        defined = [value for value in values if not math.isnan(value)]
        metrics[name] = _ratio(sum(defined), len(defined))
        metrics |= {f"{name}/{c}": value for c, value in zip(classes, values, strict=True)}
    for name, values in alone.items():
        metrics |= {f"{name}/{c}": value for c, value in zip(classes, values, strict=True)}
    return metrics
