"""What a site keeps on disk for secure aggregation, all 0600, written whole or not at all.

    STATE/documents                  the signed roster and charter of the job
    STATE/secagg/CHARTER/enrolment   roster, charter, this site's pair keys, later everybody's public keys
    STATE/secagg/CHARTER/session     secrets and progress of the session under way, and the last answer
    STATE/secagg/CHARTER/session.next  the same after a step, until its marks are on disk
    STATE/secagg/CHARTER/input-*     its encoded input, so that another attempt needs no new training
    GUARD/CHARTER                    the high-water marks, and the hash of the session's file
    GUARD/job-JOB                    the charter that was checked for the job
    GUARD/released-JOB               the model whose test results the site released on its own

Rules:
- A step writes the new session beside the old one, then the marks, which name it by its hash, and then the
  answer leaves. So a step counts from the moment its marks have their name: a site that is killed before is
  where it was, and what it drew for that step never left; one that is killed after has the answer on disk.
- The marks lie in another folder than the state, which backups should leave out. A session that is not the
  one whose hash the marks hold is of a restored backup: it is dead. So an old state folder brings back no
  session; and what it lost, the site counts as a drop-out, no more.
- Without its marks a site that was enrolled does not answer: nothing shows how far it went.
"""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np

from fedvision.errors import MessageError, ProtocolError, StorageError
from fedvision.secagg.codec import U8, AtMost, Bytes32, decode, encode, message
from fedvision.secagg.masking import MaskVector
from fedvision.secagg.messages import EnrolmentRoll, PairPublic, Session, Signed
from fedvision.secagg.site_state import Marks, SiteSession
from fedvision.storage import write_atomic

PRIVATE = 0o600
T = TypeVar("T")


@message(210)
@dataclass(frozen=True)
class EnrolmentFile:
    """A site's part in a job: the signed documents, its secret keys by peer, its own signed enrolment."""

    number: U8
    roster: Annotated[bytes, AtMost(1 << 24)]
    charter: Annotated[bytes, AtMost(1 << 24)]
    secrets: Annotated[tuple[PairPublic, ...], AtMost(255)] = field(repr=False)
    own: Signed
    roll: EnrolmentRoll


@message(211)
@dataclass(frozen=True)
class SessionFile:
    """A session after a step, with the request of that step and its answer.

    Attributes:
        request: SHA-256 of step and request.
        answer: The encoded answer; a masked input is made again instead.
    """

    session: SiteSession
    request: Bytes32
    answer: Annotated[bytes, AtMost(1 << 28)] = field(repr=False)


def pin_job(guard: Path, job_digest: str, charter: bytes) -> None:
    """Note which charter a job has; a job has one.

    Args:
        guard: The folder of the marks.
        job_digest: Of the job, hexadecimal.
        charter: H(charter).

    Raises:
        ProtocolError: It had another one before.
    """
    path = guard / f"job-{job_digest}"
    if not path.exists():
        write_atomic(path, charter, PRIVATE)
    elif path.read_bytes() != charter:
        raise ProtocolError("charter", "this site knows the job under another charter")


def check_job(guard: Path, job_digest: str, charter: str) -> None:
    """Check that a job is the one that its charter was checked against.

    Args:
        guard: The folder of the marks.
        job_digest: Of the job, hexadecimal.
        charter: H(charter) in hexadecimal; "" for any.

    Raises:
        ProtocolError: No charter of this job, or another one.
    """
    path = guard / f"job-{job_digest}"
    if not path.exists() or (charter and path.read_bytes().hex() != charter):
        raise ProtocolError("charter-job", "that charter was not checked for this job")


def pin_release(guard: Path, job_digest: str, model: bytes) -> None:
    """Note which model's test results a site released for a job; it releases those of no other.

    Args:
        guard: The folder of the marks.
        job_digest: Of the job, hexadecimal.
        model: SHA-256 of the model.

    Raises:
        ProtocolError: Results of another model were released before.
    """
    path = guard / f"released-{job_digest}"
    if not path.exists():
        write_atomic(path, model, PRIVATE)
    elif path.read_bytes() != model:
        raise ProtocolError("released", "this site released test results of another model of this job")


def save_documents(state: Path, documents: bytes) -> None:
    """Keep the encoded ``Documents`` under which a site takes part in a job, once they are checked."""
    if load_documents(state) != documents:
        write_atomic(state / "documents", documents, PRIVATE)


def load_documents(state: Path) -> bytes:
    """Return the kept ``Documents``; nothing where there are none."""
    path = state / "documents"
    return path.read_bytes() if path.exists() else b""


class Vault:
    """Reads and writes one job's files at a site.

    Args:
        state: The site's state folder.
        guard: The folder of the marks, outside of ``state``.
        charter: H(charter), 32 bytes.
    """

    def __init__(self, state: Path, guard: Path, charter: bytes) -> None:
        self._folder = state / "secagg" / charter.hex()[:16]
        self._guard = guard / charter.hex()[:16]

    def enrolment(self) -> EnrolmentFile | None:
        """Return the site's enrolment, None before.

        Raises:
            StorageError: The file is damaged.
        """
        return self._read("enrolment", EnrolmentFile)

    def save_enrolment(self, enrolment: EnrolmentFile) -> None:
        """Store an enrolment; the first one also starts the marks.

        Raises:
            ProtocolError: The site has marks of this job but no enrolment: the state folder was lost.
        """
        if self._guard.exists() and not (self._folder / "enrolment").exists():
            raise ProtocolError(
                "lost-state",
                "this site took part in the job before, but its state folder is empty",
                "leave this job; a new one has a new charter",
            )
        write_atomic(self._folder / "enrolment", encode(enrolment), PRIVATE)
        if not (self._guard.exists() or enrolment.roll.entries):  # nothing can have been masked yet
            write_atomic(self._guard, encode(Marks(0, 0, ())), PRIVATE)

    def marks(self) -> Marks:
        """Return the high-water marks.

        Raises:
            ProtocolError: They are absent. StorageError: They are damaged.
        """
        try:
            return decode(self._guard.read_bytes(), Marks)
        except FileNotFoundError:
            raise ProtocolError(
                "lost-marks",
                "the high-water marks of this job are gone, so nothing shows how far this site went",
                "leave this job; a new one has a new charter",
            ) from None
        except (OSError, MessageError) as error:
            raise StorageError(f"cannot read the high-water marks {self._guard}: {error}") from None

    def session(self, marks: Marks) -> SiteSession:
        """Return the session under way; see ``last``."""
        return self.last(marks).session

    def last(self, marks: Marks) -> SessionFile:
        """Return the session under way, with its last request and answer.

        Raises:
            ProtocolError: There is none, or none that is the marks'.
            StorageError: It is damaged.
        """
        if not marks.session:
            raise ProtocolError("phase", "no session is under way")
        for name in ("session", "session.next"):
            found = self._read(name, SessionFile)
            if found is not None and _digest(encode(found)) == marks.session:
                if name == "session.next":  # a kill came between the marks and its name
                    (self._folder / name).replace(self._folder / "session")
                return found
        raise ProtocolError("old-state", "the state folder is older than the high-water marks")

    def save(self, marks: Marks, file: SessionFile) -> None:
        """Store a session and the marks that go with it: after this the answer may leave."""
        content, following = encode(file), self._folder / "session.next"
        write_atomic(following, content, PRIVATE)
        write_atomic(self._guard, encode(replace(marks, session=_digest(content))), PRIVATE)
        following.replace(self._folder / "session")

    def _input_path(self, session: Session, model: bytes) -> Path:
        return self._folder / f"input-{session.purpose}-{session.round:04d}-{model.hex()}"

    def load_input(self, session: Session, model: bytes) -> MaskVector | None:
        """Return the encoded input of a round, a copy that may be changed; None where there is none."""
        try:
            return np.fromfile(self._input_path(session, model), "<u4").astype(np.uint32, copy=False)
        except FileNotFoundError:
            return None

    def save_input(self, session: Session, model: bytes, vector: MaskVector) -> None:
        """Store the encoded input of a round and remove those of other rounds."""
        path = self._input_path(session, model)
        if self._folder.exists():
            for other in self._folder.glob("input-*"):
                if other != path:
                    other.unlink()
        write_atomic(path, np.ascontiguousarray(vector, "<u4").data.cast("B"), PRIVATE)

    def _read(self, name: str, kind: type[T]) -> T | None:
        path = self._folder / name
        try:
            if path.stat().st_mode & 0o077:
                raise StorageError(f"{path} can be read by others", f"chmod 600 {path}")
            return decode(path.read_bytes(), kind)
        except FileNotFoundError:
            return None
        except (OSError, MessageError) as error:
            raise StorageError(f"cannot read {path}: {error}") from None


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
