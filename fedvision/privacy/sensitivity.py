"""A brute-force test of the promise that one patient changes a clipped sum by at most the clip norm.

The noise is right only if that holds, and it breaks without an error: a loss that divides by something of
the whole batch, a layer that mixes patients, a loss that remembers. So it is measured, for every network and
loss on offer: the sum is computed for a batch and for its neighbours, and the changes are compared.

A factor of 1.0 is right, less if no gradient is clipped. The test can show that a sum is wrong, not that it
is right for all images.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from fedvision.errors import ConfigError
from fedvision.privacy.networks import without_dropout
from fedvision.privacy.per_patient import Loss, Patient, Sample, clipped_gradient_sum

# From patients and a clip norm to the sum of clipped gradients, shape (d,).
GradientSum = Callable[[Sequence[Patient], float], torch.Tensor]

LARGEST_FACTOR = 1.001  # the sums are rounded to float32
_BRIGHTER = 100.0
_IMAGES = ("image", "images")


def sum_of(network: nn.Module, loss: Loss, engine: str = "loop", chunk: int = 1) -> GradientSum:
    """Return ``clipped_gradient_sum`` as a function to be measured, with dropout switched off.

    A loss that draws random numbers otherwise (Faster R-CNN's samplers) must draw the same ones for the same
    patient whenever it is called, or the measured factor is too large.
    """

    def gradient_sum(patients: Sequence[Patient], clip_norm: float) -> torch.Tensor:
        with without_dropout(network):
            return clipped_gradient_sum(network, loss, patients, clip_norm, engine, chunk).gradient

    return gradient_sum


def _outlier(patient: Patient) -> list[Sample]:
    """Return a patient with the same labels and an image 100 times as bright."""
    return [
        {key: value * _BRIGHTER if key in _IMAGES else value for key, value in sample.items()}
        for sample in patient
    ]


def largest_change(gradient_sum: GradientSum, patients: Sequence[Patient], clip_norm: float) -> float:
    """Return the largest norm of the change of the sum over neighbours of a batch, in clip norms.

    Neighbours: each patient removed in turn, and one added whose image is 100 times as bright as the first
    patient's.

    Args:
        gradient_sum: What is measured.
        patients: At least two, with different images and labels: with different shares of foreground, say.
            The image of a sample is under ``image`` or ``images``.
        clip_norm: Below the patients' gradient norms, or the factor says little.

    Returns:
        The factor, 1.0 if the sum is right; inf if a change is not finite.

    Raises:
        ValueError: There are fewer than two patients.
    """
    if len(patients) < 2:
        raise ValueError(f"patients must be at least 2, got {len(patients)}")
    batch = list(patients)
    neighbours = [batch[:left] + batch[left + 1 :] for left in range(len(batch))]
    neighbours.append([*batch, _outlier(batch[0])])
    whole = gradient_sum(batch, clip_norm).double()
    largest = 0.0
    for neighbour in neighbours:
        change = float((gradient_sum(neighbour, clip_norm).double() - whole).norm())
        largest = max(largest, change) if change < float("inf") else float("inf")
    return largest / clip_norm


def check_sensitivity(
    gradient_sum: GradientSum, patients: Sequence[Patient], clip_norms: Sequence[float]
) -> float:
    """Refuse a sum that one patient can change by more than the clip norm.

    Args:
        gradient_sum: As for ``largest_change``.
        patients: As for ``largest_change``.
        clip_norms: All are tried. Below, at and above the median of the patients' norms finds most.

    Returns:
        The largest factor found, at most 1.001.

    Raises:
        ConfigError: A factor is above 1.001; it is named.
    """
    largest = 0.0
    for clip_norm in clip_norms:
        factor = largest_change(gradient_sum, patients, clip_norm)
        if not factor <= LARGEST_FACTOR:
            raise ConfigError(
                f"one patient changes the clipped sum by {factor:.3f} clip norms, 1 is the most allowed",
                "the loss or a layer looks at several patients at once: normalise within one image, and keep "
                "nothing between calls",
            )
        largest = max(largest, factor)
    return largest
