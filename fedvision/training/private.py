"""Local training that keeps a promise to each patient: gradients clipped patient by patient, and noise.

Modes, see ``config.PrivacySection``:

- ``distributed``: one sum of clipped gradients a round, of patients that were drawn by chance. It leaves the
  site with this site's share of the noise, under secure aggregation; the server takes the step.
- ``local``: the same sum at every step, with all of the noise, and the site's own optimiser takes the step
  (DP-SGD; Abadi et al. 2016, algorithm 1). What leaves is an update like any other.

Rules:
- A patient is drawn with the same probability as any other, on his own, each time anew (Poisson sampling).
  All that a drawn patient adds is clipped once, however many images he has.
- Who is drawn and the noise come from the operating system. They are never drawn from the job's seed: who
  knows the seed would take the noise off. So a private run cannot be repeated bit for bit.
- The mean training loss is not known outside: it says something about every patient, without noise.
"""

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedvision.config import Job
from fedvision.data.manifest import Case
from fedvision.data.readers import CaseStore
from fedvision.privacy.accounting import accounted_noise, check_delta, delta_for
from fedvision.privacy.engines import choose_engine
from fedvision.privacy.noise import discrete_gaussian
from fedvision.privacy.per_patient import ClippedSum, clipped_gradient_sum, load_gradient
from fedvision.privacy.sensitivity import check_sensitivity, sum_of
from fedvision.seeds import derive_seed
from fedvision.tasks import task_module
from fedvision.training.charter import NoisePlan
from fedvision.training.loop import TrainingResult, learning_rate, make_optimizer
from fedvision.updates.layout import FloatVector, Layout, flatten, float_tensors

STEPS_OF_CLIP_NORM = 1 << 20
"""Fixed-point steps of a clip norm, to which a clipped sum is rounded before noise is added (``local``)."""
MOST_IMAGES = 4
"""Images of one patient in a step; of more, so many are drawn."""
TRIED, CHUNKS = 8, (4, 8)
"""Patients with which engines and the sensitivity are tried, and how many of them at a time."""
_chance = random.SystemRandom()


@dataclass(frozen=True)
class Patients:
    """The training patients of a site.

    Attributes:
        cases: The cases of each patient, by patient.
        rate: Probability with which a patient is drawn.
    """

    cases: Mapping[str, Sequence[Case]]
    rate: float

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.cases)


def patients_of(cases: Sequence[Case], job: Job) -> Patients:
    """Return a site's training patients, and how likely each is drawn.

    Args:
        cases: The site's training cases; a case without a patient counts as one of its own.
        job: Its ``privacy.patients`` is how many are drawn on average; at most all.
    """
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(case.patient, []).append(case)
    return Patients(found, min(1.0, job.privacy.patients / max(len(found), 1)))


def draw(patients: Patients) -> list[str]:
    """Return the patients of a step, each drawn by itself; may be none."""
    return [name for name in patients.cases if _chance.random() < patients.rate]


class PrivateGradient:
    """Sums of clipped gradients of one network at one site; the engine is chosen once, by a few tries.

    Args:
        network: On ``device``.
        job: What to do.
        store: Reads the site's cases.
        patients: Of the site.
        device: Where to compute.
    """

    def __init__(
        self, network: nn.Module, job: Job, store: CaseStore, patients: Patients, device: torch.device
    ) -> None:
        self.network = network
        self.job = job
        self.patients = patients
        self._store = store
        self._device = device
        self._engine: tuple[str, int] | None = None

    def loss(self, network: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """Return the loss of one image."""
        loss: torch.Tensor = task_module(self.job).training_loss(network, batch, self.job, self._device)
        return loss

    def images(self, patient: str, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Return a crop of each of a patient's images, of some if there are many."""
        cases = list(self.patients.cases[patient])
        if len(cases) > MOST_IMAGES:
            cases = [cases[index] for index in sorted(rng.choice(len(cases), MOST_IMAGES, replace=False))]
        task = task_module(self.job)
        return [task.training_batch([self._store.load(case)], self.job, rng) for case in cases]

    def sum(self, rng: np.random.Generator) -> ClippedSum:
        """Draw patients and return the sum of their clipped gradients."""
        self.network.train()
        drawn = [self.images(patient, rng) for patient in draw(self.patients)]
        if self._engine is None and drawn:
            found = choose_engine(self.network, self.loss, drawn[:1] * TRIED, CHUNKS)
            self._check_sensitivity(drawn[:TRIED], found.engine, found.chunk)
            self._engine = found.engine, found.chunk
        engine, chunk = self._engine or ("loop", 1)
        clip_norm = self.job.privacy.clip_norm
        return clipped_gradient_sum(self.network, self.loss, drawn, clip_norm, engine, chunk)

    def _check_sensitivity(self, drawn: list[list[dict[str, Any]]], engine: str, chunk: int) -> None:
        """Measure that one patient more or less changes the sum by no more than the clip norm.

        Raises:
            ConfigError: It does: the network or the loss carries something from one patient to another.
        """
        norms = clipped_gradient_sum(self.network, self.loss, drawn, 1.0, engine, chunk).norms
        typical = float(np.median([norm for norm in norms if math.isfinite(norm)] or [1.0])) or 1.0
        with torch.random.fork_rng(devices=[]):
            measured = sum_of(self.network, self.loss, engine, chunk)
            check_sensitivity(measured, drawn, [share * typical for share in (0.3, 1.0)])


def crops_rng(job: Job, number: int, site: str) -> np.random.Generator:
    """Return what crops and augmentation of a round are drawn from; it hides nothing."""
    seed = derive_seed(job.seed, "train", number, site)
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def descent(gradient: torch.Tensor, network: nn.Module, layout: Layout) -> FloatVector:
    """Return minus a gradient as an update of the global weights; zero for buffers.

    Args:
        gradient: Shape (k,), in the order of the network's parameters that train.
        network: Its values are lost.
        layout: Of the global weights, shape (d,).
    """
    with torch.no_grad():
        for tensor in float_tensors(network).values():
            tensor.zero_()
        start = 0
        for parameter in network.parameters():
            if parameter.requires_grad:
                part = gradient[start : start + parameter.numel()]
                parameter.copy_(-part.reshape(parameter.shape))
                start += parameter.numel()
    return flatten(network, layout)


def train_privately(gradient: PrivateGradient, round_number: int, site: str) -> TrainingResult:
    """Train a network in place for one round of mode ``local``.

    Args:
        gradient: Of a network with the round's global weights loaded. ``training.steps`` steps are taken, or
            ``training.epochs`` over the sampling rate.
        round_number: 1 is the first.
        site: The site's name.

    Returns:
        A result whose loss stays at the site.
    """
    job, rng = gradient.job, crops_rng(gradient.job, round_number, site)
    optimizer = make_optimizer(gradient.network.parameters(), job, learning_rate(job, round_number))
    num_steps = private_steps(job, gradient.patients)
    started, losses = time.perf_counter(), []
    for _ in range(num_steps):
        found = gradient.sum(rng)
        losses.append(found.mean_loss)
        load_gradient(gradient.network, with_noise(found.gradient, job) / job.privacy.patients)
        optimizer.step()
    known = [loss for loss in losses if math.isfinite(loss)]
    loss = sum(known) / len(known) if known else math.nan
    return TrainingResult(loss, num_steps, time.perf_counter() - started)


def private_steps(job: Job, patients: Patients) -> int:
    """Return how many times a round draws patients at a site."""
    if job.privacy.mode == "distributed":
        return 1
    if job.training.steps is not None:
        return job.training.steps
    assert job.training.epochs is not None
    return max(1, math.ceil(job.training.epochs / patients.rate))


def with_noise(gradient: torch.Tensor, job: Job) -> torch.Tensor:
    """Return a clipped sum on the fixed-point grid with a site's whole noise, float32, shape (k,)."""
    unit = job.privacy.clip_norm / STEPS_OF_CLIP_NORM
    whole = np.rint(gradient.double().cpu().numpy() / unit)
    noise = discrete_gaussian(whole.size, job.privacy.noise_multiplier * STEPS_OF_CLIP_NORM)
    return torch.from_numpy(((whole + noise) * unit).astype(np.float32))


def counted_noise(job: Job, size: int, plan: NoisePlan, num_patients: int) -> tuple[float, float]:
    """Return the noise multipliers that count: if secure aggregation holds, and of one site alone.

    The sum of clipped gradients is rounded to integers before noise is added, which lets one patient change
    it by a little more than the clip norm.

    Args:
        job: Its ``privacy`` section.
        size: Weights of the model.
        plan: Of the charter.
        num_patients: Of the site.
    """
    if job.privacy.mode == "local":
        noise = accounted_noise(job.privacy.noise_multiplier, size, STEPS_OF_CLIP_NORM, patients=num_patients)
        return noise, noise
    steps = plan.scale * plan.patient_clip_norm / job.aggregation.clip_norm
    together = accounted_noise(plan.noise_multiplier, size, steps, plan.num_honest, num_patients)
    share = plan.noise_multiplier / math.sqrt(plan.num_honest)
    return together, accounted_noise(share, size, steps, patients=num_patients)


def delta_of(job: Job, patients: Patients) -> float:
    """Return the job's delta, or the usual one for so many patients.

    Raises:
        ConfigError: The job's is larger than one over the number of patients: it would allow to publish one.
    """
    if job.privacy.delta is None:
        return delta_for(patients.count)
    check_delta(job.privacy.delta, patients.count)
    return job.privacy.delta
