"""The queue of jobs: a small SQLite database that commands write to and the supervisor acts on.

    requests   what operators asked for: the signed bytes of every submit, again and stop; never changed
    jobs       where each job stands: waiting, running, done, failed or stopped
    ids        which ids were given out

    queue = open_queue(home)                                  or JobQueue(path, operators, server)
    queue.submit(operator, queue.new_id(job.name), wanted)    operator: the Identity of one of them
    entry = queue.next_runnable()                             an ``Entry`` or None; one at a time, in order
    queue.set_running(entry.id, flower_run); queue.stop_requested(entry.id); queue.set_done(entry.id)

Rules:
- A job counts only by its requests, whose signatures are verified whenever it is read, see ``job_requests``.
  So a row that somebody else writes does nothing.
- Whoever can write the file can still delete rows, and set back the state of a job that operators want; the
  audit log tells what was asked for and done.
- Every change is one transaction, on disk when the call returns; a process that is killed leaves all of it
  or nothing. Any number of processes may work at once.
- One job runs at a time. A job that is submitted again goes to the end of the queue.
"""

import sqlite3
from collections.abc import Callable, Collection
from pathlib import Path

from fedvision.errors import ConfigError
from fedvision.secagg.documents import content_of
from fedvision.secagg.identity import Identity, parse_public
from fedvision_server import database
from fedvision_server.home import ServerHome
from fedvision_server.job_requests import Action, Rules, Wanted, now, sign_request
from fedvision_server.queue_rows import SCHEMA, UINT64, Entry, State, entries, requests_on

LONGEST_NAME = 32
DRAFT = "charter-draft.json"
"""In the folder of a job that is not in the queue: governance has to sign its charter first."""


class JobQueue:
    """The queue in one file. Keeps nothing open between calls, so any thread or process may use it.

    Args:
        path: ``jobs.db``; made when it is first written to.
        operators: Public keys whose requests count; without any, nothing is ever runnable.
        server: Public key of this server.
    """

    def __init__(self, path: Path, operators: Collection[bytes] = (), server: bytes = b"") -> None:
        self.path = path
        self._rules = Rules(frozenset(operators), server)

    def new_id(self, name: str) -> str:
        """Return an id that no job had before, such as ``0007-nuclei``; they sort by age.

        Raises:
            StorageError: The database cannot be written; so for all that follow.
        """
        with database.writing(self.path, SCHEMA) as db:
            number = db.execute("INSERT INTO ids (id) VALUES ('')").lastrowid
            job_id = f"{number:04d}-{name[:LONGEST_NAME]}"
            db.execute("UPDATE ids SET id = ? WHERE number = ?", (job_id, number))
        return job_id

    def check_operator(self, operator: Identity) -> None:
        """Check that somebody may submit and stop.

        Raises:
            ConfigError: Their key is not an operator's.
        """
        if operator.public not in self._rules.operators:
            raise ConfigError(
                f"the key of {operator.name} is not an operator's",
                "only the keys that server.toml lists as operators submit and stop",
            )

    def check_new(self, digest: str) -> None:
        """Check that a job is not in the queue yet.

        Raises:
            ConfigError: It is.
        """
        if self.path.exists():
            with database.reading(self.path, SCHEMA) as db:
                self._check_new(db, digest)

    def submit(
        self, operator: Identity, job_id: str, wanted: Wanted, announce: Callable[[], None] = lambda: None
    ) -> Entry:
        """Put a job at the end of the queue.

        Args:
            operator: Who asks for it.
            job_id: From ``new_id``; its folder is ready.
            wanted: What to run.
            announce: Called when all checks have passed and just before it is done; if it raises, it is not.

        Raises:
            ConfigError: Not an operator's key; or job or id are in the queue already.
        """
        self.check_operator(operator)
        with database.writing(self.path, SCHEMA) as db:
            if not db.execute("SELECT 1 FROM ids WHERE id = ?", (job_id,)).fetchone():
                raise ConfigError(f"{job_id!a} is no id of this queue")
            if entries(db, self._rules, "id", job_id):
                raise ConfigError(f"{job_id} was submitted before")
            self._check_new(db, wanted.job)
            queued = self._ask(db, operator, "submit", job_id, wanted)
            db.execute(
                "INSERT INTO jobs (id, digest, state, queued, submitted) VALUES (?, ?, 'waiting', ?, ?)",
                (job_id, wanted.job, queued, now()),
            )
            announce()
            return self._entry(db, job_id)

    def submit_again(
        self, operator: Identity, job_id: str, announce: Callable[[], None] = lambda: None
    ) -> Entry:
        """Let a job that failed or was stopped go on, after all that wait. Arguments as for ``submit``.

        Raises:
            ConfigError: Not an operator's key; no such job; or it has not failed or stopped.
        """
        self.check_operator(operator)
        with database.writing(self.path, SCHEMA) as db:
            entry = self._authorised(db, job_id)
            if entry.state not in ("failed", "stopped"):
                said = "still being stopped" if entry.stop_requested else entry.state
                raise ConfigError(f"{job_id} is {said}", "only a job that failed or was stopped can go on")
            queued = self._ask(db, operator, "again", job_id)
            db.execute(
                "UPDATE jobs SET state = 'waiting', error = '', ended = NULL, queued = ?, submitted = ? "
                "WHERE id = ?",
                (queued, now(), job_id),
            )
            announce()
            return self._entry(db, job_id)

    def request_stop(self, operator: Identity, job_id: str) -> Entry:
        """Ask for a job to be stopped. One that waits is stopped at once; asked twice, nothing changes.

        Raises:
            ConfigError: Not an operator's key; no such job; or it has ended.
        """
        self.check_operator(operator)
        with database.writing(self.path, SCHEMA) as db:
            entry = self._authorised(db, job_id)
            if entry.state not in ("waiting", "running"):
                raise ConfigError(f"{job_id} is {entry.state} already")
            if not entry.stop_requested:
                self._ask(db, operator, "stop", job_id)
            if entry.state == "waiting":
                self._end(db, job_id, "stopped", "")
            return self._entry(db, job_id)

    def jobs(self) -> list[Entry]:
        """Return all jobs, the oldest first; none where there is no queue yet.

        Raises:
            StorageError: The database cannot be read, or is of another version.
        """
        if not self.path.exists():
            return []
        with database.reading(self.path, SCHEMA) as db:
            return entries(db, self._rules, "all")

    def job(self, job_id: str) -> Entry:
        """Return one job, by its id or by the number that the id begins with.

        Raises:
            ConfigError: There is none. StorageError: See ``jobs``.
        """
        for entry in self.jobs():
            if is_meant(job_id, entry.id):
                return entry
        raise _absent(job_id)

    def signed_requests(self) -> list[tuple[str, bytes, bytes]]:
        """Return job, bytes and signature of every request in the order in which they came, for an auditor.

        Raises:
            StorageError: See ``jobs``.
        """
        if not self.path.exists():
            return []
        with database.reading(self.path, SCHEMA) as db:
            rows = db.execute("SELECT job, body, signature FROM requests ORDER BY number").fetchall()
        return [
            (str(job), body, signature)
            for job, body, signature in rows
            if isinstance(body, bytes) and isinstance(signature, bytes)
        ]

    def next_runnable(self) -> Entry | None:
        """Return the job that runs, else the first of those that wait; None if there is nothing to do.

        Guarantee: operators want it to run, see ``job_requests``. Only a job that runs may have
        ``stop_requested``: it is to be stopped first.
        """
        if not self.path.exists():
            return None
        with database.reading(self.path, SCHEMA) as db:
            running = [entry for entry in entries(db, self._rules, "state", "running") if entry.wanted]
            waiting = [
                entry
                for entry in entries(db, self._rules, "state", "waiting")
                if entry.wanted and not entry.stop_requested
            ]
        return next(iter([*running, *waiting]), None)

    def stop_requested(self, job_id: str) -> bool:
        """Return whether an operator asked for the job to be stopped.

        Raises:
            ConfigError: There is no such job.
        """
        with database.reading(self.path, SCHEMA) as db:
            return self._entry(db, job_id).stop_requested

    def set_running(self, job_id: str, flower_run: int) -> Entry:
        """Note that a Flower run for the job begins: the first, or another one of a job that runs.

        Args:
            job_id: The job.
            flower_run: Flower's number of the run, 0 to 2**64 - 1.

        Raises:
            ConfigError: No operator wants it to run, another job runs, or it has ended.
        """
        if not 0 <= flower_run < UINT64:
            raise ValueError(f"flower_run must be in 0..2**64 - 1, got {flower_run}")
        with database.writing(self.path, SCHEMA) as db:
            entry = self._authorised(db, job_id)
            if entry.stop_requested or entry.state not in ("waiting", "running"):
                said = "to be stopped" if entry.stop_requested else entry.state
                raise ConfigError(f"{job_id} cannot be started: it is {said}")
            for other in entries(db, self._rules, "state", "running"):
                if other.wanted and other.id != job_id:
                    raise ConfigError(f"{job_id} cannot be started: {other.id} runs, and one runs at a time")
            stored = flower_run - UINT64 if flower_run >= UINT64 // 2 else flower_run  # SQLite's are signed
            db.execute(
                "UPDATE jobs SET state = 'running', attempts = attempts + 1, flower_run = ?, "
                "started = COALESCE(started, ?) WHERE id = ?",
                (stored, now(), job_id),
            )
            return self._entry(db, job_id)

    def set_done(self, job_id: str) -> Entry:
        """Note that a job that runs is finished.

        Raises:
            ConfigError: It does not run.
        """
        return self._finish(job_id, "done", "", ("running",))

    def set_failed(self, job_id: str, error: str) -> Entry:
        """Note that a job that runs or waits cannot go on by itself.

        Args:
            job_id: The job.
            error: Why, in words for the operator.

        Raises:
            ConfigError: It has ended.
        """
        return self._finish(job_id, "failed", error, ("waiting", "running"))

    def set_stopped(self, job_id: str) -> Entry:
        """Note that a job that ran was stopped, as an operator asked.

        Raises:
            ConfigError: It does not run, or no operator asked.
        """
        return self._finish(job_id, "stopped", "", ("running",))

    def _finish(self, job_id: str, state: State, error: str, allowed: Collection[str]) -> Entry:
        with database.writing(self.path, SCHEMA) as db:
            entry = self._authorised(db, job_id)
            if entry.state not in allowed:
                raise ConfigError(f"{job_id} is {entry.state}, and cannot become {state}")
            if state == "stopped" and not entry.stop_requested:
                raise ConfigError(f"no operator asked for {job_id} to be stopped")
            self._end(db, job_id, state, error)
            return self._entry(db, job_id)

    def _end(self, db: sqlite3.Connection, job_id: str, state: State, error: str) -> None:
        db.execute(
            "UPDATE jobs SET state = ?, error = ?, ended = ? WHERE id = ?", (state, error, now(), job_id)
        )

    def _ask(
        self,
        db: sqlite3.Connection,
        operator: Identity,
        action: Action,
        job_id: str,
        wanted: Wanted | None = None,
    ) -> int:
        """Store a signed request and return its number."""
        before = requests_on(db, job_id, self._rules)
        body, signature = sign_request(operator, self._rules.server, action, job_id, before, wanted)
        stored = db.execute(
            "INSERT INTO requests (job, body, signature) VALUES (?, ?, ?)", (job_id, body, signature)
        )
        assert stored.lastrowid is not None
        return stored.lastrowid

    def _check_new(self, db: sqlite3.Connection, digest: str) -> None:
        for entry in entries(db, self._rules, "digest", digest):
            if entry.wanted:
                raise ConfigError(
                    f"the same job is in the queue already: {entry.id}, {entry.state}",
                    f"`submit --again {entry.id}` goes on with one that failed or was stopped; to run it "
                    "anew, change its seed",
                )

    def _entry(self, db: sqlite3.Connection, job_id: str) -> Entry:
        for entry in entries(db, self._rules, "id", job_id):
            return entry
        raise _absent(job_id)

    def _authorised(self, db: sqlite3.Connection, job_id: str) -> Entry:
        entry = self._entry(db, job_id)
        if entry.wanted is None:
            raise ConfigError(
                f"{job_id} is in the queue without an operator's valid signature",
                "its operator was removed from server.toml, or somebody else changed the database",
            )
        return entry


def open_queue(home: ServerHome) -> JobQueue:
    """Return the queue of a server, with the operators of ``server.toml``. Needs no private key.

    Raises:
        ConfigError: ``server.toml`` or the server's public key is absent or damaged.
    """
    operators = [bytes.fromhex(key) for key in home.settings().operators]
    server = parse_public(content_of(home.server_pub).decode("ascii", "replace"), str(home.server_pub))[1]
    return JobQueue(home.jobs_db, operators, server)


def is_meant(text: str, job_id: str) -> bool:
    """Return whether ``text`` is an id, or the number that the id begins with."""
    number = job_id.partition("-")[0]
    is_number = text.isascii() and text.isdigit() and number.isdigit()
    return text == job_id or (is_number and int(text) == int(number))


def _absent(job_id: str) -> ConfigError:
    return ConfigError(f"there is no job {ascii(job_id)[1:-1]}", "`fedvision-server status` lists all")
