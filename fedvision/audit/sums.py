"""The signed part of a run: roster, charter, and every transcript with its stored sum.

    secagg/roster.json, charter.json     signed by governance
    secagg/transcripts/train-0003        what the parties of a sum signed
    secagg/sums/train-0003               the sum, little-endian uint32

Rules:
- A file counts only if it is in its one spelling, and says of itself what its name says.
- For each sum that the record claims there is exactly one transcript, and in a finished run no other but
  those of sums that could not be used.
- With ``keep_sums`` there is a sum for each transcript.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedvision.audit.claims import Claims
from fedvision.errors import ConfigError, MessageError, ProtocolError, VerificationError
from fedvision.secagg.codec import decode
from fedvision.secagg.masking import MaskVector
from fedvision.secagg.messages import Purpose, Sketch, Transcript
from fedvision.secagg.roster import load_charter, load_roster
from fedvision.secagg.schedule import Consortium
from fedvision.secagg.sketch import is_within
from fedvision.secagg.transcript import Checked, check_transcript
from fedvision.updates.layout import Layout

Key = tuple[Purpose, int]
NAME = re.compile(r"(train|validate|test)-(\d{4,})")


@dataclass(frozen=True)
class SignedSum:
    """A sum whose transcript was checked.

    Attributes:
        transcript: What was signed.
        checked: What that proves.
        path: File of the transcript.
        sum_path: File of the sum; None where it was not kept.
    """

    transcript: Transcript
    checked: Checked
    path: Path
    sum_path: Path | None

    @property
    def num_checked(self) -> int | None:
        """Number of sites in the sum where the norm of each input was checked, None where it was not."""
        return None if self.checked.level == "sum" else len(self.checked.accepted)

    def total(self) -> MaskVector:
        """Return the sum, uint32.

        Raises:
            VerificationError: The file is absent or not whole.
        """
        assert self.sum_path is not None
        return read_sum(self.sum_path)


@contextlib.contextmanager
def shown_by(path: Path) -> Iterator[None]:
    """Turn what the protocol raises about a file into a ``VerificationError`` that names it."""
    try:
        yield
    except ProtocolError as error:
        text = str(error).removesuffix(f" (rule {error.rule})")
        raise VerificationError(path, error.rule, text, error.hint) from None
    except MessageError as error:
        raise VerificationError(path, "format", str(error)) from None
    except OSError as error:
        raise VerificationError(path, "absent", (error.strerror or str(error)).lower()) from None


def load_consortium(claims: Claims, governance: bytes) -> Consortium:
    """Return roster and charter.

    Guarantee: the owner of ``governance`` signed both, and not a byte was changed since.

    Raises:
        VerificationError: A document is absent, changed, or signed by another key.
    """
    roster_path, charter_path = claims.secagg / "roster.json", claims.secagg / "charter.json"
    for path in (roster_path, charter_path):
        if not path.exists():
            raise VerificationError(path, "absent", "no such file")
    with _document(roster_path):
        roster = load_roster(roster_path, governance)
    with _document(charter_path):
        charter = load_charter(charter_path, governance, roster)
    return Consortium(roster, charter)


@contextlib.contextmanager
def _document(path: Path) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise VerificationError(
            path, "governance", str(error).removeprefix(f"{path}: "), error.hint
        ) from None


def check_charter_of_job(claims: Claims, consortium: Consortium, layout: Layout) -> None:
    """Check that the charter says what the job of the run says.

    Raises:
        VerificationError: It differs in a field, which is named.
    """
    from fedvision_sites.secure import check_charter

    with shown_by(claims.secagg / "charter.json"):
        check_charter(consortium, claims.job, layout)


def expected_sums(claims: Claims) -> set[Key]:
    """Return the sums that the record says were made in the rounds."""
    expected: set[Key] = set()
    for number, record in claims.rounds.items():
        expected.add(("train", number))
        if record.get("validation") is not None:
            expected.add(("validate", number))
    return expected


def hides_test(claims: Claims) -> bool:
    """Whether the final result was made from one sum over all sites."""
    return "pooled" in (claims.test or {}) and "test" not in claims.job.secure_aggregation.release


def file_name(key: Key) -> str:
    """Return the name of a sum's files."""
    return f"{key[0]}-{key[1]:04d}"


def check_sums(
    claims: Claims, consortium: Consortium, watch: Callable[[str, int, int], None]
) -> dict[Key, SignedSum]:
    """Check every transcript of a run, with its sum where sums were kept.

    Args:
        claims: The run.
        consortium: Roster and charter, verified.
        watch: Is told a file's name, how many are checked, and how many there are.

    Raises:
        VerificationError: The first file that does not hold, is missing, or should not be there.
    """
    folder, sums = claims.secagg / "transcripts", claims.secagg / "sums"
    expected, found = expected_sums(claims), _files(folder)
    _same_sums(claims, folder, expected, found)
    if claims.job.secure_aggregation.keep_sums:
        _same_sums(claims, sums, set(found), _files(sums))
    checked: dict[Key, SignedSum] = {}
    for done, (key, path) in enumerate(sorted(found.items())):
        watch(file_name(key), done, len(found))
        sum_path = sums / file_name(key)
        checked[key] = _check_sum(consortium, key, path, sum_path if sum_path.exists() else None)
    return checked


def _files(folder: Path) -> dict[Key, Path]:
    """Return the files of a folder by what their name says; half-written ones, with a dot, are left out.

    Raises:
        VerificationError: A file has another name.
    """
    found: dict[Key, Path] = {}
    for path in sorted(folder.glob("[!.]*")):
        match = NAME.fullmatch(path.name)
        if match is None or not path.is_file() or path.name != file_name((_purpose(match[1]), int(match[2]))):
            raise VerificationError(path, "name", "not the name of a sum")
        found[_purpose(match[1]), int(match[2])] = path
    return found


def _purpose(word: str) -> Purpose:
    purposes: dict[str, Purpose] = {"train": "train", "validate": "validate", "test": "test"}
    return purposes[word]


def _same_sums(claims: Claims, folder: Path, expected: set[Key], found: Mapping[Key, Path]) -> None:
    """Check that the files are the expected ones; an unfinished run may have begun one round more, or the
    test. That a sum was of no use is checked with the arithmetic."""
    tests = [key for key in found if key[0] == "test"]
    if hides_test(claims) and not tests:
        raise VerificationError(folder / "test-0001", "absent", "no such file, but test.json is of this sum")
    for key in sorted(expected - set(found)):
        raise VerificationError(
            folder / file_name(key), "absent", f"no such file, but {claims.record.name} has this sum"
        )
    useless: set[Key] = {("train", number) for number in claims.thrown_away}
    useless |= {("validate", number) for number in claims.not_judged}
    begun = set() if claims.is_finished else {(key[0], claims.last_round + 1) for key in found} | set(tests)
    allowed = expected | useless | begun | set(tests if hides_test(claims) else [])
    for key in sorted(set(found) - allowed) or tests[1:]:
        raise VerificationError(found[key], "record", f"{claims.record.name} has no such sum")


def _check_sum(consortium: Consortium, key: Key, path: Path, sum_path: Path | None) -> SignedSum:
    total = None if sum_path is None else read_sum(sum_path)
    with shown_by(path):
        transcript = decode(path.read_bytes(), Transcript)
        session = transcript.session
        if (session.purpose, session.round) != key:
            raise ProtocolError("session", f"this is {session}")
        try:
            checked = check_transcript(consortium, transcript, total)
        except ProtocolError as error:
            if error.rule != "sum" or sum_path is None:
                raise
            raise VerificationError(sum_path, "sum", "not the sum that the server signed") from None
        _check_norms(consortium, transcript, checked)
    return SignedSum(transcript, checked, path, sum_path)


def _check_norms(consortium: Consortium, transcript: Transcript, checked: Checked) -> None:
    """Check that no accepted site's sketch is over the bound; level ``sketch`` only."""
    if checked.level != "sketch":
        return
    for entry in transcript.sketches:
        values = np.frombuffer(decode(entry.body, Sketch).values, "<u4").astype(np.uint32)
        if entry.sender in checked.accepted and not is_within(values, consortium.encoding.norm_bound):
            raise ProtocolError("norm", f"the input of site number {entry.sender} is longer than the bound")


def read_sum(path: Path) -> MaskVector:
    """Return a stored sum, uint32.

    Raises:
        VerificationError: It is absent, or not a whole number of words.
    """
    with shown_by(path):
        content = path.read_bytes()
    if len(content) % 4:
        raise VerificationError(path, "sum", f"{len(content)} bytes are no whole number of 4-byte words")
    return np.frombuffer(content, "<u4").astype(np.uint32, copy=False)
