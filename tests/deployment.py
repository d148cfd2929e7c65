"""A federation as people make it: by the commands of the two programs, each on a host of its own.

    with open_hosts(num_sites=5) as hosts:
        federation = Federation(hosts, folder)   # init, init, enrol, join at every site
        federation.start()                       # the programs; waits until all sites are connected
        job = federation.submit(rounds=2)        # "0001-tiny"
        federation.allow(job)                    # at every site; with automatic=True not needed
        federation.wait(job, "done")
        federation.model(job)                    # SHA-256 of the model's weights

``federation.server_command("status")`` and ``federation.site_command(0, "jobs")`` run any command with the
right --home; a status other than 0 is an error unless ``check=False``. The programs' output is in
FOLDER/server.log and FOLDER/site-1.log, ...
"""

import contextlib
import hashlib
import json
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from safetensors.numpy import load_file

from fedvision.config import dump_job, parse_job
from fedvision.storage import read_lines
from tests.conftest import tiny_content, write_site
from tests.hosts import Host, Hosts

PORT = 9443
PROGRAMS = {
    name: [sys.executable, "-c", f"from {package}.cli import run; run()"]
    for name, package in (("fedvision-server", "fedvision_server"), ("fedvision-site", "fedvision_sites"))
}
"""What the installed scripts do, also where they are not installed."""
FINISHED = ("done", "failed", "stopped")


class CommandFailed(Exception):
    """A command ended with another status than 0."""


class Federation:
    """A coordinator and sites with tiny data sets.

    Args:
        hosts: Of the network; one site on each of its site hosts.
        folder: Gets homes, data and logs.
        automatic: Whether sites run what keeps to their policy without being asked.
        counts: Cases of each site: training, validation, test.
    """

    def __init__(
        self, hosts: Hosts, folder: Path, automatic: bool = True, counts: tuple[int, int, int] = (4, 2, 2)
    ) -> None:
        self.hosts = hosts
        self.folder = folder
        self.home = folder / "server"
        self.names = [host.name for host in hosts.sites]
        self.sites = [folder / name for name in self.names]
        self.programs: dict[str, subprocess.Popen[bytes]] = {}
        self.server_command(
            "init", self.home, "--name", "tiny", "--address", f"{hosts.server.address}:{PORT}", at_home=False
        )
        if not hosts.is_supported:  # all on one interface, perhaps beside another federation
            settings = (self.home / "server.toml").read_text()
            settings = settings.replace("control_port = 9093", f"control_port = {free_port()}")
            settings = settings.replace("health_port = 9094", "health_port = 0")
            (self.home / "server.toml").write_text(settings)
        for index, name in enumerate(self.names):
            self.add_site(index, write_site(folder / "data", name, counts), automatic)

    def add_site(self, index: int, data: Path, automatic: bool = True) -> None:
        """Let a site join: init there, enrol here, join there."""
        home, name = self.sites[index], self.names[index]
        self.site_command(index, "init", home, "--name", name, "--data", data, at_home=False)
        settings = (home / "site.toml").read_text()
        assert "automatic = false" in settings and "smallest_cohort = 5" in settings
        settings = settings.replace("automatic = false", f"automatic = {str(automatic).lower()}")
        settings = settings.replace(
            "smallest_cohort = 5", f"smallest_cohort = {max(3, min(5, len(self.names)))}"
        )
        if not self.hosts.is_supported:
            assert "health_port = 9095" in settings
            settings = settings.replace("health_port = 9095", "health_port = 0")
        (home / "site.toml").write_text(settings)
        kit = self.folder / f"{name}.kit.json"
        digits = fingerprint(home / "keys" / "identity.pub")
        self.server_command("enrol", home / "request.json", "--fingerprint", digits, "--out", kit)
        digits = fingerprint(self.home / "keys" / "governance.pub")
        self.site_command(index, "join", kit, "--governance", digits)

    def server_command(self, *words: object, check: bool = True, at_home: bool = True) -> str:
        """Run a command of ``fedvision-server`` on the server's host; return what it prints."""
        own = ["--home", self.home] if at_home else []
        return self._run(self.hosts.server, "fedvision-server", [*words, *own], check)

    def site_command(self, index: int, *words: object, check: bool = True, at_home: bool = True) -> str:
        """Run a command of ``fedvision-site`` on a site's host; return what it prints."""
        own = ["--home", self.sites[index]] if at_home else []
        return self._run(self.hosts.sites[index], "fedvision-site", [*words, *own], check)

    def _run(self, host: Host, program: str, words: list[object], check: bool) -> str:
        done = host.run([*PROGRAMS[program], *words], cwd=self.folder, stdin=subprocess.DEVNULL)
        if check and done.returncode:
            raise CommandFailed(
                f"{program} {' '.join(map(str, words))}: {done.returncode}: {done.stdout}{done.stderr}"
            )
        return str(done.stdout) + ("" if check else str(done.stderr))

    def start(self, timeout_s: float = 120) -> None:
        """Start the programs that do not run, and wait until every site is connected."""
        self.start_server()
        for index in range(len(self.names)):
            self.start_site(index)
        for index in range(len(self.names)):
            self.wait_for_line(self.names[index], "connected to", timeout_s)

    def start_server(self) -> None:
        """Start ``fedvision-server run`` unless it runs."""
        self._start(self.hosts.server, "server", "fedvision-server", self.home)

    def start_site(self, index: int) -> None:
        """Start ``fedvision-site run`` unless it runs."""
        self._start(self.hosts.sites[index], self.names[index], "fedvision-site", self.sites[index])

    def _start(self, host: Host, name: str, program: str, home: Path) -> None:
        if name in self.programs and self.programs[name].poll() is None:
            return
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [*PROGRAMS[program], "run", "--home", home]
            self.programs[name] = host.popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def log(self, name: str) -> str:
        """Return what a program printed so far; ``name`` is "server" or a site's."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for_line(self, name: str, text: str, timeout_s: float = 120, times: int = 1) -> None:
        """Wait until a program printed a text so many times."""
        self.wait_until(lambda: self.log(name).count(text) >= times, f"{name} prints {text!r}", timeout_s)

    def wait_until(self, holds: Callable[[], object], what: str, timeout_s: float = 120) -> None:
        """Wait until something holds.

        Raises:
            AssertionError: It does not in time, or the server's program ended.
        """
        until = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < until, f"not in {timeout_s} s: {what}\n{self.log('server')[-3000:]}"
            time.sleep(0.1)

    def stop(self, name: str) -> int:
        """Stop a program as a service manager does, and return its status."""
        self.programs[name].send_signal(signal.SIGTERM)
        return self.programs[name].wait(60)

    def kill(self, name: str) -> None:
        """Kill a program (kill -9), and nothing of what it started."""
        self.programs[name].kill()
        self.programs[name].wait()

    def kill_all_of_server(self) -> None:
        """Kill the server's program and everything that it started (kill -9)."""
        found = psutil.Process(self.programs["server"].pid).children(recursive=True)
        self.kill("server")
        for part in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                part.kill()
        psutil.wait_procs(found, timeout=60)

    def hold(self, name: str) -> None:
        """Stop a site's program where it is (SIGSTOP): what it is asked waits, and what it said stands."""
        self.programs[name].send_signal(signal.SIGSTOP)

    def let_go(self, name: str) -> None:
        """Undo ``hold``."""
        self.programs[name].send_signal(signal.SIGCONT)

    def kill_part(self, words: str) -> None:
        """Kill those of the server's own programs (kill -9) whose command line holds these words."""
        found = psutil.Process(self.programs["server"].pid).children(recursive=True)
        parts = [part for part in found if words in command_of(part)]
        assert parts, f"no part {words} among {[command_of(part) for part in found]}"
        for part in parts:
            part.kill()

    def submit(self, **changes: Any) -> str:
        """Submit a tiny job, changed as in ``tests.conftest.tiny_content``; return its id."""
        settings = {
            "aggregation__secure": True,
            "secure_aggregation__smallest_cohort": max(3, min(5, len(self.names))),
            "secure_aggregation__weight_cap": 1000,
            "rounds": 2,
            "evaluation__every": 2,
        }
        job = parse_job(tiny_content(self.folder / "data", **(settings | changes)), "tiny")
        path = self.folder / "job.toml"
        path.write_text(dump_job(job))
        return self.server_command("submit", path).split(":")[0]

    def allow(self, job: str, timeout_s: float = 120) -> None:
        """Allow a job at every site, as soon as it was asked for."""
        digest = self.charter(job)["job"]
        for index, home in enumerate(self.sites):
            asked = home / "decisions" / f"{digest}.json"
            self.wait_until(asked.exists, f"{self.names[index]} is asked for {job}", timeout_s)
            self.site_command(index, "allow", digest)

    def status(self, job: str) -> dict[str, Any]:
        """Return what ``fedvision-server status --json`` says of a job."""
        found: dict[str, Any] = json.loads(self.server_command("status", job, "--json"))
        return found

    def state(self, job: str) -> str:
        """Return a job's state from the queue's file, which is quicker than a command."""
        path = f"file:{self.home / 'jobs.db'}?mode=ro"
        with contextlib.closing(sqlite3.connect(path, uri=True, timeout=30)) as database:
            return str(database.execute("SELECT state FROM jobs WHERE id = ?", (job,)).fetchone()[0])

    def wait(self, job: str, state: str = "done", timeout_s: float = 300) -> dict[str, Any]:
        """Wait until a job has ended, and check how."""
        self.wait_until(lambda: self.state(job) in FINISHED, f"{job} ends", timeout_s)
        found = self.status(job)
        assert found["state"] == state, f"{found}\n{self.log('server')[-3000:]}"
        return found

    def events(self, job: str) -> list[dict[str, Any]]:
        """Return the lines of a job's ``rounds.jsonl`` so far, whole ones only."""
        path = self.home / "jobs" / job / "rounds.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def wait_for_round(self, job: str, number: int, timeout_s: float = 300) -> None:
        """Wait until a round is over."""

        def is_over() -> bool:
            closed = [one["round"] for one in self.events(job) if one["event"] in ("round", "thrown away")]
            return max(closed, default=0) >= number

        self.wait_until(is_over, f"round {number} of {job}", timeout_s)

    def charter(self, job: str) -> dict[str, Any]:
        """Return the charter of a job."""
        signed = json.loads((self.home / "jobs" / job / "secagg" / "charter.json").read_text())
        return dict(signed["document"])

    def trainings(self, job: str) -> dict[str, list[int]]:
        """Return the rounds that each site trained in, in order, by the logs that sites keep."""
        folder = f"jobs/{self.charter(job)['job'][:16]}"
        found = {}
        for name, home in zip(self.names, self.sites, strict=True):
            lines = read_lines(home / folder / "log.jsonl")
            found[name] = [line["round"] for line in lines if "train_loss" in line]
        return found

    def model(self, job: str) -> str:
        """Return SHA-256 of the weights of a finished job's model; the file also names the job."""
        weights = load_file(self.home / "jobs" / job / "model.safetensors")
        total = hashlib.sha256()
        for name in sorted(weights):
            total.update(name.encode() + weights[name].tobytes())
        return total.hexdigest()


def command_of(process: psutil.Process) -> str:
    """Return a process' command line, "" for one that has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fingerprint(public: Path) -> str:
    """Return the digits of a key as its owner would read them by telephone."""
    from fedvision.secagg import identity

    return identity.fingerprint(identity.parse_public(public.read_text(), str(public))[1])
