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
from fedvision.wire.parcels import SERVER_PULL, SERVER_PUSH, SITE_PULL, SITE_PUSH
from fedvision_server.fleet_bell import Bell
from fedvision_server.home import ServerHome
from fedvision_server.site_records import load_records
from fedvision_server.superlink import (
    FLEET_STACK,
    LARGEST,
    PATHS,
    RUNTIME_STACK,
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
    await app(scope, body_then_nothing(), send)
    return statuses[0]


def body_then_nothing(body: bytes = b"") -> Callable[[], Coroutine[Any, Any, Any]]:
    """Return what gives an app the body of a request, and then waits for the client to hang up."""
    is_read = False

    async def receive() -> Any:
        nonlocal is_read
        if is_read:
            await asyncio.sleep(60)
        is_read = True
        return {"type": "http.request", "body": body}

    return receive


def node_header(server: ServerHome, name: str, length: bytes = b"10") -> dict[str, bytes]:
    key = bytes.fromhex(load_records(server)[name].node_key)
    return {"flwr-public-key": base64.b64encode(key), "content-length": length}


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work())


def test_an_enrolled_site_reaches_what_a_worker_needs_and_nothing_else(server: ServerHome) -> None:
    flower, parcels = Flower(), Flower()
    peer, headers = load_records(server)["aachen"].fingerprint, node_header(server, "aachen")

    async def work() -> None:
        app = fleet_app(flower, parcels, EnrolledSites(server), Bell(0.01), Bell(0.01))
        for path in LARGEST:
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
            SERVER_PULL,
            SERVER_PUSH,
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
    assert set(parcels.paths) == {SITE_PULL, SITE_PUSH}


def test_who_is_not_enrolled_or_bears_anothers_key_gets_nothing(server: ServerHome) -> None:
    flower, records = Flower(), load_records(server)
    own = node_header(server, "aachen")

    async def work() -> None:
        app = fleet_app(flower, flower, EnrolledSites(server), Bell(0.01), Bell(0.01))
        for peer in ("", None, "0" * 64, records["aachen"].fingerprint.upper()):
            for path in (PULL, SITE_PULL, SITE_PUSH):
                assert await ask(app, path, own, peer) == 403
        assert await ask(app, SITE_PUSH, node_header(server, "bergen"), records["aachen"].fingerprint) == 403
        assert await ask(app, PULL, node_header(server, "bergen"), records["aachen"].fingerprint) == 403
        peer = records["aachen"].fingerprint
        for wrong in ({}, {"flwr-public-key": b"%%%"}, {"flwr-public-key": b""}):
            assert await ask(app, PULL, {"content-length": b"1", **wrong}, peer) == 403
        for length in (b"-1", b"99999999999", b"x"):
            assert await ask(app, PULL, node_header(server, "aachen", length), peer) in (403, 413)
        for path in LARGEST:
            assert (
                await ask(app, path, node_header(server, "aachen", b"%d" % (LARGEST[path] + 1)), peer) == 413
            )
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
        app = loopback_app(flower, flower, flower, "s3cret", Bell(0.01), Bell(0.01))
        for path in ("/v1/control/start-run", PULL, SITE_PULL, SITE_PUSH, "/health", "/docs", "/v1/runtime"):
            for headers in ({}, {"authorization": b"Bearer "}, {"authorization": b"Bearer s3cret2"}):
                assert await ask(app, path, headers) == 401
            assert await ask(app, path, {"authorization": b"Bearer s3cret"}) == 200
        for path in ("/v1/runtime/acquire-task", SERVER_PULL, SERVER_PUSH):  # these want a task's token
            assert await ask(app, path, {}) == 200

    run(work)


def test_the_secret_is_made_once_and_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "flower" / "control.secret"
    secret = secret_file(path)
    assert len(secret) == 64
    assert secret_file(path) == secret
    assert path.stat().st_mode & 0o777 == 0o600


class Box:
    """Stands for Flower's app: hands out what is in it, once."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        found = self.messages.pop() if self.messages else b""
        await send({"type": "http.response.body", "body": found})


async def held(bell: Bell, box: Box, receive: Any = None) -> bytes | None:
    """Return the answer to a request for messages, None if there is none at all."""
    events: list[Any] = []

    async def send(event: Any) -> None:
        events.append(event)

    await bell.answered(box, {"path": PULL}, receive or body_then_nothing(b"asked"), send)
    return b"".join(event.get("body", b"") for event in events) if events else None


def test_a_request_for_messages_is_held_until_one_comes() -> None:
    async def work() -> None:
        box, bell = Box(), Bell(5.0)
        waiting = asyncio.ensure_future(held(bell, box))
        await asyncio.sleep(0.1)
        bell.ring()  # for somebody else
        await asyncio.sleep(0.1)
        assert not waiting.done()
        box.messages.append(b"a message that is long")
        bell.ring()
        started = time.monotonic()
        assert await waiting == b"a message that is long"
        assert time.monotonic() - started < 2.0
        assert box.bodies == [b"asked"] * 3

    run(work)


def test_a_message_that_is_there_is_handed_over_at_once() -> None:
    async def work() -> None:
        box, bell = Box(), Bell(60.0)
        box.messages = [b"the second message", b"the first message"]
        started = time.monotonic()
        assert await held(bell, box) == b"the first message"
        assert await held(bell, box) == b"the second message"
        assert time.monotonic() - started < 2.0

    run(work)


def test_patience_ends_with_an_empty_answer() -> None:
    async def work() -> None:
        box, started = Box(), time.monotonic()
        assert await held(Bell(0.3), box) == b""
        assert 0.25 < time.monotonic() - started < 3.0
        assert len(box.bodies) == 1

    run(work)


def test_who_hung_up_takes_no_message() -> None:
    async def work() -> None:
        box, bell = Box(), Bell(60.0)
        parts = [b"as", b"ked"]

        async def receive() -> Any:
            if parts:
                return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
            await asyncio.sleep(0.1)
            return {"type": "http.disconnect"}

        assert await held(bell, box, receive) is None
        assert box.bodies == [b"asked"]
        box.messages.append(b"a message that is long")
        bell.ring()
        await asyncio.sleep(0.1)
        assert box.messages

    run(work)


def test_a_message_wakes_the_other_side(server: ServerHome) -> None:
    peer, headers = load_records(server)["aachen"].fingerprint, node_header(server, "aachen")

    async def work() -> None:
        to_sites, to_server = Bell(10.0), Bell(10.0)
        one, two = Box(), Box()
        fleet = fleet_app(one, one, EnrolledSites(server), to_sites, to_server)
        loopback = loopback_app(two, two, two, "s", to_sites, to_server)
        started = time.monotonic()
        for path in (PULL, SITE_PULL):
            waiting = asyncio.ensure_future(ask(fleet, path, headers, peer))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            one.messages.append(b"a message that is long")
            await ask(loopback, "/v1/runtime/push-object", {})
            await waiting
        for path in ("/v1/runtime/pull-messages", SERVER_PULL):
            waiting = asyncio.ensure_future(ask(loopback, path, {}))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            await ask(fleet, PUSH, headers, peer)  # takes nothing
            two.messages.append(b"an answer that is long")
            await ask(fleet, PUSH, headers, peer)
            await waiting
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
