"""``fedvision-server submit``, ``status``, ``stop`` and ``logs``: the jobs of a server.

To submit and to stop takes the private key of an operator that ``server.toml`` lists. To look takes read
access to the server's folder and no key. The commands write to the folder only; the program that
``fedvision-server run`` started acts on it.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedvision.errors import ConfigError, FedvisionError
from fedvision_server.home import ServerHome

if TYPE_CHECKING:
    from fedvision.secagg.identity import Identity
    from fedvision_server.job_status import SiteStanding, Standing
    from fedvision_server.queue import Entry, JobQueue

Home = Annotated[Path, typer.Option("--home", help="The coordinator's folder, made by `init`.")]
OperatorKey = Annotated[
    Path | None,
    typer.Option(
        "--key", metavar="OPERATOR.pem", help="The operator's private key (default: HOME/keys/operator.pem)."
    ),
]
JobArgument = Annotated[str, typer.Argument(metavar="ID", help="The job; its number is enough.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]

WIDTH = 200


def submit(
    what: Annotated[
        str, typer.Argument(metavar="JOB.toml|ID", help="A job file; with --charter or --again, an id.")
    ],
    sites: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C", help="Sites that train (default: the job's data.sites, else all enrolled)."
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="D", help="Sites that only test the final model (default: the job's data.held_out)."
        ),
    ] = None,
    charter: Annotated[
        Path | None,
        typer.Option(metavar="SIGNED.json", help="The charter of job ID, signed on governance's machine."),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Let job ID, which failed or was stopped, go on.")
    ] = False,
    key: OperatorKey = None,
    home: Home = Path(),
) -> None:
    """Submit a job: check it, sign its charter, put it into the queue.

    Each site decides for itself whether it takes part. Where governance's private key is on another machine,
    a draft of the charter is written; sign it there with `fedvision keys sign`, then give it with --charter.

    A job that failed or was stopped goes on from its last finished round with --again.
    """
    place = ServerHome(home)
    if again and charter is not None:
        raise ConfigError("--again and --charter exclude each other")
    if (again or charter is not None) and (sites is not None or held_out is not None):
        raise ConfigError("--sites and --held-out are for a new job", "the charter of a job names its sites")
    from fedvision_server.queue import open_queue

    queue = open_queue(place)
    operator = operator_of(place, queue, key)
    if again:
        _submit_again(place, queue, operator, what)
    elif charter is not None:
        _submit_signed(place, queue, operator, what, charter)
    else:
        _submit_new(place, queue, operator, Path(what), _names(sites), _names(held_out))


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else ()


def operator_of(home: ServerHome, queue: "JobQueue", key: Path | None) -> "Identity":
    """Return the identity of an operator."""
    from fedvision.secagg import identity

    operator = identity.load(key or home.operator)
    queue.check_operator(operator)
    return operator


def _log(home: ServerHome, kind: str, **fields: str | bool | list[str]) -> None:
    """Write to the audit log."""
    from fedvision_server.rosters import audit_log

    audit_log(home).append(kind, **fields)


def _submit_new(
    home: ServerHome,
    queue: "JobQueue",
    operator: "Identity",
    path: Path,
    sites: Sequence[str],
    held_out: Sequence[str],
) -> None:
    from fedvision.config import load_job
    from fedvision.secagg import identity
    from fedvision.secagg.agreement import agreement_folder
    from fedvision_server import chartering

    job = load_job(path)
    roster = chartering.current_roster(home)
    cohort = chartering.choose_cohort(job, roster, chartering.enrolled_sites(home, roster), sites, held_out)
    chartering.check_for_deployment(job, cohort)
    queue.check_new(job.digest())
    governance = identity.load(home.governance) if home.governance.exists() else None
    job_id = queue.new_id(job.name)
    folder = chartering.make_job_folder(home, job_id, job, cohort, roster, governance)
    if governance is None:
        draft = folder / chartering.DRAFT
        typer.echo(f"{job_id}: a draft, its charter is to be signed")
        typer.echo(f"charter: {draft}")
        typer.echo(f"roster: {agreement_folder(folder) / 'roster.json'}")
        _note(
            "next, on governance's machine, with copies of both: "
            f"fedvision keys sign {draft.name} --roster roster.json --key GOVERNANCE.pem"
        )
        _note(f"then here: fedvision-server submit --charter {draft.stem}.signed.json {job_id}")
        return
    try:
        _put(home, queue, operator, job_id)
    except FedvisionError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _say_submitted(queue, job_id)


def _submit_signed(
    home: ServerHome, queue: "JobQueue", operator: "Identity", text: str, charter: Path
) -> None:
    from fedvision_server import chartering
    from fedvision_server.queue import is_meant

    drafts = [path.parent.name for path in home.jobs.glob(f"*/{chartering.DRAFT}")]
    job_id = next((name for name in drafts if is_meant(text, name)), text)
    chartering.finish_draft(home, job_id, charter)
    _put(home, queue, operator, job_id)
    chartering.forget_draft(home, job_id)
    _say_submitted(queue, job_id)


def _put(home: ServerHome, queue: "JobQueue", operator: "Identity", job_id: str) -> None:
    """Put a job whose folder is complete into the queue."""
    from fedvision_server.chartering import wanted_of

    wanted = wanted_of(home, job_id)

    def announce() -> None:
        _log(home, "charter", job=job_id, digest=wanted.charter)
        _log(
            home,
            "submitted",
            job=job_id,
            digest=wanted.job,
            charter=wanted.charter,
            sites=list(wanted.sites),
            held_out=list(wanted.held_out),
            operator=operator.public.hex(),
        )

    queue.submit(operator, job_id, wanted, announce)


def _say_submitted(queue: "JobQueue", job_id: str) -> None:
    """Say what was submitted and what happens next."""
    entry = queue.job(job_id)
    assert entry.wanted is not None
    typer.echo(f"{job_id}: submitted, {_place(queue, entry)}")
    typer.echo(f"train: {', '.join(entry.sites)}")
    if entry.held_out:
        typer.echo(f"held out: {', '.join(entry.held_out)}")
    typer.echo(f"charter: {entry.wanted.charter}")
    _note(
        "next: each site must allow it (`fedvision-site jobs` there), unless its policy does so by itself; "
        f"`fedvision-server status {job_id}` shows how far it is"
    )


def _submit_again(home: ServerHome, queue: "JobQueue", operator: "Identity", text: str) -> None:
    from fedvision_server.chartering import check_still_enrolled

    entry = queue.job(text)
    check_still_enrolled(home, entry.id)
    fields = {"job": entry.id, "digest": entry.digest, "operator": operator.public.hex()}
    entry = queue.submit_again(operator, entry.id, lambda: _log(home, "submitted", again=True, **fields))
    typer.echo(f"{entry.id}: submitted again, {_place(queue, entry)}")
    _note("it goes on from its last finished round")


def _place(queue: "JobQueue", entry: "Entry") -> str:
    """Say when a job that waits will start."""
    before = [
        one
        for one in queue.jobs()
        if one.wanted and one.state in ("waiting", "running") and one.id != entry.id
    ]
    if not before:
        return "starts when the server runs"
    return f"after {', '.join(one.id for one in before)}"


def stop(job_id: JobArgument, key: OperatorKey = None, home: Home = Path()) -> None:
    """Stop a job. What is finished stays, and `submit --again ID` goes on with it.

    A running job stops after the message that is under way; sites are not interrupted.
    """
    from fedvision_server.queue import open_queue

    place = ServerHome(home)
    queue = open_queue(place)
    operator = operator_of(place, queue, key)
    entry = queue.request_stop(operator, queue.job(job_id).id)
    _log(place, "stopped", job=entry.id, operator=operator.public.hex())
    done = "stopped" if entry.state == "stopped" else "will stop after the message that is under way"
    typer.echo(f"{entry.id}: {done}")
    _note(f"`fedvision-server submit --again {entry.id}` goes on with it")


def status(
    job_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="One job, with its sites; its number is enough.")
    ] = None,
    as_json: AsJson = False,
    home: Home = Path(),
) -> None:
    """Show where the jobs stand, or one job and each of its sites."""
    from fedvision_server import job_status
    from fedvision_server.job_tables import print_job, print_jobs
    from fedvision_server.queue import open_queue

    place = ServerHome(home)
    queue = open_queue(place)
    if job_id is None:
        found = job_status.all_standings(place, queue)
        if as_json:
            typer.echo(json.dumps([asdict(one) for one in found], indent=2, ensure_ascii=False))
        elif found:
            print_jobs(found, _console())
        else:
            typer.echo("no job yet; `fedvision-server submit JOB.toml` submits one")
        return
    one = _one_standing(place, queue, job_id)
    rows: list[SiteStanding] = []
    trouble = ""
    if one.state not in ("draft", job_status.NOT_SIGNED):
        try:
            rows = job_status.site_standings(place, queue.job(one.id))
        except FedvisionError as error:
            trouble = str(error)
    if as_json:
        content = {
            **asdict(one),
            "folder": str(place.jobs / one.id),
            "by_site": [asdict(row) for row in rows],
        }
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        print_job(place, one, rows, _console())
    if trouble:
        _note(f"the sites are not shown: {trouble}")


def _console() -> Console:
    """Return where tables go: lines of a file or pipe are not broken at 80 characters."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def _one_standing(home: ServerHome, queue: "JobQueue", text: str) -> "Standing":
    from fedvision_server.job_status import all_standings
    from fedvision_server.queue import is_meant

    for one in all_standings(home, queue):
        if is_meant(text, one.id):
            return one
    queue.job(text)
    raise AssertionError("a job of the queue stands nowhere")


def logs(
    job_id: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    home: Home = Path(),
) -> None:
    """Print what happened in a job: one line for each round, and for each thing that went wrong."""
    from fedvision_server.job_log import print_log
    from fedvision_server.queue import open_queue

    place = ServerHome(home)
    queue = open_queue(place)
    console = Console(highlight=False, force_terminal=False)
    print_log(place, queue, queue.job(job_id), follow, console)


def _note(text: str) -> None:
    from fedvision.cli.program import note

    note(text)
