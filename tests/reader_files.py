"""A job, a manifest and files of one case, for tests of the readers."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image

from fedvision.config import Job, parse_job
from fedvision.data.manifest import Manifest, parse_manifest
from fedvision.data.readers import Sample, read_case


def job_for(dims: int, classes: list[str], kind: str = "segmentation", **preprocessing: Any) -> Job:
    size = {"patch_size": [8] * dims} if kind == "segmentation" else {"image_size": [8] * dims}
    loss = {"loss": "detector"} if kind == "detection" else {}
    channels = preprocessing.pop("in_channels", 1)
    return parse_job(
        {
            "name": "t",
            "rounds": 1,
            "task": {"kind": kind, "spatial_dims": dims, "in_channels": channels, "classes": classes},
            "preprocessing": preprocessing,
            "model": {"name": "UNet"},
            "training": {"steps": 1, **size, **loss},
            "aggregation": {"clip_norm": 1.0},
        },
        "test",
    )


def manifest_for(folder: Path, **changes: Any) -> Manifest:
    case = {"id": "one", "patient": "p", "split": "train", "image": ["image.png"], "label": ["mask.png"]}
    case |= changes.pop("case", {})
    content = {
        "site": "a",
        "task": "segmentation",
        "spatial_dims": 2,
        "classes": ["x", "y"],
        "label_kind": "semantic",
        "cases": [case],
    }
    return parse_manifest(content | changes, folder / "manifest.json")


def save_picture(path: Path, array: np.ndarray, **options: Any) -> None:
    Image.fromarray(array).save(path, **options)


def save_volume(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    nibabel.save(
        nibabel.Nifti1Image(array, np.diag([1.0, 2.0, 3.0, 1.0]) if affine is None else affine), path
    )


def read(manifest: Manifest, job: Job) -> Sample:
    return read_case(manifest, manifest.cases[0], job)


def write_picture(folder: Path) -> Path:
    """Write ``image.png``, 6 x 8, and ``mask.png`` with one pixel of class 1 and one of class 2."""
    save_picture(folder / "image.png", np.arange(48, dtype=np.uint8).reshape(6, 8))
    mask = np.zeros((6, 8), dtype=np.uint8)
    mask[0, 1], mask[5, 7] = 1, 2
    save_picture(folder / "mask.png", mask)
    return folder
