"""Peak memory of server and site workers as the number of simulated sites grows, 10^6 parameters.

    python tests/benchmarks/memory.py --sites 4 16 64

Each number of sites is a run of `fedvision simulate` of its own, on small generated pictures. Resident
memory of the command (which is the server) and of each site worker is sampled every 50 ms; shared pages
count for each process that maps them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from fedvision.config import dump_job, parse_job
from fedvision.data.manifest import Case, Manifest, save_manifest
from fedvision.tasks import initial_network
from fedvision.updates.layout import layout_of

CASES = {"train": 4, "val": 1, "test": 1}


def make_sites(root: Path, number: int) -> None:
    """Write ``number`` sites of a few 64 x 64 pictures with one bright disc each."""
    rows, columns = np.mgrid[:64, :64]
    for site in range(number):
        rng = np.random.default_rng(site)
        folder = root / f"site{site:03d}"
        folder.mkdir(parents=True)
        cases = []
        for split, count in CASES.items():
            for index in range(count):
                y, x = rng.integers(16, 48, size=2)
                disc = (rows - y) ** 2 + (columns - x) ** 2 < 100
                stem = f"{split}{index}"
                Image.fromarray((disc * 120 + rng.integers(0, 60, (64, 64))).astype(np.uint8)).save(
                    folder / f"{stem}.png"
                )
                Image.fromarray(disc.astype(np.uint8)).save(folder / f"{stem}-mask.png")
                cases.append(
                    Case(
                        id=stem,
                        patient=stem,
                        split=split,
                        image=(f"{stem}.png",),
                        label=(f"{stem}-mask.png",),
                    )
                )
        save_manifest(
            Manifest(
                site=folder.name,
                task="segmentation",
                spatial_dims=2,
                classes=("disc",),
                label_kind="semantic",
                cases=tuple(cases),
            ),
            folder,
        )


def write_job(folder: Path, rounds: int) -> Path:
    """Write a job with a network of about 10^6 parameters and print its exact size."""
    job = parse_job(
        {
            "name": "memory",
            "rounds": rounds,
            "task": {"kind": "segmentation", "classes": ["disc"]},
            "data": {"root": "sites"},
            "model": {
                "name": "UNet",
                "args": {"channels": [16, 32, 64, 272], "strides": [2, 2, 2], "num_res_units": 2},
            },
            "training": {"steps": 1, "batch_size": 2, "patch_size": [64, 64]},
            "aggregation": {"clip_norm": 10.0},
            "evaluation": {"every": rounds, "bootstrap": 20},
        },
        "memory",
    )
    path = folder / "job.toml"
    path.write_text(dump_job(job))
    print(f"network: {layout_of(initial_network(job)).size} weights")
    return path


def sample(process: subprocess.Popen[bytes]) -> tuple[int, int, int]:
    """Return the peak resident bytes of the command, of its largest site worker, and of all processes."""
    server = worker = everything = 0
    own = psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        try:
            for child in [own, *own.children(recursive=True)]:
                try:
                    resident = child.memory_info().rss
                    total += resident
                    if child.pid == own.pid:
                        server = max(server, resident)
                    elif "ClientAppActor" in " ".join(child.cmdline()):
                        worker = max(worker, resident)
                except psutil.Error:
                    continue
        except psutil.Error:
            break
        everything = max(everything, total)
        time.sleep(0.05)
    return server, worker, everything


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{'sites':>6} {'server MB':>10} {'worker MB':>10} {'all MB':>8} {'wall s':>8}")
    for number in arguments.sites:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_sites(folder / "sites", number)
            job = write_job(folder, arguments.rounds)
            started = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "fedvision", "simulate", str(job), "--out", str(folder / "run")],
                stderr=subprocess.DEVNULL,
            )
            server, worker, everything = sample(process)
            assert process.returncode == 0
            assert len(json.loads((folder / "run" / "test.json").read_text())["sites"]) == number
            wall = time.perf_counter() - started
            print(
                f"{number:6d} {server / 1e6:10.0f} {worker / 1e6:10.0f} {everything / 1e6:8.0f} {wall:8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
