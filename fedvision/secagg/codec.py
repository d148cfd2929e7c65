"""One canonical byte string for each protocol message: what is hashed, signed and sent.

A message is a frozen dataclass. Its bytes are ``b"FV"``, the format version, the message's kind, then its
fields in order. Rules:
- Integers are unsigned, big-endian, of a fixed width. A string with few values is its index, one byte.
- Bytes of a fixed length stand alone; others have a length of four bytes in front, and a limit.
- A tuple has a count of four bytes in front, and a limit.
- There is one encoding of a message and one message of an encoding: nothing may be left over, and lengths
  are checked before anything is read.
"""

import dataclasses
import functools
import typing
from dataclasses import dataclass
from typing import Annotated, Any

from fedvision.errors import MessageError

MAGIC = b"FV"
VERSION = 1


@dataclass(frozen=True)
class Unsigned:
    """An integer of ``width`` bytes."""

    width: int


@dataclass(frozen=True)
class Fixed:
    """Bytes of exactly ``length``."""

    length: int


@dataclass(frozen=True)
class AtMost:
    """Bytes or a tuple of at most ``limit``."""

    limit: int


U8 = Annotated[int, Unsigned(1)]
U16 = Annotated[int, Unsigned(2)]
U32 = Annotated[int, Unsigned(4)]
Bytes32 = Annotated[bytes, Fixed(32)]
Bytes64 = Annotated[bytes, Fixed(64)]

_kinds: dict[int, type] = {}


def message(kind: int) -> typing.Callable[[type], type]:
    """Declare a dataclass as the message of this kind, a number 1..255 that stands in its bytes."""

    def register(cls: type) -> type:
        if kind in _kinds:
            raise ValueError(f"kind {kind} is declared twice")
        _kinds[kind] = cls
        cls.KIND = kind  # type: ignore[attr-defined]
        return cls

    return register


@functools.cache
def _fields(cls: type) -> tuple[tuple[str, Any], ...]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return tuple((field.name, hints[field.name]) for field in dataclasses.fields(cls))


@functools.cache
def _rule(hint: Any) -> tuple[Any, Any]:
    """Return the bare type of a hint and its rule, None where it has none."""
    if typing.get_origin(hint) is Annotated:
        bare, rule = typing.get_args(hint)[:2]
        return bare, rule
    return hint, None


def _write(value: Any, hint: Any, out: bytearray) -> None:
    bare, rule = _rule(hint)
    if isinstance(rule, Unsigned):
        out += int(value).to_bytes(rule.width, "big")
    elif isinstance(rule, Fixed):
        if len(value) != rule.length:
            raise ValueError(f"expected {rule.length} bytes, got {len(value)}")
        out += value
    elif typing.get_origin(bare) is typing.Literal:
        out.append(typing.get_args(bare).index(value))
    elif isinstance(rule, AtMost):
        if len(value) > rule.limit:
            raise ValueError(f"at most {rule.limit} are allowed, got {len(value)}")
        out += len(value).to_bytes(4, "big")
        if bare is bytes:
            out += value
        else:
            for item in value:
                _write(item, typing.get_args(bare)[0], out)
    else:
        for name, inner in _fields(bare):
            _write(getattr(value, name), inner, out)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise MessageError("message is cut short")
        self.at += count
        return self.data[self.at - count : self.at]

    def read(self, hint: Any) -> Any:
        bare, rule = _rule(hint)
        if isinstance(rule, Unsigned):
            return int.from_bytes(self.take(rule.width), "big")
        if isinstance(rule, Fixed):
            return self.take(rule.length)
        if typing.get_origin(bare) is typing.Literal:
            options = typing.get_args(bare)
            index = self.take(1)[0]
            if index >= len(options):
                raise MessageError("message has a value that is not allowed")
            return options[index]
        if isinstance(rule, AtMost):
            count = int.from_bytes(self.take(4), "big")
            if count > rule.limit or count > len(self.data) - self.at:
                raise MessageError("message has too long a part")
            if bare is bytes:
                return self.take(count)
            return tuple(self.read(typing.get_args(bare)[0]) for _ in range(count))
        return bare(**{name: self.read(inner) for name, inner in _fields(bare)})


def encode(value: Any) -> bytes:
    """Return the bytes of a message.

    Raises:
        ValueError: A field does not fit its declaration.
    """
    out = bytearray(MAGIC + bytes([VERSION, value.KIND]))
    try:
        _write(value, type(value), out)
    except OverflowError:
        raise ValueError("an integer does not fit its field") from None
    return bytes(out)


def kind_of(data: bytes) -> type | None:
    """Return which message ``data`` says it is, None if it is none; nothing else is checked."""
    return _kinds.get(data[3]) if len(data) > 3 else None


T = typing.TypeVar("T")


def decode(data: bytes, expected: type[T]) -> T:
    """Return the message in ``data``.

    Guarantee: for arbitrary bytes, a message whose ``encode`` is ``data``, or ``MessageError``.

    Args:
        data: What arrived.
        expected: The message that is allowed here.

    Raises:
        MessageError: Another version or kind, a part too short, too long or not allowed, bytes left over.
    """
    reader = _Reader(bytes(data))
    if reader.take(2) != MAGIC or reader.take(1)[0] != VERSION:
        raise MessageError(f"message format must be version {VERSION}")
    kind = reader.take(1)[0]
    if _kinds.get(kind) is not expected:
        raise MessageError(f"expected {expected.__name__}, got another message")
    value: T = reader.read(expected)
    if reader.at != len(reader.data):
        raise MessageError("message has bytes left over")
    return value
