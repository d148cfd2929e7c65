"""``fedvision-server run``: the coordinator's program, in the foreground."""

import logging
import os
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedvision_server.home import ServerHome

Home = Annotated[Path, typer.Option("--home", help="The coordinator's folder, made by `init`.")]


def run(home: Home = Path()) -> None:
    """Serve the sites and run the jobs that are submitted, until it is stopped.

    It stays in the foreground, for a service manager to watch. Ctrl-C or SIGTERM stops it; a job that runs
    goes on with the next start, from where it stands. Nothing is lost if it is killed.
    """
    from fedvision_server.supervisor import Supervisor

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    os.umask(0o077)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    Supervisor(ServerHome(home.resolve()), lambda text: console.print(text, markup=False)).run(stop)
