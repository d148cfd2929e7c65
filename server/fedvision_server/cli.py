"""``fedvision-server``: the coordinator's program."""

import os
import sys

# Before torch is imported anywhere, see ``fedvision.cli.app``.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer

from fedvision.cli import audit_log
from fedvision.cli.program import paragraphs, run_app, version_option
from fedvision_server import (
    commands_audit,
    commands_defence,
    commands_jobs,
    commands_root,
    commands_run,
    commands_setup,
)

HELP = """Coordinate a federation of hospitals: who takes part, which jobs run, and what came of them.

From nothing to a first round, at the coordinator and at each site:

   1  [bold]fedvision-server init[/]      keys, certificates and settings
   2  [dim]fedvision-site init[/]        a site's keys; a request file for you
   3  [bold]fedvision-server enrol[/]     compare by telephone; a kit file for the site
   4  [dim]fedvision-site join[/]        compare by telephone; takes the kit over
   5  [bold]fedvision-server run[/]       serves the sites, and runs the jobs
   6  [dim]fedvision-site check[/]       finds what would keep the site from running
   7  [dim]fedvision-site run[/]         asks for work, and does what the site allows
   8  [bold]fedvision-server submit[/]    a job
   9  [dim]fedvision-site allow[/]       a job that the policy leaves to people
  10  [bold]fedvision-server status[/]    how far it is

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
app.command("enrol", help=commands_setup.ENROL_HELP)(commands_setup.enrol)
app.add_typer(commands_setup.roster_app, name="roster")
app.command("revoke", help=commands_setup.REVOKE_HELP)(commands_setup.revoke)
app.command("renew", help=commands_setup.RENEW_HELP)(commands_setup.renew)
app.command("run", help=paragraphs(commands_run.run))(commands_run.run)
for command in (commands_jobs.submit, commands_jobs.status, commands_jobs.stop, commands_jobs.logs):
    app.command(command.__name__, help=paragraphs(command))(command)
app.add_typer(commands_root.app, name="root-set")
app.command("sites-judged", help=paragraphs(commands_defence.sites_judged))(commands_defence.sites_judged)
app.add_typer(audit_log.app, name="audit-log")
app.add_typer(commands_audit.app, name="audit")
app.callback()(version_option)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status, see ``fedvision.cli.program.run_app``."""
    return run_app(app, "fedvision-server", argv)


def run() -> None:
    """Entry point of the installed script."""
    sys.exit(main())
