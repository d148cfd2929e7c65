"""What this site was asked to run, and what was decided: a file a job, see ``decision_file``.

The worker asks ``Desk.decide`` before anything of a job runs, and again at every request to train or judge.
Rules:
- The policy has the last word: what a person allowed runs only while the policy has no finding.
- A person's word is for one job, one charter and one data set. Another charter of the same job waits anew; a
  denied job stays denied under any charter until it is allowed.
- ``automatic`` allows within the policy, and only while it is set.
- Outside of the policy's hours an allowed job waits.
- A file that is damaged, or that other users can read or change, means denied. It is never overwritten.
- What is decided is in the audit log before it is in force.
"""

import dataclasses
import logging
import os
import pwd
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from fedvision.config import Job
from fedvision.data.manifest import Manifest
from fedvision.errors import ConfigError, MessageError
from fedvision.secagg.codec import decode
from fedvision.secagg.messages import Documents
from fedvision.secagg.roster import Charter, Roster, parse_signed
from fedvision_sites.decision_file import (
    Record,
    Status,
    Word,
    digests_in,
    find,
    locked,
    read_record,
    whole_record,
    write_record,
)
from fedvision_sites.home import SiteHome
from fedvision_sites.policy import DataSet, Finding, Policy, check, shown

logger = logging.getLogger(__name__)
Log = Callable[..., None]
"""``AuditLog.append``: a kind and fields."""

LARGEST_JOB = 1 << 20
"""Characters of a job's JSON."""
MOST_UNDECIDED = 1000
"""Jobs that wait for a word; more are not written down."""
BY_POLICY = "policy"
_QUIET = timedelta(seconds=60)


@dataclass(frozen=True)
class Decision:
    """What holds for a job now.

    Attributes:
        job_digest: Of the job, hexadecimal.
        status: ``allowed``: it runs. ``waiting``: for a person, or for the policy's hours. ``denied``: a
            person said no, or the file is damaged. ``refused``: by the policy.
        findings: Of the policy, lasting ones first.
        record: The file; None if it is damaged, or was not written.
        reason: Why it is not allowed, in one line for the site's people; never sent.
    """

    job_digest: str
    status: Status
    findings: tuple[Finding, ...] = ()
    record: Record | None = None
    reason: str = ""

    @property
    def code(self) -> str:
        """What a refusal says: the status, and the rule of the policy if there is one; never a text."""
        if self.status == "refused":
            return f"policy: {self.findings[0].rule}"
        if self.status == "waiting" and self.findings:
            return f"waiting: {self.findings[0].rule}"
        return self.status


def decide(
    folder: Path,
    policy: Policy,
    job: Job,
    charter: Charter | None,
    roster: Roster | None,
    manifest: Manifest | DataSet,
    now: datetime,
    *,
    governance: bytes | None = None,
    log: Log | None = None,
) -> Decision:
    """Decide whether a job may run, and write down that it was asked for.

    Guarantee: ``allowed`` only if the policy has no finding, and a person or ``automatic`` allowed this job
    under this charter on this data set.

    Args:
        folder: Of the decision files.
        policy: The site's, as ``site.toml`` says now.
        job: As it was sent, its digest checked.
        charter: Of the job, its signature verified; None without secure aggregation.
        roster: That of the charter, its signature verified.
        manifest: The data set that the job would run on.
        now: With its time zone.
        governance: The key that signed charter and roster, 32 bytes.
        log: Writes to the audit log.

    Raises:
        MessageError: The job is too large to be written down.
        StorageError: A file cannot be written; nothing is allowed then.
    """
    if len(job.to_json()) > LARGEST_JOB:
        raise MessageError(f"the job has more than {LARGEST_JOB} characters")
    digest, data = job.digest(), _data_set(manifest)
    findings = tuple(check(policy, job, charter, roster, data, now, governance=governance))
    with locked(folder):
        before = read_record(folder, digest)
        if isinstance(before, str):
            return Decision(digest, "denied", findings, None, before)
        if before is None and _num_undecided(folder) >= MOST_UNDECIDED:
            text = f"{MOST_UNDECIDED} jobs wait for a decision already"
            return Decision(digest, "refused", (Finding("too-many-jobs", text),), None, text)
        record = Record(
            job_digest=digest,
            status="waiting",
            findings=findings,
            word=before.word if before else None,
            first_asked=before.first_asked if before else now,
            last_asked=now,
            data_set=data,
            governance=governance.hex() if governance else None,
            charter_digest=_digest(charter),
            roster_digest=_digest(roster),
            job=job.public(),
            charter=charter,
            roster=roster,
        )
        decision = _judged(record, policy, findings)
        if policy.automatic and decision.status == "waiting" and not findings:
            word = _word(record, "allow", BY_POLICY, now, is_automatic=True)
            record = record.model_copy(update={"word": word})
            decision = _judged(record, policy, findings)
        record = record.model_copy(update={"status": decision.status, "findings": decision.findings})
        if before is None or _is_news(before, record):
            _tell(log, before, record)
            write_record(folder, record)
        return dataclasses.replace(decision, record=record)


def judge(record: Record, policy: Policy, now: datetime) -> Decision:
    """Return what holds for the job of a decision file under a policy."""
    governance = bytes.fromhex(record.governance) if record.governance else None
    asked = (record.job, record.charter, record.roster, record.data_set)
    return _judged(record, policy, tuple(check(policy, *asked, now, governance=governance)))


def list_decisions(folder: Path, policy: Policy, now: datetime) -> list[Decision]:
    """Return what holds for every job that was asked for, the latest first; damaged files come last."""
    records = {digest: read_record(folder, digest) for digest in digests_in(folder)}
    whole = [one for one in records.values() if isinstance(one, Record)]
    whole.sort(key=lambda one: (one.last_asked, one.job_digest), reverse=True)
    damaged = [(digest, one) for digest, one in records.items() if isinstance(one, str)]
    return [
        *(judge(one, policy, now) for one in whole),
        *(Decision(digest, "denied", reason=text) for digest, text in damaged),
    ]


def allow(
    folder: Path,
    digest_prefix: str,
    by: str,
    policy: Policy,
    now: datetime,
    *,
    charter: str = "",
    log: Log | None = None,
) -> Decision:
    """Allow a job under the charter that it now has.

    Args:
        folder: Of the decision files.
        digest_prefix: 6 digits or more.
        by: Who says so; "" for the user of the operating system.
        policy: The site's, which has the last word.
        now: With its time zone.
        charter: First digits of the charter's digest that the person has seen; "" for any.
        log: Writes to the audit log.

    Raises:
        ConfigError: There is no such job, its file is damaged, it has another charter, or the policy
            forbids it.
    """
    digest, seen = find(folder, digest_prefix), charter.strip().lower()
    with locked(folder):
        record = whole_record(folder, digest)
        if not (record.charter_digest or "").startswith(seen):
            raise ConfigError(
                f"job {digest[:16]} has another charter now than {shown(seen)}",
                f"`fedvision-site jobs {digest[:16]}` shows it",
            )
        lasting = [one for one in judge(record, policy, now).findings if not one.is_temporary]
        if lasting:
            more = f" (and {len(lasting) - 1} more)" if len(lasting) > 1 else ""
            keys = ", ".join(dict.fromkeys(f"`{one.key}`" for one in lasting if one.key))
            raise ConfigError(
                f"the policy forbids job {digest[:16]}: {lasting[0].text}{more}",
                f"whoever answers for the policy can change {keys} under [policy] in site.toml"
                if keys
                else "the job cannot run as it is",
            )
        return _say(folder, record, _word(record, "allow", by, now), policy, log)


def deny(
    folder: Path,
    digest_prefix: str,
    reason: str,
    by: str,
    policy: Policy,
    now: datetime,
    *,
    log: Log | None = None,
) -> Decision:
    """Deny a job, whatever its charter; one that runs ends with the sum under way.

    Args:
        folder: Of the decision files.
        digest_prefix: 6 digits or more.
        reason: For the site's people; it is neither sent nor in the audit log.
        by: Who says so; "" for the user of the operating system.
        policy: The site's.
        now: With its time zone.
        log: Writes to the audit log.

    Raises:
        ConfigError: There is no such job, or its file is damaged, which means denied.
    """
    digest = find(folder, digest_prefix)
    with locked(folder):
        record = whole_record(folder, digest)
        return _say(folder, record, _word(record, "deny", by, now, reason=reason), policy, log)


class Desk:
    """Decides for the site's program; ``decide`` is what ``work.SiteConfig.decide`` wants.

    ``site.toml`` is read each time, so that a change of the policy holds from the next request on; while it
    cannot be read, nothing runs.

    Args:
        home: The site's folder.
        governance: The pinned key, 32 bytes.
        log: Writes to the audit log.
    """

    def __init__(self, home: SiteHome, governance: bytes, log: Log | None = None) -> None:
        self._home, self._governance, self._log = home, governance, log

    def decide(self, job: Job, documents: bytes, manifest: Manifest) -> str:
        """Return "" if a job may run now, else ``Decision.code``.

        Args:
            job: As it was sent, its digest checked.
            documents: The encoded ``secagg.messages.Documents``; empty without secure aggregation.
            manifest: The data set that the job would run on.

        Raises:
            ConfigError: ``site.toml`` cannot be read.
            MessageError: A document is not signed by the pinned key, or the job is too large.
            StorageError: The decision or the audit log cannot be written.
        """
        policy, charter, roster = self._home.settings().policy, None, None
        if documents:
            sent = decode(documents, Documents)
            roster = parse_signed(sent.roster, "roster", self._governance)
            charter = parse_signed(sent.charter, "charter", self._governance, roster)
        asked = (policy, job, charter, roster, manifest, datetime.now(UTC))
        signer = self._governance if documents else None
        decision = decide(self._home.decisions, *asked, governance=signer, log=self._log)
        if decision.status != "allowed":
            logger.info("job %s is %s: %s", decision.job_digest[:12], decision.status, decision.reason)
        return "" if decision.status == "allowed" else decision.code


def _word(
    record: Record,
    kind: Literal["allow", "deny"],
    by: str,
    now: datetime,
    *,
    reason: str = "",
    is_automatic: bool = False,
) -> Word:
    """Return a word about the job, the charter and the data set of a record."""
    user = _user()
    return Word(
        kind=kind,
        charter=record.charter_digest,
        data_set=record.data_set.name,
        by=shown(by.strip()) or user,
        user=user,
        is_automatic=is_automatic,
        reason=" ".join(reason.split()),
        when=now,
    )


def _say(folder: Path, record: Record, word: Word, policy: Policy, log: Log | None) -> Decision:
    """Put a person's word in force."""
    said = record.model_copy(update={"word": word})
    decision = judge(said, policy, word.when)
    said = said.model_copy(update={"status": decision.status, "findings": decision.findings})
    if log is not None:
        log(word.kind, job=said.job_digest, charter=said.charter_digest, by=word.by, user=word.user)
    write_record(folder, said)
    return dataclasses.replace(decision, record=said)


def _valid_word(record: Record, policy: Policy) -> Word | None:
    """Return the word that counts for the charter and the data set that the job now has."""
    word = record.word
    if word is None or word.kind == "deny":
        return word
    is_same = (word.charter, word.data_set) == (record.charter_digest, record.data_set.name)
    return word if is_same and (policy.automatic or not word.is_automatic) else None


def _judged(record: Record, policy: Policy, findings: tuple[Finding, ...]) -> Decision:
    """Apply the rules of the module to a record and the policy's findings."""
    word = _valid_word(record, policy)
    status: Status
    if word is not None and word.kind == "deny":
        status, reason = "denied", f"denied by {word.by}" + (f": {word.reason}" if word.reason else "")
    elif findings and not findings[0].is_temporary:
        status, reason = "refused", findings[0].text
    elif word is None and not policy.automatic:
        status, reason = "waiting", "for a person"
        if record.word is not None and not record.word.is_automatic:
            reason += "; it was allowed under another charter, or for another data set"
    elif findings:
        status, reason = "waiting", findings[0].text
    elif word is None:
        status, reason = "waiting", "until the server asks again: the policy allows it"
    else:
        status, reason = "allowed", ""
    return Decision(record.job_digest, status, findings, record, reason)


def _is_news(before: Record, after: Record) -> bool:
    """Whether a record differs in more than a time that just passed."""
    same = {"last_asked": before.last_asked}
    return after.model_copy(update=same) != before or abs(after.last_asked - before.last_asked) > _QUIET


def _tell(log: Log | None, before: Record | None, after: Record) -> None:
    """Write to the audit log what a server's question changed."""
    if log is None:
        return
    about = {"job": after.job_digest, "charter": after.charter_digest}
    if before is None or before.charter_digest != after.charter_digest:
        log("charter", **about, roster=after.roster_digest)
    rules = _lasting_rules(after)
    if rules and (before is None or rules != _lasting_rules(before)):
        log("policy", **about, rules=rules)
    word = after.word
    if word is not None and word.is_automatic and (before is None or word != before.word):
        log("allow", **about, by=word.by, user=word.user)


def _lasting_rules(record: Record) -> list[str]:
    return list(dict.fromkeys(one.rule for one in record.findings if not one.is_temporary))


def _data_set(manifest: Manifest | DataSet) -> DataSet:
    return manifest if isinstance(manifest, DataSet) else DataSet.of(manifest)


def _digest(document: Charter | Roster | None) -> str | None:
    return None if document is None else document.digest().hex()


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"


def _num_undecided(folder: Path) -> int:
    digests = digests_in(folder)
    if len(digests) < MOST_UNDECIDED:
        return len(digests)
    records = (read_record(folder, digest) for digest in digests)
    return sum(isinstance(one, Record) and one.word is None for one in records)
