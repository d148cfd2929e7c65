"""Where the jobs of a server stand, read from the queue and the jobs' folders. Nothing is changed.

flower/online.json   when each site was last there, Unix time by name; absent where it is not known
"""

import json
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvision.config import load_job
from fedvision.errors import ConfigError, FedvisionError, StorageError
from fedvision.report.notation import counted, duration_text, is_number, listed
from fedvision.storage import read_json, read_lines
from fedvision_server.home import ServerHome
from fedvision_server.queue import DRAFT, Entry, JobQueue

if TYPE_CHECKING:
    from fedvision.report.record import RunRecord

Event = dict[str, Any]
ENDS_ROUND = ("round", "thrown away")
LATELY_S = 60.0
TAIL_BYTES = 1 << 16
NOT_SIGNED = "not signed"


@dataclass(frozen=True)
class Standing:
    """Where a job stands.

    Attributes:
        id: Of the job.
        state: As in the queue; "draft" for one whose charter is to be signed, "not signed" for a row of the
            queue that no operator signed.
        round: The last round that is done, 0 before the first.
        rounds: How many there are to be; None if the folder is not readable.
        sites: Sites that train.
        held_out: Sites that only test the final model.
        online: How many of all these were there in the last minute; None if that is not known.
        last_event: What happened last, in words; empty before the first event.
        last_event_at: When, ISO 8601, UTC; None before the first.
        submitted, started, ended: Likewise; None if it has not happened.
        attempts: How many Flower runs there were.
        error: Why it failed.
        stop_requested: It is being stopped.
    """

    id: str
    state: str
    round: int
    rounds: int | None
    sites: tuple[str, ...]
    held_out: tuple[str, ...]
    online: int | None
    last_event: str
    last_event_at: str | None
    submitted: str | None
    started: str | None
    ended: str | None
    attempts: int
    error: str
    stop_requested: bool


@dataclass(frozen=True)
class SiteStanding:
    """Where a site of a job stands.

    Attributes:
        name: The site.
        role: "trains" or "held out", or "expelled".
        is_online: Whether it was there in the last minute; None if that is not known.
        rounds: In how many rounds' models its update is.
        last_round: The last such round, 0 for none.
        note: What went wrong last, or why it is left out; else empty.
    """

    name: str
    role: str
    is_online: bool | None
    rounds: int
    last_round: int
    note: str


def all_standings(home: ServerHome, queue: JobQueue) -> list[Standing]:
    """Return where every job stands, the oldest first, drafts last.

    Raises:
        StorageError: The queue cannot be read.
    """
    entries = queue.jobs()
    online = seen_lately(home)
    known = {entry.id for entry in entries}
    drafts = sorted(path.parent.name for path in home.jobs.glob(f"*/{DRAFT}"))
    found = [_of_entry(home, entry, online) for entry in entries]
    return found + [_of_draft(home, name, online) for name in drafts if name not in known]


def standing(home: ServerHome, entry: Entry) -> Standing:
    """Return where one job stands."""
    return _of_entry(home, entry, seen_lately(home))


def seen_lately(home: ServerHome) -> frozenset[str] | None:
    """Return the sites that were there in the last minute; None if that is not known."""
    try:
        found = read_json(home.flower / "online.json")
    except StorageError:
        return None
    since = time.time() - LATELY_S
    times = found.items() if isinstance(found, dict) else ()
    return frozenset(name for name, at in times if is_number(at) and at >= since)


def site_standings(home: ServerHome, entry: Entry) -> list[SiteStanding]:
    """Return where the sites of a job stand, in the order of its cohort.

    Raises:
        FedvisionError: The folder is absent or damaged.
    """
    from fedvision.report.record import read_run

    record = read_run(home.jobs / entry.id)
    online = seen_lately(home)
    expelled = record.expelled()
    found = []
    for name in (*entry.sites, *entry.held_out):
        rounds = [number for number in record.rounds if name in record.accepted(number)]
        role = "expelled" if name in expelled else "trains" if name in entry.sites else "held out"
        is_online = None if online is None else name in online
        note = _site_note(record, name)
        found.append(SiteStanding(name, role, is_online, len(rounds), max(rounds, default=0), note))
    return found


def _site_note(record: "RunRecord", name: str) -> str:
    """Say what went wrong last at a site, unless it has been in a round since."""
    incidents = [
        (number, one)
        for number, events in sorted(record.incidents.items())
        for one in events
        if one.get("site") == name
    ]
    if not incidents:
        return ""
    number, last = incidents[-1]
    later = [done for done in record.rounds if done > number and name in record.accepted(done)]
    return "" if later and last["event"] != "expelled" else event_text(last)


def _of_entry(home: ServerHome, entry: Entry, online: frozenset[str] | None) -> Standing:
    folder = home.jobs / entry.id
    rounds, at = None, None
    events: list[Event] = []
    if entry.wanted is not None:  # else the id may be anything
        rounds = _num_rounds(folder)
        events, at = last_events(folder / "rounds.jsonl")
    done = 0 if entry.wanted is None else _last_round(folder, events)
    everybody = {*entry.sites, *entry.held_out}
    return Standing(
        id=entry.id,
        state=entry.state if entry.wanted else NOT_SIGNED,
        round=done,
        rounds=rounds,
        sites=entry.sites,
        held_out=entry.held_out,
        online=None if online is None else len(everybody & online),
        last_event=event_text(events[-1]) if events else "",
        last_event_at=at,
        submitted=entry.submitted,
        started=entry.started,
        ended=entry.ended,
        attempts=entry.attempts,
        error=entry.error,
        stop_requested=entry.stop_requested and entry.state == "running",
    )


def _of_draft(home: ServerHome, job_id: str, online: frozenset[str] | None) -> Standing:
    from fedvision_server.chartering import load_cohort

    folder = home.jobs / job_id
    try:
        cohort = load_cohort(folder)
        sites, held_out = cohort.train, cohort.held_out
    except StorageError:
        sites, held_out = (), ()
    there = None if online is None else len({*sites, *held_out} & online)
    rounds = _num_rounds(folder)
    return Standing(
        job_id, "draft", 0, rounds, sites, held_out, there, "", None, None, None, None, 0, "", False
    )


def _num_rounds(folder: Path) -> int | None:
    try:
        return load_job(folder / "job.toml").rounds
    except ConfigError:
        return None


def last_events(path: Path) -> tuple[list[Event], str | None]:
    """Return the last events of a record and when it was written; a record of months is not read in full."""
    try:
        with path.open("rb") as file:
            written = os.fstat(file.fileno()).st_mtime
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return [], None
    return _parsed(lines), datetime.fromtimestamp(written, UTC).isoformat(timespec="seconds")


def _parsed(lines: list[bytes]) -> list[Event]:
    """Return the events among lines; the first may be cut off in front."""
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            events.append(event)
    return events


def _last_round(folder: Path, events: list[Event]) -> int:
    """Return the last round that is done, from the last events if they tell."""
    for event in reversed(events):
        if event["event"] in ENDS_ROUND and isinstance(event.get("round"), int):
            return int(event["round"])
    try:
        found = read_lines(folder / "rounds.jsonl")
    except FedvisionError:
        return 0
    return max((int(event["round"]) for event in found if event.get("event") in ENDS_ROUND), default=0)


def plain(text: object) -> str:
    """Return text on one line without control characters, as ``report.progress.printable``.

    That module loads PyTorch, for which ``status`` has no time.
    """
    return "".join(character if character.isprintable() else " " for character in str(text))


def event_text(event: Event) -> str:
    """Say an event of the record in one line, without control characters and without any array."""
    kind, site, reason = (plain(event.get(key, "")) for key in ("event", "site", "reason"))
    number = event.get("round")
    where = f"round {number}: " if isinstance(number, int) else ""
    why = f": {reason}" if reason else ""
    status = plain(event.get("status", "failed"))
    if kind == "round":
        seconds = event.get("seconds")
        text = f"done with {counted(int(event.get('num_sites') or 0), 'site')}"
        return f"{where}{text}, {duration_text(seconds)}" if is_number(seconds) else where + text
    if kind == "secure":
        return f"{where}{site} {status} at step {plain(event.get('step', ''))}{why}"
    if kind == "attempt":
        return f"{where}attempt {plain(event.get('attempt', ''))} at the {_sum_name(event)} given up{why}"
    if kind == "expelled":
        return f"{where}{site} expelled, rule {plain(event.get('rule', ''))}"
    if kind == "train":
        return f"{where}{site} {'trained' if status == 'accepted' else status}{why}"
    if kind == "evaluate failed":
        return f"{where}{site or 'the model'} could not be judged{why}"
    if kind == "validate" and "status" not in event:
        return f"{where}{site} judged the model"
    if kind == "waiting" and isinstance(event.get("sites"), list):
        return f"{where}waiting for {listed([plain(site) for site in event['sites']])}"
    if kind == "standing":
        return f"{where}{site} is now {plain(event.get('standing', ''))} for what its updates look like"
    if kind == "repaired":
        return f"the model after the last round: {plain(event.get('text', ''))}"
    words = [word for word in (site, kind, plain(event.get("status", ""))) if word]
    return f"{where}{' '.join(words)}{why}"


def _sum_name(event: Event) -> str:
    names = {"train": "training sum", "validate": "validation sum", "test": "test sum"}
    return names.get(str(event.get("purpose")), "sum")
