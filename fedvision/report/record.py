"""What a run folder says, read into one object. Every file may be absent: a run can be under way.

Rules:
- Of two lines with the same event, round and site the last one counts, so a resumed run may repeat one.
- A site's own files are found by listing ``sites/``; a name in a record never becomes a path.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fedvision.config import Job, load_job
from fedvision.report.notation import is_number
from fedvision.storage import read_json, read_lines
from fedvision.tasks import task_module

Record = dict[str, Any]
MEAN = "mean of sites"
POOLED = "all cases pooled"


@dataclass(frozen=True)
class Summary:
    """Final metrics over sites, with 95 % intervals by metric where they are known."""

    metrics: Record
    intervals: Record


@dataclass(frozen=True)
class RunRecord:
    """A run folder, read.

    Attributes:
        folder: The run folder.
        job: What was trained.
        environment: Versions and machine; empty if not recorded.
        train: Records of local training by round, then site.
        validate: Records of validation by round, then site.
        failed_validation: Records of sites that could not validate, by round, then site.
        rounds: Records of rounds by round, in order.
        test: The final result, None before it is made.
        clipping: What each site recorded of its updates by site, then round; empty away from their machine.
        refusals: Why a site itself refused a round, in its own words, by site, then round.
        site_folders: The sites' own folders by site.
    """

    folder: Path
    job: Job
    environment: Record
    train: dict[int, dict[str, Record]]
    validate: dict[int, dict[str, Record]]
    failed_validation: dict[int, dict[str, Record]]
    rounds: dict[int, Record]
    test: Record | None
    clipping: dict[str, dict[int, Record]]
    refusals: dict[str, dict[int, str]]
    site_folders: dict[str, Path]

    @property
    def headline(self) -> str:
        """The metric that chooses the best model."""
        return str(self.test["headline"]) if self.test else headline_of(self.job)

    @property
    def training_sites(self) -> list[str]:
        """Names of the sites that were asked to train, sorted."""
        return sorted({site for by_site in self.train.values() for site in by_site})

    @property
    def held_out_sites(self) -> list[str]:
        """Names of the sites that the job keeps for the final test, sorted."""
        return sorted(name for name, result in self.results.items() if result["role"] == "held_out")

    @property
    def sites(self) -> list[str]:
        """All sites, those that train first, held-out ones last: the order of their colours."""
        trained, held_out = self.training_sites, self.held_out_sites
        named = set(self.results).union(*self.validate.values())
        return trained + sorted(named.difference(trained, held_out)) + held_out

    @property
    def results(self) -> dict[str, Record]:
        """The final results by site, empty before they are made."""
        return dict(self.test["sites"]) if self.test else {}

    def role(self, site: str) -> str:
        """Say what a site did: trained, held out, or tested only."""
        if site in self.held_out_sites:
            return "held out"
        return "trained" if site in self.training_sites else "tested only"

    @property
    def worst_site(self) -> str:
        """The site with the lowest final headline among those whose data the job trains for, or ''."""
        return str(((self.test or {}).get("worst_site") or {}).get("site") or "")

    @property
    def summaries(self) -> dict[str, Summary]:
        """The final results over sites, by ``MEAN`` and ``POOLED``; empty before they are made."""
        test = self.test or {}
        pooled = test.get("pooled") or {}
        found = {
            MEAN: Summary(test.get("mean_site") or {}, test.get("mean_site_intervals") or {}),
            POOLED: Summary(pooled.get("metrics") or {}, pooled.get("intervals") or {}),
        }
        return {label: summary for label, summary in found.items() if summary.metrics}

    @property
    def best_round(self) -> int | None:
        """The round whose model was kept, None before the first validation."""
        if self.test:
            return int(self.test["round"])
        best = [number for number, record in self.rounds.items() if record.get("is_best")]
        return best[-1] if best else None

    def num_parameters(self) -> int | None:
        """Return how many floating-point numbers the released model has, None before it is written."""
        path = self.folder / "model.safetensors"
        if not path.exists():
            return None
        with safe_open(path, framework="numpy") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118, not a dict
            return sum(math.prod(one.get_shape()) for one in slices if "F" in one.get_dtype())

    def validation(self, number: int) -> tuple[float | None, str, float | None]:
        """Return the headline of a round: mean over sites, worst site's name, worst site's value."""
        found = (self.rounds.get(number) or {}).get("validation") or {}
        worst = found.get("worst_site") or {}
        mean = (found.get("mean_site") or {}).get(self.headline)
        lowest = (worst.get("metrics") or {}).get(self.headline)
        return (
            float(mean) if is_number(mean) else None,
            str(worst.get("site") or ""),
            float(lowest) if is_number(lowest) else None,
        )

    def series(self, records: dict[int, dict[str, Record]], site: str, key: str) -> dict[float, float]:
        """Return a site's numbers by round; ``key`` is a field, or a metric where the record has metrics."""
        found: dict[float, float] = {}
        for number, by_site in sorted(records.items()):
            record = by_site.get(site) or {}
            value = (record.get("metrics") or record).get(key)
            if is_number(value):
                found[number] = float(value)
        return found

    def trained(self, number: int, accepted: bool) -> list[Record]:
        """Return a round's training records that were accepted, or those refused or failed, by site."""
        return [
            record
            for _, record in sorted(self.train.get(number, {}).items())
            if (record.get("status") == "accepted") == accepted
        ]


def headline_of(job: Job) -> str:
    """Return the metric that chooses the best model of a job."""
    return str(task_module(job).HEADLINE)


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        ConfigError: There is no valid ``job.toml``: this is not a run folder.
        StorageError: A file is damaged.
    """
    events: dict[str, dict[int, dict[str, Record]]] = {
        name: {} for name in ("train", "validate", "evaluate failed", "round")
    }
    for record in read_lines(folder / "rounds.jsonl"):
        event = events.get(str(record.get("event")))
        if event is not None:
            event.setdefault(int(record["round"]), {})[str(record.get("site", ""))] = record
    folders = {path.name: path for path in sorted((folder / "sites").glob("*")) if path.is_dir()}
    clipping: dict[str, dict[int, Record]] = {name: {} for name in folders}
    refusals: dict[str, dict[int, str]] = {name: {} for name in folders}
    for name, path in folders.items():
        for record in read_lines(path / "log.jsonl"):
            number = int(record["round"])
            if "norm_before" in record:
                clipping[name][number] = record
                refusals[name].pop(number, None)
            else:
                refusals[name][number] = str(record.get("refused") or record.get("failed") or "")
    return RunRecord(
        folder=folder,
        job=load_job(folder / "job.toml"),
        environment=_json_if_there(folder / "environment.json") or {},
        train=events["train"],
        validate=events["validate"],
        failed_validation=events["evaluate failed"],
        rounds={number: record[""] for number, record in sorted(events["round"].items())},
        test=_json_if_there(folder / "test.json"),
        clipping=clipping,
        refusals=refusals,
        site_folders=folders,
    )


def _json_if_there(path: Path) -> Any:
    return read_json(path) if path.exists() else None
