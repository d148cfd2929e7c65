"""The seal on every message between hosts: who sent it, to whom, as an answer to what.

Flower carries records; whoever runs the transport could change, repeat, or swap them. So each record that
crosses between hosts bears a seal, an Ed25519 signature of its sender over the content and these fields:

    sender, receiver    "server" or a site's name
    number              of the request, larger than any before it from this sender to this receiver
    answers             SHA-256 of the request's seal, for a reply; so it fits one request only
    log_count, log_head where the sender's audit log stands, so that the other side can hold it to that

Job, round, attempt, step and site are fields of the content, see ``wire.messages``. The fields of the seal
stand beside those of the message in one record, with "seal." before their names.

Rules:
- A seal is checked before anything else of a record is read; what is not sealed is not unpacked.
- The content's digest covers name, type and value of every field, and name, type, shape and bytes of every
  array.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedvision.errors import MessageError
from fedvision.secagg.identity import Identity, verify
from fedvision.wire.records import SEAL_PREFIX

FORMAT = 1
SERVER = "server"
CONTENT_LABEL = b"fedvision/content/v1"
SEAL_LABEL = b"fedvision/envelope/v1"
HEX_32 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Seal:
    """What a sender signs beside the content.

    Attributes:
        sender: "server" or a site's name.
        receiver: Likewise.
        number: Of the request; a reply repeats it.
        answers: Digest of the request's seal in hexadecimal, "" for a request.
        log_count: Lines in the sender's audit log.
        log_head: SHA-256 of its last line in hexadecimal.
    """

    sender: str
    receiver: str
    number: int
    answers: str
    log_count: int
    log_head: str

    def covered(self, content: bytes) -> bytes:
        """Return what the signature is over; ``content`` is a digest."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True, separators=(",", ":"))
        return SEAL_LABEL + hashlib.sha256(text.encode()).digest() + content

    def digest(self, content: bytes) -> str:
        """Return 64 hexadecimal digits that stand for this seal on this content."""
        return hashlib.sha256(self.covered(content)).hexdigest()


SEAL_FIELDS = {SEAL_PREFIX + field.name: field.name for field in fields(Seal)}


def _parts(content: RecordDict) -> tuple[dict[str, Any], ArrayRecord]:
    """Return the fields and the large arrays of a record."""
    if not set(content) <= {"message", "arrays"}:
        raise MessageError("a record has a part that no message has")
    scalars, arrays = content.get("message"), content.get("arrays", ArrayRecord())
    if not isinstance(scalars, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise MessageError("a record has a part of another type")
    return dict(scalars), arrays


def content_digest(content: RecordDict) -> bytes:
    """Return 32 bytes that stand for a packed message; the fields of a seal are left out.

    Raises:
        MessageError: The record is not of the form of a message.
    """
    scalars, arrays = _parts(content)
    total = hashlib.sha256(CONTENT_LABEL)
    for name in sorted(scalars):
        if name.startswith(SEAL_PREFIX):
            continue
        value = scalars[name]
        if type(value) is bytes:
            shown: object = hashlib.sha256(value).hexdigest()
        elif type(value) in (str, int, float, bool):
            shown = value
        else:
            raise MessageError("a field of a message has a type that no field has")
        text = json.dumps([name, type(value).__name__, shown])
        total.update(hashlib.sha256(text.encode()).digest())
    for name in sorted(arrays):
        array: Array = arrays[name]
        head = json.dumps([name, array.dtype, list(array.shape), array.stype])
        total.update(hashlib.sha256(b"array" + head.encode()).digest())
        total.update(hashlib.sha256(array.data).digest())
    return total.digest()


def sealed(content: RecordDict, seal: Seal, own: Identity, digest: bytes | None = None) -> RecordDict:
    """Return a record with a seal; its arrays are shared, not copied.

    Args:
        content: A packed message.
        seal: What to sign.
        own: The sender's key.
        digest: The content's, where the caller has it already.
    """
    covered = seal.covered(content_digest(content) if digest is None else digest)
    scalars, arrays = _parts(content)
    scalars |= {name: getattr(seal, field) for name, field in SEAL_FIELDS.items()}
    scalars |= {SEAL_PREFIX + "format": FORMAT, SEAL_PREFIX + "signature": own.sign(covered)}
    found = RecordDict({"message": ConfigRecord(scalars)})
    if arrays:
        found["arrays"] = arrays
    return found


def open_seal(content: RecordDict, public: bytes) -> tuple[Seal, str]:
    """Return a record's seal, and its digest, after the signature was verified.

    Guarantee: the owner of ``public`` made this seal for exactly this content.

    Args:
        content: What arrived.
        public: The key that the alleged sender has in the roster.

    Raises:
        MessageError: No seal, a malformed one, or a wrong signature.
    """
    scalars, _ = _parts(content)
    found = {name: value for name, value in scalars.items() if name.startswith(SEAL_PREFIX)}
    signature = found.pop(SEAL_PREFIX + "signature", b"")
    version = found.pop(SEAL_PREFIX + "format", None)
    if not found:
        raise MessageError("a message has no seal")
    if set(found) != set(SEAL_FIELDS) or type(version) is not int or version != FORMAT:
        raise MessageError("a seal has other fields, or is of another format")
    seal = Seal(**{field: found[name] for name, field in SEAL_FIELDS.items()})
    if any(type(getattr(seal, field.name)) is not field.type for field in fields(Seal)):
        raise MessageError("a field of a seal has the wrong type")
    is_empty = seal.log_head == "0" * 64
    if (
        not HEX_32.fullmatch(seal.log_head)
        or not 0 <= seal.log_count < 2**63
        or is_empty != (seal.log_count == 0)
    ):
        raise MessageError("a seal's audit head is malformed")
    digest = content_digest(content)
    if type(signature) is not bytes or not verify(public, signature, seal.covered(digest)):
        raise MessageError("a seal's signature is wrong")
    return seal, seal.digest(digest)
