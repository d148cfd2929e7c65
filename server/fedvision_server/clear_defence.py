"""The rules of the defence where the server sees every update: jobs without secure aggregation.

    defence/judgements/train-0003.json   as with secure aggregation, with exact inner products
    defence/updates/                     a round's updates, until it is judged

Rules:
- Updates wait on disk: the server holds one vector, however many sites there are, and a slice of all.
- The judgement is the one that secure aggregation would come to from sketches, up to their error.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from fedvision.defence.evidence import Past
from fedvision.defence.geometry import Geometry
from fedvision.defence.judge import Judgement, judge
from fedvision.defence.spelling import write_judgement
from fedvision.errors import DefenceError, RoundError
from fedvision.storage import read_json, write_json
from fedvision.training.charter import rules_in_the_clear
from fedvision.updates.layout import FloatVector

if TYPE_CHECKING:
    from fedvision_server.federation import Federation

SLICE = 1 << 16


class ClearDefence:
    """Judges one round of a job without secure aggregation.

    Args:
        federation: The sites; their order in the cohort gives them numbers, from 1.
        number: The round.
    """

    def __init__(self, federation: "Federation", number: int) -> None:
        self._federation = federation
        self._number = number
        self._folder = federation.folder.path / "defence"
        names = sorted(federation.cohort.train)
        self._numbers = {name: index for index, name in enumerate(names, 1)}
        self._weights: dict[str, int] = {}
        has_root = federation.root_update is not None
        self._rules = rules_in_the_clear(federation.job, len(names), has_root)
        self.excluded: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        shutil.rmtree(self._folder / "updates", ignore_errors=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder / "updates", ignore_errors=True)

    @property
    def is_on(self) -> bool:
        """Whether there is any rule."""
        return bool(self._rules)

    def put(self, site: str, update: FloatVector, weight: int) -> None:
        """Keep a checked update until all are there."""
        folder = self._folder / "updates"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{self._numbers[site]}.npy", update, allow_pickle=False)
        self._weights[site] = weight

    def accepted(self, root: FloatVector | None) -> Iterator[tuple[str, FloatVector, int]]:
        """Judge what was put, and yield name, update and weight of the sites that are not left out.

        Args:
            root: The root set's update; None without one.

        Raises:
            RoundError: A rule cannot be used on these updates, or nobody is left.
        """
        sites = sorted(self._weights)
        job = self._federation.job
        most = min(len(sites) - job.aggregation.min_sites, (len(sites) - 1) // 2)
        try:
            geometry = self._geometry(sites, root)
            share = job.defence.max_malicious
            found = judge(geometry, self._rules, share, max(0, most), self._past())
        except DefenceError as error:
            raise RoundError(f"round {self._number}: {error}", error.hint) from None
        self._tell(found, {number: name for name, number in self._numbers.items()})
        for name in sites:
            if name not in self.excluded:
                yield name, self._read(name), self._weights[name]

    def _read(self, name: str) -> FloatVector:
        path = self._folder / "updates" / f"{self._numbers[name]}.npy"
        found: FloatVector = np.load(path, mmap_mode="r", allow_pickle=False)
        return found

    def _geometry(self, sites: list[str], root: FloatVector | None) -> Geometry:
        """Return norms and inner products in clip norms, slice by slice."""
        rows = [self._read(name) for name in sites]
        gram: NDArray[np.float64] = np.zeros((len(rows), len(rows)))
        products = np.zeros(len(rows))
        for start in range(0, self._federation.layout.size, SLICE):
            part = np.stack([row[start : start + SLICE] for row in rows]).astype(np.float64)
            gram += part @ part.T
            if root is not None:
                products += part @ root[start : start + SLICE].astype(np.float64)
        clip = self._federation.job.aggregation.clip_norm
        numbers = tuple(self._numbers[name] for name in sites)
        if root is None:
            return Geometry(numbers, gram / clip**2)
        length = float(np.linalg.norm(root.astype(np.float64))) / clip
        return Geometry(numbers, gram / clip**2, products / clip**2, length)

    def _past(self) -> Past:
        before = [n for n in range(1, self._number) if self._path(n).exists()]
        return Judgement.from_json(read_json(self._path(before[-1]))["judgement"]).past if before else Past()

    def _path(self, number: int) -> Path:
        return self._folder / "judgements" / f"train-{number:04d}.json"

    def _tell(self, found: Judgement, names: dict[int, str]) -> None:
        """Put the judgement on disk and into the record."""
        judgement = json.loads(write_judgement(found))
        write_json(self._path(self._number), {"format": 1, "judgement": judgement})
        self.excluded = tuple(names[number] for number in found.excluded)
        reasons = {site.site: site.reason for site in found.sites}
        for number in found.excluded:
            event = {"event": "train", "round": self._number, "site": names[number], "status": "refused"}
            self._federation.tell({**event, "reason": f"by the rules: {reasons[number]}"})
        told = {str(site.site): names[site.site] for site in found.sites}
        self._federation.tell({"event": "judgement", "round": self._number, "names": told, **judgement})
