"""Between Flower's SuperNode and the server, on loopback: the site's certificate, and no code from outside.

The SuperNode cannot show a certificate of its own, so it talks to this relay, which passes its requests on.

Rules:
- Only the requests that are needed pass (``PATHS``). What the SuperNode asks about a run's code never does:
  the site answers that itself, from the bundle that it made (``fedvision.wire.bundle``).
- Before a message is handed over, the run that it belongs to is looked up. A run with another bundle than the
  site's own is refused: its messages are dropped, and nothing of the bundle is fetched.
- Of what the server says about a run only its numbers are handed on.
"""

import time
from collections.abc import Callable, MutableMapping
from typing import Any

import httpx
from flwr.proto.fab_pb2 import Fab, GetFabRequest, GetFabResponse
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest, GetRunResponse, Run, RunStatus
from flwr.supercore.constant import TaskType
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fedvision.wire.bundle import NAME, VERSION, bundle

FLEET = "/v1/fleet/"
PATHS = frozenset(
    FLEET + name
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "push-messages",
        "pull-object",
        "push-object",
        "confirm-message-received",
    )
)
"""What is passed on as it is."""
PULL, GET_RUN, GET_FAB = FLEET + "pull-messages", FLEET + "get-run", FLEET + "get-fab"
NOT_PASSED = frozenset(
    {"host", "connection", "content-length", "accept-encoding", "transfer-encoding", "expect", "upgrade"}
)
PROTOBUF = "application/protobuf"
LARGEST_BODY = 32 << 20
"""Bytes; Flower sends vectors in chunks of 5 MB."""
MOST_RUNS = 1000
RUNNING = "running"
REFUSED = "refused: run %s of the server brings other code than this site has; none of it was fetched or run"
Answer = tuple[int, str, bytes]


class TooLarge(Exception):
    """A request is larger than any that Flower makes."""


class Relay:
    """The relay as an ASGI app.

    Args:
        client: Connects to the server with the site's certificate.
        tell: Is told in one line what people should know.
        refused: Is told the number and the bundle's hash of a run that is refused, once each.

    Attributes:
        last_contact: When the server answered last, Unix time.
        is_connected: Whether the SuperNode is signed on.
        has_left: Whether the SuperNode signed off; it does that before it ends, and does not always end.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        tell: Callable[[str], None],
        refused: Callable[[int, str], None],
    ) -> None:
        self._client = client
        self._tell = tell
        self._refused = refused
        self._runs: dict[int, Run | None] = {}
        self._told = ""
        self._held = b""
        self.last_contact = 0.0
        self.is_connected = self.has_left = False

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        path = scope["path"] if scope["method"] == "POST" else ""
        try:
            status, kind, content = await self._answer(path, headers, await body_of(receive))
        except TooLarge:
            status, kind, content = 413, "text/plain", b"too large"
        except DecodeError:
            self._held = b""
            status, kind, content = 502, "text/plain", b"the server's answer, or the question, cannot be read"
        except (httpx.HTTPError, OSError) as error:
            self._say(f"no connection to the server: {' '.join(str(error).split()) or type(error).__name__}")
            status, kind, content = 503, "text/plain", b"no connection to the server"
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [
                    (b"content-type", kind.encode("latin-1")),
                    (b"content-length", str(len(content)).encode()),
                ],
            }
        )
        await send({"type": "http.response.body", "body": content})

    async def _answer(self, path: str, headers: dict[str, str], body: bytes) -> Answer:
        if path == GET_RUN:
            return self._run(GetRunRequest.FromString(body).run_id)
        if path == GET_FAB:
            return own_bundle(GetFabRequest.FromString(body).hash_str)
        if path == PULL:
            return await self._pull(headers, body)
        if path not in PATHS:
            return 404, "text/plain", b"no such path"
        answer = await self._ask(path, headers, body)
        if answer[0] == httpx.codes.OK and path == FLEET + "activate-node":
            self.is_connected, self.has_left = True, False
            self._tell("connected to the server, through Flower's SuperNode")
        elif path == FLEET + "deactivate-node":
            self.is_connected, self.has_left = False, True
        return answer

    async def _ask(self, path: str, headers: dict[str, str], body: bytes) -> Answer:
        """Pass a request on to the server and return its answer."""
        passed = {key: value for key, value in headers.items() if key.lower() not in NOT_PASSED}
        reply = await self._client.post(path, content=body, headers={**passed, "accept-encoding": "identity"})
        if reply.is_success:
            self.last_contact = time.time()
            self._told = ""
        elif reply.status_code in (401, 403):
            self._say(f"the server answers {reply.status_code}: {reply.text[:200]!r}")
        return reply.status_code, reply.headers.get("content-type", ""), reply.content

    def _say(self, text: str) -> None:
        """Tell something once, until the server answers again."""
        if self._told != text:
            self._told = text
            self._tell(text)

    async def _pull(self, headers: dict[str, str], body: bytes) -> Answer:
        """Fetch a message; one whose run cannot be looked up now is kept, since Flower delivers once."""
        node = PullMessagesRequest.FromString(body).node
        if not self._held:
            status, kind, content = await self._ask(PULL, headers, body)
            if status != httpx.codes.OK:
                return status, kind, content
            self._held = content
        answer = PullMessagesResponse.FromString(self._held)
        for message in answer.messages_list:
            number = message.metadata.run_id
            if number not in self._runs:
                await self._look_up(number, node, headers)
        content, self._held = self._held, b""
        if any(self._runs.get(message.metadata.run_id) is None for message in answer.messages_list):
            content = b""
        return 200, PROTOBUF, content

    async def _look_up(self, number: int, node: Node, headers: dict[str, str]) -> None:
        """Learn whether a run is with the site's own bundle; one that is over stays unknown.

        Raises:
            httpx.HTTPError: The server did not say.
        """
        question = GetRunRequest(node=node, run_id=number).SerializeToString()
        status, _, content = await self._ask(GET_RUN, headers, question)
        if status in (401, 403, 404):
            return
        if status != httpx.codes.OK:
            raise httpx.RequestError(f"the server answers {status}")
        said, own = GetRunResponse.FromString(content).run, bundle()[0]
        is_own = (said.run_id, said.fab_hash, said.fab_id, said.fab_version) == (number, own, NAME, VERSION)
        if len(self._runs) >= MOST_RUNS:
            del self._runs[next(iter(self._runs))]
        self._runs[number] = run_with_own_bundle(number, said.series_id) if is_own else None
        if not is_own:
            self._tell(REFUSED % number)
            self._refused(number, said.fab_hash)

    def _run(self, number: int) -> Answer:
        run = self._runs.get(number)
        if run is None:
            return 404, "text/plain", b"no such run"
        return 200, PROTOBUF, GetRunResponse(run=run).SerializeToString()


def own_bundle(wanted: str) -> Answer:
    """Return the site's own bundle, or that there is no other."""
    digest, content = bundle()
    if wanted != digest:
        return 404, "text/plain", b"no such bundle"
    return 200, PROTOBUF, GetFabResponse(fab=Fab(hash_str=digest, content=content)).SerializeToString()


def run_with_own_bundle(number: int, series: int) -> Run:
    """Return what a SuperNode is told about a run."""
    return Run(
        run_id=number,
        series_id=series,
        fab_id=NAME,
        fab_version=VERSION,
        fab_hash=bundle()[0],
        status=RunStatus(status=RUNNING),
        primary_task_type=TaskType.SERVER_APP,
    )


async def body_of(receive: Any) -> bytes:
    """Return the body of a request.

    Raises:
        TooLarge: It is larger than ``LARGEST_BODY``.
    """
    parts = bytearray()
    more = True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            break
        parts += event.get("body", b"")
        more = event.get("more_body", False)
        if len(parts) > LARGEST_BODY:
            raise TooLarge
    return bytes(parts)
