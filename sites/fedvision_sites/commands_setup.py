"""``fedvision-site init``, ``join`` and ``check``: from nothing to a site that can run."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from fedvision.cli.program import commented, compare_fingerprint, note, two_lines
from fedvision.errors import ConfigError
from fedvision_sites.home import SiteHome, SiteSection, SiteSettings
from fedvision_sites.policy import Policy

Home = Annotated[Path, typer.Option("--home", metavar="HOME", help="The site's folder, made by `init`.")]
STYLES = {"ok": "green", "warning": "yellow", "problem": "red"}

INIT_HELP = """Make a site: its keys, which stay here, its settings, and an enrolment request.

Send HOME/request.json to the coordinator, and read the fingerprint to them by
telephone. It holds public keys only. site.toml explains every setting; its
[policy] says what may run here, whoever asks.

Before the certificate ends, --renew makes a new request with a new key for
TLS; the site runs on with the old one until the new kit is taken over. If the
identity key is lost or stolen, --renew --new-identity also makes a new one:
call the coordinator at once, so that the old one is revoked.
"""

INIT_EPILOG = """[bold]Examples[/]

[dim]fedvision-site init /srv/fedvision --name utrecht --data /data/lung[/]

[dim]fedvision-site init /srv/fedvision --renew[/]
"""

JOIN_HELP = """Take over the kit that the coordinator sent: certificates, address, roster.

The first time, the fingerprint of governance is shown: compare it by telephone
with governance. It is pinned: a later kit or roster of another governance is
refused, and so is an older roster than one that this site has seen.
"""

CHECK_HELP = """Look for everything that would keep this site from running.

Settings, keys, certificate, roster, the connection to the server and its
clock, disk, GPU, and every file of the data set. Nothing is changed, and no
data leave. Exit status 1 if there is a problem.
"""


def init(
    folder: Annotated[Path, typer.Argument(metavar="HOME", help="A new folder; with --renew, the site's.")],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Short name of the site, in every roster.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The data set, as `fedvision data import` made it.")
    ] = None,
    renew: Annotated[bool, typer.Option("--renew", help="Ask for a new certificate.")] = False,
    new_identity: Annotated[
        bool, typer.Option("--new-identity", help="With --renew: the identity key is lost or stolen.")
    ] = False,
) -> None:
    from fedvision.secagg.enrolling import now_utc
    from fedvision_sites import setup

    home = SiteHome(folder)
    if renew or new_identity:
        if not renew:
            raise ConfigError("--new-identity belongs with --renew")
        if name is not None or data is not None:
            raise ConfigError(
                "--renew keeps the name and the data set", "the data set is changed in site.toml"
            )
        request = setup.renew(home, new_identity, now_utc())
    else:
        if name is None or data is None:
            raise ConfigError("--name and --data are needed", "such as --name utrecht --data /data/lung")
        request = setup.make_site(home, name, data, settings_text(name, data), now_utc())
    typer.echo(f"request: {home.request}\n\nfingerprint of {request.name}:")
    typer.echo(two_lines(bytes.fromhex(request.identity)) + "\n")
    note(f"next: send {home.request} to the coordinator, and read them these digits by telephone;")
    note(f"then, with the kit that they send: fedvision-site join KIT.json --home {folder}")


def settings_text(name: str, data: Path) -> str:
    """Return the text of a first ``site.toml``.

    Raises:
        ConfigError: The name does not fit a roster.
    """
    from fedvision.secagg.documents import Refused, validated
    from fedvision.secagg.enrolling import RESERVED

    if name.casefold() in RESERVED:
        raise ConfigError(f"--name {name}: that name is another party's", "such as `utrecht` or `site-03`")
    threads = max(1, min(16, (os.cpu_count() or 2) // 2))
    values: dict[str, Any] = {"name": name, "data": str(data.resolve()), "threads": threads}
    try:
        validated(SiteSection, values)
    except Refused as refused:
        raise ConfigError(refused.text, refused.hint or "such as `utrecht` or `site-03`") from None
    sections: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
        "": (SiteSettings, {}),
        "site": (SiteSection, values),
        "policy": (Policy, {}),
    }
    return commented(f"The site {name}: what it is, and what may run here.", sections)


def join(
    kit: Annotated[Path, typer.Argument(metavar="KIT.json", help="The file that the coordinator sent.")],
    home: Home = Path(),
    governance: Annotated[
        str | None,
        typer.Option(metavar="DIGITS", help="Fingerprint that governance read by telephone: do not ask."),
    ] = None,
) -> None:
    from fedvision.secagg.enrolling import kit_of_file
    from fedvision_sites import setup

    place = SiteHome(home)
    found = kit_of_file(kit)
    if governance is not None:
        compare_fingerprint(found.governance, governance, "governance", "")

    def agree(key: bytes) -> None:
        if governance is None:
            typer.echo(f"governance of {found.kit.federation}, fingerprint:")
            compare_fingerprint(key, None, "governance", "Did governance read these digits to you?")

    roster = setup.join(place, found, agree)
    number = found.kit.number
    typer.echo(
        f"joined {roster.federation}: site {number} of roster {roster.serial}, {len(roster.sites)} sites"
    )
    note(f"next: fedvision-site check --home {home}; then: fedvision-site run --home {home}")


def check(
    home: Home = Path(),
    no_data: Annotated[bool, typer.Option("--no-data", help="Do not read the data set's files.")] = False,
) -> None:
    from fedvision.secagg.enrolling import now_utc
    from fedvision_sites.checks import check_home

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("what to do", overflow="fold")
    is_good = True
    for one in check_home(SiteHome(home), now_utc(), with_data=not no_data):
        is_good &= one.level != "problem"
        table.add_row(f"[{STYLES[one.level]}]{one.level}[/]", *map(_plain, (one.subject, one.text, one.hint)))
    Console(highlight=False).print(table)
    if not is_good:
        raise typer.Exit(1)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
