"""``fedvision privacy``: what a job promises to patients, and what a run has spent."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedvision.cli.program import table_console
from fedvision.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from fedvision.simulation.promise import Promise

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="What a job promises to each patient.")

PLAN_EPILOG = """[bold]fedvision privacy plan job.toml[/]  what the job promises as it stands

[bold]fedvision privacy plan job.toml --target-epsilon 8[/]  which noise keeps to 8
"""


@app.command("plan", epilog=PLAN_EPILOG)
def plan(
    job_file: Annotated[Path, typer.Argument(metavar="JOB.toml", help="A job with a [privacy] section.")],
    target: Annotated[
        float | None,
        typer.Option(
            "--target-epsilon",
            metavar="E",
            help="Find the least noise that keeps every site's patients to this epsilon.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Say what a job costs the patients of each site, before anything is trained.

    Epsilon is a bound: whoever sees everything that leaves the sites can hardly tell whether a patient took
    part. At most e^epsilon times as likely is any outcome with him than without, but for the chance delta.
    Two numbers are given: if secure aggregation holds, and if it fails and only a site's own noise is left.
    """
    from fedvision.config import load_job
    from fedvision.simulation.promise import promises, with_target

    job = load_job(job_file)
    if not job.privacy.is_on:
        raise ConfigError(
            f"{job_file} promises nothing: privacy.mode is off",
            'write mode = "distributed" under [privacy]; docs/explanation/privacy.md says what it means',
        )
    found = promises(job)
    advice = [] if target is None else [with_target(job, found, target)]
    if as_json:
        rows = [dataclasses.asdict(one) for one in found]
        typer.echo(json.dumps({"sites": rows, "target": advice[0] if advice else None}, indent=2))
        return
    _print_promises(found)
    for one in advice:
        typer.echo(
            f"\nepsilon {target:g} at every site: noise_multiplier = {one['noise_multiplier']:g} for "
            f"{job.rounds} rounds; with the noise of this job {one['rounds']} rounds"
        )


@app.command("spent")
def spent(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a privacy ledger.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Say what private jobs have cost the patients, from the sites' ledgers.

    Of a simulation's run folder all sites, of a site's own ledger this one. Signatures and order of all
    entries are checked.
    """
    from fedvision.simulation.promise import ledgers_of, spent_of

    ledgers = ledgers_of(run)
    if not ledgers:
        raise StorageError(
            f"no privacy ledger below {run}", "only runs of jobs with a [privacy] section have them"
        )
    rows = [row for ledger in ledgers for row in spent_of(ledger)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("data set", "rounds", "epsilon", "if aggregation fails", "at delta", box=None)
    for row in rows:
        table.add_row(*(_shown(row[key]) for key in row))
    table_console().print(table)


def _print_promises(found: "list[Promise]") -> None:
    table = Table(
        "site", "patients", "drawn with", "steps", "epsilon", "if aggregation fails", "at delta", box=None
    )
    for one in found:
        table.add_row(
            one.site,
            str(one.num_patients),
            f"{one.sampling_rate:.3g}",
            str(one.steps),
            f"{one.epsilon:.3g}",
            f"{one.epsilon_alone:.3g}",
            f"{one.delta:.2g}",
        )
    table_console().print(table)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
