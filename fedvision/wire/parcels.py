"""Parcels: messages of Flower with their small objects, in one request instead of one for each object.

Flower cuts a message into objects and moves each of them by a request of its own, so that a message and its
answer cost it 18 requests. The messages of a federation are many and most of them are small. A parcel is
Flower's own request or answer about messages, followed by the contents of objects:

    SITE_PULL     a site fetches a message       PullMessagesRequest -> parcel of a PullMessagesResponse
    SITE_PUSH     a site sends its answer        parcel of a PushMessagesRequest -> PushMessagesResponse
    SERVER_PULL   the ServerApp fetches answers  PullAppMessagesRequest -> parcel of its response
    SERVER_PUSH   the ServerApp sends messages   parcel of a PushAppMessagesRequest -> its response

Rules:
- What does not fit travels as Flower does it, by requests of its own: ``objects_to_push`` of an answer names
  what is still to be sent, and what an answer to a pull lacks is fetched, and then confirmed. A message that
  came whole is confirmed already.
- An object's name is the SHA-256 of its content, and is not sent.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from flwr.app.message.arraychunk import ArrayChunk
from flwr.proto.recorddict_pb2 import BytesList

SITE_PULL, SITE_PUSH = "/fedvision/site/pull", "/fedvision/site/push"
SERVER_PULL, SERVER_PUSH = "/fedvision/server/pull", "/fedvision/server/push"
SITE_ROOM, SERVER_ROOM = 1 << 20, 8 << 20
"""Bytes of objects in a parcel. A parcel is lost as a whole on a bad line; the server's is on loopback."""
LARGEST_OF_SITE = 4 << 20
"""Bytes of a parcel from a site."""
MOST_PARTS = 10_000
Head = TypeVar("Head")


def parcel(head: Any, contents: Iterable[bytes]) -> BytesList:
    """Return a parcel of a protobuf message and contents of objects."""
    return BytesList(vals=[head.SerializeToString(), *contents])


def opened(received: BytesList, kind: type[Head]) -> tuple[Head, dict[str, bytes]]:
    """Return the message at the head of a parcel, and contents by name; an empty parcel has an empty head.

    Raises:
        ValueError: It has too many parts.
        google.protobuf.message.DecodeError: The head is not of that kind.
    """
    if len(received.vals) > MOST_PARTS:
        raise ValueError(f"a parcel must have at most {MOST_PARTS} parts")
    head: Head = kind.FromString(received.vals[0] if received.vals else b"")  # type: ignore[attr-defined]
    return head, {hashlib.sha256(content).hexdigest(): content for content in received.vals[1:]}


def that_fit(objects: Mapping[str, Any], room: int) -> list[bytes]:
    """Return the contents of those of Flower's objects that fit into a parcel together."""
    found = []
    for item in objects.values():
        if isinstance(item, ArrayChunk) and len(item.data) > room:  # before it is copied
            continue
        content: bytes = item.deflate()
        if len(content) <= room:
            found.append(content)
            room -= len(content)
    return found
