"""The repair of a model after the last round: search, remove, compare, keep the best.

    repair.json                 what was found and done
    repair/NAME.png             a judging case with the strongest trigger, before and after the repair

Rules:
- The root set's patients are split in two: some teach, the others judge. What is reported was measured on
  those that judge. They also choose how much of a repair is kept, and which, so the numbers after a repair
  are a little too good: the sites' final test is the independent one.
- A repair is kept only if the score on the judging cases falls by at most ``ALLOWED_LOSS``; otherwise the
  model stays as it was, and the report says so.
- Triggers that were found count before and after; after the repair there is a new search as well, because
  a repair that only knows the old triggers is none.
- The root set must fit the model: see ``validation.misfit``.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedvision.config import Job
from fedvision.data.manifest import Case
from fedvision.data.readers import Sample
from fedvision.errors import FedvisionError, StorageError
from fedvision.repair.removal import Bounds, finetune, prune, silence, stamp_some
from fedvision.repair.stamping import TARGETS, Batch, Trigger, stamp
from fedvision.repair.trigger import Wanted, at_training_size, intensity_range, search, success
from fedvision.repair.validation import judge_on_root, misfit
from fedvision.seeds import derive_seed
from fedvision.storage import write_json
from fedvision.tasks import initial_network, local_names, task_module
from fedvision.training.root import RootSet
from fedvision.updates.layout import FloatVector, flatten, layout_of, load_vector

logger = logging.getLogger(__name__)

ALLOWED_LOSS = 0.02
"""Largest loss of the headline metric on the judging cases."""
SUCCESS_LIMIT = 0.1
"""Largest success of a trigger that was found, after the repair."""
SIZES = (1 / 16, 1 / 10, 1 / 6)
"""Sides of the patches that are searched, as shares of the crop's shortest side."""
SMALL = 0.1
SUSPICIOUS = 0.3
"""A patch with a side of at most ``SMALL`` that works on so many images is a reason to suspect a plant. On
models that nobody poisoned such patches were found to work on hardly any; larger ones and blends may."""
NUM_BATCHES = 8
SEARCH_STEPS = 30
PASSES = 3
"""Times that unlearning searches and trains."""
STEPS = 60
"""Training steps of a pass."""
KEPT = (0.7, 0.85, 1.0)
"""Shares of the way from the old weights to the new, of which unlearning keeps the first that will do."""
JUDGES = 3
"""Every so many-th patient judges; the others teach."""


@dataclass(frozen=True)
class Repaired:
    """What came of a repair.

    Attributes:
        weights: Shape (d,), float32: the repaired model, or the one that was given.
        report: What ``repair.json`` holds.
    """

    weights: FloatVector = field(repr=False)
    report: dict[str, Any]


@dataclass(frozen=True)
class _Bench:
    """What every step of a repair needs at hand."""

    job: Job
    root: RootSet
    teachers: list[Sample] = field(repr=False)
    judges: list[Sample] = field(repr=False)
    judge_cases: list[Case] = field(repr=False)
    batches: list[Batch] = field(repr=False)
    bounds: Bounds
    seed: int

    def score(self, network: nn.Module) -> float:
        """Return the headline metric on the cases that judge."""
        metrics = judge_on_root(network, self.job, self.root, self.judge_cases)
        return float(metrics[task_module(self.job).HEADLINE])

    def stamping(self, triggers: Sequence[Trigger]) -> Callable[[Batch, np.random.Generator], Batch]:
        """Return what puts some of these triggers, and random ones, into a batch."""
        return lambda batch, rng: stamp_some(batch, self.job, triggers, self.bounds, rng)

    def search_all(
        self, network: nn.Module, wanted: Sequence[Wanted], purpose: str, steps: int = SEARCH_STEPS
    ) -> list[Trigger]:
        """Search for every trigger that is wanted."""
        seed = derive_seed(self.seed, purpose)
        return [search(network, self.job, self.batches, one, self.bounds, steps, seed) for one in wanted]

    def successes(
        self, network: nn.Module, wanted: Sequence[Wanted], triggers: Sequence[Trigger]
    ) -> dict[str, float]:
        """Return the success of each trigger on the cases that judge, by name."""
        return {
            name.text: round(success(network, self.job, self.judges, trigger, self.seed), 4)
            for name, trigger in zip(wanted, triggers, strict=True)
        }


def split_root(root: RootSet) -> tuple[list[Case], list[Case]]:
    """Return the cases that teach and those that judge: every third patient, in the order of their names."""
    patients = sorted({case.patient for case in root.cases})
    judging = set(patients[JUDGES - 1 :: JUDGES])
    teach = [case for case in root.cases if case.patient not in judging]
    return teach, [case for case in root.cases if case.patient in judging]


def searches(job: Job) -> list[Wanted]:
    """Return what is searched for in a job: both targets, patches of several sizes and a blend.

    With several classes the one that is invented changes from search to search.
    """
    found = [Wanted("patch", "erase", 0, share) for share in SIZES] + [Wanted("blend", "erase", 0, 1)]
    labels = [1 + i % len(job.task.classes) for i in range(len(SIZES) + 1)]
    found += [Wanted("patch", "invent", label, share) for label, share in zip(labels, SIZES, strict=False)]
    return [*found, Wanted("blend", "invent", labels[-1], 1)]


def _unlearn(bench: _Bench, network: nn.Module, found: Sequence[Trigger], wanted: Sequence[Wanted]) -> None:
    """Train against triggers, those that were found and those that each further pass finds, in place.

    In the end the weights go back, as far as the triggers stay without effect: that halves what is lost on
    images that are unlike the root set's (Wortsman et al. 2022, WiSE-FT, section 3).
    """
    known, layout = list(found), layout_of(network)
    before = flatten(network, layout)
    for number in range(PASSES):
        if number:
            known += bench.search_all(network, wanted[number % 2 :: 2], f"pass {number}", SEARCH_STEPS // 2)
        seed = derive_seed(bench.seed, "unlearn", number)
        finetune(network, bench.job, bench.teachers, STEPS, seed, bench.stamping(known))
    after = flatten(network, layout)
    for kept in KEPT:
        load_vector(network, layout, before + np.float32(kept) * (after - before))
        if max(bench.successes(network, wanted, found).values()) <= SUCCESS_LIMIT / 2:
            break


def _prune_and_tune(
    bench: _Bench, network: nn.Module, found: Sequence[Trigger], wanted: Sequence[Wanted]
) -> None:
    """Silence channels that root images leave quiet, fine-tune the rest against triggers, in place."""
    pruned = prune(network, bench.job, bench.batches, lambda: bench.score(network), ALLOWED_LOSS)
    seed = derive_seed(bench.seed, "prune")
    keep = partial(silence, network, pruned)
    finetune(network, bench.job, bench.teachers, PASSES * STEPS, seed, bench.stamping(found), keep)


def _finetune_plainly(
    bench: _Bench, network: nn.Module, found: Sequence[Trigger], wanted: Sequence[Wanted]
) -> None:
    """Fine-tune on root cases as they are, in place."""
    finetune(network, bench.job, bench.teachers, PASSES * STEPS, derive_seed(bench.seed, "plain"))


TREATMENTS = {"finetune": _unlearn, "prune": _prune_and_tune, "plain": _finetune_plainly}
METHODS = {"off": (), "finetune": ("finetune",), "prune": ("prune",), "auto": ("finetune", "prune")}
"""What is tried for each ``defence.repair``, in this order, until one takes every trigger away."""


def repair(
    job: Job,
    weights: FloatVector,
    root: RootSet,
    folder: Path | None = None,
    sites_score: float | None = None,
) -> Repaired:
    """Look for triggers in a model, take out what is found, and say what came of it.

    The same arguments give the same weights on the same machine. Takes seconds to minutes on a CPU: about as
    long as 500 training steps of the job for ``finetune``, twice that where ``auto`` tries pruning as well.

    Args:
        job: ``defence.repair`` says by which method.
        weights: The model of the chosen round, shape (d,), float32.
        root: The root set.
        folder: Where ``repair.json`` and pictures go; None writes nothing.
        sites_score: Headline metric of the model on the sites' validation cases, if it is known: a root set
            whose labels do not fit is found by it.

    Returns:
        The repaired model and the report; the model as it was, where nothing is to be done, nothing helps,
        or the root set does not fit. The report's ``text`` says which.

    Raises:
        StorageError: The report cannot be written.
    """
    started = time.perf_counter()
    network = initial_network(job)
    layout = layout_of(network, local_names(network, job))
    load_vector(network, layout, weights)
    report: dict[str, Any] = {
        "format": 1,
        "root_set": root.digest,
        "headline": task_module(job).HEADLINE,
        "method": "none",
        "is_changed": False,
    }
    repaired = None
    try:
        if job.model.local_normalisation:
            report["text"] = "the model stays as it was: a part of it (FedBN) is at the sites"
        elif METHODS[job.defence.repair]:
            repaired = _treat(_make_bench(job, root), network, folder, sites_score, report)
        else:
            report["text"] = 'the model stays as it was: defence.repair = "off"'
    except StorageError:
        raise
    except FedvisionError as error:
        report["text"] = f"the model stays as it was: {error}"
    report["seconds"] = round(time.perf_counter() - started, 1)
    if folder is not None:
        write_json(folder / "repair.json", report)
    logger.info("repair: %s", report["text"])
    return Repaired(weights if repaired is None else flatten(repaired, layout), report)


def _copy_of(network: nn.Module, job: Job) -> nn.Module:
    """Return a second network with the same weights; some of MONAI's cannot be copied once they were used."""
    other = initial_network(job)
    layout = layout_of(network)
    load_vector(other, layout, flatten(network, layout))
    return other.eval()


def _make_bench(job: Job, root: RootSet) -> _Bench:
    """Read the cases, split them, and draw the batches of the searches."""
    store = root.store(job)
    teach, judge = split_root(root)
    teachers, judges = ([store.load(case) for case in cases] for cases in (teach, judge))
    seed = derive_seed(job.seed, "repair")
    rng = np.random.default_rng(seed)
    size, task = job.training.batch_size, task_module(job)
    chosen = (rng.choice(len(teachers), size) for _ in range(NUM_BATCHES))
    batches = [task.training_batch([teachers[i] for i in indices], job, rng) for indices in chosen]
    return _Bench(job, root, teachers, judges, judge, batches, intensity_range(teachers), seed)


def _treat(
    bench: _Bench, network: nn.Module, folder: Path | None, sites_score: float | None, report: dict[str, Any]
) -> nn.Module | None:
    """Fill the report, and return the repaired network; None where the model stays as it was."""
    job, wanted = bench.job, searches(bench.job)
    score = bench.score(network)
    report |= {"num_teaching": len(bench.teachers), "num_judging": len(bench.judges)}
    report["before"] = {"score": round(score, 4)}
    problem = misfit(score, sites_score)
    if problem:
        report["text"] = f"the model stays as it was: {problem}"
        return None
    found = bench.search_all(network, wanted, "before")
    before = bench.successes(network, wanted, found)
    report["before"]["success"] = before
    report["suspected"] = [
        one.text
        for one in wanted
        if one.kind == "patch" and one.share <= SMALL and before[one.text] >= SUSPICIOUS
    ]
    report["candidates"] = {}
    best: tuple[tuple[bool, float], str, nn.Module] | None = None
    for method in METHODS[job.defence.repair]:
        candidate = _copy_of(network, job)
        TREATMENTS[method](bench, candidate, found, wanted)
        after = bench.score(candidate)
        old = bench.successes(candidate, wanted, found)
        new = bench.successes(candidate, wanted, bench.search_all(candidate, wanted, "after"))
        report["candidates"][method] = {
            "score": round(after, 4),
            "success": old,
            "new_success": new,
        }
        if after < score - ALLOWED_LOSS:
            continue
        is_clean = max(old.values()) <= SUCCESS_LIMIT
        rank = (is_clean, after if is_clean else -max(old.values()))
        if best is None or rank > best[0]:
            best = (rank, method, candidate)
        if is_clean:
            break
    if best is None:
        report["text"] = (
            f"the model stays as it was: every repair lost more than {100 * ALLOWED_LOSS:.0f} points"
        )
        return None
    _, method, repaired = best
    report |= {"method": method, "is_changed": True, "after": report["candidates"][method]}
    report["text"] = _verdict(report)
    if folder is not None:
        networks = {"before": network, "after": repaired}
        report["pictures"] = _draw(bench, folder, networks, wanted, found, before)
    return repaired


def _verdict(report: dict[str, Any]) -> str:
    """Return what a repair came to, in a sentence or two."""
    before, after = report["before"], report["after"]
    name, worst = max(before["success"].items(), key=lambda item: item[1])
    left = max(after["success"].values())
    suspicion = "a planted trigger is suspected" if report["suspected"] else "no small trigger was found"
    return (
        f"{suspicion}; {report['method']}: {report['headline']} on judging cases {before['score']:.3f} "
        f"before, {after['score']:.3f} after; the strongest trigger found ({name}) worked on "
        f"{100 * worst:.0f} % of images before, and no found trigger works on more than "
        f"{100 * left:.0f} % after"
    )


def _draw(
    bench: _Bench,
    folder: Path,
    networks: Mapping[str, nn.Module],
    wanted: Sequence[Wanted],
    found: Sequence[Trigger],
    successes: Mapping[str, float],
) -> list[str]:
    """Draw a judging case with the strongest trigger of each target, for every network; return the files."""
    from fedvision.report.examples import draw_example

    sample = at_training_size(bench.judges[0], bench.job)
    shape, names = sample.image.shape[1:], []
    for target in TARGETS:
        pairs = [pair for pair in zip(wanted, found, strict=True) if pair[0].target == target]
        name, trigger = max(pairs, key=lambda pair: successes[pair[0].text])
        # A quarter into the image: in full view, and clear of its edges.
        corner = tuple(max(0, (size - part) // 4) for size, part in zip(shape, trigger.size, strict=True))
        if trigger.kind == "patch" and any(s < k for s, k in zip(shape, trigger.size, strict=True)):
            continue
        stamped = dataclasses.replace(sample, image=stamp(sample.image, trigger, corner))
        for when, network in networks.items():
            device = next(network.parameters()).device
            network.eval()
            with torch.inference_mode():
                result = task_module(bench.job).evaluate_case(network, stamped, bench.job, device, False)
            path = folder / "repair" / f"{name.text}-{when}.png"
            draw_example(stamped, result, bench.job, path, f"{name.text}, {when} the repair")
            names.append(path.name)
    return names
