"""Roster and charter of a run, as they lie in its folder: what the parties of a job agreed on.

RUN/secagg/roster.json, charter.json   signed
RUN/secagg/governance.pub              who signed them; a copy proves nothing, parties pin the key elsewhere
"""

from pathlib import Path

from fedvision.errors import ConfigError, StorageError
from fedvision.secagg import identity
from fedvision.secagg.messages import Documents
from fedvision.secagg.roster import load_charter, load_roster
from fedvision.secagg.schedule import Consortium
from fedvision.storage import write_text


def agreement_folder(run: Path) -> Path:
    """Return the folder of what the parties of a run signed."""
    return run / "secagg"


def write_governance(run: Path, name: str, public: bytes) -> None:
    """Write ``governance.pub``.

    Raises:
        StorageError: The folder is not writable.
    """
    write_text(agreement_folder(run) / "governance.pub", identity.public_line(name, public) + "\n")


def governance_key(run: Path) -> bytes:
    """Return the governance key of a run folder, 32 bytes.

    Raises:
        ConfigError: The file is absent or damaged.
    """
    path = agreement_folder(run) / "governance.pub"
    try:
        return identity.parse_public(path.read_text(encoding="utf-8"), str(path))[1]
    except OSError:
        raise ConfigError(f"{path} is absent", "the run was made without secure aggregation") from None


def load_consortium(run: Path, governance: bytes | None = None) -> Consortium:
    """Return roster and charter of a run folder, with their signatures verified.

    Args:
        run: The run folder.
        governance: The key that must have signed, 32 bytes; None for the folder's own.

    Raises:
        ConfigError: One is absent, damaged, or signed by another key.
    """
    key, folder = governance or governance_key(run), agreement_folder(run)
    roster = load_roster(folder / "roster.json", key)
    return Consortium(roster, load_charter(folder / "charter.json", key, roster))


def load_documents(run: Path) -> Documents:
    """Return roster and charter of a run folder as signed, to be sent to the sites.

    Raises:
        StorageError: One cannot be read.
    """
    folder = agreement_folder(run)
    try:
        return Documents((folder / "roster.json").read_bytes(), (folder / "charter.json").read_bytes())
    except OSError as error:
        raise StorageError(f"cannot read in {folder}: {(error.strerror or str(error)).lower()}") from None
