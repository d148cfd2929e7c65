"""The server's Flower ServerApp: carries ``round``'s requests over Flower's Grid."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from fedvision.config import Job
from fedvision.errors import MessageError, Stopped
from fedvision.wire.messages import (
    EvaluateReply,
    HelloReply,
    HelloRequest,
    Refusal,
    Reply,
    Request,
    TrainReply,
)
from fedvision.wire.records import MESSAGE_TYPES, pack, unpack
from fedvision_server.round import Cohort, Observer, run_job

FIRST_POLL_S, LAST_POLL_S = 0.01, 0.25


class GridLink:
    """Sends requests over a Flower Grid.

    Pushes and pulls itself: Flower's ``send_and_receive`` sleeps for seconds between polls.

    Args:
        grid: Flower's.
        num_nodes: How many sites to wait for before the first request.
        window: Most requests that are open at a time, which bounds the memory they take.
        stop: Set by whoever wants the run to end early.
    """

    def __init__(self, grid: Grid, num_nodes: int, window: int, stop: threading.Event) -> None:
        self._grid = grid
        self._num_nodes = num_nodes
        self._window = window
        self._stop = stop

    def nodes(self) -> list[int]:
        """Return the sites' addresses, once all of them are there."""
        while len(found := list(self._grid.get_node_ids())) < self._num_nodes:
            self._wait(FIRST_POLL_S)
        return sorted(found)

    def ask(self, request: Request, nodes: Sequence[int]) -> Iterator[tuple[int, Reply]]:
        """Send ``request`` to ``nodes``; yield each reply as it comes. See ``round.Link``."""
        content = pack(request)
        number = 0 if isinstance(request, HelloRequest) else request.round
        waiting, sent = list(nodes), dict[str, int]()
        pause_s = FIRST_POLL_S
        while waiting or sent:
            while waiting and len(sent) < self._window:
                node = waiting.pop(0)
                message = Message(content, dst_node_id=node, message_type=MESSAGE_TYPES[type(request)])
                (message_id,) = self._grid.push_messages([message])
                sent[message_id] = node
            replies = list(self._grid.pull_messages(list(sent)))
            for message in replies:
                node = sent.pop(message.metadata.reply_to_message_id)
                yield node, read_reply(message, request.job_digest, number)
            pause_s = FIRST_POLL_S if replies else min(2 * pause_s, LAST_POLL_S)
            if not replies:
                self._wait(pause_s)

    def _wait(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Stopped("stopped")


def read_reply(message: Message, job_digest: str, number: int) -> Reply:
    """Return a site's reply, or a ``Refusal`` for one that failed or cannot be read."""
    if message.has_error():
        return Refusal(job_digest, "", number, "unreachable")
    try:
        reply: Reply = unpack(message.content, HelloReply | TrainReply | EvaluateReply | Refusal)
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
) -> ServerApp:
    """Return the ServerApp that runs ``job`` in ``folder``; see ``round.run_job`` and ``GridLink``."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run_job(job, GridLink(grid, num_nodes, window, stop), folder, cohort, observe)

    return app
