"""Times of a federation's messages, written by its own programs while they run; see ``deployment.py``.

``environment`` gives what a program must be started with. Each Python process then wraps, as soon as they are
imported, the link of the server and the connection and worker of a site, and appends a line to the file for

    start       the ServerApp is there                     process start to the import of its code
    step        an ask of all sites by the server          first request to last reply
    push        a request is given to the SuperLink        with those to the other sites
    fetch       a request reached a site                   that is when it is there, decoded
    work        a site has its answer
    reply       a site has given its answer to the SuperLink
    read        a reply reached the server, decoded

with its end ``at`` (Unix time) and ``seconds``. Requests are told apart by the number in their seal. Nothing
in the programs knows of it; a method that was renamed makes the import fail, which shows at once.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "FEDVISION_BENCHMARK_METER"
ROOT = Path(__file__).resolve().parents[2]


def environment(folder: Path, file: Path) -> dict[str, str]:
    """Return variables that make Python programs write to ``file``; a module is put into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text("from tests.benchmarks.meter import install\n\ninstall()\n")
    path = os.pathsep.join([str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, VARIABLE: str(file)}


def install() -> None:
    """Wrap what is measured when it is imported; called by ``sitecustomize``."""
    if os.environ.get(VARIABLE):
        sys.meta_path.insert(0, Finder())


def note(what: str, started: float, **fields: object) -> None:
    """Append a line; one write, so that processes do not mix."""
    now = time.time()
    line = json.dumps({"what": what, "at": now, "seconds": now - started, **fields}) + "\n"
    handle = os.open(os.environ[VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of ``WRAPPERS`` as usual, and wraps them once they are loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return how a module is loaded; None for modules that are not measured."""
        wrap = WRAPPERS.get(name)
        found = importlib.machinery.PathFinder.find_spec(name, path) if wrap else None
        if wrap is None or found is None or found.loader is None:
            return None
        load = found.loader.exec_module

        def load_and_wrap(module: ModuleType) -> None:
            load(module)
            wrap(module)

        found.loader.exec_module = load_and_wrap  # type: ignore[method-assign]
        return found


def name_of(request: Any) -> str:
    """Return the step that a request is for: "hello", "train", "mask", ..."""
    return str(getattr(request, "step", type(request).__name__.removesuffix("Request").lower()))


def wrap_server(module: Any) -> None:
    """Measure ``deployed.SiteLink``."""
    import psutil

    note("start", psutil.Process().create_time())
    link = module.SiteLink
    ask, send, read = link.ask, link._send, link._read

    @functools.wraps(ask)
    def timed_ask(self: Any, requests: Mapping[int, Any]) -> Iterator[Any]:
        started = time.time()
        yield from ask(self, requests)
        first = next(iter(requests.values()), None)
        if first is not None:
            note("step", started, step=name_of(first), round=getattr(first, "round", 0), num=len(requests))

    @functools.wraps(send)
    def timed_send(self: Any, waiting: Mapping[int, Any]) -> None:
        started, before = time.time(), {site: item.number for site, item in waiting.items()}
        send(self, waiting)
        for site, item in waiting.items():
            if item.number != before[site]:
                about = {"step": name_of(item.request), "round": getattr(item.request, "round", 0)}
                note("push", started, number=item.number, **about)

    @functools.wraps(read)
    def timed_read(self: Any, site: int, item: Any, content: Any) -> Any:
        note("read", time.time(), number=item.number)
        return read(self, site, item, content)

    link.ask, link._send, link._read = timed_ask, timed_send, timed_read


def wrap_worker(module: Any) -> None:
    """Measure ``worker.Worker``."""
    worker = module.Worker
    answer = worker.answer

    @functools.wraps(answer)
    def timed_answer(self: Any, content: Any) -> Any:
        number, started = content["message"]["seal.number"], time.time()
        note("fetch", started, number=number)
        if self.fleet is not None:
            self.fleet.metered = number
        found = answer(self, content)
        note("work", started, number=number)
        return found

    worker.answer = timed_answer


def wrap_fleet(module: Any) -> None:
    """Measure ``fleet.Fleet``."""
    fleet = module.Fleet
    send = fleet.send

    @functools.wraps(send)
    def timed_send(self: Any, *arguments: Any) -> None:
        started = time.time()
        send(self, *arguments)
        note("reply", started, number=getattr(self, "metered", 0))

    fleet.send = timed_send


WRAPPERS: dict[str, Callable[[Any], None]] = {
    "fedvision_server.deployed": wrap_server,
    "fedvision_sites.worker": wrap_worker,
    "fedvision_sites.fleet": wrap_fleet,
}
