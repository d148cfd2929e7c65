"""The connection of a site to Flower's SuperLink: pulls messages and pushes replies, over mutual TLS.

The only module at a site that knows Flower's fleet protocol. It replaces Flower's SuperNode, which starts a
process for each message and runs code that it was sent; here nothing is fetched but messages.

Rules:
- Outgoing connections only, TLS 1.3, to a server with a certificate of the federation's own CA.
- A message travels as a parcel (``wire.parcels``). A vector that is too large for one travels in chunks; a
  chunk that fails is sent again, those that arrived are not.
- A site that was killed is known to Flower as online for up to 20 s; activation is tried until it is let in.
"""

import logging
import ssl
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import httpx
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.recorddict_pb2 import BytesList
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fedvision.wire.parcels import SITE_PULL, SITE_PUSH, SITE_ROOM, opened, parcel, that_fit

logger = logging.getLogger(__name__)
HEARTBEAT_S = 10.0
LAST_BEAT_S = 5.0
CALL_TIMEOUT_S = 60.0
CHUNK_TRIES = 60
LONGEST_PAUSE_S = 20.0


class ParcelClient(FleetHttpClient):
    """Flower's client, with the two requests for parcels."""

    def pull_parcel(self, request: PullMessagesRequest) -> BytesList:
        """Fetch the next message."""
        return self._unary_unary(
            path=SITE_PULL, rpc_method=SITE_PULL, request=request, response_type=BytesList
        )

    def push_parcel(self, sent: BytesList) -> PushMessagesResponse:
        """Send an answer."""
        return self._unary_unary(
            path=SITE_PUSH, rpc_method=SITE_PUSH, request=sent, response_type=PushMessagesResponse
        )


class Fleet:
    """A connection to the SuperLink; a context manager.

    Args:
        address: ``host:port``.
        context: TLS with the site's certificate.
        node_key: Flower's key of this node, enrolled with the site; PEM.
        stop: Set by whoever wants the program to end.

    Raises:
        httpx.HTTPError: On entry, where the server does not let the site in.
    """

    def __init__(
        self,
        address: str,
        context: ssl.SSLContext,
        node_key: bytes,
        stop: threading.Event,
    ) -> None:
        self._key = bytes_to_private_key(node_key)
        self._stop = stop
        self._closing = threading.Event()
        interceptors: list[Any] = [
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(self._key, self._key.public_key()),
        ]
        url = f"https://{address}"
        self._client = ParcelClient(url, interceptors=interceptors, verify=context, timeout=CALL_TIMEOUT_S)
        self._node = Node()
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self.last_contact = 0.0

    def __enter__(self) -> Self:
        request = ActivateNodeRequest(
            public_key=public_key_to_bytes(self._key.public_key()), heartbeat_interval=HEARTBEAT_S
        )
        self._node = Node(node_id=self._client.ActivateNode(request).node_id)
        self.last_contact = time.time()
        self._beating.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._beating.join(LAST_BEAT_S)  # one that came later would say that the site is there again
        try:
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        except (httpx.HTTPError, RuntimeError) as failure:
            logger.debug("not signed off: %s", type(failure).__name__)
        self._client.close()

    def _beat(self) -> None:
        """Tell the server every few seconds that the site is there, also while it trains."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_S)
        while not self._closing.wait(HEARTBEAT_S * 0.6):
            try:
                self._client.SendNodeHeartbeat(request)
                self.last_contact = time.time()
            except (httpx.HTTPError, RuntimeError) as failure:
                logger.info("no heartbeat: %s", type(failure).__name__)

    def _again(self, call: Callable[[], Any]) -> Any:
        """Repeat a call while the line is down; its result, or the last error."""
        for number in range(CHUNK_TRIES):
            try:
                return call()
            except httpx.TransportError as failure:
                logger.info("try %s failed: %s", number + 1, type(failure).__name__)
                if number + 1 == CHUNK_TRIES or self._stop.wait(min(0.5 * 1.5**number, LONGEST_PAUSE_S)):
                    raise
            except httpx.HTTPStatusError as failure:
                if failure.response.status_code not in (502, 503, 504) or number + 1 == CHUNK_TRIES:
                    raise
                if self._stop.wait(min(0.5 * 1.5**number, LONGEST_PAUSE_S)):
                    raise
        raise AssertionError

    def receive(self) -> Message | None:
        """Return the next message for this site, with its content, or None if there is none.

        Raises:
            RuntimeError: It did not come whole, or cannot be read.
        """
        received = self._client.pull_parcel(PullMessagesRequest(node=self._node))
        self.last_contact = time.time()
        try:
            response, contents = opened(received, PullMessagesResponse)
            if not response.messages_list:
                return None
            head, tree = message_from_proto(response.messages_list[0]), response.message_object_trees[0]
            root = head.metadata.message_id
            self._fetch_the_rest(root, head.metadata.run_id, tree, contents)
            message = inflate_object_from_contents(root, contents)
        except ObjectPullError:
            raise RuntimeError("a message could not be fetched whole") from None
        except (DecodeError, ValueError, KeyError, IndexError) as error:
            raise RuntimeError(f"a message cannot be read: {type(error).__name__}") from None
        if not isinstance(message, Message):
            raise RuntimeError("a message cannot be read: another object")
        message.metadata.__dict__["_message_id"] = root
        return message

    def _fetch_the_rest(self, root: str, run: int, tree: ObjectTree, contents: dict[str, bytes]) -> None:
        """Fetch what did not fit into the parcel of a message, and say that the message is here."""
        names = {part.object_id for part in iterate_object_tree(tree)} - contents.keys()
        if not names:
            return
        pull = make_pull_object_fn_protobuf(
            lambda request: self._again(lambda: self._client.PullObject(request)), self._node, run
        )
        contents |= pull_objects(sorted(names), pull, initial_backoff=0.05, backoff_cap=1.0)
        make_confirm_message_received_fn_protobuf(
            lambda request: self._again(lambda: self._client.ConfirmMessageReceived(request)), self._node, run
        )(root)

    def send(self, reply: Message, seconds: float) -> None:
        """Push a reply; large vectors in chunks, each tried again on its own."""
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[tree],
                clientapp_runtime_list=[seconds],
            )
            sent = parcel(request, that_fit(objects, SITE_ROOM))
            response = self._again(lambda: self._client.push_parcel(sent))
            if response.objects_to_push:
                push = make_push_object_fn_protobuf(
                    lambda part: self._again(lambda: self._client.PushObject(part)),
                    self._node,
                    reply.metadata.run_id,
                    response.session_id,
                )
                try:
                    push_objects(objects, push, object_ids_to_push=set(response.objects_to_push))
                except ObjectPushError:
                    raise RuntimeError("a reply could not be sent whole") from None
        self.last_contact = time.time()
