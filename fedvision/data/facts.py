"""What can be said about each case without training on it: for the checks and for the overview."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedvision.config import Job
from fedvision.data.images import RawCase, read_raw, spacing_of, verify_checksum
from fedvision.data.manifest import Case, Manifest
from fedvision.data.progress import tracked
from fedvision.errors import DataError, FedvisionError

NUM_INTENSITIES = 4096


@dataclass(frozen=True)
class CaseFacts:
    """One case, looked at.

    Attributes:
        case: From the manifest.
        problem: Why the case cannot be read; then every other attribute is empty.
        num_channels: Of the image as its files have it.
        shape: The spatial grid, in the file's axis order.
        spacing_mm: Along each axis; ones if the file gives none.
        has_spacing: Whether the file gives one.
        percentiles: 1st, 50th and 99th of the intensities.
        is_constant: All pixels have one value.
        is_finite: No pixel is NaN or infinite.
        intensities: float32, at most ``NUM_INTENSITIES`` pixels spread evenly over the image.
        class_sizes: Segmentation: pixels or voxels of each class. Detection: boxes of each class.
        fingerprint: SHA-256 of the decoded pixels.
    """

    case: Case
    problem: FedvisionError | None = None
    num_channels: int = 0
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    has_spacing: bool = False
    percentiles: tuple[float, float, float] = (0.0, 0.0, 0.0)
    is_constant: bool = False
    is_finite: bool = True
    intensities: NDArray[np.float32] = field(
        default_factory=lambda: np.zeros(0, dtype=np.float32), repr=False
    )
    class_sizes: tuple[int, ...] = ()
    fingerprint: str = ""


def _class_sizes(manifest: Manifest, case: Case, raw: RawCase) -> tuple[int, ...]:
    num_classes = len(manifest.classes)
    values = np.array(case.box_labels or (), dtype=np.int64) if raw.label is None else raw.label.ravel()
    return tuple(int(count) for count in np.bincount(values, minlength=num_classes + 1)[1 : num_classes + 1])


def read_facts(manifest: Manifest, case: Case, job: Job | None = None) -> CaseFacts:
    """Look at one case. Nothing is raised for a bad file: the facts hold the problem.

    Args:
        manifest: Of the site.
        case: One of its cases.
        job: If given, the case is also preprocessed as the job asks, to see whether that works.
    """
    try:
        for name in (*case.image, *case.label):
            verify_checksum(manifest.path(name))
        raw = read_raw(manifest, case)
        if job is not None and np.isfinite(raw.image).all():
            from fedvision.data.readers import read_case

            read_case(manifest, case, job)
    except DataError as error:
        return CaseFacts(case, problem=error)
    pixels = raw.image.ravel()
    some = pixels[:: max(1, len(pixels) // NUM_INTENSITIES)][:NUM_INTENSITIES].astype(np.float32)
    finite = some[np.isfinite(some)]
    low, middle, high = np.percentile(finite, (1, 50, 99)) if finite.size else (0.0, 0.0, 0.0)
    digest = hashlib.sha256(f"{raw.image.shape}{raw.image.dtype}".encode())
    digest.update(np.ascontiguousarray(raw.image).data)
    return CaseFacts(
        case,
        num_channels=len(raw.image),
        shape=raw.image.shape[1:],
        spacing_mm=spacing_of(raw.affine, manifest.spatial_dims),
        has_spacing=raw.affine is not None,
        percentiles=(float(low), float(middle), float(high)),
        is_constant=bool((pixels == pixels[0]).all()),
        is_finite=bool(np.isfinite(pixels).all()),
        intensities=finite,
        class_sizes=_class_sizes(manifest, case, raw),
        fingerprint=digest.hexdigest(),
    )


def gather_facts(manifest: Manifest, cases: Sequence[Case], job: Job | None = None) -> list[CaseFacts]:
    """Look at several cases of a site with several threads, and show a progress bar.

    Returns:
        One entry a case, in the order given.
    """
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda case: read_facts(manifest, case, job), cases)
        return list(tracked(results, f"reading {manifest.site}", len(cases)))
