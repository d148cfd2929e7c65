"""The coordinator's program: keeps Flower's programs alive, lets enrolled sites in, runs job after job.

Rules:
- What it does next follows from the disk alone (sites, queue, job folders), so it may be killed at any time.
- A program that ends is started again, with growing pauses. A job whose Flower run ended without an outcome
  gets another run, which goes on from the job's folder.
- A job that crashes again and again without a new round in between is given up.
"""

import fcntl
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, get_args

import httpx

from fedvision import __version__, health
from fedvision.audit.log import AuditLog
from fedvision.errors import ConfigError, StorageError
from fedvision.secagg import identity
from fedvision.storage import read_json, write_json
from fedvision.wire.bundle import ENVIRONMENT
from fedvision.wire.envelope import SERVER
from fedvision_server.control import HOME_VARIABLE, Control
from fedvision_server.home import ServerHome, ServerSettings
from fedvision_server.queue import open_queue
from fedvision_server.queue_rows import Entry, State
from fedvision_server.site_records import load_records
from fedvision_server.superlink import secret_file

logger = logging.getLogger(__name__)
TICK_S = 0.5
START_S = 60.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
STOP_GRACE_S = 30.0
NOTE_S = 10.0
ASK_S = 2.0
LARGEST_OUTPUT = 20_000_000
"""Bytes of flower.log; a larger one is put away at the next start."""
MAX_CRASHES = 5
"""Flower runs of a job that may end without an outcome, with no round finished in between."""


@dataclass
class Child:
    """A program that is kept alive.

    Attributes:
        name: For logs.
        command: What is run.
        environment: Added to this program's.
    """

    name: str
    command: list[str]
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    pause_s: float = FIRST_PAUSE_S
    next_start: float = 0.0
    started: float = 0.0
    num_starts: int = 0

    def keep(self, log: IO[bytes]) -> bool:
        """Start the program if it is not running; return whether it was started now."""
        now = time.monotonic()
        if self.process is not None:
            if self.process.poll() is None:
                if now - self.started > LONGEST_PAUSE_S:
                    self.pause_s = FIRST_PAUSE_S
                return False
            logger.warning("%s ended with status %s", self.name, self.process.returncode)
            self.process, self.next_start = None, now + self.pause_s
            self.pause_s = min(self.pause_s * 2, LONGEST_PAUSE_S)
        if now < self.next_start:
            return False
        environment = {**os.environ, **self.environment}
        self.process = subprocess.Popen(  # noqa: S603
            self.command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
        self.started = now
        self.num_starts += 1
        return True

    def end(self) -> None:
        """Stop the program."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None


def commands(home: ServerHome, settings: ServerSettings) -> dict[str, list[str]]:
    """Return the programs that are kept alive: the SuperLink, and what starts ServerApps."""
    start = "from flwr.supercore.cli import flower_superexec; flower_superexec()"
    secret = home.flower / "superexec.secret"
    superexec = [sys.executable, "-c", start, "--insecure", "--parent-pid", str(os.getpid())]
    superexec += ["--runtime-api-address", f"127.0.0.1:{settings.control_port}"]
    superexec += ["--superexec-auth-secret-file", str(secret)]
    superlink = [sys.executable, "-m", "fedvision_server.superlink", str(home.root)]
    return {"superlink": superlink, "superexec": superexec}


class Supervisor:
    """See the module.

    Args:
        home: The coordinator's folder.
        tell: Is told in one line what happens.

    Raises:
        StorageError: Another one runs in this home.
    """

    def __init__(self, home: ServerHome, tell: Callable[[str], None]) -> None:
        self._home = home
        self._tell = tell
        home.flower.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = (home.flower / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(f"a server runs in {home.root} already", "stop it first") from None
        self.settings = home.settings()
        own = identity.load(home.server_key)
        self.log = AuditLog(home.audit, own, SERVER)
        self.queue = open_queue(home)
        secret_file(home.flower / "superexec.secret")
        self._control = Control(self.settings.control_port, secret_file(home.flower / "control.secret"))
        output = home.flower / "flower.log"
        if output.exists() and output.stat().st_size > LARGEST_OUTPUT:
            output.replace(output.with_suffix(".log.1"))
        self._output = output.open("ab")
        environment = {
            **ENVIRONMENT,
            "FLWR_HOME": str(home.flower),
            HOME_VARIABLE: str(home.root),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
        }
        self._children = tuple(
            Child(name, command, environment) for name, command in commands(home, self.settings).items()
        )
        self._started = time.time()
        self._is_up = False
        self._registered: dict[str, str] = {}
        self._crashes: tuple[str, int, int] = ("", 0, 0)
        self._reports: list[subprocess.Popen[bytes]] = []
        self._noted_at = 0.0
        self._seen: dict[str, float] = {}
        self._asked_at = -ASK_S
        self._stop_since: dict[str, float] = {}

    def run(self, stop: threading.Event) -> None:
        """Work until ``stop`` is set, then stop the programs; a job goes on with the next start."""
        self.log.append("started")
        port = self.settings.health_port
        watched = health.serve("127.0.0.1", port, self.health) if port else None
        try:
            while not stop.wait(TICK_S):
                self.tick()
        finally:
            if watched:
                watched.close()
            for child in reversed(self._children):
                child.end()
            for report in self._reports:
                report.terminate()
                report.wait()
            self.log.append("stopped")
            self._control.close()

    def health(self) -> health.Health:
        """Return how the server is; called from another thread."""
        counts = dict.fromkeys(get_args(State), 0)
        for entry in self.queue.jobs():
            counts[entry.state] += 1
        metrics: dict[str, health.Values] = {
            "fedvision_info": {(__version__,): 1},
            "fedvision_start_time_seconds": self._started,
            "fedvision_audit_lines": self.log.head().count,
            "fedvision_disk_free_bytes": shutil.disk_usage(self._home.root).free,
            "fedvision_sites_enrolled": len(self._registered),
            "fedvision_sites_online": sum(time.time() - seen < 60 for seen in list(self._seen.values())),
            "fedvision_jobs": {(state,): number for state, number in counts.items()},
            "fedvision_children_restarted_total": {
                (child.name,): max(0, child.num_starts - 1) for child in self._children
            },
        }
        text = "sites are served" if self._is_up else "the SuperLink does not answer"
        return health.Health(self._is_up, text, metrics)

    def tick(self) -> None:
        """Look at everything once."""
        superlink, superexec = self._children
        if superlink.keep(self._output):
            self._is_up = False
            self._registered = {}
        if not self._is_up:
            self._is_up = self._control.is_there()
            if not self._is_up:
                return
            self._tell(f"sites are served at {self.settings.address}")
            self._stop_strays()
        superexec.keep(self._output)
        self._reports = [report for report in self._reports if report.poll() is None]
        try:
            self._let_sites_in()
            self._note_who_is_there()
            self._drive_jobs()
        except httpx.HTTPError as error:
            logger.warning("the SuperLink does not answer: %s", type(error).__name__)
            self._is_up = False

    def _stop_strays(self) -> None:
        """Stop Flower runs that no job knows of: this program was killed between starting and noting one."""
        entry = self.queue.next_runnable()
        for run in self._control.unfinished():
            if entry is None or run != entry.flower_run:
                self._control.stop(run)

    def _let_sites_in(self) -> None:
        """Register the node keys of enrolled sites with Flower, and take off those of others."""
        records = load_records(self._home).values()
        wanted = {record.node_key: record.name for record in records if record.status == "enrolled"}
        if wanted == self._registered:
            return
        there = self._control.nodes()
        for key, name in wanted.items():
            if bytes.fromhex(key) not in there:
                try:
                    self._control.register(bytes.fromhex(key))
                except httpx.HTTPStatusError as error:  # of this site only; the others go on
                    self._tell(f"site {name} is not let in: Flower answers {error.response.status_code}")
                else:
                    self._tell(f"site {name} may connect")
        for public, node in there.items():
            if public.hex() not in wanted:
                self._control.unregister(node)
                self._tell("a site that is revoked, or has a new key, may connect no more")
        self._registered = wanted

    def _note_who_is_there(self) -> None:
        """Write which sites are connected, for `status`."""
        now = time.time()
        if now - self._noted_at < NOTE_S:
            return
        self._noted_at = now
        for key in self._control.online():
            if key.hex() in self._registered:
                self._seen[self._registered[key.hex()]] = now
        write_json(self._home.flower / "online.json", self._seen)

    def _drive_jobs(self) -> None:
        entry = self.queue.next_runnable()
        if entry is None:
            return
        folder = self._home.jobs / entry.id
        if self.queue.stop_requested(entry.id) and not (folder / "outcome.json").exists():
            self._ask_to_stop(entry)
        if entry.state == "waiting":
            for name in ("stop", "outcome.json"):
                (folder / name).unlink(missing_ok=True)
            self._start(entry)
        elif entry.flower_run is None or self._has_ended(entry.flower_run):
            self._settle(entry)

    def _has_ended(self, run: int) -> bool:
        """Ask Flower, but not at every tick."""
        now = time.monotonic()
        if now - self._asked_at < ASK_S:
            return False
        self._asked_at = now
        return self._control.has_ended(run)

    def _start(self, entry: Entry) -> None:
        run = self._control.start(entry.id)
        try:
            self.queue.set_running(entry.id, run)
        except ConfigError:  # an operator stopped it at this very moment
            self._control.stop(run)
            return
        self.log.append("started", job=entry.id, flower_run=str(run))
        self._tell(f"job {entry.id} runs")

    def _ask_to_stop(self, entry: Entry) -> None:
        """Ask a running job to stop by itself, and stop its Flower run if it does not."""
        folder = self._home.jobs / entry.id
        since = self._stop_since.setdefault(entry.id, time.monotonic())
        if not (folder / "stop").exists():
            (folder / "stop").touch()
            self._tell(f"job {entry.id} is asked to stop")
        if time.monotonic() - since > STOP_GRACE_S and entry.flower_run is not None:
            self._control.stop(entry.flower_run)

    def _settle(self, entry: Entry) -> None:
        """Note how a job ended whose Flower run is over, or give it another run."""
        path = self._home.jobs / entry.id / "outcome.json"
        outcome = read_json(path) if path.exists() else {"state": "crashed", "error": "the process ended"}
        state, text = str(outcome["state"]), str(outcome["error"])
        self._stop_since.pop(entry.id, None)
        is_asked = self.queue.stop_requested(entry.id)
        if state in ("crashed", "stopped") and not is_asked:
            done = self._rounds_done(entry)
            job, seen, count = self._crashes
            count = count + 1 if (job, seen) == (entry.id, done) else 1
            self._crashes = (entry.id, done, count)
            if count < MAX_CRASHES:
                logger.warning("job %s: its process ended; it goes on from round %s", entry.id, done)
                for name in ("stop", "outcome.json"):
                    (path.parent / name).unlink(missing_ok=True)
                self._start(entry)
                return
        if state == "done":
            self.queue.set_done(entry.id)
            self._report(entry)
        elif is_asked and state in ("crashed", "stopped"):
            state, text = "stopped", ""
            self.queue.set_stopped(entry.id)
        else:
            self.queue.set_failed(entry.id, text.strip().splitlines()[-1][:500] if text.strip() else state)
        self.log.append("finished", job=entry.id, state=state)
        self._tell(f"job {entry.id}: {state}{': ' + text.strip().splitlines()[-1] if text.strip() else ''}")

    def _rounds_done(self, entry: Entry) -> int:
        from fedvision.storage import read_lines

        events = read_lines(self._home.jobs / entry.id / "rounds.jsonl")
        return max((e["round"] for e in events if e["event"] in ("round", "thrown away")), default=0)

    def _report(self, entry: Entry) -> None:
        """Have the report of a finished job written, by a process of its own: it takes a while."""
        command = [sys.executable, "-m", "fedvision", "report", str(self._home.jobs / entry.id)]
        self._reports.append(
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output)  # noqa: S603
        )
