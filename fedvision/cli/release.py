"""``fedvision release``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedvision.cli.program import note
from fedvision.data.progress import watched
from fedvision.errors import ConfigError, FedvisionError

if TYPE_CHECKING:
    from fedvision.config import Job
    from fedvision.release.card import Card, Guarantee
    from fedvision.secagg.identity import Identity

EPILOG = """[bold]fedvision release runs/nuclei-1 --out nuclei-model --key lab.pem --licence CC-BY-4.0[/]

[bold]fedvision release --check nuclei-model --key lab.pub[/]  whether it is what the owner of lab.pub signed
"""


def release(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="A finished run folder.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The new folder.", show_default=False)
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="KEY",
            help="Your identity, NAME.pem, which signs; with --check the signer's NAME.pub.",
            show_default=False,
        ),
    ] = None,
    licence: Annotated[str, typer.Option(metavar="TEXT", help="Licence of the weights.")] = "not stated",
    intended_use: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What the model is for (default: research).", show_default=False),
    ] = None,
    bundle: Annotated[bool, typer.Option("--bundle", help="Also write the model as a MONAI bundle.")] = False,
    governance: Annotated[
        Path | None,
        typer.Option(
            metavar="GOV.pub",
            help="Governance's public key, compared by telephone (default: the run's own, which proves "
            "nothing about who signed).",
            show_default=False,
        ),
    ] = None,
    audit: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Result of the model's audit (default: RUN-audit/audit.json, if there is one).",
            show_default=False,
        ),
    ] = None,
    despite_audit: Annotated[
        str | None,
        typer.Option(
            metavar="REASON",
            help="Release a model whose audit failed; the reason stands in the card.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Check a release instead of making one.", show_default=False),
    ] = None,
) -> None:
    """Give a finished model away: with a model card, and signed.

    Writes the run's model byte for byte, a card for people and one for programs, and a manifest with the
    hash of every file. A run with secure aggregation is verified first, and not released if a check fails.
    Neither is a model whose audit failed. The card says what the server knew; of the sites' folders only
    their privacy ledgers are read.

    Exit status 1 if something does not hold.
    """
    if (run is None) == (check is None):
        raise ConfigError("give a run folder to release, or --check FOLDER", "see `fedvision release --help`")
    if check is not None:
        others = (out, intended_use, governance, audit, despite_audit)
        if bundle or any(one is not None for one in others):
            raise ConfigError("--check goes with --key only")
        _check(check, key)
        return
    assert run is not None
    if out is None:
        raise ConfigError("--out FOLDER is missing", "the folder that the release is written to")
    from fedvision.cli.key_files import party
    from fedvision.config import load_job
    from fedvision.release.card import USE
    from fedvision.release.releasing import Wishes, release_run

    wishes = Wishes(
        licence=_said("--licence", licence),
        intended_use=USE if intended_use is None else _said("--intended-use", intended_use),
        key=None if key is None else _own_key(key),
        governance=None if governance is None else party(governance),
        audit=audit,
        despite_audit=despite_audit,
        with_bundle=bundle,
    )
    guarantee = guarantee_of(run, load_job(run / "job.toml"))
    with watched("reading") as watch:
        card = release_run(run, out, wishes, guarantee, watch)
    typer.echo(out)
    _notes(card, wishes.key)


def _said(option: str, text: str) -> str:
    """Return what the user says on one line."""
    if not text.strip():
        raise ConfigError(f"{option} is empty")
    return " ".join(text.split())


def _own_key(path: Path) -> "Identity":
    from fedvision.secagg import identity

    return identity.load(path)


def _notes(card: "Card", key: "Identity | None") -> None:
    """Say what a person who gives the release away should know."""
    if key is None:
        note(
            "not signed: nobody can tell who released it. --key NAME.pem signs, `fedvision keys new` makes it"
        )
    if card["licence"] == "not stated":
        note("no licence: without one nobody may use it. --licence TEXT states it")
    if card["verification"] is None:
        note("not verified: the run had no secure aggregation, so nothing in it is signed")
    elif not card["verification"]["governance_pinned"]:
        note(
            "verified with the run's own governance key: who signed is open. --governance GOV.pub settles it"
        )
    if card["audit"] is None:
        note("not audited")


def _check(folder: Path, key: Path | None) -> None:
    """Check a release and print what was found."""
    from fedvision.cli.key_files import party
    from fedvision.release.signing import check_release

    found = check_release(folder, None if key is None else party(key))
    typer.echo(f"{found.name}: {found.num_files} files are those of the manifest")
    if not found.signer:
        typer.echo("not signed: who released it is open")
        return
    typer.echo(f"signed by {found.signer}")
    if not found.is_pinned:
        note("this key is the release's own: give the one that you trust with --key NAME.pub")


def guarantee_of(run: Path, job: "Job") -> "Guarantee | None":
    """Return what a private run has cost the patients of the worst site.

    From the ledgers of a simulation's sites; where they do not lie here, what the job promises, if the
    sites' data do; else None.

    Raises:
        VerificationError: A ledger is not what its site wrote.
    """
    if not job.privacy.is_on:
        return None
    from fedvision.release.card import Guarantee
    from fedvision.simulation.promise import ledgers_of, promises, spent_of

    rows = [(path.parent.name, row) for path in ledgers_of(run) for row in spent_of(path)]
    source = "ledgers"
    if not rows:
        try:
            planned = promises(job) if job.data is not None else []
        except FedvisionError:
            planned = []
        keys = ("epsilon", "epsilon_alone", "delta")
        rows = [(one.site, {key: getattr(one, key) for key in keys}) for one in planned]
        source = "plan"
    if not rows:
        return None
    site, worst = max(rows, key=lambda pair: float(pair[1]["epsilon"]))
    site_alone, alone = max(rows, key=lambda pair: float(pair[1]["epsilon_alone"]))
    return Guarantee(
        epsilon=float(worst["epsilon"]),
        epsilon_alone=float(alone["epsilon_alone"]),
        delta=max(float(row["delta"]) for _, row in rows),
        site=site,
        site_alone=site_alone,
        num_sites=len({name for name, _ in rows}),
        source=source,
    )
