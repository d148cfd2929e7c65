"""``fedvision``: the entry point, and what every command does about errors."""

import os
import sys

# Before torch is imported anywhere. Threads that wait for each other by spinning make training many
# times slower as soon as another program wants a core; sleeping instead costs almost nothing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer

from fedvision.cli import attack, audit, compare, data, init, keys, privacy, release, simulate, verify
from fedvision.cli.program import paragraphs, run_app, version_option

HELP = """Federated learning for medical imaging: simulate a federation of hospitals on this machine.

Start with [bold]fedvision simulate --demo[/], which needs no data. With your own data:

  [bold]fedvision data import[/]   make a data set for each site from your files
  [bold]fedvision data check[/]    find what would break training
  [bold]fedvision init[/]          write a commented job file
  [bold]fedvision simulate[/]      run the federation; ends with a report
  [bold]fedvision compare[/]       local-only, pooled and federated training side by side
  [bold]fedvision attack[/]        let malicious sites in and measure what they do, and what the defence does
  [bold]fedvision verify[/]        check the signatures and the arithmetic of a finished run again
  [bold]fedvision audit[/]         attack a finished model: can somebody tell who trained it?
  [bold]fedvision release[/]       write the finished model with a model card, signed; or check a release
  [bold]fedvision privacy[/]       what a job promises to each patient, and what a run has spent
  [bold]fedvision keys[/]          identities, and the signed list of who takes part
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data.app, name="data")
app.add_typer(keys.app, name="keys")
app.add_typer(privacy.app, name="privacy")
app.command("init")(init.init)


app.command("simulate", help=paragraphs(simulate.simulate), epilog=simulate.EPILOG)(simulate.simulate)
app.command("report", help=paragraphs(simulate.report))(simulate.report)
app.command("compare", help=paragraphs(compare.compare))(compare.compare)
app.command("attack", help=paragraphs(attack.attack), epilog=attack.EPILOG)(attack.attack)
app.command("verify", help=paragraphs(verify.verify), epilog=verify.EPILOG)(verify.verify)
app.command("audit", help=paragraphs(audit.audit), epilog=audit.EPILOG)(audit.audit)
app.command("release", help=paragraphs(release.release), epilog=release.EPILOG)(release.release)
app.callback()(version_option)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status.

    0: done. 1: a run that was verified does not hold. 2: wrong input or a run that cannot go on. 130: stopped
    by Ctrl-C. Where it is not 0, one line says why.
    """
    return run_app(app, "fedvision", argv)


def run() -> None:
    """Entry point of the installed script."""
    sys.exit(main())
