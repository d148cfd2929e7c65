"""How a site comes into being and joins: its keys, its request, and what it takes over from a kit.

Rules:
- Private keys are made here and never leave. What exists is not overwritten: a new key waits beside the old
  one, as ``next.key`` and ``next.pem``, until a kit comes that fits it.
- The governance key is pinned at the first kit, after a person compared it; every later kit and roster must
  bear its signature. To trust another governance, a site begins anew in another folder.
- A roster is taken if it is newer than every one seen before. The mark in ``guard`` remembers that also when
  the rest of the folder is restored from a back-up.
- Every step may be cut off: `init` or `join`, run again with the same file, does what is missing.
"""

import json
import re
import tomllib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import Field

from fedvision import __version__
from fedvision.audit.log import AuditLog
from fedvision.config import Section
from fedvision.errors import ConfigError, FedvisionError, ProtocolError, StorageError
from fedvision.privacy.ledger import Ledger
from fedvision.privacy.ledger_lines import read_ledger
from fedvision.secagg import certificates, documents, identity, issuing
from fedvision.secagg.documents import Refused
from fedvision.secagg.enrolling import (
    CheckedKit,
    EnrolmentRequest,
    SiteKit,
    ensure_identity,
    ensure_key,
    private_folder,
    read_request,
    sign_request,
    time_text,
)
from fedvision.secagg.identity import Identity, parse_public, public_line, verify
from fedvision.secagg.roster import Hex32, Roster, check_succession, load_roster, parse_signed
from fedvision.storage import write_atomic, write_json, write_text
from fedvision_sites.home import SiteHome

SERVER_LINE = re.compile(r"^(\s*server\s*=\s*)(\"[^\"\n]*\"|'[^'\n]*')", re.MULTILINE)
OWN = frozenset({"site.toml", "keys", "tls", "trust", "guard", "request.json"})
"""What `init` makes; a folder with nothing else in it may be one whose `init` was cut off."""


class RosterMark(Section):
    """The newest roster that the site has seen."""

    format: Literal[1] = Field(1, description="version of this file format")
    serial: int
    digest: Hex32


def make_site(home: SiteHome, name: str, data: Path, settings: str, now: datetime) -> EnrolmentRequest:
    """Make keys, ``site.toml`` and the enrolment request; what is there already stays.

    Args:
        home: An empty folder, one that does not exist, or one whose `init` was cut off.
        name: Of the site.
        data: Folder of its data set.
        settings: Text of ``site.toml``.
        now: The time, UTC.

    Returns:
        The request, which is also in ``request.json``.

    Raises:
        ConfigError: The name does not do, or is not that of the keys that are there.
        StorageError: Something else is in the folder, or it is not writable.
    """
    check_folder(home)
    private_folder(home.root)
    with home.locked():
        own = ensure_identity(home.identity, name)
        ensure_key(home.node_key, issuing.new_node_key)
        ensure_key(home.tls_key, issuing.new_tls_key)
        private_folder(home.guard)
        if not home.config.exists():
            write_text(home.config, settings, 0o600)
        elif home.settings().site.data != data.resolve():
            raise ConfigError(f"{home.config} has another data set", "change it there")
        return _write_request(home, own, home.tls_key, home.node_key, now)


def check_folder(home: SiteHome) -> None:
    """Check that a site can be made in a folder.

    Raises:
        StorageError: Something else is in it.
    """
    if not home.root.exists():
        return
    if not home.root.is_dir():
        raise StorageError(f"{home.root} is not a folder")
    if home.tls_cert.exists():
        raise StorageError(
            f"the site in {home.root} has joined a federation already",
            "--renew asks for a new certificate; a new site needs a new folder",
        )
    others = sorted(one.name for one in home.root.iterdir() if one.name not in OWN and one.name[0] != ".")
    if others:
        raise StorageError(f"{home.root} is not empty, it has {others[0]}", "choose a new folder")


def renew(home: SiteHome, new_identity: bool, now: datetime) -> EnrolmentRequest:
    """Make a request with a new key for TLS, and if wanted a new identity. The old keys stay in use.

    With a new identity goes a new node key: Flower lets none in again that was shut out.

    Args:
        home: Of a site.
        new_identity: The identity key is lost, or somebody else may have it.
        now: The time, UTC.

    Raises:
        ConfigError: Not a site's folder. StorageError: The identity key cannot be read.
    """
    name = home.settings().site.name
    with home.locked():
        own = ensure_identity(home.next_identity, name) if new_identity else identity.load(home.identity)
        node_key = home.next_node_key if new_identity else home.node_key
        ensure_key(node_key, issuing.new_node_key)
        ensure_key(home.next_tls_key, issuing.new_tls_key)
        return _write_request(home, own, home.next_tls_key, node_key, now)


def _write_request(
    home: SiteHome, own: Identity, tls_key: Path, node_key_path: Path, now: datetime
) -> EnrolmentRequest:
    """Write the request for these keys, unless it is there already."""
    try:
        wanted = issuing.make_request(certificates.read_private(tls_key), own.name).decode()
        node_key = certificates.node_public(certificates.read_private(node_key_path)).decode()
        if home.request.exists():
            try:
                found = read_request(documents.content_of(home.request))
                keys = (found.identity, found.node_key, certificates.requested_key(_pem(found)))
                if keys == (own.public.hex(), node_key, certificates.requested_key(wanted.encode())):
                    return found
            except Refused:
                pass  # Damaged: it is made again.
        request = documents.validated(
            EnrolmentRequest,
            {
                "name": own.name,
                "identity": own.public.hex(),
                "certificate_request": wanted,
                "node_key": node_key,
                "version": __version__,
                "created": time_text(now),
            },
        )
    except Refused as refused:
        raise refused.of_file(home.request) from None
    write_atomic(home.request, sign_request(request, own))
    return request


def _pem(request: EnrolmentRequest) -> bytes:
    return request.certificate_request.encode()


def join(home: SiteHome, found: CheckedKit, agree: Callable[[bytes], None]) -> Roster:
    """Take over a kit: certificates, trust, roster, address.

    Guarantee: nothing is written before every check has passed. The first kit's governance key counts only
    if ``agree`` returns; a later kit of another governance, an older roster, a kit of another site or for
    keys that this site does not have is refused.

    Args:
        home: Of the site.
        found: The kit, from ``kit_of_file``.
        agree: Is shown the governance key, 32 bytes, if none is pinned; raises if the person does not agree.

    Returns:
        The roster in force at this site.

    Raises:
        ConfigError, ProtocolError: The kit does not fit.
        StorageError: A file cannot be read or written.
    """
    kit, settings = found.kit, home.settings()
    if kit.name != settings.site.name:
        raise ConfigError(f"the kit is for {kit.name}, this is {settings.site.name}")
    pinned = pinned_governance(home)
    if pinned is not None and pinned != found.governance:
        raise ConfigError(
            "the kit is of another governance than the one that this site trusts",
            "call governance on a number that you had before; a site that is to trust another governance is "
            "made anew: `fedvision-site init` in another folder",
        )
    own_key = _key_for_identity(home, found)
    if own_key == home.identity:
        check_guard(home)
    tls_key = _key_for_certificate(home, kit)
    _check_roster(home, found.roster, pinned)
    if pinned is None:
        agree(found.governance)
    with home.locked():
        if pinned is None:
            write_text(home.governance, public_line("governance", found.governance) + "\n")
        if own_key != home.identity:
            _change_identity(home)
        _take_roster(home, found.roster, kit.roster.encode())
        if tls_key != home.tls_key:
            tls_key.replace(home.tls_key)
        _set_server(home, kit.server)
        if not home.ca_cert.exists() or home.ca_cert.read_text("ascii", "replace") != kit.authority:
            write_text(home.ca_cert, kit.authority)
        if not home.tls_cert.exists() or home.tls_cert.read_text("ascii", "replace") != kit.certificate:
            _log(home).append(
                "enrolment",
                site=kit.name,
                number=kit.number,
                governance=kit.governance,
                server=kit.server_key,
                certificate=certificates.facts_of(kit.certificate.encode()).serial,
            )
            write_text(home.tls_cert, kit.certificate)
    return found.roster


def check_guard(home: SiteHome) -> None:
    """Check that a site which has joined knows how far it went.

    Raises:
        StorageError: Its high-water marks are gone. With the old identity it could answer twice what it
            answered before.
    """
    if home.trust_roster.exists() and not home.roster_mark.exists():
        raise StorageError(
            f"{home.guard} is gone or empty: nothing shows what this site has answered",
            f"a site without it needs a new identity: fedvision-site init {home.root} --renew --new-identity",
        )


def pinned_governance(home: SiteHome) -> bytes | None:
    """Return the governance key that this site trusts, None before the first `join`.

    Raises:
        ConfigError: The file is damaged.
    """
    if not home.governance.exists():
        return None
    return parse_public(
        documents.content_of(home.governance).decode("ascii", "replace"), str(home.governance)
    )[1]


def known_roster(home: SiteHome) -> Roster | None:
    """Return the newest roster that this site has, None before the first `join`.

    Raises:
        ConfigError: It is damaged, or not signed by the pinned governance key.
    """
    pinned = pinned_governance(home)
    if pinned is None or not home.trust_roster.exists():
        return None
    return load_roster(home.trust_roster, pinned)


def install_roster(home: SiteHome, content: bytes) -> Roster:
    """Take over a roster that came with a job, if it is newer; the same one again changes nothing.

    Args:
        home: Of a site that has joined.
        content: The signed roster's file, byte for byte.

    Returns:
        The roster; this site may not be in it any more.

    Raises:
        ProtocolError: It is older than one that this site has seen, or this site has not joined.
        MessageError: It is not signed by the pinned governance key.
    """
    pinned = pinned_governance(home)
    if pinned is None:
        raise ProtocolError("roster", "this site has not joined a federation")
    roster = parse_signed(content, "roster", pinned)
    with home.locked():
        _check_roster(home, roster, pinned)
        _take_roster(home, roster, content)
    return roster


def _check_roster(home: SiteHome, offered: Roster, pinned: bytes | None) -> None:
    """Refuse a roster older than the known one, or than the mark."""
    known = known_roster(home) if pinned is not None else None
    if known is not None:
        check_succession(known, offered)
    if not home.roster_mark.exists():
        return
    try:
        mark = documents.validated(RosterMark, documents.parse_object(documents.content_of(home.roster_mark)))
    except Refused as refused:
        raise refused.of_file(home.roster_mark) from None
    is_marked = offered.serial == mark.serial and offered.digest().hex() == mark.digest
    if offered.serial <= mark.serial and not is_marked:
        raise ProtocolError(
            "roster-old",
            f"the roster has serial {offered.serial}, this site has seen serial {mark.serial}",
            "ask the coordinator for the newest kit",
        )


def _take_roster(home: SiteHome, roster: Roster, content: bytes) -> None:
    """Store a checked roster: first the mark, then what it stands for."""
    digest = roster.digest().hex()
    files = (home.trust_roster, home.server_pub, home.roster_mark)
    if all(path.exists() for path in files) and home.trust_roster.read_bytes() == content:
        return
    _log(home).append("roster", serial=roster.serial, digest=digest, num_sites=len(roster.sites))
    private_folder(home.guard)
    write_json(home.roster_mark, {"format": 1, "serial": roster.serial, "digest": digest}, 0o600)
    write_text(home.server_pub, public_line("server", bytes.fromhex(roster.server)) + "\n")
    write_atomic(home.trust_roster, content)


def _log(home: SiteHome) -> AuditLog:
    own = identity.load(home.identity)
    return AuditLog(home.audit, own, own.name)


def _key_for_identity(home: SiteHome, found: CheckedKit) -> Path:
    """Return the file of the identity that the kit's roster has for this site."""
    key = bytes.fromhex(found.roster.member(found.kit.number).key)
    unread: FedvisionError | None = None
    for path in (home.identity, home.next_identity):
        if path.exists():
            try:
                if identity.load(path).public == key:
                    return path
            except StorageError as error:
                unread = error
    if unread is not None:
        raise unread
    raise ConfigError(
        "the kit is for another identity key than this site's",
        "an old kit, or a stranger enrolled under this name: call the coordinator",
    )


def _key_for_certificate(home: SiteHome, kit: SiteKit) -> Path:
    """Return the file of the private key that the kit's certificate belongs to."""
    for path in (home.next_tls_key, home.tls_key):
        if path.exists() and certificates.fits(kit.certificate.encode(), certificates.read_private(path)):
            return path
    raise ConfigError(
        "the kit's certificate does not belong to this site's TLS key",
        "an old kit? `fedvision-site init --renew` makes a new request, for a new kit",
    )


def _change_identity(home: SiteHome) -> None:
    """Put the new identity in the old one's place, and hand the audit log over to it."""
    new = identity.load(home.next_identity)
    try:
        old = identity.load(home.identity)
    except StorageError:
        _put_log_away(home)  # The old key is lost: nobody can continue its log.
    else:
        log = AuditLog(home.audit, old, old.name)
        if not _is_handed_over(home, new):
            log.change_key(new)
    _take_ledger_over(home, new)
    write_text(home.identity_pub, public_line(new.name, new.public) + "\n")
    home.next_identity.with_suffix(".pub").unlink(missing_ok=True)
    if home.next_node_key.exists():
        home.next_node_key.replace(home.node_key)
    home.next_identity.replace(home.identity)


def _take_ledger_over(home: SiteHome, new: Identity) -> None:
    """Let the new key go on with the privacy ledger: what patients have spent stays spent."""
    last = next(reversed([*read_ledger(home.ledger)]), None) if home.ledger.exists() else None
    if last is not None and last.line.key != new.public.hex():
        Ledger(home.ledger, home.guard, new).take_over(bytes.fromhex(last.line.key), verify)


def _is_handed_over(home: SiteHome, new: Identity) -> bool:
    """Whether the log's last line is one that the new key continues."""
    if not home.audit.exists():
        return False
    try:
        AuditLog(home.audit, new, new.name).head()
    except StorageError:
        return False
    return True


def _put_log_away(home: SiteHome) -> None:
    """Move the log of a lost key to a folder of its own."""
    parts = sorted(home.root.glob("audit*.jsonl"))
    for number in range(1, 1000):
        folder = home.root / f"audit-of-lost-key-{number}"
        if parts and not folder.exists():
            folder.mkdir(mode=0o700)
            for part in parts:
                part.rename(folder / part.name)
            return


def _set_server(home: SiteHome, address: str) -> None:
    """Write the coordinator's address into ``site.toml``; comments and all else stay as they are.

    Raises:
        ConfigError: The file has no line for it.
    """
    text = home.config.read_text(encoding="utf-8")
    if tomllib.loads(text)["site"].get("server") == address:
        return
    changed = SERVER_LINE.sub(lambda match: match[1] + json.dumps(address), text, count=1)
    try:
        is_set = tomllib.loads(changed)["site"].get("server") == address
    except tomllib.TOMLDecodeError:
        is_set = False
    if not is_set:
        raise ConfigError(
            f"{home.config}: no line `server = ...` to change", f'write under [site]: server = "{address}"'
        )
    write_text(home.config, changed, home.config.stat().st_mode & 0o777)
