import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedvision.errors import MessageError
from fedvision.wire import messages as m
from fedvision.wire.records import INLINE_BYTES, KINDS, pack, unpack

WEIGHTS = np.arange(5, dtype=np.float32)
BYTES = np.arange(3, dtype=np.uint8)
EXAMPLES: list[Any] = [
    m.HelloRequest("{}", "job", "layout", BYTES),
    m.HelloReply("job", "a", 10, 2, 3, m.EMPTY),
    m.TrainRequest("{}", "job", "layout", 1, "c0", BYTES, WEIGHTS),
    m.TrainReply("job", "a", 1, 10, 5, 0.5, 1.5, WEIGHTS),
    m.EvaluateRequest("{}", "job", "layout", 1, "val", False, "", m.EMPTY, WEIGHTS),
    m.EvaluateReply("job", "a", 1, "test", 3, 2, np.ones((3, 4))),
    m.SecureRequest("job", 1, "c0", "beacon", BYTES),
    m.SecureReply("job", "a", 1, "mask", BYTES, np.arange(4, dtype=np.uint32)),
    m.Refusal("job", "a", 1, "data"),
]


def same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and all(
        np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)
    )


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda x: type(x).__name__)
def test_unpacking_gives_back_what_was_packed(message: Any) -> None:
    assert same(unpack(pack(message), type(message)), message)


def test_every_kind_of_message_has_an_example() -> None:
    assert {type(x) for x in EXAMPLES} == set(KINDS.values())


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda x: type(x).__name__)
def test_a_missing_unknown_or_mistyped_field_is_refused(message: Any) -> None:
    for name in [*dict(pack(message)["message"]), "extra"]:
        for value in (None, "x" * 3, 7, 1.5, True, b"x"):
            content = pack(message)
            record = dict(content["message"])
            if value is None:
                record.pop(name, None)
                if name == "extra":
                    continue
            elif type(record.get(name)) is type(value) and name not in ("format", "kind", "split", "step"):
                continue
            else:
                record[name] = value
            content["message"] = ConfigRecord(record)
            with pytest.raises(MessageError):
                unpack(content, type(message))


def test_another_kind_than_expected_is_refused() -> None:
    with pytest.raises(MessageError, match="expected train-reply"):
        unpack(pack(EXAMPLES[1]), m.TrainReply)
    with pytest.raises(MessageError):
        unpack(RecordDict(), m.TrainReply)


@pytest.mark.parametrize("wrong", [WEIGHTS.astype(np.float64), WEIGHTS.astype(np.int32), np.array(["a"])])
def test_an_array_of_another_type_is_refused(wrong: np.ndarray) -> None:
    content = pack(EXAMPLES[3])
    content["message"] = ConfigRecord({**content["message"], "update": Array(wrong).data})
    with pytest.raises(MessageError):
        unpack(content, m.TrainReply)


def test_large_arrays_travel_apart_and_small_ones_beside_the_scalars() -> None:
    large = dataclasses.replace(EXAMPLES[3], update=np.zeros(INLINE_BYTES // 4 + 1, np.float32))
    apart = pack(large)
    assert list(apart["arrays"]) == ["update"]
    assert np.array_equal(unpack(apart, m.TrainReply).update, large.update)
    small = pack(EXAMPLES[3])
    assert list(small) == ["message"]
    inside = ConfigRecord({**apart["message"], "update": apart["arrays"]["update"].data})
    outside = ArrayRecord({"update": Array(WEIGHTS)})
    scalars = {key: value for key, value in small["message"].items() if key != "update"}
    for wrong in (
        RecordDict({"message": inside}),
        RecordDict({"message": ConfigRecord(scalars), "arrays": outside}),
        RecordDict({"message": small["message"], "arrays": outside}),
        RecordDict({"message": ConfigRecord(scalars)}),
    ):
        with pytest.raises(MessageError):
            unpack(wrong, m.TrainReply)


def test_a_header_that_promises_more_than_arrived_reserves_nothing() -> None:
    content = pack(EXAMPLES[3])
    honest = Array(WEIGHTS).data
    data = honest.replace(b"(5,), }         ", b"(999999999999,)}", 1)
    assert len(data) == len(honest)
    assert data != honest
    content["message"] = ConfigRecord({**content["message"], "update": data})
    with pytest.raises(MessageError):
        unpack(content, m.TrainReply)


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_as_an_array_raise_a_message_error_and_nothing_else(data: bytes) -> None:
    content = pack(EXAMPLES[3])
    content["message"] = ConfigRecord({**content["message"], "update": data})
    with pytest.raises(MessageError):
        unpack(content, m.TrainReply)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from([f.name for f in dataclasses.fields(m.TrainReply)] + ["format", "kind"]),
        st.one_of(st.integers(-(2**60), 2**60), st.text(max_size=5), st.booleans(), st.floats()),
    )
)
def test_arbitrary_fields_raise_a_message_error_and_nothing_else(changes: dict[str, Any]) -> None:
    content = pack(EXAMPLES[3])
    content["message"] = ConfigRecord({**dict(content["message"]), **changes})
    try:
        reply = unpack(content, m.TrainReply)
    except MessageError:
        return
    assert isinstance(reply, m.TrainReply)


def reply(**changes: Any) -> m.TrainReply:
    return dataclasses.replace(EXAMPLES[3], update=np.full(5, 0.1, np.float32), **changes)


def test_a_compliant_update_passes_the_check() -> None:
    m.check_train_reply(reply(), 5, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 10**9}, "num_samples"),
        ({"train_loss": float("nan")}, "finite"),
        ({"seconds": float("inf")}, "finite"),
        ({"num_steps": -1}, "num_steps"),
    ],
)
def test_a_count_out_of_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MessageError, match=message):
        m.check_train_reply(reply(**changes), 5, 1.0)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (np.full(4, 0.1, np.float32), "shape"),
        (np.full(5, 0.1), "float32"),
        (np.array([0, np.nan, 0, 0, 0], np.float32), "not finite"),
        (np.full(5, 1.0, np.float32), "norm"),
    ],
)
def test_an_update_that_breaks_a_rule_is_refused(update: np.ndarray, message: str) -> None:
    with pytest.raises(MessageError, match=message):
        m.check_train_reply(dataclasses.replace(EXAMPLES[3], update=update), 5, 1.0)


@pytest.mark.parametrize(
    "rows", [np.ones((2, 4)), np.ones((3, 5)), np.full((3, 4), np.nan), np.ones((3, 4), np.float32)]
)
def test_statistics_of_another_shape_or_not_finite_are_refused(rows: np.ndarray) -> None:
    m.check_evaluate_reply(EXAMPLES[5], 4, 2)
    with pytest.raises(MessageError):
        m.check_evaluate_reply(dataclasses.replace(EXAMPLES[5], statistics=rows), 4, 2)


def test_a_refusal_carries_a_code_and_no_text() -> None:
    assert set(json.loads(json.dumps(dict(pack(EXAMPLES[-1])["message"])))) == {
        "format",
        "kind",
        "job_digest",
        "site",
        "round",
        "code",
    }
