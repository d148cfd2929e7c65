"""The log of a job in lines for people, from ``rounds.jsonl``: each round, and each thing that went wrong.

What came from a site (its name, a reason) is shown as text: no markup, no control characters.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from fedvision.config import load_job
from fedvision.report.progress import Progress, printable
from fedvision.report.record import is_of_test
from fedvision_server.home import ServerHome
from fedvision_server.job_status import event_text
from fedvision_server.queue import Entry, JobQueue

Event = dict[str, Any]
POLL_S = 0.5
IN_ROUND_LINE = ("round", "thrown away", "train", "judgement")
"""Events that the line of the round tells, or the report."""


def print_log(home: ServerHome, queue: JobQueue, entry: Entry, follow: bool, console: Console) -> None:
    """Print what happened in a job; with ``follow``, until it has ended.

    Raises:
        ConfigError: The job's folder is absent or damaged.
    """

    def line(text: str) -> None:
        console.print(printable(text), markup=False, soft_wrap=True)

    folder = home.jobs / entry.id
    job = load_job(folder / "job.toml")
    line(f"{entry.id}: submitted {entry.submitted}")
    if entry.started:
        line(f"{entry.id}: first started {entry.started}, Flower runs so far: {entry.attempts}")

    def is_running() -> bool:
        return follow and queue.job(entry.id).state in ("waiting", "running")

    current = 0
    with Progress(job, len(entry.sites), console) as progress:
        for event in follow_lines(folder / "rounds.jsonl", is_running):
            number = event.get("round")
            if isinstance(number, int) and number > current and not is_of_test(event):
                # The record does not say when a round began; Progress forgets the round before then.
                current = number
                progress.observe({"event": "start", "round": number, "sites": list(entry.sites)})
            progress.observe(event)
            if event.get("event") not in IN_ROUND_LINE and not _is_judgement(event):
                line(event_text(event))
    entry = queue.job(entry.id)
    if entry.ended:
        line(f"{entry.id}: {entry.state} {entry.ended}" + (f": {entry.error}" if entry.error else ""))
    elif entry.state == "waiting":
        line(f"{entry.id}: waits")


def _is_judgement(event: Event) -> bool:
    return event.get("event") in ("validate", "test") and "status" not in event


def follow_lines(path: Path, is_running: Callable[[], bool]) -> Iterator[Event]:
    """Yield the records of a line file, and those to come as long as ``is_running``."""
    offset = 0
    while True:
        goes_on = is_running()  # asked before the file is read, so that the last lines are not missed
        content = b""
        if path.exists():
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        offset += len(whole)
        for text in whole.split(b"\n"):
            event = _parsed(text)
            if event is not None:
                yield event
        if not goes_on:
            return
        time.sleep(POLL_S)


def _parsed(text: bytes) -> Event | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
