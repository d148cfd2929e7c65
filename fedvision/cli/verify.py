"""``fedvision verify``."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedvision.data.progress import watched
from fedvision.errors import VerificationError

if TYPE_CHECKING:
    from fedvision.audit.verify import Verification

EPILOG = """[bold]fedvision verify runs/nuclei-1 --governance consortium.pub[/]  with the key that you trust

[bold]fedvision verify runs/nuclei-1[/]  whether a simulation's files fit together
"""
STYLES = {"passed": "green", "failed": "bold red", "not checked": "yellow"}


def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    governance: Annotated[
        Path | None,
        typer.Option(
            metavar="GOV.pub",
            help="Governance's public key, compared by telephone (default: the run's own, which proves "
            "nothing about who signed).",
            show_default=False,
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Of a simulation: also train again from the images, and compare every sum bit for bit. "
            "Takes as long as the run did.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check a run again: signatures, sums, and every step from the initial weights to the model.

    For a run with secure aggregation. Checks roster and charter, every transcript with its stored sum, does
    the arithmetic again, compares checkpoints and model byte for byte, and looks at the evidence against
    sites that were expelled. Where the sites' own folders lie beside the run, they must agree. No private
    key is used, and no image.

    Exit status 1 if something does not hold: one line names the file and the rule.
    """
    from fedvision.audit.verify import verify_run
    from fedvision.cli.key_files import party

    console = Console(stderr=True, highlight=False)
    with watched("reading") as watch:
        found = verify_run(run, None if governance is None else party(governance), watch)
    if full and found.failure is None:
        found = _with_training(found, console)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
    else:
        _print(found)
    if found.failure is not None:
        raise found.failure


def _with_training(found: "Verification", console: Console) -> "Verification":
    """Train again, and return the result with that check."""
    from fedvision.audit.verify import Check
    from fedvision.report.progress import Progress
    from fedvision.simulation.again import train_again
    from fedvision.simulation.run import resume_plan

    plan = resume_plan(found.run)
    try:
        with Progress(plan.job, len(plan.cohort.train), console) as progress:
            count = train_again(found.run, progress.observe)
    except VerificationError as error:
        text = str(error).removeprefix(f"{error.file}: ")
        check = Check("training again", "failed", text, error.file, error.rule)
        return dataclasses.replace(
            found, checks=(*found.checks, check), proves=(), does_not_prove=(), failure=error
        )
    check = Check(
        "training again", "passed", f"trained again from the images: {count} sums have the same bits"
    )
    line = "Every sum is what training and judging on the images of this machine gives."
    return dataclasses.replace(found, checks=(*found.checks, check), proves=(*found.proves, line))


def _print(found: "Verification") -> None:
    """Print the checks as a table, and what follows."""
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in found.checks:
        table.add_row(check.name, Text(check.status, style=STYLES[check.status]), Text(check.detail))
    console.print(table)
    failed = sum(check.status == "failed" for check in found.checks)
    verdict = f"[bold red]{failed} of these checks failed[/]" if failed else "[bold green]Verified[/]"
    console.print(f"\n{verdict}, with {found.num_signatures:,} signatures. Governance key:")
    console.print(found.governance, markup=False)
    if not found.is_pinned:
        console.print(
            "This key was taken from the run itself: the files fit together, but who signed them is open.",
            style="bold yellow",
        )
    for heading, lines in (
        ("What this proves", found.proves),
        ("What it does not prove", found.does_not_prove),
    ):
        if lines:
            console.print(f"\n[bold]{heading}[/]")
            bullets = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=False)
            for line in lines:
                bullets.add_row("-", Text(line))
            console.print(bullets)
