"""Jobs, rosters and charters that a site is asked for, without data or networks."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedvision.config import Job, parse_job
from fedvision.secagg import identity
from fedvision.secagg.roster import Charter, Member, Roster, colluding_bound, scale_for, threshold_for
from fedvision_sites.policy import DataSet
from tests.conftest import tiny_content

NAMES = ("aachen", "bergen", "cork", "delft", "essen", "utrecht")
KEYS = {name: identity.generate(name) for name in (*NAMES, "server")}
GOVERNANCE = identity.generate("governance")
DATA = DataSet("liver", 20, 4, 8)
NOON = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)
"""A Monday."""
NIGHT = datetime(2026, 5, 4, 23, 0, tzinfo=UTC)


def make_job(**changes: Any) -> Job:
    """Return a job with secure aggregation; ``section__key=value`` changes one key, see ``tiny_content``."""
    changes = {"aggregation__secure": True, "secure_aggregation__smallest_cohort": 5} | changes
    changes = {"secure_aggregation__level": "sum", **changes}
    content = tiny_content(Path("data"), **changes)
    del content["data"]
    return parse_job(content, "job")


def make_roster(federation: str = "liver-ct") -> Roster:
    """Return a roster of six sites."""
    members = tuple(
        Member(number=number, name=name, key=KEYS[name].public.hex()) for number, name in enumerate(NAMES, 1)
    )
    return Roster(federation=federation, sites=members, server=KEYS["server"].public.hex())


def make_charter(job: Job, roster: Roster, **changes: Any) -> Charter:
    """Return a charter that says what the job says, with some fields changed."""
    num_sites, smallest = len(roster.sites), job.secure_aggregation.smallest_cohort
    content: dict[str, Any] = {
        "federation": roster.federation,
        "roster": roster.digest().hex(),
        "job": job.digest(),
        "layout": "1" * 64,
        "size": 12_345,
        "initial_weights": "2" * 64,
        "sites": tuple(one.number for one in roster.sites),
        "max_colluding": colluding_bound(num_sites),
        "threshold": threshold_for(num_sites),
        "smallest_cohort": smallest,
        "smallest_cohort_waiver": smallest < 5,
        "rounds": job.rounds,
        "level": "sum",
        "clip_norm": job.aggregation.clip_norm,
        "scale": scale_for(num_sites),
        "weight_cap": 100,
        "releases": ("test_by_site",) if "test" in job.secure_aggregation.release else (),
        "statistics_size": 5,
        "resamples": job.evaluation.bootstrap,
    }
    return Charter.model_validate(content | changes)
