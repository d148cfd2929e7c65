"""``fedvision-site``: the program of a hospital."""

import os
import sys

# Before torch is imported anywhere, see ``fedvision.cli.app``.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer

from fedvision.cli import audit_log
from fedvision.cli.program import paragraphs, run_app, version_option
from fedvision_sites import commands_jobs, commands_privacy, commands_run, commands_setup

HELP = """Take part in a federation: this site decides what runs here, and its images never leave it.

From nothing to a first round, at the coordinator and at each site:

   1  [dim]fedvision-server init[/]      keys, certificates and settings
   2  [bold]fedvision-site init[/]        this site's keys; a request file for the coordinator
   3  [dim]fedvision-server enrol[/]     compare by telephone; a kit file for you
   4  [bold]fedvision-site join[/]        compare by telephone; takes the kit over
   5  [dim]fedvision-server run[/]       serves the sites, and runs the jobs
   6  [bold]fedvision-site check[/]       finds what would keep this site from running
   7  [bold]fedvision-site run[/]         asks for work, and does what this site allows
   8  [dim]fedvision-server submit[/]    a job
   9  [bold]fedvision-site allow[/]       a job that the policy leaves to people
  10  [dim]fedvision-server status[/]    how far it is

The other commands take --home, the folder that [bold]init[/] made (default: this one).
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("init", help=commands_setup.INIT_HELP, epilog=commands_setup.INIT_EPILOG)(commands_setup.init)
app.command("join", help=commands_setup.JOIN_HELP)(commands_setup.join)
app.command("check", help=commands_setup.CHECK_HELP)(commands_setup.check)
app.command("run", help=paragraphs(commands_run.run))(commands_run.run)
for command in (commands_jobs.jobs, commands_jobs.allow, commands_jobs.deny):
    app.command(command.__name__, help=paragraphs(command))(command)
app.command("privacy", help=paragraphs(commands_privacy.privacy))(commands_privacy.privacy)
app.add_typer(audit_log.app, name="audit-log")
app.callback()(version_option)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status, see ``fedvision.cli.program.run_app``."""
    return run_app(app, "fedvision-site", argv)


def run() -> None:
    """Entry point of the installed script."""
    sys.exit(main())
