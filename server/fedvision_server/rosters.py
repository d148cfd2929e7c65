"""The coordinator's rosters: made from the records of the sites, signed by governance, numbered and kept.

    rosters/0001.json ...   every signed roster, by serial; the highest is in force, roster.json is its copy
    rosters/0002.draft.json the next one, where governance's key is on another machine

Rules:
- A roster is made when the records of the enrolled sites say other than the one in force; never otherwise.
- Its file is written under its serial first, then put in force. A command that was killed is run again.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from fedvision.audit.log import AuditLog
from fedvision.errors import ConfigError
from fedvision.secagg import documents, identity
from fedvision.secagg.documents import Refused
from fedvision.secagg.identity import Identity, parse_public
from fedvision.secagg.roster import Member, Roster, load_roster, save_signed, sign_document
from fedvision.storage import write_atomic, write_json
from fedvision_server.home import ServerHome
from fedvision_server.site_records import load_records

ROSTER_FILE = re.compile(r"^(\d{4,})\.json$")


@dataclass(frozen=True)
class RosterState:
    """Where the roster stands.

    Attributes:
        current: In force; None before the first site.
        draft: File that governance has to sign before the roster says what the records say; None if it does.
    """

    current: Roster | None
    draft: Path | None


def governance_key(home: ServerHome) -> bytes:
    """Return governance's public key, 32 bytes.

    Raises:
        ConfigError: It cannot be read.
    """
    return parse_public(
        documents.content_of(home.governance_pub).decode("ascii", "replace"), str(home.governance_pub)
    )[1]


def update_roster(home: ServerHome) -> RosterState:
    """Bring the roster in line with the records: sign the next one, or write its draft for governance.

    Raises:
        ConfigError: A roster or a key is damaged.
    """
    governance = governance_key(home)
    current = latest_roster(home, governance)
    wanted = _wanted(home, current)
    if wanted is None:
        _remove_drafts(home)
        return RosterState(_in_force(home, current), None)
    if home.governance.exists():
        key = identity.load(home.governance)
        if key.public != governance:
            raise ConfigError(f"{home.governance} is not the private half of {home.governance_pub}")
        return RosterState(_install(home, wanted, documents.document_bytes(sign_document(wanted, key))), None)
    draft = home.rosters / f"{wanted.serial:04d}.draft.json"
    write_json(draft, wanted.model_dump(mode="json"))
    return RosterState(_in_force(home, current), draft)


def install_roster(home: ServerHome, signed: Path) -> Roster:
    """Put a roster in force that governance signed on another machine. Done again, it changes nothing.

    Args:
        home: The server's folder; the caller holds ``home.locked()``.
        signed: The file, made from the draft in ``rosters``.

    Raises:
        ConfigError: Not signed by governance, or not what the records say now.
    """
    governance = governance_key(home)
    offered = load_roster(signed, governance)
    current = latest_roster(home, governance)
    if current is not None and offered.digest() == current.digest():
        _in_force(home, current)
        return current
    wanted = _wanted(home, current)
    if wanted is None or wanted.digest() != offered.digest():
        draft = (
            f"sign {update_roster(home).draft} instead" if wanted is not None else "nothing is to be signed"
        )
        raise ConfigError(f"{signed}: not the roster that the sites' records make now", draft)
    return _install(home, wanted, documents.content_of(signed))


def _wanted(home: ServerHome, current: Roster | None) -> Roster | None:
    """Return the roster that the records make, None if ``current`` says the same or no site is left."""
    server = parse_public(
        documents.content_of(home.server_pub).decode("ascii", "replace"), str(home.server_pub)
    )
    members = tuple(
        Member(number=one.number, name=one.name, key=one.identity)
        for one in load_records(home).values()
        if one.status == "enrolled"
    )
    if not members:
        return None
    wanted = Roster(
        federation=home.settings().federation,
        serial=1 if current is None else current.serial + 1,
        sites=members,
        server=server[1].hex(),
    )
    if current is not None and wanted.model_copy(update={"serial": current.serial}) == current:
        return None
    return wanted


def signed_rosters(home: ServerHome) -> dict[int, Path]:
    """Return the files of all signed rosters by serial, ascending."""
    found = {}
    for path in home.rosters.glob("*.json"):
        match = ROSTER_FILE.match(path.name)
        if match:
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def latest_roster(home: ServerHome, governance: bytes) -> Roster | None:
    """Return the signed roster with the highest serial, None before the first.

    Raises:
        ConfigError: It is damaged, or not signed by governance.
    """
    paths = signed_rosters(home)
    if not paths:
        return None
    serial, path = list(paths.items())[-1]
    roster = load_roster(path, governance)
    if roster.serial != serial:
        raise ConfigError(f"{path}: has serial {roster.serial}", "restore it from a back-up")
    return roster


def _install(home: ServerHome, roster: Roster, content: bytes) -> Roster:
    """Store a signed roster under its serial, then put it in force."""
    write_atomic(home.rosters / f"{roster.serial:04d}.json", content)
    _in_force(home, roster)
    _remove_drafts(home)
    return roster


def _in_force(home: ServerHome, latest: Roster | None) -> Roster | None:
    """Make ``roster.json`` the copy of the latest roster; also after a crash between the two writes."""
    if latest is None:
        return None
    content = documents.content_of(home.rosters / f"{latest.serial:04d}.json")
    if not home.roster.exists() or home.roster.read_bytes() != content:
        digest = latest.digest().hex()
        audit_log(home).append("roster", serial=latest.serial, digest=digest, num_sites=len(latest.sites))
        write_atomic(home.roster, content)
    return latest


def _remove_drafts(home: ServerHome) -> None:
    for path in home.rosters.glob("*.draft.json"):
        path.unlink(missing_ok=True)


def load_roster_draft(path: Path) -> Roster:
    """Read a roster that is not signed yet.

    Raises:
        ConfigError: Naming the file, and the field where it is one.
    """
    try:
        return documents.validated(Roster, documents.parse_object(documents.content_of(path)))
    except Refused as refused:
        raise refused.of_file(path) from None


def sign_draft(draft: Roster, key: Identity, out: Path) -> None:
    """Write a roster with governance's signature.

    Raises:
        ConfigError: The key is also the server's or a site's.
    """
    save_signed(out, sign_document(draft, key))


def audit_log(home: ServerHome) -> AuditLog:
    """Return the server's audit log."""
    return AuditLog(home.audit, identity.load(home.server_key), "server")
