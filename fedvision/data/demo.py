"""A demo data set of several sites, drawn on the spot: real files, real manifests, no patient.

Rules:
- The same arguments give the same bytes on the same machine.
- Sites differ as hospitals do: scanner, resolution, orientation of the files, noise, number of cases, and
  how many and how large the findings are.
- Every fourth patient has two scans, so a split by case would leak and a split by patient does not.
"""

import gzip
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedvision.data.manifest import SPLITS, Case, Manifest, Split, save_manifest
from fedvision.data.progress import tracked
from fedvision.errors import ConfigError
from fedvision.seeds import derive_seed
from fedvision.storage import write_atomic

DemoTask = Literal["segmentation", "detection"]
SITES = ("north", "east", "south", "west")
SIZES: dict[str, dict[Split, tuple[int, ...]]] = {
    # Cases of a site in each split, in the order of SITES.
    "tiny": {"train": (5, 4, 3, 4), "val": (2, 2, 2, 2), "test": (2, 2, 2, 2)},
    "small": {"train": (20, 16, 12, 16), "val": (4, 4, 4, 4), "test": (8, 8, 8, 8)},
    "large": {"train": (80, 64, 48, 64), "val": (12, 12, 12, 12), "test": (24, 24, 24, 24)},
}
SOURCE = "drawn by `fedvision data demo`; no patient"


@dataclass(frozen=True)
class _Visit:
    """One scan of one patient of one site."""

    site: str
    patient_number: int
    visit_number: int
    split: Split

    @property
    def patient(self) -> str:
        return f"{self.site}-{self.patient_number:03d}"

    def has_findings(self, healthy_every: int) -> bool:
        """Return whether the patient is ill, where every so many-th is not; 0: all are."""
        return healthy_every == 0 or self.patient_number % healthy_every != healthy_every // 2

    @property
    def case_id(self) -> str:
        return f"{self.patient}-{self.visit_number}"


def _visits(site: str, counts: dict[Split, int]) -> Iterator[_Visit]:
    """Yield the scans of a site; the fourth, eighth, ... patient has two, both in one split."""
    patient = 0
    for split in SPLITS:
        left = counts[split]
        while left:
            patient += 1
            visits = 2 if patient % 4 == 0 and left > 1 else 1
            for visit in range(1, visits + 1):
                yield _Visit(site, patient, visit, split)
            left -= visits


def _nifti_bytes(array: NDArray[np.integer], affine: NDArray[np.float64], orientation: str) -> bytes:
    """Return a gzipped NIfTI file, its axes stored in ``orientation``; the time stamp is 0."""
    import nibabel

    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(orientation)
    )
    return gzip.compress(image.as_reoriented(turn).to_bytes(), compresslevel=4, mtime=0)


def _png_bytes(picture: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def _write_head(folder: Path, visit: _Visit, seed: int) -> Case:
    from fedvision.data.demo_heads import SCANNERS, draw_head

    scanner = SCANNERS[visit.site]
    image, mask, affine = draw_head(
        scanner,
        derive_seed(seed, "head", visit.patient),
        derive_seed(seed, "head", visit.case_id),
        growth=1.0 + 0.12 * (visit.visit_number - 1),
        has_lesion=visit.has_findings(scanner.healthy_every),
    )
    image_name, label_name = f"images/{visit.case_id}.nii.gz", f"labels/{visit.case_id}.nii.gz"
    write_atomic(folder / image_name, _nifti_bytes(image, affine, scanner.orientation))
    write_atomic(folder / label_name, _nifti_bytes(mask, affine, scanner.orientation))
    return Case(
        id=visit.case_id, patient=visit.patient, split=visit.split, image=(image_name,), label=(label_name,)
    )


def _write_chest(folder: Path, visit: _Visit, seed: int) -> Case:
    from fedvision.data.demo_chests import SCANNERS, draw_chest

    scanner = SCANNERS[visit.site]
    picture, boxes, labels = draw_chest(
        scanner,
        derive_seed(seed, "chest", visit.patient),
        derive_seed(seed, "chest", visit.case_id),
        has_objects=visit.has_findings(scanner.healthy_every),
    )
    name = f"images/{visit.case_id}.png"
    write_atomic(folder / name, _png_bytes(picture))
    return Case(
        id=visit.case_id,
        patient=visit.patient,
        split=visit.split,
        image=(name,),
        boxes=tuple(boxes),
        box_labels=tuple(labels),
    )


def make_demo(
    folder: Path,
    task: DemoTask,
    *,
    seed: int = 0,
    num_sites: int = 4,
    size: str = "small",
) -> Path:
    """Write a demo data set below ``folder/task``.

    Segmentation: MR-like heads, 3D NIfTI, classes ventricle and lesion. Detection: chest radiographs,
    PNG, boxes around nodules and calcifications. Files that are there are written anew.

    Args:
        folder: Made if absent.
        task: Also the name of the sub-folder.
        seed: Of everything that is drawn.
        num_sites: 1 to 4.
        size: A key of ``SIZES``; "small" has 12 to 20 training cases a site, "tiny" is for tests.

    Returns:
        The root, with one folder with a manifest for each site.

    Raises:
        ConfigError: An argument is out of range.
        StorageError: The disk is full or the folder is not writable.
    """
    if task not in ("segmentation", "detection"):
        raise ConfigError(f"the demo is for segmentation or detection, got {task!r}")
    if not 1 <= num_sites <= len(SITES):
        raise ConfigError(f"the demo has 1 to {len(SITES)} sites, got {num_sites}")
    if size not in SIZES:
        raise ConfigError(f"the demo's size is one of {', '.join(SIZES)}, got {size!r}")
    if task == "segmentation":
        from fedvision.data.demo_heads import CLASSES

        write_case, classes, dims = _write_head, CLASSES, 3
    else:
        from fedvision.data.demo_chests import CLASSES

        write_case, classes, dims = _write_chest, CLASSES, 2
    root = folder / task
    plan = {
        site: list(_visits(site, {split: SIZES[size][split][number] for split in SPLITS}))
        for number, site in enumerate(SITES[:num_sites])
    }
    total = sum(map(len, plan.values()))
    cases: dict[str, list[Case]] = {site: [] for site in plan}
    ordered = (visit for visits in plan.values() for visit in visits)
    for visit in tracked(ordered, f"drawing {task}", total):
        cases[visit.site].append(write_case(root / visit.site, visit, seed))
    for site in plan:
        manifest = Manifest(
            site=site,
            task=task,
            spatial_dims=3 if dims == 3 else 2,
            classes=classes,
            label_kind="boxes" if task == "detection" else "semantic",
            source=SOURCE,
            cases=tuple(cases[site]),
        )
        save_manifest(manifest, root / site)
    return root
