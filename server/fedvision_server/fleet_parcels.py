"""Parcels at the SuperLink: Flower's own work on several objects, done for one request (``wire.parcels``).

Rules:
- Who asks is checked as on Flower's paths: a site by its signature with the node key and its node number, the
  ServerApp by the token of its task. Before that, a site's certificate was checked, see ``superlink``.
- A site sends answers in its own name only.
- What is done is Flower's handlers and state, for one parcel at a time. A message of a site is one
  transaction: all of it is stored, or nothing. Where Flower refuses, for example because the run is over,
  what it did until then stays, as on its paths. The ServerApp's parcels have many messages; each of them
  takes a transaction or several, since others wait for the database meanwhile.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from fastapi import HTTPException
from flwr.common.constant import Status
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.recorddict_pb2 import BytesList
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.server.superlink.utils import check_abort
from flwr.supercore.constant import TASK_TOKEN_HEADER
from flwr.supercore.dependencies.task import authenticate_task
from flwr.supercore.error import FlowerError, http_error_translator
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from fedvision.wire.parcels import (
    SERVER_PULL,
    SERVER_PUSH,
    SERVER_ROOM,
    SITE_PULL,
    SITE_PUSH,
    SITE_ROOM,
    opened,
    parcel,
)

NOT_RUNNING = [Status.PENDING, Status.STARTING, Status.FINISHED]
Found = TypeVar("Found")


class Parcels:
    """Answers requests with parcels, one at a time; an ASGI app.

    Args:
        app: Flower's.
        arrived: Is called when all of a parcel is stored, by the path that it came to.
    """

    def __init__(self, app: Any, arrived: Mapping[str, Callable[[], None]]) -> None:
        self._app = app
        self._arrived = arrived
        self._turn = asyncio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        request = Request({**scope, "app": self._app, "state": {}}, receive)
        response = await http_error_translator(request, self._respond)
        await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        path, body = request.url.path, await request.body()
        async with self._turn:
            answer = await run_in_threadpool(ANSWERS[path], request, body)
        if path in self._arrived and not answer.objects_to_push:
            self._arrived[path]()
        return Response(answer.SerializeToString(), media_type=PROTOBUF_MEDIA_TYPE)


def pull_for_site(request: Request, body: bytes) -> BytesList:
    """Hand a site its next message."""
    asked = decoded(lambda: PullMessagesRequest.FromString(body))
    state = as_node(request, asked)
    with one_transaction(state):
        found = fleet_handlers.pull_messages(request=asked, state=state, store=state.object_store)
        runs = {message.metadata.run_id for message in found.messages_list}
        is_over = any(check_abort(run, NOT_RUNNING, state) for run in runs)
        return with_objects(found, state, 0 if is_over else SITE_ROOM)


def push_from_site(request: Request, body: bytes) -> Any:
    """Take a site's answer."""
    head, contents = decoded(lambda: opened(BytesList.FromString(body), PushMessagesRequest))
    state = as_node(request, head)
    if [message.metadata.src_node_id for message in head.messages_list] != [head.node.node_id]:
        raise HTTPException(400, "a site sends one answer, and its own")
    if len(head.message_object_trees) != 1:
        raise HTTPException(400, "a message has one tree of objects")
    with one_transaction(state):
        found = fleet_handlers.push_messages(request=head, state=state)
        return with_the_rest(found, head.messages_list[0].metadata.run_id, contents, state)


def pull_for_server(request: Request, body: bytes) -> BytesList:
    """Hand the ServerApp what has come."""
    asked = decoded(lambda: PullAppMessagesRequest.FromString(body))
    state, task = as_task(request)
    return with_objects(runtime_handlers.pull_messages(asked, state, task), state, SERVER_ROOM)


def push_from_server(request: Request, body: bytes) -> Any:
    """Take messages to sites."""
    head, contents = decoded(lambda: opened(BytesList.FromString(body), PushAppMessagesRequest))
    state, task = as_task(request)
    found = runtime_handlers.push_messages(head, state, task)
    return with_the_rest(found, task.run_id, contents, state)


ANSWERS: dict[str, Callable[[Request, bytes], Any]] = {
    SITE_PULL: pull_for_site,
    SITE_PUSH: push_from_site,
    SERVER_PULL: pull_for_server,
    SERVER_PUSH: push_from_server,
}


def decoded(read: Callable[[], Found]) -> Found:
    """Return what was sent, or refuse what cannot be read."""
    try:
        return read()
    except (DecodeError, ValueError):
        raise HTTPException(400, "a parcel that cannot be read") from None


def as_node(request: Request, asked: Any) -> Any:
    """Return Flower's state, after checking that a site is the node in whose name it asks."""
    request.state.protobuf_request = asked
    authenticate_node(request)
    return request.app.state.linkstate_factory.state()


def as_task(request: Request) -> tuple[Any, Any]:
    """Return Flower's state, and the task whose token was sent."""
    state = request.app.state.linkstate_factory.state()
    return state, authenticate_task(request, request.headers.get(TASK_TOKEN_HEADER), state)


@contextlib.contextmanager
def one_transaction(state: Any) -> Iterator[None]:
    """Have Flower's state store all that is done meanwhile at once."""
    refused: FlowerError | None = None
    with state.session():
        try:
            yield
        except FlowerError as error:
            refused = error
    if refused is not None:
        raise refused


def with_objects(found: Any, state: Any, room: int) -> BytesList:
    """Return a parcel of messages and their objects; messages that are in it as a whole are confirmed."""
    contents: list[bytes] = []
    for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
        with state.session():
            own = objects_of(tree, message.metadata.run_id, state, room)
            if len(own) == sum(1 for _ in iterate_object_tree(tree)):
                state.object_store.delete(message.metadata.message_id)
        contents += own
        room -= sum(map(len, own))
    return parcel(found, contents) if found.messages_list else BytesList()


def objects_of(tree: ObjectTree, run: int, state: Any, room: int) -> list[bytes]:
    """Return the contents of a message's objects, from its head on, up to one that is absent or too large."""
    found: list[bytes] = []
    for part in reversed(list(iterate_object_tree(tree))):
        content = state.get_object(run, part.object_id)
        if not content or len(content) > room:
            break
        found.append(content)
        room -= len(content)
    return found


def with_the_rest(found: Any, run: int, contents: Mapping[str, bytes], state: Any) -> Any:
    """Store the objects of a parcel; return Flower's answer, which names what is still to be sent."""
    lacking = [
        name
        for name in found.objects_to_push
        if name not in contents or not state.store_object(run, found.session_id, name, contents[name])
    ]
    del found.objects_to_push[:]
    found.objects_to_push.extend(lacking)
    return found
