"""The two jobs of ``fedvision simulate --demo``, on generated images."""

from pathlib import Path
from typing import Any, Literal

from fedvision.config import Job, dump_job, parse_job
from fedvision.data.demo import make_demo
from fedvision.data.manifest import find_manifests
from fedvision.storage import write_text

SETTINGS: dict[Literal["segmentation", "detection"], dict[str, Any]] = {
    "segmentation": {
        "rounds": 6,
        "model": {"name": "UNet"},
        "training": {
            "steps": 20,
            "batch_size": 2,
            "learning_rate": 3e-3,
            "learning_rate_schedule": "cosine",
            "patch_size": [40, 48, 24],
        },
        "aggregation": {"clip_norm": 20.0},
        "secure_aggregation": {"smallest_cohort": 3},
        "evaluation": {"every": 1},
    },
    "detection": {
        "rounds": 8,
        "model": {"name": "RetinaNet", "args": {"backbone": "light"}},
        "training": {
            "steps": 20,
            "batch_size": 4,
            "learning_rate": 2e-3,
            "learning_rate_schedule": "cosine",
            "image_size": [160, 160],
            "loss": "detector",
        },
        "aggregation": {"clip_norm": 20.0},
        "secure_aggregation": {"smallest_cohort": 3},
        "evaluation": {"every": 2},
    },
}


def demo_jobs(folder: Path, seed: int = 0) -> list[Path]:
    """Generate the demo's images and job files below ``folder``; return the job files.

    Raises:
        StorageError: The folder cannot be written.
    """
    paths = []
    for kind, settings in SETTINGS.items():
        root = make_demo(folder / "data", kind, seed=seed)
        path = folder / f"{kind}.toml"
        write_text(path, dump_job(demo_job(kind, root, settings)))
        paths.append(path)
    return paths


def demo_job(kind: str, root: Path, settings: dict[str, Any]) -> Job:
    """Return a demo job on the generated data set below ``root``."""
    first = next(iter(find_manifests(root).values()))
    content = {
        "name": f"demo-{kind}",
        "task": {
            "kind": kind,
            "spatial_dims": first.spatial_dims,
            "in_channels": 1,
            "classes": list(first.classes),
        },
        "data": {"root": str(root.resolve())},
        **settings,
    }
    return parse_job(content, f"demo {kind}")
