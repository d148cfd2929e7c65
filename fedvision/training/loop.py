"""One round of local training: batches in, new weights out, on one device."""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedvision.config import Job
from fedvision.data.manifest import Case
from fedvision.data.readers import CaseStore, Sample
from fedvision.errors import TrainingError
from fedvision.seeds import derive_seed
from fedvision.tasks import task_module


@dataclass(frozen=True)
class TrainingResult:
    """What one round of local training did. ``loss`` is the mean over its steps."""

    loss: float
    num_steps: int
    seconds: float


def steps_per_round(job: Job, num_cases: int) -> int:
    """Return the number of optimiser steps of one round at a site with ``num_cases`` training cases."""
    if job.training.steps is not None:
        return job.training.steps
    assert job.training.epochs is not None
    return max(1, round(job.training.epochs * num_cases / job.training.batch_size))


def learning_rate(job: Job, round_number: int) -> float:
    """Return the learning rate of a round, 1 being the first."""
    if job.training.learning_rate_schedule == "constant" or job.rounds == 1:
        return job.training.learning_rate
    progress = (round_number - 1) / (job.rounds - 1)
    return job.training.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def case_batches(cases: Sequence[Case], batch_size: int, rng: np.random.Generator) -> Iterator[list[Case]]:
    """Yield batches without end: every case once, shuffled, then shuffled again.

    A batch may span two passes, so every batch is full, however few cases there are.
    """
    queue: list[Case] = []
    while True:
        while len(queue) < batch_size:
            queue += [cases[i] for i in rng.permutation(len(cases))]
        yield queue[:batch_size]
        del queue[:batch_size]


def make_optimizer(parameters: Iterable[nn.Parameter], job: Job, rate: float) -> torch.optim.Optimizer:
    """Return a fresh optimiser over those parameters that train."""
    settings = job.training
    parameters = [p for p in parameters if p.requires_grad]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, settings.momentum, weight_decay=settings.weight_decay)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, rate, weight_decay=settings.weight_decay)


def train(
    network: nn.Module,
    job: Job,
    store: CaseStore,
    cases: Sequence[Case],
    round_number: int,
    site: str,
    device: torch.device,
) -> TrainingResult:
    """Train ``network`` in place for one round.

    All randomness (order, crops, augmentation, dropout) comes from the job's seed, the round and the
    site, so a round that is done again gives the same weights on the same machine.

    Args:
        network: On ``device``, with the round's global weights loaded.
        job: What to do.
        store: Reads and keeps the site's cases.
        cases: The site's training cases, at least one.
        round_number: 1 is the first.
        site: The site's name.
        device: Where to compute.

    Raises:
        TrainingError: The loss is not finite at some step.
    """
    task = task_module(job)
    seed = derive_seed(job.seed, "train", round_number, site)
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    optimizer = make_optimizer(network.parameters(), job, learning_rate(job, round_number))
    scaler = torch.amp.GradScaler(device.type, enabled=job.training.amp == "fp16")
    batches = case_batches(cases, job.training.batch_size, rng)
    num_steps = steps_per_round(job, len(cases))
    total = torch.zeros((), device=device)
    started = time.perf_counter()
    network.train()
    for step in range(1, num_steps + 1):
        samples: list[Sample] = [store.load(case) for case in next(batches)]
        batch = task.training_batch(samples, job, rng)
        optimizer.zero_grad(set_to_none=True)
        with autocast(job, device):
            loss = task.training_loss(network, batch, job, device)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is not finite at step {step} of round {round_number}",
                "lower training.learning_rate, set training.gradient_clip, or run `fedvision data check`",
            )
        scaler.scale(loss).backward()
        if job.training.gradient_clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), job.training.gradient_clip)
        scaler.step(optimizer)
        scaler.update()
        total += loss.detach()
    return TrainingResult(float(total) / num_steps, num_steps, time.perf_counter() - started)


def autocast(job: Job, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return the mixed-precision context of the job, or one that does nothing."""
    if job.training.amp == "off":
        return contextlib.nullcontext()
    dtype = torch.bfloat16 if job.training.amp == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)
