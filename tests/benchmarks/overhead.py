"""Wall time of `fedvision simulate` with 4 sites against the same local steps in a plain PyTorch loop.

    python tests/benchmarks/overhead.py --runs 5 --rounds 5 --steps 20

Both do the same optimiser steps on the same cases with the same batches per step and the same number of
cores; the plain loop has no federation, no clipping, no evaluation, no files, and its data are read before
its clock starts. Runs are interleaved; the table shows medians. The simulation is timed as a user sees it:
the whole command, from start to exit, imports and report included. Also measured: the time from the start
of the command to the first training step.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PLAIN = """
import sys, time, numpy, torch
from pathlib import Path
from fedvision.config import load_job
from fedvision.data.manifest import find_manifests
from fedvision.data.readers import CaseStore
from fedvision.tasks import initial_network, task_module
from fedvision.training.loop import case_batches, make_optimizer
job = load_job(Path(sys.argv[1]))
torch.set_num_threads(int(sys.argv[2]))
task, network = task_module(job), initial_network(job)
stores = [(CaseStore(m, job, 1 << 32), m.in_split("train")) for m in find_manifests(job.data.root).values()]
for store, cases in stores:
    for case in cases:
        store.load(case)
network.train()
started = time.perf_counter()
for number in range(job.rounds):
    for store, cases in stores:
        rng = numpy.random.default_rng(number)
        batches = case_batches(cases, job.training.batch_size, rng)
        optimizer = make_optimizer(network.parameters(), job, job.training.learning_rate)
        for _ in range(job.training.steps):
            batch = task.training_batch([store.load(case) for case in next(batches)], job, rng)
            optimizer.zero_grad(set_to_none=True)
            task.training_loss(network, batch, job, torch.device("cpu")).backward()
            optimizer.step()
print(time.perf_counter() - started)
"""


def make_job(folder: Path, rounds: int, steps: int) -> Path:
    """Generate four sites and write the job file."""
    from fedvision.config import dump_job, load_job
    from fedvision.simulation.demo import demo_jobs

    path = demo_jobs(folder)[0]
    job = load_job(path)
    job = job.model_copy(
        update={
            "rounds": rounds,
            "training": job.training.model_copy(update={"steps": steps}),
            "evaluation": job.evaluation.model_copy(update={"every": rounds, "bootstrap": 0}),
        }
    )
    path.write_text(dump_job(job))
    return path


def simulate(job: Path, run: Path) -> dict[str, float]:
    """Run the command; return its wall time, and the seconds until the first training step began."""
    command = [sys.executable, "-m", "fedvision", "simulate", str(job), "--out", str(run)]
    clock, started = time.time(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    wall = time.perf_counter() - started
    logs = [json.loads(p.read_text().splitlines()[0]) for p in run.glob("sites/*/log.jsonl")]
    return {"wall": wall, "first_step": min(record["started"] for record in logs) - clock}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    plain, ours, first = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = make_job(folder / "demo", arguments.rounds, arguments.steps)
        for run in range(arguments.runs):
            done = subprocess.run(
                [sys.executable, "-c", PLAIN, str(job), str(cores)],
                check=True,
                capture_output=True,
                text=True,
            )
            plain.append(float(done.stdout))
            result = simulate(job, folder / f"run-{run}")
            ours.append(result["wall"])
            first.append(result["first_step"])
            print(
                f"run {run + 1}: plain {plain[-1]:.1f} s, simulate {ours[-1]:.1f} s, "
                f"first step after {first[-1]:.1f} s",
                flush=True,
            )
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    print(
        f"\n{platform.processor() or platform.machine()}, {cores} cores; 4 sites, "
        f"{arguments.rounds} rounds of {arguments.steps} steps; {arguments.runs} interleaved runs"
    )
    for label, values in (
        ("plain loop, s", plain),
        ("simulate, whole command, s", ours),
        ("ratio", ratios),
        ("start to first step, s", first),
    ):
        print(
            f"{label:28s} median {statistics.median(values):7.2f}   "
            f"min {min(values):7.2f}   max {max(values):7.2f}"
        )


if __name__ == "__main__":
    main()
