"""``fedvision init``: a commented job file, filled from the data if they are there."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedvision.errors import ConfigError

if TYPE_CHECKING:
    from fedvision.data.images import RawCase
    from fedvision.data.manifest import Manifest

Kind = Literal["segmentation", "detection"]
LOOKED_AT = 3

MODELS: dict[str, dict[str, Any]] = {
    "segmentation": {
        "name": "UNet",
        "args": {"channels": [16, 32, 64, 128], "strides": [2, 2, 2], "num_res_units": 1},
    },
    "detection": {"name": "RetinaNet", "args": {"backbone": "light"}},
}
EXAMPLES: dict[str, Any] = {
    "data.root_set": "root-set",
    "preprocessing.window": [-160.0, 240.0],
    "preprocessing.transform": "my_transforms:prepare",
    "training.epochs": 1.0,
    "training.gradient_clip": 1.0,
    "privacy.delta": 1e-3,
    "secure_aggregation.weight_cap": 200,
}
DEMO_SITES = 4


def _even(sizes: list[float], multiple: int, least: int, most: int) -> list[int]:
    """Return each size rounded down to a multiple, within limits and never above the size if it can be."""
    return [int(max(multiple, min(most, max(size // multiple * multiple, least)))) for size in sizes]


def suggest_patch(shape: list[float]) -> list[int]:
    """Return a training crop for images of about this shape.

    Half the image along each axis, but at least 128 pixels (48 voxels) and at most 256 (96) where the
    image has them; a multiple of 8, which three halvings of a U-Net need.
    """
    low, high = (128, 256) if len(shape) == 2 else (48, 96)
    return _even([min(size, max(low, size / 2)) for size in shape], 8, 8, high)


def suggest_image_size(shape: list[float]) -> list[int]:
    """Return what images of about this shape are resized to for detection: the same form, not too large."""
    most = 320 if len(shape) == 2 else 96
    factor = min(1.0, most / max(shape))
    return _even([size * factor for size in shape], 32 if len(shape) == 2 else 16, 32, most)


def _some_cases(manifests: Mapping[str, "Manifest"]) -> list["RawCase"]:
    """Return a few cases of each site, volumes of a segmentation turned to RAS."""
    from dataclasses import replace

    from fedvision.data.images import read_raw
    from fedvision.data.preprocessing import to_ras

    cases = []
    for manifest in manifests.values():
        for case in manifest.cases[:: max(1, len(manifest.cases) // LOOKED_AT)][:LOOKED_AT]:
            raw = read_raw(manifest, case)
            if raw.affine is not None and manifest.task == "segmentation":
                image, label, affine = to_ras(raw.image, raw.label, raw.affine)
                raw = replace(raw, image=image, label=label, affine=affine)
            cases.append(raw)
    return cases


def _is_grey(raw: "RawCase") -> bool:
    """Whether the channels of a picture are all the same."""
    return all((channel == raw.image[0]).all() for channel in raw.image[1:])


def _from_data(manifests: Mapping[str, "Manifest"], content: dict[str, Any]) -> None:
    """Fill the task, the sites and what depends on the images' size into ``content``."""
    import numpy as np

    from fedvision.data.images import spacing_of

    first = next(iter(manifests.values()))
    for site, manifest in manifests.items():
        mine = (manifest.task, manifest.spatial_dims, manifest.classes)
        theirs = (first.task, first.spatial_dims, first.classes)
        if mine != theirs:
            raise ConfigError(
                f"sites {first.site} and {site} differ in task, dimensions or classes",
                "`fedvision data check` says more",
            )
    cases = _some_cases(manifests)
    channels = max(len(raw.image) for raw in cases)
    if first.spatial_dims == 2 and channels == 3 and all(_is_grey(raw) for raw in cases):
        channels = 1
    shape = [float(size) for size in np.median([raw.image.shape[1:] for raw in cases], axis=0)]
    content["task"] |= {"spatial_dims": first.spatial_dims, "in_channels": channels, "classes": first.classes}
    content["data"]["sites"] = [site for site, one in manifests.items() if one.in_split("train")]
    content["data"]["held_out"] = [site for site, one in manifests.items() if not one.in_split("train")]
    training = content["training"]
    if first.task == "segmentation":
        training |= {"patch_size": suggest_patch(shape), "batch_size": 8 if first.spatial_dims == 2 else 4}
    else:
        training["image_size"] = suggest_image_size(shape)
    # Hounsfield units begin near -1000: such volumes are CT.
    if first.spatial_dims == 3 and np.median([float(raw.image.min()) for raw in cases]) <= -500:
        content["preprocessing"] = {"intensity": "window", "window": EXAMPLES["preprocessing.window"]}
    spacings = [spacing_of(raw.affine, 3) for raw in cases if raw.affine is not None]
    if spacings:
        content["examples"]["preprocessing.spacing_mm"] = [
            round(float(mm), 2) for mm in np.median(spacings, axis=0)
        ]


def protect(content: dict[str, Any], num_sites: int) -> str:
    """Choose what secure aggregation does with so few sites, and return what the user must know of it."""
    if num_sites < 3:
        content["aggregation"]["secure"] = False
        return f"{num_sites} of the sites train: too few for secure aggregation (3), so it is off in this job"
    if num_sites < 5:
        content["secure_aggregation"] = {"smallest_cohort": num_sites}
        return f"a sum of {num_sites} sites says much about each: smallest_cohort = {num_sites} is a waiver"
    return ""


def job_content(kind: Kind, root: str, manifests: Mapping[str, "Manifest"] | None) -> dict[str, Any]:
    """Return the values of a first job.

    Args:
        kind: The task.
        root: The data's folder, as the job file names it.
        manifests: Of the sites; None for the demo data set.

    Returns:
        The content of the file, and under ``examples`` what commented lines show.
    """
    is_volume = kind == "segmentation"
    content: dict[str, Any] = {
        "name": kind,
        "rounds": 10,
        "task": {"kind": kind},
        "data": {"root": root},
        "model": MODELS[kind],
        "training": {
            "steps": 20,
            "batch_size": 4,
            "learning_rate": 2e-3 if kind == "segmentation" else 1e-3,
            "learning_rate_schedule": "cosine",
        },
        "aggregation": {"clip_norm": 10.0},
        "examples": {**EXAMPLES, "preprocessing.spacing_mm": [1.0, 1.0, 1.0] if is_volume else [1.0, 1.0]},
    }
    if kind == "detection":
        content["training"]["loss"] = "detector"
    if manifests is not None:
        _from_data(manifests, content)
    elif kind == "segmentation":
        from fedvision.data.demo_heads import CLASSES

        content["task"] |= {"spatial_dims": 3, "classes": CLASSES}
        content["training"]["patch_size"] = [32, 32, 16]
    else:
        from fedvision.data.demo_chests import CLASSES

        content["task"] |= {"spatial_dims": 2, "classes": CLASSES}
        content["training"]["image_size"] = [192, 192]
    return content


def init(
    kind: Annotated[
        Kind | None,
        typer.Argument(metavar="[TASK]", help="segmentation or detection; may be left out with --data."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="ROOT", help="The sites' data: fills task, sites and sizes.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The job file to write.")] = Path("job.toml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a job file in which every setting is explained.

    With --data it is filled from the sites' manifests and a few images; without, it is for the data of
    `fedvision data demo`.

    Examples:

      fedvision init --data data

      fedvision init detection --out chest.toml
    """
    import tomllib

    from fedvision.cli.data import sites_at
    from fedvision.cli.job_file import commented_job
    from fedvision.config import parse_job
    from fedvision.data.manifest import FILE_NAME
    from fedvision.storage import write_text

    if out.exists() and not force:
        raise ConfigError(f"{out} exists", "--force replaces it, or choose another --out")
    manifests = None if data is None else sites_at(data)
    if manifests is not None:
        found = next(iter(manifests.values())).task
        if kind not in (None, found):
            raise ConfigError(f"the data below {data} are for {found}, got {kind}")
        kind = found
    if kind is None:
        raise ConfigError("say what is trained, or where the data are", "fedvision init segmentation")
    folder = out.parent.resolve()
    root = (data or Path("demo") / kind).resolve()
    if (root / FILE_NAME).is_file():
        root = root.parent
    named = os.path.relpath(root, folder) if root.is_relative_to(folder) else str(root)
    content = job_content(kind, Path(named).as_posix(), manifests)
    title = re.sub(r"[^A-Za-z0-9_.-]+", "-", root.name).strip("-._")[:64]
    if title and data is not None:
        content["name"] = title
    trained = content["data"].get("sites")
    note = protect(content, DEMO_SITES if trained is None else len(trained))
    text = commented_job(content, content.pop("examples"))
    parse_job(tomllib.loads(text), str(out))
    write_text(out, text)
    typer.echo(f"job: {out}")
    if note:
        typer.echo(f"note: {note}", err=True)
    if data is None and not root.exists():
        typer.echo(f"its data: fedvision data demo {kind}", err=True)
    typer.echo(f"next: fedvision simulate {out}", err=True)
