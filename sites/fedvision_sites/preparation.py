"""A job made ready at a site: parsed, its network built, its pictures drawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn

from fedvision.config import Job
from fedvision.data.manifest import Case
from fedvision.data.readers import Sample
from fedvision.errors import MessageError
from fedvision.tasks import CaseResult, initial_network, local_names
from fedvision.updates.layout import Layout, float_tensors, layout_of


@dataclass(frozen=True)
class Prepared:
    """A job made ready at this site: parsed, checked, with network and data at hand."""

    job: Job
    network: nn.Module
    layout: Layout
    local: frozenset[str]
    initial_local: dict[str, torch.Tensor]
    device: torch.device


def build(job: Job) -> Prepared:
    """Return a job with its network."""
    network = initial_network(job)
    local = local_names(network, job)
    layout = layout_of(network, local)
    own = float_tensors(network)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kept = {name: own[name].clone() for name in sorted(local)}
    return Prepared(job, network.to(device), layout, local, kept, device)


def parse_sent_job(job_json: str, job_digest: str) -> Job:
    """Validate a job that came in a message.

    Raises:
        MessageError: It does not validate, or is not the job of that digest.
    """
    try:
        job = Job.model_validate_json(job_json)
    except ValidationError:
        raise MessageError("the sent job is not valid for this version of fedvision") from None
    if job.digest() != job_digest or job.data is not None:
        raise MessageError("the sent job does not have the announced digest")
    return job


def draw_examples(
    folder: Path,
    site: str,
    job: Job,
    ordered: Sequence[Case],
    judge: Callable[[Sequence[Case]], list[tuple[Sample, CaseResult]]],
) -> None:
    """Draw the best, median and worst case, ``ordered`` from worst to best, into a folder of the site."""
    from fedvision.report.examples import draw_example

    if not ordered:
        return
    chosen = {"worst": ordered[0], "median": ordered[len(ordered) // 2], "best": ordered[-1]}
    for label, case in chosen.items():
        ((sample, result),) = judge([case])
        draw_example(sample, result, job, folder / f"{label}.png", f"{site}: {label} test case")
