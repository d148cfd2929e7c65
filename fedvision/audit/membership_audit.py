"""A measured audit of a run's model: can somebody tell who trained it? Numbers, limits and a verdict.

For a simulation: it needs the images of every site on one machine. A federation that is deployed cannot be
audited like this, because nobody there may pool patients; a simulation on like data stands in for it.

    OUT/audit.json                    format 1; no patient is named
    OUT/audit.html                    the same for people
    OUT/private-worst-patients.json   patients whom the attacks are surest of: for the researcher alone
    OUT/shadows/                      shadow models
"""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedvision.audit.membership import (
    Flags,
    Measured,
    Values,
    attacks_for,
    measure,
    roc,
    strength,
    worst,
)
from fedvision.audit.shadows import Pool, Shadows, Watch, load_model, pool_of, shadow_steps, signals_of
from fedvision.config import Job
from fedvision.data.manifest import Manifest
from fedvision.data.readers import CaseStore
from fedvision.errors import StorageError
from fedvision.privacy.accounting import Mechanism, largest_tpr
from fedvision.storage import write_json

FORMAT = 1
LEAST_STRENGTH = 0.55
"""Below this AUC against unprotected shadow models the attacks say little about the released one."""
BOUND_RATES = tuple(float(rate) for rate in np.logspace(-3, 0, 13))
_WARNING = "Patient names. For the researcher alone: do not publish or send this file."


@dataclass(frozen=True)
class Claim:
    """What a run promises to the patients of the site that is worst off.

    Attributes:
        site: Its name.
        epsilon: If secure aggregation holds.
        delta: Chance that the promise does not hold.
        mechanisms: What epsilon was made of.
    """

    site: str
    epsilon: float
    delta: float
    mechanisms: tuple[Mechanism, ...]


@dataclass(frozen=True)
class Settings:
    """How an audit is made, and what it may find at most.

    Attributes:
        shadows: Shadow models, even.
        most_steps: Optimiser steps of each at most.
        seed: Says who trains which.
        most_auc: Largest AUC of an attack.
        most_tpr: Largest true-positive rate at a false-positive rate of 1 %.
    """

    shadows: int = 8
    most_steps: int = 2000
    seed: int = 0
    most_auc: float = 0.6
    most_tpr: float = 0.03


def audit_run(
    run: Path,
    job: Job,
    manifests: Mapping[str, Manifest],
    claim: Claim | None,
    settings: Settings,
    out: Path,
    watch: Watch,
) -> dict[str, Any]:
    """Attack the released model of a run and write what was found.

    Args:
        run: Its folder.
        job: Of the run.
        manifests: Of the sites that trained, by name.
        claim: What the run promises; None if nothing.
        settings: Shadow models and limits.
        out: Where the files go; shadow models that are there are used.
        watch: Told what is done, how many are ready, and of how many.

    Returns:
        The content of ``audit.json``.

    Raises:
        StorageError: The run has no finished model, or ``out`` has shadow models of something else.
        DataError: There are too few patients.
    """
    path = run / "model.safetensors"
    if not path.exists():
        raise StorageError(f"{run} has no model.safetensors", "only a finished run can be audited")
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, pool = load_model(path, job), pool_of(manifests)
    store = CaseStore(pool.manifest, job)
    target = signals_of(network, job, pool, store, device)
    steps = shadow_steps(job, manifests, settings.most_steps)
    shadows = Shadows(job, pool, out / "shadows", settings.shadows, steps, settings.seed)
    theirs = shadows.signals(store, device, watch)
    content = {
        "format": FORMAT,
        "kind": "membership",
        "job": {"name": job.name, "digest": job.digest(), "sites": len(manifests), "rounds": job.rounds},
        "model": {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
        "patients": {"members": int(pool.members.sum()), "others": int((~pool.members).sum())},
        "shadows": {
            "count": settings.shadows,
            "steps": steps,
            "seed": settings.seed,
            "kind": "pooled, not federated, without noise",
        },
        **judged(target, theirs, shadows.inside, pool.members, claim, settings),
    }
    content["seconds"] = round(time.perf_counter() - started, 1)
    write_json(out / "audit.json", content)
    _keep_worst(out, pool, target, theirs, shadows.inside)
    return content


def judged(
    target: Mapping[str, Values],
    shadows: Mapping[str, Values],
    inside: Flags,
    members: Flags,
    claim: Claim | None,
    settings: Settings,
) -> dict[str, Any]:
    """Return the part of ``audit.json`` that follows from the losses: attacks, claim, limits and verdict.

    Args:
        target: Losses of the released model by signal, shape (N,).
        shadows: Losses of the shadow models by signal, shape (M, N).
        inside: Who trained which shadow model, shape (M, N).
        members: Who trained the released model, shape (N,).
        claim: What was promised.
        settings: Limits.
    """
    attacks: list[dict[str, Any]] = []
    measured: dict[str, Measured] = {}
    for key, attack in attacks_for(target).items():
        scores = attack.score(target[attack.signal], shadows[attack.signal], inside)
        measured[attack.name] = found = measure(scores, members, settings.seed)
        false, true = roc(scores, members)
        attacks.append(
            {
                "key": key,
                "name": attack.name,
                "source": attack.source,
                **asdict(found),
                "auc_of_shadows": strength(attack, shadows[attack.signal], inside),
                "roc": {"fpr": _rounded(false), "tpr": _rounded(true)},
            }
        )
    others = int((~members).sum())
    promised = None if claim is None else _promised(claim, others)
    reasons = failures(measured, others, promised, settings)
    return {
        "attacks": attacks,
        "claim": promised,
        "limits": {"auc": settings.most_auc, "tpr_at_1_percent": settings.most_tpr},
        "verdict": {"passed": not reasons, "reasons": reasons, "notes": _notes(attacks, others, promised)},
    }


def failures(
    measured: Mapping[str, Measured], others: int, promised: Mapping[str, Any] | None, settings: Settings
) -> list[str]:
    """Return why an audit fails, nothing if it does not.

    - AUC: the measured number is above the limit.
    - True-positive rate at 1 %: the lower end of its interval is above the limit. Only with 100 patients who
      did not train: with fewer no such rate can be told from none.
    - The bound of the promise: the lower end is above what the promise allows at 1 %, or at the rate that can
      be ruled out with so few patients, three over their number (95 %).
    """
    found = []
    for name, one in measured.items():
        rate = one.rates[0]
        if one.auc > settings.most_auc:
            found.append(f"{name}: AUC {one.auc:.3f} is above {settings.most_auc:g}")
        if others >= 1 / rate.fpr and rate.low > settings.most_tpr:
            found.append(
                f"{name}: at least {100 * rate.low:.1f} % of the members are found at 1 % false alarms, "
                f"allowed {100 * settings.most_tpr:g} %"
            )
        tested = {"tpr": 1.0} if promised is None else promised["tested"]
        if rate.low > tested["tpr"]:
            found.append(
                f"{name}: at least {100 * rate.low:.1f} % of the members are found, and the promise allows "
                f"{100 * tested['tpr']:.1f} % at {100 * tested['fpr']:.1f} % false alarms"
            )
    return found


def _promised(claim: Claim, others: int) -> dict[str, Any]:
    """Return a claim with the largest true-positive rates that it allows."""
    tested = max(0.01, 3 / others)
    rates = sorted({*BOUND_RATES, 0.01, 0.001, tested})
    allowed = {rate: largest_tpr(claim.mechanisms, rate) for rate in rates}
    return {
        "site": claim.site,
        "epsilon": claim.epsilon if math.isfinite(claim.epsilon) else None,
        "delta": claim.delta,
        "tested": {"fpr": tested, "tpr": allowed[tested]},
        "bound": [{"fpr": rate, "tpr": tpr} for rate, tpr in allowed.items()],
    }


def _notes(
    attacks: Sequence[Mapping[str, Any]], others: int, promised: Mapping[str, Any] | None
) -> list[str]:
    """Return what limits this audit, in sentences."""
    notes = []
    if others < 100:
        notes.append(
            f"With {others} patients who did not train, a rate of 1 % false alarms cannot be measured: the "
            "numbers are the members found without any false alarm, and their limit is not checked."
        )
    elif others < 1000:
        notes.append("The numbers at 0.1 % are the members found without any false alarm: for a real rate "
                     "1,000 patients who did not train are needed.")  # fmt: skip
    known = [one["auc_of_shadows"] for one in attacks if one["auc_of_shadows"] is not None]
    if not known:
        notes.append("With fewer than four shadow models, how strong the attacks are was not measured.")
    elif max(known) < LEAST_STRENGTH:
        notes.append(
            f"The attacks find little in unprotected shadow models either (AUC {max(known):.2f}): a low "
            "number says little about the released model. Try more shadow models and steps."
        )
    if promised is not None:
        notes.append("The shadow models were trained without noise: an attacker who also trains shadow "
                     "models with noise can do a little better.")  # fmt: skip
    return notes


def _rounded(values: Values) -> list[float]:
    return [round(float(value), 6) for value in values]


def _keep_worst(
    out: Path, pool: Pool, target: Mapping[str, Values], shadows: Mapping[str, Values], inside: Flags
) -> None:
    """Write the members that each attack is surest of into a file that only its owner can read."""
    attacks = attacks_for(target)
    scores = {
        attack.name: attack.score(target[attack.signal], shadows[attack.signal], inside)
        for attack in attacks.values()
    }
    named = {
        name: [{"patient": pool.names[at], "score": float(scores[name][at])} for at in positions]
        for name, positions in worst(scores, pool.members).items()
    }
    write_json(out / "private-worst-patients.json", {"warning": _WARNING, "patients": named}, mode=0o600)
