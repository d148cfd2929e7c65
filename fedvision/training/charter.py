"""The charter of a job: from the job file and the roster to the rules that every site checks and signs up to.

One place for simulation and deployment, so that a job has the same rules in both.
"""

from collections.abc import Collection

from fedvision.config import Job
from fedvision.errors import ConfigError
from fedvision.secagg.roster import (
    MAX_SITES,
    MIN_SITES,
    SMALLEST_COHORT,
    Charter,
    Release,
    Roster,
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


def make_charter(job: Job, roster: Roster, train: Collection[str], weight_cap: int) -> Charter:
    """Return the charter of a job, not signed. The same arguments give the same charter.

    Args:
        job: What is trained; ``check_size`` has passed.
        roster: The federation.
        train: Names of the sites that train.
        weight_cap: Cases from which a site's weight does not grow; without effect for uniform weights.

    Raises:
        ConfigError: A site is not in the roster, or the model is too small for the job's level.
    """
    network = initial_network(job)
    layout = layout_of(network, local_names(network, job))
    sites = tuple(sorted(roster.number_of(name) for name in train))
    releases: list[Release] = ["split_presence", "validation_sums"]
    releases.append("test_by_site" if "test" in job.secure_aggregation.release else "test_sums")
    return Charter(
        federation=roster.federation,
        roster=roster.digest().hex(),
        job=job.digest(),
        layout=layout.digest,
        size=layout.size,
        initial_weights=model_digest(flatten(network, layout)).hex(),
        sites=sites,
        threshold=threshold_for(len(sites)),
        smallest_cohort=job.secure_aggregation.smallest_cohort,
        smallest_cohort_waiver=job.secure_aggregation.smallest_cohort < SMALLEST_COHORT,
        rounds=job.rounds,
        max_attempts=MAX_ATTEMPTS,
        level=level_for(job.secure_aggregation.level, len(sites), layout.size),
        clip_norm=job.aggregation.clip_norm,
        scale=scale_for(len(sites)),
        weight_cap=weight_cap if job.aggregation.weighting == "samples" else 1,
        metric_caps=(LOSS_CAP,),
        releases=tuple(releases),
        statistics_size=judgement_size(1, job, is_final=True),
        resamples=job.evaluation.bootstrap,
    )
