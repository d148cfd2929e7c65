"""The model card of a release as data: ``card.json``, format 1.

Rules:
- Only the server's record and what is signed is read, never a site's own folder: a released card goes to
  anybody, and a site's folder names cases and patients.
- What is not known is None, never left out. What sites released is given as they said it.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvision.report.notation import is_number
from fedvision.report.record import MEAN, POOLED, TEST, RunRecord
from fedvision.storage import read_json

FORMAT = 1
Card = dict[str, Any]
USE = "research, and comparison with other models on data of one's own"
_SEEN = {
    "sum": "the sum of the updates, and nothing of a single one",
    "sketch": "the sum of the updates, and of each single one a random sketch",
    "gram": "the sum of the updates, and of each pair of them one inner product",
}


@dataclass(frozen=True)
class Guarantee:
    """What private training has cost the patients of the worst site.

    Attributes:
        epsilon: If secure aggregation holds, largest over the sites; may be infinite.
        epsilon_alone: If it fails, largest over the sites; may be infinite.
        delta: Largest over the sites.
        site: The site with the largest ``epsilon``.
        site_alone: The site with the largest ``epsilon_alone``.
        num_sites: How many sites the numbers are from.
        source: ``ledgers``: what the sites wrote down and signed; ``plan``: what the job promises.
    """

    epsilon: float
    epsilon_alone: float
    delta: float
    site: str
    site_alone: str
    num_sites: int
    source: str


@dataclass(frozen=True)
class Statement:
    """What the card says beside the run's own record.

    Attributes:
        licence: Of the weights.
        intended_use: What the model is for.
        released: Time in UTC, ISO 8601.
        model_sha256: Of ``model.safetensors``, hexadecimal.
        guarantee: What was promised to patients; None where nothing was, or where it is not known here.
        audit: Result of the audit, see ``fedvision.release.audited``; None without one.
        verification: What ``fedvision verify`` found; None for a run in the clear.
    """

    licence: str
    intended_use: str
    released: str
    model_sha256: str
    guarantee: Guarantee | None
    audit: dict[str, Any] | None
    verification: dict[str, Any] | None


def card_of(record: RunRecord, said: Statement) -> Card:
    """Return the card of a finished run.

    Raises:
        StorageError: A file of the run is damaged.
    """
    job = record.job
    return {
        "format": FORMAT,
        "name": job.name,
        "released": said.released,
        "licence": said.licence,
        "intended_use": said.intended_use,
        "model": {
            "file": "model.safetensors",
            "sha256": said.model_sha256,
            "network": job.model.name,
            "args": job.model.args,
            "num_parameters": record.num_parameters(),
            "local_normalisation": job.model.local_normalisation,
            "round": record.best_round,
        },
        "task": job.task.model_dump(mode="json"),
        "input": _input(record),
        "training": _training(record),
        "sites": {name: _site(record, name) for name in record.sites},
        "results": _results(record),
        "left_out": _left_out(record),
        "secure_aggregation": _secure(record),
        "privacy": _privacy(record, said.guarantee),
        "audit": said.audit,
        "defence": _defence(record),
        "repair": _repair(record),
        "digests": _digests(record),
        "verification": said.verification,
        "software": record.environment.get("versions") or {},
        "is_simulation": bool(record.site_folders),
    }


def _input(record: RunRecord) -> Card:
    """Return what an image must be before the network sees it."""
    job = record.job
    return {
        "channels": job.task.in_channels,
        **job.preprocessing.model_dump(mode="json"),
        "patch_size": job.training.patch_size,
        "image_size": job.training.image_size,
    }


def _training(record: RunRecord) -> Card:
    job = record.job
    chosen = ("optimizer", "learning_rate", "batch_size", "steps", "epochs", "loss", "augmentation")
    return {
        "rounds": job.rounds,
        "rounds_done": record.rounds_done,
        "rounds_thrown_away": sorted(n for n in record.incidents if record.thrown_away(n)),
        **{key: getattr(job.training, key) for key in chosen},
        "patients": job.privacy.patients if job.privacy.is_on else None,
        "weighting": job.aggregation.weighting,
        "clip_norm": job.aggregation.clip_norm,
    }


def _site(record: RunRecord, site: str) -> Card:
    """Return a site's part: how many cases it has, as far as the server was told, and how the model does."""
    result = record.results.get(site) or {}
    return {
        "role": record.role(site),
        "rounds_in_model": sum(site in record.accepted(number) for number in record.rounds),
        "train": {"cases": _last(record.train, site, "num_samples"), "patients": None},
        "val": {"cases": _last(record.validate, site, "num_cases"), "patients": None},
        "test": {"cases": result.get("num_cases"), "patients": result.get("num_patients")},
        "metrics": result.get("metrics"),
        "intervals": result.get("intervals"),
    }


def _last(records: dict[int, dict[str, dict[str, Any]]], site: str, key: str) -> int | None:
    """Return the number that a site said last."""
    said = [by_site[site].get(key) for _, by_site in sorted(records.items()) if site in by_site]
    return next((int(value) for value in reversed(said) if is_number(value)), None)


def _results(record: RunRecord) -> Card:
    """Return the final test over sites, and the worst site."""
    worst = (record.test or {}).get("worst_site") or {}
    summaries = {
        key: {"metrics": record.summaries[label].metrics, "intervals": record.summaries[label].intervals}
        for key, label in (("mean_site", MEAN), ("pooled", POOLED))
        if label in record.summaries
    }
    return {
        "headline": record.headline,
        "mean_site": summaries.get("mean_site"),
        "pooled": summaries.get("pooled"),
        "worst_site": {"site": worst.get("site"), "metrics": worst.get("metrics")} if worst else None,
    }


def _left_out(record: RunRecord) -> Card:
    """Return whose updates are not in the model and why, by site; and who was expelled or in quarantine."""
    found: dict[str, dict[str, list[int]]] = {}
    for number in record.rounds:
        for site, reason in _absent(record, number).items():
            found.setdefault(site, {}).setdefault(reason, []).append(number)
    standings: dict[str, str] = {}
    for _, judgement in sorted(record.judgements.items()):
        for one in judgement["sites"]:
            standings[_name(judgement, one)] = str(one["standing"])
    return {
        "updates": {
            site: [{"reason": reason, "rounds": rounds} for reason, rounds in reasons.items()]
            for site, reasons in sorted(found.items())
        },
        "expelled": {
            site: {"round": None if number == TEST else number, "rule": str(one["rule"])}
            for site, (number, one) in record.expelled().items()
        },
        "quarantined": sorted(site for site, standing in standings.items() if standing == "quarantined"),
        "warned": sorted(site for site, standing in standings.items() if standing == "warned"),
        "held_out": record.held_out_sites,
    }


def _absent(record: RunRecord, number: int) -> dict[str, str]:
    """Return why a site that trains is not in a round's sum, by site: the nearest reason that is recorded."""
    judgement = record.judgements.get(number) or {"sites": (), "names": {}}
    by_rules = {
        _name(judgement, one): str(one["reason"] or "by the rules")
        for one in judgement["sites"]
        if one["excluded"]
    }
    by_sum = record.sums["train", number].left_out if ("train", number) in record.sums else {}
    refused = {
        site: str(one.get("reason") or one.get("status") or "")
        for site, one in record.train.get(number, {}).items()
        if one.get("status") != "accepted"
    }
    gone = {site: "expelled" for site, (when, _) in record.expelled().items() if when <= number}
    reasons = by_sum | refused | by_rules | gone
    accepted = record.accepted(number)
    return {
        site: reasons.get(site) or "not there"
        for site in record.training_sites
        if site not in accepted or site in by_rules
    }


def _name(judgement: Card, one: Card) -> str:
    return str(judgement["names"].get(str(one["site"]), one["site"]))


def _secure(record: RunRecord) -> Card:
    """Return how sums were made and what the server saw of a single update."""
    agreement = record.agreement
    if agreement is None:
        return {"level": "off", "server_saw": "the update of every single site, in the clear"}
    charter = agreement.charter
    sizes = [len(found.accepted) for (kind, _), found in record.sums.items() if kind == "train"]
    return {
        "level": charter.level,
        "server_saw": _SEEN[charter.level],
        "num_sites": len(agreement.sites),
        "threshold": charter.threshold,
        "max_colluding": charter.max_colluding,
        "smallest_cohort": charter.quorum,
        "smallest_sum": min(sizes, default=None),
        "released": list(charter.releases),
    }


def _privacy(record: RunRecord, guarantee: Guarantee | None) -> Card:
    """Return what is promised to patients."""
    settings = record.job.privacy
    if not settings.is_on:
        return {"mode": "none"}
    found: Card = {
        "mode": settings.mode,
        "unit": "patient",
        "clip_norm": settings.clip_norm,
        "noise_multiplier": settings.noise_multiplier,
    }
    keys = ("epsilon", "epsilon_alone", "delta", "site", "site_alone", "num_sites", "source")
    values = {key: getattr(guarantee, key, None) for key in keys}
    # JSON has no infinity: no bound is None, with a source.
    return found | {key: None if value == math.inf else value for key, value in values.items()}


def _defence(record: RunRecord) -> Card:
    """Return by which rules updates were judged."""
    defence, agreement = record.job.defence, record.agreement
    if agreement is not None:
        rules: list[str] = list(agreement.charter.rules)
        share: float = agreement.charter.max_malicious
    else:
        last = record.judgements[max(record.judgements)] if record.judgements else {"rules": []}
        rules, share = list(last["rules"]), defence.max_malicious
    root = agreement.charter.root_set if agreement else (_repair(record) or {}).get("root_set")
    return {
        "rules": rules,
        "max_malicious": share if rules else None,
        "rounds_judged": len(record.judgements),
        "root_set": root or None,
    }


def _repair(record: RunRecord) -> Card | None:
    """Return what the repair on the root set found and did, None where there was none.

    Its text stays behind: where a repair failed, it is that of the error, which may name a file.
    """
    path = record.folder / "repair.json"
    if not path.exists():
        return None
    report = read_json(path)
    return {key: report.get(key) for key in ("root_set", "method", "is_changed", "before", "after")}


def _digests(record: RunRecord) -> Card:
    agreement = record.agreement
    found: Card = {"job": record.job.digest(), "charter": None, "roster": None, "transcripts": None}
    if agreement is not None:
        found["charter"] = agreement.charter.digest().hex()
        found["roster"] = agreement.charter.roster
        found["transcripts"] = chain_of(record.folder / "secagg" / "transcripts")
    return found


def chain_of(folder: Path) -> str:
    """Return one digest for all transcripts of a run, in hexadecimal.

    It is d(n) of d(i) = SHA-256("fedvision/transcripts/v1" | d(i-1) | SHA-256(name) | SHA-256(content)), with
    d(0) = 32 zeros and the files in the order of their names.

    Args:
        folder: ``secagg/transcripts`` of the run.
    """
    digest = bytes(32)
    for path in sorted(folder.glob("[!.]*")):
        name, content = hashlib.sha256(path.name.encode()), hashlib.sha256(path.read_bytes())
        parts = digest + name.digest() + content.digest()
        digest = hashlib.sha256(b"fedvision/transcripts/v1" + parts).digest()
    return digest.hex()
