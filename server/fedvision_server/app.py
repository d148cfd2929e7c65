"""The server's Flower ServerApp: carries ``round``'s requests over Flower's Grid."""

import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedvision.config import Job
from fedvision.errors import MessageError, Stopped
from fedvision.training.root import RootSet
from fedvision.wire.messages import (
    HelloRequest,
    Refusal,
    Reply,
    Request,
    SecureRequest,
    TrainRequest,
)
from fedvision.wire.records import MESSAGE_TYPES, pack, unpack
from fedvision_server.federation import Cohort, Observer
from fedvision_server.round import run_job
from fedvision_server.secure import ServerKeys

FIRST_POLL_S, LAST_POLL_S = 0.01, 0.25
OPEN_BYTES = 1 << 30
"""Steps of secure aggregation are quick, so as many are open at a time as fit in this with their vectors."""
PATIENCE = 20
"""A pause between polls is this part of the time waited so far: short steps are seen at once."""


class GridLink:
    """Sends requests over a Flower Grid.

    Pushes and pulls itself: Flower's ``send_and_receive`` sleeps for seconds between polls.

    Args:
        grid: Flower's.
        num_nodes: How many sites to wait for before the first request.
        window: Most requests with weights that are open at a time, which bounds the memory they take.
        stop: Set by whoever wants the run to end early.
    """

    def __init__(self, grid: Grid, num_nodes: int, window: int, stop: threading.Event) -> None:
        self._grid = grid
        self._num_nodes = num_nodes
        self._window = window
        self._stop = stop
        self._vector_bytes = 1

    def nodes(self) -> list[int]:
        """Return the sites' addresses, once all of them are there."""
        while len(found := list(self._grid.get_node_ids())) < self._num_nodes:
            self._wait(FIRST_POLL_S)
        return sorted(found)

    def ask(self, requests: Mapping[int, Request]) -> Iterator[tuple[int, Reply]]:
        """Send each node its request; yield each reply as it comes. See ``round.Link``."""
        waiting, sent = list(requests), dict[str, int]()
        packed: tuple[Request | None, RecordDict] = (None, RecordDict())
        asked_at = time.monotonic()
        window = self._window
        for request in requests.values():
            if isinstance(request, SecureRequest):
                window = max(window, OPEN_BYTES // self._vector_bytes)
            elif isinstance(request, TrainRequest):
                self._vector_bytes = max(1, request.weights.nbytes)
        while waiting or sent:
            while waiting and len(sent) < window:
                node = waiting.pop(0)
                request = requests[node]
                if packed[0] is not request:  # most often all nodes get the same
                    packed = (request, pack(request))
                message = Message(packed[1], dst_node_id=node, message_type=MESSAGE_TYPES[type(request)])
                (message_id,) = self._grid.push_messages([message])
                sent[message_id] = node
            replies = list(self._grid.pull_messages(list(sent)))
            for message in replies:
                node = sent.pop(message.metadata.reply_to_message_id)
                asked = requests[node]
                number = 0 if isinstance(asked, HelloRequest) else asked.round
                yield node, read_reply(message, asked.job_digest, number)
            if not replies:
                waited_s = time.monotonic() - asked_at
                self._wait(min(max(FIRST_POLL_S, waited_s / PATIENCE), LAST_POLL_S))

    def _wait(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Stopped("stopped")


def read_reply(message: Message, job_digest: str, number: int) -> Reply:
    """Return a site's reply, or a ``Refusal`` for one that failed or cannot be read."""
    if message.has_error():
        return Refusal(job_digest, "", number, "unreachable")
    try:
        reply: Reply = unpack(message.content, Reply)
    except MessageError:
        return Refusal(job_digest, "", number, "message")
    return reply


def create_app(
    job: Job,
    folder: Path,
    cohort: Cohort,
    observe: Observer,
    stop: threading.Event,
    num_nodes: int,
    window: int,
    keys: ServerKeys | None,
    root: RootSet | None = None,
) -> ServerApp:
    """Return the ServerApp that runs ``job`` in ``folder``; see ``round.run_job`` and ``GridLink``."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run_job(job, GridLink(grid, num_nodes, window, stop), folder, cohort, observe, keys, root)

    return app
