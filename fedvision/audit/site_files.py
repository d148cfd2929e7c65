"""What the sites' own folders say, where they lie beside the run, as in a simulation.

    sites/NAME/NAME.pub                  the key must be the one of the roster
    sites/NAME/secagg/CHARTER/enrolment  the same roster, charter and enrolments as everybody's
    sites/NAME/secagg/CHARTER/session    the last sum as the site saw it must be the one of the transcript
    sites/NAME/secagg/CHARTER/input-*    if all are there, they must add up to the stored sum
    guards/NAME/CHARTER                  a site unmasked no round that the record does not have
    guards/NAME/job-*, released-*        the same charter; test results of no other model were released

Private keys are not used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedvision.audit.claims import Claims
from fedvision.audit.sums import Key, SignedSum, shown_by
from fedvision.errors import ConfigError, ProtocolError, StorageError, VerificationError
from fedvision.secagg import schedule
from fedvision.secagg.codec import decode
from fedvision.secagg.identity import parse_public
from fedvision.secagg.messages import Ack, Masked, Signed
from fedvision.secagg.schedule import Consortium
from fedvision.secagg.site_state import SiteSession
from fedvision_sites.vault import Vault

Sums = Mapping[Key, SignedSum]


@dataclass(frozen=True)
class SiteFiles:
    """What was found.

    Attributes:
        sites: Names of the sites whose folders are here.
        num_signatures: Signatures verified on their enrolments.
        num_sessions: Sites whose own record of the last sum is that of the transcript.
        summed: The sum that the sites' own inputs add up to, such as "validate round 3"; None if no.
    """

    sites: tuple[str, ...]
    num_signatures: int
    num_sessions: int
    summed: str | None


def check_site_files(
    claims: Claims, consortium: Consortium, sums: Sums, best: bytes | None
) -> SiteFiles | None:
    """Check the sites' folders against roster, charter and transcripts; None where there is no such folder.

    Args:
        claims: The run.
        consortium: Roster and charter.
        sums: All sums.
        best: SHA-256 of the kept model, None where it is not known.

    Raises:
        VerificationError: A site's own record contradicts the run.
    """
    numbers = {consortium.roster.member(number).name: number for number in consortium.charter.sites}
    vaults: dict[str, Vault] = {}
    for name in numbers:
        folder = claims.folder / "sites" / name
        if (folder / "secagg").is_dir():
            vaults[name] = Vault(folder, claims.folder / "guards" / name, consortium.digest)
    if not vaults:
        return None
    rolls = set()
    sessions: dict[str, SiteSession] = {}
    for name, vault in vaults.items():
        folder = claims.folder / "sites" / name
        _check_key(consortium, numbers[name], folder / f"{name}.pub")
        try:
            rolls.add(_check_enrolment(claims, consortium, numbers[name], vault, folder))
            guard = claims.folder / "guards" / name
            if guard.exists():
                _check_marks(claims, vault, guard, sums)
                _check_pins(claims, consortium, guard, best)
                sessions |= _session(name, vault)
        except ProtocolError as error:
            raise VerificationError(folder / "secagg", error.rule, str(error), error.hint) from None
        except StorageError as error:
            raise VerificationError(folder / "secagg", "site-files", str(error), error.hint) from None
    if len(rolls) > 1:
        raise VerificationError(claims.folder / "sites", "enrolment", "sites hold different enrolments")
    agreeing = [name for name, session in sessions.items() if _check_session(claims, name, session, sums)]
    summed = _add_inputs(numbers, vaults, sessions, sums)
    return SiteFiles(tuple(vaults), len(consortium.charter.sites), len(agreeing), summed)


def _session(name: str, vault: Vault) -> dict[str, SiteSession]:
    """Return a site's last session by its name; nothing if it has none, or one that a crash cut off."""
    try:
        return {name: vault.session(vault.marks())}
    except ProtocolError as error:
        if error.rule in ("phase", "old-state"):
            return {}
        raise


def _check_key(consortium: Consortium, number: int, path: Path) -> None:
    try:
        with shown_by(path):
            name, public = parse_public(path.read_text(encoding="utf-8"), str(path))
    except ConfigError as error:
        raise VerificationError(path, "format", str(error).removeprefix(f"{path}: ")) from None
    if public.hex() != consortium.roster.member(number).key:
        raise VerificationError(path, "roster", f"not the key that the roster has for {name}")


def _check_enrolment(
    claims: Claims, consortium: Consortium, number: int, vault: Vault, folder: Path
) -> tuple[Signed, ...]:
    """Check what a site enrolled under, and return everybody's enrolments as it holds them."""
    found = vault.enrolment()
    if found is None:
        raise ProtocolError("enrolment", "the site holds no enrolment under this charter")
    for name, theirs in (("roster.json", found.roster), ("charter.json", found.charter)):
        if theirs != (claims.secagg / name).read_bytes():
            raise ProtocolError("enrolment", f"the site enrolled under another {name}")
    schedule.read_enrolments(consortium, found.roll.entries)
    if found.number != number or found.own not in found.roll.entries:
        raise ProtocolError("enrolment", "the site's own enrolment is not among those of all")
    return found.roll.entries


def _check_marks(claims: Claims, vault: Vault, path: Path, sums: Sums) -> None:
    """Check that a site gave its shares for no round that the record does not have; a test may be redone."""
    last = claims.last_round + (not claims.is_finished)
    has_test = not claims.is_finished or any(purpose == "test" for purpose, _ in sums)
    for mark in vault.marks().marks:
        if mark.unmasked > (last if mark.purpose != "test" else has_test * mark.unmasked):
            text = f"the site unmasked {mark.purpose} round {mark.unmasked}, the record ends before"
            raise VerificationError(path, "unmasked", text)


def _check_pins(claims: Claims, consortium: Consortium, guard: Path, best: bytes | None) -> None:
    """Check what a site noted of the job: its charter, and the model whose test results it released."""
    job = claims.job.digest()
    for path, expected in ((guard / f"job-{job}", consortium.digest), (guard / f"released-{job}", best)):
        if path.exists() and expected is not None and path.read_bytes() != expected:
            raise VerificationError(path, "site-files", "the site noted another charter or model of this job")


def _check_session(claims: Claims, name: str, own: SiteSession, sums: Sums) -> bool:
    """Whether a site's last session is one with a transcript, with which it must agree if so."""
    found = sums.get((own.session.purpose, own.session.round))
    if found is None or found.transcript.session != own.session or own.phase != "unmasked":
        return False
    transcript = found.transcript
    ready = next((entry for entry in transcript.readies if entry.sender == own.ready.sender), None)
    tau = decode(transcript.masked[0].body, Masked).tau
    root = decode(transcript.acks[0].body, Ack).root
    if ready != own.ready or tau != own.tau or root != own.root:
        raise VerificationError(
            found.path, "site-session", f"{name} has another record of {own.session} in its own folder"
        )
    return True


def _add_inputs(
    numbers: Mapping[str, int], vaults: Mapping[str, Vault], sessions: Mapping[str, SiteSession], sums: Sums
) -> str | None:
    """Add up the inputs that the sites still hold of a sum, if all are there, and compare with the sum."""
    for key in {(own.session.purpose, own.session.round) for own in sessions.values()}:
        found = sums.get(key)
        if found is None or found.sum_path is None:
            continue
        total = found.total()
        for name, vault in vaults.items():
            if numbers[name] in found.checked.accepted:
                part = vault.load_input(found.transcript.session, found.checked.model)
                if part is None or part.shape != total.shape:
                    break
                total = total - part
        else:
            if set(found.checked.accepted) <= {numbers[name] for name in vaults}:
                if np.any(total):
                    raise VerificationError(
                        found.sum_path, "inputs", "the sites' own inputs add up to another sum"
                    )
                return f"{key[0]} round {key[1]}"
    return None
