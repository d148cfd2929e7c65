"""The lab: one federation after the other with malicious sites in it, and what became of each.

    OUT/cells/NAME/cell.json      the outcome of a cell, written last: a cell that has it is not run again
    OUT/cells/NAME/rounds.jsonl, test.json, job.toml, model.safetensors, sites/*/log.jsonl
    OUT/matrix.json               all cells together, see ``attack_matrix``

A cell is an attack, the share of malicious sites, a defence and a seed. Rules:
- Each cell is a whole run of the job, in one process on one thread, through the same protocol as always.
- The malicious sites are drawn by the seed. The same cell gives the same outcome.
- A defence is ``auto``, ``none``, or names of rules joined by ``+``; with ``/root`` it has the root set.
  ``none`` leaves the protocol as it is: the clip norm is still verified.
- A cell that was stopped starts afresh: what a coalition knows is not on disk.
"""

import dataclasses
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvision.attacks.adaptive import Target
from fedvision.attacks.catalogue import NONE, Attack, attack_named
from fedvision.attacks.data import TRIGGERS
from fedvision.config import Job, parse_job
from fedvision.defence.rules import RULES, WITHOUT_ROOT
from fedvision.errors import ConfigError, RoundError, StorageError
from fedvision.seeds import derive_seed
from fedvision.simulation.consortium import make_consortium, server_keys
from fedvision.simulation.one_process import SiteLink
from fedvision.simulation.run import (
    Plan,
    find_root_set,
    make_plan,
    site_configs,
    start_run,
    weight_cap,
)
from fedvision.storage import load_tensors, read_json, read_lines, write_json

ROOT_SUFFIX = "/root"


@dataclass(frozen=True)
class Cell:
    """One run of the lab.

    Attributes:
        attack: A name of the catalogue.
        malicious: Share of the sites that are malicious; 0 for the attack ``none``.
        defence: See above.
        seed: Of the job and of the draw of malicious sites.
    """

    attack: str
    malicious: float
    defence: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        defence = self.defence.replace("/", "-").replace("+", "-")
        return f"{self.attack}-{100 * self.malicious:.0f}-{defence}-s{self.seed}"


def parse_defence(text: str) -> tuple[str | list[str], bool]:
    """Return a defence's rules as the job file has them, and whether it has the root set.

    Raises:
        ConfigError: It is none.
    """
    rules, _, suffix = text.partition("/")
    if suffix not in ("", "root") or not rules:
        raise ConfigError(
            f"a defence is auto, none, or rules joined by +, then /root or nothing, got {text!r}"
        )
    if rules == "auto":
        return "auto", bool(suffix)
    names = [] if rules == "none" else rules.split("+")
    for name in names:
        if name not in RULES:
            raise ConfigError(f"there is no rule {name!r}", f"auto, none, or some of {', '.join(RULES)}")
    return names, bool(suffix)


def cell_job(job: Job, cell: Cell) -> Job:
    """Return the job of a cell.

    Raises:
        ConfigError: The defence is none, or needs a root set that the job has not.
    """
    rules, has_root = parse_defence(cell.defence)
    assert job.data is not None
    if has_root and job.data.root_set is None:
        raise ConfigError(f"the defence {cell.defence} needs a root set", "--root-set DIR, or data.root_set")
    content = job.model_dump(mode="json", exclude_none=True)
    content["seed"] = cell.seed
    defence = content.setdefault("defence", {})
    defence["rules"] = rules
    defence["root"] = "auto" if has_root else "off"
    if not has_root:
        content["data"].pop("root_set", None)
        defence["max_malicious"] = min(job.defence.max_malicious, WITHOUT_ROOT)
    return parse_job(content, f"cell {cell.name}")


def choose_malicious(sites: Sequence[str], share: float, seed: int) -> list[str]:
    """Draw the malicious sites.

    Raises:
        ConfigError: The share is none of 0 to less than a half.
    """
    if not 0 <= share < 0.5:
        raise ConfigError(f"the share of malicious sites must be at least 0 and below 0.5, got {share:g}")
    order = sorted(sites, key=lambda site: (derive_seed(seed, "malicious", site), site))
    return sorted(order[: round(share * len(sites))])


def run_cell(job: Job, cell: Cell, folder: Path) -> dict[str, Any]:
    """Run a cell in its folder and return the content of its ``cell.json``, or of the one that is there.

    Args:
        job: The lab's job; the cell's own is made from it.
        cell: What to run.
        folder: Of the cell.

    Raises:
        FedvisionError: The cell cannot be run at all. A run that fails is an outcome and no error.
    """
    chosen = cell_job(job, cell)
    if (folder / "cell.json").exists():
        found: dict[str, Any] = read_json(folder / "cell.json")
        if found.get("job") != chosen.digest():
            raise StorageError(f"{folder} holds a cell of another job", "choose another --out")
        return found
    shutil.rmtree(folder, ignore_errors=True)
    plan = dataclasses.replace(make_plan(chosen, 1), threads=1)
    malicious = choose_malicious(plan.cohort.train, cell.malicious, cell.seed)
    attack = attack_named(cell.attack)
    if (attack.kind == "none") != (not malicious):
        raise ConfigError(f"{cell.attack} with {len(malicious)} malicious sites is no cell")
    started, cpu, failure = time.perf_counter(), time.process_time(), ""
    start_run(plan, folder)
    try:
        run_with_coalition(plan, folder, attack, malicious)
    except RoundError as error:
        failure = str(error)
    outcome = {
        "format": 1,
        **dataclasses.asdict(cell),
        "job": chosen.digest(),
        "sites": list(plan.cohort.train),
        "malicious_sites": malicious,
        "failure": failure,
        **result_of(folder),
        **decisions(read_lines(folder / "rounds.jsonl"), plan.cohort.train),
        "backdoor": backdoors(plan, folder, attack) if not failure else {},
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }
    tidy(folder)
    write_json(folder / "cell.json", outcome)
    return outcome


def run_with_coalition(plan: Plan, folder: Path, attack: Attack, malicious: Sequence[str]) -> None:
    """Run a plan in this process, with some of its sites in a coalition.

    Raises:
        FedvisionError: See ``run_federation``.
    """
    from fedvision.simulation.malicious import Coalition, MaliciousSite, WatchedSite
    from fedvision_server.round import run_job
    from fedvision_sites.work import Site

    job, root = plan.job.public(), find_root_set(plan.job)
    keys = None
    honest = [name for name in plan.cohort.train if name not in malicious]
    target = Target((), (), (), 0.0, 0)
    if job.aggregation.secure:
        make_consortium(plan, weight_cap(plan), folder, root.digest if root else "")
        keys = server_keys(folder)
        charter, roster = keys.consortium.charter, keys.consortium.roster
        numbers = {name: roster.number_of(name) for name in plan.cohort.train}
        target = Target(
            tuple(numbers[name] for name in sorted(honest)),
            tuple(numbers[name] for name in sorted(malicious)),
            charter.rules,
            charter.max_malicious,
            len(charter.sites) - charter.threshold,
        )
    elif attack.name in ("adaptive", "lying-sketch"):
        raise ConfigError(f"the attack {attack.name} is on secure aggregation, which the job does not use")
    coalition = Coalition(attack, malicious, plan.cohort.train, job, target)
    configs = site_configs(plan, folder)
    kinds = {name: MaliciousSite if name in malicious else WatchedSite for name in plan.cohort.train}
    sites: list[Site] = [
        kinds[config.name](config, coalition) if config.name in kinds else Site(config) for config in configs
    ]
    last = [node for node, config in enumerate(configs) if config.name in malicious]

    def observe(event: dict[str, Any]) -> None:
        if event.get("site") and is_left_out(event):
            coalition.tell_excluded(event["site"], event["round"])

    run_job(job, SiteLink(sites, last), folder, plan.cohort, observe, keys, root)


def is_left_out(event: dict[str, Any]) -> bool:
    """Whether an event says that a site's update of a round was not taken."""
    return event["event"] == "expelled" or (
        event["event"] == "train" and event.get("status") in ("refused", "failed")
    )


def decisions(events: Sequence[dict[str, Any]], sites: Sequence[str]) -> dict[str, Any]:
    """Return who was left out of which rounds and why, from a run's ``rounds.jsonl``.

    Returns:
        ``rounds``: how many ended; ``thrown_away``: of these, without a new model; ``excluded``: rounds by
        site; ``reasons``: the first reason by site; ``expelled``: sites whose lie was proven.
    """
    ended = {one["round"]: one["event"] for one in events if one["event"] in ("round", "thrown away")}
    out: dict[str, set[int]] = {site: set() for site in sites}
    reasons: dict[str, str] = {}
    expelled = {one["site"]: one["round"] for one in events if one["event"] == "expelled"}
    for one in events:
        if one.get("site") in out and is_left_out(one):
            out[one["site"]].add(one["round"])
            reasons.setdefault(one["site"], str(one.get("reason", one.get("rule", ""))))
    for site, since in expelled.items():
        out[site] |= {number for number in ended if number >= since}
    return {
        "rounds": len(ended),
        "thrown_away": sum(kind == "thrown away" for kind in ended.values()),
        "excluded": {
            site: sorted(rounds & set(ended)) for site, rounds in out.items() if rounds & set(ended)
        },
        "reasons": reasons,
        "expelled": sorted(expelled),
    }


def result_of(folder: Path) -> dict[str, Any]:
    """Return the score of a cell's final model: Dice or AP50, mean over sites; None without a model."""
    if not (folder / "test.json").exists():
        return {"metric": "", "score": None, "worst_site": None}
    test = read_json(folder / "test.json")
    metric = "dice" if "dice" in test["mean_site"] else "ap50"
    worst = [
        site["metrics"][metric]
        for site in test["sites"].values()
        if site["role"] == "train" and site["metrics"].get(metric) is not None
    ]
    return {
        "metric": metric,
        "score": test["mean_site"].get(metric),
        "worst_site": min(worst, default=None),
    }


def backdoors(plan: Plan, folder: Path, attack: Attack) -> dict[str, Any]:
    """Return how the planted trigger does on the final model; for a run without attack, how all do."""
    import torch

    from fedvision.attacks.success import measure
    from fedvision.data.manifest import Case, load_manifest
    from fedvision.data.readers import CaseStore
    from fedvision.tasks import initial_network
    from fedvision.updates.layout import float_tensors

    names = [attack.trigger] if attack.trigger else list(TRIGGERS) if attack.name == NONE else []
    if not names:
        return {}
    network = initial_network(plan.job)
    own = float_tensors(network)
    with torch.no_grad():
        for name, values in load_tensors(folder / "model.safetensors")[0].items():
            own[name].copy_(torch.from_numpy(values))

    def cases() -> Iterator[tuple[CaseStore, Case]]:
        for site in plan.cohort.train:
            for part in plan.data[site]:
                manifest = load_manifest(part)
                store = CaseStore(manifest, plan.job, 0)
                for case in manifest.in_split("test"):
                    yield store, case

    found = {}
    for name in names:
        success = measure(network, plan.job, TRIGGERS[name], cases(), torch.device("cpu"))
        found[name] = {"images": success.num_images, "fooled": success.num_fooled, "share": success.share}
    return found


def tidy(folder: Path) -> None:
    """Remove what nobody reads after a cell: keys, marks, transcripts, checkpoints."""
    for name in ("secagg", "guards", "checkpoints"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in (folder / "sites").glob("*/*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != "log.jsonl":
            path.unlink(missing_ok=True)
