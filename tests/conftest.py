"""A tiny federation on generated pictures that trains in milliseconds, for every test that needs one."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from PIL import Image

from fedvision.config import Job, parse_job
from fedvision.data.manifest import Case, Manifest, save_manifest

SIZE = 32
hypothesis.settings.register_profile("same everywhere", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None)  # pytest --hypothesis-profile=explore
hypothesis.settings.load_profile("same everywhere")


def write_site(root: Path, name: str, counts: tuple[int, int, int] = (4, 2, 2), seed: int = 0) -> Path:
    """Write a site of 32 x 32 pictures with one bright disc each, and its manifest; two cases a patient."""
    rng = np.random.default_rng([seed, *name.encode()])
    folder = root / name
    folder.mkdir(parents=True)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    cases = []
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        for index in range(count):
            y, x = rng.integers(8, 24, size=2)
            disc = (rows - y) ** 2 + (columns - x) ** 2 < 36
            stem = f"{split}{index}"
            picture = (disc * 120 + rng.integers(0, 80, (SIZE, SIZE))).astype(np.uint8)
            Image.fromarray(picture).save(folder / f"{stem}.png")
            Image.fromarray(disc.astype(np.uint8)).save(folder / f"{stem}-mask.png")
            cases.append(
                Case(
                    id=stem,
                    patient=f"{split}-p{index // 2}",
                    split=split,  # type: ignore[arg-type]
                    image=(f"{stem}.png",),
                    label=(f"{stem}-mask.png",),
                )
            )
    manifest = Manifest(
        site=name,
        task="segmentation",
        spatial_dims=2,
        classes=("disc",),
        label_kind="semantic",
        cases=tuple(cases),
    )
    save_manifest(manifest, folder)
    return folder


def tiny_content(root: Path, **changes: Any) -> dict[str, Any]:
    """Return a job's content for sites written by ``write_site``; ``section__key=value`` changes one key."""
    content: dict[str, Any] = {
        "name": "tiny",
        "rounds": 3,
        "task": {"kind": "segmentation", "classes": ["disc"]},
        "data": {"root": str(root)},
        "model": {"name": "UNet", "args": {"channels": [4, 8], "strides": [2], "num_res_units": 0}},
        "training": {"steps": 2, "batch_size": 2, "patch_size": [SIZE, SIZE], "learning_rate": 0.01},
        "aggregation": {"clip_norm": 5.0, "secure": False},
        "evaluation": {"bootstrap": 5},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            content.setdefault(section, {})[name] = value
        else:
            content[section] = value
    if (
        content.get("secure_aggregation", {}).get("level") in ("sketch", "gram")
        and "model__args" not in changes
    ):
        content["model"]["args"] = {"channels": [20, 48], "strides": [2], "num_res_units": 0}
    return content


@dataclasses.dataclass
class Tiny:
    """A written federation: the folder of its sites, and its job."""

    root: Path
    job: Job

    def secure(self, level: str = "sum", **changes: Any) -> Job:
        """Return the job with secure aggregation at a level, for the three sites."""
        settings = {"aggregation__secure": True, "secure_aggregation__smallest_cohort": 3}
        return self.changed(**settings, secure_aggregation__level=level, **changes)

    def changed(self, **changes: Any) -> Job:
        """Return the job with some keys changed, see ``tiny_content``."""
        return parse_job(tiny_content(self.root, **changes), "tiny")


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    """Three sites a, b, c and a job of three rounds, without secure aggregation."""
    root = tmp_path / "data"
    for name, counts in {"a": (4, 2, 2), "b": (6, 2, 3), "c": (3, 1, 2)}.items():
        write_site(root, name, counts)
    return Tiny(root, parse_job(tiny_content(root), "tiny"))


@pytest.fixture
def run_tiny(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that runs a job in this process and returns the run folder."""

    def run(
        job: Job, name: str = "run", observe: Callable[[dict[str, Any]], None] = lambda event: None
    ) -> Path:
        from fedvision.simulation.run import make_plan, run_federation, start_run

        folder = tmp_path / name
        plan = dataclasses.replace(make_plan(job), threads=1)
        if not folder.exists():
            start_run(plan, folder)
        run_federation(plan, folder, observe, "one-process")
        return folder

    return run
