"""Messages to Flower records and back: the only place that knows Flower's types.

A message becomes one ConfigRecord with its scalars and small arrays, and one ArrayRecord with its large
arrays. ``unpack`` takes a record of exactly the declared fields and types, or raises ``MessageError``.

Each chunk of an array that does not fit into a parcel costs a request at each end (see ``wire.parcels``).
Steps of secure aggregation are small and many, so they travel as a single ConfigRecord.
"""

import dataclasses
import io
import math
import typing
from types import UnionType

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedvision.errors import MessageError
from fedvision.wire.messages import (
    EvaluateReply,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    Refusal,
    Reply,
    Request,
    SecureReply,
    SecureRequest,
    TrainReply,
    TrainRequest,
)

FORMAT = 4
INLINE_BYTES = 1 << 18
"""Arrays up to this size travel beside the scalars, in NPY format 1.0 like the others."""
SEAL_PREFIX = "seal."
"""Begins the fields of a seal, see ``wire.envelope``; they are no part of the message."""
KINDS: dict[str, type] = {
    "hello": HelloRequest,
    "hello-reply": HelloReply,
    "train": TrainRequest,
    "train-reply": TrainReply,
    "evaluate": EvaluateRequest,
    "evaluate-reply": EvaluateReply,
    "secure": SecureRequest,
    "secure-reply": SecureReply,
    "refusal": Refusal,
}
NAMES = {kind: name for name, kind in KINDS.items()}
MESSAGE_TYPES: dict[type, str] = {
    HelloRequest: "query.hello",
    TrainRequest: "train.update",
    EvaluateRequest: "evaluate.statistics",
    SecureRequest: "query.secure",
}
ARRAY_TYPES = {
    "weights": np.float32,
    "update": np.float32,
    "statistics": np.float64,
    "documents": np.uint8,
    "enrolment": np.uint8,
    "offer": np.uint8,
    "body": np.uint8,
    "masked": np.uint32,
}


def pack(message: Request | Reply) -> RecordDict:
    """Return the Flower record of a message."""
    scalars: dict[str, str | int | float | bool | bytes] = {"format": FORMAT, "kind": NAMES[type(message)]}
    arrays = {}
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        if field.name in ARRAY_TYPES:
            array = Array(np.ascontiguousarray(value))
            if value.nbytes > INLINE_BYTES:
                arrays[field.name] = array
            else:
                scalars[field.name] = array.data
        else:
            scalars[field.name] = value
    content = RecordDict({"message": ConfigRecord(scalars)})
    if arrays:
        content["arrays"] = ArrayRecord(arrays)
    return content


def _check_scalar(name: str, value: object, hint: object) -> None:
    if typing.get_origin(hint) is typing.Literal:
        ok = value in typing.get_args(hint)
    else:
        ok = type(value) is hint
    if not ok:
        raise MessageError(f"field {name} has the wrong type or value")


def unpack(content: RecordDict, expected: type | UnionType) -> typing.Any:
    """Return the message in a Flower record, checked field by field.

    Args:
        content: What arrived.
        expected: The message class, or a union of those that are allowed here.

    Raises:
        MessageError: Another kind or format, a field that is absent, unknown or of another type.
    """
    try:
        return _unpack(content, expected)
    except (KeyError, TypeError, ValueError, AttributeError, EOFError) as error:
        raise MessageError(f"message cannot be read: {type(error).__name__}") from None


def _read_array(data: bytes, dtype: type, is_inline: bool) -> np.ndarray[typing.Any, typing.Any]:
    """Return a view of the bytes that arrived; nothing is allocated on the word of a header."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise MessageError("arrays must be in NPY format 1.0")
    shape, is_fortran, found = np.lib.format.read_array_header_1_0(file)
    body = memoryview(data)[file.tell() :]
    if found != dtype or is_fortran or body.nbytes != math.prod(shape) * np.dtype(dtype).itemsize:
        raise MessageError(f"an array must be {np.dtype(dtype)} in C order, of its declared shape")
    if is_inline != (body.nbytes <= INLINE_BYTES):
        raise MessageError("an array is in the other part of the message than one of its size must be")
    return np.frombuffer(body, dtype=dtype).reshape(shape)


def _unpack(content: RecordDict, expected: type | UnionType) -> typing.Any:
    scalars = {key: value for key, value in content["message"].items() if not key.startswith(SEAL_PREFIX)}
    arrays = dict(content["arrays"]) if "arrays" in content else {}
    version = scalars.pop("format", None)
    if type(version) is not int or version != FORMAT:
        raise MessageError(f"message format must be {FORMAT}")
    kind = KINDS.get(str(scalars.pop("kind", "")))
    allowed = typing.get_args(expected) or (expected,)
    if kind is None or kind not in allowed:
        raise MessageError(f"expected {', '.join(NAMES[k] for k in allowed)}, got another message")
    hints = typing.get_type_hints(kind)
    values: dict[str, typing.Any] = {}
    for field in dataclasses.fields(kind):
        if field.name in ARRAY_TYPES:
            is_inline = field.name in scalars
            data = scalars.pop(field.name) if is_inline else arrays.pop(field.name).data
            values[field.name] = _read_array(data, ARRAY_TYPES[field.name], is_inline)
        else:
            values[field.name] = scalars.pop(field.name)
            _check_scalar(field.name, values[field.name], hints[field.name])
    if scalars or arrays:
        raise MessageError(f"unknown field {sorted([*scalars, *arrays])[0]!r}")
    return kind(**values)
