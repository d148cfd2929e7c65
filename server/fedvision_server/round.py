"""The rounds of a run, from top to bottom: ask the sites, check what they send, add up, step, judge.

Rules:
- An update is checked before it is added; one that fails is refused, recorded, and the round goes on.
- A round with fewer accepted updates than ``aggregation.min_sites`` fails; the last good model stays.
- The server holds one model, one sum and one update at a time, however many sites there are.
- What happened is on disk before the next round starts.
"""

import dataclasses
import functools
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedvision.config import Job
from fedvision.errors import MessageError, RoundError
from fedvision.repair.repairing import repair
from fedvision.repair.validation import RoundScore, choose, judge_on_root
from fedvision.storage import read_lines
from fedvision.tasks import initial_network, local_names, task_module
from fedvision.training.root import RootSet, root_update
from fedvision.updates.clipping import l2_norm
from fedvision.updates.fixed_point import WeightedSum
from fedvision.updates.layout import FloatVector, flatten, layout_of, load_vector, model_digest
from fedvision.wire.messages import EMPTY, Refusal, TrainReply, TrainRequest, as_vector, check_train_reply
from fedvision_server.aggregate import server_step, weight_of
from fedvision_server.clear_defence import ClearDefence
from fedvision_server.defence import root_input
from fedvision_server.federation import Cohort, Federation, Link, Observer, meet
from fedvision_server.jobs import RunFolder, RunState, advance
from fedvision_server.judging import final_test, validate
from fedvision_server.secure import ServerKeys, ThrownAway

logger = logging.getLogger(__name__)


def run_job(
    job: Job,
    link: Link,
    folder_path: Path,
    cohort: Cohort,
    observe: Observer,
    keys: ServerKeys | None = None,
    root: RootSet | None = None,
) -> None:
    """Run a job to its end, from wherever its run folder stands.

    Args:
        job: The job, without paths.
        link: Reaches the sites.
        folder_path: The run folder; a run in it is continued.
        cohort: Who does what.
        observe: Is shown every event, from this thread.
        keys: For secure aggregation; None for a job without it.
        root: The root set; None without one. With secure aggregation the charter names it.

    Raises:
        RoundError: Too few sites answered, or the charter names another root set; what was finished is on
            disk.
        StorageError: The run folder cannot be read or written.
    """
    network = initial_network(job)
    layout = layout_of(network, local_names(network, job))
    folder = RunFolder(folder_path, job, layout)
    state = folder.load() or RunState(0, flatten(network, layout))
    root = charters_root(keys, root) if job.defence.root == "auto" else None
    federation = meet(job, link, folder, layout, cohort, observe, keys)
    if root is not None:
        federation.root_update = functools.partial(root_update, root, job, network)
        federation.root_score = functools.partial(root_score, root, job, network)
    del network
    while state.round < job.rounds:
        state = one_round(federation, state)
    best = folder.load_round(state.best_round) if state.best_round not in (0, state.round) else state
    if root is not None and job.defence.repair != "off":
        best = mend(federation, root, best)
    folder.save_model(best)
    final_test(federation, best)


def charters_root(keys: ServerKeys | None, root: RootSet | None) -> RootSet | None:
    """Return the root set that a job may use: the one that its charter names.

    Raises:
        RoundError: The charter names a root set that is not at hand.
    """
    if keys is None:
        return root
    named = keys.consortium.charter.root_set
    if not named:
        return None
    if root is None or root.digest != named:
        raise RoundError(
            f"the charter names the root set {named[:16]}, which is not the one at hand",
            "`fedvision-server root-set show` says which one the server has",
        )
    return root


def root_score(root: RootSet, job: Job, network: nn.Module, weights: FloatVector) -> float | None:
    """Return the headline metric of a model on the root set, None where it is not defined."""
    load_vector(network, layout_of(network, local_names(network, job)), weights)
    found = judge_on_root(network, job, root)[task_module(job).HEADLINE]
    return found if math.isfinite(found) else None


def mend(federation: Federation, root: RootSet, best: RunState) -> RunState:
    """Return the kept model after the repair on the root set; what it did is in ``repair.json``."""
    job, folder = federation.job, federation.folder.path
    federation.observe({"event": "repair", "round": best.round})
    choice = choose(round_scores(federation))
    found = repair(job, best.weights, root, folder, best.best_value if best.best_round else None)
    event = {"event": "repaired", "round": best.round, "text": found.report["text"], "rounds": choice.text}
    federation.tell(event)
    return dataclasses.replace(best, weights=found.weights)


def round_scores(federation: Federation) -> list[RoundScore]:
    """Return what was known of the model after each round, from the record."""
    headline, found = task_module(federation.job).HEADLINE, dict[int, RoundScore]()
    for event in read_lines(federation.folder.path / "rounds.jsonl"):
        if event["event"] == "round":
            sites = ((event.get("validation") or {}).get("mean_site") or {}).get(headline)
            found[event["round"]] = RoundScore(event["round"], event.get("root_score"), sites)
    return [found[number] for number in sorted(found)]


def one_round(federation: Federation, state: RunState) -> RunState:
    """Train at every site, aggregate, judge when due, and return the next state, which is on disk.

    Raises:
        RoundError: Fewer updates than ``aggregation.min_sites`` were accepted.
    """
    job, number = federation.job, state.round + 1
    started = time.perf_counter()
    federation.observe({"event": "start", "round": number, "sites": list(federation.cohort.train)})
    try:
        gathered = secure_update(federation, state) if federation.secure else clear_update(federation, state)
    except ThrownAway as error:
        following = dataclasses.replace(state, round=number)
        federation.tell({"event": "thrown away", "round": number, "reason": str(error)})
        federation.folder.save(following)
        return following
    mean_update = gathered.mean_update
    weights, moments = server_step(state, mean_update, job)
    validation = value = at_root = None
    if number % job.evaluation.every == 0 or number == job.rounds:
        validation = validate(federation, number, weights)
        value = validation["mean_site"].get(task_module(job).HEADLINE) if validation else None
        at_root = federation.root_score(weights) if federation.root_score else None
        value = lower(value, at_root)
    following = advance(state, weights, value, moments)
    event = {
        "event": "round",
        "round": number,
        "num_sites": gathered.num_sites,
        "update_norm": l2_norm(mean_update.astype(np.float32)),
        "level": gathered.level,
        "train_loss": gathered.train_loss,
        "sum_seconds": round(gathered.sum_seconds, 3),
        "validation": validation,
        "root_score": at_root,
        "is_best": following.best_round == number,
        "seconds": round(time.perf_counter() - started, 3),
    }
    federation.folder.record(event)
    federation.folder.save(following)
    if federation.secure:
        federation.secure.forget_sum("train", number)
        federation.secure.forget_sum("validate", number)
    federation.observe(event)
    logger.info("round %s: %s sites, update norm %.4g", number, gathered.num_sites, event["update_norm"])
    return following


def lower(at_sites: float | None, at_root: float | None) -> float | None:
    """Return the value by which rounds are compared: the lower of both, since sites may lie about theirs."""
    known = [value for value in (at_sites, at_root) if value is not None and not math.isnan(value)]
    return min(known, default=at_sites)


@dataclass(frozen=True)
class Gathered:
    """What came of a round's updates.

    Attributes:
        mean_update: float64, shape (d,).
        num_sites: How many sites' updates are in it.
        level: The level of secure aggregation, "off" without it.
        train_loss: Weighted mean over sites; None where it was sent by each site, or by none.
        sum_seconds: Wall time that hiding the updates took, after training.
    """

    mean_update: NDArray[np.float64]
    num_sites: int
    level: str
    train_loss: float | None
    sum_seconds: float = 0.0


def secure_update(federation: Federation, state: RunState) -> Gathered:
    """Have the cohort train and return the mean of the accepted updates, of which no single one is known.

    Raises:
        RoundError: No sum could be made; ``ThrownAway`` if it was made and is of no use.
    """
    job, number, secure = federation.job, state.round + 1, federation.secure
    assert secure is not None

    def request(charter: str, offer: bytes) -> TrainRequest:
        return TrainRequest(
            job.to_json(),
            job.digest(),
            federation.layout.digest,
            number,
            charter,
            as_vector(offer),
            state.weights,
        )

    def on_ready(site: str) -> None:
        federation.tell({"event": "train", "round": number, "site": site, "status": "accepted"})

    encoding, model = secure.consortium.encoding, model_digest(state.weights)
    root = None
    if federation.root_update is not None and secure.defence.is_on:
        root = root_input(federation.root_update(state.weights, number), encoding)
    found = secure.add_up(
        "train", number, model, federation.cohort.train, encoding.length, request, on_ready, root
    )
    require_sites(federation, number, len(found.sites))
    try:
        decoded = encoding.decode(found.total, None if found.level == "sum" else len(found.sites))
    except MessageError as error:
        secure.lose(f"round {number}: a site lied about its weight: {error}", is_explained=False)
    if decoded.is_weight_moved:
        federation.tell({"event": "weight", "round": number, "reason": "a site lied about its weight"})
    secure.count_as_done()
    loss = None if job.privacy.is_on else decoded.metrics[0]
    return Gathered(decoded.mean_update, len(found.sites), found.level, loss, found.seconds)


def clear_update(federation: Federation, state: RunState) -> Gathered:
    """Have the cohort train and return the mean of the updates, each of which the server sees.

    Raises:
        RoundError: Fewer updates than ``aggregation.min_sites`` were accepted.
    """
    job, number = federation.job, state.round + 1
    total = WeightedSum(federation.layout.size, job.aggregation.clip_norm)
    with ClearDefence(federation, number) as defence:
        num_sites = collect_updates(federation, state, total, defence)
        if defence.is_on:
            root = federation.root_update(state.weights, number) if federation.root_update else None
            for _, update, weight in defence.accepted(root):
                total.add(update, weight)
            num_sites -= len(defence.excluded)
    require_sites(federation, number, num_sites)
    return Gathered(total.mean(), num_sites, "off", None)


def require_sites(federation: Federation, number: int, num_sites: int) -> None:
    """Refuse to go on with fewer updates than the job wants.

    Raises:
        RoundError: See above.
    """
    if num_sites < federation.job.aggregation.min_sites:
        raise RoundError(
            f"round {number}: {num_sites} of {len(federation.cohort.train)} updates were accepted, "
            f"{federation.job.aggregation.min_sites} are needed",
            "rounds.jsonl says which sites were refused, and each site's log.jsonl why",
        )


def collect_updates(
    federation: Federation, state: RunState, total: WeightedSum, defence: ClearDefence
) -> int:
    """Ask the cohort to train, and add every update that passes the checks or keep it for the defence.

    Returns:
        How many passed.
    """
    job, number = federation.job, state.round + 1
    request = TrainRequest(
        job.to_json(), job.digest(), federation.layout.digest, number, "", EMPTY, state.weights
    )
    accepted = 0
    for site, reply in federation.ask(dict.fromkeys(federation.cohort.train, request)):
        event: dict[str, Any] = {"event": "train", "round": number, "site": site}
        if isinstance(reply, TrainReply):
            try:
                check_train_reply(reply, federation.layout.size, job.aggregation.clip_norm)
                if defence.is_on:
                    defence.put(site, reply.update, weight_of(reply, job))
                else:
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
