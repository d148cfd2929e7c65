"""Throw-away keys, roster and charter for a simulated federation.

The protocol is the one of a deployment, with real keys; only that one program made them all, so the
governance signature proves nothing about people. Its private key is forgotten at once.

    RUN/secagg/roster.json, charter.json, governance.pub, server.pem
    RUN/sites/NAME/identity.pem      RUN/guards/NAME/   the site's high-water marks
"""

from pathlib import Path
from typing import TYPE_CHECKING

from fedvision.config import Job
from fedvision.secagg import identity
from fedvision.secagg.agreement import (
    agreement_folder,
    governance_key,
    load_consortium,
    load_documents,
    write_governance,
)
from fedvision.secagg.roster import Member, Roster, save_signed, sign_document
from fedvision.training import charter

if TYPE_CHECKING:
    from fedvision.simulation.run import Plan
    from fedvision_server.secure import ServerKeys
    from fedvision_sites.secure import SecureConfig

SERVER_NAME, GOVERNANCE_NAME = "server", "governance"


def check_size(job: Job, num_sites: int) -> None:
    """Check that a job fits so many sites that train, see ``charter.check_size``.

    Raises:
        ConfigError: It does not.
    """
    charter.check_size(job, num_sites, len(job.data.held_out) if job.data else 0)


def make_consortium(plan: "Plan", weight_cap: int, folder: Path, root_set: str = "") -> None:
    """Make keys, roster and charter of a run, unless they are there.

    Args:
        plan: Job and sites.
        weight_cap: Cases from which a site's weight does not grow.
        folder: The run folder.
        root_set: Digest of the root set; "" without one.

    Raises:
        StorageError: A file cannot be written.
    """
    home = agreement_folder(folder)
    if (home / "charter.json").exists():
        return
    job = plan.job.public()
    keys = {name: _identity(folder / "sites" / name / "identity.pem", name) for name in sorted(plan.data)}
    server = _identity(home / "server.pem", SERVER_NAME)
    governance = identity.generate(GOVERNANCE_NAME)
    members = tuple(
        Member(number=number, name=name, key=keys[name].public.hex()) for number, name in enumerate(keys, 1)
    )
    roster = Roster(federation=f"simulation-{job.name}"[:64], sites=members, server=server.public.hex())
    rules = charter.make_charter(job, roster, plan.cohort.train, weight_cap, root_set)
    write_governance(folder, GOVERNANCE_NAME, governance.public)
    save_signed(home / "roster.json", sign_document(roster, governance))
    save_signed(home / "charter.json", sign_document(rules, governance))


def _identity(path: Path, name: str) -> identity.Identity:
    if not path.exists():
        identity.save(identity.generate(name), path)
    return identity.load(path)


def server_keys(folder: Path) -> "ServerKeys":
    """Return what the server of a run needs."""
    from fedvision_server.secure import ServerKeys

    own = identity.load(agreement_folder(folder) / "server.pem")
    return ServerKeys(load_consortium(folder), load_documents(folder), own)


def site_keys(folder: Path, name: str) -> "SecureConfig":
    """Return what a site of a run needs."""
    from fedvision_sites.secure import SecureConfig

    folder = folder.resolve()
    return SecureConfig(
        folder / "sites" / name / "identity.pem", governance_key(folder), folder / "guards" / name
    )
