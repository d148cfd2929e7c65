"""A network of hosts on one machine, for tests: a server, sites with their own addresses, and nothing else.

    with open_hosts(num_sites=5) as hosts:
        server = hosts.server.popen(["fedvision-server", "run", "--home", "server"], cwd=folder)
        hosts.sites[0].run(["fedvision-site", "check", "--home", "site-1"])   # -> CompletedProcess, text
        hosts.sites[1].cut()        # what is sent vanishes, nobody is told; until heal()
        hosts.sites[2].slow(delay_ms=50, mbit=20, loss_percent=1)             # each way; until restore()
        with hosts.capture(path):   # a pcap file of all that passes the server's interfaces
            ...
        hosts.bytes_of(hosts.sites[0])       # Traffic(received, sent) of the site's interface
        hosts.arrived_from(hosts.sites[0])   # bytes that came through at the server
        hosts.sites[0].outside_packets()     # how many packets it tried to send to anywhere else

``open_hosts`` takes the first way that this machine permits:

- "root" and "user": network namespaces, made as root or in a user namespace of an ordinary user. Each site
  has one link to the server, 10.77.K.2 to 10.77.K.1; the server listens on 10.77.0.1. A site cannot reach
  another one. All other addresses lead into an interface that only counts, like a firewall that drops.
- "loopback": one address of 127.0.0.0/8 for each host, no more. ``is_supported`` is False, and ``cut``,
  ``slow``, ``capture`` and the counters raise ``Unsupported``; ``hosts.require_network()`` skips a test.

Slow links are a program (``packets.py``) between the two ends, so they need neither tc nor netem. The hosts
share the file system and the process ids. At the end every program that was started in the network is
killed, with its children; the namespaces go with their last process. If the test itself is killed, what keeps
the namespaces ends by itself, and the next start kills programs that were left.
"""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import pytest

PACKETS = Path(__file__).with_name("packets.py")
MARK = (
    "FEDVISION_TEST_HOSTS"  # in the environment of all programs: pid and start time of the test, and a number
)
SERVER_ADDRESS = "10.77.0.1"
QUIET = "cd /proc/sys/net; echo 0 > ipv4/ip_forward; for f in ipv6/conf/*/disable_ipv6; do echo 1 > $f; done"
OUTSIDE = (  # two ends of one cable in the same host: what is sent into it is counted, and dropped
    "link add outside type veth peer name nowhere",
    "link set outside arp off",
    "addr add 192.0.2.1/32 dev outside",
    "link set outside up",
    "link set nowhere up",
    "route add default dev outside",
)


class Unsupported(Exception):
    """This machine or this way cannot do it."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that passed an interface, with all headers."""

    received: int
    sent: int

    def __sub__(self, earlier: "Traffic") -> "Traffic":
        return Traffic(self.received - earlier.received, self.sent - earlier.sent)


class Host:
    """One host.

    Attributes:
        name: "server", "site-1", "site-2", ...
        address: Its IPv4 address.
        enter: The words before a command that runs it on this host.
    """

    def __init__(self, hosts: "Hosts", name: str, address: str, enter: Sequence[str] = ()) -> None:
        self.name = name
        self.address = address
        self.enter = [*enter]
        self._hosts = hosts

    def popen(self, command: Sequence[object], **options: Any) -> subprocess.Popen[Any]:
        """Start a program on this host; options as in ``subprocess.Popen``, and the pid is the program's."""
        options["env"] = {**(options.get("env") or os.environ), MARK: self._hosts.mark}
        return subprocess.Popen([*self.enter, *map(str, command)], **options)

    def run(
        self, command: Sequence[object], timeout_s: float = 120, **options: Any
    ) -> subprocess.CompletedProcess[Any]:
        """Run a program on this host to its end, and return its status and its text."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        with self.popen(command, **options) as process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            except BaseException:
                process.kill()
                raise
            return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def python(self, code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run a piece of Python on this host."""
        return self.run([sys.executable, "-c", code, *arguments], **options)

    def cut(self) -> None:
        """Let everything between this site and the server vanish."""
        self._hosts.change(self, cut=True)

    def heal(self) -> None:
        """Undo ``cut``."""
        self._hosts.change(self, cut=False)

    def slow(self, delay_ms: float = 50, mbit: float = 20, loss_percent: float = 1) -> None:
        """Make the link slow, each way: a ping takes twice the delay."""
        self._hosts.change(self, slow=(delay_ms / 1e3, mbit * 1e6, loss_percent / 100))

    def restore(self) -> None:
        """Undo ``slow``."""
        self._hosts.change(self, slow=None)

    def outside_packets(self) -> int:
        """Return how many packets this host sent to addresses that are no host of this network."""
        return self._hosts.outside_packets(self)


class Namespace:
    """A network namespace, kept by a process that ends when this test does.

    Args:
        way: "root", or "user" for one in a user namespace.
        first: The namespace that was made first; its user namespace is shared.

    Attributes:
        pid: Of the process that keeps it.
        enter: The words before a command that runs it in this namespace.
        network: Its name.
    """

    def __init__(self, way: str, first: "Namespace | None" = None) -> None:
        user = ["-U", "--preserve-credentials"] if way == "user" else []
        if first is not None:
            command = ["nsenter", "-t", str(first.pid), *user, "unshare", "-n"] if user else ["unshare", "-n"]
        else:
            command = ["unshare", "-Urn"] if user else ["unshare", "-n"]
        self._holder = subprocess.Popen(
            [*command, "sh", "-c", f"{QUIET}; echo ready; exec cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.pid: int = self._holder.pid
        self.enter = ["nsenter", "-t", str(self.pid), *user, "-n"]
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            self.close()
            raise Unsupported(f"{' '.join(command)} is not permitted")
        self.network = network_of(self.pid)
        assert self.network not in ("", network_of(os.getpid()))

    def ip(self, *lines: str) -> None:
        """Give commands to ip(8), one a line."""
        done = subprocess.run(
            [*self.enter, "ip", "-batch", "-"], input="\n".join(lines), capture_output=True, text=True
        )
        if done.returncode:
            raise Unsupported(f"ip: {done.stderr.strip()}")

    def counters(self, interface: str) -> list[int]:
        """Return the numbers of /proc/net/dev: 0 bytes and 1 packets received, 8 bytes and 9 packets sent."""
        for line in Path(f"/proc/{self.pid}/net/dev").read_text().splitlines():
            if line.strip().startswith(f"{interface}:"):
                return [int(number) for number in line.split(":")[1].split()]
        raise AssertionError(f"no interface {interface}")

    def close(self) -> None:
        """Let go of the namespace."""
        end(self._holder)


def end(process: subprocess.Popen[Any], kill: bool = True) -> int:
    """End a program of ours by closing its stdin, or kill it, and return its status."""
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    if kill:
        process.kill()
    return process.wait(timeout=60)


def start_of(pid: int) -> str:
    """Return when a process started, in ticks, "" for none; with the pid it is a name for good."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def mark_of(process: psutil.Process) -> str:
    """Return the mark of a process that was started in a network of some test, else ""."""
    try:
        return process.environ().get(MARK, "")
    except (psutil.Error, OSError):
        return ""


def network_of(pid: int) -> str:
    """Return the name of a process's network namespace, "" if the process is no more."""
    try:
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    except OSError:
        return ""


def kill_all(is_ours: Callable[[psutil.Process], bool]) -> None:
    """Kill some processes, and what they start meanwhile, until none is left."""
    for _ in range(500):
        left = [process for process in psutil.process_iter() if is_ours(process)]
        if not left:
            return
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.02)
    raise AssertionError(f"cannot end {left}")


def is_leftover(process: psutil.Process) -> bool:
    """Tell whether a process was started in a network of a test that is no more."""
    pid, _, rest = mark_of(process).partition("-")
    return bool(pid) and start_of(int(pid)) != rest.partition("-")[0]


class Hosts:
    """A server and its sites in network namespaces, see the module."""

    is_supported = True
    _made = 0

    def __init__(self, num_sites: int, way: str) -> None:
        Hosts._made += 1
        self.mark = f"{os.getpid()}-{start_of(os.getpid())}-{Hosts._made}"
        self.way = way
        self.num_sites = num_sites
        self.server: Host
        self.sites: list[Host] = []
        self._spaces: dict[str, Namespace] = {}
        self._links: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        kill_all(is_leftover)
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill all programs and remove the network."""
        networks = {space.network for space in self._spaces.values()}
        kill_all(lambda process: mark_of(process) == self.mark or network_of(process.pid) in networks)
        for space in self._spaces.values():
            space.close()

    def require_network(self) -> None:
        """Skip the test where hosts are only addresses of this machine."""
        if not self.is_supported:
            pytest.skip("network namespaces are not permitted on this machine")

    def _build(self) -> None:
        for tool in ("ip", "unshare", "nsenter"):
            if shutil.which(tool) is None:
                raise Unsupported(f"no program {tool}")
        wires = self._spaces["wires"] = Namespace(self.way)
        server = self._spaces["server"] = Namespace(self.way, wires)
        self.server = Host(self, "server", SERVER_ADDRESS, server.enter)
        server.ip("link set lo up", f"addr add {SERVER_ADDRESS}/32 dev lo", *OUTSIDE)
        for number in range(1, self.num_sites + 1):
            name = f"site-{number}"
            site = self._spaces[name] = Namespace(self.way, wires)
            wires.ip(
                f"link add near{number} type veth peer name eth0 netns {site.pid}",
                f"link add far{number} type veth peer name {name} netns {server.pid}",
                f"link add wire{number} type bridge",
                *(f"link set {end}{number} up" for end in ("near", "far", "wire")),
            )
            server.ip(f"addr add 10.77.{number}.1/24 dev {name}", f"link set {name} up")
            site.ip(
                "link set lo up", f"addr add 10.77.{number}.2/24 dev eth0", "link set eth0 up",
                f"route add {SERVER_ADDRESS}/32 via 10.77.{number}.1", *OUTSIDE,
            )  # fmt: skip
            self.sites.append(Host(self, name, f"10.77.{number}.2", site.enter))
            self._links[name] = {"cut": False, "slow": None, "program": None}
            self.change(self.sites[-1])

    def change(self, site: Host, **state: Any) -> None:
        """Set how a site's link is: ``cut``, ``slow`` (delay in s, bits a second, share lost) or None."""
        link, number, wires = self._links[site.name], site.name.split("-")[1], self._spaces["wires"]
        link.update(state)
        ends = [f"near{number}", f"far{number}"]
        if link["program"] is not None:
            end(link["program"])
            link["program"] = None
        if link["cut"] or link["slow"]:
            wires.ip(*(f"link set {name} nomaster" for name in ends))
        else:
            wires.ip(*(f"link set {name} master wire{number}" for name in ends))
        if link["slow"] and not link["cut"]:
            for space, interface in ((site.name, "eth0"), ("server", site.name)):
                end(self._start(space, "plain", interface))  # frames of the size that a wire carries
            link["program"] = self._start("wires", "wire", *ends, *link["slow"])

    def _start(self, space: str, *arguments: object) -> subprocess.Popen[str]:
        """Start a program of ``packets.py`` and wait until it says that it is ready."""
        process = subprocess.Popen(
            [*self._spaces[space].enter, sys.executable, str(PACKETS), *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, MARK: self.mark},
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", f"{arguments} did not start"
        return process

    @contextlib.contextmanager
    def capture(self, path: Path) -> Iterator[Path]:
        """Write all that passes the server's interfaces, but for its loopback, to a pcap file."""
        program = self._start("server", "capture", path, *(site.name for site in self.sites))
        try:
            yield path
        finally:
            time.sleep(0.05)  # what is on its way
            status = end(program, kill=False)
        assert status == 0, "the capture lost packets" if status == 3 else f"the capture ended with {status}"

    def bytes_of(self, site: Host) -> Traffic:
        """Return what passed a site's interface so far."""
        numbers = self._spaces[site.name].counters("eth0")
        return Traffic(numbers[0], numbers[8])

    def arrived_from(self, site: Host) -> int:
        """Return the bytes of a site that came through at the server so far, without what links drop."""
        return self._spaces["server"].counters(site.name)[0]

    def outside_packets(self, host: Host) -> int:
        """See ``Host.outside_packets``."""
        return self._spaces[host.name].counters("outside")[9]


class Loopback(Hosts):
    """The same on addresses of the loopback interface: programs, and nothing of the network."""

    is_supported = False

    def _build(self) -> None:
        net = f"127.{64 + os.getpid() % 128}"  # tests side by side may use the same ports
        self.server = Host(self, "server", f"{net}.0.1")
        self.sites = [Host(self, f"site-{n}", f"{net}.{n}.2") for n in range(1, self.num_sites + 1)]

    def change(self, site: Host, **state: Any) -> None:
        raise Unsupported("no links on the loopback interface")

    def capture(self, path: Path) -> Any:
        raise Unsupported("no capture on the loopback interface")

    def bytes_of(self, site: Host) -> Traffic:
        raise Unsupported("no counters on the loopback interface")

    def arrived_from(self, site: Host) -> int:
        raise Unsupported("no counters on the loopback interface")

    def outside_packets(self, host: Host) -> int:
        raise Unsupported("no counters on the loopback interface")


def open_hosts(num_sites: int, way: str = "") -> Hosts:
    """Return a network, to be used in a ``with`` statement.

    Args:
        num_sites: From 1 to 200.
        way: "root", "user" or "loopback"; "" for the first one that works here.

    Raises:
        Unsupported: On entering it, if a way was named that does not work here.
    """
    if not way:
        way = next(way for way in ("root", "user", "loopback") if way == "loopback" or works(way))
    return Loopback(num_sites, way) if way == "loopback" else Hosts(num_sites, way)


@functools.cache
def works(way: str) -> bool:
    """Tell whether this machine permits a way."""
    if way == "root" and os.geteuid() != 0:
        return False
    try:
        with Hosts(1, way):
            return True
    except Unsupported:
        return False
