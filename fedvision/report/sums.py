"""What a run with secure aggregation recorded of its sums: charter, and who was in which sum.

Read for showing, not checked: ``fedvision verify`` checks signatures and arithmetic.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from fedvision.errors import MessageError, StorageError
from fedvision.secagg.codec import decode
from fedvision.secagg.messages import Accepted, Transcript
from fedvision.secagg.roster import Charter
from fedvision.storage import read_json


@dataclass(frozen=True)
class SumRecord:
    """A finished sum.

    Attributes:
        accepted: Names of the sites whose inputs were added.
        left_out: Why a site whose masks were woven in was left out, by name.
        attempt: Which attempt it was, from 1.
    """

    accepted: tuple[str, ...]
    left_out: dict[str, str]
    attempt: int


@dataclass(frozen=True)
class Agreement:
    """What the sites of a run agreed on.

    Attributes:
        charter: The rules.
        names: Names of the enrolled sites by number.
    """

    charter: Charter
    names: dict[int, str]

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the enrolled sites, in the order of their numbers."""
        return tuple(self.names.values())


def read_agreement(folder: Path) -> Agreement | None:
    """Return charter and names of a run; None for a run without secure aggregation.

    Raises:
        StorageError: A file is damaged.
    """
    path = folder / "secagg" / "charter.json"
    if not path.exists():
        return None
    try:
        charter = Charter.model_validate(read_json(path)["document"])
        path = path.with_name("roster.json")
        members = {one["number"]: str(one["name"]) for one in read_json(path)["document"]["sites"]}
        return Agreement(charter, {number: members[number] for number in charter.sites})
    except (KeyError, TypeError, ValidationError):
        raise StorageError(f"{path} is damaged", "`fedvision verify` says more") from None


def read_sums(folder: Path, agreement: Agreement) -> dict[tuple[str, int], SumRecord]:
    """Return the finished sums of a run, by purpose and round.

    Raises:
        StorageError: A transcript is damaged.
    """
    found = {}
    for path in sorted((folder / "secagg" / "transcripts").glob("[!.]*")):
        try:
            transcript = decode(path.read_bytes(), Transcript)
            accepted = decode(transcript.accepted.body, Accepted)
            session, names = transcript.session, agreement.names
            found[str(session.purpose), session.round] = SumRecord(
                tuple(names[entry.site] for entry in accepted.entries),
                {names[one.site]: str(one.reason) for one in accepted.excluded},
                session.attempt,
            )
        except (OSError, MessageError, KeyError):
            raise StorageError(f"{path} is damaged", "`fedvision verify` says more") from None
    return found
