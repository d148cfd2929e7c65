"""What the server knows of each site: one file ``sites/NAME.json``, with its keys, certificate and status."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fedvision.config import Name, Section
from fedvision.errors import ConfigError
from fedvision.secagg import certificates, documents
from fedvision.secagg.documents import Refused
from fedvision.secagg.enrolling import Time
from fedvision.secagg.roster import Hex32, Key, SiteNumber
from fedvision.storage import write_json
from fedvision_server.home import ServerHome


class Former(Section):
    """A key that a site had."""

    number: SiteNumber
    identity: Key
    until: Time
    reason: Annotated[str, Field(max_length=500)]


class SiteRecord(Section):
    """What the server knows of a site."""

    format: Literal[1] = Field(1, description="version of this file format")
    name: Name = Field(description="as in the roster")
    number: SiteNumber = Field(description="as in the roster")
    identity: Key = Field(description="Ed25519 identity key, hexadecimal")
    node_key: Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$", max_length=4096)] = Field(
        description="public key for Flower: the bytes that its client sends, hexadecimal"
    )
    certificate: Annotated[str, Field(max_length=certificates.LARGEST_PEM)] = Field(description="PEM")
    certificate_serial: Annotated[str, Field(pattern=r"^([0-9A-F]{2})+$", max_length=40)] = Field(
        description="its serial number as `ssl` shows it"
    )
    fingerprint: Hex32 = Field(description="SHA-256 of the certificate")
    request: Hex32 = Field(description="digest of the request that it was made from")
    requested: Time = Field(description="when that was made")
    status: Literal["enrolled", "revoked"]
    since: Time = Field(description="when the status last changed")
    reason: Annotated[str, Field(max_length=500)] = Field("", description="why it was revoked")
    former: tuple[Former, ...] = Field((), description="keys that count no more, oldest first")
    node_id: int | None = Field(None, description="Flower's name for the node; a routing hint")

    @property
    def public(self) -> bytes:
        """The identity key, 32 bytes."""
        return bytes.fromhex(self.identity)


def load_records(home: ServerHome) -> dict[str, SiteRecord]:
    """Return the records of all sites ever enrolled, by name, in the order of their numbers.

    Raises:
        ConfigError: A record is damaged.
    """
    found = [_read_record(path) for path in sorted(home.sites.glob("*.json"))]
    return {one.name: one for one in sorted(found, key=lambda one: one.number)}


def _read_record(path: Path) -> SiteRecord:
    try:
        record = documents.validated(SiteRecord, documents.parse_object(documents.content_of(path)))
    except Refused as refused:
        raise refused.of_file(path) from None
    if record.name != path.stem:
        raise ConfigError(f"{path}: the record of another site, {record.name}", "restore it from a back-up")
    return record


def save_record(home: ServerHome, record: SiteRecord) -> None:
    """Write a record, atomically."""
    write_json(home.sites / f"{record.name}.json", record.model_dump(mode="json"))
