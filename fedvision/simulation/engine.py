"""Run a job's ServerApp and ClientApp on Flower's simulation engine (Ray), and leave nothing behind.

The sites run in worker processes that Flower's engine keeps between messages, so network and decoded
cases stay warm. Ray's own folder is a temporary one that goes with the run; no telemetry is sent.
"""

import contextlib
import io
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import psutil

from fedvision.config import Job
from fedvision.errors import FedvisionError, RoundError, Stopped

if TYPE_CHECKING:
    from fedvision.training.root import RootSet
    from fedvision_server.federation import Cohort, Observer
    from fedvision_server.secure import ServerKeys
    from fedvision_sites.work import SiteConfig

logger = logging.getLogger(__name__)
SCRATCH_PREFIX = "fedvision-ray-"
OBJECT_STORE_BYTES = 1 << 30
LOOK_S = 0.01
"""Least pause of Flower's engine between two looks for messages; its own is 0.1 s."""
LOOK_SHARE = 0.05
"""Most of a core that looking may take: with many sites a look takes longer, and the pause with it."""


def choose_parallel(num_sites: int, num_cpus: int, num_gpus: int) -> tuple[int, int]:
    """Return how many sites train at a time, and with how many CPU threads each.

    With GPUs: one site a GPU at a time, the sites take turns. Without: one site a core is fastest,
    because threads inside a site do not scale perfectly; but the number should divide the number of
    sites, or the last ones train alone while the other cores wait.
    """
    if num_gpus:
        parallel = min(num_sites, num_gpus, num_cpus)
        return parallel, max(1, num_cpus // parallel)
    for parallel in range(min(num_sites, num_cpus), 0, -1):
        if num_sites % parallel == 0 or num_sites >= 4 * parallel:
            return parallel, max(1, num_cpus // parallel)
    return 1, num_cpus


def run_on_flower(
    job: Job,
    folder: Path,
    cohort: "Cohort",
    configs: Sequence["SiteConfig"],
    observe: "Observer",
    parallel: int,
    keys: "ServerKeys | None",
    root: "RootSet | None" = None,
) -> None:
    """Run a job with Flower's simulation engine until it is done, fails, or Ctrl-C is pressed.

    Args:
        job: The job, without paths.
        folder: The run folder.
        cohort: Who does what.
        configs: One a site.
        observe: Is shown every event, from the server's thread.
        parallel: How many sites work at a time.
        keys: The server's, for secure aggregation.
        root: The root set, if there is one.

    Raises:
        Stopped: Ctrl-C; what was finished is on disk.
        FedvisionError: What the server raised.
    """
    _quiet_environment()
    _remove_stale_scratch()
    import ray
    import torch
    from flwr.simulation import run_simulation

    from fedvision_server.app import create_app as create_server_app
    from fedvision_sites.app import create_app as create_site_app

    for name in ("flwr", "ray"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    stop = threading.Event()
    gpus = torch.cuda.device_count()
    scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-", dir="/tmp"))
    # A share above one GPU must be whole: three GPUs for two sites at a time give one each.
    gpu_share = gpus // parallel if gpus >= parallel else gpus / parallel
    backend = {"client_resources": {"num_cpus": 1, "num_gpus": gpu_share}}
    server = create_server_app(job, folder, cohort, observe, stop, len(configs), 2 * parallel, keys, root)
    try:
        # Started here and not by Flower, so that our own signal handlers come after Ray's.
        ray.init(
            num_cpus=parallel,
            num_gpus=gpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(scratch),
            _node_ip_address="127.0.0.1",
        )
        with _stop_on_signal(stop), _prompt_messages():
            run_simulation(server, create_site_app(configs), len(configs), backend_config=backend)
    except FedvisionError:
        raise
    except RuntimeError as error:
        if stop.is_set():
            raise Stopped("stopped") from None
        raise RoundError(f"Flower's simulation engine failed: {error}") from error
    finally:
        _end_workers()
        shutil.rmtree(scratch, ignore_errors=True)
    if stop.is_set():
        raise Stopped("stopped")


class _ShortPauses:
    """A stop event whose ``wait`` is shorter than asked for, as short as ``LOOK_S`` and ``LOOK_SHARE`` allow.

    Args:
        stop: The event.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._woken_at = time.monotonic()
        self.is_set = stop.is_set

    def wait(self, timeout: float) -> bool:
        """Wait for the event, ``timeout`` seconds at most."""
        looked_s = time.monotonic() - self._woken_at
        is_set = self._stop.wait(min(timeout, max(LOOK_S, looked_s / LOOK_SHARE)))
        self._woken_at = time.monotonic()
        return is_set


@contextlib.contextmanager
def _prompt_messages() -> Iterator[None]:
    """Let Flower's engine see messages at once.

    Its loop ``vce_api.add_messages_to_queue`` looks for new messages every 0.1 s, and a round with secure
    aggregation has six to ten messages more than one without, one after the other. So the loop is given its
    stop event, on which it waits between two looks, with shorter waits. Another version of Flower without
    that loop works at its own pace.
    """
    from flwr.server.superlink.fleet.vce import vce_api

    look = getattr(vce_api, "add_messages_to_queue", None)
    if look is None:
        yield
        return

    def look_often(*arguments: object) -> None:
        look(*[_ShortPauses(item) if isinstance(item, threading.Event) else item for item in arguments])

    vce_api.add_messages_to_queue = look_often
    try:
        yield
    finally:
        vce_api.add_messages_to_queue = look


def _quiet_environment() -> None:
    """Switch off every request to an outside host and the noise; must come before the imports."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the workers import what we can
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112, Ray reads this name; not a background task


def _remove_stale_scratch() -> None:
    """Remove Ray folders of our own earlier runs that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*"):
        owner = path.name.removeprefix(SCRATCH_PREFIX).split("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)) and path.stat().st_uid == os.getuid():
            shutil.rmtree(path, ignore_errors=True)


def _end_workers() -> None:
    """Kill what is left of the engine's processes, children of this one only."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ray" in " ".join(child.cmdline()):
                child.kill()


@contextlib.contextmanager
def _stop_on_signal(stop: threading.Event) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into a clean stop; sites in the middle of training are not waited for."""

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()
        sys.stdout = io.StringIO()  # Ray reports there every worker that ends
        threading.Thread(target=_end_site_workers, daemon=True).start()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    stdout = sys.stdout
    try:
        yield
    finally:
        sys.stdout = stdout
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_site_workers() -> None:
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ClientAppActor" in " ".join(child.cmdline()):
                child.kill()
