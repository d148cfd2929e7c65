"""What a private job costs this site's patients: looked up before it runs, written down before each round.

    privacy-ledger.jsonl   in a simulated site's folder of the run; a deployed site has one for all its jobs

Rules:
- A job whose rounds would bring the patients past the site's limits is refused before anything is trained.
- A round is in the ledger before its gradient is computed, once, however often it is attempted.
- What is counted is the worst case of this site: the noise after the rounding of the sum is taken off, and
  beside it the noise of this site alone, in case that secure aggregation fails.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from fedvision.config import Job
from fedvision.data.manifest import Manifest
from fedvision.privacy.accounting import Mechanism, epsilon
from fedvision.privacy.ledger import Ledger
from fedvision.privacy.spending import Case as SpentCase
from fedvision.privacy.spending import Entry
from fedvision.secagg.roster import Charter
from fedvision.training.charter import NoisePlan
from fedvision.training.private import counted_noise, delta_of, patients_of, private_steps

LEDGER = "privacy-ledger.jsonl"


@dataclass(frozen=True)
class Budget:
    """What a site's people allow to be spent on a data set, over all jobs.

    Attributes:
        ledger: The file; None for one in the state folder.
        largest_epsilon: If secure aggregation holds.
        largest_epsilon_alone: If it fails, and this site's noise is all there is.
    """

    ledger: Path | None = None
    largest_epsilon: float = math.inf
    largest_epsilon_alone: float = math.inf


NO_LIMIT = Budget()


def entry_of(job: Job, charter: Charter, manifest: Manifest, number: int) -> Entry:
    """Return what a round of a job spends here."""
    patients = patients_of(manifest.in_split("train"), job)
    plan = NoisePlan(charter.patient_clip_norm, charter.noise_multiplier, charter.num_honest, charter.scale)
    honest, alone = counted_noise(job, charter.size, plan, patients.count)
    return Entry(
        data_set=manifest.site,
        manifest=manifest_digest(manifest),
        job=job.digest(),
        round=number,
        sampling_rate=patients.rate,
        noise_honest=honest,
        noise_broken=alone,
        steps=private_steps(job, patients),
        delta=delta_of(job, patients),
    )


@dataclass(frozen=True)
class Cost:
    """What all rounds of a job cost the patients of this site, had they spent nothing before.

    Attributes:
        epsilon: If secure aggregation holds.
        epsilon_alone: If it fails.
        delta: At which both hold.
    """

    epsilon: float
    epsilon_alone: float
    delta: float


def planned_cost(job: Job, charter: Charter, manifest: Manifest) -> Cost:
    """Return what a private job costs the patients of this site.

    Raises:
        ConfigError: The job's delta is too large for this site.
    """
    one = entry_of(job, charter, manifest, 1)
    steps = one.steps * job.rounds
    together, alone = (
        epsilon([Mechanism(one.sampling_rate, noise, steps)], one.delta)
        for noise in (one.noise_honest, one.noise_broken)
    )
    return Cost(together, alone, one.delta)


def note_reserved(
    log: Callable[..., None], first: tuple[int, str], job: Job, data_set: str, cost: Cost
) -> None:
    """Write into the audit log that a job begins to spend; after a crash the line may be there twice.

    Args:
        log: Of the audit log.
        first: Number and digest of the line of the ledger that reserved its first round.
        job: That reserved it.
        data_set: Whose patients.
        cost: Of all rounds; what has no bound is null.
    """
    known = {key: value if math.isfinite(value) else None for key, value in asdict(cost).items()}
    log("privacy-reserved", job=job.digest(), data_set=data_set, line=first[0], digest=first[1], **known)


def manifest_digest(manifest: Manifest) -> str:
    """Return the SHA-256 of which patient has which case in which split."""
    rows = sorted((case.patient, case.id, case.split) for case in manifest.cases)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def check_budget(ledger: Ledger, budget: Budget, job: Job, charter: Charter, manifest: Manifest) -> None:
    """Check that all rounds of a job stay within what this site's people allow.

    Raises:
        PrivacyError: They do not; the rule travels, the numbers stay here.
        ConfigError: The job's delta is too large for this site.
    """
    one = entry_of(job, charter, manifest, 1)
    limits: tuple[tuple[float, float, SpentCase], ...] = (
        (budget.largest_epsilon, one.noise_honest, "honest"),
        (budget.largest_epsilon_alone, one.noise_broken, "broken"),
    )
    for limit, noise, case in limits:
        if limit < math.inf:
            planned = [Mechanism(one.sampling_rate, noise, one.steps * job.rounds)]
            ledger.check_limit(manifest.site, planned, limit, one.delta, epsilon, job=job.digest(), case=case)
