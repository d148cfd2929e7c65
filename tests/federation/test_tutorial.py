"""The tutorial of a first deployment does what it says, pasted block by block into a terminal.

What the page marks as the reader's own is replaced: the folder, the ports, and the digits of the job.
"""

import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.deployment import PROGRAMS
from tests.test_docs import ROOT, fences

PAGE = ROOT / "docs" / "tutorials" / "first-deployment.md"
SITES = ("east", "north", "south")
EXAMPLE_DIGITS, EXAMPLE_PORT = "5f0c11", "9443"
STYLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LOOKING = {"fedvision-site jobs", "fedvision-site audit-log", "fedvision-server logs"}
COUNTED = [
    "fedvision-server init",
    "fedvision-site init",
    "fedvision-server enrol",
    "fedvision-site join",
    "fedvision-server run",
    "fedvision-site check",
    "fedvision-site run",
    "fedvision-server submit",
    "fedvision-site allow",
    "fedvision-server status",
]


class Terminal:
    """A shell in a terminal, as a reader has it: a question takes the next line that is typed."""

    def __init__(self, folder: Path, path: str) -> None:
        self.folder, self.shown, self.count = folder, "", 0
        self._handle, other = pty.openpty()
        modes = termios.tcgetattr(other)
        modes[3] &= ~termios.ECHO
        termios.tcsetattr(other, termios.TCSANOW, modes)
        termios.tcsetwinsize(other, (50, 160))
        environment = {**os.environ, "PATH": path, "TERM": "xterm", "PS1": "", "PS2": ""}
        self.shell = subprocess.Popen(
            ["bash", "--norc", "--noprofile", "--noediting", "-i"],
            cwd=folder, env=environment, stdin=other, stdout=other, stderr=other, start_new_session=True,
            preexec_fn=take_terminal,
        )  # fmt: skip
        os.close(other)

    def paste(self, block: str, questions: int = 0, timeout_s: float = 120) -> str:
        """Paste a block, answer its questions with y, and return what it shows.

        Raises:
            AssertionError: It does not end in time.
        """
        start = len(self.shown)
        os.write(self._handle, block.encode())
        for number in range(1, questions + 1):
            self._wait("[y/N]", number, start, timeout_s)
            os.write(self._handle, b"y\n")
        self.count += 1
        mark = f"<block {self.count} ends: "
        os.write(self._handle, f"echo '{mark}'$?'>'\n".encode())
        self._wait(mark, 1, start, timeout_s)
        return STYLE.sub("", self.shown[start:]).replace("\r\n", "\n")

    def _wait(self, text: str, times: int, start: int, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while self.shown.count(text, start) < times:
            assert time.monotonic() < until, f"not shown in {timeout_s} s: {text}\n{self.shown[start:]}"
            if select.select([self._handle], [], [], 0.5)[0]:
                self.shown += os.read(self._handle, 65536).decode(errors="replace")

    def close(self) -> None:
        """Kill the shell and what it started."""
        for process in [*psutil.Process(self.shell.pid).children(recursive=True), self.shell]:
            process.send_signal(signal.SIGKILL)
        self.shell.wait(30)
        os.close(self._handle)


def take_terminal() -> None:
    """Make standard input the terminal of this session, so that the shell has jobs."""
    import fcntl

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that nobody uses."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    made = Terminal(tmp_path, search_path(tmp_path / "programs"))
    yield made
    made.close()


def search_path(folder: Path) -> str:
    """Write the three programs into a folder, as an installation does, and return a PATH that finds them."""
    folder.mkdir()
    own = [sys.executable, "-c", "from fedvision.cli.app import run; run()"]
    for name, (python, option, code) in {**PROGRAMS, "fedvision": own}.items():
        (folder / name).write_text(f"#!/bin/sh\nexec '{python}' {option} '{code}' \"$@\"\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def commands(blocks: list[str]) -> list[str]:
    """Return program and command of each command of the two programs, in order."""
    return [
        " ".join(words)
        for block in blocks
        for words in re.findall(r"^\s*(fedvision-(?:server|site)) ([a-z-]+)", block, re.MULTILINE)
    ]


def test_there_are_ten_commands_and_the_others_only_look() -> None:
    found = commands(fences(PAGE, "sh"))
    assert [one for one in found if one not in LOOKING] == COUNTED
    headings = re.findall(r"^## (\d+)\. ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == [str(number) for number in range(1, 11)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tutorial_ends_with_a_job_that_is_done_and_verified(terminal: Terminal) -> None:
    prepare, found, init, enrol, join, serve, check, run, submit, jobs, job, allow, status, look, stop = (
        fences(PAGE, "sh")
    )
    public, control, health = map(str, free_ports(3))
    home = terminal.folder / "first-deployment"

    def wait_for_line(name: str, text: str, timeout_s: float = 120) -> None:
        log, until = home / f"{name}.log", time.monotonic() + timeout_s
        while not log.exists() or text not in log.read_text():
            assert time.monotonic() < until, f"{name}.log does not say {text!r}"
            time.sleep(0.2)

    def paste(block: str, questions: int = 0) -> str:
        shown = terminal.paste(block, questions)
        assert shown.rstrip().endswith("ends: 0>") and ": error: " not in shown, shown
        return shown

    paste(prepare)
    assert EXAMPLE_PORT in found and EXAMPLE_DIGITS in job and EXAMPLE_DIGITS in allow
    governance = digits(paste(found.replace(EXAMPLE_PORT, public)))
    settings = home / "server" / "server.toml"
    text = settings.read_text()
    assert "control_port = 9093" in text and "health_port = 9094" in text
    settings.write_text(text.replace("9093", control).replace("9094", health))
    own = digits(paste(init))
    assert len(governance) == 1 and len(own) == 3

    assert digits(paste(enrol, questions=3)) == own
    shown = paste(join, questions=3)
    assert digits(shown) == governance * 3
    paste(serve)
    wait_for_line("server", "sites are served at")
    shown = paste(check)
    assert shown.count("warning") >= 3 and "problem" not in shown
    paste(run)
    for site in SITES:
        wait_for_line(site, "connected to")
    paste(submit)
    for site in SITES:
        wait_for_line(site, "is waiting: for a person")
    (digest,) = re.findall(r"^([0-9a-f]{12})  segmentation +waiting", paste(jobs), re.MULTILINE)
    assert "What leaves this site" in paste(job.replace(EXAMPLE_DIGITS, digest))
    assert paste(allow.replace(EXAMPLE_DIGITS, digest)).count("allowed: segmentation") == 3
    until = time.monotonic() + 400
    while not re.search("^0001-segmentation +done", shown := paste(status), re.MULTILINE):
        assert time.monotonic() < until and " failed " not in shown, shown
        time.sleep(1)
    for line in look.splitlines(keepends=True):
        shown += paste(line)
    assert "round 2/2" in shown and "Verified" in shown and "taken from the run itself" not in shown, shown
    programs = psutil.Process(terminal.shell.pid).children(recursive=True)
    assert len(programs) > 4
    terminal.paste(stop)
    assert psutil.wait_procs(programs, timeout=60)[1] == []


def digits(shown: str) -> list[str]:
    """Return the fingerprints in a text, each as eight groups."""
    groups = r"\d{5}  \d{5}  \d{5}  \d{5}"
    return re.findall(rf"^{groups}\n{groups}$", shown, re.MULTILINE)
