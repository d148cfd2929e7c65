"""What passes on the sites' port and on loopback, and how requests for messages are held."""

import asyncio
import base64
import hashlib
import io
import time
import zipfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from fedvision.wire.bundle import bundle
from fedvision_server.home import ServerHome
from fedvision_server.site_records import load_records
from fedvision_server.superlink import (
    FLEET_STACK,
    PATHS,
    RUNTIME_STACK,
    Bell,
    EnrolledSites,
    fleet_app,
    flower_app,
    loopback_app,
    secret_file,
    stack,
)
from tests.homes import World

PULL, PUSH = "/v1/fleet/pull-messages", "/v1/fleet/push-object"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> ServerHome:
    world = World(tmp_path_factory.mktemp("world"))
    assert world.found() == 0
    for name in ("aachen", "bergen"):
        world.member(name)
    return world.server


class Flower:
    """Stands for Flower's app: notes what reaches it, answers with a body."""

    def __init__(self, body: bytes = b"flower") -> None:
        self.paths: list[str] = []
        self.body = body

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.paths.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": self.body})


async def ask(
    app: Any, path: str, headers: dict[str, bytes], peer: str | None = "", method: str = "POST"
) -> int:
    """Return the status of a request."""
    statuses: list[int] = []

    async def send(event: Any) -> None:
        if event["type"] == "http.response.start":
            statuses.append(event["status"])

    scope = {
        "type": "http",
        "path": path,
        "method": method,
        "headers": [(key.encode(), value) for key, value in headers.items()],
        "fedvision.peer": peer,
    }
    await app(scope, None, send)
    return statuses[0]


def node_header(server: ServerHome, name: str, length: bytes = b"10") -> dict[str, bytes]:
    key = bytes.fromhex(load_records(server)[name].node_key)
    return {"flwr-public-key": base64.b64encode(key), "content-length": length}


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work())


def test_an_enrolled_site_reaches_what_a_worker_needs_and_nothing_else(server: ServerHome) -> None:
    flower = Flower()
    peer, headers = load_records(server)["aachen"].fingerprint, node_header(server, "aachen")

    async def work() -> None:
        app = fleet_app(flower, EnrolledSites(server), Bell(0.01), Bell(0.01))
        for path in PATHS:
            assert await ask(app, path, headers, peer) == 200
        for path in (
            "/v1/fleet/register-node",
            "/v1/fleet/unregister-node",
            "/v1/fleet/get-fab",
            "/v1/fleet/../control/start-run",
            "/v1/control/start-run",
            "/v1/control/list-nodes",
            "/v1/runtime/acquire-task",
            "/v1/runtime/push-messages",
            "/health",
            "/docs",
            "/openapi.json",
            "/",
            "",
        ):
            assert await ask(app, path, headers, peer) == 404, path
        assert await ask(app, PULL, headers, peer, "GET") == 404
        await app({"type": "websocket", "path": PULL}, None, None)

    run(work)
    assert set(flower.paths) == PATHS


def test_who_is_not_enrolled_or_bears_anothers_key_gets_nothing(server: ServerHome) -> None:
    flower, records = Flower(), load_records(server)
    own = node_header(server, "aachen")

    async def work() -> None:
        app = fleet_app(flower, EnrolledSites(server), Bell(0.01), Bell(0.01))
        for peer in ("", None, "0" * 64, records["aachen"].fingerprint.upper()):
            assert await ask(app, PULL, own, peer) == 403
        assert await ask(app, PULL, node_header(server, "bergen"), records["aachen"].fingerprint) == 403
        peer = records["aachen"].fingerprint
        for wrong in ({}, {"flwr-public-key": b"%%%"}, {"flwr-public-key": b""}):
            assert await ask(app, PULL, {"content-length": b"1", **wrong}, peer) == 403
        for length in (b"-1", b"99999999999", b"x"):
            assert await ask(app, PULL, node_header(server, "aachen", length), peer) in (403, 413)
        without = {key: value for key, value in own.items() if key != "content-length"}
        assert await ask(app, PULL, without, peer) == 413

    run(work)
    assert flower.paths == []


def test_a_revoked_site_is_shut_out_within_a_moment_and_a_damaged_record_shuts_all_out(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    assert world.found() == 0
    for name in ("aachen", "bergen"):
        world.member(name)
    sites, records = EnrolledSites(world.server), load_records(world.server)
    sites.PAUSE_S = 0.0
    aachen, bergen = (records[name].fingerprint for name in ("aachen", "bergen"))
    assert sites.node_key(aachen) == bytes.fromhex(records["aachen"].node_key)
    assert world.revoke("aachen") == 0
    assert sites.node_key(aachen) is None
    assert sites.node_key(bergen) is not None
    path = world.server.sites / "aachen.json"
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    assert sites.node_key(bergen) is None
    path.write_bytes(content)
    assert sites.node_key(bergen) is not None


def test_on_loopback_everything_but_the_runtime_interface_wants_the_secret() -> None:
    flower = Flower()

    async def work() -> None:
        app = loopback_app(flower, flower, "s3cret", Bell(0.01), Bell(0.01))
        for path in ("/v1/control/start-run", "/v1/fleet/pull-messages", "/health", "/docs", "/v1/runtime"):
            for headers in ({}, {"authorization": b"Bearer "}, {"authorization": b"Bearer s3cret2"}):
                assert await ask(app, path, headers) == 401
            assert await ask(app, path, {"authorization": b"Bearer s3cret"}) == 200
        assert await ask(app, "/v1/runtime/acquire-task", {}) == 200

    run(work)


def test_the_secret_is_made_once_and_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "flower" / "control.secret"
    secret = secret_file(path)
    assert len(secret) == 64
    assert secret_file(path) == secret
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_request_for_messages_is_held_until_one_comes() -> None:
    async def work() -> None:
        flower, bell = Flower(b""), Bell(0.4)
        started = time.monotonic()

        async def pull(who: str) -> float:
            async def send(event: Any) -> None:
                pass

            await bell.answered(flower, {"path": PULL}, None, send, who)
            return time.monotonic() - started

        assert await pull("a") < 0.2  # the first is answered at once, and finds nothing
        assert 0.35 < await pull("a") < 1.0  # so the next waits for its patience
        waiting = asyncio.ensure_future(pull("a"))
        await asyncio.sleep(0.1)
        started = time.monotonic()
        bell.ring()
        assert await waiting < 0.3
        assert await pull("b") < 0.6  # another one has not heard of it yet

    run(work)


def test_who_got_a_message_asks_for_the_next_at_once() -> None:
    async def work() -> None:
        flower, bell = Flower(b"a message that is longer"), Bell(5.0)

        async def send(event: Any) -> None:
            pass

        started = time.monotonic()
        for _ in range(3):
            await bell.answered(flower, {"path": PULL}, None, send, "a")
        assert time.monotonic() - started < 2.0

    run(work)


def test_a_message_wakes_the_other_side(server: ServerHome) -> None:
    peer, headers = load_records(server)["aachen"].fingerprint, node_header(server, "aachen")

    async def work() -> None:
        to_sites, to_server = Bell(10.0), Bell(10.0)
        fleet = fleet_app(Flower(b""), EnrolledSites(server), to_sites, to_server)
        loopback = loopback_app(Flower(b""), Flower(b""), "s", to_sites, to_server)
        await ask(fleet, PULL, headers, peer)
        await ask(loopback, "/v1/runtime/pull-messages", {})
        started = time.monotonic()
        held = asyncio.ensure_future(ask(fleet, PULL, headers, peer))
        await asyncio.sleep(0.05)
        assert not held.done()
        await ask(loopback, "/v1/runtime/push-object", {})
        await held
        held = asyncio.ensure_future(ask(loopback, "/v1/runtime/pull-messages", {}))
        await asyncio.sleep(0.05)
        assert not held.done()
        await ask(fleet, PUSH, headers, peer)
        await held
        assert time.monotonic() - started < 5.0

    run(work)


def test_flowers_app_keeps_the_middlewares_that_check_nodes(server: ServerHome) -> None:
    app = flower_app(server, 1)
    stack(app, FLEET_STACK), stack(app, RUNTIME_STACK)
    names = [one.cls.__name__ for one in app.user_middleware]
    assert {"ControlAuthenticationMiddleware", "NodeAuthMiddleware"} <= set(names)
    with pytest.raises(RuntimeError):
        stack(app, ("NodeAuthMiddleware", "BaseHTTPMiddleware"))
    with pytest.raises(RuntimeError):
        stack(app, ("NoSuchMiddleware",))


def test_the_bundle_for_flower_holds_no_code() -> None:
    digest, content = bundle()
    assert hashlib.sha256(content).hexdigest() == digest
    assert sorted(zipfile.ZipFile(io.BytesIO(content)).namelist()) == [".info/CONTENT", "pyproject.toml"]
