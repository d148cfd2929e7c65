"""Flower's SuperLink, wrapped: for the sites a port with client certificates, all the rest on loopback.

    python -m fedvision_server.superlink HOME

    fleet port      TLS 1.3, a client certificate of this federation's CA required; a few /v1/fleet/ paths
    loopback port   Flower's Control and Runtime interfaces, for the supervisor and the ServerApp
    both            two paths for parcels, see ``fleet_parcels``

Rules:
- On the fleet port a request passes if its path is one that a worker needs, its certificate is that of an
  enrolled site that is not revoked, and the Flower node key in it is the one enrolled with that site.
- On loopback the Control interface wants the secret in HOME/flower/control.secret, which only the owner of
  HOME can read: other users of the host can't submit, list or stop.
- State is in HOME/flower/superlink.db (SQLite); process isolation; no installs, no telemetry.
"""

import asyncio
import base64
import binascii
import hmac
import logging
import math
import os
import secrets
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from fedvision.errors import ConfigError
from fedvision.secagg import certificates
from fedvision.storage import write_atomic
from fedvision.wire.bundle import ENVIRONMENT
from fedvision.wire.parcels import LARGEST_OF_SITE, SERVER_PULL, SERVER_PUSH, SITE_PULL, SITE_PUSH
from fedvision_server.fleet_bell import App, Bell, Scope
from fedvision_server.home import ServerHome, split_address
from fedvision_server.site_records import load_records

logger = logging.getLogger(__name__)

FLEET, RUNTIME = "/v1/fleet/", "/v1/runtime/"
PATHS = frozenset(
    FLEET + name
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "pull-object",
        "push-object",
        "confirm-message-received",
        "get-run",
    )
)
"""What a SuperNode needs of Flower. Not among them: registering nodes, and fetching code (``get-fab``)."""
PULLS = (FLEET + "pull-messages", SITE_PULL)
LARGEST = dict.fromkeys(PATHS, 32 << 20) | dict.fromkeys(PULLS, 1 << 16) | {SITE_PUSH: LARGEST_OF_SITE}
"""Bytes of a request, by path; Flower sends vectors in chunks of 5 MB."""
NODE_KEY_HEADER = b"flwr-public-key"
SITE_PATIENCE_S, SERVER_PATIENCE_S = 20.0, 0.5
"""How long a request for messages is held while there is none."""
STOP_S = 2
"""How long requests that are held or under way may take when the program is told to stop."""
FLEET_STACK = ("BaseHTTPMiddleware", "ProtobufTranslationMiddleware", "NodeAuthMiddleware")
RUNTIME_STACK = ("BaseHTTPMiddleware", "ProtobufTranslationMiddleware", "RuntimeTracingMiddleware")
"""What Flower's own interfaces need of its middlewares: errors, decoding, and who a node is. The others are
for the Control interface, or write event logs that are off."""


def secret_file(path: Path) -> str:
    """Return the secret in a file that only its owner can read; it is made if absent."""
    if not path.exists():
        write_atomic(path, (secrets.token_hex(32) + "\n").encode(), 0o600)
    return path.read_text(encoding="utf-8").strip()


class EnrolledSites:
    """Who may use the fleet port: read from HOME/sites, again once a second.

    While a record there is damaged, nobody may.
    """

    PAUSE_S = 1.0

    def __init__(self, home: ServerHome) -> None:
        self._home = home
        self._read_at = -math.inf
        self._keys: dict[str, bytes] = {}

    def node_key(self, fingerprint: str) -> bytes | None:
        """Return the node key that belongs to a certificate, None if it is not that of an enrolled site."""
        if time.monotonic() - self._read_at > self.PAUSE_S:
            self._read_at = time.monotonic()
            try:
                records = list(load_records(self._home).values())
            except ConfigError as error:
                logger.error("no site is let in: %s", error)
                records = []
            self._keys = {
                record.fingerprint: bytes.fromhex(record.node_key)
                for record in records
                if record.status == "enrolled"
            }
        return self._keys.get(fingerprint)


async def refuse(send: Any, status: int, reason: str) -> None:
    """Answer with a status and a short reason."""
    head = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": reason.encode()})


def fleet_app(app: App, parcels: App, sites: EnrolledSites, to_sites: Bell, to_server: Bell) -> App:
    """Return Flower's app, and the one for parcels, as sites may see them."""

    async def guarded(scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        expected = sites.node_key(scope.get("fedvision.peer", ""))
        if expected is None:
            await refuse(send, 403, "this certificate is not that of an enrolled site")
            return
        path = scope["path"]
        if scope["method"] != "POST" or path not in LARGEST:
            await refuse(send, 404, "no such path for sites")
            return
        headers = dict(scope["headers"])
        try:
            key = base64.b64decode(headers.get(NODE_KEY_HEADER, b""), validate=True)
            length = int(headers.get(b"content-length", b"-1"))
        except (binascii.Error, ValueError):
            key, length = b"", -1
        if not hmac.compare_digest(key, expected):
            await refuse(send, 403, "the node key is not the one enrolled with this certificate")
        elif not 0 <= length <= LARGEST[path]:
            await refuse(send, 413, "too large, or of unknown length")
        elif path in PULLS:
            own = parcels if path == SITE_PULL else app
            await to_sites.answered(own, scope, receive, send)
        elif path == SITE_PUSH:
            await parcels(scope, receive, send)
        else:
            await app(scope, receive, send)
            if path == FLEET + "push-object":
                to_server.ring()

    return guarded


def loopback_app(app: App, runtime: App, parcels: App, secret: str, to_sites: Bell, to_server: Bell) -> App:
    """Return Flower's app with a secret before everything but what a ServerApp uses, which shows a token."""
    wanted = b"Bearer " + secret.encode()

    async def guarded(scope: Scope, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        is_open = path.startswith(RUNTIME) or path in (SERVER_PULL, SERVER_PUSH)
        if scope["type"] == "http" and not is_open:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, wanted):
                await refuse(send, 401, "the control secret is missing or wrong")
                return
        if path in (SERVER_PULL, RUNTIME + "pull-messages"):
            own = parcels if path == SERVER_PULL else runtime
            await to_server.answered(own, scope, receive, send)
        elif path == SERVER_PUSH:
            await parcels(scope, receive, send)
        elif path.startswith(RUNTIME):
            await runtime(scope, receive, send)
            if path == RUNTIME + "push-object":
                to_sites.ring()
        else:
            await app(scope, receive, send)

    return guarded


def stack(app: Any, names: Sequence[str]) -> App:
    """Return Flower's app with those of its middlewares that a path needs; each costs time at every request.

    Raises:
        RuntimeError: One of them is not there: this is another Flower than the one this was written for.
    """
    every = app.user_middleware
    kept = [one for one in every if one.cls.__name__ in names]
    if [one.cls.__name__ for one in kept] != list(names):
        raise RuntimeError(f"Flower's app does not have the middlewares {names}")
    app.user_middleware = kept
    try:
        inner = app.build_middleware_stack()
    finally:
        app.user_middleware = every

    async def with_app(scope: Scope, receive: Any, send: Any) -> None:
        scope["app"] = app
        await inner(scope, receive, send)

    return with_app


class PeerProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's HTTP protocol, which also tells the app the fingerprint of the client's certificate."""

    def connection_made(self, transport: Any) -> None:
        """Wrap the app for this connection."""
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        peer = certificates.peer_fingerprint(tls) if tls else ""
        app: App = self.app  # type: ignore[has-type]

        async def with_peer(scope: Scope, receive: Any, send: Any) -> None:
            await app({**scope, "fedvision.peer": peer}, receive, send)

        self.app = with_peer


def flower_app(home: ServerHome, control_port: int) -> Any:
    """Return Flower's SuperLink app with our settings."""
    from flwr.supercore.auth import load_superexec_auth_secret
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
    from flwr.superlink.main import create_app

    secret = home.flower / "superexec.secret"
    secret_file(secret)
    config = SuperLinkLifespanConfig(
        control_address=f"127.0.0.1:{control_port}",
        health_server_address=None,
        host="127.0.0.1",
        port=control_port,
        insecure=True,
        certificates=None,
        superexec_auth_secret=load_superexec_auth_secret(secret_file=str(secret)),
        authn_plugin=load_control_authn_plugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=str(home.flower / "superlink.db"),
        isolation="process",
        runtime_dependency_install=False,
    )
    return create_app(config, SuperLinkLifespan)


def servers(home: ServerHome) -> tuple[uvicorn.Server, uvicorn.Server]:
    """Return the loopback server and the fleet server of one SuperLink."""
    from fedvision_server.fleet_parcels import Parcels

    settings = home.settings()
    app = flower_app(home, settings.control_port)
    tls = certificates.server_context(certificate=home.tls_cert, key=home.tls_key, authority=home.ca_cert)

    def context(own: uvicorn.Config, default: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
        return tls

    to_sites, to_server = Bell(SITE_PATIENCE_S), Bell(SERVER_PATIENCE_S)
    parcels = Parcels(app, {SITE_PUSH: to_server.ring, SERVER_PUSH: to_sites.ring})
    secret = secret_file(home.flower / "control.secret")
    common: dict[str, Any] = {
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "timeout_graceful_shutdown": STOP_S,
    }
    loopback = uvicorn.Config(
        loopback_app(app, stack(app, RUNTIME_STACK), parcels, secret, to_sites, to_server),
        host="127.0.0.1",
        port=settings.control_port,
        **common,
    )
    fleet = uvicorn.Config(
        fleet_app(stack(app, FLEET_STACK), parcels, EnrolledSites(home), to_sites, to_server),
        host=settings.listen,
        port=split_address(settings.address)[1],
        lifespan="off",
        http=PeerProtocol,
        ssl_context_factory=context,
        timeout_keep_alive=75,
        **common,
    )
    return uvicorn.Server(loopback), uvicorn.Server(fleet)


async def serve(both: tuple[uvicorn.Server, uvicorn.Server]) -> None:
    """Serve until one of the two is told to stop or can't go on."""

    async def together() -> None:
        while not any(server.should_exit for server in both):
            await asyncio.sleep(0.1)
        for server in both:
            server.should_exit = True

    running = [asyncio.ensure_future(server.serve()) for server in both]
    watch = asyncio.ensure_future(together())
    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for server in both:
        server.should_exit = True
    await asyncio.gather(*running, watch)


def main(argv: list[str]) -> int:
    """Serve the SuperLink of a home; ends with its parent process."""
    from flwr.supercore.app_utils import start_parent_process_monitor

    os.environ.update(ENVIRONMENT)
    os.umask(0o077)
    home = ServerHome(Path(argv[0]).resolve())
    start_parent_process_monitor(os.getppid())
    asyncio.run(serve(servers(home)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
