"""``audit-log``, a command of all three programs: check and read the log of what mattered.

Mount it with ``app.add_typer(audit_log.app, name="audit-log")``.
"""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedvision.errors import ConfigError, VerificationError

if TYPE_CHECKING:
    from fedvision.audit.log import Entry

LOG = "audit.jsonl"
DIGEST = re.compile(r"[0-9a-f]{64}")
KEYS = ("keys/server.pub", "keys/identity.pub")

HELP = """Check and read the log of what mattered: enrolments, decisions, rounds, keys.

The server and every site keep one, audit.jsonl. Each line is signed with the
party's key and chained to the line before by a hash, so a line that was
changed, removed or moved shows. In every round both sides write down how far
the other's log is. So neither side can rewrite its history alone.

  [bold]audit-log verify[/]                   whether the log holds
  [bold]audit-log verify --against OTHER[/]   whether OTHER remembers the same
  [bold]audit-log show[/]                     what happened
  [bold]audit-log rotate[/]                   begin a new file; the chain goes on
"""

VERIFY_HELP = """Check every line of a log: signature, order, and that none is missing.

Without FILE: the log of --home. The parts that `audit-log rotate` made are
checked with it, where they lie beside it.

The end of a log can be cut off without a trace in what is left. What the
other side remembers shows it: get a copy of its audit.jsonl, and give it as
--against. Both sides should do that now and then.

Exit status 1 if something does not hold: one line names file, line and rule.
"""

VERIFY_EPILOG = """[bold]Examples[/]

At a site, its own log:

[dim]fedvision-site audit-log verify[/]

At a site, its own log against what the server remembers of it:

[dim]fedvision-site audit-log verify --against server-audit.jsonl[/]

An auditor, with copies of both:

[dim]fedvision-server audit-log verify utrecht.jsonl --key utrecht.pub --against server.jsonl[/]
"""

SHOW_HELP = """Print what happened, oldest first.

Signatures are not checked here; `audit-log verify` does that. Times are UTC.
Of digests and keys the first 16 digits are shown; FILE has them in full.
"""

ROTATE_HELP = """Rename audit.jsonl to audit-0001.jsonl, and so on; the next line begins a new file.

The chain goes on over all parts. They may be moved to an archive later, but
the newest must stay until audit.jsonl has a line again. Programs may run.
"""

Home = Annotated[Path, typer.Option(metavar="HOME", help="The folder of the server or of the site.")]
File = Annotated[
    Path | None,
    typer.Argument(metavar="[FILE]", help=f"A log or its copy (default: HOME/{LOG}).", show_default=False),
]

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode="rich")


@app.command("verify", help=VERIFY_HELP, epilog=VERIFY_EPILOG)
def verify(
    file: File = None,
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.pub",
            help="Public key of the party whose log it is (default: that of HOME).",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="OTHER_LOG", help="The other side's log, or a copy: what it remembers must be here."
        ),
    ] = None,
    home: Home = Path(),
) -> None:
    from fedvision.audit.log import EMPTY, check_log
    from fedvision.cli.key_files import party

    files = _files(file, home)
    _, public = party(key or _default_key(home))
    known = {} if against is None else _remembered(against, files)
    found = check_log(files, public, known)
    if found.head == EMPTY:
        typer.echo(f"{files[-1]}: the log is empty.")
        return
    assert found.last is not None
    names = ", ".join(map(str, files))
    typer.echo(f"{names}: the log of {found.party} holds, {found.head.count - found.start.count:,} lines.")
    typer.echo(f"last line: {found.head.count} of {_time(found.last)} UTC")
    typer.echo(f"head: {found.head.digest.hex()}")
    if found.num_keys > 1:
        typer.echo(f"keys: {found.num_keys}, each named by the one before it")
    if found.start != EMPTY:
        typer.echo(f"Not checked: lines 1 to {found.start.count}, which are in earlier parts.")
    if found.torn_bytes:
        typer.echo(f"Not counted: an unfinished line of {found.torn_bytes} bytes at the end (power cut).")
    if against is None:
        typer.echo("Not checked: whether its end was cut off. --against OTHER_LOG shows it.")
    else:
        typer.echo(
            f"{against} remembers it at {len(known):,} points, the last at line {max(known)}: all agree. "
            "Not checked: that log itself."
        )


@app.command("show", help=SHOW_HELP)
def show(
    file: File = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help="Only this kind of line; may be given several times."),
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="DATE", help="Only from this day on: 2026-05-31 (UTC).")
    ] = None,
    home: Home = Path(),
) -> None:
    from rich.table import Table
    from rich.text import Text

    from fedvision.audit.log import KINDS, read_log

    unknown = sorted(set(kind or ()) - KINDS)
    if unknown:
        raise ConfigError("--kind is not one that there is", "one of " + ", ".join(sorted(KINDS)))
    first = None if since is None else _date(since)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("line", justify="right", no_wrap=True)
    table.add_column("time (UTC)", no_wrap=True)
    table.add_column("party", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("", overflow="fold")
    damaged: VerificationError | None = None
    try:
        for entry in read_log(_files(file, home)):
            if (not kind or entry.kind in kind) and (first is None or entry.time >= first):
                row = (str(entry.count), _time(entry.time), entry.party, entry.kind, _fields(entry))
                table.add_row(*map(Text, row))
    except VerificationError as error:
        damaged = error
    console = Console(highlight=False)
    if table.row_count:
        console.print(table)
    elif damaged is None:
        console.print("no line")
    if damaged is not None:
        raise damaged


@app.command("rotate", help=ROTATE_HELP)
def rotate(home: Home = Path()) -> None:
    from fedvision.audit.log import rotate as rotate_log

    new = rotate_log(home / LOG)
    typer.echo(f"{home / LOG}: no line in it" if new is None else f"{home / LOG} is now {new}")


def _files(file: Path | None, home: Path) -> list[Path]:
    """Return the files of the given log, or of that in ``home``, oldest part first."""
    from fedvision.audit.log import parts

    log = home / LOG if file is None else file
    found = parts(log)
    if not found:
        raise ConfigError(f"{log} is not there", "--home HOME, or the name of a log")
    return found


def _default_key(home: Path) -> Path:
    found = [home / name for name in KEYS if (home / name).exists()]
    if len(found) != 1:
        what = "no key" if not found else "several keys"
        raise ConfigError(f"{what} in {home / 'keys'}", "--key FILE.pub of the party whose log it is")
    return found[0]


def _remembered(against: Path, files: list[Path]) -> dict[int, bytes]:
    """Return the heads of the log in ``files`` that another log remembers."""
    from fedvision.audit.log import peer_heads, read_log

    entry = next(read_log(files), None)
    if entry is None:
        raise ConfigError(f"{files[0]} is empty", "nothing to compare")
    found = peer_heads(_files(against, against)).get(entry.party, {})
    if not found:
        raise ConfigError(
            f"{against} remembers nothing of {entry.party}",
            "is it the log of the other side, with all parts?",
        )
    return found


def _date(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError("--since must be a date, such as 2026-05-31") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _time(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def _fields(entry: "Entry") -> str:
    return "  ".join(f"{name}={_shown(value)}" for name, value in entry.fields.items())


def _shown(value: object) -> str:
    """Return a value as text that cannot move the cursor or hide anything on a terminal."""
    if isinstance(value, list):
        return ",".join(map(_shown, value))
    text = (
        {None: "none", True: "yes", False: "no"}[value]
        if value is None or isinstance(value, bool)
        else str(value)
    )
    if DIGEST.fullmatch(text):
        return f"{text[:16]}.."
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
