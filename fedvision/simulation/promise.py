"""What a job promises to the patients of each site, and what a ledger says was spent."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvision.config import LARGEST_NOISE, Job, parse_job
from fedvision.errors import ConfigError, StorageError
from fedvision.privacy.accounting import Mechanism, epsilon, noise_for, steps_for
from fedvision.privacy.ledger_lines import checked_entries
from fedvision.privacy.spending import spent_by
from fedvision.secagg import identity
from fedvision.simulation.run import choose_sites
from fedvision.tasks import initial_network, local_names
from fedvision.training.charter import noise_plan
from fedvision.training.private import counted_noise, delta_of, patients_of, private_steps
from fedvision.updates.layout import layout_of


@dataclass(frozen=True)
class Promise:
    """What a job costs the patients of one site.

    Attributes:
        site: Its name.
        num_patients: That train.
        sampling_rate: Probability with which a step draws each.
        steps: In all rounds.
        noise: The noise multiplier that counts, if secure aggregation holds.
        delta: Chance that the promise does not hold.
        epsilon: If secure aggregation holds.
        epsilon_alone: If it fails.
    """

    site: str
    num_patients: int
    sampling_rate: float
    steps: int
    noise: float
    delta: float
    epsilon: float
    epsilon_alone: float


def promises(job: Job) -> list[Promise]:
    """Return what a job costs the patients of each site that trains.

    Raises:
        ConfigError, DataError: The sites' data do not fit the job; see ``choose_sites``.
    """
    assert job.data is not None
    manifests = {name: m for name, m in choose_sites(job).items() if name not in job.data.held_out}
    network = initial_network(job)
    size = layout_of(network, local_names(network, job)).size
    noise = noise_plan(job, len(manifests))
    found = []
    for name, manifest in manifests.items():
        patients = patients_of(manifest.in_split("train"), job)
        together, alone = counted_noise(job, size, noise, patients.count)
        delta, steps = delta_of(job, patients), private_steps(job, patients) * job.rounds
        first, second = (
            epsilon([Mechanism(patients.rate, sigma, steps)], delta) for sigma in (together, alone)
        )
        found.append(Promise(name, patients.count, patients.rate, steps, together, delta, first, second))
    return found


def with_target(job: Job, found: list[Promise], target: float) -> dict[str, Any]:
    """Return the noise with which every site keeps to an epsilon, and the rounds that the job's noise allows.

    Raises:
        ConfigError: No noise meets it.
    """
    wanted = max(noise_for(target, one.delta, one.sampling_rate, one.steps) for one in found)
    inflation = max(
        job.privacy.noise_multiplier / one.noise for one in found
    )  # what rounding and the grid take away
    needed = math.ceil(wanted * inflation * 1000) / 1000
    if needed > LARGEST_NOISE:
        raise ConfigError(
            f"epsilon {target:g} would take a noise multiplier of {needed:g}, {LARGEST_NOISE:g} is the most",
            "ask for a larger epsilon, fewer rounds, or fewer patients a draw (privacy.patients)",
        )
    content = job.model_dump(mode="json", exclude_none=True)
    content["privacy"]["noise_multiplier"] = needed
    more = parse_job(content, "the job with more noise")
    reached = max(one.epsilon for one in promises(more))
    try:
        rounds = min(
            steps_for(target, one.delta, one.sampling_rate, one.noise) * job.rounds // one.steps
            for one in found
        )
    except ConfigError:  # a single step costs more
        rounds = 0
    return {
        "target_epsilon": target,
        "noise_multiplier": more.privacy.noise_multiplier,
        "epsilon": reached,
        "rounds": rounds,
    }


def ledgers_of(place: Path) -> list[Path]:
    """Return the privacy ledgers of a run folder, or the one that is named.

    Raises:
        StorageError: There is no such file or folder.
    """
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise StorageError(f"{place} does not exist")
    return sorted([*place.glob("sites/*/privacy-ledger.jsonl"), *place.glob("privacy-ledger.jsonl")])


def spent_of(ledger: Path) -> list[dict[str, Any]]:
    """Return what each data set of a ledger has spent, after every line was checked.

    Raises:
        VerificationError: A line is not what the site wrote.
    """
    rows = spent_by(checked_entries(ledger, identity.verify), epsilon)
    keys = ("data_set", "rounds", "epsilon", "epsilon_alone", "delta")
    return [{key: getattr(row, key) for key in keys} for row in rows]
