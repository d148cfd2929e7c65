"""How a site joins: its request to the coordinator, and the kit that it gets back; both are JSON files.

    request   site -> coordinator   name, identity key, certificate request, node key; signed by the identity
    kit       coordinator -> site   addresses, certificates, public keys, signed roster; signed by the server

A file holds ``kind``, ``document`` and ``signature``. Rules:
- The signature covers ``"fedvision/KIND/v1" | SHA-256(canonical JSON of the document)``.
- A request proves that its sender has both private keys, no more. Whose they are, people find out by
  telephone.
- A kit counts through governance: the key that the site has pinned signs the roster, the roster names the
  server's key, and that key signs the kit. A kit holds no secret.
- A document has one spelling, byte for byte; what is read is checked in full before a field is used.
- A request is made once: of two requests of one key, only the later counts.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from pydantic import AfterValidator, BaseModel, Field, model_validator

from fedvision.config import Name, Section
from fedvision.errors import ConfigError, MessageError, StorageError
from fedvision.secagg import certificates, documents, identity
from fedvision.secagg.documents import Refused, canonical_json
from fedvision.secagg.identity import Identity, verify
from fedvision.secagg.roster import Key, Roster, SiteNumber, parse_signed
from fedvision.storage import write_atomic, write_text

Kind = Literal["enrolment-request", "site-kit"]
KEYS = ("kind", "document", "signature")
ADDRESS = r"^[A-Za-z0-9.-]+:[0-9]{1,5}$|^\[[0-9a-fA-F:.]+\]:[0-9]{1,5}$"
"""HOST:PORT, where an IPv6 address stands in brackets."""
RESERVED = frozenset({"server", "governance", "operator", "auditor"})
"""Names of parties that a site cannot have (capitals make no difference)."""


def _time(text: str) -> str:
    if datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").strftime("%Y-%m-%dT%H:%M:%SZ") != text:
        raise ValueError("expected a time such as 2030-01-31T12:00:00Z")
    return text


Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$"), AfterValidator(_time)]
Pem = Annotated[str, Field(max_length=certificates.LARGEST_PEM, pattern=r"^-----BEGIN [A-Z ]+-----\n")]


class EnrolmentRequest(Section):
    """What a site asks the coordinator for."""

    format: Literal[1] = Field(1, description="version of this file format")
    name: Name = Field(description="short name that the site wants in the roster")
    identity: Key = Field(description="Ed25519 identity key, hexadecimal")
    certificate_request: Pem = Field(description="request for a TLS certificate, PKCS10, PEM")
    node_key: Pem = Field(description="public key for Flower, EC P-384, PEM")
    version: Annotated[str, Field(pattern=r"^[0-9A-Za-z.+-]{1,40}$")] = Field(
        description="version of the site's software"
    )
    created: Time = Field(description="when it was made, UTC")

    @model_validator(mode="after")
    def _keys_are_good(self) -> Self:
        if self.name.casefold() in RESERVED:
            raise ValueError("that name is another party's")
        try:
            certificates.check_request(self.certificate_request.encode(), self.name)
            certificates.check_node_public(self.node_key.encode())
        except Refused as refused:
            raise ValueError(refused.text) from None
        return self

    def digest(self) -> bytes:
        """Return SHA-256("fedvision/enrolment-request/v1" | canonical JSON), 32 bytes."""
        return hashlib.sha256(b"fedvision/enrolment-request/v1" + canonical_json(self)).digest()


class SiteKit(Section):
    """What a site needs for taking part. It holds no secret."""

    format: Literal[1] = Field(1, description="version of this file format")
    federation: Name = Field(description="as in the roster")
    name: Name = Field(description="the site, as in the roster")
    number: SiteNumber = Field(description="the site's, as in the roster")
    server: Annotated[str, Field(max_length=300, pattern=ADDRESS)] = Field(
        description="HOST:PORT of the coordinator"
    )
    authority: Pem = Field(description="certificate of the federation's certificate authority, PEM")
    certificate: Pem = Field(description="the site's TLS certificate, PEM")
    governance: Key = Field(description="governance's Ed25519 key, hexadecimal")
    server_key: Key = Field(description="the server's Ed25519 key, as in the roster")
    roster: str = Field(description="the signed roster, its file byte for byte")


@dataclass(frozen=True)
class CheckedKit:
    """A kit after every check that needs no knowledge of the site.

    Attributes:
        kit: Its fields.
        roster: The roster in it, with its signature verified.
    """

    kit: SiteKit
    roster: Roster

    @property
    def governance(self) -> bytes:
        """The governance key that the kit rests on, 32 bytes; whether it is the right one, people compare."""
        return bytes.fromhex(self.kit.governance)


M = TypeVar("M", bound=BaseModel)


def now_utc() -> datetime:
    """Return the time in UTC, in whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)


def time_text(time: datetime) -> str:
    """Return a time as it stands in documents: ``2030-01-31T12:00:00Z``."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def ensure_identity(path: Path, name: str) -> Identity:
    """Return the identity in a file; a new one is made if there is none. ``STEM.pub`` stands beside it.

    Guarantee: an identity that is there is never changed; the private key is in no file that others can read.

    Args:
        path: The private file; its folder is made, for this user only, if absent.
        name: Of the party.

    Raises:
        StorageError: The file is of another user, readable by others, or damaged; or cannot be written.
        ConfigError: It is of another name.
    """
    private_folder(path.parent)
    if not path.exists():
        made = identity.generate(name)
        pem = made.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_atomic(path, f"{identity.public_line(name, made.public)}\n".encode() + pem, 0o600)
    found = identity.load(path)
    if found.name != name:
        raise ConfigError(f"{path} is the key of {found.name}, not of {name}", "keys are never overwritten")
    write_text(path.with_suffix(".pub"), identity.public_line(name, found.public) + "\n")
    return found


def ensure_key(path: Path, make: Callable[[], bytes]) -> bytes:
    """Return the private key in a file, made with ``make`` if there is none; as ``ensure_identity``."""
    private_folder(path.parent)
    if not path.exists():
        write_atomic(path, make(), 0o600)
    return certificates.read_private(path)


def private_folder(path: Path) -> None:
    """Make a folder that only this user can look into.

    Raises:
        StorageError: It cannot be made, or is of another user.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)
    except OSError as error:
        raise StorageError(
            f"cannot make {path}: {(error.strerror or str(error)).lower()}", "choose another folder"
        ) from None


def sign_request(request: EnrolmentRequest, own: Identity) -> bytes:
    """Return the file of a request.

    Raises:
        ValueError: The identity is not the one in the request.
    """
    if own.public.hex() != request.identity:
        raise ValueError("a request is signed with the identity key that it names")
    return _signed("enrolment-request", request, own)


def sign_kit(kit: SiteKit, server: Identity) -> bytes:
    """Return the file of a kit.

    Raises:
        ValueError: The key is not the one in the kit.
    """
    if server.public.hex() != kit.server_key:
        raise ValueError("a kit is signed with the server key that it names")
    return _signed("site-kit", kit, server)


def read_request(content: bytes) -> EnrolmentRequest:
    """Return the request in a file.

    Guarantee: who made it has the identity's private key and that of the certificate request, and not a byte
    was changed since.

    Raises:
        Refused: A check fails; the text names the field.
    """
    return _read(content, "enrolment-request", EnrolmentRequest, "identity")


def read_kit(content: bytes) -> CheckedKit:
    """Return the kit in a file.

    Guarantee: ``kit.governance`` signed the roster, which has the site with its number, and the server of
    that roster signed the kit. The caller compares governance's key with the one that it trusts.

    Raises:
        Refused: A check fails; the text names the field.
    """
    kit = _read(content, "site-kit", SiteKit, "server_key")
    roster = _roster_of(kit)
    if roster.federation != kit.federation:
        raise Refused("`document.federation` is not the roster's")
    if roster.server != kit.server_key:
        raise Refused("`document.server_key` is not that of the server in the roster")
    members = {one.number: one.name for one in roster.sites}
    if members.get(kit.number) != kit.name:
        raise Refused("`document.roster` does not have the site with this number")
    authority, certificate = kit.authority.encode(), kit.certificate.encode()
    try:
        facts = certificates.facts_of(certificate)
        certificates.check_certificate(certificate, authority, "site", now_utc())
    except Refused as refused:
        raise Refused(
            "`document.certificate` is wrong", f"`document.certificate`: {refused.text}", refused.hint
        ) from None
    if facts.name != kit.name:
        raise Refused("`document.certificate` bears another name")
    return CheckedKit(kit, roster)


def _roster_of(kit: SiteKit) -> Roster:
    try:
        return parse_signed(kit.roster, "roster", bytes.fromhex(kit.governance))
    except MessageError as error:
        raise Refused("`document.roster` is wrong", f"`document.roster`: {error}") from None


def request_of_file(path: Path) -> EnrolmentRequest:
    """Read a request, see ``read_request``.

    Raises:
        ConfigError: Naming the file, and the field where it is one.
    """
    try:
        return read_request(documents.content_of(path))
    except Refused as refused:
        raise refused.of_file(path) from None


def kit_of_file(path: Path) -> CheckedKit:
    """Read a kit, see ``read_kit``.

    Raises:
        ConfigError: Naming the file, and the field where it is one.
    """
    try:
        return read_kit(documents.content_of(path))
    except Refused as refused:
        raise refused.of_file(path) from None


def _signed(kind: Kind, document: BaseModel, signer: Identity) -> bytes:
    signature = signer.sign(_covered(kind, document)).hex()
    content = document.model_dump(mode="json")
    return _spelled({"kind": kind, "document": content, "signature": signature})


def _covered(kind: Kind, document: BaseModel) -> bytes:
    return f"fedvision/{kind}/v1".encode() + hashlib.sha256(canonical_json(document)).digest()


def _spelled(file: Mapping[str, Any]) -> bytes:
    return (json.dumps({key: file[key] for key in KEYS}, indent=2, ensure_ascii=False) + "\n").encode()


def _read(content: bytes, kind: Kind, model: type[M], signer: str) -> M:
    """Return the document in ``content``, signed with the key in its field ``signer``."""
    found = documents.parse_object(content)
    unknown = sorted(set(found) - set(KEYS))
    if unknown:
        raise Refused(
            "a key is unknown", f"unknown key `{ascii(unknown[0])[1:-1][: documents.LARGEST_SHOWN]}`"
        )
    for key in KEYS:
        if key not in found:
            raise Refused(f"`{key}` is missing", hint=f"expected a file of kind {kind}")
    if found["kind"] != kind:
        raise Refused(f"`kind` is not {kind}")
    document = documents.validated(model, found["document"], "document.")
    try:
        signature = bytes.fromhex(found["signature"])
    except (TypeError, ValueError):
        signature = b""
    if not verify(bytes.fromhex(getattr(document, signer)), signature, _covered(kind, document)):
        raise Refused("`signature` is wrong", hint="the file was changed after it was signed: get it again")
    spelled = _spelled(found | {"document": document.model_dump(mode="json"), "signature": signature.hex()})
    if spelled != content:
        raise Refused(
            "the spelling was changed after it was signed, though not the meaning",
            hint="get the file again, as an attachment: an editor or a mail program changed it",
        )
    return document
