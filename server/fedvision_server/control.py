"""What the supervisor asks of Flower's Control interface, on loopback: nodes of sites, and runs."""

from typing import Any

import httpx
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

from fedvision.wire.bundle import bundle

ENDED = "finished"
HOME_VARIABLE = "FEDVISION_SERVER_HOME"
"""Flower starts the ServerApp with the environment and a bundle, and nothing else."""


class Control:
    """A client of the Control interface.

    Args:
        port: On loopback.
        secret: See ``superlink.loopback_app``.
    """

    def __init__(self, port: int, secret: str) -> None:
        def intercept(context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
            context.request.headers["authorization"] = f"Bearer {secret}"
            return call_next(context)

        bearer: Any = type("Bearer", (), {"intercept": staticmethod(intercept)})()
        self._client = ControlHttpClient(f"http://127.0.0.1:{port}", interceptors=[bearer], timeout=30.0)

    def is_there(self) -> bool:
        """Return whether the SuperLink answers."""
        try:
            self.nodes()
        except httpx.HTTPError:
            return False
        return True

    def nodes(self) -> dict[bytes, int]:
        """Return the registered nodes: their numbers by public key."""
        found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return {node.public_key: node.node_id for node in found if node.status != "unregistered"}

    def online(self) -> list[bytes]:
        """Return the keys of the nodes that are connected."""
        found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [node.public_key for node in found if node.status == "online"]

    def register(self, public_key: bytes) -> None:
        """Let a node in."""
        self._client.RegisterNode(RegisterNodeRequest(public_key=public_key))

    def unregister(self, node_id: int) -> None:
        """Let a node in no more."""
        self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def start(self, job: str) -> int:
        """Start a Flower run for a job; return its number."""
        fab = fab_to_proto(Fab(*bundle(), {}))
        request = StartRunRequest(fab=fab, override_config=user_config_to_proto({"job": job}))
        return int(self._client.StartRun(request).run_id)

    def has_ended(self, run: int) -> bool:
        """Return whether a Flower run is over, or not known any more."""
        try:
            found = self._client.ListRuns(ListRunsRequest(run_id=run)).run_dict
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.NOT_FOUND:
                return True
            raise
        return run not in found or found[run].status.status == ENDED

    def unfinished(self) -> list[int]:
        """Return the numbers of the runs that are not over."""
        found = self._client.ListRuns(ListRunsRequest()).run_dict
        return [number for number, run in found.items() if run.status.status != ENDED]

    def stop(self, run: int) -> None:
        """Stop a Flower run."""
        self._client.StopRun(StopRunRequest(run_id=run))

    def close(self) -> None:
        """Close the connection."""
        self._client.close()
