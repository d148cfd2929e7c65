"""``fedvision-site run``: the site's program, in the foreground."""

import fcntl
import functools
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedvision.errors import ConfigError, StorageError
from fedvision_sites.home import SiteHome

Home = Annotated[Path, typer.Option("--home", help="The site's folder, made by `init`.")]
UseStock = Annotated[
    bool,
    typer.Option("--stock", help="Use Flower's own programs instead of the worker; see above before you do."),
]


def run(home: Home = Path(), stock: UseStock = False) -> None:
    """Take part: ask the server for work, check it against the site's policy, train, and answer.

    It stays in the foreground, for a service manager to watch. Ctrl-C or SIGTERM stops it after the message
    at hand. Only outgoing connections are made. What may run is decided by the [policy] of site.toml and by
    `fedvision-site allow`.

    --stock is a fallback: Flower's SuperNode and SuperExec take part in place of the worker. Use it only if
    the worker cannot be used. It runs the installed code too, and refuses a run of the server that brings
    other code. But more programs read what the server sends, other users of this machine could read the
    messages, and each step takes seconds. SIGTERM stops it at once; the server asks again.
    """
    from fedvision import health
    from fedvision.audit.log import AuditLog
    from fedvision.secagg import identity
    from fedvision_sites.setup import check_guard

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    os.umask(0o077)
    own = SiteHome(home.resolve())
    settings = own.settings()
    if not own.tls_cert.exists():
        raise ConfigError(
            f"{settings.site.name} is not in a federation yet",
            "send request.json to the coordinator, and give the answer to `fedvision-site join`",
        )
    check_guard(own)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    tell = functools.partial(console.print, markup=False)
    is_over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: is_over.set())
    with (own.root / ".running").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(f"this site runs already in {own.root}", "stop it first") from None
        log = AuditLog(own.audit, identity.load(own.identity), settings.site.name)
        log.append("started")
        port = settings.site.health_port
        if stock:
            from fedvision_sites.stock import Stock

            program = Stock(own, log, tell)
            state, work = program.health, functools.partial(program.run, is_over)
        else:
            from fedvision_sites.worker import Worker, serve

            keep_to_gpu_share(settings.policy.gpu_share)
            worker = Worker(own, settings, log)
            state, work = worker.health, functools.partial(serve, own, worker, is_over, tell)
        watched = health.serve("127.0.0.1", port, state) if port else None
        try:
            work()
        finally:
            if watched:
                watched.close()
        log.append("stopped")


def keep_to_gpu_share(share: float) -> None:
    """Take at most this part of a GPU's memory."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)
