"""The folder of a site: where everything lies, and ``site.toml``.

    site.toml                   settings, and the site's policy
    keys/identity.pem|.pub      the site's key in the roster; keys/node.pem is Flower's
    tls/site.key site.crt ca.crt
    request.json                the enrolment request, for the coordinator
    trust/governance.pub roster.json server.pub     written by `fedvision-site join`
    guard/                      high-water marks; never restored from a back-up
    jobs/<16 hex of the job's digest>/      state of one job
    decisions/<job digest>.json             what was asked and decided
    audit.jsonl
    privacy-ledger.jsonl        what private jobs have cost the patients

Folders of keys are 0700 and private keys 0600. ``SiteHome`` names paths only; it makes and reads nothing.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fedvision import home
from fedvision.config import Name, Section
from fedvision.secagg.enrolling import ADDRESS
from fedvision_sites.policy import Policy


class SiteSection(Section):
    """This site, its data set and its part of the machine."""

    name: Name = Field(description="short name of the site, as in the roster; never changed")
    data: Path = Field(description="folder of the data set, with its manifest.json")
    server: Annotated[str, Field(max_length=300, pattern=f"^$|{ADDRESS}")] = Field(
        "", description="HOST:PORT of the coordinator; `fedvision-site join` fills it in"
    )
    threads: Annotated[int, Field(ge=1, le=1024)] = Field(4, description="CPU threads for training")
    cache_gb: Annotated[float, Field(ge=0)] = Field(2.0, description="memory for decoded images, in GB")
    poll_s: Annotated[float, Field(ge=0.1, le=300)] = Field(
        1.0, description="seconds between two questions for work to a server that does not hold them"
    )
    health_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        9095, description="port on 127.0.0.1 for health and metrics; 0 for none"
    )


class SiteSettings(Section):
    """What ``site.toml`` says."""

    format: Literal[1] = Field(1, description="version of this file format")
    site: SiteSection
    policy: Policy = Policy()


@dataclass(frozen=True)
class SiteHome:
    """Paths of a site's folder.

    Attributes:
        root: The folder.
    """

    root: Path

    @property
    def config(self) -> Path:
        """``site.toml``."""
        return self.root / "site.toml"

    @property
    def keys(self) -> Path:
        """Folder of the site's keys, 0700."""
        return self.root / "keys"

    @property
    def identity(self) -> Path:
        """The site's private Ed25519 key, whose public half is in the roster."""
        return self.keys / "identity.pem"

    @property
    def identity_pub(self) -> Path:
        """The site's public Ed25519 key."""
        return self.keys / "identity.pub"

    @property
    def next_identity(self) -> Path:
        """A new identity that the coordinator has not enrolled yet; else absent."""
        return self.keys / "next.pem"

    @property
    def node_key(self) -> Path:
        """Flower's node key, EC P-384, PEM."""
        return self.keys / "node.pem"

    @property
    def next_node_key(self) -> Path:
        """A new node key that goes with a new identity; else absent."""
        return self.keys / "next-node.pem"

    @property
    def tls(self) -> Path:
        """Folder of key and certificates for TLS, 0700."""
        return self.root / "tls"

    @property
    def tls_key(self) -> Path:
        """Private key of the site's certificate."""
        return self.tls / "site.key"

    @property
    def next_tls_key(self) -> Path:
        """A new private key for TLS whose certificate has not come yet; else absent."""
        return self.tls / "next.key"

    @property
    def tls_cert(self) -> Path:
        """The site's certificate, PEM; absent before `join`."""
        return self.tls / "site.crt"

    @property
    def ca_cert(self) -> Path:
        """Certificate of the federation's certificate authority, PEM; absent before `join`."""
        return self.tls / "ca.crt"

    @property
    def request(self) -> Path:
        """The enrolment request."""
        return self.root / "request.json"

    @property
    def trust(self) -> Path:
        """Folder of what this site trusts."""
        return self.root / "trust"

    @property
    def governance(self) -> Path:
        """The pinned public key of governance, one line; absent before `join`."""
        return self.trust / "governance.pub"

    @property
    def server_pub(self) -> Path:
        """The server's public key, as in the roster; absent before `join`."""
        return self.trust / "server.pub"

    @property
    def trust_roster(self) -> Path:
        """The newest signed roster that this site has seen; absent before `join`."""
        return self.trust / "roster.json"

    @property
    def guard(self) -> Path:
        """Folder of the high-water marks."""
        return self.root / "guard"

    @property
    def roster_mark(self) -> Path:
        """Serial and digest of the newest roster that this site has seen."""
        return self.guard / "roster.json"

    @property
    def jobs(self) -> Path:
        """Folder of the state folders of jobs."""
        return self.root / "jobs"

    @property
    def decisions(self) -> Path:
        """Folder of what was asked of this site, and what it decided."""
        return self.root / "decisions"

    @property
    def ledger(self) -> Path:
        """What the patients have spent, over all jobs."""
        return self.root / "privacy-ledger.jsonl"

    @property
    def audit(self) -> Path:
        """The hash-chained log."""
        return self.root / "audit.jsonl"

    def settings(self) -> SiteSettings:
        """Read ``site.toml``; a relative ``data`` is taken from the folder.

        Raises:
            ConfigError: There is none, or it is wrong; the text names the key.
        """
        found = home.read_settings(self.config, SiteSettings, "fedvision-site")
        data = (self.root / found.site.data.expanduser()).resolve()
        return found.model_copy(update={"site": found.site.model_copy(update={"data": data})})

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other commands from changing keys and trust at the same time.

        Raises:
            StorageError: The folder is not writable.
        """
        with home.locked(self.root):
            yield
