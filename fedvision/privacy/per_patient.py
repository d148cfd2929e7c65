"""The sum of clipped gradients of one patient each, the only way private training looks at images.

Rules:
- The unit is the patient. All images, slices and crops of a patient are one gradient, clipped once.
- The loss is called with samples of one patient only, so it cannot divide by, or average over, others.
- A patient's gradient is clipped over all parameters together (Abadi et al. 2016, algorithm 1).
- Engines differ in speed and memory, never in the result. ``loop`` takes one patient after the other and
  works for everything; ``vmap`` takes a chunk of patients at a time (torch.func), for most networks.
- Nothing here is noisy: only ``ClippedSum.gradient`` may leave the site, after noise was added to it.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap

from fedvision.errors import TrainingError
from fedvision.privacy.networks import check_private

# One call of the loss: what ``training_batch`` of a task gives, for one or more images of one patient.
Sample = dict[str, Any]
Patient = Sequence[Sample]
# From a network and a sample to a scalar tensor: ``training_loss`` of a task, job and device filled in.
Loss = Callable[[nn.Module, Sample], torch.Tensor]


@dataclass(frozen=True, repr=False)
class ClippedSum:
    """What the patients of one draw gave. Every field depends on patients; it has no ``repr``.

    Attributes:
        gradient: Sum of the clipped gradients, not divided by anything, float32, shape (d,), in the order of
            ``trained_parameters``, on their device. To be released with noise.
        num_patients: Size of the draw. Private under Poisson sampling: divide by the expected size.
        mean_loss: Over the patients with a finite loss; nan if there are none. Not to be released.
        share_clipped: Share of the patients whose gradient was longer than the clip norm, 0 for an empty
            draw. Not to be released.
        num_not_finite: Patients whose gradient was not finite and became zero. Not to be released.
        norms: Norm of each patient's gradient before clipping, in the order given, inf where it was not
            finite. For tests, never to be released.
    """

    gradient: torch.Tensor
    num_patients: int
    mean_loss: float
    share_clipped: float
    num_not_finite: int
    norms: tuple[float, ...]


def trained_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that train, each once, in the order of a flat gradient."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


class _Total:
    """Clips gradients and adds them up in float64, so that the order of patients does not show."""

    def __init__(self, parameters: Sequence[nn.Parameter], num_patients: int, clip_norm: float) -> None:
        self.clip_norm = clip_norm
        self.norms = [math.nan] * num_patients
        self.losses = [math.nan] * num_patients
        sizes = [parameter.numel() for parameter in parameters]
        device = parameters[0].device
        self.flat = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self._parts = [
            part.view_as(parameter)
            for part, parameter in zip(self.flat.split(sizes), parameters, strict=True)
        ]

    def add(self, patients: Sequence[int], losses: torch.Tensor, gradients: Sequence[torch.Tensor]) -> None:
        """Clip and add the gradients of some patients.

        Args:
            patients: Their numbers, n of them.
            losses: Shape (n,).
            gradients: One tensor a parameter, shape (n, *shape of the parameter).
        """
        by_parameter = [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64) for g in gradients]
        norms = torch.linalg.vector_norm(torch.stack(by_parameter), dim=0).tolist()
        for row, (patient, norm, loss) in enumerate(zip(patients, norms, losses.tolist(), strict=True)):
            self.losses[patient] = loss
            self.norms[patient] = norm if math.isfinite(norm) else math.inf
            if not math.isfinite(norm):
                continue
            factor = 1.0 if norm <= self.clip_norm else self.clip_norm / norm
            for part, gradient in zip(self._parts, gradients, strict=True):
                part.add_(gradient[row], alpha=factor)

    def result(self) -> ClippedSum:
        """Return the sum over all patients that were added."""
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        number = len(self.norms)
        return ClippedSum(
            gradient=self.flat.float(),
            num_patients=number,
            mean_loss=sum(finite) / len(finite) if finite else math.nan,
            share_clipped=sum(norm > self.clip_norm for norm in self.norms) / number if number else 0.0,
            num_not_finite=sum(math.isinf(norm) for norm in self.norms),
            norms=tuple(self.norms),
        )


Engine = Callable[[nn.Module, Loss, Sequence[Patient], int, _Total], None]


def _add_by_loop(
    network: nn.Module, loss: Loss, patients: Sequence[Patient], numbers: Sequence[int], total: _Total
) -> None:
    parameters = trained_parameters(network)
    for number in numbers:
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        value = torch.zeros((), device=parameters[0].device)
        for sample in patients[number]:
            try:
                part = loss(network, sample) / len(patients[number])
            except TrainingError:  # a detector says that its output is not finite
                part = torch.full_like(value, math.nan)
                gradients = [torch.full_like(gradient, math.nan) for gradient in gradients]
            value = value + part.detach()
            if part.requires_grad:
                found = torch.autograd.grad(part, parameters, materialize_grads=True)
                gradients = [g.add_(f) for g, f in zip(gradients, found, strict=True)]
        total.add([number], value.reshape(1), [gradient[None] for gradient in gradients])


def _loop(network: nn.Module, loss: Loss, patients: Sequence[Patient], chunk: int, total: _Total) -> None:
    """Take one sample after the other: the reference, with the least memory. ``chunk`` is not used."""
    _add_by_loop(network, loss, patients, range(len(patients)), total)


class _WithLoss(nn.Module):
    """A network and its loss as one module, for ``functional_call``."""

    def __init__(self, network: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.network, self._loss = network, loss

    def forward(self, sample: Sample) -> torch.Tensor:
        """Return the loss of a sample."""
        return self._loss(self.network, sample)


def _places(module: nn.Module) -> list[tuple[str, int]]:
    """Return where each parameter that trains is used: names, and its place in ``trained_parameters``.

    A tied parameter has several names. A module that is registered twice (MONAI's DynUNet) is named once:
    ``functional_call`` does not put its weights back when it is told both names.
    """
    order = {id(parameter): place for place, parameter in enumerate(trained_parameters(module))}
    return [
        (f"{prefix}.{name}" if prefix else name, order[id(parameter)])
        for prefix, part in module.named_modules()
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in order
    ]


def form(patient: Patient) -> Hashable:
    """Return what patients must have in common to be stacked; None if this one's samples cannot be."""
    forms = set()
    for sample in patient:
        if not all(isinstance(value, torch.Tensor) for value in sample.values()):
            return None
        forms.add(tuple((key, value.shape, value.dtype) for key, value in sorted(sample.items())))
    return (len(patient), *forms) if len(forms) == 1 else None


def _groups(patients: Sequence[Patient]) -> tuple[list[list[int]], list[int]]:
    """Return the numbers of patients of one form, group by group, and of those that go to the loop."""
    groups: dict[Hashable, list[int]] = {}
    for number, patient in enumerate(patients):
        groups.setdefault(form(patient), []).append(number)
    alone = groups.pop(None, [])
    return list(groups.values()), alone


def _batched(numbers: Sequence[int], chunk: int) -> Iterator[Sequence[int]]:
    return (numbers[start : start + chunk] for start in range(0, len(numbers), chunk))


def _vmap(network: nn.Module, loss: Loss, patients: Sequence[Patient], chunk: int, total: _Total) -> None:
    """Take ``chunk`` patients with equally many samples of equal shapes at a time, the others by the loop."""
    module = _WithLoss(network, loss)
    places = _places(module)
    parameters = tuple(parameter.detach() for parameter in trained_parameters(network))

    def patient_loss(values: tuple[torch.Tensor, ...], samples: Sample) -> torch.Tensor:
        named = {name: values[place] for name, place in places}

        def sample_loss(sample: Sample) -> torch.Tensor:
            value: torch.Tensor = functional_call(module, named, (sample,), tie_weights=False)
            return value.reshape(())

        if len(next(iter(samples.values()))) == 1:
            return sample_loss({key: value[0] for key, value in samples.items()})
        return vmap(sample_loss, randomness="different")(samples).mean()

    of_patients = vmap(grad_and_value(patient_loss), in_dims=(None, 0), randomness="different")
    groups, alone = _groups(patients)
    for numbers in itertools.chain.from_iterable(_batched(group, chunk) for group in groups):
        stacked = {
            key: torch.stack([torch.stack([sample[key] for sample in patients[n]]) for n in numbers])
            for key in patients[numbers[0]][0]
        }
        gradients, losses = of_patients(parameters, stacked)
        total.add(numbers, losses.detach(), gradients)
    _add_by_loop(network, loss, patients, alone, total)


ENGINES: dict[str, Engine] = {"loop": _loop, "vmap": _vmap}


def clipped_gradient_sum(
    network: nn.Module,
    loss: Loss,
    patients: Sequence[Patient],
    clip_norm: float,
    engine: str = "loop",
    chunk: int = 1,
) -> ClippedSum:
    """Return the sum over patients of the gradient of each one's loss, scaled down to ``clip_norm``.

    A patient's loss is the mean of ``loss`` over the patient's samples. Source: Abadi et al. 2016,
    algorithm 1, "compute gradient" and "clip gradient", with a patient in the place of an example.

    Guarantee: whatever the images hold, one patient more or less changes the sum, before it is rounded to
    float32, by a vector of norm at most clip_norm * (1 + 1e-12). Rounding adds at most 1.2e-7 * clip_norm *
    patients. A patient whose gradient has a non-finite entry adds zero. This needs a loss that keeps nothing
    between calls, see ``sensitivity.check_sensitivity``; layers that mix patients are refused here.

    Args:
        network: In training mode, on its device. Its weights and ``.grad`` do not change.
        loss: Called with samples of one patient only.
        patients: Those drawn, each with at least one sample; none is an empty draw and gives zeros.
        clip_norm: Largest norm of one patient's gradient, > 0.
        engine: A key of ``ENGINES``, best from ``engines.choose_engine``.
        chunk: How many patients ``vmap`` takes at a time: memory against time.

    Raises:
        ConfigError: A layer mixes patients.
        ValueError: An argument is out of range.
    """
    if not clip_norm > 0:
        raise ValueError(f"clip_norm must be > 0, got {clip_norm}")
    if chunk < 1:
        raise ValueError(f"chunk must be >= 1, got {chunk}")
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if not all(patients):
        raise ValueError("a patient needs at least one sample")
    check_private(network)
    parameters = trained_parameters(network)
    if not parameters:
        raise ValueError("the network has no parameter that trains")
    total = _Total(parameters, len(patients), clip_norm)
    ENGINES[engine](network, loss, patients, chunk, total)
    return total.result()


def load_gradient(network: nn.Module, gradient: torch.Tensor) -> None:
    """Set ``.grad`` of every parameter that trains from a flat gradient, for an optimiser's step.

    Args:
        network: Its parameters give order, shapes, type and device.
        gradient: Shape (d,), in the order of ``trained_parameters``, with noise and divided.
    """
    parameters = trained_parameters(network)
    parts = gradient.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter, copy=True)
