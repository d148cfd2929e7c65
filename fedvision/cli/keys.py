"""``fedvision keys``: make identities, compare them by telephone, sign and verify who takes part."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedvision.cli.key_files import new_roster, party
from fedvision.errors import ConfigError

if TYPE_CHECKING:
    from fedvision.secagg.roster import Charter, Roster

HELP = """Make identities, compare them by telephone, sign and verify who takes part.

Every site, the server and governance have a key of their own. Governance
is a person or office that all sites trust and that does not run the server.
It signs the roster: the list of who takes part. Sites accept no other keys,
so a server cannot invent a site, or take the place of one.

  1  everybody     [bold]fedvision keys new[/]     NAME.pub is sent, NAME.pem stays
  2  by telephone  [bold]fedvision keys show[/]    both sides read the fingerprint
  3  governance    [bold]fedvision keys sign[/]    the roster, then each job's charter
  4  everybody     [bold]fedvision keys verify[/]  what governance has signed
"""

NEW_HELP = """Make a key pair: NAME.pem stays with you, NAME.pub is for everybody.

Only this user can read NAME.pem, and it is never overwritten. Keep a copy
that no one else gets at, such as in a sealed envelope. Without it the party
needs a new key, and governance must sign a new roster.
"""

NEW_EPILOG = """[bold]Examples[/]

[dim]fedvision keys new utrecht[/]

[dim]fedvision keys new coordinator --kind server[/]

[dim]fedvision keys new consortium --kind governance --out vault[/]
"""

SHOW_HELP = """Print fingerprints, to be compared by telephone.

FILE... are public keys, your own private key, or signed rosters. Of a roster
everybody in it is shown. It must bear the signature of the key that it names
itself; whether that is the key that you trust, `fedvision keys verify` says.
"""

SIGN_HELP = """Sign a roster, made of public keys, or the charter of a job.

A roster: FILE... are the sites' .pub files, or folders of them. Keys of the
server and of governance in the same folder are not taken for a site's. Sites
get numbers in alphabetical order; with --previous every site of that roster
keeps its number. Sites whose key is not given are not in the new roster.

A charter: FILE is its unsigned JSON, and --roster the signed roster.

Shows what is signed, then asks. Compare every fingerprint by telephone first.
"""

SIGN_EPILOG = """[bold]Examples[/]

The first roster:

[dim]fedvision keys sign keys --federation lung-ct --server keys/coordinator.pub --key consortium.pem[/]

A site joins, the others keep their numbers:

[dim]fedvision keys sign keys --previous roster.json --key consortium.pem --out roster-2.json[/]

The charter of a job:

[dim]fedvision keys sign charter.json --roster roster.json --key consortium.pem[/]
"""

VERIFY_HELP = """Check a signed roster or charter; print who is in it and what that proves.

Exit status 2 if the signature is not that of --governance, a byte was
changed, or a rule of the protocol is not kept.
"""

TELEPHONE = """How to compare: call the owner on a number that you had before, not one that came with the key.
The owner reads the eight groups from their own screen (`fedvision keys show NAME.pem`), you read along.
All eight must agree. If one differs, it is another key: do not use it."""

NEXT = {
    "site": "send {pub} to governance, and compare the fingerprint by telephone",
    "server": "send {pub} to governance, and compare the fingerprint by telephone",
    "governance": "give {pub} to every site; each compares the fingerprint by telephone, and pins the key",
}

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode="rich")


def _messages() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


def _note(text: str) -> None:
    _messages().print(text, markup=False)


def _two_lines(public: bytes) -> str:
    """Return a fingerprint as two lines of four groups."""
    from fedvision.secagg.identity import fingerprint

    groups = fingerprint(public).split()
    return "  ".join(groups[:4]) + "\n" + "  ".join(groups[4:])


def _print_keys(rows: Iterable[tuple[str, str, bytes, str]]) -> None:
    """Print role, name, fingerprint and a remark of each key, with a blank line between."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
    table.add_column("who", no_wrap=True)
    table.add_column("name", overflow="fold")
    table.add_column("fingerprint", no_wrap=True, style="bold")
    table.add_column("", overflow="fold")
    for who, name, public, remark in rows:
        table.add_row(who, escape(name), _two_lines(public), remark)
    Console(highlight=False).print(table)


def _roster_rows(
    roster: "Roster", governance: tuple[str, bytes], remarks: Mapping[str, str]
) -> list[tuple[str, str, bytes, str]]:
    rows = [
        (f"site {one.number}", one.name, bytes.fromhex(one.key), remarks.get(one.name, ""))
        for one in roster.sites
    ]
    rows.append(("server", "", bytes.fromhex(roster.server), remarks.get("", "")))
    return [*rows, ("governance", *governance, "signs")]


@app.command("new", help=NEW_HELP, epilog=NEW_EPILOG)
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The party's name, as in the roster to be.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the two files go.")] = Path("keys"),
    kind: Annotated[
        Literal["site", "server", "governance"],
        typer.Option(help="Whose key it is: changes what is said, not the key."),
    ] = "site",
) -> None:
    from fedvision.secagg import identity

    made = identity.generate(name)
    private, public = out / f"{name}.pem", out / f"{name}.pub"
    identity.save(made, private)
    typer.echo(f"private key: {private}")
    typer.echo(f"public key: {public}")
    typer.echo(f"fingerprint:\n\n{_two_lines(made.public)}\n")
    _note(f"next: {NEXT[kind].format(pub=public)}")


@app.command("show", help=SHOW_HELP)
def show(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help=".pub or .pem files, or signed rosters.")
    ],
) -> None:
    from fedvision.secagg import documents, roster

    rows = []
    for path in files:
        kind = documents.signed_kind(path) if path.suffix not in (".pub", ".pem") else None
        if kind == "roster":
            governance = documents.claimed_key(path)
            rows += _roster_rows(roster.load_roster(path, governance), ("", governance), {})
        elif kind is not None:
            raise ConfigError(f"{path}: not a roster, and names no keys", "`fedvision keys verify` shows it")
        else:
            rows.append(("key", *party(path), str(path)))
    _print_keys((who, name, public, escape(remark)) for who, name, public, remark in rows)
    _note(TELEPHONE)


@app.command("sign", help=SIGN_HELP, epilog=SIGN_EPILOG)
def sign(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Sites' .pub files or folders of them, or one charter."),
    ],
    key: Annotated[Path, typer.Option(metavar="GOV.pem", help="Governance's private key.")],
    federation: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Short name of the federation (default: previous).", rich_help_panel="Roster"
        ),
    ] = None,
    server: Annotated[
        Path | None,
        typer.Option(
            metavar="SERVER.pub",
            help="The server's public key (default: previous).",
            rich_help_panel="Roster",
        ),
    ] = None,
    previous: Annotated[
        Path | None,
        typer.Option(metavar="ROSTER", help="The roster that this one replaces.", rich_help_panel="Roster"),
    ] = None,
    roster: Annotated[
        Path | None,
        typer.Option(metavar="ROSTER", help="The roster that the charter is for.", rich_help_panel="Charter"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The signed file (default: roster.json, or CHARTER.signed.json).",
            show_default=False,
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    from fedvision.secagg import identity
    from fedvision.secagg.roster import load_draft, load_roster, save_signed, sign_document

    governance = identity.load(key)
    is_charter = len(files) == 1 and files[0].suffix == ".json"
    target = out or (files[0].with_suffix(".signed.json") if is_charter else Path("roster.json"))
    if target.exists() and not force:
        raise ConfigError(f"{target} exists", "--force replaces it, or choose another --out")
    document: Roster | Charter
    if is_charter:
        if (federation, server, previous) != (None, None, None):
            raise ConfigError("--federation, --server and --previous are for a roster, FILE is a charter")
        if roster is None:
            raise ConfigError("a charter is for a roster", "--roster roster.json")
        members = load_roster(roster, governance.public)
        document = load_draft(files[0], members)
        _print_charter(document, members)
    else:
        if roster is not None:
            raise ConfigError("--roster is for a charter, a roster has --previous")
        before = None if previous is None else load_roster(previous, governance.public)
        made = new_roster(files, governance.public, federation, server, before)
        document, remarks = made.roster, made.changes
        for note in made.notes:
            _note(f"note: {note}")
        _print_keys(_roster_rows(document, (governance.name, governance.public), remarks))
    signed = sign_document(document, governance)
    if not yes:
        _ask(signed["kind"])
    save_signed(target, signed)
    typer.echo(f"{signed['kind']}: {target}")
    typer.echo(f"digest: {document.digest().hex()}")
    check = f" --roster {roster}" if roster is not None else ""
    _note(f"next: send it to everybody; `fedvision keys verify {target}{check} --governance GOV.pub`")


def _ask(kind: str) -> None:
    question = {
        "roster": "Did you compare every fingerprint by telephone, and do you sign this roster?",
        "charter": "Do you sign this charter?",
    }[kind]
    if not sys.stdin.isatty():
        _note("hint: --yes signs without asking")
    typer.confirm(question, abort=True, err=True)


def _print_charter(charter: "Charter", roster: "Roster") -> None:
    """Print every field of a charter, and what it protects from."""
    for key, value in charter.model_dump().items():
        text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        if key == "sites":
            text = ", ".join(f"{number} {roster.member(number).name}" for number in charter.sites)
        typer.echo(f"{key:24}{text or 'none'}")
    typer.echo(
        f"\nThese rules hide an update from the server and up to {charter.max_colluding} sites that help "
        f"it. {_noise_words(charter)}"
    )


def _noise_words(charter: "Charter") -> str:
    """Say what a charter promises to patients."""
    if charter.noise_multiplier:
        return (
            f"Any sum has noise of at least {charter.noise_multiplier:g} times what one patient can add "
            f"(norm {charter.patient_clip_norm:g}), of {charter.num_honest} honest sites; `fedvision privacy "
            "plan` says what that is worth to a patient."
        )
    return (
        "They add no noise to the sums: nothing is promised to patients, but for what the job's sites do "
        '(privacy.mode = "local").'
    )


@app.command("verify", help=VERIFY_HELP)
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A signed roster or charter.")],
    governance: Annotated[
        Path, typer.Option(metavar="GOV.pub", help="Governance's public key, compared by telephone.")
    ],
    roster: Annotated[
        Path | None, typer.Option(metavar="ROSTER", help="For a charter: the roster that it is for.")
    ] = None,
) -> None:
    from fedvision.secagg.documents import signed_kind
    from fedvision.secagg.roster import load_charter, load_roster

    name, public = party(governance)
    kind = signed_kind(file)
    if kind == "roster":
        if roster is not None:
            raise ConfigError(f"{file} is a roster: --roster is for a charter")
        found = load_roster(file, public)
        _print_keys(_roster_rows(found, (name, public), {}))
        typer.echo(f"{file}: the roster of {found.federation} is good.")
        proved = f"{name} signed exactly these keys"
    elif kind == "charter":
        if roster is None:
            raise ConfigError("a charter is checked beside its roster", "--roster roster.json")
        members = load_roster(roster, public)
        charter = load_charter(file, public, members)
        _print_charter(charter, members)
        typer.echo(f"{file}: the charter is good, and so is {roster}.")
        proved = f"{name} signed exactly these rules, for the sites of {roster}, and they keep the protocol's"
    else:
        raise ConfigError(f"{file}: no signed roster or charter", "`fedvision keys sign` makes one")
    typer.echo(f"Proved: the owner of the key {proved}.")
    typer.echo("Not proved: whose key that is. Compare its fingerprint by telephone, once.")
    if kind == "charter":
        typer.echo(f"\n{_two_lines(public)}")
