"""Local, pooled and federated models on three real data sets: imports, checks, trains, prints the tables.

    python tests/benchmarks/real_data.py --data DATA --out runs/real nuclei hippocampus bloodcells

DATA is a folder with dsb2018_nuclei, msd_hippocampus and bloodcells_3site (docs/benchmarks.md says where
they come from). Every step is a `fedvision` command that is printed before it runs. A run that was
interrupted goes on when the same command is given again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

JOBS = Path(__file__).parent / "jobs"
IMPORTS = {
    "nuclei": [
        "masks", "{data}/dsb2018_nuclei", "--label-kind", "instance", "--classes", "nucleus",
        "--sites-from", "{data}/dsb2018_nuclei/manifest.csv:domain",
        "--split-from", "{data}/dsb2018_nuclei/manifest.csv:split",
    ],
    "hippocampus": [
        "msd", "{data}/msd_hippocampus",
        "--sites-from", "{data}/msd_hippocampus/manifest.csv:intensity_cohort",
        "--split-from", "{data}/msd_hippocampus/manifest.csv:split",
    ],
    "bloodcells": ["yolo", "{data}/bloodcells_3site", "--sites-from-folders"],
}  # fmt: skip


def fedvision(*arguments: str) -> None:
    """Print and run one command."""
    print("$ fedvision", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "fedvision", *arguments], check=True)


def run(name: str, data: Path, out: Path) -> None:
    """Import one data set, if it was not yet, and compare the models on it."""
    sites = out / "data" / name
    if not sites.exists():
        layout = [part.format(data=data) for part in IMPORTS[name]]
        fedvision("data", "import", *layout, "--out", str(sites))
    job = out / f"{name}.toml"
    job.write_text((JOBS / f"{name}.toml").read_text().replace("DATA/", f"{(out / 'data').resolve()}/"))
    fedvision("compare", str(job), "--out", str(out / name))


def main() -> None:
    """Run the data sets that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(IMPORTS), metavar="NAME", help=", ".join(IMPORTS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names:
        if name not in IMPORTS:
            parser.error(f"unknown data set {name}; choose from {', '.join(IMPORTS)}")
        run(name, arguments.data.resolve(), arguments.out)


if __name__ == "__main__":
    main()
