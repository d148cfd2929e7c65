"""``fedvision compare``."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedvision.cli.program import table_console
from fedvision.config import load_job
from fedvision.errors import Stopped

if TYPE_CHECKING:
    from fedvision.simulation.run import Plan
    from fedvision_server.federation import Observer


def compare(
    job_file: Annotated[Path, typer.Argument(metavar="JOB.toml", help="The federated job.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the runs (default: runs/NAME-compare).", show_default=False),
    ] = None,
    check: Annotated[bool, typer.Option(help="Read every file before the first round.")] = True,
) -> None:
    """Train local-only, pooled and federated models on the same splits and budget, and compare them.

    Each local model sees its own site only; the pooled model sees all data in one place, which is what a
    federation tries to reach without moving data. Ends with a table, a picture and a page. Run the same
    command again to go on after an interruption.
    """
    from fedvision.cli.simulate import check_data
    from fedvision.report.comparison import comparison_table
    from fedvision.report.progress import Progress
    from fedvision.simulation.compare import compare as run_comparison
    from fedvision.storage import read_json, read_lines

    console = Console(stderr=True, highlight=False)
    job = load_job(job_file)
    folder = out or Path("runs") / f"{job.name}-compare"
    if check:
        check_data(job, console)

    @contextmanager
    def watch(name: str, plan: "Plan", run: Path) -> Iterator["Observer"]:
        console.print(f"[bold]{name}[/]")
        done = max((r["round"] for r in read_lines(run / "rounds.jsonl") if r["event"] == "round"), default=0)
        with Progress(plan.job, len(plan.cohort.train), console, done) as progress:
            yield progress.observe

    try:
        page = run_comparison(job, folder, watch)
    except (Stopped, KeyboardInterrupt):
        raise Stopped("stopped; what was finished is kept", "run the same command again to go on") from None
    result = read_json(folder / "compare.json")
    table_console().print(comparison_table(result))
    typer.echo(result["finding"])
    typer.echo(f"comparison: {page}")
