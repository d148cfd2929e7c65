"""What a run folder says, read into one object. Every file may be absent: a run can be under way.

Rules:
- Of two lines with the same event, round and site the last one counts, so a resumed run may repeat one.
- With secure aggregation the transcripts say who was in a sum; the record says why others were not.
- A site's own files are found by listing ``sites/``; a name in a record never becomes a path.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fedvision.config import Job, load_job
from fedvision.report.notation import is_number
from fedvision.report.sums import Agreement, SumRecord, read_agreement, read_sums
from fedvision.storage import read_json, read_lines
from fedvision.tasks import task_module

Record = dict[str, Any]
TEST = 1 << 32
"""Stands for the final test where incidents are kept by round: after every round."""
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
        agreement: Charter and names of a run with secure aggregation; None for one in the clear.
        sums: Its finished sums by purpose and round.
        incidents: Its events "secure", "attempt", "expelled", "weight" and "thrown away" by round, ``TEST``
            for those of the final test.
        judgements: What the rules of the defence said, by round.
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
    agreement: Agreement | None
    sums: dict[tuple[str, int], SumRecord]
    incidents: dict[int, list[Record]]
    judgements: dict[int, Record]

    @property
    def headline(self) -> str:
        """The metric that chooses the best model."""
        return str(self.test["headline"]) if self.test else headline_of(self.job)

    @property
    def training_sites(self) -> list[str]:
        """Names of the sites that were asked to train, sorted."""
        enrolled = self.agreement.sites if self.agreement and self.train else ()
        return sorted({site for by_site in self.train.values() for site in by_site}.union(enrolled))

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
        """Say what a site did: trained, held out, tested only; or that it was expelled for a lie."""
        if site in self.expelled():
            return "expelled"
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

    def pooled(self, number: int) -> float | None:
        """Return the headline of a round over all validation cases."""
        found = (self.rounds.get(number) or {}).get("validation") or {}
        value = (found.get("pooled") or {}).get(self.headline)
        return float(value) if is_number(value) else None

    def losses(self) -> dict[str, dict[float, float]]:
        """Return the training loss by site and round: what sites sent, or else their own records."""
        if self.agreement is None:
            return {site: self.series(self.train, site, "train_loss") for site in self.sites}
        return {
            site: {n: float(one["train_loss"]) for n, one in log.items() if is_number(one.get("train_loss"))}
            for site, log in self.clipping.items()
        }

    def mean_losses(self) -> dict[float, float]:
        """Return the weighted mean training loss by round, which is all that a secure sum says of it."""
        found = {number: entry.get("train_loss") for number, entry in self.rounds.items()}
        return {number: float(value) for number, value in found.items() if is_number(value)}

    @property
    def rounds_done(self) -> int:
        """The last round that is done, with those that were thrown away; 0 before the first."""
        thrown_away = (number for number in self.incidents if self.thrown_away(number))
        return max([0, *self.rounds, *thrown_away])

    def accepted(self, number: int) -> list[str]:
        """Return the names of the sites whose updates are in a round's model, sorted."""
        if self.agreement is None:
            return [str(record["site"]) for record in self.trained(number, accepted=True)]
        found = self.sums.get(("train", number))
        return sorted(found.accepted) if found else []

    def asked(self, number: int) -> int:
        """Return how many sites could have been in a round's model."""
        return len(self.train.get(number, {})) if self.agreement is None else len(self.agreement.sites)

    def thrown_away(self, number: int) -> bool:
        """Whether a round was unmasked, but its sum was wrong and not used."""
        events = [incident["event"] for incident in self.incidents.get(number, ())]
        return "thrown away" in events and number not in self.rounds

    def expelled(self) -> dict[str, tuple[int, Record]]:
        """Return the round and the event of each site that was expelled, by site; ``TEST`` for the test."""
        found = [(number, one) for number, events in sorted(self.incidents.items()) for one in events]
        return {str(one["site"]): (number, one) for number, one in found if one["event"] == "expelled"}

    def trained(self, number: int, accepted: bool) -> list[Record]:
        """Return a round's training records that were accepted, or those refused or failed, by site."""
        return [
            record
            for _, record in sorted(self.train.get(number, {}).items())
            if (record.get("status") == "accepted") == accepted
        ]


def is_of_test(record: Record) -> bool:
    """Whether an incident belongs to the sum of the final test, which has a count of its own."""
    return record.get("purpose") == "test" or str(record.get("evidence", "")).startswith("test-")


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
        name: {} for name in ("train", "validate", "evaluate failed", "round", "judgement")
    }
    incidents: dict[int, list[Record]] = {}
    for record in read_lines(folder / "rounds.jsonl"):
        name = str(record.get("event"))
        if name in ("validate", "test") and record.get("status") == "refused":
            name = "evaluate failed"
        if name in ("secure", "attempt", "expelled", "weight", "thrown away"):
            number = TEST if is_of_test(record) else int(record["round"])
            incidents.setdefault(number, []).append(record)
        elif name in events:
            events[name].setdefault(int(record["round"]), {})[str(record.get("site", ""))] = record
    agreement = read_agreement(folder)
    folders = {path.name: path for path in sorted((folder / "sites").glob("*")) if path.is_dir()}
    clipping: dict[str, dict[int, Record]] = {name: {} for name in folders}
    refusals: dict[str, dict[int, str]] = {name: {} for name in folders}
    for name, path in folders.items():
        for record in read_lines(path / "log.jsonl"):
            number = int(record["round"])
            if "judgement" in record:
                continue
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
        agreement=agreement,
        sums=read_sums(folder, agreement) if agreement else {},
        incidents=incidents,
        judgements={number: record[""] for number, record in sorted(events["judgement"].items())},
    )


def _json_if_there(path: Path) -> Any:
    return read_json(path) if path.exists() else None
