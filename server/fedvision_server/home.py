"""The folder of a coordinator: where everything lies, and ``server.toml``.

    server.toml                 settings
    keys/governance.pem|.pub    signs rosters and charters; the .pem may be kept on another machine
    keys/operator.pem|.pub      submits and stops jobs
    keys/server.pem|.pub        the server's key in the roster: signs messages and the audit log
    tls/ca.key ca.crt server.key server.crt
    roster.json  rosters/0001.json ...      the roster in force, and every one that was ever signed
    sites/NAME.json             what the server knows of a site
    audit.jsonl  jobs.db  jobs/  flower/

Folders of keys are 0700 and private keys 0600. ``ServerHome`` names paths only; it makes and reads nothing.
"""

import contextlib
import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from fedvision import home
from fedvision.config import Name, Section
from fedvision.secagg.roster import Key

Port = Annotated[int, Field(ge=1, le=65535)]
HOST = re.compile(
    r"^(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]{0,62}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,62})?)*$"
)


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``host:port``; an IPv6 address stands in brackets, and is returned without.

    Raises:
        ValueError: Not such an address.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise ValueError("expected HOST:PORT, such as fl.example.org:9443")
    if host.startswith("[") and host.endswith("]"):
        return str(ipaddress.IPv6Address(host[1:-1])), int(port)
    return checked_host(host), int(port)


def checked_host(host: str) -> str:
    """Return a DNS name or IP address as it is written in certificates.

    Raises:
        ValueError: It is neither.
    """
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(host))
    if not HOST.match(host):
        raise ValueError("expected a DNS name or an IP address")
    return host.lower()


def _address(text: str) -> str:
    split_address(text)
    return text


Address = Annotated[str, AfterValidator(_address)]
Host = Annotated[str, AfterValidator(checked_host)]


class Deadlines(Section):
    """How long a site may take before a round goes on without it."""

    hello_s: Annotated[int, Field(ge=1)] = Field(
        7 * 24 * 3600, description="seconds to answer a new job; people at the sites may have to allow it"
    )
    train_s: Annotated[int, Field(ge=1)] = Field(24 * 3600, description="seconds for one round's training")
    step_s: Annotated[int, Field(ge=1)] = Field(
        600, description="seconds for a step of secure aggregation or an evaluation"
    )


class ServerSettings(Section):
    """What ``server.toml`` says."""

    format: Literal[1] = Field(1, description="version of this file format")
    federation: Name = Field(description="short name of the federation, as in its roster")
    address: Address = Field(description="HOST:PORT under which the sites reach this server")
    listen: Host = Field("0.0.0.0", description="address that the sites' port is opened on")  # noqa: S104
    names: tuple[Host, ...] = Field(
        (), description="more DNS names and IP addresses in the server's certificate; then: renew"
    )
    control_port: Port = Field(
        9093, description="port on 127.0.0.1 for this server's own processes; never open it to a network"
    )
    health_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        9094, description="port on 127.0.0.1 for health and metrics; 0 for none"
    )
    operators: tuple[Key, ...] = Field(
        (), description="public keys, in hexadecimal, of those who may submit and stop jobs"
    )
    auditors: tuple[Key, ...] = Field(
        (), description="public keys, in hexadecimal, of those who may read the audit log and results"
    )
    deadlines: Deadlines = Deadlines()

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        public = split_address(self.address)[1]
        ports = [public, self.control_port, *([self.health_port] if self.health_port else [])]
        if len(set(ports)) != len(ports):
            raise ValueError("the ports of address, control_port and health_port must differ")
        return self

    @model_validator(mode="after")
    def _roles_differ(self) -> Self:
        if set(self.operators) & set(self.auditors):
            raise ValueError("a key is an operator's and an auditor's: each role has a key of its own")
        return self


@dataclass(frozen=True)
class ServerHome:
    """Paths of a coordinator's folder.

    Attributes:
        root: The folder.
    """

    root: Path

    @property
    def config(self) -> Path:
        """``server.toml``."""
        return self.root / "server.toml"

    @property
    def keys(self) -> Path:
        """Folder of the role keys, 0700."""
        return self.root / "keys"

    @property
    def governance(self) -> Path:
        """Governance's private key; absent where it is kept on another machine."""
        return self.keys / "governance.pem"

    @property
    def governance_pub(self) -> Path:
        """Governance's public key."""
        return self.keys / "governance.pub"

    @property
    def operator(self) -> Path:
        """The operator's private key."""
        return self.keys / "operator.pem"

    @property
    def server_key(self) -> Path:
        """The server's private key, whose public half is in the roster."""
        return self.keys / "server.pem"

    @property
    def server_pub(self) -> Path:
        """The server's public key."""
        return self.keys / "server.pub"

    @property
    def tls(self) -> Path:
        """Folder of keys and certificates for TLS, 0700."""
        return self.root / "tls"

    @property
    def ca_key(self) -> Path:
        """Private key of the federation's certificate authority."""
        return self.tls / "ca.key"

    @property
    def ca_cert(self) -> Path:
        """Certificate of the federation's certificate authority, PEM."""
        return self.tls / "ca.crt"

    @property
    def tls_key(self) -> Path:
        """Private key of the server's certificate."""
        return self.tls / "server.key"

    @property
    def tls_cert(self) -> Path:
        """The server's certificate, PEM."""
        return self.tls / "server.crt"

    @property
    def roster(self) -> Path:
        """The signed roster in force; absent before the first site is enrolled."""
        return self.root / "roster.json"

    @property
    def rosters(self) -> Path:
        """Folder of all rosters: ``0001.json`` signed, ``0002.draft.json`` not yet."""
        return self.root / "rosters"

    @property
    def sites(self) -> Path:
        """Folder of the records of sites, ``NAME.json``."""
        return self.root / "sites"

    @property
    def audit(self) -> Path:
        """The hash-chained log."""
        return self.root / "audit.jsonl"

    @property
    def jobs_db(self) -> Path:
        """The queue of jobs, SQLite."""
        return self.root / "jobs.db"

    @property
    def jobs(self) -> Path:
        """Folder of the jobs' run folders."""
        return self.root / "jobs"

    @property
    def flower(self) -> Path:
        """Folder of Flower's database, secret and logs."""
        return self.root / "flower"

    def settings(self) -> ServerSettings:
        """Read ``server.toml``.

        Raises:
            ConfigError: There is none, or it is wrong; the text names the key.
        """
        return home.read_settings(self.config, ServerSettings, "fedvision-server")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other commands from changing sites and rosters at the same time.

        Raises:
            StorageError: The folder is not writable.
        """
        with home.locked(self.root):
            yield
