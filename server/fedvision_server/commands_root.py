"""``fedvision-server root-set add``, ``show`` and ``remove``: the few checked cases that the server keeps."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedvision.cli.program import note
from fedvision.errors import ConfigError
from fedvision_server.home import ServerHome

if TYPE_CHECKING:
    from fedvision_server.root_sets import RootRecord

Home = Annotated[Path, typer.Option("--home", metavar="HOME", help="The coordinator's folder.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]

HELP = """Keep a root set: a few cases with labels that people checked, against poisoned updates.

A data set like a site's (`fedvision data import` makes one), of 20 to 100 cases from
every kind of site. It never leaves this machine. In every round the server trains on
it as a site would and compares directions: its update is added to no sum. After the
last round the model is judged and repaired on it.
"""

ADD_HELP = """Check a data set, hash every file of it, and put it in force as the root set.

The digest stands in the charter of every job that is submitted from then on, so that
sites see what they are compared with. The files stay where they are. A file that
changes later stops a job before the set is used.
"""

SHOW_HELP = """Show the root set in force, and hash its files again: has one changed?"""

REMOVE_HELP = """Take the root set out of force. Its files are left alone.

Jobs whose charter names it cannot go on without it.
"""

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode="rich")


@app.command("add", help=ADD_HELP)
def add(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="A folder with a manifest.json.")],
    home: Home = Path(),
) -> None:
    from fedvision_server.root_sets import add_root_set

    place = ServerHome(home)
    place.settings()
    with place.locked():
        record, is_new = add_root_set(place, dataset)
    _print(record)
    if is_new:
        note(f"next: charters of new jobs name it by its digest (root_set = {record.digest[:16]}...)")
    else:
        note("it is the set that was in force already")


@app.command("show", help=SHOW_HELP)
def show(home: Home = Path()) -> None:
    from fedvision_server.root_sets import load_root_record, served_root_set

    place = ServerHome(home)
    place.settings()
    record = load_root_record(place)
    if record is None:
        raise ConfigError("this server has no root set", "`fedvision-server root-set add DATASET` adds one")
    _print(record)
    served_root_set(place)
    typer.echo("files:    unchanged")


@app.command("remove", help=REMOVE_HELP)
def remove(home: Home = Path(), yes: Yes = False) -> None:
    from fedvision_server.root_sets import remove_root_set

    place = ServerHome(home)
    place.settings()
    if not yes:
        typer.confirm("Take the root set out of force?", abort=True, err=True)
    with place.locked():
        record = remove_root_set(place)
    typer.echo(f"{record.name} is no longer the root set; its files are untouched")


def _print(record: "RootRecord") -> None:
    typer.echo(f"root set: {record.name}, {record.num_cases} cases of {record.num_patients} patients")
    typer.echo(f"classes:  {', '.join(record.classes)}")
    typer.echo(f"digest:   {record.digest}")
    typer.echo(f"folder:   {record.folder}")
    typer.echo(f"added:    {record.added}")
