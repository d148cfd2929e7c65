"""``fedvision-server init``, ``enrol``, ``revoke``, ``roster`` and ``renew``: who takes part."""

from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedvision.cli.program import commented, compare_fingerprint, note, two_lines
from fedvision.errors import ConfigError, StorageError
from fedvision_server.home import Deadlines, ServerHome, ServerSettings, checked_host, split_address

if TYPE_CHECKING:
    from fedvision.secagg.roster import Roster
    from fedvision_server.rosters import RosterState

Home = Annotated[Path, typer.Option("--home", metavar="HOME", help="The coordinator's folder.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask; fingerprints were compared.")]
OWN = frozenset({"keys", "tls", "rosters", "sites", "jobs", "flower"})
"""What `init` makes before ``server.toml``; a folder with nothing else is one whose `init` was cut off."""
SOON = timedelta(days=60)

INIT_HELP = """Found a federation: make keys, certificates and settings in an empty folder.

Makes the key of governance, who signs who takes part, of an operator, who
submits jobs, and of the server; the federation's certificate authority and
the server's certificate; and server.toml, in which every setting is explained.

keys/governance.pem may be kept on another machine, with a person or office
that all sites trust: move it there, and sign with `fedvision-server roster sign`.
"""

INIT_EPILOG = """[bold]Examples[/]

[dim]fedvision-server init /srv/lung-ct --name lung-ct --address fl.example.org:9443[/]

Sites behind another firewall reach it by address:

[dim]fedvision-server init /srv/lung-ct --name lung-ct --address fl.example.org:9443 --also 10.1.2.3[/]
"""

ENROL_HELP = """Enrol a site: check its request, compare its fingerprint, write its kit.

Shows the fingerprint of the site's key, which its people must read to you by
telephone, then asks. The site gets the next number, the next roster is signed,
and the kit is written: send it to the site. It holds no secret.

The same request again gives the same kit. A request with a new certificate, of
the key that is enrolled, needs no telephone call. Another key for an enrolled
site needs --replace.

Where governance's key is on another machine, a draft of the roster is written
instead; `roster sign` signs it there, and `roster install` writes the kit.
"""

ROSTER_HELP = """List the sites; sign and install a roster where governance's key is elsewhere.

Without a command: number, name, fingerprint, end of the certificate, and
status of every site ever enrolled.
"""

SIGN_HELP = """Sign a draft of a roster: on the machine of governance, with its private key.

Shows everybody in it and what changed since --previous, then asks.
"""

INSTALL_HELP = (
    """Put a roster in force that governance signed, and write the kits of the sites that are new in it."""
)

REVOKE_HELP = """Shut a site out: its connections at once, and every job from now on.

Its number and its key never count again. Jobs that run under a charter that
names it go on without it, as if it were away. To come back it makes a new key.
"""

RENEW_HELP = """Issue the server's certificate again, with the names in server.toml and for two more years.

Sites need nothing new. The program takes it with its next start.
"""

roster_app = typer.Typer(help=ROSTER_HELP, rich_markup_mode="rich", invoke_without_command=True)


def init(
    folder: Annotated[Path, typer.Argument(metavar="HOME", help="An empty folder, or a new one.")],
    name: Annotated[str, typer.Option(metavar="FEDERATION", help="Short name, in every roster.")],
    address: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the sites reach this server.")],
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="Another name or IP address of it; may be given several times."),
    ] = None,
) -> None:
    from fedvision.secagg import issuing
    from fedvision.secagg.documents import Refused, validated
    from fedvision.secagg.enrolling import ensure_identity, ensure_key, now_utc, private_folder
    from fedvision.storage import write_text

    home = ServerHome(folder)
    _check_empty(home)
    values = {"federation": name, "address": address, "names": also or []}
    try:
        validated(ServerSettings, values)
    except Refused as refused:
        raise ConfigError(refused.text, refused.hint) from None
    private_folder(home.root)
    with home.locked():
        governance = ensure_identity(home.governance, "governance")
        operator = ensure_identity(home.operator, "operator")
        ensure_identity(home.server_key, "server")
        authority = ensure_key(home.ca_key, issuing.new_tls_key)
        ensure_key(home.tls_key, issuing.new_tls_key)
        write_text(home.ca_cert, issuing.authority_certificate(authority, name, now_utc()).decode())
        values["operators"] = [operator.public.hex()]
        text = commented(
            f"The coordinator of the federation {name}.",
            {"": (ServerSettings, values), "deadlines": (Deadlines, {})},
        )
        for one in (home.rosters, home.sites, home.jobs, home.flower):
            private_folder(one)
        _write_certificate(home, validated(ServerSettings, values))
        write_text(home.config, text)  # Last: a folder with it is whole.
    typer.echo(f"home: {folder}\n\nfingerprint of governance:\n{two_lines(governance.public)}\n")
    note("Every site compares these digits with you by telephone, once, when it joins.")
    note(f"{home.governance} decides who takes part: keep a copy in a safe, or move it to another machine.")
    note("next: each site runs `fedvision-site init` and sends its request;")
    note(f"then: fedvision-server enrol REQUEST.json --home {folder}")


def _check_empty(home: ServerHome) -> None:
    """Refuse a folder with anything in it but what a killed `init` left."""
    if not home.root.exists():
        return
    if not home.root.is_dir():
        raise StorageError(f"{home.root} is not a folder")
    if home.config.exists():
        raise StorageError(f"{home.root} is the folder of a federation already", "choose a new folder")
    others = sorted(one.name for one in home.root.iterdir() if one.name not in OWN and one.name[0] != ".")
    if others:
        raise StorageError(f"{home.root} is not empty, it has {others[0]}", "choose a new folder")


def _write_certificate(home: ServerHome, settings: ServerSettings) -> None:
    """Issue the server's certificate for the key that is there."""
    from fedvision.secagg import certificates, documents, issuing
    from fedvision.secagg.documents import Refused
    from fedvision.secagg.enrolling import now_utc
    from fedvision.storage import write_text

    authority = (certificates.read_private(home.ca_key), documents.content_of(home.ca_cert))
    hosts = [checked_host(split_address(settings.address)[0]), *settings.names]
    try:
        made = issuing.server_certificate(
            authority, certificates.read_private(home.tls_key), hosts, now_utc()
        )
    except Refused as refused:
        raise refused.of_file(home.ca_cert) from None
    write_text(home.tls_cert, made.decode())


def renew(
    home: Home = Path(),
    new_key: Annotated[bool, typer.Option("--new-key", help="Also make a new private key for TLS.")] = False,
) -> None:
    from fedvision.secagg import certificates, documents, issuing
    from fedvision.storage import write_atomic

    place = ServerHome(home)
    settings = place.settings()
    with place.locked():
        if new_key:
            write_atomic(place.tls_key, issuing.new_tls_key(), 0o600)
        _write_certificate(place, settings)
    ends = certificates.facts_of(documents.content_of(place.tls_cert)).ends
    typer.echo(f"{place.tls_cert}: valid until {ends:%Y-%m-%d}")
    note("next: restart `fedvision-server run`; a job that runs goes on where it stands")


def enrol(
    request: Annotated[Path, typer.Argument(metavar="REQUEST.json", help="The file that the site sent.")],
    home: Home = Path(),
    out: Annotated[
        Path | None, typer.Option(metavar="KIT.json", help="The kit to write (default: NAME.kit.json).")
    ] = None,
    fingerprint: Annotated[
        str | None, typer.Option(metavar="DIGITS", help="What the site read by telephone: do not ask.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="The site has a new key; its old one counts no more.")
    ] = False,
    yes: Yes = False,
) -> None:
    from fedvision.secagg.enrolling import now_utc, request_of_file
    from fedvision_server import enrolling

    place = ServerHome(home)
    place.settings()
    asked = request_of_file(request)
    target = out or Path(f"{asked.name}.kit.json")
    _check_target(target, asked.name)
    change = enrolling.examine(place, asked, replace, now_utc())
    if change == "renewal":
        note(f"{asked.name}: a new certificate, asked for with the key that is enrolled")
    elif change != "none":
        typer.echo(f"site {asked.name} asks to join, fingerprint of its key:")
        said = "with the NEW key" if change in ("new key", "again") else ""
        question = " ".join(f"Did {asked.name} read these digits to you, and do you enrol it {said}".split())
        compare_fingerprint(bytes.fromhex(asked.identity), fingerprint, asked.name, question + "?", yes)
    with place.locked():
        state = enrolling.enrol(place, asked, replace, now_utc())
        kit = None if state.draft is not None else enrolling.kit_of(place, asked.name)
    if kit is None:
        _print_draft(state)
        return
    _write_kit(target, kit)
    note(f"next: send it to {asked.name}; there: fedvision-site join {target.name}")


def _check_target(target: Path, name: str) -> None:
    """Refuse to overwrite anything but an older kit of the same site."""
    from fedvision_server.enrolling import kit_name

    if target.exists() and (not target.is_file() or kit_name(target.read_bytes()) != name):
        raise StorageError(f"{target} exists and is not a kit of {name}", "choose another --out")


def _write_kit(target: Path, kit: bytes) -> None:
    from fedvision.storage import write_atomic

    write_atomic(target, kit)
    typer.echo(f"kit: {target}")


def _print_draft(state: "RosterState") -> None:
    draft = state.draft
    assert draft is not None
    typer.echo(f"draft: {draft}")
    signed = f"{draft.name.split('.')[0]}.signed.json"
    note(
        f"next, on governance's machine: fedvision-server roster sign {draft.name} --key governance.pem "
        f"--out {signed}\nthen here: fedvision-server roster install {signed}"
    )


def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The site.")],
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why; it stands in the audit log.")],
    home: Home = Path(),
    yes: Yes = False,
) -> None:
    from fedvision.secagg.enrolling import now_utc
    from fedvision_server import enrolling
    from fedvision_server.site_records import load_records

    place = ServerHome(home)
    place.settings()
    record = load_records(place).get(name)
    if record is not None and record.status == "enrolled" and not yes:
        typer.confirm(f"Revoke {name}, for good?", abort=True, err=True)
    with place.locked():
        state = enrolling.revoke(place, name, reason, now_utc())
    typer.echo(f"{name} is revoked")
    if state.draft is not None:
        _print_draft(state)
        return
    if state.current is not None and name in {one.name for one in state.current.sites}:
        note("it was the last site: the roster stays as it is until another site is enrolled")
        return
    note("next: each site gets the new roster with the next job")


@roster_app.callback()
def roster(context: typer.Context, home: Home = Path()) -> None:
    if context.invoked_subcommand is None:
        print_sites(ServerHome(home))
    elif home != Path():
        raise ConfigError(f"--home belongs behind `{context.invoked_subcommand}`")


def print_sites(home: ServerHome) -> None:
    """Print what is known of every site."""
    from fedvision.secagg import certificates, documents
    from fedvision.secagg.enrolling import now_utc
    from fedvision_server.rosters import governance_key, latest_roster
    from fedvision_server.site_records import load_records

    settings = home.settings()
    current = latest_roster(home, governance_key(home))
    members = {} if current is None else {one.name: one.key for one in current.sites}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
    for column in ("number", "name", "fingerprint", "certificate until", "status"):
        table.add_column(column, no_wrap=column == "fingerprint", overflow="fold")
    for one in load_records(home).values():
        ends = certificates.facts_of(one.certificate.encode()).ends
        until = f"{ends:%Y-%m-%d}" + (" renew" if ends - now_utc() < SOON else "")
        if one.status == "revoked":
            status = f"revoked {one.since[:10]}: {one.reason}"
        else:
            status = "enrolled" if members.get(one.name) == one.identity else "waits for governance"
        row = (one.name, two_lines(one.public), until, status)
        table.add_row(str(one.number), *map(escape, row))
    serial = "no roster yet" if current is None else f"roster {current.serial}"
    typer.echo(f"{settings.federation}, {serial}\n")
    Console(highlight=False).print(table)
    if home.tls_cert.exists():
        ends = certificates.facts_of(documents.content_of(home.tls_cert)).ends
        hint = "; `fedvision-server renew` issues another" if ends - now_utc() < SOON else ""
        note(f"the server's own certificate is valid until {ends:%Y-%m-%d}{hint}")


@roster_app.command("sign", help=SIGN_HELP)
def sign(
    draft: Annotated[Path, typer.Argument(metavar="DRAFT.json", help="Made by `enrol` or `revoke`.")],
    key: Annotated[Path, typer.Option(metavar="GOVERNANCE.pem", help="Governance's private key.")],
    out: Annotated[Path, typer.Option(metavar="SIGNED.json", help="The file to write.")],
    previous: Annotated[
        Path | None, typer.Option(metavar="ROSTER.json", help="The roster that was signed before this one.")
    ] = None,
    yes: Yes = False,
) -> None:
    from fedvision.secagg import identity
    from fedvision.secagg.roster import check_succession, load_roster
    from fedvision_server.rosters import load_roster_draft, sign_draft

    governance = identity.load(key)
    wanted = load_roster_draft(draft)
    before = None if previous is None else load_roster(previous, governance.public)
    if before is not None:
        check_succession(before, wanted)
    if out.exists():
        raise StorageError(f"{out} exists", "choose another --out")
    typer.echo(f"{wanted.federation}, roster {wanted.serial}\n")
    _print_members(wanted, before)
    if not yes:
        typer.confirm(
            "Did you compare every new fingerprint by telephone, and do you sign this roster?",
            abort=True,
            err=True,
        )
    sign_draft(wanted, governance, out)
    typer.echo(f"roster: {out}")


def _print_members(wanted: "Roster", before: "Roster | None") -> None:
    old = {} if before is None else {one.name: one.key for one in before.sites}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
    for column in ("number", "name", "fingerprint", ""):
        table.add_column(column, no_wrap=column == "fingerprint", overflow="fold")
    for one in wanted.sites:
        is_same = old.get(one.name) == one.key
        remark = "" if before is None or is_same else "NEW KEY" if one.name in old else "new"
        table.add_row(str(one.number), escape(one.name), two_lines(bytes.fromhex(one.key)), remark)
    remark = "" if before is None or before.server == wanted.server else "NEW KEY"
    table.add_row("", "the server", two_lines(bytes.fromhex(wanted.server)), remark)
    Console(highlight=False).print(table)
    for name in sorted(old.keys() - {one.name for one in wanted.sites}):
        note(f"note: {name} leaves the federation")


@roster_app.command("install", help=INSTALL_HELP)
def install(
    signed: Annotated[Path, typer.Argument(metavar="SIGNED.json", help="Signed by governance.")],
    home: Home = Path(),
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the kits go.")] = Path(),
) -> None:
    from fedvision_server import enrolling
    from fedvision_server.rosters import governance_key, install_roster, signed_rosters

    place = ServerHome(home)
    place.settings()
    with place.locked():
        roster = install_roster(place, signed)
        typer.echo(f"roster {roster.serial} is in force")
        for name in _new_in(roster, signed_rosters(place), governance_key(place)):
            target = out / f"{name}.kit.json"
            _check_target(target, name)
            _write_kit(target, enrolling.kit_of(place, name))
            note(f"next: send it to {name}; there: fedvision-site join {target.name}")


def _new_in(roster: "Roster", signed: dict[int, Path], governance: bytes) -> Iterable[str]:
    """Return the sites whose key is not in the roster before this one."""
    from fedvision.secagg.roster import load_roster

    path = signed.get(roster.serial - 1)
    old = () if path is None else load_roster(path, governance).sites
    before = {(one.name, one.key) for one in old}
    return [one.name for one in roster.sites if (one.name, one.key) not in before]
