"""``fedvision simulate`` and ``fedvision report``."""

import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedvision.config import Job, load_job
from fedvision.errors import ConfigError, RoundError, Stopped, StorageError

EPILOG = """[bold]fedvision simulate --demo[/]  a federation on generated images, a few minutes

[bold]fedvision simulate job.toml[/]  your job; the run folder is runs/NAME-TIME

[bold]fedvision simulate --resume runs/nuclei-1[/]  go on after a crash, a kill or Ctrl-C
"""


def simulate(
    job_file: Annotated[
        Path | None, typer.Argument(metavar="JOB.toml", help="The job; `fedvision init` writes one.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run folder to make (default: runs/NAME-TIME).", show_default=False),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with this run, to the same weights.")
    ] = None,
    demo: Annotated[
        bool,
        typer.Option("--demo", help="Generate images and run a segmentation and a detection job on them."),
    ] = False,
    parallel_sites: Annotated[
        int | None, typer.Option(min=1, help="Sites that train at a time (default: by cores and sites).")
    ] = None,
    check: Annotated[bool, typer.Option(help="Read every file before the first round.")] = True,
) -> None:
    """Run a federation of sites on this machine and write a report.

    Every site trains on its own images and clips its update; the server averages them (FedAvg). With secure
    aggregation, which is the default, updates are added up under masks, and the server learns the sum only.
    The code of sites and server is the one that a deployment will run. Where there is a GPU, the sites
    take turns on it.
    """
    console = Console(stderr=True, highlight=False)
    if sum(value is not None and value is not False for value in (job_file, resume, demo or None)) != 1:
        raise ConfigError(
            "give exactly one of JOB.toml, --resume RUN and --demo", "see `fedvision simulate --help`"
        )
    if demo:
        from fedvision.report.joint import write_joint_report
        from fedvision.simulation.demo import demo_jobs

        folder = out or Path("demo")
        if folder.exists() and any(folder.iterdir()):
            raise StorageError(f"{folder} is not empty", "choose another folder with --out")
        runs = []
        for path in demo_jobs(folder):
            job = load_job(path)
            runs.append(folder / "runs" / job.name)
            console.print(f"[bold]{job.name}[/]")
            run_job_file(job, runs[-1], console, parallel_sites, check)
        typer.echo(f"report: {write_joint_report('fedvision demo: two federations', runs, folder)}")
        return
    if resume is not None:
        resume_run(resume, console, check)
        return
    assert job_file is not None
    job = load_job(job_file)
    run_job_file(job, out or default_folder(job), console, parallel_sites, check)


def default_folder(job: Job) -> Path:
    """Return a new run folder's name in ``runs``."""
    return Path("runs") / f"{job.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def run_job_file(job: Job, folder: Path, console: Console, parallel: int | None, check: bool) -> None:
    """Start a new run of ``job`` in ``folder`` and run it to its end."""
    from fedvision.simulation.run import make_plan, start_run

    plan = make_plan(job, parallel)
    if check:
        check_data(job, console)
    start_run(plan, folder)
    _run(folder, console)


def resume_run(folder: Path, console: Console, check: bool) -> None:
    """Go on with the run in ``folder``."""
    from fedvision.simulation.run import resume_plan

    plan = resume_plan(folder)
    if (folder / "test.json").exists():
        console.print(f"{folder} is already finished", markup=False)
        report(folder)
        return
    if check:
        check_data(plan.job, console)
    _run(folder, console)


def check_data(job: Job, console: Console) -> None:
    """Read every file of the job's sites, and stop before anything is trained if one is wrong.

    Raises:
        DataError: With the first finding and the number of others.
    """
    from fedvision.data.checks import check_sites_for_job

    check_sites_for_job(job, console)


def _run(folder: Path, console: Console) -> None:
    from fedvision.report.page import write_report
    from fedvision.report.progress import Progress
    from fedvision.simulation.run import refusal_texts, resume_plan, run_federation
    from fedvision.storage import read_lines

    plan = resume_plan(folder)
    done = max((r["round"] for r in read_lines(folder / "rounds.jsonl") if r["event"] == "round"), default=0)
    try:
        with Progress(plan.job, len(plan.cohort.train), console, done) as progress:
            run_federation(plan, folder, progress.observe)
    except Stopped:
        raise Stopped(
            f"stopped; {folder} holds what was finished", f"go on with `fedvision simulate --resume {folder}`"
        ) from None
    except RoundError as error:
        for site, text in refusal_texts(folder, list(plan.data)).items():
            console.print(f"site {site}: {text}", markup=False)
        raise RoundError(
            str(error), error.hint or f"go on with `fedvision simulate --resume {folder}`"
        ) from error
    finally:
        if (folder / "rounds.jsonl").exists():
            write_report(folder)
    typer.echo(f"report: {folder / 'report.html'}")


def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Write RUN/report.html and its figures again, from what the run recorded."""
    from fedvision.report.page import write_report

    if not (run / "job.toml").exists():
        raise StorageError(f"{run} is not a run folder: no job.toml")
    typer.echo(f"report: {write_report(run)}")
