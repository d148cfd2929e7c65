"""Baselines on the same splits and the same budget of steps: each site alone, all data pooled, federated.

Every baseline is a run of its own in the same code: a site alone is a federation of one; pooled is a
federation of one site that holds all data. All start from the same weights, restart the optimiser every
round, choose their best round on validation cases, and are judged on the same test cases.

Budget: every model is trained for the steps that one site takes in the federation. A second pooled
model takes as many steps as all sites together, in one long sequence that no federation has; it bounds
what the data can give. Baselines are not clipped.
"""

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedvision.config import Job, PrivacySection, load_job
from fedvision.errors import StorageError
from fedvision.simulation.run import Engine, Plan, make_plan, run_federation, start_run
from fedvision.storage import read_json, read_lines, write_json

if TYPE_CHECKING:
    from fedvision_server.federation import Observer

POOLED = "pooled"
UNCLIPPED_NORM = 1000.0
MOST_RESTARTS = 20
Watch = Callable[[str, Plan, Path], "AbstractContextManager[Observer]"]


@dataclasses.dataclass(frozen=True)
class Contender:
    """One row of the comparison: its name, how it is trained, and with which engine."""

    name: str
    kind: str
    site: str | None
    plan: Plan
    engine: Engine


def contenders(job: Job) -> list[Contender]:
    """Return the federated run, the two pooled ones, and one for each site alone."""
    plan = make_plan(job)
    sites = plan.cohort.train
    everything = plan.parallel * plan.threads
    rows = [Contender("federated", "federated", None, plan, "flower")]
    pooled_data = dict(plan.data)
    pooled_data[POOLED] = tuple(folder for site in sites for folder in plan.data[site])
    pooled_cohort = dataclasses.replace(plan.cohort, train=(POOLED,))
    for name, times in (("pooled", 1), (f"pooled-x{len(sites)}", len(sites))):
        pooled_plan = Plan(baseline_job(job, len(sites), times), pooled_data, pooled_cohort, 1, everything)
        rows.append(Contender(name, "pooled", None, pooled_plan, "one-process"))
    for site in sites:
        alone = dataclasses.replace(plan.cohort, train=(site,), validate=(site,))
        rows.append(
            Contender(
                f"local-{site}",
                "local",
                site,
                Plan(baseline_job(job, 1, 1), plan.data, alone, 1, everything),
                "one-process",
            )
        )
    return rows


def baseline_job(job: Job, num_sites: int, times: int) -> Job:
    """Return the job of a baseline: not clipped, no noise, no quorum, nothing to hide from a server.

    Where a round of the federated job is one step of the server, a baseline takes as many steps in fewer
    rounds: its optimiser begins anew in each.

    Args:
        job: The federated job.
        num_sites: Whose data the baseline trains on.
        times: How many sites' steps it takes a round.
    """
    training = job.training
    if training.steps is not None:
        training = training.model_copy(update={"steps": training.steps * times})
    elif training.epochs is not None:
        training = training.model_copy(update={"epochs": training.epochs * times / num_sites})
    rounds, evaluation = job.rounds, job.evaluation
    if job.privacy.mode == "distributed":
        rounds = max(1, job.rounds // max(evaluation.every, math.ceil(job.rounds / MOST_RESTARTS)))
        training = training.model_copy(update={"steps": round(job.rounds / rounds) * times})
        evaluation = evaluation.model_copy(update={"every": 1})
    aggregation = job.aggregation.model_copy(
        update={"clip_norm": UNCLIPPED_NORM, "min_sites": 1, "secure": False}
    )
    sections = {"training": training, "aggregation": aggregation, "evaluation": evaluation}
    return job.model_copy(update={**sections, "rounds": rounds, "privacy": PrivacySection()})


def compare(job: Job, folder: Path, watch: Watch) -> Path:
    """Run every contender in a sub-folder and write ``compare.json``, picture and page.

    A contender that is finished is not run again, one that was interrupted goes on.

    Args:
        job: The federated job.
        folder: Where the runs go.
        watch: Called with a contender's name, plan and folder; gives the observer of its events.

    Returns:
        The page.

    Raises:
        StorageError: The folder holds runs of another job.
    """
    from fedvision.report.comparison import write_comparison
    from fedvision.report.page import write_report

    rows = contenders(job)
    for row in rows:
        run = folder / row.name
        if not (run / "job.toml").exists():
            start_run(row.plan, run)
        check_same_job(row.plan.job, run)
        if not (run / "test.json").exists():
            with watch(row.name, row.plan, run) as observe:
                run_federation(row.plan, run, observe, row.engine)
            write_report(run)
    write_json(folder / "compare.json", collect(job, rows, folder))
    return write_comparison(folder)


def check_same_job(job: Job, run: Path) -> None:
    """Refuse to go on with a run of another job.

    Raises:
        StorageError: The job in the run folder is not ``job``.
    """
    if load_job(run / "job.toml").digest() != job.digest():
        raise StorageError(f"{run} holds a run of another job", "choose another --out folder")


def collect(job: Job, rows: list[Contender], folder: Path) -> dict[str, Any]:
    """Return the comparison's numbers, read from the finished runs."""
    table: list[dict[str, Any]] = []
    headline = ""
    num_sites = sum(row.kind == "local" for row in rows)
    for row in rows:
        run = folder / row.name
        test = read_json(run / "test.json")
        headline = test["headline"]
        cells: dict[str, dict[str, Any]] = {"train": {}, "held_out": {}}
        for site, result in test["sites"].items():
            cells[result["role"]][site] = {
                "value": result["metrics"][headline],
                "interval": result["intervals"].get(headline),
            }
        others = [
            cell["value"]
            for site, cell in cells["train"].items()
            if site != row.site and cell["value"] is not None
        ]
        table.append(
            {
                "model": model_name(row, job),
                "kind": row.kind,
                "site": row.site,
                "test": cells["train"],
                "held_out": cells["held_out"],
                "mean_site": test["mean_site"][headline],
                "worst_site": test["worst_site"]["metrics"].get(headline),
                "worst_site_name": test["worst_site"]["site"],
                "pooled": test["pooled"]["metrics"][headline],
                "mean_other_sites": float(np.mean(others)) if row.kind == "local" and others else None,
                "best_round": test["round"],
                "seconds": sum(
                    r["seconds"] for r in read_lines(run / "rounds.jsonl") if r["event"] == "round"
                ),
            }
        )
    return {
        "job": {"name": job.name, "task": job.task.kind, "rounds": job.rounds, "sites": num_sites},
        "headline": headline,
        "budget": budget_text(job, num_sites),
        "rows": table,
        "finding": finding(table, headline),
    }


def model_name(row: Contender, job: Job) -> str:
    """Return a contender's name for people; beside a private job it says what is not private."""
    name = row.name.replace("local-", "local: ", 1) if row.kind == "local" else row.name
    return name if row.kind == "federated" or not job.privacy.is_on else f"{name}, no privacy"


def budget_text(job: Job, num_sites: int) -> str:
    """Say in words what every model was allowed."""
    length = (
        f"{job.training.steps} steps" if job.training.steps is not None else f"{job.training.epochs:g} epochs"
    )
    private = (
        "; only the federated model is trained with a promise to patients, the others are references "
        "without privacy: no clipping of patients, no noise, batches of images instead of patients drawn by "
        "chance"
        if job.privacy.is_on
        else ""
    )
    return (
        f"{job.rounds} rounds of {length} at each of {num_sites} sites, batch {job.training.batch_size}; "
        f"a local and the pooled model take one site's steps, pooled-x{num_sites} those of all in a row; "
        f"same initial weights, same splits, best round chosen on validation cases" + private
    )


def finding(table: list[dict[str, Any]], headline: str) -> str:
    """Say in one line how the federated model stands against pooled and against the best local one."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for row in table:
        by_kind.setdefault(row["kind"], []).append(row)
    federated, pooled, longer = by_kind["federated"][0], by_kind["pooled"][0], by_kind["pooled"][1]
    text = (
        f"federated {headline} {federated['mean_site']:.3f} on the mean site, "
        f"pooled {pooled['mean_site']:.3f} ("
        f"{100 * (federated['mean_site'] - pooled['mean_site']):+.1f} points; "
        f"{longer['mean_site']:.3f} with the steps of all sites in a row)"
    )
    local = [row for row in by_kind.get("local", []) if row["mean_other_sites"] is not None]
    if local:
        best = max(local, key=lambda row: row["mean_other_sites"])
        cells = ((site, cell["value"]) for site, cell in federated["test"].items())
        seen = [value for site, value in cells if site != best["site"] and value is not None]
        text += f"; best local model ({best['site']}) {best['mean_other_sites']:.3f} on the other sites"
        text += (
            f", federated {float(np.mean(seen)):.3f} there"
            if seen
            else "; no site released the federated one's"
        )
    return text
