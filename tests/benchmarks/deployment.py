"""Cost of a deployed federation: real programs, made by the commands that people use, each host in a network
namespace of this machine (addresses of the loopback interface where namespaces are not permitted).

    python tests/benchmarks/deployment.py phases      where the seconds of a round go; small model
    python tests/benchmarks/deployment.py vectors     the same with 10^7 weights, and bytes on the network
    python tests/benchmarks/deployment.py long        does anything grow? 20 sites, 200 rounds

phases   5 sites, a model of 580 weights, 10 rounds, secure sums at level `sum`, validation in the last round
         only. What it costs to start, to do a round, each step of it, and each part of a message's way. With
         --stock the same once more with sites that run Flower's own SuperNode.
vectors  3 sites, a U-Net of 10^7 weights, one training step a round. Bytes are those of the sites' network
         interfaces, all headers included, against 4 bytes a weight each way.
long     20 sites in few processes (--per-process; each process holds PyTorch once), real transport all the
         same. Memory of the server's programs and sizes on disk, every 20 rounds, and a straight line through
         the second half of them: what a round more would cost.

Times come from `rounds.jsonl` and from a meter inside the programs (`meter.py`). The network has no delay
and no limit, all programs share this machine's cores: on a loaded machine all times are longer. Tables give
median (least to most). Try any of them small: --rounds 4 --sites 3.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks import meter
from tests.deployment import PROGRAMS, Federation
from tests.hosts import Hosts, Traffic, open_hosts

LARGE = {"channels": [64, 128, 256, 750], "strides": [2, 2, 2], "num_res_units": 2}
"""A network of 1.0 * 10^7 weights."""
PROCESSES = {
    "superlink": "fedvision_server.superlink",
    "superexec": "flower_superexec",
    "serverapp": "serverapp",
}
"""What the server starts: a part of the command line of each."""
MB = 1e6


@dataclass
class Watch:
    """Looks at the programs of a federation again and again, from a thread.

    Attributes:
        peaks: Largest resident bytes of each program of the server, and of the largest site process.
        traffic: Bytes of each site's interface when a round was over, by round.
        work: CPU seconds of each kind of program, likewise.
    """

    federation: Federation
    peaks: dict[str, int] = field(default_factory=dict)
    traffic: dict[int, list[Traffic]] = field(default_factory=dict)
    work: dict[int, dict[str, float]] = field(default_factory=dict)
    pause_s: float = 0.05
    job: str = ""

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        turn = 0
        while not self._over.wait(self.pause_s):
            if self.job and (number := last_round(self.federation, self.job)) not in self.work:
                hosts = self.federation.hosts
                if hosts.is_supported:
                    self.traffic[number] = [hosts.bytes_of(site) for site in hosts.sites]
                self.work[number] = worked(self.federation)
            turn += 1
            if turn % 10 == 0:
                for name, size in resident(self.federation).items():
                    self.peaks[name] = max(size, self.peaks.get(name, 0))


def last_round(federation: Federation, job: str) -> int:
    """Return the number of the last round that is over."""
    return max((e["round"] for e in federation.events(job) if e["event"] == "round"), default=0)


def programs(federation: Federation) -> list[tuple[str, psutil.Process]]:
    """Return the processes of the federation, each with the name of its kind."""
    found: list[tuple[str, psutil.Process]] = []
    for name, program in list(federation.programs.items()):
        with contextlib.suppress(psutil.Error):
            own = psutil.Process(program.pid)
            children = own.children(recursive=True)
            if name != "server":
                found += [("site", process) for process in (own, *children)]
                continue
            found.append(("supervisor", own))
            for child in children:
                with contextlib.suppress(psutil.Error):
                    line = " ".join(child.cmdline())
                    kind = next((kind for kind, part in PROCESSES.items() if part in line), "other")
                    found.append((kind, child))
    return found


def resident(federation: Federation) -> dict[str, int]:
    """Return the resident bytes of the largest process of each kind."""
    found: dict[str, int] = {}
    for name, process in programs(federation):
        with contextlib.suppress(psutil.Error):
            found[name] = max(process.memory_info().rss, found.get(name, 0))
    return found


def worked(federation: Federation) -> dict[str, float]:
    """Return the CPU seconds that the processes of each kind have taken, with children that have ended."""
    found: dict[str, float] = {}
    for name, process in programs(federation):
        with contextlib.suppress(psutil.Error):
            found[name] = sum(process.cpu_times()[:4]) + found.get(name, 0.0)
    return found


def size_of(path: Path) -> int:
    """Return the bytes of all files below a folder, as they are long; of one file likewise."""
    total = 0
    for item in [path, *path.rglob("*")] if path.is_dir() else [path]:
        with contextlib.suppress(FileNotFoundError):
            total += item.lstat().st_size if item.is_file() else 0
    return total


def spread(values: Iterable[float], scale: float = 1.0, digits: int = 2) -> str:
    """Return "median (least to most)"."""
    known = [value * scale for value in values]
    if not known:
        return "-"
    low, middle, high = min(known), statistics.median(known), max(known)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table as docs/benchmarks.md has it."""
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def machine(hosts: Hosts) -> str:
    """Return on what was measured."""
    names = ("flwr", "torch", "uvicorn", "fastapi", "httpx")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    return (
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
        f"{psutil.virtual_memory().total / 1e9:.0f} GB; load {load} at the start; hosts: {hosts.way}; "
        f"Python {platform.python_version()}, {versions}"
    )


@contextlib.contextmanager
def programs_started_with(environment: dict[str, str]) -> Iterator[None]:
    """Give the programs that are started meanwhile more variables."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@dataclass
class Measured:
    """A job that was run.

    Attributes:
        rounds: The "round" events, in order.
        marks: What the meter wrote, in order.
        submitted: Unix time, before the command.
        seconds: From ``submitted`` to the end of the job.
        setup_s: What it took to make the federation, a site.
        peaks, traffic, work: See ``Watch``.
        sizes: Bytes of the server's home, and of parts of it, at the end.
    """

    rounds: list[dict[str, Any]]
    marks: list[dict[str, Any]]
    submitted: float
    seconds: float
    setup_s: float
    peaks: dict[str, int]
    traffic: dict[int, list[Traffic]]
    work: dict[int, dict[str, float]]
    sizes: dict[str, int]

    def of(self, what: str, **fields: object) -> list[dict[str, Any]]:
        """Return the marks of a kind."""
        wanted = fields.items()
        return [m for m in self.marks if m["what"] == what and all(m.get(k) == v for k, v in wanted)]


def run_once(
    hosts: Hosts,
    folder: Path,
    limit_s: float,
    prepare: Callable[[Federation], None] = lambda federation: None,
    **settings: Any,
) -> Measured:
    """Make a federation, run one job in it, and return what was seen."""
    marks = folder / "meter.jsonl"
    started = time.monotonic()
    with programs_started_with(meter.environment(folder / "meter", marks)):
        federation = Federation(hosts, folder)
        setup_s = (time.monotonic() - started) / len(federation.names)
        prepare(federation)
        federation.start()
        with Watch(federation, pause_s=0.02) as watch:
            submitted = time.time()
            job = federation.submit(**settings)
            watch.job = job
            wait_for_end(federation, job, limit_s)
        seconds = time.time() - submitted
    events = [event for event in federation.events(job) if event["event"] == "round"]
    lines = [json.loads(line) for line in marks.read_text().splitlines()]
    sizes = disk(federation, job)
    return Measured(
        events, sorted(lines, key=lambda mark: mark["at"]), submitted, seconds, setup_s,
        watch.peaks, watch.traffic, watch.work, sizes,
    )  # fmt: skip


def wait_for_end(
    federation: Federation, job: str, limit_s: float, seen: Callable[[int], None] = lambda n: None
) -> None:
    """Wait until a job is done; tell ``seen`` the rounds on the way."""
    until, told = time.monotonic() + limit_s, 0
    while (state := federation.state(job)) not in ("done", "failed", "stopped"):
        if time.monotonic() > until:
            raise SystemExit(f"the job is not done after {limit_s} s\n{federation.log('server')[-3000:]}")
        number = last_round(federation, job)
        if number > told:
            told = number
            seen(number)
        time.sleep(0.1)
    if state != "done":
        raise SystemExit(f"the job is {state}\n{federation.log('server')[-3000:]}")


def secure_job(rounds: int, **changes: Any) -> dict[str, Any]:
    """Return settings of a job whose rounds are training and one sum, but for the last."""
    return {
        "rounds": rounds,
        "secure_aggregation__level": "sum",
        "evaluation__every": rounds,
        "training__steps": 1,
        **changes,
    }


def show_times(found: Measured, num_sites: int) -> None:
    """Print tables of the start, of the rounds, of their steps and of their messages."""
    starts = [mark for mark in found.of("start") if mark["at"] - mark["seconds"] > found.submitted]
    first = min((mark["at"] - mark["seconds"] for mark in found.of("step", step="train")), default=0.0)
    app = min((mark["at"] for mark in starts), default=0.0)
    begun = min((mark["at"] - mark["seconds"] for mark in starts), default=0.0)
    hello = [mark["at"] - mark["seconds"] for mark in found.of("step", step="hello")]
    last = found.rounds[-1]["round"]
    every = [event["seconds"] for event in found.rounds if 1 < event["round"] < last]
    sums = [event["sum_seconds"] for event in found.rounds if 1 < event["round"] < last]
    table(
        ("the start", "s"),
        (
            ("init, enrol and join, a site", f"{found.setup_s:.1f}"),
            ("`submit` to the ServerApp's process", f"{begun - found.submitted:.1f}"),
            ("... to its code", f"{app - begun:.1f}"),
            ("... to the first message", f"{min(hello, default=0) - app:.1f}"),
            ("... to the first round: all sites met and enrolled", f"{first - min(hello, default=0):.1f}"),
            ("`submit` to the first round", f"{first - found.submitted:.1f}"),
            ("the first round", f"{found.rounds[0]['seconds']:.1f}"),
            ("the last round, with validation", f"{found.rounds[-1]['seconds']:.1f}"),
            ("`submit` to the end of the job", f"{found.seconds:.1f}"),
        ),
    )
    steps = {
        step: [mark["seconds"] for mark in found.of("step", step=step) if 1 < mark["round"] < last]
        for step in ("train", "mask", "accept", "unmask")
    }
    rest = [
        event["seconds"] - sum(mark["seconds"] for mark in found.of("step", round=event["round"]))
        for event in found.rounds
        if 1 < event["round"] < last
    ]
    table(
        (f"{len(every)} rounds of {num_sites} sites", "s, median (least to most)"),
        (
            ("a round", spread(every)),
            ("of it the sum, `sum_seconds`", spread(sums)),
            *(
                (f"step {step if step != 'train' else 'ready: train'}", spread(s))
                for step, s in steps.items()
            ),
            ("between the steps, at the server", spread(rest)),
        ),
    )
    pushes = {mark["number"]: mark for mark in found.of("push") if 1 < mark["round"] < last}
    ways: dict[str, list[float]] = {"push": [], "fetch": [], "work": [], "reply": [], "read": [], "all": []}
    by_kind = {kind: {m["number"]: m for m in found.of(kind)} for kind in ("fetch", "work", "reply", "read")}
    for number, push in pushes.items():
        own = {kind: marks.get(number) for kind, marks in by_kind.items()}
        begin, at = push["at"] - push["seconds"], push["at"]
        ways["push"].append(push["seconds"])
        for kind, mark in own.items():
            if mark is None:
                break
            if push["step"] != "train" or kind != "work":
                ways[kind].append(mark["at"] - at)
            at = mark["at"]
        else:
            if push["step"] != "train":
                ways["all"].append(at - begin)
    table(
        (f"{len(pushes)} messages", "ms, median (least to most)"),
        (
            ("server: request to the SuperLink", spread(ways["push"], 1e3, 0)),
            ("until the site has it", spread(ways["fetch"], 1e3, 0)),
            ("site: checks and work, without training", spread(ways["work"], 1e3, 0)),
            ("site: answer to the SuperLink", spread(ways["reply"], 1e3, 0)),
            ("until the server has it", spread(ways["read"], 1e3, 0)),
            ("all of it, without training", spread(ways["all"], 1e3, 0)),
        ),
    )


def show_sizes(found: Measured) -> None:
    """Print CPU time, peaks of memory and sizes on disk."""
    last = found.rounds[-1]["round"]
    work: dict[str, list[float]] = {}
    for number in range(2, last):
        before, after = found.work.get(number - 1, {}), found.work.get(number, {})
        for name in before.keys() & after.keys():
            work.setdefault(name, []).append(after[name] - before[name])
    rows = [
        (name if name != "site" else "all sites", spread(values)) for name, values in sorted(work.items())
    ]
    table(("CPU time a round", "s, median (least to most)"), rows)
    table(("peak resident memory", "MB"), [(name, f"{size / MB:.0f}") for name, size in found.peaks.items()])
    table(("on disk at the end", "MB"), [(name, f"{size / MB:.2f}") for name, size in found.sizes.items()])


def phases(arguments: argparse.Namespace) -> None:
    """See the module."""
    ways = ["worker", *(["stock"] if arguments.stock else [])]
    for way in ways:
        with tempfile.TemporaryDirectory() as name, open_hosts(arguments.sites, arguments.way) as hosts:
            if way == "stock" and "--stock" not in help_of_run(hosts):
                print("\n`fedvision-site run` has no --stock here: left out")
                continue
            print(f"\n## phases, {way}\n\n{machine(hosts)}", flush=True)
            with stock_sites() if way == "stock" else contextlib.nullcontext():
                found = run_once(hosts, Path(name), arguments.limit, **secure_job(arguments.rounds))
            show_times(found, arguments.sites)
            show_sizes(found)


def help_of_run(hosts: Hosts) -> str:
    """Return what `fedvision-site run --help` says."""
    return str(hosts.sites[0].run([*PROGRAMS["fedvision-site"], "run", "--help"]).stdout)


@contextlib.contextmanager
def stock_sites() -> Iterator[None]:
    """Have each `fedvision-site run` use Flower's SuperNode meanwhile."""
    words = PROGRAMS["fedvision-site"]
    code = "import sys; sys.argv += ['--stock'] * (sys.argv[1] == 'run')"
    PROGRAMS["fedvision-site"] = [sys.executable, "-c", f"{code}; from fedvision_sites.cli import run; run()"]
    try:
        yield
    finally:
        PROGRAMS["fedvision-site"] = words


def vectors(arguments: argparse.Namespace) -> None:
    """See the module."""
    with tempfile.TemporaryDirectory() as name, open_hosts(arguments.sites, arguments.way) as hosts:
        print(f"\n## vectors\n\n{machine(hosts)}", flush=True)
        network = {"channels": arguments.channels, "strides": LARGE["strides"], "num_res_units": 2}
        changes = secure_job(arguments.rounds, model__args=network)
        found = run_once(hosts, Path(name), arguments.limit, **changes)
        weights = weights_of(Path(name) / "job.toml")
        print(f"\n{weights} weights: {4 * weights / MB:.2f} MB a vector")
        show_times(found, arguments.sites)
        if hosts.is_supported:
            show_traffic(found, weights)
        else:
            print("\nno counters on the loopback interface: bytes are left out")
        show_sizes(found)


def weights_of(path: Path) -> int:
    """Return how many weights the network of a job has."""
    from fedvision.config import load_job
    from fedvision.tasks import initial_network
    from fedvision.updates.layout import layout_of

    return layout_of(initial_network(load_job(path))).size


def show_traffic(found: Measured, weights: int) -> None:
    """Print the bytes of each site and round, from the end of one round to the end of the next."""
    last = found.rounds[-1]["round"]
    down: list[float] = []
    up: list[float] = []
    for number in range(2, last):
        if number in found.traffic and number - 1 in found.traffic:
            for now, before in zip(found.traffic[number], found.traffic[number - 1], strict=True):
                difference = now - before
                down.append(difference.received)
                up.append(difference.sent)
    bound = 4 * weights
    table(
        ("a site and round", "MB, median (least to most)", "of 4 bytes a weight"),
        [
            (name, spread(values, 1 / MB), f"{statistics.median(values) / bound:.3f}" if values else "-")
            for name, values in (("down: the model", down), ("up: the masked update", up))
        ],
    )


SITES = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from tests.benchmarks.deployment import serve_sites
serve_sites(sys.argv[1:])
"""


def serve_sites(homes: Sequence[str]) -> None:
    """Be the program of several sites, until SIGTERM: a thread and a connection each, one works at a time."""
    import logging
    import signal

    from fedvision.audit.log import AuditLog
    from fedvision.secagg import identity
    from fedvision_sites.home import SiteHome
    from fedvision_sites.worker import Worker, serve

    logging.basicConfig(level=logging.WARNING)
    stop, one = threading.Event(), threading.Lock()
    answer = Worker.answer

    def in_turn(self: Worker, content: Any) -> Any:
        with one:
            return answer(self, content)

    Worker.answer = in_turn  # type: ignore[method-assign]
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    threads = []
    for name in homes:
        home = SiteHome(Path(name).resolve())
        settings = home.settings()
        worker = Worker(
            home, settings, AuditLog(home.audit, identity.load(home.identity), settings.site.name)
        )

        def tell(text: str, name: str = settings.site.name) -> None:
            print(f"{name}: {text}", flush=True)

        threads.append(threading.Thread(target=serve, args=(home, worker, stop, tell)))
        threads[-1].start()
    for thread in threads:
        thread.join()


def start_together(federation: Federation, per_process: int) -> None:
    """Start the server, and the sites, several in a process; wait until all are connected."""
    federation.start_server()
    homes, logs = federation.sites, []
    for first in range(0, len(homes), per_process):
        name, group = f"sites-{first // per_process + 1}", homes[first : first + per_process]
        logs.append((name, len(group)))
        with (federation.folder / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-c", SITES, meter.ROOT, *group]
            federation.programs[name] = federation.hosts.sites[0].popen(command, stdout=log, stderr=log)
    for name, number in logs:
        federation.wait_for_line(name, "connected to", 300, times=number)


def database(federation: Federation) -> dict[str, int]:
    """Return how many rows the tables of Flower's database have that could grow with the rounds."""
    path = f"file:{federation.home / 'flower' / 'superlink.db'}?mode=ro"
    with contextlib.closing(sqlite3.connect(path, uri=True, timeout=30)) as opened:
        tables = [row[0] for row in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: opened.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in tables}


def disk(federation: Federation, job: str) -> dict[str, int]:
    """Return the bytes of the server's home, of parts of it, and of the first site's home."""
    home, run = federation.home, federation.home / "jobs" / job
    flower = home / "flower"
    return {
        "server's home": size_of(home),
        "superlink.db": size_of(flower / "superlink.db"),
        "superlink.db-wal": size_of(flower / "superlink.db-wal"),
        "flower.log": size_of(flower / "flower.log"),
        "server's audit.jsonl": size_of(home / "audit.jsonl"),
        "job": size_of(run),
        "job: rounds.jsonl": size_of(run / "rounds.jsonl"),
        "job: secagg": size_of(run / "secagg"),
        "job: checkpoints": size_of(run / "checkpoints"),
        "a site's home": size_of(federation.sites[0]),
        "a site's audit.jsonl": size_of(federation.sites[0] / "audit.jsonl"),
        "a site's job": size_of(federation.sites[0] / "jobs"),
    }


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the straight line through the second half of the points, least squares."""
    half = points[len(points) // 2 :]
    if len(half) < 2:
        return 0.0
    return statistics.linear_regression([x for x, _ in half], [y for _, y in half]).slope


def long(arguments: argparse.Namespace) -> None:
    """See the module."""
    with tempfile.TemporaryDirectory() as name, open_hosts(arguments.sites, arguments.way) as hosts:
        print(f"\n## long\n\n{machine(hosts)}", flush=True)
        federation = Federation(hosts, Path(name))
        start_together(federation, arguments.per_process)
        changes = secure_job(arguments.rounds)
        job = federation.submit(**changes)
        history: dict[str, list[tuple[float, float]]] = {}
        head = ("supervisor", "superlink", "superexec", "serverapp", "site")
        print(f"\n{arguments.sites} sites, {arguments.per_process} in a process")
        columns = ("round", "s a round", *(f"{name} MB" for name in head), "home MB", "superlink.db+wal MB",
                   "largest table of it")  # fmt: skip
        table(columns, [])

        def seen(number: int) -> None:
            if number % arguments.each and number != 1:
                return
            memory, sizes, rows = resident(federation), disk(federation, job), database(federation)
            seconds = [e["seconds"] for e in federation.events(job) if e["event"] == "round"]
            values = {**{f"{n} memory": v for n, v in memory.items()}, **sizes}
            values |= {f"rows of {table}": count for table, count in rows.items()}
            for key, value in values.items():
                history.setdefault(key, []).append((number, value))
            largest = max(rows, key=lambda table: rows[table])
            home, both = sizes["server's home"], sizes["superlink.db"] + sizes["superlink.db-wal"]
            row = (number, f"{statistics.median(seconds[-arguments.each :]):.2f}",
                   *(f"{memory.get(name, 0) / MB:.0f}" for name in head),
                   f"{home / MB:.2f}", f"{both / MB:.2f}",
                   f"{largest} {rows[largest]}")  # fmt: skip
            print("| " + " | ".join(map(str, row)) + " |", flush=True)

        wait_for_end(federation, job, arguments.limit, seen)
        growing = {key: slope(points) for key, points in history.items()}
        table(
            ("what grows in the second half", "a round more", "at the end"),
            [
                (key, *shown(key, growing[key], history[key][-1][1]))
                for key in history
                if abs(growing[key]) > 1e-9
            ],
        )


def shown(key: str, grown: float, last: float) -> tuple[str, str]:
    """Return a slope and a last value, with units."""
    if key.startswith("rows of"):
        return f"{grown:+.2f}", f"{last:.0f}"
    return f"{grown / 1e3:+.2f} kB", f"{last / MB:.2f} MB"


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subcommands = parser.add_subparsers(required=True, metavar="{phases,vectors,long}")
    for function, sites, rounds, limit in (
        (phases, 5, 10, 1800),
        (vectors, 3, 7, 3600),
        (long, 20, 200, 14400),
    ):
        own = subcommands.add_parser(
            function.__name__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        own.set_defaults(function=function)
        own.add_argument("--sites", type=int, default=sites, help="at least 3")
        own.add_argument(
            "--rounds", type=int, default=rounds, help="the first and the last are reported apart"
        )
        own.add_argument("--limit", type=float, default=limit, help="seconds after which a job is given up")
        own.add_argument(
            "--way",
            choices=["", "root", "user", "loopback"],
            default="",
            help="of making hosts; the best if empty",
        )
        if function is phases:
            own.add_argument(
                "--stock", action="store_true", help="also with sites that run Flower's SuperNode"
            )
        elif function is vectors:
            own.add_argument("--channels", type=int, nargs=4, default=LARGE["channels"], help="of the U-Net")
        else:
            own.add_argument("--per-process", type=int, default=5, help="sites in one process")
            own.add_argument("--each", type=int, default=20, help="rounds between two rows of the table")
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
