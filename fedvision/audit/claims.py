"""What a run folder claims about itself, read before anything of it is checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvision.config import Job, load_job
from fedvision.errors import ConfigError, StorageError, VerificationError
from fedvision.storage import read_json, read_lines

Record = dict[str, Any]


@dataclass(frozen=True)
class Claims:
    """A run folder of a job with secure aggregation.

    Attributes:
        folder: The run folder.
        job: From job.toml, without paths.
        rounds: The "round" event of each round that is done and was not thrown away.
        thrown_away: Rounds whose sum was wrong and was not used.
        not_judged: Rounds whose validation sum was of no use.
        expelled: The "expelled" events.
        test: The content of test.json; None before the final test.
        is_repaired: Whether the model was changed on the root set after the last round.
    """

    folder: Path
    job: Job
    rounds: dict[int, Record]
    thrown_away: frozenset[int]
    not_judged: frozenset[int]
    expelled: tuple[Record, ...]
    test: Record | None
    is_repaired: bool = False

    @property
    def last_round(self) -> int:
        """The last round that is done, 0 before the first."""
        return max([0, *self.rounds, *self.thrown_away])

    @property
    def is_finished(self) -> bool:
        """Whether the final test has been made."""
        return self.test is not None

    @property
    def secagg(self) -> Path:
        """The folder of what parties signed."""
        return self.folder / "secagg"

    @property
    def record(self) -> Path:
        """The server's record."""
        return self.folder / "rounds.jsonl"


def read_claims(folder: Path) -> Claims:
    """Read job, record and final result of a run.

    Raises:
        ConfigError: This is no run folder, or one of a run without secure aggregation.
        VerificationError: There is a charter, but the job says that there was no secure aggregation; or the
            final test was made before all rounds.
        StorageError: A file is damaged.
    """
    if not (folder / "job.toml").exists():
        raise ConfigError(
            f"{folder} is not a run folder: no job.toml", "the folder that `fedvision simulate` made"
        )
    job = load_job(folder / "job.toml").public()
    if not job.aggregation.secure and (folder / "secagg" / "charter.json").exists():
        raise VerificationError(folder / "job.toml", "charter-job", "the job is not the one of the charter")
    if not job.aggregation.secure:
        raise ConfigError(
            f"{folder} was run without secure aggregation: nothing is signed, so nothing can be verified",
            "run the job with aggregation.secure = true",
        )
    rounds: dict[int, Record] = {}
    thrown_away: set[int] = set()
    not_judged: set[int] = set()
    expelled = []
    for record in read_lines(folder / "rounds.jsonl"):
        try:
            event, number = record["event"], int(record["round"])
        except (KeyError, TypeError, ValueError):
            raise StorageError(f"{folder / 'rounds.jsonl'}: a line has no event or round") from None
        if event == "round":
            rounds[number] = record
        elif event == "thrown away":
            thrown_away.add(number)
        elif event == "evaluate failed" and "site" not in record:
            not_judged.add(number)
        elif event == "expelled":
            expelled.append(record)
    test = read_json(folder / "test.json") if (folder / "test.json").exists() else None
    if test is None:  # the record is written before the checkpoint, with which a round is done
        done = _last_checkpoint(folder)
        rounds = {number: record for number, record in rounds.items() if number <= done}
        thrown_away = {number for number in thrown_away if number <= done}
    elif not isinstance(test, dict) or max([0, *rounds, *thrown_away]) != job.rounds:
        raise VerificationError(
            folder / "rounds.jsonl", "record", f"the run is finished, but not all of its {job.rounds} rounds"
        )
    lost = frozenset(thrown_away - set(rounds))
    blind = frozenset(n for n in not_judged if n in rounds and rounds[n].get("validation") is None)
    path = folder / "repair.json"
    repaired = test is not None and path.exists() and bool(read_json(path).get("is_changed"))
    return Claims(folder, job, rounds, lost, blind, tuple(expelled), test, repaired)


def _last_checkpoint(folder: Path) -> int:
    names = [
        path.stem.removeprefix("round-") for path in (folder / "checkpoints").glob("round-*.safetensors")
    ]
    return max((int(name) for name in names if name.isdecimal()), default=0)
