"""Where jobs and their sites stand, as tables on the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedvision_server.home import ServerHome
from fedvision_server.job_status import NOT_SIGNED, SiteStanding, Standing, plain

STYLES = {"running": "bold green", "failed": "bold red", NOT_SIGNED: "bold red", "draft": "yellow"}
PRESENCE = {None: "not known", True: "yes", False: "no"}


def print_jobs(found: Sequence[Standing], console: Console) -> None:
    """Print one line a job."""
    is_known = any(one.online is not None for one in found)
    table = _table("job", "state", "round", "sites there" if is_known else "sites", "last event", "at (UTC)")
    for one in found:
        at = one.ended or one.last_event_at or one.submitted or ""
        last = _text(one.error or one.last_event)
        shown = at.replace("T", " ").removesuffix("+00:00")
        table.add_row(_text(one.id), _state(one), _rounds(one), _presence(one), last, shown)
    console.print(table)


def print_job(home: ServerHome, one: Standing, rows: Sequence[SiteStanding], console: Console) -> None:
    """Print all that is known of a job, and one line for each of its sites."""
    facts = _table("", "")
    facts.show_header = False
    for name, value in (
        ("job", one.id),
        ("state", str(_state(one))),
        ("round", _rounds(one)),
        ("sites", _presence(one)),
        ("submitted", one.submitted),
        ("started", one.started),
        ("ended", one.ended),
        ("Flower runs", str(one.attempts)),
        ("last event", f"{one.last_event} ({one.last_event_at})" if one.last_event else ""),
        ("error", one.error),
        ("folder", str(home.jobs / one.id)),
    ):
        if value:
            facts.add_row(name, _text(value))
    console.print(facts)
    if not rows:
        return
    table = _table("site", "role", "there", "rounds in", "last", "note")
    for row in rows:
        trains = row.role != "held out"
        rounds, last = (str(row.rounds), str(row.last_round or "-")) if trains else ("-", "-")
        table.add_row(_text(row.name), row.role, PRESENCE[row.is_online], rounds, last, _text(row.note))
    console.print("")
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _text(text: str) -> Text:
    return Text(plain(text))


def _state(one: Standing) -> Text:
    shown = "stopping" if one.stop_requested else one.state
    return Text(shown, style=STYLES.get(shown, ""))


def _rounds(one: Standing) -> str:
    return f"{one.round}/{'?' if one.rounds is None else one.rounds}"


def _presence(one: Standing) -> str:
    total = len(one.sites) + len(one.held_out)
    return str(total) if one.online is None else f"{one.online}/{total}"
