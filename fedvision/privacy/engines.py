"""Which engine sums clipped gradients fastest on this machine, found by trying.

The ranking depends on network, image size, processor and GPU, so it is not written down anywhere. An engine
that fails, or differs from the loop over single patients, is not used.
"""

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedvision.privacy.networks import without_dropout
from fedvision.privacy.per_patient import (
    ENGINES,
    ClippedSum,
    Loss,
    Patient,
    Sample,
    clipped_gradient_sum,
    form,
    trained_parameters,
)

# What a network or loss raises that ``vmap`` cannot take, running out of GPU memory included.
_CANNOT = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
# Engines must agree this well in float64; in float32 one sign of a ReLU changes a gradient by up to 1e-3.
_AGREEMENT, _AGREEMENT_FLOAT32 = 1e-4, 0.05


@dataclass(frozen=True)
class EngineChoice:
    """The engine to use, and why.

    Attributes:
        engine: A key of ``per_patient.ENGINES``.
        chunk: For ``clipped_gradient_sum``.
        seconds: Time for the whole batch of each engine that works, such as "loop" and "vmap 4".
        refused: Why each of the others does not work.
    """

    engine: str
    chunk: int
    seconds: dict[str, float]
    refused: dict[str, str]


@contextlib.contextmanager
def _in_float64(network: nn.Module) -> Iterator[None]:
    """Compute in float64 inside the ``with`` block; afterwards the weights are the same tensors as before."""
    kept = [(tensor, tensor.data) for tensor in itertools.chain(network.parameters(), network.buffers())]
    try:
        for tensor, data in kept:
            if data.is_floating_point():
                tensor.data = data.double()
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def _sample_in_float64(sample: Sample) -> Sample:
    return {
        key: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in sample.items()
    }


def _difference(wanted: ClippedSum, found: ClippedSum) -> float:
    """Return the relative difference of two sums, inf if a patient's gradient is not finite."""
    if wanted.num_not_finite or found.num_not_finite:
        return math.inf
    reference = wanted.gradient.double()
    return float((found.gradient.double() - reference).norm() / reference.norm().clamp(min=1e-30))


def _disagreement(network: nn.Module, loss: Loss, patients: Sequence[Patient]) -> float:
    """Return the relative difference of ``vmap`` and ``loop`` on the first three patients."""

    def compare(some: Sequence[Patient]) -> float:
        wanted, found = (clipped_gradient_sum(network, loss, some, math.inf, name, 2) for name in ENGINES)
        return _difference(wanted, found)

    try:
        with _in_float64(network):
            return compare([[_sample_in_float64(sample) for sample in patient] for patient in patients[:3]])
    except _CANNOT:  # a network with constants in float32
        return compare(patients[:3])


def _seconds(run: Callable[[], ClippedSum], device: torch.device) -> float:
    """Return the shorter time of two runs."""
    times = []
    for _ in range(2):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def choose_engine(
    network: nn.Module, loss: Loss, patients: Sequence[Patient], chunks: Sequence[int] = (1, 2, 4, 8)
) -> EngineChoice:
    """Try the engines on this machine and return the fastest that is right.

    Which one that is depends on network, image size and processor. ``vmap`` is right if it agrees with
    ``loop`` to 1e-4 in float64, with dropout switched off; else the answer is ``loop``, with the reason.

    Args:
        network: In training mode, on its device. It is as before afterwards.
        loss: The loss that will be used.
        patients: A generated batch, at least as many as the largest chunk, with samples of the usual form.
        chunks: For ``vmap``. Memory grows with the chunk, so a volume may need the first few only.

    Raises:
        ConfigError: A layer mixes patients.
        ValueError: There are no patients.
    """
    if not patients:
        raise ValueError("choosing an engine needs a batch to try")
    device = trained_parameters(network)[0].device
    seconds: dict[str, float] = {}
    refused: dict[str, str] = {}

    def run(engine: str, chunk: int) -> ClippedSum:
        return clipped_gradient_sum(network, loss, patients, math.inf, engine, chunk)

    with without_dropout(network):
        wanted = run("loop", 1)
        seconds["loop"] = _seconds(functools.partial(run, "loop", 1), device)
        if any(form(patient) is not None for patient in patients):
            try:
                difference = _disagreement(network, loss, patients)
                if not difference <= _AGREEMENT:
                    refused["vmap"] = f"differs from the loop by {difference:.1e}"
            except _CANNOT as error:
                refused["vmap"] = _reason(error)
        else:
            refused["vmap"] = "the samples of a patient are not tensors of equal shapes"
        for chunk in () if refused else chunks:
            name = f"vmap {chunk}"
            try:
                difference = _difference(wanted, run("vmap", chunk))
                if difference <= _AGREEMENT_FLOAT32:
                    seconds[name] = _seconds(functools.partial(run, "vmap", chunk), device)
                else:
                    refused[name] = f"differs from the loop by {difference:.1e}"
            except _CANNOT as error:
                refused[name] = _reason(error)
    engine, _, chunk_text = min(seconds, key=lambda name: seconds[name]).partition(" ")
    return EngineChoice(engine, int(chunk_text or 1), seconds, refused)
