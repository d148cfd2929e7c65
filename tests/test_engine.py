import threading
import time
from queue import Queue

import pytest
from flwr.server.superlink.fleet.vce import vce_api

from fedvision.simulation.engine import _prompt_messages


class Looked:
    """Stands for Flower's state: notes how often somebody looked for messages, and takes its time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.times = 0

    def get_message_ins(self, node_id: int, limit: int) -> list[str]:
        self.times += 1
        time.sleep(self.seconds)
        return ["message"] if self.times == 1 else []


def looks(seconds_a_look: float) -> tuple[int, int]:
    """Let Flower's loop run for half a second; return how often it looked, and the messages found."""
    state, found, stop = Looked(seconds_a_look), Queue(), threading.Event()
    loop = threading.Thread(target=vce_api.add_messages_to_queue, args=(state, found, {7: 0}, stop))
    loop.start()
    time.sleep(0.5)
    stop.set()
    loop.join(2)
    assert not loop.is_alive()
    return state.times, found.qsize()


def test_flower_sees_messages_at_once_and_at_its_own_pace_afterwards() -> None:
    before = vce_api.add_messages_to_queue
    with _prompt_messages():
        times, found = looks(0.0)
    assert times > 12
    assert found == 1
    assert vce_api.add_messages_to_queue is before
    assert looks(0.0)[0] <= 6


def test_looking_takes_a_small_share_of_a_core_where_a_look_is_slow() -> None:
    with _prompt_messages():
        assert looks(0.02)[0] <= 6


def test_an_end_of_the_run_by_an_error_leaves_flower_as_it_was() -> None:
    before = vce_api.add_messages_to_queue
    with pytest.raises(RuntimeError), _prompt_messages():
        raise RuntimeError
    assert vce_api.add_messages_to_queue is before


def test_a_flower_without_that_loop_works_at_its_own_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(vce_api, "add_messages_to_queue")
    with _prompt_messages():
        assert not hasattr(vce_api, "add_messages_to_queue")
