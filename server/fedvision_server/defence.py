"""The charter's rules in a run: what was measured in each round, what they said, what people decided.

    secagg/judgements/train-0003.json   of a finished sum: the inner products, and the judgement on them
    secagg/decisions.json               what people decided about sites in quarantine, and from which round on

Rules:
- A judgement is a function of the round's inner products, the judgement before, and the decisions: it can be
  made again from these files, and ``fedvision verify`` does.
- It is on disk before the sum that it led to. A round that is lost leaves no judgement.
- The root set's update judges directions. It is never added to a sum.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedvision.defence.evidence import Past
from fedvision.defence.geometry import TABLES, Geometry, from_gram
from fedvision.defence.judge import Judgement, judge
from fedvision.defence.spelling import write_judgement
from fedvision.errors import DefenceError, StorageError
from fedvision.secagg.attempt import Measured, Selected
from fedvision.secagg.encoding import Encoding
from fedvision.secagg.gram import UNITS
from fedvision.secagg.masking import MaskVector
from fedvision.secagg.roster import Charter
from fedvision.storage import read_json, write_json

Decision = Literal["lift", "expel"]


class Defence:
    """Judges the rounds of one job.

    Args:
        folder: ``secagg`` of the run folder.
        charter: Its rules.
        encoding: Of its updates.
    """

    def __init__(self, folder: Path, charter: Charter, encoding: Encoding) -> None:
        self._folder = folder
        self._charter = charter
        self._encoding = encoding

    @property
    def is_on(self) -> bool:
        """Whether there is any rule."""
        return bool(self._charter.rules)

    def select(self, number: int, measured: Measured) -> Selected:
        """Apply the rules to a round's inner products; see ``secagg.attempt.Select``.

        Raises:
            DefenceError: A rule cannot be used on them.
        """
        found = self.judge(number, measured)
        return Selected(frozenset(found.excluded), write_judgement(found))

    def judge(self, number: int, measured: Measured) -> Judgement:
        """Return the judgement on a round's inner products.

        Raises:
            DefenceError: A rule cannot be used on them.
        """
        geometry = geometry_of(measured, self._encoding, self._charter.level == "gram")
        rules, share = self._charter.rules, self._charter.max_malicious
        return judge(geometry, rules, share, measured.most_excluded, self.past(number))

    def past(self, number: int) -> Past:
        """Return the evidence before a round: the last judgement's, and what people decided since."""
        before = [found for found in self._numbers() if found < number]
        past, last = Past(), 0
        if before:
            last = max(before)
            past = self.read(last)[1].past
        for site, (decision, since) in self.decisions().items():
            if decision == "lift" and last < since <= number:
                past = past.lifted(site)
        return past

    def expelled(self, number: int) -> frozenset[int]:
        """Return the sites that people have expelled before a round."""
        told = self.decisions().items()
        return frozenset(site for site, (decision, since) in told if decision == "expel" and since <= number)

    def quarantined(self, number: int) -> tuple[int, ...]:
        """Return the sites in quarantine before a round."""
        return self.past(number).quarantined

    def _numbers(self) -> list[int]:
        names = (path.stem for path in (self._folder / "judgements").glob("train-*.json"))
        return sorted(int(name.removeprefix("train-")) for name in names)

    def _path(self, number: int) -> Path:
        return self._folder / "judgements" / f"train-{number:04d}.json"

    def keep(self, number: int, measured: Measured, judgement: bytes) -> None:
        """Put a round's judgement on disk, with what it was made of."""
        content = {
            "format": 1,
            "sites": list(measured.sites),
            "gram": measured.gram.tolist(),
            "root": None if measured.root is None else measured.root.tolist(),
            "root_square": measured.root_square,
            "most_excluded": measured.most_excluded,
            "judgement": json.loads(judgement),
        }
        write_json(self._path(number), content)

    def read(self, number: int) -> tuple[Measured, Judgement]:
        """Return what was kept of a round.

        Raises:
            StorageError: The file is absent or damaged.
        """
        return read_judgement_file(self._path(number))

    def decisions(self) -> dict[int, tuple[Decision, int]]:
        """Return what people decided last about each site, and from which round on it holds.

        Raises:
            StorageError: The file is damaged.
        """
        return read_decisions(self._folder / "decisions.json")

    def decide(self, site: int, decision: Decision, since: int) -> None:
        """Note a decision, which holds from round ``since`` on."""
        found = {**self.decisions(), site: (decision, since)}
        listed = [
            {"site": one, "decision": what, "since": when} for one, (what, when) in sorted(found.items())
        ]
        write_json(self._folder / "decisions.json", {"format": 1, "decisions": listed})


def geometry_of(measured: Measured, encoding: Encoding, has_tail: bool) -> Geometry:
    """Return norms and inner products of the updates in clip norms, from those of their rounded sketches.

    Args:
        measured: Of a sum.
        encoding: Of its inputs.
        has_tail: Whether the weights are in it: at level ``gram``, not at ``sketch``.

    Raises:
        DefenceError: A number is not one that sketches of updates have.
    """
    unit = (encoding.norm_bound / encoding.scale / UNITS) ** 2 / TABLES
    tail: float | None = 0.0
    if has_tail and encoding.weight_cap == 1:  # all weights are the same number of units, rounded alike
        tail = float(np.rint(encoding.largest_weight * UNITS / encoding.norm_bound)) ** 2 * unit * TABLES
    elif has_tail:
        tail = None
    root = None if measured.root is None else measured.root * unit
    return from_gram(
        measured.sites, measured.gram, unit, tail, root, float(np.sqrt(measured.root_square * unit))
    )


def root_input(update: NDArray[np.float32], encoding: Encoding) -> MaskVector:
    """Return the root set's update in the sites' units, with no weight and no metrics.

    Args:
        update: Shape (size,), clipped.
        encoding: Of the job.
    """
    vector = np.zeros(encoding.length, np.int32)
    vector[: encoding.size] = np.rint(update.astype(np.float64) * (encoding.scale / encoding.clip_norm))
    return vector.view(np.uint32)


def read_judgement_file(path: Path) -> tuple[Measured, Judgement]:
    """Return what the server measured in a round, and the judgement on it.

    Raises:
        StorageError: The file is absent or damaged.
    """
    try:
        content: Mapping[str, Any] = read_json(path)
        sites = tuple(int(site) for site in content["sites"])
        gram = np.array(content["gram"], np.int64).reshape(len(sites), len(sites))
        root = None
        if content["root"] is not None:
            root = np.array(content["root"], np.int64).reshape(len(sites))
        measured = Measured(sites, gram, root, int(content["root_square"]), int(content["most_excluded"]))
        if content["format"] != 1 or not 0 <= measured.most_excluded < len(sites):
            raise ValueError
        return measured, Judgement.from_json(content["judgement"])
    except (ValueError, KeyError, TypeError, OverflowError, DefenceError):
        raise StorageError(f"{path} is damaged") from None


def read_decisions(path: Path) -> dict[int, tuple[Decision, int]]:
    """Return what people decided last about each site; see ``Defence.decisions``.

    Raises:
        StorageError: The file is damaged.
    """
    if not path.exists():
        return {}
    found: dict[int, tuple[Decision, int]] = {}
    try:
        content: Mapping[str, Any] = read_json(path)
        if content["format"] != 1:
            raise ValueError
        for item in content["decisions"]:
            if item["decision"] not in ("lift", "expel"):
                raise ValueError
            found[int(item["site"])] = (item["decision"], int(item["since"]))
    except (ValueError, KeyError, TypeError):
        raise StorageError(f"{path} is damaged") from None
    return found
