"""``fedvision-site jobs``, ``allow`` and ``deny``: what this site was asked to run, and its answer."""

import json
import math
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedvision.cli.program import note
from fedvision.config import Job
from fedvision.data.manifest import load_manifest
from fedvision.errors import FedvisionError, StorageError
from fedvision.secagg.roster import Charter
from fedvision.storage import read_lines
from fedvision_sites import decisions
from fedvision_sites.budget import planned_cost
from fedvision_sites.decision_file import Record, find, whole_record
from fedvision_sites.home import SiteHome, SiteSettings
from fedvision_sites.policy import num_steps, references, shown

WIDTH, SHOWN_DIGITS = 100, 12
ROUND_BYTES = 4
STYLES = {"allowed": "green", "waiting": "yellow", "denied": "red", "refused": "red"}

Home = Annotated[Path, typer.Option("--home", metavar="HOME", help="The folder of this site.")]
Digest = Annotated[str, typer.Argument(metavar="DIGEST", help="6 or more digits of the job's digest.")]
By = Annotated[
    str, typer.Option("--by", metavar="NAME", help="Who decides (default: the user of this machine).")
]


def jobs(
    digest: Annotated[
        str,
        typer.Argument(metavar="[DIGEST]", help="Show this job: 6 or more digits.", show_default=False),
    ] = "",
    home: Home = Path(),
    full: Annotated[bool, typer.Option("--full", help="With DIGEST: also print every setting.")] = False,
) -> None:
    """Show what this site was asked to run, what is allowed, and what waits and why.

    With DIGEST: what that job would run and on which data, what leaves the site, and what the policy says.
    """
    own, now = SiteHome(home), datetime.now(UTC)
    policy = own.settings().policy
    if digest:
        name = find(own.decisions, digest)
        found = whole_record(own.decisions, name)
        decision = decisions.judge(found, policy, now)
        promise = _promise(found, own.settings())
        for line in _description(decision, found, _rounds_done(own, name), promise):
            typer.echo(line)
        if full:
            typer.echo("\nEvery setting\n" + json.dumps(found.job.model_dump(mode="json"), indent=2))
        return
    listed = decisions.list_decisions(own.decisions, policy, now)
    if not listed:
        typer.echo("nothing was asked for yet")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("job", "name", "status", "rounds", "asked", "why"):
        table.add_column(head, no_wrap=head != "why", overflow="fold")
    for one in listed:
        table.add_row(*_row(one, own))
    Console(highlight=False).print(table)
    note("`jobs DIGEST` shows one; `allow DIGEST` and `deny DIGEST --reason TEXT` decide")


def allow(
    digest: Digest,
    home: Home = Path(),
    by: By = "",
    charter: Annotated[
        str,
        typer.Option(
            metavar="DIGITS",
            help="First digits of the charter that you have seen; another one is not allowed.",
            show_default=False,
        ),
    ] = "",
) -> None:
    """Allow a job, under the charter that it now has and on the data set that it now uses.

    What the policy forbids stays forbidden: change site.toml first, if that is meant.
    """
    own, log = _opened(home)
    done = decisions.allow(
        own.decisions, digest, by, own.settings().policy, datetime.now(UTC), charter=charter, log=log
    )
    _report(done, "allowed")
    if done.status == "waiting":
        typer.echo(f"it waits: {done.reason}")


def deny(
    digest: Digest,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; it stays at this site.")],
    home: Home = Path(),
    by: By = "",
) -> None:
    """Deny a job, under any charter, until it is allowed. One that runs ends with the sum under way."""
    own, log = _opened(home)
    policy = own.settings().policy
    _report(decisions.deny(own.decisions, digest, reason, by, policy, datetime.now(UTC), log=log), "denied")


def _opened(home: Path) -> tuple[SiteHome, decisions.Log]:
    from fedvision.audit.log import AuditLog
    from fedvision.secagg import identity

    own = SiteHome(home)
    return own, AuditLog(own.audit, identity.load(own.identity), own.settings().site.name).append


def _report(done: decisions.Decision, what: str) -> None:
    assert done.record is not None and done.record.word is not None, "a person decides about whole files"
    charter = done.record.charter_digest
    under = f", charter {charter[:SHOWN_DIGITS]}" if charter else ""
    typer.echo(
        f"{what}: {done.record.job.name} ({done.job_digest[:SHOWN_DIGITS]}{under}) by {done.record.word.by}"
    )


def _row(one: decisions.Decision, own: SiteHome) -> tuple[Text, ...]:
    name, rounds, asked = "", "", ""
    if one.record is not None:
        job = one.record.job
        name, asked = job.name, _time(one.record.last_asked)
        done = _rounds_done(own, one.job_digest)
        rounds = f"{done} of {job.rounds}" if done else str(job.rounds)
    cells = (one.job_digest[:SHOWN_DIGITS], name, one.status, rounds, asked, shown(one.reason, 300))
    return tuple(Text(cell, STYLES[one.status] if cell == one.status else "") for cell in cells)


def _rounds_done(own: SiteHome, digest: str) -> int:
    """Return the last round that this site trained in; 0 for none, or if its record cannot be read."""
    try:
        records = read_lines(own.jobs / digest[:16] / "log.jsonl")
    except (StorageError, OSError):
        return 0
    trained = (one.get("round") for one in records if "num_steps" in one)
    return max((number for number in trained if isinstance(number, int)), default=0)


def _time(when: datetime) -> str:
    return f"{when.astimezone():%Y-%m-%d %H:%M}"


def _description(
    decision: decisions.Decision, record: Record, rounds_done: int, promise: str
) -> Iterator[str]:
    """Yield the lines of ``jobs DIGEST``."""
    job, charter, data = record.job, record.charter, record.data_set
    yield f"{job.name}  {record.job_digest}"
    yield from _entry("status", decision.status + (f": {decision.reason}" if decision.reason else ""))
    yield from _entry("asked", f"first {_time(record.first_asked)}, last {_time(record.last_asked)}")
    word = record.word
    if word is not None:
        about = f" under charter {word.charter[:SHOWN_DIGITS]}" if word.charter else ""
        yield from _entry("decided", f"{word.kind} by {word.by} ({word.user}), {_time(word.when)}{about}")
    yield "\nWhat would run"
    classes = ", ".join(shown(one) for one in job.task.classes)
    yield from _entry("task", f"{job.task.kind} in {job.task.spatial_dims}D of {classes}")
    numbers = f"{data.num_train} training, {data.num_val} validation and {data.num_test} test cases"
    yield from _entry("data set", f"{data.name}: {numbers}")
    size = f", {charter.size:,} weights" if charter is not None else ""
    yield from _entry("network", shown(job.model.name) + size)
    if job.model.args:
        yield from _entry("", shown(json.dumps(job.model.args), 1000))
    code = [f"{shown(place)} = {shown(text)}" for place, text in references(job)]
    yield from _entry("own code", "; ".join(code) if code else "none, fedvision's only")
    so_far = f", {rounds_done} done here" if rounds_done else ""
    steps = f"{num_steps(job, data.num_train):,} steps of {job.training.batch_size}"
    yield from _entry("rounds", f"{job.rounds}{so_far}; {steps} each")
    yield from _entry("clip norm", f"{job.aggregation.clip_norm:g}")
    if charter is not None and record.roster is not None:
        names = {one.number: one.name for one in record.roster.sites}
        sites = ", ".join(names.get(number, str(number)) for number in charter.sites)
        yield from _entry("sites", f"{len(charter.sites)}: {sites}")
        yield from _entry("charter", record.charter_digest or "")
        yield from _entry("roster", f"{record.roster_digest} of {record.roster.federation}")
    yield "\nWhat leaves this site"
    yield from _wrapped(leaving(job, charter), "  ")
    if promise:
        yield "\nWhat it costs the patients"
        yield from _wrapped(promise, "  ")
    yield "\nWhat the policy says"
    if not decision.findings:
        yield "  nothing against it"
    for one in decision.findings:
        yield from _wrapped(f"{one.rule}: {one.text}", "  ")
    if decision.status == "waiting" and not any(not one.is_temporary for one in decision.findings):
        seen = f" --charter {record.charter_digest[:SHOWN_DIGITS]}" if record.charter_digest else ""
        yield f"\nto allow it: fedvision-site allow {record.job_digest[:SHOWN_DIGITS]}{seen}"


def leaving(job: Job, charter: Charter | None) -> str:
    """Return in one paragraph what leaves the site if a job runs."""
    evaluation = job.evaluation
    rounds = "the only round" if job.rounds == 1 else f"each of {job.rounds} rounds"
    judged = "each round" if evaluation.every == 1 else f"every {evaluation.every} rounds"
    resamples = f" with {evaluation.bootstrap} bootstrap resamples" if evaluation.bootstrap else ""
    never = "Never: images, labels, names of files and patients, results of single cases, texts of errors."
    if job.privacy.is_on:
        never = never.replace(
            "texts of", "the training loss, which and how many patients were drawn, texts of"
        )
    if charter is None or not job.aggregation.secure:
        return (
            f"In {rounds}: the clipped update of this site, its numbers of cases and steps, its mean "
            "training loss and the time, all in the clear: the server sees them. Sums of statistics over "
            f"this site's cases: of validation {judged}, of the test{resamples} at the end; in the clear "
            f"too. {never}"
        )
    level = {
        "sum": "",
        "sketch": "For each sum, in the clear: 2,048 random sums of the update's coordinates, which tell its "
        "length and how like the other updates it is. ",
        "gram": "For each sum the server learns the update's length and how like the other updates it is. ",
    }[charter.level]
    least = charter.quorum
    megabytes = ROUND_BYTES * charter.size / 1e6
    if "test_by_site" in charter.releases:
        test = (
            f"After the last round, in the clear: this site's own sums of test statistics{resamples}, and "
            "its numbers of test cases and patients. "
        )
    else:
        test = f"After the last round: sums of test statistics{resamples}, under a mask. "
    return (
        f"In {rounds}, under a mask: {_trained(job, f'({megabytes:,.1f} MB)')}. The server learns their sums "
        f"over at least {least} of "
        f"{len(charter.sites)} sites, and no single one. {level}Of validation {judged}: sums of "
        f"statistics, under a mask. {test}"
        f"Besides: for each split whether this site has cases, and when it answers. {never}"
    )


def _trained(job: Job, size: str) -> str:
    """Return what a round of training puts under the mask."""
    if job.privacy.mode == "distributed":
        return (
            f"the sum of the clipped gradients of patients drawn by chance {size}, with this site's share of "
            "the noise, and the number 1"
        )
    if job.privacy.mode == "local":
        return f"the clipped update of this site {size}, trained with noise at each step, and the number 1"
    return f"the clipped update of this site {size}, its mean training loss and its weight"


def _promise(record: Record, settings: SiteSettings) -> str:
    """Return in one paragraph what a private job costs the patients here; "" for another job."""
    job, charter = record.job, record.charter
    if not job.privacy.is_on or charter is None:
        return ""
    try:
        cost = planned_cost(job, charter, load_manifest(settings.site.data))
    except FedvisionError as error:
        return f"What the job costs them cannot be said: {error}."
    policy = settings.policy
    limits = [
        f"{what} {value:g}"
        for what, value in (
            ("epsilon", policy.largest_epsilon),
            ("epsilon if secure aggregation fails", policy.largest_epsilon_alone),
        )
        if math.isfinite(value)
    ]
    allowed = (
        f"over all jobs this site allows {' and '.join(limits)}" if limits else "this site sets no limit"
    )
    return (
        f"Epsilon {cost.epsilon:.3g} if secure aggregation holds, {cost.epsilon_alone:.3g} if it fails, at "
        f"delta {cost.delta:.2g}, for all of its rounds and before what other jobs cost; {allowed}. "
        "`fedvision-site privacy` says what was spent. The site refuses a job that would pass a limit."
    )


def _entry(name: str, text: str) -> Iterator[str]:
    yield from _wrapped(shown(text, 2000), f"  {name:<10}")


def _wrapped(text: str, first: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first)) or [first]
