"""The server's state of a run, on disk, so that a killed server loses nothing that was finished.

    rounds.jsonl                         what happened, one line a round and site, and one a round
    checkpoints/round-0007.safetensors   global weights after a round, with everything needed to go on
    test.json, model.safetensors         written once, at the end

Rules:
- The checkpoint of a round is written after everything else of that round: a round is done when its
  checkpoint has its name, and is done again otherwise.
- The last and the best checkpoint are kept.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvision.config import Job
from fedvision.errors import StorageError
from fedvision.storage import append_line, load_tensors, save_tensors, write_json
from fedvision.updates.layout import FloatVector, Layout

logger = logging.getLogger(__name__)
MOMENTS = "fedvision.moments."
CHECKPOINT = re.compile(r"round-(\d{4,})\.safetensors")


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes:
        round: The last finished round, 0 before the first.
        weights: Global weights after it, float32, shape (d,).
        best_round: The round whose model did best on validation, 0 if none was judged.
        best_value: Its headline metric on validation, mean over sites.
        moments: Of the server's optimiser, by name; none for a server that has none.
    """

    round: int
    weights: FloatVector = field(repr=False)
    best_round: int = 0
    best_value: float = -math.inf
    moments: Mapping[str, NDArray[np.float32]] = field(default_factory=dict, repr=False)


class RunFolder:
    """Reads and writes the server's files of one run.

    Args:
        path: The run folder.
        job: The job; a checkpoint of another job is refused.
        layout: Of the global weights.
    """

    def __init__(self, path: Path, job: Job, layout: Layout) -> None:
        self.path = path
        self._digest = job.digest()
        self._layout = layout

    def checkpoint(self, round_number: int) -> Path:
        """Return the path of a round's checkpoint."""
        return self.path / "checkpoints" / f"round-{round_number:04d}.safetensors"

    def save(self, state: RunState) -> None:
        """Write the checkpoint of a finished round and remove those no longer needed.

        Raises:
            StorageError: The disk is full; the checkpoint of the round before is still there.
        """
        metadata = {
            "format": "1",
            "job": self._digest,
            "layout": self._layout.digest,
            "round": str(state.round),
            "best_round": str(state.best_round),
            "best_value": state.best_value.hex(),
        }
        tensors = self._layout.split(state.weights)
        tensors |= {MOMENTS + name: values for name, values in state.moments.items()}
        save_tensors(self.checkpoint(state.round), tensors, metadata)
        for path in self._checkpoints().values():
            if path not in (self.checkpoint(state.round), self.checkpoint(state.best_round)):
                path.unlink(missing_ok=True)

    def load(self) -> RunState | None:
        """Return the state after the last finished round, or None for a run that has none."""
        found = self._checkpoints()
        return self.load_round(max(found)) if found else None

    def load_round(self, round_number: int) -> RunState:
        """Return the state after one round.

        Raises:
            StorageError: The checkpoint is damaged, or of another job or network.
        """
        path = self.checkpoint(round_number)
        tensors, metadata = load_tensors(path)
        if metadata.get("format") != "1":
            raise StorageError(
                f"{path} is of another format", "written by a newer version? update fedvision on this machine"
            )
        if metadata.get("job") != self._digest or metadata.get("layout") != self._layout.digest:
            raise StorageError(
                f"{path} belongs to another job or network", "start a new run instead of resuming this one"
            )
        try:
            parts = [np.asarray(tensors[name], np.float32).ravel() for name in self._layout.shapes]
            moments = {
                name.removeprefix(MOMENTS): np.asarray(values, np.float32)
                for name, values in tensors.items()
                if name.startswith(MOMENTS)
            }
            return RunState(
                int(metadata["round"]),
                np.concatenate(parts),
                int(metadata["best_round"]),
                float.fromhex(metadata["best_value"]),
                moments,
            )
        except (KeyError, ValueError):
            raise StorageError(f"{path} is damaged") from None

    def _checkpoints(self) -> dict[int, Path]:
        folder = self.path / "checkpoints"
        names = (
            {path: CHECKPOINT.fullmatch(path.name) for path in folder.glob("*")} if folder.exists() else {}
        )
        return {int(match[1]): path for path, match in names.items() if match}

    def record(self, event: dict[str, Any]) -> None:
        """Append one line to ``rounds.jsonl``."""
        append_line(self.path / "rounds.jsonl", without_nan(event))

    def save_model(self, state: RunState) -> None:
        """Write ``model.safetensors``: the weights of the released model, by tensor name."""
        metadata = {"format": "1", "job": self._digest, "round": str(state.round)}
        save_tensors(self.path / "model.safetensors", self._layout.split(state.weights), metadata)

    def save_test(self, result: dict[str, Any]) -> None:
        """Write ``test.json``."""
        write_json(self.path / "test.json", without_nan(result))


def without_nan(value: Any) -> Any:
    """Return ``value`` with None where a metric is undefined: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def advance(
    state: RunState,
    weights: FloatVector,
    value: float | None,
    moments: Mapping[str, NDArray[np.float32]] | None = None,
) -> RunState:
    """Return the state after one more round; ``value`` is its validation headline, None if not judged."""
    following = dataclasses.replace(state, round=state.round + 1, weights=weights, moments=moments or {})
    if value is not None and not math.isnan(value) and value > state.best_value:
        return dataclasses.replace(following, best_round=following.round, best_value=value)
    return following
