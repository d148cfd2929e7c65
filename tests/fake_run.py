"""Writes run folders with plausible numbers, so that reports can be tested without training."""

import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedvision.config import Job, dump_job, parse_job
from fedvision.storage import save_tensors, write_atomic, write_json, write_text

Lines = dict[Path, list[dict[str, Any]]]

RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
DATE = "2025-03-14T09:12:00+00:00"


def segmentation_job(rounds: int = 8, classes: tuple[str, ...] = ("nucleus",), dims: int = 2) -> Job:
    """Return a job that segments."""
    return parse_job(
        {
            "name": "nuclei",
            "seed": 7,
            "rounds": rounds,
            "task": {"kind": "segmentation", "spatial_dims": dims, "classes": list(classes)},
            "data": {"root": "/srv/private/nuclei"},
            "model": {"name": "UNet", "args": {"channels": [16, 32, 64], "strides": [2, 2]}},
            "training": {"steps": 20, "patch_size": [96] * dims},
            "aggregation": {"clip_norm": 10.0, "secure": False},
        },
        "job.toml",
    )


def detection_job(rounds: int = 8, dims: int = 2) -> Job:
    """Return a job that detects."""
    return parse_job(
        {
            "name": "blood-cells",
            "seed": 7,
            "rounds": rounds,
            "task": {
                "kind": "detection",
                "spatial_dims": dims,
                "in_channels": 3,
                "classes": ["red cell", "white cell", "platelet"],
            },
            "data": {"root": "/srv/private/cells"},
            "model": {"name": "FasterRCNN"},
            "training": {"epochs": 1, "image_size": [320] * dims, "loss": "detector"},
            "aggregation": {"clip_norm": 6.0, "secure": False},
        },
        "job.toml",
    )


def _metrics(job: Job, level: float, rng: np.random.Generator, final: bool) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    classes = job.task.classes
    by_class = {
        name: float(np.clip(level + rng.normal(0, 0.02) - 0.04 * k, 0, 1)) for k, name in enumerate(classes)
    }
    if job.task.kind == "segmentation":
        values["dice"] = float(np.mean(list(by_class.values())))
        values |= {f"dice/{name}": value for name, value in by_class.items()}
        for metric, scale in (("hd95_mm", 14.0), ("asd_mm", 4.0)) if final else ():
            distances = {name: float(scale * (1.02 - value)) for name, value in by_class.items()}
            values[metric] = float(np.mean(list(distances.values())))
            values |= {f"{metric}/{name}": value for name, value in distances.items()}
        if final:
            values |= {f"voxel_dice/{name}": value for name, value in by_class.items()}
            values |= {f"missed/{name}": 0.02 for name in classes}
        return values
    values["map"] = 0.72 * level
    values["ap50"] = float(np.mean(list(by_class.values())))
    values |= {f"ap50/{name}": value for name, value in by_class.items()}
    values |= {f"map/{name}": 0.72 * value for name, value in by_class.items()}
    found = {rate: float(np.clip(level + 0.04 * np.log2(rate), 0, 1)) for rate in RATES}
    values["froc"] = float(np.mean(list(found.values())))
    values |= {f"sensitivity@{rate:g}fp": value for rate, value in found.items()}
    return values


def _picture(seed: int) -> bytes:
    """Return a small PNG, in the place of an overlay."""
    pixels = np.random.default_rng(seed).integers(0, 40, (60, 160, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_run(
    folder: Path,
    job: Job,
    sites: tuple[str, ...] = ("amsterdam", "bergen", "coimbra", "dresden"),
    held_out: tuple[str, ...] = ("essen",),
    finished_rounds: int | None = None,
    tested: bool = True,
    reason: str = "the update is not finite",
) -> Path:
    """Write a run folder: the third site has one update refused, the last training site is the hardest."""
    rng = np.random.default_rng(11)
    headline = "dice" if job.task.kind == "segmentation" else "map"
    rounds = job.rounds if finished_rounds is None else finished_rounds
    write_text(folder / "job.toml", dump_job(job))
    write_json(folder / "environment.json", _environment())
    offset = {
        site: 0.02 * np.cos(2.3 * k) - (0.11 if k == len(sites) - 1 else 0) for k, site in enumerate(sites)
    }
    offset |= dict.fromkeys(held_out, -0.06)
    best = -1.0
    lines: Lines = defaultdict(list)
    for number in range(1, rounds + 1):
        level = 0.9 - 0.55 * np.exp(-0.45 * number)
        refused = sites[2] if number == 3 and len(sites) > 2 else None
        for k, site in enumerate(sites):
            _train(lines, folder, job, site, number, k, reason if site == refused else "", rng)
        validation = {
            site: _metrics(job, level + offset[site] + rng.normal(0, 0.012), rng, False) for site in sites
        }
        for site, metrics in validation.items():
            lines[folder / "rounds.jsonl"].append(
                {"event": "validate", "round": number, "site": site, "num_cases": 8, "metrics": metrics},
            )
        mean = float(np.mean([m[headline] for m in validation.values()]))
        worst = min(sites, key=lambda site: validation[site][headline] or 0.0)
        lines[folder / "rounds.jsonl"].append(
            {
                "event": "round",
                "round": number,
                "num_sites": len(sites) - (refused is not None),
                "update_norm": 7.5 * number**-0.6,
                "validation": {
                    "mean_site": {headline: mean},
                    "worst_site": {"site": worst, "metrics": validation[worst]},
                    "pooled": {headline: mean},
                },
                "is_best": mean > best,
                "seconds": 28.0 + 3 * rng.random(),
            },
        )
        best = max(best, mean)
    if tested and rounds:
        _test(lines, folder, job, sites, held_out, offset, headline, rng)
    for path, records in lines.items():
        write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return folder


def _train(
    lines: Lines,
    folder: Path,
    job: Job,
    site: str,
    number: int,
    place: int,
    reason: str,
    rng: np.random.Generator,
) -> None:
    loss = 0.22 + 0.03 * (place % 5) + 0.7 * np.exp(-0.4 * number) + 0.01 * rng.random()
    norm = (14.0 + 2 * (place % 4)) * number**-0.55 * job.aggregation.clip_norm / 10
    share = min(1.0, job.aggregation.clip_norm / norm)
    line: dict[str, Any] = {
        "event": "train",
        "round": number,
        "site": site,
        "status": "refused" if reason else "accepted",
        "reason": reason,
        "num_samples": 40 + 9 * place,
        "num_steps": 20,
        "train_loss": loss,
        "seconds": 6.0 + place % 7,
    }
    lines[folder / "rounds.jsonl"].append(line)
    if "/" not in site:
        lines[folder / "sites" / site / "log.jsonl"].append(
            {
                "round": number,
                "norm_before": norm,
                "clip_norm": job.aggregation.clip_norm,
                "share_kept": share,
                "is_clipped": share < 1,
                "train_loss": loss,
                "num_steps": 20,
                "seconds": line["seconds"],
            },
        )


def _test(
    lines: Lines,
    folder: Path,
    job: Job,
    sites: tuple[str, ...],
    held_out: tuple[str, ...],
    offset: dict[str, float],
    headline: str,
    rng: np.random.Generator,
) -> None:
    results: dict[str, Any] = {}
    for place, site in enumerate(sites + held_out):
        metrics = _metrics(job, 0.88 + offset[site], rng, True)
        if place == 1 and job.task.kind == "detection":
            metrics["ap50/platelet"] = None
        results[site] = {
            "role": "train" if site in sites else "held_out",
            "num_cases": 16 + 3 * place,
            "num_patients": 14 + 3 * place,
            "metrics": metrics,
            "intervals": {
                name: [value - 0.03, value + 0.024] for name, value in metrics.items() if value is not None
            },
        }
        if "/" in site:
            continue
        for rank in ("best", "median", "worst") if len(results) <= 12 else ():
            path = folder / "sites" / site / "examples" / f"{rank}.png"
            if not path.exists():
                write_atomic(path, _picture(place))
        for case in range(3):
            lines[folder / "sites" / site / "test-cases.jsonl"].append(
                {
                    "case": f"c{case}",
                    "patient": f"p{case}",
                    "score": 0.8 + 0.05 * case,
                    "values": {"dice": 0.9},
                },
            )
    trained = {site: results[site]["metrics"] for site in sites}
    mean = {
        name: float(np.mean([m[name] for m in trained.values() if m[name] is not None]))
        for name in trained[sites[0]]
    }
    worst = min(sites, key=lambda site: trained[site][headline])
    write_json(
        folder / "test.json",
        {
            "round": job.rounds,
            "headline": headline,
            "sites": results,
            "mean_site": mean,
            "worst_site": {"site": worst, "metrics": trained[worst]},
            "pooled": {
                "metrics": {name: value + 0.004 for name, value in mean.items()},
                "intervals": {name: [value - 0.012, value + 0.018] for name, value in mean.items()},
            },
        },
    )
    save_tensors(folder / "model.safetensors", {"weight": np.zeros((64, 1024), np.float32)}, {})


def _environment() -> dict[str, Any]:
    return {
        "fedvision": "0.1.0",
        "python": "3.12.3",
        "torch": "2.11.0",
        "monai": "1.5.0",
        "flwr": "1.41.0",
        "machine": "Linux x86_64",
        "cores": 8,
        "gpu": None,
        "threads_per_site": 2,
        "parallel_sites": 4,
        "started": DATE,
    }
