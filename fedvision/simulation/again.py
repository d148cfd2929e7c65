"""A simulated run done again from the images, to see whether every sum comes out the same.

It shows what signatures cannot: that the inputs of the sums are what training on these images gives. Only a
simulation can be repeated like this, because only there one machine has everybody's images.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fedvision.config import load_job
from fedvision.errors import ConfigError, VerificationError
from fedvision.simulation.run import Engine, resume_plan, run_federation, start_run
from fedvision.storage import read_lines

if TYPE_CHECKING:
    from fedvision_server.federation import Observer

INCIDENTS = ("secure", "attempt", "expelled", "thrown away")


def train_again(folder: Path, observe: "Observer", engine: Engine = "flower") -> int:
    """Run the job of a finished run once more, beside it, and compare every sum bit for bit.

    Args:
        folder: The run folder, verified.
        observe: Is shown every event of the new run.
        engine: As for ``run_federation``.

    Returns:
        How many sums were compared.

    Raises:
        ConfigError: The run cannot be repeated: it is private, sums were not kept, or sites were absent.
        VerificationError: A sum comes out differently.
        FedvisionError: What went wrong in the new run.
    """
    if not (folder / "test.json").exists():
        raise ConfigError(f"{folder} is not finished", f"go on with `fedvision simulate --resume {folder}`")
    if load_job(folder / "job.toml").privacy.is_on:
        raise ConfigError(
            "a private run cannot be trained again: draws and noise come from the operating system",
            "without --full its signatures and arithmetic are checked",
        )
    if any(record.get("event") in INCIDENTS for record in read_lines(folder / "rounds.jsonl")):
        raise ConfigError(
            f"{folder} cannot be repeated: a site was absent, failed or was expelled",
            "without --full its signatures and arithmetic are checked",
        )
    sums = sorted((folder / "secagg" / "sums").glob("[!.]*"))
    if not sums:
        raise ConfigError(
            f"{folder} cannot be compared: its sums were not kept", "keep_sums = true keeps them"
        )
    with tempfile.TemporaryDirectory(prefix="fedvision-again-") as scratch:
        again = Path(scratch) / "run"
        plan = resume_plan(folder)
        start_run(plan, again)
        run_federation(plan, again, observe, engine)
        for path in sums:
            ours = again / "secagg" / "sums" / path.name
            if not ours.exists() or ours.read_bytes() != path.read_bytes():
                raise VerificationError(
                    path,
                    "training",
                    "training again gives another sum",
                    "the same bits come from the same machine, versions and threads, see environment.json",
                )
    return len(sums)
