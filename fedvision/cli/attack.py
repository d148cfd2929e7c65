"""``fedvision attack``."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedvision.cli.program import table_console
from fedvision.config import Job, load_job, parse_job
from fedvision.errors import ConfigError, Stopped

if TYPE_CHECKING:
    from fedvision.simulation.lab import Cell

DEFAULT_SHARES = "0.2"
EPILOG = """[bold]Examples[/]

[dim]fedvision attack job.toml --attack sign-flip --malicious 0.2 --out lab[/]

[dim]fedvision attack job.toml --attack adaptive --malicious 0.4 --root-set data/root --out lab[/]

[dim]fedvision attack job.toml --matrix --malicious 0.1,0.2 --defences none,auto,norm+spectral --out lab[/]

[bold]fedvision attack job.toml --list[/]  what there is, and who described it
"""


def attack(
    job_file: Annotated[
        Path, typer.Argument(metavar="JOB.toml", help="The job whose federation is attacked.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where it goes (default: runs/NAME-attack).", show_default=False),
    ] = None,
    attack_name: Annotated[
        str | None, typer.Option("--attack", metavar="NAME", help="One attack; none for none.")
    ] = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Many attacks, shares, defences and seeds.")
    ] = False,
    attacks: Annotated[
        str, typer.Option(metavar="A,B,...", help="Of the matrix.", rich_help_panel="Matrix")
    ] = "all",
    malicious: Annotated[
        str, typer.Option(metavar="SHARE,...", help="Share of the sites that are malicious, below 0.5.")
    ] = DEFAULT_SHARES,
    defence: Annotated[
        str, typer.Option(metavar="NAME", help="auto, none, or rules joined by commas.")
    ] = "auto",
    defences: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help="Of the matrix; join rules by +, and end with /root to use the root set.",
            rich_help_panel="Matrix",
        ),
    ] = "none,auto",
    seeds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Runs of each cell.", rich_help_panel="Matrix")
    ] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the run, or the first of the matrix.")] = 0,
    root_set: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A root set's data set; with --attack the defence uses it."),
    ] = None,
    max_malicious: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0.0,
            max=0.45,
            help="What the defence expects (default: the job's; at most 0.2 without a root set).",
            show_default=False,
        ),
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Cells at a time, a thread each.", show_default=False),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Print the attacks and stop.")] = False,
) -> None:
    """Let malicious sites into a federation and measure what they do, and what the defence does.

    Every run is the whole job through the real protocol. Malicious sites are shown what honest ones
    send, which no real attacker is. The same attack-free run without defence is what damage is counted
    from. Run the same command again to go on after an interruption.
    """
    from fedvision.report.attack_matrix import matrix_table, write_matrix
    from fedvision.simulation.matrix import plan_cells

    if list_:
        _print_attacks()
        return
    if matrix == (attack_name is not None):
        raise ConfigError("give one of --attack NAME and --matrix", "see `fedvision attack --help`")
    job = with_options(load_job(job_file), root_set, max_malicious)
    if matrix:
        cells = plan_cells(
            _attack_names(attacks),
            _shares(malicious),
            _words(defences),
            tuple(range(seed, seed + seeds)),
        )
    else:
        assert attack_name is not None
        chosen = defence.replace(",", "+") + ("/root" if root_set is not None else "")
        cells = plan_cells([attack_name], _shares(malicious), [chosen], [seed])
    folder = out or Path("runs") / f"{job.name}-attack"
    try:
        result = _run(job, cells, folder, parallel or _parallel(len(cells)))
    except (Stopped, KeyboardInterrupt):
        raise Stopped("stopped; what was finished is kept", "run the same command again to go on") from None
    page = write_matrix(folder)
    table_console().print(matrix_table(result))
    typer.echo(f"page: {page}")


def _parallel(num_cells: int) -> int:
    """Return how many cells run at a time: this process for a few, else one a core."""
    return 1 if num_cells < 4 else len(os.sched_getaffinity(0))


def with_options(job: Job, root_set: Path | None, max_malicious: float | None) -> Job:
    """Return a job with what the command line says about its root set and its defence."""
    if job.data is None:
        raise ConfigError(
            "the job file has no [data] section", "add data.root, the folder of the sites' data sets"
        )
    content = job.model_dump(mode="json", exclude_none=True)
    if root_set is not None:
        content["data"]["root_set"] = str(root_set.resolve())
    if max_malicious is not None:
        content["defence"]["max_malicious"] = max_malicious
    return parse_job(content, "the job with the options of the command line")


def _run(job: Job, cells: Sequence["Cell"], folder: Path, parallel: int) -> dict[str, Any]:
    """Run the cells with a bar, and a line for each that is finished."""
    from fedvision.data.progress import progress_bar
    from fedvision.report.attack_matrix import cell_line
    from fedvision.simulation.matrix import run_matrix

    with progress_bar() as progress:
        bar = progress.add_task("cells", total=len(cells))

        def on_cell(cell: "Cell", outcome: dict[str, Any]) -> None:
            progress.advance(bar)
            progress.console.print(cell_line(outcome), markup=False)

        return run_matrix(job, cells, folder, parallel, on_cell)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _attack_names(text: str) -> list[str]:
    from fedvision.attacks.catalogue import ATTACKS

    return list(ATTACKS) if text == "all" else _words(text)


def _shares(text: str) -> list[float]:
    try:
        shares = [float(word) for word in _words(text)]
    except ValueError:
        shares = [math.nan]
    if not all(0 <= share < 0.5 for share in shares):
        raise ConfigError(f"--malicious takes shares from 0 to below 0.5, such as 0.1,0.2, got {text!r}")
    return shares


def _print_attacks() -> None:
    from rich.table import Table

    from fedvision.attacks.catalogue import ATTACKS

    table = Table("attack", "kind", "what it does", "source", box=None, pad_edge=False)
    for one in ATTACKS.values():
        table.add_row(one.name, one.kind, one.text, one.source)
    table_console().print(table)
