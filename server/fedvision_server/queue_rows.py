"""What lies in the tables of the queue of jobs, and what of it counts.

A row of ``jobs`` says where a job stands. Whether anybody wants that job, and what it is, the signed requests
beside it say; a row without them is read with nothing in it that could be acted on.
"""

import sqlite3
from dataclasses import dataclass
from typing import Literal, get_args

from fedvision_server import database
from fedvision_server.job_requests import Request, Rules, Wanted, read_requests

State = Literal["waiting", "running", "done", "failed", "stopped"]
UINT64 = 1 << 64
SCHEMA = database.Schema(
    what="queue of jobs",
    application_id=0x66766A71,  # "fvjq"
    version=1,
    statements=(
        "CREATE TABLE ids (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL)",
        "CREATE TABLE requests (number INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, "
        "body BLOB NOT NULL, signature BLOB NOT NULL)",
        "CREATE INDEX requests_of_job ON requests (job)",
        "CREATE TABLE jobs (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, "
        "digest TEXT NOT NULL, state TEXT NOT NULL, queued INTEGER NOT NULL, flower_run INTEGER, "
        "attempts INTEGER NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT '', "
        "submitted TEXT NOT NULL, started TEXT, ended TEXT)",
        "CREATE INDEX jobs_by_state ON jobs (state)",
    ),
)
COLUMNS = "id, digest, state, submitted, started, ended, flower_run, attempts, error"
QUERIES = {
    "all": f"SELECT {COLUMNS} FROM jobs ORDER BY number",  # noqa: S608, a constant
    "id": f"SELECT {COLUMNS} FROM jobs WHERE id = ?",  # noqa: S608
    "digest": f"SELECT {COLUMNS} FROM jobs WHERE digest = ?",  # noqa: S608
    "state": f"SELECT {COLUMNS} FROM jobs WHERE state = ? ORDER BY queued, number",  # noqa: S608
}


@dataclass(frozen=True)
class Entry:
    """A job in the queue.

    Attributes:
        id: Its id, such as ``0007-nuclei``; also the name of its folder.
        digest: Digest of the job.
        state: Where it stands.
        submitted: When it was submitted, or submitted again, ISO 8601, UTC.
        started: When it first ran; None before.
        ended: When it was done, failed or stopped; None before.
        flower_run: Number of the last Flower run; None before the first.
        attempts: How many Flower runs there were.
        error: Why it failed; else empty.
        wanted: What an operator signed; None if no valid signature says so, and then nothing is to be done.
        operator: Public key of the operator who submitted it, hexadecimal; empty as above.
        stop_requested: The last thing that an operator asked for is that it stop.
    """

    id: str
    digest: str
    state: State
    submitted: str
    started: str | None
    ended: str | None
    flower_run: int | None
    attempts: int
    error: str
    wanted: Wanted | None
    operator: str
    stop_requested: bool

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites that train."""
        return self.wanted.sites if self.wanted else ()

    @property
    def held_out(self) -> tuple[str, ...]:
        """Sites that only test the final model."""
        return self.wanted.held_out if self.wanted else ()


def requests_on(db: sqlite3.Connection, job_id: str, rules: Rules) -> list[Request]:
    """Return the requests on a job that count, in their order."""
    query = "SELECT body, signature FROM requests WHERE job = ? ORDER BY number"
    return read_requests(db.execute(query, (job_id,)).fetchall(), job_id, rules)


def entries(db: sqlite3.Connection, rules: Rules, query: str, *values: str) -> list[Entry]:
    """Return the jobs that one of ``QUERIES`` finds, with what operators signed for them."""
    return [_entry(db, rules, row) for row in db.execute(QUERIES[query], values).fetchall()]


def _entry(db: sqlite3.Connection, rules: Rules, row: tuple[object, ...]) -> Entry:
    texts = [value if isinstance(value, str) else "" for value in row]
    numbers = [value if isinstance(value, int) else None for value in row]
    requests = requests_on(db, texts[0], rules)
    wanted = requests[0].wanted if requests else None
    if wanted is None or wanted.job != texts[1] or texts[2] not in get_args(State):
        wanted, requests = None, []
    return Entry(
        id=texts[0],
        digest=texts[1],
        state=texts[2],  # type: ignore[arg-type]
        submitted=texts[3],
        started=texts[4] or None,
        ended=texts[5] or None,
        flower_run=None if numbers[6] is None else numbers[6] % UINT64,
        attempts=numbers[7] or 0,
        error=texts[8],
        wanted=wanted,
        operator=requests[0].operator if requests else "",
        stop_requested=bool(requests) and requests[-1].action == "stop",
    )
