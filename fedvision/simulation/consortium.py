"""Throw-away keys, roster and charter for a simulated federation.

The protocol is the one of a deployment, with real keys; only that one program made them all, so the
governance signature proves nothing about people. Its private key is forgotten at once.

    RUN/secagg/roster.json, charter.json, governance.pub, server.pem
    RUN/sites/NAME/identity.pem      RUN/guards/NAME/   the site's high-water marks
"""

from pathlib import Path
from typing import TYPE_CHECKING

from fedvision.config import Job
from fedvision.errors import ConfigError
from fedvision.secagg import identity
from fedvision.secagg.messages import Documents
from fedvision.secagg.roster import (
    Charter,
    Member,
    Release,
    Roster,
    level_for,
    load_charter,
    load_roster,
    save_signed,
    scale_for,
    sign_document,
    threshold_for,
)
from fedvision.secagg.schedule import Consortium
from fedvision.tasks import initial_network, local_names
from fedvision.training.evaluation import judgement_size
from fedvision.updates.layout import flatten, layout_of, model_digest

if TYPE_CHECKING:
    from fedvision.simulation.run import Plan
    from fedvision_server.secure import ServerKeys
    from fedvision_sites.secure import SecureConfig

SERVER_NAME, GOVERNANCE_NAME = "server", "governance"
MAX_ATTEMPTS = 100
LOSS_CAP = 16.0
"""Largest mean training loss that the sum of losses tells apart."""


def check_size(job: Job, num_sites: int) -> None:
    """Check that a job with secure aggregation has enough sites, not too many, and a model of a fitting size.

    Raises:
        ConfigError: See above.
    """
    if not job.aggregation.secure:
        return
    smallest = job.secure_aggregation.smallest_cohort
    if num_sites < 3:
        raise ConfigError(
            f"secure aggregation needs at least 3 sites that train, the job has {num_sites}",
            "the sum of two tells each the other's update; aggregation.secure = false trains without it",
        )
    if num_sites < smallest:
        raise ConfigError(
            f"the job has {num_sites} sites that train, secure_aggregation.smallest_cohort is {smallest}",
            f"add sites, or write smallest_cohort = {num_sites}: a sum of so few says much about each"
            if num_sites < 5
            else "add sites, or lower secure_aggregation.smallest_cohort",
        )
    if job.secure_aggregation.level == "gram" and num_sites < 4:
        raise ConfigError(
            f'secure_aggregation.level = "gram" needs at least 4 sites that train, the job has {num_sites}',
            'level = "sketch" works with 3',
        )
    if num_sites > 255:
        raise ConfigError(f"secure aggregation takes at most 255 sites, the job has {num_sites}")
    if job.data is not None and job.data.held_out and "test" not in job.secure_aggregation.release:
        raise ConfigError(
            "data.held_out sites report one by one, which secure_aggregation.release does not allow",
            'write release = ["test"], or leave them out',
        )
    if job.secure_aggregation.level in ("sketch", "gram"):
        network = initial_network(job)
        level_for(job.secure_aggregation.level, num_sites, layout_of(network, local_names(network, job)).size)


def make_consortium(plan: "Plan", weight_cap: int, folder: Path) -> None:
    """Make keys, roster and charter of a run, unless they are there.

    Args:
        plan: Job and sites.
        weight_cap: Cases from which a site's weight does not grow.
        folder: The run folder.

    Raises:
        StorageError: A file cannot be written.
    """
    home = folder / "secagg"
    if (home / "charter.json").exists():
        return
    job = plan.job.public()
    train = set(plan.cohort.train)
    keys = {name: _identity(folder / "sites" / name / "identity.pem", name) for name in sorted(plan.data)}
    server = _identity(home / "server.pem", SERVER_NAME)
    governance = identity.generate(GOVERNANCE_NAME)
    members = tuple(
        Member(number=number, name=name, key=keys[name].public.hex()) for number, name in enumerate(keys, 1)
    )
    roster = Roster(federation=f"simulation-{job.name}"[:64], sites=members, server=server.public.hex())
    network = initial_network(job)
    layout = layout_of(network, local_names(network, job))
    sites = tuple(member.number for member in members if member.name in train)
    releases: list[Release] = ["split_presence", "validation_sums"]
    releases.append("test_by_site" if "test" in job.secure_aggregation.release else "test_sums")
    charter = Charter(
        federation=roster.federation,
        roster=roster.digest().hex(),
        job=job.digest(),
        layout=layout.digest,
        size=layout.size,
        initial_weights=model_digest(flatten(network, layout)).hex(),
        sites=sites,
        threshold=threshold_for(len(sites)),
        smallest_cohort=job.secure_aggregation.smallest_cohort,
        smallest_cohort_waiver=job.secure_aggregation.smallest_cohort < 5,
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
    identity_line = identity.public_line(GOVERNANCE_NAME, governance.public)
    (home / "governance.pub").write_text(identity_line + "\n", encoding="utf-8")
    save_signed(home / "roster.json", sign_document(roster, governance))
    save_signed(home / "charter.json", sign_document(charter, governance))


def _identity(path: Path, name: str) -> identity.Identity:
    if not path.exists():
        identity.save(identity.generate(name), path)
    return identity.load(path)


def governance_key(folder: Path) -> bytes:
    """Return the governance key of a run folder.

    Raises:
        ConfigError: The file is absent or damaged.
    """
    path = folder / "secagg" / "governance.pub"
    try:
        return identity.parse_public(path.read_text(encoding="utf-8"), str(path))[1]
    except OSError:
        raise ConfigError(f"{path} is absent", "the run was made without secure aggregation") from None


def load_consortium(folder: Path) -> Consortium:
    """Return roster and charter of a run folder, with their signatures verified.

    Raises:
        ConfigError: One is absent, damaged, or signed by another key.
    """
    key, home = governance_key(folder), folder / "secagg"
    roster = load_roster(home / "roster.json", key)
    return Consortium(roster, load_charter(home / "charter.json", key, roster))


def server_keys(folder: Path) -> "ServerKeys":
    """Return what the server of a run needs."""
    from fedvision_server.secure import ServerKeys

    home = folder / "secagg"
    documents = Documents((home / "roster.json").read_bytes(), (home / "charter.json").read_bytes())
    return ServerKeys(load_consortium(folder), documents, identity.load(home / "server.pem"))


def site_keys(folder: Path, name: str) -> "SecureConfig":
    """Return what a site of a run needs."""
    from fedvision_sites.secure import SecureConfig

    folder = folder.resolve()
    return SecureConfig(
        folder / "sites" / name / "identity.pem", governance_key(folder), folder / "guards" / name
    )
