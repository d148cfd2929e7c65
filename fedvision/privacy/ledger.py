"""The privacy ledger of a site: what its patients have spent, over all jobs, one signed line for each round.

A line, in the one spelling that counts (sorted keys, no spaces, ASCII):

    content    what a round spends (``Entry``), or that the ledger was taken over (``TakenOver``)
    format     1
    key        the site's Ed25519 key that signed the line
    number     1 for the first line, then without a gap
    previous   SHA-256 of the line before, zeros for the first
    signature  Ed25519 of "fedvision/privacy-ledger/v1" | SHA-256 of the line without it
    time       UTC, to the second

Rules:
- A round is reserved before its gradient is computed. A crash after that counts what was never released; no
  crash releases what was not counted.
- A round of a job counts once, however often it is attempted. So all attempts must release the same numbers:
  the noisy input of a round is drawn once and kept, and whoever draws it anew needs another round.
- The guard folder holds number and hash of the last line, written after the line and before ``reserve``
  returns. An unfinished last line is dropped if no mark names it; a whole one is kept and marked. A ledger
  that lacks what is marked was cut, rewritten or restored from a backup, and nothing is added to it.
- Ledger and guard folder restored together do not show, nor do both deleted. Backups leave the guard folder
  out (decision 8).
- Each call checks form, chain, marks and the signature of the last line, which stands for all before it;
  ``verify`` checks every signature.
- A data set whose manifest changed gives a warning; what it spent before stays spent.
"""

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Protocol

from pydantic import Field, ValidationError

from fedvision.config import Section
from fedvision.errors import PrivacyError, VerificationError
from fedvision.privacy.accounting import Mechanism
from fedvision.privacy.ledger_lines import (
    FORMAT,
    ZEROS,
    CheckSignature,
    Line,
    Read,
    TakenOver,
    covered,
    explained,
    locked,
    read_ledger,
    spelled,
    verify,
    write_line,
    wrong,
)
from fedvision.privacy.spending import (
    ALL,
    Case,
    Entry,
    EpsilonOf,
    Hex32,
    Row,
    Steps,
    epsilon,
    merged,
    steps_of,
    table,
)
from fedvision.storage import write_atomic

MARK = "privacy-ledger"
"""The file of the marks in the guard folder."""


class Signer(Protocol):
    """What the ledger needs of ``fedvision.secagg.identity.Identity``."""

    @property
    def public(self) -> bytes:
        """The Ed25519 key, 32 bytes."""

    def sign(self, message: bytes) -> bytes:
        """Return the signature of ``message``, 64 bytes."""


class Receipt(NamedTuple):
    """What ``reserve`` answers.

    Attributes:
        number: Of the line.
        is_new: False if the round was reserved before.
        warning: For the site's people; "" if there is nothing to say.
    """

    number: int
    is_new: bool
    warning: str


class _Mark(Section):
    """Number and SHA-256 of the last line."""

    format: Literal[1]
    number: Annotated[int, Field(ge=0)]
    digest: Hex32


EMPTY = _Mark(format=FORMAT, number=0, digest=ZEROS.hex())


class Ledger:
    """Reads and writes a site's privacy ledger. Processes and threads may use the same one at once.

    Every call raises ``StorageError`` where a file cannot be read or written, and ``VerificationError`` where
    the ledger or its marks are not what this site left.

    Args:
        path: The file; it is made with the first entry, 0600.
        guard: The folder of the marks, outside of what backups bring back; it serves one ledger.
        identity: The site's key.
    """

    def __init__(self, path: Path, guard: Path, identity: Signer) -> None:
        self.path = path
        self._marks = guard / MARK
        self._identity = identity
        self._threads, self._depth = threading.RLock(), 0
        self._last: Read | None = None
        self._entries: list[tuple[str, Entry]] = []
        self._rounds: dict[tuple[str, int], tuple[Read, Entry]] = {}
        self._seen: object = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep others from writing between several calls, such as ``check_limit`` and ``reserve``."""
        with self._threads, contextlib.ExitStack() as stack:
            if not self._depth:
                stack.enter_context(locked(self.path))
                self._refresh()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def reserve(self, entry: Entry) -> Receipt:
        """Write down what a round will spend, before anything of it is computed.

        Guarantee: when this returns, the entry is signed, chained, on disk and marked, once for each job and
        round. When it raises, the round must not be trained; it may have been counted all the same.

        Raises:
            PrivacyError: The round was reserved before, with another content.
        """
        with self.held():
            warning = self._warning(entry)
            known = self._rounds.get((entry.job, entry.round))
            if known is None:
                return Receipt(self._append(entry), True, warning)
            line, before = known
            changed = [key for key in Entry.model_fields if getattr(before, key) != getattr(entry, key)]
            if changed:
                raise PrivacyError(
                    "privacy-reserved",
                    f"round {entry.round} of this job was reserved before with another {', '.join(changed)}, "
                    f"line {line.line.number} of the privacy ledger",
                    "a round cannot change between two attempts; the job goes on with the next round",
                )
            return Receipt(line.line.number, False, warning)

    def first_of(self, job: str) -> tuple[int, str] | None:
        """Return number and digest of the line that reserved a job's first round; None if there is none."""
        with self.held():
            found = (read for (other, _), (read, _) in self._rounds.items() if other == job)
            first = next(found, None)
        return (first.line.number, first.digest.hex()) if first else None

    def mechanisms(self, data_set: str, group: str = ALL, case: Case = "broken") -> list[Mechanism]:
        """Return what the patients of a group have spent, one mechanism for each pair of parameters.

        Args:
            data_set: Its name.
            group: "all" adds up every group, see ``fedvision.privacy.spending``.
            case: Which noise is counted on.
        """
        return merged(self._steps(data_set, group, case))

    def spent(
        self, data_set: str, delta: float, epsilon_of: EpsilonOf, group: str = ALL, case: Case = "broken"
    ) -> float:
        """Return the epsilon at ``delta`` that is spent: 0.0 for nothing, inf where a round had no noise."""
        return epsilon(self._steps(data_set, group, case), delta, epsilon_of)

    def check_limit(
        self,
        data_set: str,
        new_mechanisms: Iterable[Mechanism],
        limit_epsilon: float,
        delta: float,
        epsilon_of: EpsilonOf,
        *,
        job: str,
        group: str = ALL,
        case: Case = "broken",
    ) -> float:
        """Check that a job as a whole stays within the site's limit, after what other jobs have spent.

        Guarantee: it returns only if the accountant's epsilon of everything together is <= ``limit_epsilon``;
        a limit or an epsilon that is not a number refuses. Where jobs are planned after results of earlier
        ones, that is a bound only if the accountant is a filter (Feldman, Zrnic 2021).

        Args:
            data_set: Its name.
            new_mechanisms: All rounds of the job, with the noise of ``case``.
            limit_epsilon: The site's.
            delta: At which it holds.
            epsilon_of: The accountant.
            job: Digest of the job. What it reserved already is part of ``new_mechanisms``; where the ledger
                has more of a mechanism than these, the ledger counts.
            group: Of the patients.
            case: Which noise is counted on.

        Returns:
            The epsilon after the job.

        Raises:
            PrivacyError: The limit would be passed. The text is for the site's people; the rule may travel.
        """
        wanted: Steps = Counter()
        for one in new_mechanisms:
            wanted[one.sampling_rate, one.noise_multiplier] += one.steps
        with self.held():
            by_job = {own: [e for _, e in self._entries if (e.job == job) == own] for own in (False, True)}
        others = steps_of(by_job[False], data_set, group, case)
        wanted |= steps_of(by_job[True], data_set, group, case)  # the larger number for each mechanism
        total = epsilon(others + wanted, delta, epsilon_of)
        if not total <= limit_epsilon:
            spent, alone = (epsilon(one, delta, epsilon_of) for one in (others, wanted))
            raise PrivacyError(
                "privacy-limit",
                f"this job would bring the patients of the data set {data_set} (group {group}) to epsilon "
                f"{total:.4g} at delta {delta:g} with {case} aggregation: {spent:.4g} spent by other jobs, "
                f"{alone:.4g} wanted by this one alone, {limit_epsilon:g} allowed at this site",
                "a job with more noise or fewer rounds wants less; the limit is this site's own to set",
            )
        return total

    def rows(self) -> list[Row]:
        """Return a table for people: a row for each data set, group, job and mechanism, oldest first."""
        with self.held():
            return table(self._entries)

    def take_over(self, key_before: bytes, check_signature: CheckSignature) -> int:
        """Go on with a ledger whose marks are lost or too old, or that an earlier key of this site wrote.

        For people who know that it is the newest copy there is: a line says for good that they did this.

        Args:
            key_before: The key of its last line, 32 bytes; the present one where only marks were lost.
            check_signature: ``fedvision.secagg.identity.verify``.

        Returns:
            The number of lines.

        Raises:
            VerificationError: A line does not hold, or lines are missing that the marks know.
        """
        with self._threads:
            assert not self._depth, "not within held()"
            with locked(self.path):
                mark = self._mark()
                if self._stamp() and not verify(self.path, key_before, check_signature) and mark is None:
                    self._write_mark(EMPTY)
                self._load(mark)
                if self._last is None:
                    return 0
                marked = mark.number if mark else None
                return self._append(TakenOver(key_before=key_before.hex(), marked=marked))

    @property
    def is_marked(self) -> bool:
        """Whether the marks know a line: then a ledger that is not there is missing."""
        mark = self._mark()
        return mark is not None and mark.number > 0

    def _steps(self, data_set: str, group: str, case: Case) -> Steps:
        with self.held():
            return steps_of((one for _, one in self._entries), data_set, group, case)

    def _warning(self, entry: Entry) -> str:
        """Say so if the newest entry of a data set is of another manifest."""
        before = next((one for _, one in reversed(self._entries) if one.data_set == entry.data_set), entry)
        if before.manifest == entry.manifest:
            return ""
        changed = f"the data set {entry.data_set} has changed since its last round that was counted"
        return f"{changed}: its patients count as the same, and what they spent before still counts"

    def _stamp(self) -> tuple[int, ...] | None:
        """Return what changes when somebody writes the file; None if there is none."""
        with explained(self.path, "read"):
            found = self.path.stat() if self.path.exists() else None
        return (found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns) if found else None

    def _refresh(self) -> None:
        """Read the file if it changed, check it, and mark a line that a crash left unmarked."""
        mark, stamp = self._mark(), self._stamp()
        if mark and stamp and stamp == self._seen and self._last and mark == _mark_of(self._last):
            return
        if mark is None and stamp:
            raise VerificationError(
                self._marks, "lost-marks",
                "the marks of the privacy ledger are gone, so nothing shows whether its end is missing",
                f"if {self.path} is the newest copy there is, take it over; never delete it",
            )  # fmt: skip
        if mark is None:
            mark = EMPTY
            self._write_mark(mark)
        self._load(mark)
        if self._last is None:
            return
        line = self._last.line
        # An Ed25519 signature is a function of key and message (RFC 8032, 5.1.6): to sign again is to check.
        own = self._identity.public.hex()
        if line.key != own or self._identity.sign(covered(line)).hex() != line.signature:
            raise wrong(
                self.path, line.number, "ledger-signature", "not signed by this site's key",
                "after a change of the site's key, take the ledger over with the new one",
            )  # fmt: skip
        if line.number > mark.number + 1:
            raise VerificationError(
                self._marks, "old-marks",
                f"the marks end with line {mark.number} of the privacy ledger, which has {line.number}",
                "was the guard folder restored from a backup? if the ledger is the newest copy, take it over",
            )  # fmt: skip
        if line.number == mark.number + 1:
            with explained(self.path, "write"), self.path.open("rb") as file:
                os.fsync(file.fileno())  # its writer may have been killed before
            self._write_mark(_mark_of(self._last))
        self._seen = stamp

    def _load(self, mark: _Mark | None) -> None:
        """Read all lines, and check that none is missing or changed which the marks know."""
        self._last, self._entries, self._rounds, self._seen = None, [], {}, None
        for one in read_ledger(self.path) if self._stamp() else ():
            self._keep(one)
            if mark and one.line.number == mark.number and mark != _mark_of(one):
                raise wrong(
                    self.path, one.line.number, "other-ledger", "not the line that the marks name",
                    "the ledger was rewritten, or is of another site: put the newest copy back",
                )  # fmt: skip
        number = self._last.line.number if self._last else 0
        if mark and number < mark.number:
            raise VerificationError(
                self.path, "old-ledger",
                f"the privacy ledger ends with line {number}, but {mark.number} were written",
                "its end was cut off, or an older copy put back: put the newest copy back; without it nothing"
                " shows what the patients have spent, and no job with noise may use their data",
            )  # fmt: skip

    def _keep(self, one: Read) -> None:
        self._last, content = one, one.line.content
        if isinstance(content, Entry):
            self._entries.append((one.line.time, content))
            self._rounds[content.job, content.round] = (one, content)

    def _append(self, content: Entry | TakenOver) -> int:
        """Write, flush and mark a line after the last; return its number."""
        number = self._last.line.number + 1 if self._last else 1
        end = self._last.end if self._last else 0
        unsigned = Line(
            format=FORMAT,
            number=number,
            time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            key=self._identity.public.hex(),
            previous=(self._last.digest if self._last else ZEROS).hex(),
            content=content,
            signature="00" * 64,
        )
        line = unsigned.model_copy(update={"signature": self._identity.sign(covered(unsigned)).hex()})
        self._seen = None  # whatever happens from here, the file is read again
        one = write_line(self.path, line, end)
        self._write_mark(_mark_of(one))
        self._keep(one)
        self._seen = self._stamp()
        return number

    def _mark(self) -> _Mark | None:
        try:
            with explained(self._marks, "read"):
                if not self._marks.exists():
                    return None
                return _Mark.model_validate_json(self._marks.read_bytes(), strict=True)
        except ValidationError:
            raise VerificationError(
                self._marks, "lost-marks", "the marks of the privacy ledger are damaged",
                "if the ledger is the newest copy there is, move them away and take it over",
            ) from None  # fmt: skip

    def _write_mark(self, mark: _Mark) -> None:
        write_atomic(self._marks, spelled(mark), 0o600)


def _mark_of(last: Read) -> _Mark:
    return _Mark(format=FORMAT, number=last.line.number, digest=last.digest.hex())
