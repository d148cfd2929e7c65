"""Whole rounds, byte for byte: a change of these is a change of the protocol."""

import hashlib
import json

import numpy as np
import pytest

from fedvision.secagg.codec import decode
from fedvision.secagg.messages import Masked, Signed, Unmask
from tests.vectors import make_secagg_round as maker

VECTORS = json.loads(maker.FILE.read_text())


@pytest.mark.parametrize("level", list(maker.SITES))
def test_a_whole_round_is_the_same_byte_for_byte(level: str) -> None:
    assert json.loads(json.dumps(maker.make_round(level))) == VECTORS[level]


def test_the_file_is_what_its_maker_writes() -> None:
    assert maker.FILE.read_text() == maker.text_of()


@pytest.mark.parametrize("level", list(maker.SITES))
def test_the_recorded_round_adds_up(level: str) -> None:
    """Says nothing about the code, but that the file tells one story."""
    record = VECTORS[level]
    truth = np.sum([np.array(vector, np.uint64) for vector in record["inputs"].values()], axis=0) % 2**32
    assert record["sum"] == truth.tolist()
    assert record["fits"]
    (masks,) = [step for step in record["steps"] if step["step"] == "mask"]
    for sent in masks["sites"].values():
        message = decode(decode(bytes.fromhex(sent["hex"]), Signed).body, Masked)
        assert message.tau.hex() == record["tau"]
        assert message.digest == hashlib.sha256(np.array(sent["masked"], "<u4").tobytes()).digest()
    assert record["steps"][-1]["step"] == "unmask"
    if level != "gram":
        for sent in record["steps"][-1]["sites"].values():
            unmask = decode(decode(bytes.fromhex(sent["hex"]), Signed).body, Unmask)
            assert [item.site for item in unmask.shares] == [1, 2, 3]
