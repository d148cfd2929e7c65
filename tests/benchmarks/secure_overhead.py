"""Wall time of a whole `fedvision simulate` with and without secure aggregation.

    python tests/benchmarks/secure_overhead.py --job JOB.toml --data SITES --runs 5

JOB.toml is one of `tests/benchmarks/jobs`, SITES is a folder of imported sites, as
`tests/benchmarks/real_data.py` leaves it below its --out. The runs of the levels are interleaved and each is
the whole command, from start to exit; the table shows medians and their ratio to `off`. Because two such
walls differ by more than what is measured on a busy machine, the time that hiding takes is also added up
inside each run: from the last site that has its update to the sum, for every round (validation has sums of
its own, in the walls only).
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


def job_at(job_file: Path, data: Path, level: str, rounds: int | None, folder: Path) -> Path:
    """Write the job for one level into ``folder``; return its path."""
    from fedvision.config import dump_job, load_job

    job = load_job(job_file)
    assert job.data is not None
    job = job.model_copy(
        update={
            "rounds": rounds or job.rounds,
            "data": job.data.model_copy(update={"root": data.resolve()}),
            "aggregation": job.aggregation.model_copy(update={"secure": level != "off"}),
            "secure_aggregation": job.secure_aggregation.model_copy(
                update={"level": "auto" if level == "off" else level}
            ),
        }
    )
    path = folder / f"{level}.toml"
    path.write_text(dump_job(job))
    return path


def measure(job: Path, run: Path) -> tuple[float, float, float]:
    """Run the command; return wall time, the seconds of all rounds, and those spent on hiding updates."""
    command = [sys.executable, "-m", "fedvision", "simulate", str(job), "--out", str(run)]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    wall = time.perf_counter() - started
    events = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    rounds = [event for event in events if event["event"] == "round"]
    return wall, sum(e["seconds"] for e in rounds), sum(e["sum_seconds"] for e in rounds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rounds", type=int, help="instead of the job's")
    parser.add_argument("--levels", nargs="+", default=["off", "sum", "sketch"])
    arguments = parser.parse_args()
    found: dict[str, list[tuple[float, float, float]]] = {level: [] for level in arguments.levels}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(arguments.runs):
            for level in arguments.levels:
                job = job_at(arguments.job, arguments.data, level, arguments.rounds, folder)
                found[level].append(measure(job, folder / f"run-{number}-{level}"))
                wall, rounds, hiding = found[level][-1]
                print(
                    f"run {number + 1} {level:6s} wall {wall:7.1f} s, rounds {rounds:7.1f} s, "
                    f"hiding {hiding:6.2f} s",
                    flush=True,
                )
    cores = len(os.sched_getaffinity(0))
    print(f"\n{platform.machine()}, {cores} cores; {arguments.job.stem}; {arguments.runs} interleaved runs")
    base = statistics.median(wall for wall, _, _ in found[arguments.levels[0]])
    for level, rows in found.items():
        walls = [wall for wall, _, _ in rows]
        share = statistics.median(hiding / wall for wall, _, hiding in rows)
        print(
            f"{level:6s} wall median {statistics.median(walls):7.1f} s (min {min(walls):.1f}, "
            f"max {max(walls):.1f}), ratio {statistics.median(walls) / base:.3f}, "
            f"hiding {share:.2%} of the wall"
        )


if __name__ == "__main__":
    main()
