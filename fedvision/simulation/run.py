"""From a job file to a finished run folder: check the data, run the federation, write the report."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from fedvision.config import Job, dump_job, load_job
from fedvision.data.manifest import Manifest, find_manifests, load_manifest
from fedvision.environment import describe_machine
from fedvision.errors import ConfigError, DataError, StorageError
from fedvision.seeds import derive_seed
from fedvision.simulation.consortium import check_size, make_consortium, server_keys, site_keys
from fedvision.simulation.engine import choose_parallel, run_on_flower
from fedvision.simulation.one_process import LocalLink
from fedvision.storage import read_json, read_lines, write_json, write_text

if TYPE_CHECKING:
    from fedvision.training.root import RootSet
    from fedvision_server.federation import Cohort, Observer
    from fedvision_sites.work import SiteConfig

Engine = Literal["flower", "one-process"]
MAX_CACHE_BYTES = 8 << 30


@dataclass(frozen=True)
class Plan:
    """A run that is ready to start: everything that was checked and decided before.

    Attributes:
        job: The resolved job, with paths.
        data: Data folders of each site that takes part, by name; several are pooled.
        cohort: Who does what.
        parallel: How many sites work at a time.
        threads: CPU threads of each.
    """

    job: Job
    data: dict[str, tuple[Path, ...]]
    cohort: "Cohort"
    parallel: int
    threads: int


def choose_sites(job: Job) -> dict[str, Manifest]:
    """Return the manifests of the job's sites, training sites first, held-out ones last.

    Raises:
        ConfigError: The job has no ``[data]``, or names a site that is not there.
        DataError: A manifest is absent or wrong, or does not agree with the job.
    """
    if job.data is None:
        raise ConfigError(
            "the job file has no [data] section", "add data.root, the folder of the sites' data sets"
        )
    found = find_manifests(job.data.root)
    train = job.data.sites or tuple(name for name in found if name not in job.data.held_out)
    for name in (*train, *job.data.held_out):
        if name not in found:
            raise ConfigError(
                f"site {name} is not below {job.data.root}", f"sites found there: {', '.join(found)}"
            )
    return {name: found[name] for name in (*train, *job.data.held_out)}


def make_plan(job: Job, parallel: int | None = None) -> Plan:
    """Check the sites' manifests against the job and decide who does what.

    Args:
        job: With its ``[data]`` section.
        parallel: How many sites work at a time; None lets ``choose_parallel`` decide.

    Raises:
        ConfigError, DataError: See ``choose_sites``; or a site that trains has no training case.
    """
    import torch

    from fedvision_server.federation import Cohort
    from fedvision_sites.work import check_agrees

    manifests = choose_sites(job)
    assert job.data is not None
    train = tuple(name for name in manifests if name not in job.data.held_out)
    for name, manifest in manifests.items():
        check_agrees(manifest, job)
        if name in train and not manifest.in_split("train"):
            raise DataError(
                f"site {name} has no training case: {manifest.folder}",
                "leave it out of data.sites, or list it in data.held_out to test on it only",
            )
    check_size(job, len(train))
    cores = len(os.sched_getaffinity(0))
    chosen, threads = choose_parallel(len(train), cores, torch.cuda.device_count())
    if parallel is not None:
        chosen, threads = min(parallel, len(manifests)), max(1, cores // parallel)
    data: dict[str, tuple[Path, ...]] = {name: (manifest.folder,) for name, manifest in manifests.items()}
    return Plan(job, data, Cohort(train, train, train, job.data.held_out), chosen, threads)


def start_run(plan: Plan, folder: Path) -> None:
    """Make a new run folder with the resolved job and the environment.

    Raises:
        StorageError: The folder already holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise StorageError(
            f"{folder} is not empty",
            f"choose another --out, or continue it with `fedvision simulate --resume {folder}`",
        )
    write_json(folder / "environment.json", describe_environment(plan))
    write_text(folder / "job.toml", dump_job(plan.job))


def describe_environment(plan: Plan) -> dict[str, Any]:
    """Return what a person needs to know to get the same run again."""
    return {**describe_machine(), "parallel_sites": plan.parallel, "threads_per_site": plan.threads}


def resume_plan(folder: Path) -> Plan:
    """Return the plan of a run that was started in ``folder``, with the same threads as then.

    Raises:
        StorageError: The folder is not a run.
    """
    if not (folder / "job.toml").exists():
        raise StorageError(
            f"{folder} is not a run folder: no job.toml", "start one with `fedvision simulate JOB.toml`"
        )
    environment = read_json(folder / "environment.json")
    plan = make_plan(load_job(folder / "job.toml"), environment["parallel_sites"])
    return Plan(
        plan.job, plan.data, plan.cohort, environment["parallel_sites"], environment["threads_per_site"]
    )


def site_configs(plan: Plan, folder: Path) -> list["SiteConfig"]:
    """Return the configuration of every site of a plan; its state lies in the run folder.

    A deployed site draws its resampling seed once, at random. Here it comes from the job's seed, so that
    a simulation can be repeated to the last digit of its intervals.
    """
    from fedvision_sites.work import SiteConfig

    memory = min(MAX_CACHE_BYTES, psutil.virtual_memory().available // 3)
    share = memory // (len(plan.data) * plan.parallel)
    return [
        SiteConfig(
            name,
            data,
            (folder / "sites" / name).resolve(),
            plan.threads,
            share,
            derive_seed(plan.job.seed, "bootstrap", name),
            site_keys(folder, name) if plan.job.aggregation.secure else None,
        )
        for name, data in plan.data.items()
    ]


def run_federation(plan: Plan, folder: Path, observe: "Observer", engine: Engine = "flower") -> None:
    """Run a plan in its run folder, from wherever it stands.

    Args:
        plan: What to run.
        folder: The run folder, made by ``start_run``.
        observe: Is shown every event.
        engine: Flower's simulation engine, or one process without it for a plan with few sites.

    Raises:
        FedvisionError: What went wrong; what was finished is on disk.
    """
    job, root = plan.job.public(), find_root_set(plan.job)
    keys = None
    if job.aggregation.secure:
        make_consortium(plan, weight_cap(plan), folder, root.digest if root else "")
        keys = server_keys(folder)
    configs = site_configs(plan, folder)
    if engine == "flower":
        run_on_flower(job, folder, plan.cohort, configs, observe, plan.parallel, keys, root)
    else:
        from fedvision_server.round import run_job

        run_job(job, LocalLink(configs), folder, plan.cohort, observe, keys, root)


def find_root_set(job: Job) -> "RootSet | None":
    """Return the root set that a job file names, checked; None if it names none or wants none.

    Raises:
        DataError, ConfigError: It cannot serve, or does not fit the job.
    """
    from fedvision.training.root import check_fits, open_root_set

    if job.data is None or job.data.root_set is None or job.defence.root == "off":
        return None
    root = open_root_set(job.data.root_set)
    check_fits(root.manifest, job)
    return root


def weight_cap(plan: Plan) -> int:
    """Return the number of cases from which a site's weight does not grow: the job's, or the largest site's.

    A deployment must set it, because the largest site's number is that site's own business.
    """
    if plan.job.secure_aggregation.weight_cap is not None:
        return plan.job.secure_aggregation.weight_cap
    sizes = (
        sum(len(load_manifest(part).in_split("train")) for part in plan.data[site])
        for site in plan.cohort.train
    )
    return max(1, *sizes)


def refusal_texts(folder: Path, sites: Sequence[str]) -> dict[str, str]:
    """Return the last reason each site wrote into its own record for a refusal, by site."""
    found = {}
    for site in sites:
        for record in read_lines(folder / "sites" / site / "log.jsonl"):
            if "refused" in record:
                found[site] = record["refused"]
    return found
