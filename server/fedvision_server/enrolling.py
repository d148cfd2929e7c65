"""Enrolling, renewing and revoking sites at the coordinator, and the kits that they get.

Rules:
- The records say who takes part, and the rosters follow from them, see ``site_records`` and ``rosters``. So a
  command that was killed is run again, and finishes what is missing.
- A number, or an identity key, is never given to another site, nor again to a site that was revoked.
- The same request again gives the same kit. An older request than the one enrolled is refused.
- A revoked site is shut out at once, by its record; the next roster is without it.
- What is done stands in the audit log before it is done.
"""

import json
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Literal

from fedvision.errors import ConfigError
from fedvision.secagg import certificates, documents, identity, issuing
from fedvision.secagg.documents import Refused
from fedvision.secagg.enrolling import EnrolmentRequest, SiteKit, sign_kit, time_text
from fedvision.secagg.identity import parse_public
from fedvision.secagg.roster import MAX_SITES
from fedvision_server.home import ServerHome
from fedvision_server.rosters import RosterState, audit_log, governance_key, latest_roster, update_roster
from fedvision_server.site_records import Former, SiteRecord, load_records, save_record

Change = Literal["none", "renewal", "new", "new key", "again"]
"""A request: the enrolled one, a new certificate, a new site, another key, a revoked site that returns."""
LARGEST_CLOCK_ERROR = timedelta(days=1)
NEW_IDENTITY = "the site makes a new key: `fedvision-site init --renew --new-identity`, then --replace here"


def examine(home: ServerHome, request: EnrolmentRequest, replace: bool, now: datetime) -> Change:
    """Return what a request would change; changes nothing.

    Args:
        home: The server's folder.
        request: Read and checked.
        replace: Whether a new key of a known site is meant.
        now: The time, UTC.

    Raises:
        ConfigError: It must not be enrolled; the hint says what to do.
    """
    return _examined(home, load_records(home), request, replace, now)


def _examined(
    home: ServerHome,
    records: Mapping[str, SiteRecord],
    request: EnrolmentRequest,
    replace: bool,
    now: datetime,
) -> Change:
    if request.created > time_text(now + LARGEST_CLOCK_ERROR):
        raise ConfigError(
            f"{request.name}: the request is of {request.created}, which has not come yet",
            "set the clock, at the site or here; then `fedvision-site init --renew`",
        )
    known = records.get(request.name)
    for one in records.values():
        if one.name != request.name and one.name.casefold() == request.name.casefold():
            raise ConfigError(f"there is a site {one.name} already", "choose a name that differs by more")
    _check_keys_are_its_own(home, records, request)
    if known is None:
        return "new"
    if known.request == request.digest().hex() and known.status == "enrolled":
        return "none"
    if request.identity in {one.identity for one in known.former}:
        raise ConfigError(f"{request.name}: a key that was replaced, which never counts again", NEW_IDENTITY)
    if known.identity == request.identity:
        if known.status == "revoked":
            raise ConfigError(f"{request.name} was revoked, and its key never counts again", NEW_IDENTITY)
        if request.created <= known.requested:
            raise ConfigError(
                f"{request.name}: the request is of {request.created}, one of {known.requested} is enrolled",
                "an old request is not enrolled again; a new one: `fedvision-site init --renew`",
            )
        return "renewal"
    if not replace:
        what = "was revoked" if known.status == "revoked" else "is enrolled with another key"
        raise ConfigError(
            f"{request.name} {what}",
            f"if the site lost its key, ask by telephone, then --replace; a stranger takes another name, and "
            f"a stolen key is revoked first: `fedvision-server revoke {request.name}`",
        )
    if known.status == "revoked" and request.node_key.encode().hex() == known.node_key:
        raise ConfigError(f"{request.name} was revoked, and its node key with it", NEW_IDENTITY)
    return "again" if known.status == "revoked" else "new key"


def _check_keys_are_its_own(
    home: ServerHome, records: Mapping[str, SiteRecord], request: EnrolmentRequest
) -> None:
    """Refuse a key that belongs to another party."""
    for path in (home.governance_pub, home.server_pub, home.operator.with_suffix(".pub")):
        if path.exists():
            text = documents.content_of(path).decode("ascii", "replace")
            if parse_public(text, str(path))[1].hex() == request.identity:
                raise ConfigError(f"the key of {request.name} is that of the {path.stem}")
    settings = home.settings()
    if request.identity in {*settings.operators, *settings.auditors}:
        raise ConfigError(f"the key of {request.name} is an operator's or an auditor's")
    requested = certificates.requested_key(request.certificate_request.encode())
    for one in records.values():
        if one.name == request.name:
            continue
        if request.identity in {one.identity, *(former.identity for former in one.former)}:
            raise ConfigError(f"the key of {request.name} is that of site {one.name}")
        if request.node_key.encode().hex() == one.node_key:
            raise ConfigError(f"the node key of {request.name} is that of site {one.name}")
        if certificates.certified_key(one.certificate.encode()) == requested:
            raise ConfigError(f"the TLS key of {request.name} is that of site {one.name}")


def enrol(home: ServerHome, request: EnrolmentRequest, replace: bool, now: datetime) -> RosterState:
    """Enrol a site, or give it a new certificate or key; the caller has compared the fingerprint.

    Guarantee: killed at any point and called again, it ends with the same record, roster and kit as if it had
    not been killed, but for the certificate's serial number and date if it was not issued yet.

    Args:
        home: The server's folder; the caller holds ``home.locked()``.
        request: Read and checked.
        replace: Whether a new key of a known site is meant.
        now: The time, UTC.

    Raises:
        ConfigError: See ``examine``. StorageError: A file cannot be written.
    """
    records = load_records(home)
    change = _examined(home, records, request, replace, now)
    if change != "none":
        record = _new_record(home, records, request, change, now)
        audit_log(home).append(
            "enrolment",
            site=record.name,
            number=record.number,
            identity=record.identity,
            request=record.request,
            certificate=record.certificate_serial,
            change=change,
        )
        save_record(home, record)
    return update_roster(home)


def _new_record(
    home: ServerHome,
    records: Mapping[str, SiteRecord],
    request: EnrolmentRequest,
    change: Change,
    now: datetime,
) -> SiteRecord:
    known = records.get(request.name)
    former = () if known is None else known.former
    if known is not None and change in ("new key", "again"):
        reason = known.reason or "replaced"
        until = known.since if change == "again" else time_text(now)
        former += (Former(number=known.number, identity=known.identity, until=until, reason=reason),)
    if known is not None and change in ("renewal", "new key"):
        number = known.number
    else:
        number = _next_number(records.values())
    certificate = _issue(home, request, now)
    facts = certificates.facts_of(certificate)
    return SiteRecord(
        name=request.name,
        number=number,
        identity=request.identity,
        node_key=request.node_key.encode().hex(),
        certificate=certificate.decode(),
        certificate_serial=facts.serial,
        fingerprint=facts.fingerprint,
        request=request.digest().hex(),
        requested=request.created,
        status="enrolled",
        since=known.since if known is not None and change == "renewal" else time_text(now),
        former=former,
    )


def _issue(home: ServerHome, request: EnrolmentRequest, now: datetime) -> bytes:
    authority = (certificates.read_private(home.ca_key), documents.content_of(home.ca_cert))
    try:
        return issuing.site_certificate(authority, request.certificate_request.encode(), request.name, now)
    except Refused as refused:
        raise refused.of_file(home.ca_cert) from None


def _next_number(records: Iterable[SiteRecord]) -> int:
    """Return one more than the highest number that was ever given; a site's former ones are lower."""
    number = max((one.number for one in records), default=0) + 1
    if number > MAX_SITES:
        raise ConfigError(
            f"all {MAX_SITES} site numbers were given, and none is given twice",
            "found a new federation: `fedvision-server init` in another folder",
        )
    return number


def revoke(home: ServerHome, name: str, reason: str, now: datetime) -> RosterState:
    """Shut a site out: at once by its record, and from every job to come by the next roster.

    Args:
        home: The server's folder; the caller holds ``home.locked()``.
        name: Of the site.
        reason: Why, for the audit log and the record.
        now: The time, UTC.

    Raises:
        ConfigError: There is no such site.
    """
    record = load_records(home).get(name)
    if record is None:
        raise ConfigError(
            f"there is no site {ascii(name)[1:-1][:64]}", "`fedvision-server roster` lists them"
        )
    if record.status == "enrolled":
        reason = " ".join(reason.split())[:500]
        audit_log(home).append(
            "revocation", site=name, number=record.number, identity=record.identity, reason=reason
        )
        changed = {"status": "revoked", "since": time_text(now), "reason": reason}
        save_record(home, record.model_copy(update=changed))
    return update_roster(home)


def kit_of(home: ServerHome, name: str) -> bytes:
    """Return the file of a site's kit; the same bytes until roster, certificate or address change.

    Raises:
        ConfigError: The site is not in the roster in force.
    """
    record = load_records(home)[name]
    governance = governance_key(home)
    current = latest_roster(home, governance)
    members = {} if current is None else {one.name: one for one in current.sites}
    if name not in members or members[name].key != record.identity or record.status != "enrolled":
        raise ConfigError(
            f"the roster in force does not have {name} with this key", "governance signs it first"
        )
    server = identity.load(home.server_key)
    settings = home.settings()
    kit = SiteKit(
        federation=settings.federation,
        name=name,
        number=record.number,
        server=settings.address,
        authority=documents.content_of(home.ca_cert).decode(),
        certificate=record.certificate,
        governance=governance.hex(),
        server_key=server.public.hex(),
        roster=documents.content_of(home.roster).decode(),
    )
    return sign_kit(kit, server)


def kit_name(content: bytes) -> str | None:
    """Return the site that a file says it is the kit of, None if it is no kit; proves nothing."""
    try:
        found = json.loads(content)
        return str(found["document"]["name"]) if found["kind"] == "site-kit" else None
    except (ValueError, TypeError, KeyError):
        return None
