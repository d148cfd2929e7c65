"""The seal on messages between hosts: whatever is changed, moved or left out, it does not fit any more."""

import dataclasses

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedvision.errors import MessageError
from fedvision.secagg import identity
from fedvision.wire.envelope import SERVER, Seal, content_digest, open_seal, sealed
from fedvision.wire.messages import EMPTY, EvaluateReply, SecureReply, TrainRequest, as_vector
from fedvision.wire.records import INLINE_BYTES, pack, unpack

OWN, OTHER = identity.generate("server"), identity.generate("other")
SEAL = Seal(SERVER, "utrecht", 17, "", 3, "ab" * 32)
LARGE = np.arange(INLINE_BYTES // 4 + 1, dtype=np.float32)
REQUEST = TrainRequest("{}", "0" * 64, "1" * 64, 4, "", as_vector(b"offer"), LARGE)


def test_a_sealed_message_comes_out_as_it_went_in() -> None:
    record = sealed(pack(REQUEST), SEAL, OWN)
    seal, digest = open_seal(record, OWN.public)
    assert seal == SEAL
    assert digest == SEAL.digest(content_digest(pack(REQUEST)))
    found = unpack(record, TrainRequest)
    assert np.array_equal(found.weights, REQUEST.weights)
    assert dataclasses.replace(found, weights=EMPTY, offer=EMPTY) == dataclasses.replace(
        REQUEST, weights=EMPTY, offer=EMPTY
    )


def changed(record: RecordDict, part: str, key: str, value: object) -> RecordDict:
    """Return a record with one entry of one part replaced, or removed for None."""
    parts = {name: dict(entry) for name, entry in record.items()}
    if value is None:
        del parts[part][key]
    else:
        parts[part][key] = value  # type: ignore[assignment]
    kinds = {"arrays": ArrayRecord}
    return RecordDict({name: kinds.get(name, ConfigRecord)(entry) for name, entry in parts.items()})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("message", "round", 5),
        ("message", "job_digest", "0" * 63 + "1"),
        ("message", "round", None),
        ("message", "more", 1),
        ("message", "round", b"4"),
        ("message", "round", [4]),
        ("message", "offer", b"other"),
        ("message", "offer", None),
        ("message", "offer", "offer"),
        ("arrays", "weights", Array(LARGE.astype(np.float64))),
        ("arrays", "weights", Array(LARGE[::-1].copy())),
        ("arrays", "weights", None),
        ("arrays", "more", Array(np.zeros(1))),
        ("message", "seal.sender", "other"),
        ("message", "seal.receiver", "groningen"),
        ("message", "seal.number", 18),
        ("message", "seal.number", 17.0),
        ("message", "seal.answers", "00" * 32),
        ("message", "seal.log_count", 4),
        ("message", "seal.log_head", "ac" * 32),
        ("message", "seal.format", 2),
        ("message", "seal.signature", bytes(64)),
        ("message", "seal.signature", "x"),
        ("message", "seal.signature", None),
        ("message", "seal.sender", None),
        ("message", "seal.more", 1),
    ],
)
def test_nothing_can_be_changed(part: str, key: str, value: object) -> None:
    record = changed(sealed(pack(REQUEST), SEAL, OWN), part, key, value)
    with pytest.raises(MessageError):
        open_seal(record, OWN.public)


def test_another_key_no_seal_and_other_parts_are_refused() -> None:
    good = sealed(pack(REQUEST), SEAL, OWN)
    for record, key in (
        (good, OTHER.public),
        (pack(REQUEST), OWN.public),
        (RecordDict({**good, "more": ConfigRecord({})}), OWN.public),
        (RecordDict({**good, "message": ArrayRecord()}), OWN.public),
        (RecordDict({**good, "arrays": ConfigRecord()}), OWN.public),
        (RecordDict({"message": good["message"]}), OWN.public),
        (RecordDict({"arrays": good["arrays"]}), OWN.public),
        (RecordDict(), OWN.public),
    ):
        with pytest.raises(MessageError):
            open_seal(record, key)


def test_names_types_and_shapes_of_arrays_are_part_of_the_digest() -> None:
    one = SecureReply("0" * 64, "a", 1, "mask", as_vector(b"abcd"), np.zeros(0, np.uint32))
    other = SecureReply("0" * 64, "a", 1, "mask", EMPTY, np.frombuffer(b"abcd", np.uint32))
    flat = EvaluateReply("0" * 64, "a", 1, "val", 1, 1, np.zeros((1, 4)))
    square = dataclasses.replace(flat, statistics=np.zeros((2, 2)))
    assert len({content_digest(pack(each)) for each in (one, other, flat, square)}) == 4


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=8) | st.integers() | st.binary(max_size=80)))
def test_arbitrary_seals_are_refused(fields: dict) -> None:
    fields = {key: value for key, value in fields.items() if not isinstance(value, int) or abs(value) < 2**63}
    record = pack(REQUEST)
    record["message"] = ConfigRecord(
        {**record["message"], **{f"seal.{key}": value for key, value in fields.items()}}
    )
    with pytest.raises(MessageError):
        open_seal(record, OWN.public)
