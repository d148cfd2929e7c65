"""Parcels, between a real SuperLink, the sites' connections and the ServerApp's Grid, all in this process."""

import asyncio
import base64
import contextlib
import dataclasses
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.recorddict_pb2 import BytesList
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from flwr.supercore.constant import TASK_TOKEN_HEADER
from flwr.supercore.corestate.sql_corestate import SqlCoreState
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from fedvision.secagg import certificates
from fedvision.wire.parcels import MOST_PARTS, SITE_ROOM, opened, parcel, that_fit
from fedvision_server.control import Control
from fedvision_server.fleet_grid import ParcelGrid
from fedvision_server.superlink import flower_app, secret_file, serve, servers
from fedvision_sites.fleet import Fleet
from tests.homes import World

NAMES = ("aachen", "bergen")


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Recorder:
    """Notes which paths Flower's client asks."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def intercept(self, context: Any, call_next: Any) -> httpx.Response:
        self.paths.append(context.request.url.path)
        return call_next(context)


def record(client: Any) -> Recorder:
    recorder = Recorder()
    client._interceptors = (recorder, *client._interceptors)
    return recorder


class SuperLink:
    """A SuperLink that serves, with two sites registered and a run that a ServerApp works at."""

    def __init__(self, folder: Path) -> None:
        self.world = World(folder)
        fleet, control, health = free_ports(3)
        assert self.world.found(f"localhost:{fleet}") == 0
        for name in NAMES:
            self.world.member(name)
        home = self.home = self.world.server
        home.flower.mkdir(mode=0o700, exist_ok=True)
        text = home.config.read_text()
        for before, after in (("control_port = 9093", control), ("health_port = 9094", health)):
            assert before in text
            text = text.replace(before, f"{before.split(' =')[0]} = {after}")
        home.config.write_text(text)
        self.address, self.port = f"localhost:{fleet}", control
        self.both = servers(home)
        self.thread = threading.Thread(target=lambda: asyncio.run(serve(self.both)), daemon=True)
        self.thread.start()
        self.state = flower_app(home, control).state.linkstate_factory.state()
        self.control = Control(control, secret_file(home.flower / "control.secret"))
        until = time.monotonic() + 30
        while not self.control.is_there():
            assert time.monotonic() < until
            time.sleep(0.05)
        for name in NAMES:
            self.control.register(self.public_key(name))
        self.start_run()

    def public_key(self, name: str) -> bytes:
        from fedvision_server.site_records import load_records

        return bytes.fromhex(load_records(self.home)[name].node_key)

    def start_run(self) -> None:
        self.run = self.control.start("0001-test")
        (task,) = self.state.get_tasks(run_ids=[self.run])
        self.task = task.task_id
        self.token = self.state.claim_task(task.task_id)
        assert self.token and self.state.activate_task(task.task_id)
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = task.task_id, self.run, 1

    def fleet(self, name: str) -> Fleet:
        home = self.world.site(name)
        context = certificates.client_context(
            certificate=home.tls_cert, key=home.tls_key, authority=home.ca_cert
        )
        return Fleet(self.address, context, certificates.read_private(home.node_key), threading.Event())

    def grid(self, token: str = "") -> HttpGrid:
        grid = HttpGrid(f"127.0.0.1:{self.port}", insecure=True, token=token or self.token or "")
        grid.set_run(self.state.get_run_info(run_ids=[self.run])[0])
        return grid

    def rows(self) -> tuple[int, int, int]:
        """Return how many messages, answers and objects there are."""
        state = self.state
        return state.num_message_ins(), state.num_message_res(), len(state.object_store)

    def close(self) -> None:
        self.control.close()
        for one in self.both:
            one.should_exit = True
        self.thread.join(20)


def ask_and_be_dropped(fleet: Fleet) -> None:
    with contextlib.suppress(httpx.HTTPError):
        fleet.receive()


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    made = SuperLink(tmp_path_factory.mktemp("superlink"))
    yield made
    held = made.fleet("aachen")
    with held:
        waiting = threading.Thread(target=ask_and_be_dropped, args=(held,), daemon=True)
        waiting.start()
        time.sleep(0.3)
        started = time.monotonic()
        made.close()
        assert time.monotonic() - started < 10  # a request that is held does not hold up the end


@dataclasses.dataclass
class Stage:
    """A ServerApp's grid and two sites that are connected, with what each of them asks for."""

    superlink: SuperLink
    grid: ParcelGrid
    sites: dict[str, Fleet]

    def __post_init__(self) -> None:
        self.by_server = record(self.grid._client)
        self.by_site = {name: record(fleet._client) for name, fleet in self.sites.items()}

    def node(self, name: str) -> int:
        return int(self.sites[name]._node.node_id)

    def message(self, name: str, content: RecordDict) -> Message:
        return Message(content, dst_node_id=self.node(name), message_type="query.secure")

    def answer(self, name: str, asked: Message, content: RecordDict) -> Message:
        """Return an answer as it is made in a site's process."""
        TaskIdentity._node_id = self.node(name)
        try:
            return Message(content, reply_to=asked)
        finally:
            TaskIdentity._node_id = 1

    def to_site(self, name: str, content: RecordDict) -> Message:
        """Carry a message to a site."""
        (number,) = self.grid.push_messages([self.message(name, content)])
        found = self.sites[name].receive()
        assert found is not None and found.metadata.message_id == number
        return found

    def back(self, asked: Message) -> RecordDict:
        """Fetch the answer to a message."""
        until = time.monotonic() + 20
        while time.monotonic() < until:
            for found in self.grid.pull_messages([asked.metadata.message_id]):
                assert not found.has_error()
                return found.content
        raise AssertionError("no answer")


@pytest.fixture
def stage(superlink: SuperLink, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1, raising=False)
    superlink.start_run()
    first, second = (superlink.fleet(name) for name in NAMES)
    with first, second:
        made = Stage(superlink, ParcelGrid(superlink.grid()), {"aachen": first, "bergen": second})
        for recorder in made.by_site.values():
            recorder.paths.clear()
        yield made
    if superlink.run in superlink.control.unfinished():
        superlink.control.stop(superlink.run)


def content(size: int = 0, name: str = "weights") -> RecordDict:
    """Return a record with a random array of a size in bytes, with none if it is 0."""
    found = RecordDict({"message": ConfigRecord({"round": 3, "blob": os.urandom(1000)})})
    if size:
        array = Array(np.frombuffer(os.urandom(size), dtype=np.uint8))
        found["arrays"] = ArrayRecord({name: array})
    return found


def same(left: RecordDict, right: RecordDict) -> bool:
    arrays = [
        {key: value.data for key, value in dict(one.get("arrays", ArrayRecord())).items()}
        for one in (left, right)
    ]
    return dict(left["message"]) == dict(right["message"]) and arrays[0] == arrays[1]


def test_a_small_message_and_its_answer_are_one_request_at_each_end_and_leave_nothing(stage: Stage) -> None:
    asked = [content() for _ in NAMES]
    messages = [stage.message(name, one) for name, one in zip(NAMES, asked, strict=True)]
    numbers = stage.grid.push_messages(messages)
    for name, sent in zip(NAMES, asked, strict=True):
        received = stage.sites[name].receive()
        assert received is not None and same(received.content, sent)
        stage.sites[name].send(stage.answer(name, received, sent), 0.1)
    answers = stage.grid.pull_messages(numbers)
    assert {one.metadata.reply_to_message_id for one in answers} == set(numbers)
    assert all(any(same(one.content, sent) for sent in asked) for one in answers)
    assert stage.by_server.paths == ["/fedvision/server/push", "/fedvision/server/pull"]
    for recorder in stage.by_site.values():
        assert recorder.paths == ["/fedvision/site/pull", "/fedvision/site/push"]
    assert stage.superlink.rows() == (0, 0, 0)


@pytest.mark.parametrize("size", [300_000, SITE_ROOM - 10_000, SITE_ROOM + 1, 11_000_000])
def test_a_vector_of_any_size_arrives_both_ways_and_leaves_nothing(stage: Stage, size: int) -> None:
    there, back = content(size), content(size, "update")
    asked = stage.to_site("aachen", there)
    assert same(asked.content, there)
    stage.sites["aachen"].send(stage.answer("aachen", asked, back), 0.1)
    assert same(stage.back(asked), back)
    paths = set(stage.by_site["aachen"].paths) - {"/fedvision/site/pull", "/fedvision/site/push"}
    by_flower = {"/v1/fleet/" + name for name in ("pull-object", "push-object", "confirm-message-received")}
    assert paths == (set() if size < SITE_ROOM else by_flower)
    assert stage.superlink.rows() == (0, 0, 0)


def test_weights_for_all_sites_are_sent_and_stored_once(stage: Stage) -> None:
    weights = ArrayRecord({"weights": Array(np.frombuffer(os.urandom(9_000_000), dtype=np.uint8))})
    records = [RecordDict({"message": ConfigRecord({"site": name}), "arrays": weights}) for name in NAMES]
    stage.grid.push_messages([stage.message(name, one) for name, one in zip(NAMES, records, strict=True)])
    assert stage.by_server.paths.count("/v1/runtime/push-object") == 1  # the other chunk is in the parcel
    for name, sent in zip(NAMES, records, strict=True):
        received = stage.sites[name].receive()
        assert received is not None and same(received.content, sent)
    assert stage.superlink.rows()[2] == 0


def test_a_request_for_messages_is_answered_when_one_comes(stage: Stage) -> None:
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(stage.sites["bergen"].receive()))
    started = time.monotonic()
    waiting.start()
    time.sleep(0.3)
    assert not found
    sent = content()
    stage.grid.push_messages([stage.message("bergen", sent)])
    waiting.join(10)
    assert same(found[0].content, sent) and time.monotonic() - started < 5
    assert stage.by_site["bergen"].paths == ["/fedvision/site/pull"]


def test_a_message_is_not_lost_on_a_site_that_hung_up(stage: Stage) -> None:
    gone = stage.superlink.fleet("bergen")
    gone._node = stage.sites["bergen"]._node
    gone._client._client.timeout = 0.2
    with pytest.raises(httpx.ReadTimeout):
        gone.receive()
    gone._client.close()
    time.sleep(0.2)
    sent = content()
    stage.grid.push_messages([stage.message("bergen", sent)])
    time.sleep(0.3)
    received = stage.sites["bergen"].receive()
    assert received is not None and same(received.content, sent)


def test_an_answer_that_is_sent_again_arrives_once(stage: Stage) -> None:
    asked = stage.to_site("aachen", content())
    back = stage.answer("aachen", asked, content())
    for _ in range(2):  # the first time the server's word was lost
        stage.sites["aachen"].send(back, 0.1)
    assert len(stage.grid.pull_messages([asked.metadata.message_id])) == 1
    stage.sites["aachen"].send(back, 0.1)
    assert stage.superlink.rows() == (0, 0, 0)


def test_flowers_own_paths_take_what_came_in_parcels_and_the_other_way(stage: Stage) -> None:
    sent, grid = content(), stage.superlink.grid()
    stage.grid.push_messages([stage.message("aachen", sent)])
    response = stage.sites["aachen"]._client.PullMessages(
        PullMessagesRequest(node=stage.sites["aachen"]._node)
    )
    assert len(response.messages_list) == 1
    (number,) = grid.push_messages([stage.message("bergen", sent)])
    received = stage.sites["bergen"].receive()
    assert received is not None and same(received.content, sent)
    stage.sites["bergen"].send(stage.answer("bergen", received, sent), 0.1)
    (answer,) = grid.pull_messages([number])
    assert same(answer.content, sent)


def pushed(stage: Stage, name: str, head: PushMessagesRequest, *contents: bytes) -> int:
    """Return the status that a parcel of a site gets."""
    try:
        stage.sites[name]._client.push_parcel(parcel(head, contents))
    except httpx.HTTPStatusError as error:
        return int(error.response.status_code)
    return 200


def head_of(message: Message, node: int) -> PushMessagesRequest:
    message.metadata.__dict__["_message_id"] = message.object_id
    return PushMessagesRequest(
        node=Node(node_id=node),
        messages_list=[message_to_proto(remove_content_from_message(message))],
        message_object_trees=[get_object_tree(message)],
    )


def test_a_site_answers_in_its_own_name_only(stage: Stage) -> None:
    asked = stage.to_site("aachen", content())
    own, other = stage.node("aachen"), stage.node("bergen")
    answer = stage.answer("aachen", asked, content())
    assert pushed(stage, "bergen", head_of(answer, own)) == 401
    assert pushed(stage, "bergen", head_of(answer, other)) == 400
    head = head_of(answer, own)
    head.messages_list.append(head.messages_list[0])
    assert pushed(stage, "aachen", head) == 400
    head = head_of(answer, own)
    del head.message_object_trees[:]
    assert pushed(stage, "aachen", head) == 400
    assert pushed(stage, "aachen", PushMessagesRequest(node=Node(node_id=own))) == 400
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        stage.sites["bergen"]._client.pull_parcel(PullMessagesRequest(node=Node(node_id=own)))
    assert stage.superlink.rows()[1] == 0
    assert pushed(stage, "aachen", head_of(answer, own)) == 200


def test_a_parcel_that_cannot_be_read_is_refused(stage: Stage) -> None:
    own = PushMessagesRequest(node=Node(node_id=stage.node("aachen")))
    assert pushed(stage, "aachen", own, *[b""] * MOST_PARTS) == 400
    url = f"https://{stage.superlink.address}/fedvision/site/"
    client = stage.sites["aachen"]._client._client
    header = {"flwr-public-key": base64.b64encode(stage.superlink.public_key("aachen")).decode()}
    assert client.post(url + "push", content=b"\xff" * 50, headers=header).status_code == 400
    assert client.post(url + "pull", content=b"\xff" * 50, headers=header).status_code == 400
    assert client.post(url + "pull", content=bytes(70_000), headers=header).status_code == 413
    assert client.post(url + "push", content=bytes(5 << 20), headers=header).status_code == 413
    assert client.post(url + "push", content=b"").status_code == 403


def test_objects_that_the_message_does_not_have_are_not_stored(stage: Stage) -> None:
    asked = stage.to_site("aachen", content())
    answer = stage.answer("aachen", asked, content())
    assert pushed(stage, "aachen", head_of(answer, stage.node("aachen")), b"x" * 1000) == 200
    assert stage.superlink.rows() == (1, 1, 3)
    assert all(not stage.superlink.state.object_store.get(part) for part in parts_of(answer))


def parts_of(message: Message) -> list[str]:
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

    return [part.object_id for part in iterate_object_tree(get_object_tree(message))]


@pytest.mark.parametrize("is_answer", [True, False])
def test_when_the_run_is_over_nothing_passes_and_what_was_under_way_is_deleted(
    stage: Stage, is_answer: bool
) -> None:
    asked = stage.to_site("aachen", content())
    stage.grid.push_messages([stage.message("bergen", content())])
    answer = stage.answer("aachen", asked, content())
    assert stage.superlink.rows()[0] == 2
    stage.superlink.state.finish_task(stage.superlink.task, "completed", "")
    if is_answer:
        assert pushed(stage, "aachen", head_of(answer, stage.node("aachen"))) == 403
    else:
        with pytest.raises(httpx.HTTPStatusError, match="403"):
            stage.sites["bergen"].receive()
    assert stage.superlink.rows() == (0, 0, 0)
    assert server_push(stage, stage.superlink.token or "") in (401, 403)


def test_a_sites_parcel_is_stored_as_a_whole_or_not_at_all(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = stage.to_site("aachen", content())
    answer = stage.answer("aachen", asked, content())

    def fail(*arguments: Any) -> bool:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(SqlCoreState, "store_object", fail)
        with pytest.raises(httpx.HTTPStatusError, match="500"):
            stage.sites["aachen"].send(answer, 0.1)
        assert stage.superlink.rows() == (1, 0, 0)
    stage.sites["aachen"].send(answer, 0.1)
    assert len(stage.grid.pull_messages([asked.metadata.message_id])) == 1


def server_push(stage: Stage, token: str) -> int:
    """Return the status that a message of the ServerApp gets; Flower's client would end this process."""
    message = stage.message("aachen", content())
    message.metadata.__dict__["_message_id"] = message.object_id
    head = PushAppMessagesRequest(
        messages_list=[message_to_proto(remove_content_from_message(message))],
        message_object_trees=[get_object_tree(message)],
    )
    return httpx.post(
        f"http://127.0.0.1:{stage.superlink.port}/fedvision/server/push",
        content=parcel(head, []).SerializeToString(),
        headers={"content-type": "application/protobuf", TASK_TOKEN_HEADER: token},
    ).status_code


def test_the_servers_parcels_want_the_token_of_a_task(stage: Stage) -> None:
    for token in ("", "x" * 43):
        assert server_push(stage, token) in (401, 403)
        pull = f"http://127.0.0.1:{stage.superlink.port}/fedvision/server/pull"
        assert httpx.post(pull, content=b"", headers={TASK_TOKEN_HEADER: token}).status_code in (401, 403)
    assert stage.superlink.rows()[0] == 0
    assert server_push(stage, stage.superlink.token or "") == 200


def test_a_parcel_opens_to_what_was_put_in() -> None:
    head = PullMessagesRequest(node=Node(node_id=7))
    found, contents = opened(parcel(head, [b"a", b""]), PullMessagesRequest)
    assert found == head
    assert sorted(contents.values()) == [b"", b"a"] and all(len(name) == 64 for name in contents)
    assert opened(BytesList(), PullMessagesRequest) == (PullMessagesRequest(), {})
    with pytest.raises(ValueError, match="parts"):
        opened(BytesList(vals=[b""] * (MOST_PARTS + 1)), PullMessagesRequest)


def test_what_fits_into_a_parcel_is_at_most_its_room() -> None:
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    objects = get_all_nested_objects(content(500_000))
    whole = that_fit(objects, SITE_ROOM)
    assert len(whole) == len(objects)
    assert 0 < len(that_fit(objects, 100_000)) < len(objects)
    for room in range(0, 3000, 100):
        assert sum(map(len, that_fit(objects, room))) <= room
