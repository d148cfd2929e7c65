"""The rounds of a run, from top to bottom: ask the sites, check what they send, add up, step, judge.

Rules:
- An update is checked before it is added; one that fails is refused, recorded, and the round goes on.
- A round with fewer accepted updates than ``aggregation.min_sites`` fails; the last good model stays.
- The server holds one model, one sum and one update at a time, however many sites there are.
- What happened is on disk before the next round starts.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedvision.config import Job
from fedvision.errors import MessageError, RoundError
from fedvision.tasks import initial_network, local_names, task_module
from fedvision.updates.clipping import l2_norm
from fedvision.updates.fixed_point import WeightedSum
from fedvision.updates.layout import FloatVector, Layout, flatten, layout_of
from fedvision.wire.messages import (
    EvaluateReply,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    Refusal,
    Reply,
    Request,
    Split,
    TrainReply,
    TrainRequest,
    check_evaluate_reply,
    check_train_reply,
)
from fedvision_server.aggregate import Metrics, intervals, mean_site, server_step, summarise, weight_of
from fedvision_server.jobs import RunFolder, RunState, advance

logger = logging.getLogger(__name__)
Observer = Callable[[dict[str, Any]], None]


class Link(Protocol):
    """What carries requests to sites and replies back."""

    def nodes(self) -> Sequence[int]:
        """Return the addresses of the sites that can be reached."""
        ...

    def ask(self, request: Request, nodes: Sequence[int]) -> Iterator[tuple[int, Reply]]:
        """Send ``request`` to ``nodes`` and yield each reply as it comes, in any order.

        A site that fails to answer yields a ``Refusal``.
        """
        ...


@dataclass(frozen=True)
class Cohort:
    """Which sites do what in a run.

    Attributes:
        train: Send updates.
        validate: Their validation cases choose the best model.
        test: Judge the final model; mean, worst and pooled are over these.
        held_out: Judge the final model, and are reported apart: data that no training has seen.
    """

    train: tuple[str, ...]
    validate: tuple[str, ...]
    test: tuple[str, ...]
    held_out: tuple[str, ...] = ()


@dataclass
class Federation:
    """What a run needs at hand: fixed after ``meet``."""

    job: Job
    link: Link
    folder: RunFolder
    layout: Layout
    cohort: Cohort
    observe: Observer
    addresses: dict[str, int]
    sizes: dict[str, HelloReply]

    def tell(self, event: dict[str, Any]) -> None:
        """Write an event to ``rounds.jsonl`` and show it to whoever watches."""
        self.folder.record(event)
        self.observe(event)

    def ask(self, request: Request, sites: Sequence[str]) -> Iterator[tuple[str, Reply]]:
        """Ask ``sites`` and yield each one's name with a reply that is really its own."""
        names = {self.addresses[site]: site for site in sites}
        for node, reply in self.link.ask(request, list(names)):
            site = names[node]
            number = 0 if isinstance(request, HelloRequest) else request.round
            answered = 0 if isinstance(reply, HelloReply) else reply.round
            if isinstance(reply, Refusal) and not reply.site:
                yield site, dataclasses.replace(reply, site=site)
            elif reply.site != site or reply.job_digest != request.job_digest or answered != number:
                yield site, Refusal(request.job_digest, site, number, "message")
            else:
                yield site, reply


def run_job(job: Job, link: Link, folder_path: Path, cohort: Cohort, observe: Observer) -> None:
    """Run a job to its end, from wherever its run folder stands.

    Args:
        job: The job, without paths.
        link: Reaches the sites.
        folder_path: The run folder; a run in it is continued.
        cohort: Who does what.
        observe: Is shown every event, from this thread.

    Raises:
        RoundError: Too few sites answered; what was finished is on disk.
        StorageError: The run folder cannot be read or written.
    """
    network = initial_network(job)
    layout = layout_of(network, local_names(network, job))
    folder = RunFolder(folder_path, job, layout)
    state = folder.load() or RunState(0, flatten(network, layout))
    del network
    federation = meet(job, link, folder, layout, cohort, observe)
    while state.round < job.rounds:
        state = one_round(federation, state)
    best = folder.load_round(state.best_round) if state.best_round not in (0, state.round) else state
    folder.save_model(best)
    final_test(federation, best)


def meet(
    job: Job, link: Link, folder: RunFolder, layout: Layout, cohort: Cohort, observe: Observer
) -> Federation:
    """Ask every site for its name and size.

    Raises:
        RoundError: A site of the cohort is absent, refuses the job, or two have one name.
    """
    request = HelloRequest(job.to_json(), job.digest(), layout.digest)
    addresses: dict[str, int] = {}
    sizes: dict[str, HelloReply] = {}
    refused: dict[str, str] = {}
    for node, reply in link.ask(request, link.nodes()):
        if isinstance(reply, Refusal):
            refused[reply.site] = reply.code
        elif isinstance(reply, HelloReply):
            if reply.site in addresses:
                raise RoundError(f"two sites are named {reply.site}")
            addresses[reply.site] = node
            sizes[reply.site] = reply
    needed = sorted({*cohort.train, *cohort.validate, *cohort.test, *cohort.held_out})
    for site in needed:
        if site in refused:
            raise RoundError(
                f"site {site} refuses the job ({refused[site]} error)", f"the log of {site} says why"
            )
        if site not in addresses:
            raise RoundError(f"site {site} does not answer")
    for site in cohort.train:
        if sizes[site].num_train == 0:
            raise RoundError(
                f"site {site} has no training case", "leave it out of data.sites, or list it in held_out"
            )
    return Federation(job, link, folder, layout, cohort, observe, addresses, sizes)


def one_round(federation: Federation, state: RunState) -> RunState:
    """Train at every site, aggregate, judge when due, and return the next state, which is on disk.

    Raises:
        RoundError: Fewer updates than ``aggregation.min_sites`` were accepted.
    """
    job, number = federation.job, state.round + 1
    started = time.perf_counter()
    federation.observe({"event": "start", "round": number, "sites": list(federation.cohort.train)})
    total = WeightedSum(federation.layout.size, job.aggregation.clip_norm)
    num_sites = collect_updates(federation, state, total)
    if num_sites < job.aggregation.min_sites:
        raise RoundError(
            f"round {number}: {num_sites} of {len(federation.cohort.train)} updates were accepted, "
            f"{job.aggregation.min_sites} are needed",
            "rounds.jsonl says which sites were refused, and each site's log.jsonl why",
        )
    mean_update = total.mean()
    weights = server_step(state.weights, mean_update, job)
    validation = None
    value = None
    if number % job.evaluation.every == 0 or number == job.rounds:
        validation = validate(federation, number, weights)
        value = validation["mean_site"].get(task_module(job).HEADLINE) if validation else None
    following = advance(state, weights, value)
    event = {
        "event": "round",
        "round": number,
        "num_sites": num_sites,
        "update_norm": l2_norm(mean_update.astype(np.float32)),
        "validation": validation,
        "is_best": following.best_round == number,
        "seconds": round(time.perf_counter() - started, 3),
    }
    federation.folder.record(event)
    federation.folder.save(following)
    federation.observe(event)
    logger.info("round %s: %s sites, update norm %.4g", number, num_sites, event["update_norm"])
    return following


def collect_updates(federation: Federation, state: RunState, total: WeightedSum) -> int:
    """Ask the cohort to train and add every update that passes the checks; return how many did."""
    job, number = federation.job, state.round + 1
    request = TrainRequest(job.to_json(), job.digest(), federation.layout.digest, number, state.weights)
    accepted = 0
    for site, reply in federation.ask(request, federation.cohort.train):
        event: dict[str, Any] = {"event": "train", "round": number, "site": site}
        if isinstance(reply, TrainReply):
            try:
                check_train_reply(reply, federation.layout.size, job.aggregation.clip_norm)
                total.add(reply.update, weight_of(reply, job))
                accepted += 1
                event |= {
                    "status": "accepted",
                    "num_samples": reply.num_samples,
                    "num_steps": reply.num_steps,
                    "train_loss": reply.train_loss,
                    "seconds": round(reply.seconds, 3),
                }
            except MessageError as error:
                event |= {"status": "refused", "reason": str(error)}
        else:
            event |= {"status": "failed", "reason": reply.code if isinstance(reply, Refusal) else "message"}
        federation.tell(event)
    return accepted


def ask_statistics(
    federation: Federation,
    number: int,
    weights: FloatVector,
    split: Split,
    sites: Sequence[str],
    is_final: bool,
) -> dict[str, EvaluateReply]:
    """Return the checked statistics of every site that answered, in the order of ``sites``."""
    job = federation.job
    request = EvaluateRequest(
        job.to_json(), job.digest(), federation.layout.digest, number, split, is_final, weights
    )
    size = task_module(job).statistics_size(job)
    resamples = job.evaluation.bootstrap if is_final else 0
    found: dict[str, EvaluateReply] = {}
    for site, reply in federation.ask(request, sites):
        try:
            if not isinstance(reply, EvaluateReply) or reply.split != split:
                raise MessageError(reply.code if isinstance(reply, Refusal) else "message")
            check_evaluate_reply(reply, size, resamples)
            found[site] = reply
        except MessageError as error:
            federation.tell(
                {
                    "event": "evaluate failed",
                    "round": number,
                    "site": site,
                    "split": split,
                    "reason": str(error),
                }
            )
            continue
        if not is_final:
            metrics = task_module(job).metrics(reply.statistics[0], job)
            federation.tell(
                {
                    "event": "validate",
                    "round": number,
                    "site": site,
                    "num_cases": reply.num_cases,
                    "metrics": metrics,
                }
            )
        else:
            federation.observe({"event": "test", "round": number, "site": site, "num_cases": reply.num_cases})
    return {site: found[site] for site in sites if site in found}


def validate(federation: Federation, number: int, weights: FloatVector) -> dict[str, Any] | None:
    """Judge a model on the validation cases of the cohort; None where no site has any."""
    job, task = federation.job, task_module(federation.job)
    sites = [site for site in federation.cohort.validate if federation.sizes[site].num_val > 0]
    replies = ask_statistics(federation, number, weights, "val", sites, is_final=False)
    if not replies:
        return None
    by_site = {site: task.metrics(reply.statistics[0], job) for site, reply in replies.items()}
    pooled = task.metrics(sum_rows(list(replies.values()))[0], job)
    return summarise(by_site, pooled, task.HEADLINE)


def sum_rows(replies: Sequence[EvaluateReply]) -> NDArray[np.float64]:
    """Return the sites' statistics added up, shape (1 + B, S): pooled cases, and pooled resamples."""
    total = np.zeros_like(replies[0].statistics)
    for reply in replies:
        total += reply.statistics
    return total


def final_test(federation: Federation, state: RunState) -> None:
    """Judge the released model on every site's test cases and write ``test.json``.

    Raises:
        RoundError: Sites have test cases, but none could judge.
    """
    job, task = federation.job, task_module(federation.job)
    judges = (*federation.cohort.test, *federation.cohort.held_out)
    sites = [site for site in judges if federation.sizes[site].num_test > 0]
    replies = ask_statistics(federation, state.round, state.weights, "test", sites, is_final=True)

    if sites and not replies:
        raise RoundError(
            "no site could judge the final model", "each site's log.jsonl says why; the model is saved"
        )

    def metrics_of(row: NDArray[np.float64]) -> Metrics:
        found: Metrics = task.metrics(row, job)
        return found

    result: dict[str, Any] = {"round": state.round, "headline": task.HEADLINE, "sites": {}}
    for site, reply in replies.items():
        result["sites"][site] = {
            "role": "held_out" if site in federation.cohort.held_out else "train",
            "num_cases": reply.num_cases,
            "num_patients": reply.num_patients,
            "metrics": metrics_of(reply.statistics[0]),
            "intervals": intervals(reply.statistics[1:], metrics_of),
        }
    own = {site: reply for site, reply in replies.items() if site in federation.cohort.test}
    if own:
        rows = sum_rows(list(own.values()))
        by_site = {site: result["sites"][site]["metrics"] for site in own}
        result |= summarise(by_site, metrics_of(rows[0]), task.HEADLINE)
        result["pooled"] = {"metrics": result["pooled"], "intervals": intervals(rows[1:], metrics_of)}
        result["mean_site_intervals"] = mean_site_intervals(own, metrics_of)
    federation.folder.save_test(result)


def mean_site_intervals(
    replies: dict[str, EvaluateReply], metrics_of: Callable[[NDArray[np.float64]], Metrics]
) -> dict[str, list[float]]:
    """Return 95 % intervals of the mean over sites, from the sites' own resamples taken together."""
    count = len(next(iter(replies.values())).statistics) - 1
    means = [
        mean_site({site: metrics_of(reply.statistics[1 + b]) for site, reply in replies.items()})
        for b in range(count)
    ]
    found = {}
    for name in means[0] if means else ():
        values = [m[name] for m in means if not math.isnan(m[name])]
        if values:
            low, high = np.percentile(values, (2.5, 97.5))
            found[name] = [float(low), float(high)]
    return found
