"""Flower's Grid for the ServerApp, with parcels: all messages of a step go to the SuperLink in one request,
and all answers that have come are fetched in one (``wire.parcels``)."""

from collections.abc import Iterable
from typing import Any

from flwr.app import Message
from flwr.app.error import Error
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.recorddict_pb2 import BytesList
from flwr.proto.runtime_pb2 import (
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
)
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.superlink.grid.http_grid import HttpGrid

from fedvision.wire.parcels import SERVER_PULL, SERVER_PUSH, SERVER_ROOM, opened, parcel, that_fit

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
"""Between two looks for a part of an answer that is on its way."""


class ParcelGrid:
    """What ``SiteLink`` needs of a Grid.

    Args:
        grid: Flower's, which has the connection, the token and the run.
    """

    def __init__(self, grid: HttpGrid) -> None:
        self._grid = grid
        self._client: Any = grid._runtime_client
        self._run = grid.run.run_id

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the nodes that are connected."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages; return their numbers at Flower, "" for one that it does not take."""
        heads, trees = [], []
        objects: dict[str, Any] = {}
        with no_object_id_recompute():
            for message in messages:
                message.metadata.__dict__["_message_id"] = message.object_id
                heads.append(message_to_proto(remove_content_from_message(message)))
                trees.append(get_object_tree(message))
                objects |= get_all_nested_objects(message)
            request = PushAppMessagesRequest(messages_list=heads, message_object_trees=trees)
            sent = self._ask(
                SERVER_PUSH, parcel(request, that_fit(objects, SERVER_ROOM)), PushAppMessagesResponse
            )
            if sent.objects_to_push:
                push = make_push_object_fn_protobuf(
                    self._client.PushObject, self._grid.node, self._run, sent.session_id
                )
                push_objects(objects, push, object_ids_to_push=set(sent.objects_to_push))
        return list(sent.message_ids)

    def pull_messages(self, numbers: Iterable[str]) -> list[Message]:
        """Return the answers to messages that have come; an error for one that does not come whole."""
        request = PullAppMessagesRequest(message_ids=numbers)
        found, contents = opened(self._ask(SERVER_PULL, request, BytesList), PullAppMessagesResponse)
        messages = []
        for head, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            try:
                messages.append(self._whole(head.metadata.message_id, tree, contents))
            except ObjectPullError:
                lost = Error(ErrorCode.MESSAGE_UNAVAILABLE, "an answer did not come whole")
                messages.append(make_message(metadata=message_from_proto(head).metadata, error=lost))
        return messages

    def _whole(self, number: str, tree: ObjectTree, contents: dict[str, bytes]) -> Message:
        """Return a message from its objects; those that are not among the contents are fetched."""
        names = {part.object_id for part in iterate_object_tree(tree)}
        own = {name: contents[name] for name in names & contents.keys()}
        if len(own) < len(names):
            pull = make_pull_object_fn_protobuf(self._client.PullObject, self._grid.node, self._run)
            own |= pull_objects(
                sorted(names - own.keys()),
                pull,
                initial_backoff=FIRST_PAUSE_S,
                backoff_cap=LONGEST_PAUSE_S,
            )
            self._client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(
                    node=self._grid.node, run_id=self._run, message_object_id=number
                )
            )
        message = inflate_object_from_contents(number, own)
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = number
        return message

    def _ask(self, path: str, request: Any, kind: Any) -> Any:
        return self._client._unary_unary(path=path, rpc_method=path, request=request, response_type=kind)
