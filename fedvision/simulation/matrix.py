"""Many cells of the lab, several at a time, and the table that they make together: ``OUT/matrix.json``."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from fedvision.attacks.catalogue import ATTACKS, NONE, attack_named
from fedvision.config import Job, parse_job
from fedvision.errors import ConfigError, RoundError
from fedvision.simulation.lab import Cell, cell_job, run_cell
from fedvision.storage import write_json

Outcome = dict[str, Any]
OnCell = Callable[[Cell, Outcome], None]


def plan_cells(
    attacks: Sequence[str], shares: Sequence[float], defences: Sequence[str], seeds: Sequence[int]
) -> list[Cell]:
    """Return the cells of a matrix, those that the others are compared with first.

    For each seed: no attack and no defence, which is the reference; no attack with each defence; then all.

    Raises:
        ConfigError: An attack is unknown, or a list is empty.
    """
    for name, values in (("attacks", attacks), ("defences", defences), ("seeds", seeds)):
        if not values:
            raise ConfigError(f"a matrix needs at least one of --{name}")
    kinds = [attack_named(name) for name in attacks]
    if any(kind.kind != "none" for kind in kinds) and not any(share > 0 for share in shares):
        raise ConfigError("an attack needs malicious sites", "--malicious 0.2")
    cells = [Cell(NONE, 0.0, defence, seed) for seed in seeds for defence in ("none", *defences)]
    for kind in kinds:
        if kind.kind == "none":
            continue
        cells += [
            Cell(kind.name, share, defence, seed)
            for share in shares
            if share > 0
            for defence in defences
            for seed in seeds
        ]
    return list(dict.fromkeys(cells))


def run_matrix(
    job: Job, cells: Sequence[Cell], folder: Path, parallel: int, on_cell: OnCell
) -> dict[str, Any]:
    """Run the cells that are not there yet, and write ``matrix.json``.

    Args:
        job: The lab's job.
        cells: See ``plan_cells``.
        folder: Where everything goes.
        parallel: Cells at a time, each in a process of its own with one thread; 1 for this process.
        on_cell: Told of each cell that is finished, also of those that were there.

    Returns:
        The content of ``matrix.json``.

    Raises:
        FedvisionError: A cell cannot be run. Those that are finished are kept.
    """
    for cell in cells:
        cell_job(job, cell)
    outcomes: dict[Cell, Outcome] = {}
    run = _run_here if parallel == 1 else _run_in_processes
    for cell, outcome in run(job, cells, folder, parallel):
        outcomes[cell] = outcome
        on_cell(cell, outcome)
    content = collect(job, [outcomes[cell] for cell in cells])
    write_json(folder / "matrix.json", content)
    return content


def _run_here(job: Job, cells: Sequence[Cell], folder: Path, parallel: int) -> Iterator[tuple[Cell, Outcome]]:
    for cell in cells:
        yield cell, run_cell(job, cell, folder / "cells" / cell.name)


def _run_in_processes(
    job: Job, cells: Sequence[Cell], folder: Path, parallel: int
) -> Iterator[tuple[Cell, Outcome]]:
    content = job.model_dump(mode="json", exclude_none=True)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(parallel, mp_context=context) as pool:
            waiting = {pool.submit(_run_one, content, cell, folder): cell for cell in cells}
            try:
                for done in as_completed(waiting):
                    yield waiting[done], done.result()
            except BrokenProcessPool:
                raise RoundError(
                    "a process of the lab was killed, perhaps for memory",
                    "run the same command again to go on, with a smaller --parallel",
                ) from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    finally:
        if before is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _run_one(content: dict[str, Any], cell: Cell, folder: Path) -> Outcome:
    import torch

    torch.set_num_threads(1)
    return run_cell(parse_job(content, "lab"), cell, folder / "cells" / cell.name)


def collect(job: Job, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the content of ``matrix.json``: one row for each attack, share and defence, over all seeds."""
    reference = {one["seed"]: one for one in outcomes if is_reference(one)}
    groups: dict[tuple[str, float, str], list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault((one["attack"], one["malicious"], one["defence"]), []).append(one)
    first = next(iter(reference.values()))
    return {
        "format": 1,
        "job": {
            "name": job.name,
            "task": job.task.kind,
            "rounds": job.rounds,
            "sites": len(first["sites"]),
            "level": job.secure_aggregation.level if job.aggregation.secure else "off",
        },
        "metric": first["metric"],
        "seeds": sorted(reference),
        "rows": [row_of(key, found, reference) for key, found in groups.items()],
    }


def is_reference(outcome: Outcome) -> bool:
    """Whether a cell is the one that damage is counted from: no attack, no defence."""
    return bool(outcome["attack"] == NONE and outcome["defence"] == "none")


def row_of(
    key: tuple[str, float, str], outcomes: Sequence[Outcome], reference: dict[int, Outcome]
) -> dict[str, Any]:
    """Return the numbers of an attack, a share and a defence.

    Returns:
        ``score`` and ``damage`` (points below the reference of the same seed) are means over seeds, and
        ``worst_damage`` is the largest; ``backdoor`` the mean share of fooled images and ``backdoor_clean``
        that of the reference models; ``false_exclusions`` and ``caught`` are shares of the (site, round)
        pairs of honest and of malicious sites in which the update was left out. None where there is nothing
        to count. ``failed`` is the number of runs that ended without a model.
    """
    attack, malicious, defence = key
    scores = [one["score"] for one in outcomes]
    damages = [
        100 * (reference[one["seed"]]["score"] - one["score"])
        for one in outcomes
        if one["score"] is not None and reference[one["seed"]]["score"] is not None
    ]
    trigger = ATTACKS[attack].trigger
    planted = [fooled_share(one, trigger) for one in outcomes]
    clean = [fooled_share(reference[one["seed"]], trigger) for one in outcomes]
    honest = [excluded_share(one, False) for one in outcomes]
    caught = [excluded_share(one, True) for one in outcomes]
    return {
        "attack": attack,
        "kind": ATTACKS[attack].kind,
        "malicious": malicious,
        "defence": defence,
        "seeds": [one["seed"] for one in outcomes],
        "scores": scores,
        "score": _mean(scores),
        "damage": _mean(damages),
        "worst_damage": max(damages, default=None),
        "backdoor": _mean(planted),
        "backdoor_clean": _mean(clean),
        "false_exclusions": _mean(honest),
        "caught": _mean(caught),
        "expelled": sum(len(one["expelled"]) for one in outcomes),
        "thrown_away": sum(one["thrown_away"] for one in outcomes),
        "failed": sum(bool(one["failure"]) for one in outcomes),
        "seconds": _mean([one["seconds"] for one in outcomes]),
    }


def fooled_share(outcome: Outcome, trigger: str) -> float | None:
    """Return how often a trigger fools a cell's model; None where it was not tried."""
    share: float | None = outcome["backdoor"].get(trigger, {}).get("share")
    return share


def excluded_share(outcome: Outcome, malicious: bool) -> float | None:
    """Return the share of updates that were left out, of malicious or of honest sites; None without any."""
    bad = set(outcome["malicious_sites"])
    sites = [site for site in outcome["sites"] if (site in bad) == malicious]
    if not sites or not outcome["rounds"]:
        return None
    left_out = sum(len(outcome["excluded"].get(site, ())) for site in sites)
    return left_out / (len(sites) * outcome["rounds"])


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
