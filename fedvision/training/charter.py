"""The charter of a job: from the job file and the roster to the rules that every site checks and signs up to.

One place for simulation and deployment, so that a job has the same rules in both.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

from fedvision.config import Job, RuleName
from fedvision.defence.rules import WITHOUT_ROOT, default_rules, least_sites, num_attackers
from fedvision.errors import ConfigError
from fedvision.secagg.roster import (
    MAX_SITES,
    MIN_SITES,
    SMALLEST_COHORT,
    Charter,
    Level,
    Release,
    Roster,
    colluding_bound,
    input_noise,
    level_for,
    scale_for,
    threshold_for,
)
from fedvision.tasks import initial_network, local_names
from fedvision.training.evaluation import judgement_size
from fedvision.updates.layout import flatten, layout_of, model_digest

MAX_ATTEMPTS = 100
LOSS_CAP = 16.0
"""Largest mean training loss that the sum of losses tells apart."""


def check_size(job: Job, num_sites: int, num_held_out: int = 0) -> None:
    """Check that a job with secure aggregation has enough sites, not too many, and a model of a fitting size.

    Args:
        job: What is to be trained.
        num_sites: Sites that train.
        num_held_out: Sites that only test the final model.

    Raises:
        ConfigError: See above; or held-out sites would have to tell what the job does not let them.
    """
    if not job.aggregation.secure:
        return
    smallest = job.secure_aggregation.smallest_cohort
    if num_sites < MIN_SITES:
        raise ConfigError(
            f"secure aggregation needs at least 3 sites that train, the job has {num_sites}",
            "the sum of two tells each the other's update; aggregation.secure = false trains without it",
        )
    if num_sites < smallest:
        raise ConfigError(
            f"the job has {num_sites} sites that train, secure_aggregation.smallest_cohort is {smallest}",
            f"add sites, or write smallest_cohort = {num_sites}: a sum of so few says much about each"
            if num_sites < SMALLEST_COHORT
            else "add sites, or lower secure_aggregation.smallest_cohort",
        )
    if job.secure_aggregation.level == "gram" and num_sites < 4:
        raise ConfigError(
            f'secure_aggregation.level = "gram" needs at least 4 sites that train, the job has {num_sites}',
            'level = "sketch" works with 3',
        )
    if num_sites > MAX_SITES:
        raise ConfigError(f"secure aggregation takes at most {MAX_SITES} sites, the job has {num_sites}")
    if num_held_out and "test" not in job.secure_aggregation.release:
        raise ConfigError(
            "data.held_out sites report one by one, which secure_aggregation.release does not allow",
            'write release = ["test"], or leave them out',
        )
    if job.secure_aggregation.level in ("sketch", "gram"):
        network = initial_network(job)
        level_for(job.secure_aggregation.level, num_sites, layout_of(network, local_names(network, job)).size)


def rules_for(job: Job, level: Level, num_sites: int, has_root: bool) -> tuple[RuleName, ...]:
    """Return the rules by which updates are left out: the job's, or the default for so many sites.

    Args:
        job: Its ``defence.rules`` decides.
        level: What the server sees of an update; at ``sum`` it sees nothing that a rule could use.
        num_sites: Sites that train.
        has_root: Whether there is a root set.

    Raises:
        ConfigError: The job names rules that this level, or the lack of a root set, does not allow.
    """
    wanted = job.defence.rules
    if wanted and level != "sum" and not has_root and job.defence.max_malicious > WITHOUT_ROOT:
        raise ConfigError(
            f"defence.max_malicious = {job.defence.max_malicious:g} needs a root set: without one, the rules "
            "side with the larger group of sites that agree, and leave out honest ones",
            f"name one in data.root_set, or write max_malicious = {WITHOUT_ROOT:g}",
        )
    if wanted == "auto":
        return cast(tuple[RuleName, ...], default_rules(num_sites, has_root)) if level != "sum" else ()
    if wanted and level == "sum":
        raise ConfigError(
            f'defence.rules = {list(wanted)} needs level "sketch" or "gram": at "sum" no update is judged',
            "set secure_aggregation.level, or write defence.rules = []",
        )
    if "root_cosine" in wanted and not has_root:
        raise ConfigError(
            "defence.rules names root_cosine, but there is no root set",
            "name one in data.root_set, or at the server: `fedvision-server root-set add DATASET`",
        )
    for rule in wanted:
        least = least_sites(rule, num_sites, job.defence.max_malicious)
        if num_sites < least:
            raise ConfigError(
                f"rule {rule} needs {least} sites, the job has {num_sites} that train",
                "take it out of defence.rules, lower defence.max_malicious, or add sites",
            )
    return wanted


def rules_in_the_clear(job: Job, num_sites: int, has_root: bool) -> tuple[RuleName, ...]:
    """Return the rules of a job without secure aggregation: the server sees every update."""
    return rules_for(job, "gram", num_sites, has_root)


def colluding_for(job: Job, num_sites: int) -> int:
    """Return m, from how many sites that help the server an update stays hidden.

    Args:
        job: Its ``secure_aggregation.max_colluding`` decides.
        num_sites: Sites that train.

    Raises:
        ConfigError: It is more than so many sites allow.
    """
    wanted, most = job.secure_aggregation.max_colluding, colluding_bound(num_sites)
    if wanted == "auto":
        return most
    if wanted > most:
        raise ConfigError(
            f"secure_aggregation.max_colluding is {wanted}, with {num_sites} sites it is {most} at most",
            'write "auto" for the most there can be',
        )
    return wanted


def check_left_out(job: Job, num_sites: int, threshold: int) -> None:
    """Check that as many sites can be left out of a sum as a job expects to attack.

    Raises:
        ConfigError: They cannot, and the job's ``max_malicious`` is above the default.
    """
    count = num_attackers(num_sites, job.defence.max_malicious)
    most = num_sites - max(threshold, job.secure_aggregation.smallest_cohort)
    if job.defence.max_malicious > WITHOUT_ROOT and count > most:
        raise ConfigError(
            f"defence.max_malicious = {job.defence.max_malicious:g} is {count} of {num_sites} sites, but a "
            f"sum can do without {most} only",
            "secure_aggregation.max_colluding = 1 lets it do without more; or lower max_malicious",
        )


@dataclass(frozen=True)
class NoisePlan:
    """The noise that a charter names, and what follows from it; see ``Charter``.

    Attributes:
        patient_clip_norm: Largest norm of what one patient adds to an input; 0 without noise in shares.
        noise_multiplier: Of any sum, in ``patient_clip_norm``; 0 for none.
        num_honest: Sites that share it.
        scale: Fixed-point steps in a clip norm of an input.
    """

    patient_clip_norm: float
    noise_multiplier: float
    num_honest: int
    scale: int


def noise_plan(job: Job, num_sites: int) -> NoisePlan:
    """Return the noise of a job at so many sites that train.

    Raises:
        ConfigError: The job's ``max_colluding`` is more than so many sites allow.
    """
    colluding = colluding_for(job, num_sites)
    quorum = max(threshold_for(num_sites, colluding), job.secure_aggregation.smallest_cohort)
    honest = quorum - colluding
    if job.privacy.mode != "distributed":
        return NoisePlan(0.0, 0.0, honest, scale_for(num_sites))
    privacy = job.privacy
    share = privacy.noise_multiplier / math.sqrt(honest)
    noise = input_noise(share, num_sites, privacy.clip_norm, job.aggregation.clip_norm)
    return NoisePlan(privacy.clip_norm, privacy.noise_multiplier, honest, scale_for(num_sites, noise))


def make_charter(
    job: Job, roster: Roster, train: Collection[str], weight_cap: int, root_set: str = ""
) -> Charter:
    """Return the charter of a job, not signed. The same arguments give the same charter.

    Args:
        job: What is trained; ``check_size`` has passed.
        roster: The federation.
        train: Names of the sites that train.
        weight_cap: Cases from which a site's weight does not grow; without effect for uniform weights.
        root_set: Digest of the root set, "" without one; without effect if the job wants none.

    Raises:
        ConfigError: A site is not in the roster, the model is too small for the job's level, or the rules of
            its defence need what it has not.
    """
    network = initial_network(job)
    layout = layout_of(network, local_names(network, job))
    sites = tuple(sorted(roster.number_of(name) for name in train))
    level = level_for(job.secure_aggregation.level, len(sites), layout.size)
    root_set = root_set if job.defence.root == "auto" and level != "sum" else ""
    releases: list[Release] = ["split_presence", "validation_sums"]
    releases.append("test_by_site" if "test" in job.secure_aggregation.release else "test_sums")
    rules = rules_for(job, level, len(sites), bool(root_set))
    releases += ["judgements"] if rules else []
    max_colluding = colluding_for(job, len(sites))
    threshold = threshold_for(len(sites), max_colluding)
    if rules:
        check_left_out(job, len(sites), threshold)
    noise = noise_plan(job, len(sites))
    return Charter(
        federation=roster.federation,
        roster=roster.digest().hex(),
        job=job.digest(),
        layout=layout.digest,
        size=layout.size,
        initial_weights=model_digest(flatten(network, layout)).hex(),
        sites=sites,
        max_colluding=max_colluding,
        threshold=threshold,
        smallest_cohort=job.secure_aggregation.smallest_cohort,
        smallest_cohort_waiver=job.secure_aggregation.smallest_cohort < SMALLEST_COHORT,
        rounds=job.rounds,
        max_attempts=MAX_ATTEMPTS,
        level=level,
        clip_norm=job.aggregation.clip_norm,
        scale=noise.scale,
        weight_cap=weight_cap if job.aggregation.weighting == "samples" else 1,
        metric_caps=(LOSS_CAP,),
        patient_clip_norm=noise.patient_clip_norm,
        noise_multiplier=noise.noise_multiplier,
        rules=rules,
        max_malicious=job.defence.max_malicious,
        root_set=root_set,
        releases=tuple(releases),
        statistics_size=judgement_size(1, job, is_final=True),
        resamples=job.evaluation.bootstrap,
    )
