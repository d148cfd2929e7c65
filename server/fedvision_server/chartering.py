"""From a job file to a job's folder with all that the sites check: who trains, and the signed charter.

    jobs/ID/job.toml           the job without the researcher's paths
            environment.json   versions and machine of the server
            cohort.json        which sites do what
            secagg/            roster.json, charter.json, governance.pub; no private key
            charter-draft.json where governance's key is on another machine: to be signed there

It is a run folder like a simulation's: ``fedvision report`` and ``fedvision verify`` work on it.

Rules:
- A deployment always runs secure aggregation, and nobody here knows how many cases a site has: the job says
  from which number on a site's weight does not grow.
- Nothing in the folder is believed when the job starts: job, charter and sites must be those that the
  operator signed (``job_requests``), and roster and charter must bear the signature of the key that this
  server has pinned (``load_job_folder``).
"""

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedvision.config import Job, dump_job, load_job
from fedvision.environment import describe_machine
from fedvision.errors import ConfigError, StorageError
from fedvision.secagg import identity
from fedvision.secagg.agreement import agreement_folder, load_consortium, load_documents, write_governance
from fedvision.secagg.documents import content_of
from fedvision.secagg.identity import Identity
from fedvision.secagg.roster import (
    Roster,
    load_charter,
    load_draft,
    load_roster,
    save_signed,
    sign_document,
)
from fedvision.secagg.schedule import Consortium
from fedvision.storage import read_json, write_atomic, write_json, write_text
from fedvision.training.charter import check_size, make_charter
from fedvision.training.root import check_fits
from fedvision_server.federation import Cohort
from fedvision_server.home import ServerHome
from fedvision_server.job_requests import Wanted
from fedvision_server.queue import DRAFT, open_queue
from fedvision_server.root_sets import served_root_set
from fedvision_server.rosters import governance_key, latest_roster, signed_rosters
from fedvision_server.secure import ServerKeys
from fedvision_server.site_records import load_records


@dataclass(frozen=True)
class DeployedJob:
    """A job that is ready to run, checked against what its operator signed.

    Attributes:
        job: Without paths.
        cohort: Who does what.
        keys: Consortium, documents and the server's key.
        numbers: Numbers in the roster of all its sites, ascending.
    """

    job: Job
    cohort: Cohort
    keys: ServerKeys
    numbers: tuple[int, ...]


def current_roster(home: ServerHome) -> Roster:
    """Return the roster in force.

    Raises:
        ConfigError: There is none, or it is not signed by the governance key of this server.
    """
    roster = latest_roster(home, governance_key(home))
    if roster is None:
        raise ConfigError("no site is enrolled yet", "`fedvision-server enrol REQUEST` enrols one")
    if bytes.fromhex(roster.server) != _public(home.server_pub)[1]:
        raise ConfigError(
            f"the roster names another key for this server than {home.server_pub}",
            "governance must sign a roster with the server's key",
        )
    return roster


def enrolled_sites(home: ServerHome, roster: Roster) -> list[str]:
    """Return the names of the sites in a roster that are not revoked, in the order of their numbers.

    Raises:
        ConfigError: A record is damaged.
    """
    records = load_records(home)
    keys = {name: one.identity for name, one in records.items() if one.status == "enrolled"}
    return [member.name for member in roster.sites if keys.get(member.name) == member.key]


def choose_cohort(
    job: Job, roster: Roster, enrolled: Sequence[str], sites: Sequence[str], held_out: Sequence[str]
) -> Cohort:
    """Decide who trains and who is held out.

    Args:
        job: Its ``data.sites`` and ``data.held_out`` count where the two arguments are empty.
        roster: The federation.
        enrolled: Sites that may take part.
        sites: Sites that train; empty for all that are not held out.
        held_out: Sites that only test the final model.

    Returns:
        All names in the order of the roster's numbers.

    Raises:
        ConfigError: A site is not enrolled, or is named twice.
    """
    data = job.data
    out = list(held_out) or list(data.held_out if data else ())
    train = list(sites) or list(data.sites if data else ()) or [name for name in enrolled if name not in out]
    for name in (*train, *out):
        if name not in enrolled:
            known = ", ".join(enrolled) or "none"
            raise ConfigError(f"site {ascii(name)[1:-1]} is not enrolled", f"enrolled sites: {known}")
        if (*train, *out).count(name) > 1:
            raise ConfigError(f"site {name} is named twice", "a site trains or is held out, once")
    train.sort(key=roster.number_of)
    out.sort(key=roster.number_of)
    return Cohort(tuple(train), tuple(train), tuple(train), tuple(out))


def check_for_deployment(job: Job, cohort: Cohort) -> None:
    """Check what a deployment asks of a job beyond what a simulation does.

    Raises:
        ConfigError: It has no secure aggregation, not enough sites, or leaves the weight cap open.
    """
    if not job.aggregation.secure:
        raise ConfigError(
            "aggregation.secure is false: each site's update would be seen here",
            "write aggregation.secure = true; a deployment knows no other way, `fedvision simulate` does",
        )
    check_size(job, len(cohort.train), len(cohort.held_out))
    if job.aggregation.weighting == "samples" and job.secure_aggregation.weight_cap is None:
        raise ConfigError(
            "secure_aggregation.weight_cap is missing: nobody here may know how many cases a site has",
            "write weight_cap = 1000, or another number of training cases from which a site's weight does "
            'not grow; or aggregation.weighting = "uniform"',
        )


def make_job_folder(
    home: ServerHome,
    job_id: str,
    job: Job,
    cohort: Cohort,
    roster: Roster,
    governance: Identity | None,
) -> Path:
    """Make the folder of a new job, all of it or nothing.

    Args:
        home: The server's folder.
        job_id: From ``JobQueue.new_id``.
        job: ``check_for_deployment`` has passed.
        cohort: From ``choose_cohort``.
        roster: From ``current_roster``.
        governance: Signs the charter; None leaves a draft to be signed elsewhere.

    Returns:
        The folder.

    Raises:
        ConfigError: The model is too small for the job's level, the key is not governance's, or the server's
            root set is of another kind than the job.
        DataError: A file of the root set changed.
        StorageError: The disk is full, or the folder is there already.
    """
    name, public = _public(home.governance_pub)
    if governance is not None and governance.public != public:
        raise ConfigError(f"the governance key is not that of {home.governance_pub}")
    public_job = job.public()
    root = served_root_set(home) if job.defence.root == "auto" else None
    if root is not None:
        check_fits(root.manifest, job)
    charter = make_charter(
        public_job,
        roster,
        cohort.train,
        job.secure_aggregation.weight_cap or 1,
        root.digest if root else "",
    )
    folder = home.jobs / job_id
    try:
        home.jobs.mkdir(mode=0o750, parents=True, exist_ok=True)
        folder.mkdir(mode=0o750)
    except OSError as error:
        raise StorageError(f"cannot make {folder}: {(error.strerror or str(error)).lower()}") from None
    try:
        write_text(folder / "job.toml", dump_job(public_job))
        write_json(folder / "environment.json", describe_machine())
        write_json(folder / "cohort.json", dataclasses.asdict(cohort))
        write_governance(folder, name, public)
        write_atomic(
            agreement_folder(folder) / "roster.json", content_of(signed_rosters(home)[roster.serial])
        )
        if governance is None:
            write_json(folder / DRAFT, charter.model_dump(mode="json"))
        else:
            save_signed(_charter_file(folder), sign_document(charter, governance))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def finish_draft(home: ServerHome, job_id: str, signed: Path) -> None:
    """Put the charter that governance signed elsewhere into the folder of its draft.

    Args:
        home: The server's folder.
        job_id: A job without a charter.
        signed: The signed file.

    Raises:
        ConfigError: There is no such draft, the file is not that draft signed by governance, or the roster
            was renewed since.
    """
    folder = home.jobs / job_id
    if not (folder / DRAFT).exists():
        raise ConfigError(f"{job_id} does not wait for a charter", "`fedvision-server status` lists all jobs")
    public = governance_key(home)
    roster = load_roster(agreement_folder(folder) / "roster.json", public)
    if roster != current_roster(home):
        raise ConfigError(
            "the roster was renewed since the draft was made", "submit the job file once more: a new draft"
        )
    draft = load_draft(folder / DRAFT, roster)
    if load_charter(signed, public, roster) != draft:
        raise ConfigError(f"{signed} is not the charter of {job_id}", f"sign {folder / DRAFT} as it is")
    write_atomic(_charter_file(folder), signed.read_bytes())


def forget_draft(home: ServerHome, job_id: str) -> None:
    """Remove the draft of a job that is in the queue."""
    (home.jobs / job_id / DRAFT).unlink(missing_ok=True)


def wanted_of(home: ServerHome, job_id: str) -> Wanted:
    """Return what the operator is to sign for a job whose folder is complete.

    Raises:
        ConfigError, StorageError: A file is absent or damaged.
    """
    folder = home.jobs / job_id
    job, cohort = load_job(folder / "job.toml").public(), load_cohort(folder)
    consortium = load_consortium(folder, governance_key(home))
    wanted = Wanted(
        name=job.name,
        job=job.digest(),
        charter=consortium.digest.hex(),
        sites=cohort.train,
        held_out=cohort.held_out,
    )
    _check_signed(folder, job, consortium, wanted, _public(home.server_pub)[1])
    return wanted


def load_cohort(folder: Path) -> Cohort:
    """Read ``cohort.json``.

    Raises:
        StorageError: It is absent or damaged.
    """
    found = read_json(folder / "cohort.json")
    fields = [one.name for one in dataclasses.fields(Cohort)]
    try:
        if sorted(found) != sorted(fields):
            raise TypeError
        parts = {name: tuple(str(site) for site in found[name]) for name in fields}
    except TypeError:
        raise StorageError(f"{folder / 'cohort.json'} is damaged") from None
    return Cohort(**parts)


def load_job_folder(home: ServerHome, job_id: str) -> DeployedJob:
    """Return a job of the queue, ready to run.

    Guarantee: an operator signed that this very job be run, with this charter and these sites; and the
    governance key that this server has pinned signed the charter and its roster.

    Args:
        home: The server's folder.
        job_id: Its whole id.

    Raises:
        ConfigError: It is not in the queue, or its folder is not what was signed.
        StorageError: A file is absent or damaged.
    """
    wanted = open_queue(home).job(job_id).wanted
    if wanted is None:
        raise ConfigError(f"{job_id} is in the queue without an operator's valid signature")
    folder = home.jobs / job_id
    job = load_job(folder / "job.toml").public()
    consortium = load_consortium(folder, governance_key(home))
    own = identity.load(home.server_key)
    _check_signed(folder, job, consortium, wanted, own.public)
    roster = consortium.roster
    cohort = Cohort(wanted.sites, wanted.sites, wanted.sites, wanted.held_out)
    numbers = sorted(roster.number_of(name) for name in (*wanted.sites, *wanted.held_out))
    keys = ServerKeys(consortium, load_documents(folder), own)
    return DeployedJob(job, cohort, keys, tuple(numbers))


def _check_signed(folder: Path, job: Job, consortium: Consortium, wanted: Wanted, server: bytes) -> None:
    """Check that the files of a job are those that governance and the operator signed."""
    charter, roster = consortium.charter, consortium.roster
    for file, is_right in (
        ("job.toml", job.digest() == wanted.job == charter.job),
        ("secagg/charter.json", charter.digest().hex() == wanted.charter),
        ("cohort.json", {roster.member(number).name for number in charter.sites} == set(wanted.sites)),
        ("secagg/roster.json", bytes.fromhex(roster.server) == server),
    ):
        if not is_right:
            raise ConfigError(f"{folder / file} is not what was signed", "put the file back from a back-up")


def check_still_enrolled(home: ServerHome, job_id: str) -> None:
    """Check that a job which is to go on has no site that was revoked, or got a new key, since.

    Raises:
        ConfigError: It has; its charter would still let that site in.
    """
    started = load_job_folder(home, job_id)
    then = started.keys.consortium.roster
    roster = current_roster(home)
    now = {roster.number_of(name): name for name in enrolled_sites(home, roster)}
    keys = {number: roster.member(number).key for number in now}
    for number in started.numbers:
        member = then.member(number)
        if keys.get(number) != member.key:
            raise ConfigError(
                f"site {member.name} was revoked or has a new key since {job_id} was chartered",
                "submit the job file anew with another seed: it gets a charter under the new roster",
            )


def _charter_file(folder: Path) -> Path:
    return agreement_folder(folder) / "charter.json"


def _public(path: Path) -> tuple[str, bytes]:
    try:
        return identity.parse_public(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            f"cannot read {path}", "--home names the folder that `fedvision-server init` made"
        ) from None
