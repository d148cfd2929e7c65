"""``fedvision-site check``: everything that would keep a site from running, found before it runs.

Each check looks at one thing and returns findings; a problem stops the site, a warning does not. Nothing is
changed, and nothing is sent but one GET request, which holds no data.
"""

import email.utils
import http.client
import shutil
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from fedvision.errors import FedvisionError
from fedvision.secagg import certificates, documents, identity
from fedvision.secagg.documents import Refused
from fedvision.secagg.roster import Roster
from fedvision_sites.home import SiteHome, SiteSettings
from fedvision_sites.setup import check_guard, known_roster, pinned_governance

LARGEST_CLOCK_ERROR_S = 60.0
SOON = timedelta(days=60)
LEAST_FREE_GB, LITTLE_FREE_GB = 1.0, 20.0
TIMEOUT_S = 15.0
FLEET_PATH = "/v1/fleet/"
SHOWN = 3
NOT_JOINED = "send request.json to the coordinator, then `fedvision-site join KIT`"
OTHER_SERVER = (
    "this is not the server of this federation, or its certificate was not renewed: ask the coordinator, and "
    "check this machine's clock"
)
Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        subject: What was looked at.
        level: A problem keeps the site from running.
        text: What was found.
        hint: What to do.
    """

    subject: str
    level: Level
    text: str
    hint: str = ""


def check_home(home: SiteHome, now: datetime, with_data: bool = True) -> Iterator[Finding]:
    """Look at everything, one finding after another.

    Args:
        home: The site's folder.
        now: The time, UTC.
        with_data: Read every file of the data set.
    """
    try:
        settings = home.settings()
    except FedvisionError as error:
        yield _problem("settings", error)
        return
    yield Finding("settings", "ok", f"site {settings.site.name}")
    yield from _guarded("keys", lambda: _keys(home, settings))
    yield from _guarded("certificate", lambda: _certificate(home, settings, now))
    yield from _guarded("roster", lambda: _roster(home, settings))
    yield from _guarded("server", lambda: _server(home, settings))
    yield from _guarded("guard", lambda: _guard(home))
    yield from _guarded("disk", lambda: _disk(home))
    yield from _gpu()
    yield from _guarded("data set", lambda: _data(settings, with_data))


def _problem(subject: str, error: FedvisionError) -> Finding:
    return Finding(subject, "problem", str(error), error.hint)


def _guarded(subject: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Turn an error into a finding, so that the other checks are still made."""
    try:
        yield from check()
    except FedvisionError as error:
        yield _problem(subject, error)
    except Refused as refused:
        yield Finding(subject, "problem", refused.text, refused.hint)
    except OSError as error:
        yield Finding(subject, "problem", (error.strerror or str(error)).lower())


def _guard(home: SiteHome) -> Iterator[Finding]:
    check_guard(home)
    yield Finding("guard", "ok", "high-water marks are there")


def _keys(home: SiteHome, settings: SiteSettings) -> Iterator[Finding]:
    own = identity.load(home.identity)
    if own.name != settings.site.name:
        yield Finding(
            "keys",
            "problem",
            f"the identity key is of {own.name}, site.toml says {settings.site.name}",
            "a site keeps its name: change it back in site.toml",
        )
        return
    certificates.node_public(certificates.read_private(home.node_key))
    certificates.read_private(home.tls_key)
    for folder in (home.keys, home.tls):
        mode = folder.stat().st_mode & 0o777
        if mode & 0o077:
            yield Finding("keys", "warning", f"others can look into {folder.name}/", f"chmod 700 {folder}")
    yield Finding("keys", "ok", "identity, node and TLS key, for this user only")
    if home.next_tls_key.exists() or home.next_identity.exists():
        yield Finding(
            "keys", "warning", "a renewal waits for its kit", "send request.json to the coordinator"
        )


def _certificate(home: SiteHome, settings: SiteSettings, now: datetime) -> Iterator[Finding]:
    if not home.tls_cert.exists():
        yield Finding("certificate", "problem", "there is none", NOT_JOINED)
        return
    content, authority = documents.content_of(home.tls_cert), documents.content_of(home.ca_cert)
    facts = certificates.facts_of(content)
    certificates.check_certificate(content, authority, "site", now)
    if facts.name != settings.site.name:
        yield Finding("certificate", "problem", f"it is for {facts.name}", "join with this site's own kit")
    elif not certificates.fits(content, certificates.read_private(home.tls_key)):
        hint = "`fedvision-site join KIT` again, with the newest kit; else `fedvision-site init --renew`"
        yield Finding("certificate", "problem", "it does not belong to tls/site.key", hint)
    elif facts.ends - now < SOON:
        hint = "`fedvision-site init --renew`, then send request.json to the coordinator"
        yield Finding("certificate", "warning", f"ends {facts.ends:%Y-%m-%d}", hint)
    else:
        yield Finding("certificate", "ok", f"valid until {facts.ends:%Y-%m-%d}")


def _roster(home: SiteHome, settings: SiteSettings) -> Iterator[Finding]:
    if pinned_governance(home) is None:
        yield Finding("roster", "problem", "governance's key is not known", NOT_JOINED)
        return
    roster = known_roster(home)
    if roster is None:
        yield Finding("roster", "problem", "there is none", NOT_JOINED)
        return
    yield _place_in(roster, settings.site.name, identity.load(home.identity).public.hex())


def _place_in(roster: Roster, name: str, key: str) -> Finding:
    what = f"roster {roster.serial} of {roster.federation}"
    member = next((one for one in roster.sites if one.name == name), None)
    if member is None:
        return Finding("roster", "problem", f"{what} is without this site", "call the coordinator: revoked?")
    if member.key != key:
        hint = "join with the newest kit; if another key was enrolled without you, call governance"
        return Finding("roster", "problem", f"{what} has another key for this site", hint)
    return Finding("roster", "ok", f"{what}, site number {member.number} of {len(roster.sites)} sites")


def _server(home: SiteHome, settings: SiteSettings) -> Iterator[Finding]:
    """Connect as the worker does, ask one question, and compare the clocks."""
    address = settings.site.server
    if not address or not home.tls_cert.exists():
        yield Finding("server", "problem", "its address is not known", NOT_JOINED)
        return
    host, _, port = address.rpartition(":")
    context = certificates.client_context(home.ca_cert, home.tls_cert, home.tls_key)
    connection = http.client.HTTPSConnection(host.strip("[]"), int(port), context=context, timeout=TIMEOUT_S)
    try:
        connection.connect()
    except ssl.SSLCertVerificationError as error:
        yield Finding("server", "problem", f"{address}: {error.verify_message.lower()}", OTHER_SERVER)
        return
    except ssl.SSLError as error:
        hint = "is something between you and the server that opens TLS? It must let this connection pass"
        yield Finding("server", "problem", f"{address}: no TLS 1.3: {_reason(error)}", hint)
        return
    except socket.gaierror:
        yield Finding("server", "problem", f"{address}: no such host", "is the name server reachable?")
        return
    except OSError as error:
        hint = f"the firewall must allow outgoing TCP to {address}"
        yield Finding("server", "problem", f"{address}: {(error.strerror or str(error)).lower()}", hint)
        return
    try:
        asked = datetime.now(UTC)
        connection.request("GET", FLEET_PATH)
        answer = connection.getresponse()
        answered = datetime.now(UTC)
    except (ssl.SSLError, OSError, http.client.HTTPException) as error:
        hint = "its certificate is not accepted: revoked, or replaced by a newer kit? Ask the coordinator"
        yield Finding("server", "problem", f"{address} ended the connection: {_reason(error)}", hint)
        return
    finally:
        connection.close()
    if answer.status in (401, 403):
        hint = "revoked, or replaced by a newer kit? Ask the coordinator"
        yield Finding("server", "problem", f"{address} does not know this certificate", hint)
    else:
        yield Finding("server", "ok", f"{address} answers, TLS 1.3, certificates good on both sides")
    yield _clock(answer.getheader("Date", ""), asked, answered)


def _reason(error: Exception) -> str:
    return str(
        getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
    ).lower()


def _clock(date: str, asked: datetime, answered: datetime) -> Finding:
    """Compare the server's Date header, in whole seconds, with when the request was under way."""
    try:
        server = email.utils.parsedate_to_datetime(date)
    except ValueError:
        return Finding("clock", "warning", "the server's answer has no date to compare with")
    early = (asked - server).total_seconds() - 1.0
    late = (server - answered).total_seconds()
    error_s = max(early, late, 0.0)
    if error_s <= LARGEST_CLOCK_ERROR_S:
        return Finding("clock", "ok", f"within {max(error_s, 1.0):.0f} s of the server's")
    which = "ahead of" if early > late else "behind"
    return Finding(
        "clock", "problem", f"{error_s:.0f} s {which} the server's", "switch time synchronisation on"
    )


def _disk(home: SiteHome) -> Iterator[Finding]:
    free_gb = shutil.disk_usage(home.root).free / 1e9
    level: Level = "problem" if free_gb < LEAST_FREE_GB else "warning" if free_gb < LITTLE_FREE_GB else "ok"
    hint = "" if level == "ok" else "models and updates of running jobs are kept here: free some space"
    yield Finding("disk", level, f"{free_gb:.1f} GB free", hint)


def _gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("GPU", "warning", "none: training uses the CPU", "is the driver installed?")
        return
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        yield Finding("GPU", "ok", f"{facts.name}, {facts.total_memory / 1e9:.0f} GB")


def _data(settings: SiteSettings, with_data: bool) -> Iterator[Finding]:
    """Check the data set; texts name cases and files, and are for this site's screen only."""
    from fedvision.data.checks import check_site
    from fedvision.data.manifest import load_manifest

    manifest = load_manifest(settings.site.data)
    counts = ", ".join(f"{len(manifest.in_split(split))} {split}" for split in ("train", "val", "test"))
    if not with_data:
        yield Finding("data set", "ok", f"{manifest.task}, {counts}; files not read")
        return
    found = check_site(manifest)
    levels: dict[str, Level] = {"error": "problem", "warning": "warning"}
    for theirs, level in levels.items():
        of_level = [one for one in found if one.level == theirs]
        for one in of_level[:SHOWN]:
            where = f"{one.case}: " if one.case else ""
            yield Finding("data set", level, where + one.text, one.hint)
        if len(of_level) > SHOWN:
            hint = f"`fedvision data check {settings.site.data}`"
            yield Finding("data set", level, f"and {len(of_level) - SHOWN} more", hint)
    if not any(one.level == "error" for one in found):
        yield Finding("data set", "ok", f"{manifest.task}, {counts}")
