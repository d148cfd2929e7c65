"""Judge a model at the sites: on validation cases after a round, on test cases at the end.

With secure aggregation only sums over sites are known, unless the charter lets each site release its own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedvision.errors import MessageError, RoundError
from fedvision.secagg.encoding import decode_statistics, encode_statistics
from fedvision.tasks import task_module
from fedvision.training.evaluation import judgement_size, split_judgement
from fedvision.updates.layout import FloatVector, model_digest
from fedvision.wire.messages import (
    EMPTY,
    EvaluateReply,
    EvaluateRequest,
    Refusal,
    Split,
    as_vector,
    check_evaluate_reply,
)
from fedvision_server.aggregate import Metrics, intervals, mean_site, summarise
from fedvision_server.federation import Federation
from fedvision_server.jobs import RunState
from fedvision_server.secure import ThrownAway


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
        job.to_json(), job.digest(), federation.layout.digest, number, split, is_final, "", EMPTY, weights
    )
    size = task_module(job).statistics_size(job)
    resamples = job.evaluation.bootstrap if is_final else 0
    found: dict[str, EvaluateReply] = {}
    for site, reply in federation.ask(dict.fromkeys(sites, request)):
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
    if federation.secure:
        if not any(federation.sizes[site].num_val for site in federation.cohort.validate):
            return None
        try:
            judged = secure_judgement(federation, "validate", number, weights)
        except (ThrownAway, MessageError) as error:
            event = {"event": "evaluate failed", "round": number, "split": "val", "reason": str(error)}
            federation.tell(event)
            return None
        return {**judged.summary(federation, 0), "pooled": judged.pooled(federation, 0)}
    sites = [site for site in federation.cohort.validate if federation.sizes[site].num_val > 0]
    replies = ask_statistics(federation, number, weights, "val", sites, is_final=False)
    if not replies:
        return None
    by_site = {site: task.metrics(reply.statistics[0], job) for site, reply in replies.items()}
    pooled = task.metrics(sum_rows(list(replies.values()))[0], job)
    return summarise(by_site, pooled, task.HEADLINE)


@dataclass(frozen=True)
class Judgement:
    """What is known of a model's results when only sums over sites are.

    Attributes:
        sites: Whose results are in it.
        statistics: Pooled, shape (1 + B, S).
        means: Mean over sites of each metric, a row each.
    """

    sites: tuple[str, ...]
    statistics: NDArray[np.float64]
    means: list[Metrics]

    def summary(self, federation: Federation, row: int) -> dict[str, Any]:
        """Return the mean over sites as ``summarise`` writes it; which site is worst nobody knows."""
        return {"mean_site": self.means[row], "worst_site": {"site": None, "metrics": {}}}

    def pooled(self, federation: Federation, row: int) -> Metrics:
        """Return the metrics of all cases together."""
        found: Metrics = task_module(federation.job).metrics(self.statistics[row], federation.job)
        return found


def secure_judgement(
    federation: Federation, purpose: Literal["validate", "test"], number: int, weights: FloatVector
) -> Judgement:
    """Have the cohort judge a model, and return what the sum of their results says.

    Raises:
        RoundError: No sum could be made.
    """
    job, secure, is_final = federation.job, federation.secure, purpose == "test"
    assert secure is not None
    split: Split = "test" if is_final else "val"
    num_rows = 1 + (job.evaluation.bootstrap if is_final else 0)

    def request(charter: str, offer: bytes) -> EvaluateRequest:
        return EvaluateRequest(
            job.to_json(),
            job.digest(),
            federation.layout.digest,
            number,
            split,
            is_final,
            charter,
            as_vector(offer),
            weights,
        )

    def on_ready(site: str) -> None:
        federation.observe({"event": "judged", "round": number, "site": site, "split": split})

    session_number = secure.next_number("test") if is_final else number
    size = judgement_size(num_rows, job, is_final)
    found = secure.add_up(
        purpose,
        session_number,
        model_digest(weights),
        federation.cohort.validate,
        encode_statistics(np.zeros(size)).size,
        request,
        on_ready,
    )
    values = decode_statistics(found.total, (size,))
    return Judgement(found.sites, *split_judgement(values, num_rows, job, is_final))


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
    if federation.secure and "test" not in job.secure_aggregation.release:
        federation.folder.save_test(hidden_test(federation, state, bool(sites)))
        federation.secure.forget_sum("test", federation.secure.next_number("test"))
        return
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


def hidden_test(federation: Federation, state: RunState, has_cases: bool) -> dict[str, Any]:
    """Return the content of ``test.json`` when no site releases results of its own."""
    result: dict[str, Any] = {
        "round": state.round,
        "headline": task_module(federation.job).HEADLINE,
        "sites": {},
    }
    if not has_cases:
        return result
    judged = secure_judgement(federation, "test", state.round, state.weights)
    rows = judged.statistics[1:]

    def metrics_of(row: NDArray[np.float64]) -> Metrics:
        found: Metrics = task_module(federation.job).metrics(row, federation.job)
        return found

    result |= judged.summary(federation, 0)
    result["pooled"] = {"metrics": judged.pooled(federation, 0), "intervals": intervals(rows, metrics_of)}
    result["mean_site_intervals"] = percentiles(judged.means[1:])
    return result


def mean_site_intervals(
    replies: dict[str, EvaluateReply], metrics_of: Callable[[NDArray[np.float64]], Metrics]
) -> dict[str, list[float]]:
    """Return 95 % intervals of the mean over sites, from the sites' own resamples taken together."""
    count = len(next(iter(replies.values())).statistics) - 1
    means = [
        mean_site({site: metrics_of(reply.statistics[1 + b]) for site, reply in replies.items()})
        for b in range(count)
    ]
    return percentiles(means)


def percentiles(rows: Sequence[Metrics]) -> dict[str, list[float]]:
    """Return the 95 % interval of each metric over resamples; undefined values do not count."""
    found = {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows if not math.isnan(row[name])]
        if values:
            low, high = np.percentile(values, (2.5, 97.5))
            found[name] = [float(low), float(high)]
    return found
