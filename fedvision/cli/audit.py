"""``fedvision audit``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedvision.errors import ConfigError, Stopped, StorageError, VerificationError

if TYPE_CHECKING:
    from fedvision.audit.membership_audit import Claim
    from fedvision.config import Job

EPILOG = """[bold]fedvision audit runs/nuclei-1[/]  can somebody tell who trained the model?

[bold]fedvision audit runs/nuclei-1 --shadows 16[/]  more shadow models; the first ones are kept
"""


def audit(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished simulation.")],
    shadows: Annotated[
        int, typer.Option(metavar="N", min=2, max=256, help="Shadow models to train, an even number.")
    ] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Says which patients train which shadow model.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where it goes (default: RUN-audit).", show_default=False),
    ] = None,
    shadow_steps: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Optimiser steps of a shadow model at most; else those of all sites in all rounds.",
        ),
    ] = 2000,
    most_auc: Annotated[
        float, typer.Option(metavar="A", min=0.5, max=1.0, help="Largest AUC that passes.")
    ] = 0.6,
    most_tpr: Annotated[
        float,
        typer.Option(
            metavar="SHARE", min=0.0, max=1.0, help="Largest share of members found at 1 % false alarms."
        ),
    ] = 0.03,
) -> None:
    """Attack the model of a simulated run: can somebody tell which patients trained it?

    Members are the training patients of all sites, the others those of validation and test. Attacks: a
    threshold on the loss, LiRA and RMIA with shadow models that are trained here on random halves of all
    patients. Beside what they find stands what the run's (epsilon, delta) allows at most. This needs the
    images of every site on one machine, so it cannot be done in a deployed federation.

    Shadow models are kept: run the same command again to go on after an interruption. Exit status 1 if an
    attack finds more than the limits or the promise allow.
    """
    from fedvision.audit.membership import audit_folder
    from fedvision.audit.membership_audit import Settings, audit_run
    from fedvision.audit.membership_report import write_page
    from fedvision.config import load_job
    from fedvision.data.progress import watched
    from fedvision.simulation.run import choose_sites

    if not (run / "job.toml").exists():
        raise StorageError(f"{run} is not a run folder: no job.toml")
    job = load_job(run / "job.toml")
    if job.data is None:
        raise ConfigError(
            f"{run} is no simulation: the images of its sites are not on this machine",
            "simulate the job on like data and audit that run",
        )
    manifests = {name: one for name, one in choose_sites(job).items() if name not in job.data.held_out}
    settings = Settings(shadows, shadow_steps, seed, most_auc, most_tpr)
    folder = out or audit_folder(run)
    try:
        with watched("reading") as watch:
            found = audit_run(run, job, manifests, claim_of(job), settings, folder, watch)
    except KeyboardInterrupt:
        raise Stopped(
            "stopped; finished shadow models are kept", "run the same command again to go on"
        ) from None
    page = write_page(folder)
    _print(found)
    typer.echo(f"page: {page}")
    reasons = found["verdict"]["reasons"]
    if reasons:
        raise VerificationError(folder / "audit.json", "membership", "; ".join(reasons))


def claim_of(job: "Job") -> "Claim | None":
    """Return what a run promises to the patients of the site with the largest epsilon; None if nothing."""
    from fedvision.audit.membership_audit import Claim
    from fedvision.privacy.accounting import Mechanism
    from fedvision.simulation.promise import promises

    if not job.privacy.is_on:
        return None
    one = max(promises(job), key=lambda promise: promise.epsilon)
    mechanism = Mechanism(one.sampling_rate, one.noise, one.steps)
    return Claim(one.site, one.epsilon, one.delta, (mechanism,))


def _print(found: dict[str, Any]) -> None:
    """Print the numbers as a table, and what limits them."""
    from fedvision.audit.membership_report import terminal_table

    console = Console(highlight=False)
    console.print(terminal_table(found))
    for note in found["verdict"]["notes"]:
        console.print(note, markup=False)
