"""``fedvision-site run --stock``: the site by Flower's own programs, where the worker cannot be used.

    this program        starts and watches the others, and holds the relay (``relay``)
    flower-supernode    pulls messages and pushes replies, through the relay
    flower-superexec    starts a process for each message: a ClientApp, ``fedvision_sites.app:stock``

The process of a message answers it as the worker does, with the same checks and the same state on disk. It
is slow: some seconds for a step, and nothing stays in memory.

Rules:
- The code that runs is the installed one. The bundle is not fetched from the server: the site makes it itself
  (``wire.bundle``), and a run that names another is refused. See ``relay``.
- All is on loopback, over TLS with an authority that is made at each start and whose key is never written.
- Keys and secrets for Flower's programs lie in HOME/flower, which only its owner can read.

More is trusted than with the worker: Flower's SuperNode and SuperExec read what the server sends, as the
site's user; and the token of a message is in the list of processes, so other users of the machine could read
the request, such as the model. Use a machine, or a container, of the site's own.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import uvicorn
from flwr.app import RecordDict

from fedvision import __version__, health
from fedvision.audit.log import AuditLog
from fedvision.errors import StorageError
from fedvision.secagg import certificates, identity, issuing
from fedvision.secagg.enrolling import now_utc
from fedvision.secagg.ssh_key import ssh_private
from fedvision.storage import append_line, write_atomic
from fedvision.wire.bundle import ENVIRONMENT
from fedvision.wire.envelope import HEX_32, SERVER
from fedvision_sites.home import SiteHome
from fedvision_sites.relay import Relay
from fedvision_sites.worker import FIRST_PAUSE_S, LONGEST_PAUSE_S, QUIET_S, SILENT_S, Worker

logger = logging.getLogger(__name__)

HOME_VARIABLE = "FEDVISION_SITE_HOME"
"""Flower starts the process of a message with the environment, and nothing else."""
LOOPBACK = "127.0.0.1"
TICK_S = 0.5
START_S = 30.0
CALL_TIMEOUT_S = 60.0
SUPERNODE = """
import sys
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supernode.cli import flower_supernode
start_parent_process_monitor(int(sys.argv.pop(1)))
flower_supernode()
"""
SUPEREXEC = "from flwr.supercore.cli import flower_superexec; flower_superexec()"


def answer(content: RecordDict) -> RecordDict:
    """Answer one record in a process of its own; an empty record where the worker would not answer."""
    home = SiteHome(Path(os.environ[HOME_VARIABLE]))
    try:
        from fedvision_sites.commands_run import keep_to_gpu_share

        settings = home.settings()
        keep_to_gpu_share(settings.policy.gpu_share)
        log = AuditLog(home.audit, identity.load(home.identity), settings.site.name)
        return Worker(home, settings, log).answer(content) or RecordDict()
    except Exception:  # the edge: the text of an exception would be sent to the server
        with contextlib.suppress(StorageError):
            append_line(home.root / "log.jsonl", {"failed": traceback.format_exc()})
        return RecordDict()


class Stock:
    """Flower's programs and the relay of one site.

    Args:
        home: The site's folder.
        log: The site's audit log.
        tell: Is told in one line what happens.
    """

    def __init__(self, home: SiteHome, log: AuditLog, tell: Callable[[str], None]) -> None:
        self._home = home
        self._folder = home.root / "flower"
        self._settings = home.settings()
        self._log = log
        self._tell = tell
        self._tls = certificates.client_context(
            certificate=home.tls_cert, key=home.tls_key, authority=home.ca_cert
        )
        self._refused_at = -QUIET_S
        self._started = time.time()
        self._relay: Relay | None = None
        self.num_refused = 0

    def health(self) -> health.Health:
        """Return how the site is; called from another thread."""
        contact = self._relay.last_contact if self._relay else 0.0
        metrics: dict[str, health.Values] = {
            "fedvision_info": {(__version__,): 1},
            "fedvision_start_time_seconds": self._started,
            "fedvision_audit_lines": self._log.head().count,
            "fedvision_disk_free_bytes": shutil.disk_usage(self._home.root).free,
            "fedvision_last_message_seconds": {(SERVER,): contact},
            "fedvision_refused_total": {("bundle",): self.num_refused},
        }
        is_ok = time.time() - contact < SILENT_S
        return health.Health(is_ok, "connected" if is_ok else "no contact with the server", metrics)

    def run(self, stop: threading.Event) -> None:
        """Take part until ``stop`` is set; what ends is started again, with growing pauses."""
        self._tell("Flower's own programs are used: slower than the worker, and on loopback ports")
        pause = FIRST_PAUSE_S
        while not stop.is_set():
            started = time.monotonic()
            self._prepare()
            with self._served() as address, self._programs(address) as programs:
                while not stop.wait(TICK_S) and not self._has_ended(programs):
                    pass
            if stop.is_set():
                break
            if time.monotonic() - started > LONGEST_PAUSE_S:
                pause = FIRST_PAUSE_S
            self._tell(f"Flower's programs ended, see {self._folder / 'flower.log'}; they are started again")
            stop.wait(pause)
            pause = min(pause * 2, LONGEST_PAUSE_S)

    def _has_ended(self, programs: list[subprocess.Popen[bytes]]) -> bool:
        """Return whether to start again; a SuperNode that gave up signs off, but may stay and do nothing."""
        return any(program.poll() is not None for program in programs) or bool(
            self._relay and self._relay.has_left
        )

    def _prepare(self) -> None:
        """Write the files that Flower's programs read, all of them new but for the node key."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._folder.chmod(0o700)
        shutil.rmtree(self._folder / "apps", ignore_errors=True)
        key, authority_key, now = issuing.new_tls_key(), issuing.new_tls_key(), now_utc()
        authority = issuing.authority_certificate(authority_key, "loopback", now)
        certificate = issuing.server_certificate((authority_key, authority), key, [LOOPBACK], now)
        for name, content in (
            ("loopback.key", key),
            ("loopback.crt", certificate),
            ("loopback-ca.crt", authority),
            ("node.ssh", ssh_private(certificates.read_private(self._home.node_key))),
            ("superexec.secret", secrets.token_hex(32).encode()),
        ):
            write_atomic(self._folder / name, content, 0o600)

    @contextlib.contextmanager
    def _served(self) -> Iterator[str]:
        """Serve the relay in a thread; yields its address."""
        client = httpx.AsyncClient(
            base_url=f"https://{self._settings.site.server}", verify=self._tls, timeout=CALL_TIMEOUT_S
        )
        self._relay = Relay(client, self._tell, self._note_refused)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.minimum_version = ssl.TLSVersion.TLSv1_3
        tls.load_cert_chain(self._folder / "loopback.crt", self._folder / "loopback.key")
        config = uvicorn.Config(
            self._relay,
            lifespan="off",
            ws="none",
            ssl_context_factory=lambda config, default: tls,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)

        async def work() -> None:
            async with client:
                await server.serve(sockets=[listener])

        with socket.create_server((LOOPBACK, 0)) as listener:
            thread = threading.Thread(target=lambda: asyncio.run(work()), daemon=True)
            thread.start()
            until = time.monotonic() + START_S
            while not server.started:
                if not thread.is_alive() or time.monotonic() > until:
                    raise StorageError("the relay on loopback does not start")
                time.sleep(0.02)
            try:
                yield f"{LOOPBACK}:{listener.getsockname()[1]}"
            finally:
                server.should_exit = True
                thread.join(10)

    @contextlib.contextmanager
    def _programs(self, address: str) -> Iterator[list[subprocess.Popen[bytes]]]:
        """Keep Flower's two programs while the context is open."""
        started: list[subprocess.Popen[bytes]] = []
        with (self._folder / "flower.log").open("ab") as output:
            try:
                for command in commands(self._folder, address, free_port()):
                    started.append(
                        subprocess.Popen(  # noqa: S603
                            command,
                            env=environment(self._home.root, self._folder),
                            cwd=self._folder,
                            stdin=subprocess.DEVNULL,
                            stdout=output,
                            stderr=output,
                        )
                    )
                yield started
            finally:
                for program in reversed(started):
                    end(program)

    def _note_refused(self, run: int, bundle: str) -> None:
        """Write into the audit log that a run was refused, at most once a minute."""
        self.num_refused += 1
        if time.monotonic() - self._refused_at > QUIET_S:
            self._refused_at = time.monotonic()
            digest = bundle if HEX_32.fullmatch(bundle) else ""
            self._log.append("refused", reason="bundle", flower_run=str(run), digest=digest)


def commands(folder: Path, address: str, port: int) -> list[list[str]]:
    """Return the command lines of SuperNode and SuperExec.

    Args:
        folder: With the files of ``Stock._prepare``.
        address: Of the relay.
        port: For the Runtime interface between the two.
    """
    authority, secret = str(folder / "loopback-ca.crt"), str(folder / "superexec.secret")
    supernode = [sys.executable, "-c", SUPERNODE, str(os.getpid())]
    supernode += ["--superlink", address, "--root-certificates", authority]
    supernode += ["--auth-supernode-private-key", str(folder / "node.ssh")]
    supernode += ["--isolation", "process", "--superexec-auth-secret-file", secret]
    supernode += ["--host", LOOPBACK, "--port", str(port)]
    supernode += [
        "--ssl-certfile",
        str(folder / "loopback.crt"),
        "--ssl-keyfile",
        str(folder / "loopback.key"),
    ]
    supernode += ["--ssl-ca-certfile", authority]
    superexec = [sys.executable, "-c", SUPEREXEC, "--parent-pid", str(os.getpid())]
    superexec += ["--runtime-api-address", f"{LOOPBACK}:{port}", "--root-certificates", authority]
    superexec += ["--superexec-auth-secret-file", secret]
    return [supernode, superexec]


def environment(home: Path, folder: Path) -> dict[str, str]:
    """Return the environment of Flower's programs."""
    own = dict(os.environ)
    local = ",".join(filter(None, [own.get("NO_PROXY") or own.get("no_proxy"), LOOPBACK]))
    return {
        **own,
        **ENVIRONMENT,
        "FLWR_HOME": str(folder),
        HOME_VARIABLE: str(home),
        "NO_PROXY": local,
        "no_proxy": local,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), own.get("PATH", os.defpath)]),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    }


def free_port() -> int:
    """Return a port of the loopback interface that nobody uses now.

    Who takes it first gains nothing: SuperExec wants a certificate of the authority made at this start.
    """
    with socket.create_server((LOOPBACK, 0)) as found:
        return int(found.getsockname()[1])


def end(program: subprocess.Popen[bytes]) -> None:
    """Stop a program."""
    program.terminate()
    try:
        program.wait(10)
    except subprocess.TimeoutExpired:
        program.kill()
        program.wait()
