"""What passes between Flower's SuperNode and the server, and how a message is answered without the worker."""

import asyncio
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import RecordDict
from flwr.common.config import get_fab_config, get_metadata_from_config
from flwr.proto.fab_pb2 import GetFabRequest, GetFabResponse
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest, GetRunResponse, Run
from flwr.supercore.control.control_http_client import ControlHttpClient

from fedvision.audit.log import AuditLog, read_log
from fedvision.secagg import identity
from fedvision.secagg.certificates import parse_private
from fedvision.secagg.issuing import new_node_key
from fedvision.secagg.ssh_key import ssh_private
from fedvision.storage import read_lines
from fedvision.wire.bundle import ENVIRONMENT, NAME, VERSION, bundle
from fedvision.wire.envelope import SERVER, Seal, open_seal, sealed
from fedvision.wire.messages import Refusal, SecureRequest
from fedvision.wire.records import pack, unpack
from fedvision_server import control, superlink
from fedvision_server.home import ServerHome
from fedvision_sites import stock
from fedvision_sites.home import SiteHome
from fedvision_sites.relay import FLEET, GET_FAB, GET_RUN, PATHS, PULL, Relay
from tests.homes import World
from tests.tls_peers import Authority

OWN = {"fab_id": NAME, "fab_version": VERSION, "fab_hash": bundle()[0], "series_id": 3}
HEADERS = {"flwr-public-key": "a2V5", "flwr-timestamp": "now", "host": "127.0.0.1:1", "connection": "close"}


class Server:
    """Stands for the coordinator's fleet port: notes what reaches it, and has messages and runs."""

    def __init__(self, **runs: Any) -> None:
        self.requests: list[httpx.Request] = []
        self.messages: list[int] = []
        self.runs: dict[int, Run] = {}
        self.status: dict[str, int] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        path = request.url.path
        if self.status.get(path, 200) != 200:
            return httpx.Response(self.status[path], text="no")
        if path == PULL:
            numbers, self.messages = self.messages[:1], self.messages[1:]
            found = [Message(metadata=Metadata(run_id=number)) for number in numbers]
            return httpx.Response(200, content=PullMessagesResponse(messages_list=found).SerializeToString())
        if path == GET_RUN:
            run = self.runs[GetRunRequest.FromString(request.content).run_id]
            return httpx.Response(200, content=GetRunResponse(run=run).SerializeToString())
        return httpx.Response(200, content=b"done")

    @property
    def paths(self) -> list[str]:
        return [request.url.path for request in self.requests]


class Stage:
    """A relay before a server."""

    def __init__(self) -> None:
        self.server = Server()
        self.told: list[str] = []
        self.refused: list[tuple[int, str]] = []
        client = httpx.AsyncClient(transport=httpx.MockTransport(self.server), base_url="https://server")
        self.relay = Relay(client, self.told.append, lambda run, digest: self.refused.append((run, digest)))

    async def ask(self, path: str, body: bytes = b"x", method: str = "POST") -> tuple[int, bytes]:
        events: list[Any] = []

        async def send(event: Any) -> None:
            events.append(event)

        async def receive() -> Any:
            return {"type": "http.request", "body": body}

        headers = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
        await self.relay({"type": "http", "path": path, "method": method, "headers": headers}, receive, send)
        return events[0]["status"], events[1]["body"]

    async def pull(self) -> list[int]:
        """Return the runs of the messages that a SuperNode gets."""
        status, body = await self.ask(PULL, PullMessagesRequest(node=Node(node_id=5)).SerializeToString())
        if status != 200:
            return [-status]
        return [message.metadata.run_id for message in PullMessagesResponse.FromString(body).messages_list]


def run(work: Callable[[Stage], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work(Stage()))


def test_what_a_supernode_needs_passes_and_nothing_else() -> None:
    async def work(stage: Stage) -> None:
        for path in sorted(PATHS):
            assert await stage.ask(path, b"body") == (200, b"done")
            request = stage.server.requests[-1]
            assert (request.method, request.url.path, request.content) == ("POST", path, b"body")
            assert request.headers["flwr-public-key"] == "a2V5" and request.headers["host"] == "server"
        assert set(stage.server.paths) == PATHS == superlink.PATHS - {PULL, GET_RUN}
        for path in (FLEET + "register-node", "/v1/control/start-run", "/", "", FLEET + "../control/x"):
            assert (await stage.ask(path))[0] == 404
        assert (await stage.ask(FLEET + "push-object", method="GET"))[0] == 404
        assert (await stage.ask(FLEET + "push-object", bytes((32 << 20) + 1)))[0] == 413
        assert len(stage.server.paths) == len(PATHS)

    run(work)


def test_what_a_supernode_learns_about_code_is_the_sites_own() -> None:
    async def work(stage: Stage) -> None:
        stage.server.runs[7] = Run(
            run_id=7, primary_task_type="flwr-agentapp", account_name="x", flwr_aid="y", federation="z", **OWN
        )
        question = GetRunRequest(run_id=7).SerializeToString()
        assert (await stage.ask(GET_RUN, question))[0] == 404  # no message of it came yet
        stage.server.messages = [7, 7]
        assert await stage.pull() == [7]
        assert await stage.pull() == [7]
        found = GetRunResponse.FromString((await stage.ask(GET_RUN, question))[1]).run
        assert (found.run_id, found.series_id, found.fab_hash) == (7, 3, bundle()[0])
        assert (found.primary_task_type, found.account_name, found.flwr_aid) == ("flwr-serverapp", "", "")
        digest, content = bundle()
        fab = GetFabRequest(hash_str=digest, run_id=7).SerializeToString()
        assert GetFabResponse.FromString((await stage.ask(GET_FAB, fab))[1]).fab.content == content
        other = GetFabRequest(hash_str="0" * 64, run_id=7).SerializeToString()
        assert (await stage.ask(GET_FAB, other))[0] == 404
        assert stage.server.paths == [PULL, GET_RUN, PULL]
        asked = GetRunRequest.FromString(stage.server.requests[1].content)
        assert (asked.run_id, asked.node.node_id) == (7, 5)

    run(work)


@pytest.mark.parametrize(
    "change",
    [
        {"fab_hash": "0" * 64},
        {"fab_hash": bundle()[0].upper()},
        {"fab_hash": ""},
        {"fab_id": "fedvision/other"},
        {"fab_version": "0.1.0/../../x"},
        {"run_id": 9},
    ],
)
def test_a_run_with_other_code_is_refused(change: dict[str, Any]) -> None:
    async def work(stage: Stage) -> None:
        stage.server.runs = {7: Run(**{"run_id": 7, **OWN, **change}), 8: Run(run_id=8, **OWN)}
        stage.server.messages = [7, 8, 7]
        assert [await stage.pull() for _ in range(3)] == [[], [8], []]
        assert (await stage.ask(GET_RUN, GetRunRequest(run_id=7).SerializeToString()))[0] == 404
        assert stage.server.paths.count(GET_RUN) == 2
        assert [number for number, _ in stage.refused] == [7]
        assert len(stage.told) == 1 and stage.told[0].startswith("refused: run 7 ")

    run(work)


def test_a_message_is_kept_until_its_run_can_be_looked_up() -> None:
    async def work(stage: Stage) -> None:
        stage.server.runs[7] = Run(run_id=7, **OWN)
        stage.server.messages = [7]
        stage.server.status[GET_RUN] = 503
        assert await stage.pull() == [-503]
        assert await stage.pull() == [-503]
        stage.server.status[GET_RUN] = 200
        assert await stage.pull() == [7]
        assert await stage.pull() == []
        stage.server.messages = [9]
        stage.server.status[GET_RUN] = 403  # the run is over
        assert await stage.pull() == []
        assert stage.refused == []

    run(work)


def test_a_server_that_is_away_or_talks_nonsense_ends_nothing() -> None:
    async def work(stage: Stage) -> None:
        def away(request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("refused")

        server = httpx.AsyncClient(transport=httpx.MockTransport(away), base_url="https://server")
        relay, stage.relay._client = stage.relay._client, server
        assert (await stage.ask(FLEET + "activate-node"))[0] == 503
        assert await stage.pull() == [-503]
        assert stage.told == ["no connection to the server: refused"]
        nonsense = httpx.MockTransport(lambda request: httpx.Response(200, content=b"\xff" * 9))
        stage.relay._client = httpx.AsyncClient(transport=nonsense, base_url="https://server")
        assert await stage.pull() == [-502]
        stage.relay._client = relay
        assert await stage.pull() == []
        assert (await stage.ask(GET_RUN, b"\xff"))[0] == 502

    run(work)


def test_coming_and_going_of_the_supernode_is_seen() -> None:
    async def work(stage: Stage) -> None:
        stage.server.status[FLEET + "activate-node"] = 403
        await stage.ask(FLEET + "activate-node")
        await stage.ask(FLEET + "activate-node")
        assert stage.told == ["the server answers 403: 'no'"]
        assert not stage.relay.is_connected and stage.relay.last_contact == 0
        stage.server.status = {}
        await stage.ask(FLEET + "activate-node")
        assert stage.relay.is_connected and not stage.relay.has_left
        assert time.time() - stage.relay.last_contact < 60
        await stage.ask(FLEET + "deactivate-node")
        assert stage.relay.has_left and not stage.relay.is_connected

    run(work)


def test_the_server_starts_a_run_with_the_bundle_that_a_site_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    def start(self: Any, request: Any) -> Any:
        started.append(request)
        return SimpleNamespace(run_id=7)

    monkeypatch.setattr(ControlHttpClient, "StartRun", start)
    assert control.Control(1, "secret").start("0001-tiny") == 7
    assert (started[0].fab.hash_str, started[0].fab.content) == bundle() == bundle.__wrapped__()
    config = get_fab_config(bundle()[1])
    assert get_metadata_from_config(config) == (NAME, VERSION)
    assert config["tool"]["flwr"]["app"]["components"]["clientapp"] == "fedvision_sites.app:stock"
    assert superlink.ENVIRONMENT == ENVIRONMENT


def test_flower_reads_the_node_key() -> None:
    pem = new_node_key()
    found = load_ssh_private_key(ssh_private(pem), None)
    assert found.private_numbers() == parse_private(pem).private_numbers()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("world"))
    assert made.found() == 0
    made.member("aachen")
    return made


@pytest.fixture
def home(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SiteHome:
    """A site whose messages are answered one by one."""
    copy = SiteHome(Path(shutil.copytree(world.site("aachen").root, tmp_path / "aachen")))
    monkeypatch.setenv(stock.HOME_VARIABLE, str(copy.root))
    return copy


def request(server: ServerHome, number: int) -> RecordDict:
    """Return a sealed request for a job that was never asked for."""
    step = SecureRequest("0" * 64, 1, "0" * 64, "ready", np.zeros(0, np.uint8))
    return sealed(
        pack(step), Seal(SERVER, "aachen", number, "", 0, "0" * 64), identity.load(server.server_key)
    )


def test_each_message_is_answered_as_the_worker_does(world: World, home: SiteHome) -> None:
    own = identity.load(home.identity)
    for number in (5, 6):
        asked = request(world.server, number)
        reply = stock.answer(asked)
        seal, _ = open_seal(reply, own.public)
        assert (seal.sender, seal.receiver, seal.number) == ("aachen", SERVER, number)
        assert isinstance(unpack(reply, Refusal), Refusal)
    for repeated in (request(world.server, 6), request(world.server, 5), RecordDict()):
        assert dict(stock.answer(repeated)) == {}
    assert [line.fields["reason"] for line in read_log(home.audit) if line.kind == "refused"] == [
        "message"
    ] * 3


def test_what_goes_wrong_with_a_message_stays_at_the_site(world: World, home: SiteHome) -> None:
    home.config.write_text("nonsense = [")
    assert dict(stock.answer(request(world.server, 5))) == {}
    (line,) = read_lines(home.root / "log.jsonl")
    assert "ConfigError" in line["failed"]


def test_files_for_flower_are_the_owners_alone_and_made_anew(home: SiteHome) -> None:
    own = AuditLog(home.audit, identity.load(home.identity), "aachen")
    program = stock.Stock(home, own, print)
    folder = home.root / "flower"
    (folder / "apps" / "old").mkdir(parents=True)
    folder.chmod(0o755)
    program._prepare()
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(first) == {"loopback.key", "loopback.crt", "loopback-ca.crt", "node.ssh", "superexec.secret"}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    program._prepare()
    second = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert all(first[name] != second[name] for name in first if name != "node.ssh")
    program._note_refused(7, "x" * 64)
    program._note_refused(8, "0" * 64)
    (line,) = [line for line in read_log(home.audit) if line.kind == "refused"]
    assert line.fields == {"reason": "bundle", "flower_run": "7", "digest": ""}
    assert not program.health().is_ok


def test_the_relay_is_on_loopback_and_shows_a_certificate_of_its_own(home: SiteHome, tmp_path: Path) -> None:
    own = AuditLog(home.audit, identity.load(home.identity), "aachen")
    program = stock.Stock(home, own, print)
    program._prepare()
    with program._served() as address:
        url = f"https://{address}/v1/fleet/get-fab"
        body = GetFabRequest(hash_str=bundle()[0]).SerializeToString()
        tls = ssl.create_default_context(cafile=home.root / "flower" / "loopback-ca.crt")
        found = httpx.post(url, content=body, verify=tls)
        assert GetFabResponse.FromString(found.content).fab.content == bundle()[1]
        other = Authority(tmp_path / "other").server("127.0.0.1").authority
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE"):
            httpx.post(url, content=body, verify=ssl.create_default_context(cafile=other))
    with pytest.raises(httpx.ConnectError):
        httpx.post(url, content=body, verify=tls)


def test_flowers_programs_call_nobody_else_and_load_nothing_from_where_they_run(
    home: SiteHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "example.org")
    folder = home.root / "flower"
    found = stock.environment(home.root, folder)
    assert found.items() >= ENVIRONMENT.items()
    assert (found["FLWR_HOME"], found["NO_PROXY"]) == (str(folder), "example.org,127.0.0.1")
    assert shutil.which("flwr-clientapp", path=found["PATH"].split(os.pathsep)[0])
    folder.mkdir()
    (folder / "flwr.py").write_text("raise SystemExit(7)")
    done = subprocess.run([sys.executable, "-c", "import flwr"], cwd=folder, env=found)
    assert done.returncode == 0
    supernode, superexec = stock.commands(folder, "127.0.0.1:1", 2)
    assert "--insecure" not in supernode + superexec and "127.0.0.1:1" in supernode


def test_programs_that_end_are_started_again_together(
    home: SiteHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = AuditLog(home.audit, identity.load(home.identity), "aachen")
    told: list[str] = []
    stop = threading.Event()
    note = f"open({str(tmp_path / 'starts')!r}, 'a').write(str(os.getpid()) + ' ')"
    stays = [sys.executable, "-c", f"import os, time; {note}; time.sleep(600)"]
    addresses: list[str] = []

    def programs(folder: Path, address: str, port: int) -> list[list[str]]:
        addresses.append(address)
        if len(addresses) == 3:
            stop.set()
        return [stays, [sys.executable, "-c", "import time; time.sleep(1)"]]

    for name, value in (("commands", programs), ("TICK_S", 0.05), ("FIRST_PAUSE_S", 0.05)):
        monkeypatch.setattr(stock, name, value)
    stock.Stock(home, own, told.append).run(stop)
    assert len(addresses) == 3
    assert [line for line in told if "started again" in line] == [told[1], told[2]]
    pids = [int(pid) for pid in (tmp_path / "starts").read_text().split()]
    assert len(pids) >= 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
