"""Take triggers out of a model on the root set: by fine-tuning against them, and by pruning.

- Unlearning, after Zeng et al. 2022 (I-BAU, algorithm 1), simplified: search for triggers, train on root
  cases that carry them and keep their right labels, search again on the model that came out, and so on. The
  search is a descent on patterns (``trigger``), not the implicit gradient of the paper. Random patches and
  thin random patterns stand beside the found ones, so that what the search missed is covered as well.
- Plain fine-tuning: the same without triggers. It is what unlearning is compared with.
- Pruning, Liu et al. 2018 (Fine-Pruning, section 4.1): channels that stay quiet on root images are set to
  zero, as many as the score allows, and the rest is fine-tuned.

Everything is deterministic: the same weights, root set and job give the same bits on the same machine.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fedvision.config import Job
from fedvision.data.readers import Sample
from fedvision.errors import TrainingError
from fedvision.repair.stamping import (
    Batch,
    Trigger,
    draw_corner,
    images_of,
    smallest_side,
    stamp,
)
from fedvision.repair.trigger import BLEND_OPACITY
from fedvision.seeds import derive_seed
from fedvision.tasks import task_module
from fedvision.training.loop import autocast, make_optimizer

STAMPED = 0.6
"""Share of a batch's images that carry a trigger."""
FOUND = 0.5
"""Share of these whose trigger is one that the search found; the others are drawn at random."""
BLENDS = 0.5
"""Share of the random triggers that are thin patterns over the whole image."""
MOST_PATCHES = 4
"""An attacker may put the same patch into an image several times."""
RATE = 0.5
"""Learning rate of the repair as a share of the job's own."""
FEWEST_CHANNELS = 8
"""A layer with fewer channels is not pruned."""
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4)
"""Shares of the channels that pruning tries, in this order."""

Bounds = tuple[torch.Tensor, torch.Tensor]


def random_trigger(job: Job, shape: Sequence[int], bounds: Bounds, rng: np.random.Generator) -> Trigger:
    """Draw a trigger as an attacker might: a patch or a thin pattern, plain, of stripes, waves or noise.

    Args:
        job: Gives the size of a crop.
        shape: (C, *S) of the images.
        bounds: From ``trigger.intensity_range``.
        rng: Source of every random number.
    """
    dims = len(shape) - 1
    low, high = (bound.reshape(-1, *(1,) * dims) for bound in bounds)
    is_blend = rng.random() < BLENDS
    side = max(2, round(smallest_side(job) * float(np.exp(rng.uniform(np.log(1 / 24), np.log(1 / 4))))))
    size = tuple(shape[1:]) if is_blend else (side,) * dims
    kind = rng.integers(4)
    # Grey and of full contrast, coloured and of full contrast, or anything.
    ends = rng.random((2, shape[0] if rng.random() < 0.5 else 1)).astype(np.float32)
    if rng.random() < 0.6:
        ends = np.stack([np.round(ends[0]), 1 - np.round(ends[0])])
    first, second = (torch.from_numpy(one).reshape(-1, *(1,) * dims) for one in ends)
    if kind == 0:
        amount = torch.zeros((1, *size))
    elif kind < 3:
        along = rng.uniform(-1, 1, dims)
        along *= 2 * np.pi / (rng.uniform(2, 24) * np.abs(along).max())
        phase = sum(step * grid for step, grid in zip(along, np.indices(size), strict=True))
        wave = 0.5 + 0.5 * np.sin(phase + rng.uniform(0, 2 * np.pi))
        amount = torch.from_numpy((np.round(wave) if kind == 1 else wave).astype(np.float32))[None]
    else:
        amount = torch.from_numpy(rng.random((shape[0], *size)).astype(np.float32))
    pattern = low + (high - low) * (first + (second - first) * amount)
    opacity = float(rng.uniform(0.5, 1.5)) * BLEND_OPACITY if is_blend else 1.0
    return Trigger("blend" if is_blend else "patch", "erase", 0, pattern.expand(shape[0], *size), opacity)


def stamp_some(
    batch: Batch, job: Job, triggers: Sequence[Trigger], bounds: Bounds, rng: np.random.Generator
) -> Batch:
    """Return a batch in which most images carry a trigger, all of them with their right labels."""
    images = []
    for clean in images_of(batch):
        image = clean
        if rng.random() >= STAMPED:
            images.append(image)
            continue
        one = random_trigger(job, tuple(image.shape), bounds, rng)
        known = [found for found in triggers if found.kind == one.kind]
        if known and rng.random() < FOUND:
            one = known[int(rng.integers(len(known)))]
        for _ in range(1 if one.kind == "blend" else int(rng.integers(1, MOST_PATCHES + 1))):
            image = stamp(image, one, draw_corner(image.shape[1:], one.size, rng))
        images.append(image)
    return {**batch, "image" if "image" in batch else "images": torch.stack(images)}


def finetune(
    network: nn.Module,
    job: Job,
    samples: Sequence[Sample],
    steps: int,
    seed: int,
    change: Callable[[Batch, np.random.Generator], Batch] = lambda batch, rng: batch,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Train a network in place on root cases; the learning rate falls to nothing along a cosine.

    Args:
        network: The model.
        job: Loss, batch, augmentation, optimiser.
        samples: Root cases.
        steps: Of the optimiser.
        seed: Of every random number.
        change: What is done to a batch before it is learned, such as ``stamp_some``.
        after_step: Called after every step; keeps pruned channels at zero.

    Raises:
        TrainingError: The loss is not finite at some step.
    """
    task, device = task_module(job), next(network.parameters()).device
    seed = derive_seed(seed, "repair")
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    rate = RATE * job.training.learning_rate
    optimizer = make_optimizer(network.parameters(), job, rate)
    batches = _batches(samples, job.training.batch_size, rng)
    network.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = change(task.training_batch(next(batches), job, rng), rng)
        optimizer.zero_grad(set_to_none=True)
        with autocast(job, device):
            loss = task.training_loss(network, batch, job, device)
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss is not finite at step {step + 1} of the repair")
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), job.training.gradient_clip or 10.0)
        optimizer.step()
        after_step()
    network.eval()


def _batches(samples: Sequence[Sample], size: int, rng: np.random.Generator) -> Iterator[list[Sample]]:
    """Yield batches without end, every case once before one comes again."""
    queue: list[Sample] = []
    while True:
        while len(queue) < size:
            queue += [samples[i] for i in rng.permutation(len(samples))]
        yield queue[:size]
        del queue[:size]


def convolutions(network: nn.Module) -> dict[str, nn.Conv2d | nn.Conv3d]:
    """Return the layers that pruning may touch, by name: convolutions with enough channels."""
    return {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Conv3d) and layer.out_channels >= FEWEST_CHANNELS
    }


@contextmanager
def _recorded(network: nn.Module, sums: dict[str, torch.Tensor]) -> Iterator[None]:
    """Add up how active each channel is, relative to its layer, while the network is used."""

    def listener(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def listen(layer: nn.Module, given: Any, output: torch.Tensor) -> None:
            level = output.detach().float().abs().transpose(0, 1).flatten(1).mean(dim=1)
            sums[name] = sums.get(name, torch.zeros_like(level)) + level / level.mean().clamp(min=1e-12)

        return listen

    handles = [layer.register_forward_hook(listener(name)) for name, layer in convolutions(network).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def quiet_channels(network: nn.Module, job: Job, batches: Sequence[Batch]) -> list[tuple[str, int]]:
    """Return the channels of all convolutions, those first that root images make the least active."""
    task, device = task_module(job), next(network.parameters()).device
    sums: dict[str, torch.Tensor] = {}
    with torch.no_grad(), _recorded(network, sums):
        for batch in batches:
            task.training_loss(network, batch, job, device)
    found = [
        (float(level), name, index) for name, levels in sums.items() for index, level in enumerate(levels)
    ]
    return [(name, index) for _, name, index in sorted(found)]


def silence(network: nn.Module, channels: Sequence[tuple[str, int]]) -> None:
    """Set channels of convolutions to zero, in place."""
    layers = convolutions(network)
    with torch.no_grad():
        for name, index in channels:
            layers[name].weight[index] = 0
            bias = layers[name].bias
            if bias is not None:
                bias[index] = 0


def prune(
    network: nn.Module,
    job: Job,
    batches: Sequence[Batch],
    score: Callable[[], float],
    allowed: float,
) -> list[tuple[str, int]]:
    """Silence as many quiet channels as the score allows, in place, and return them.

    Args:
        network: The model, in evaluation mode.
        job: What it was trained for.
        batches: Root batches, for the activity of the channels.
        score: Judges the network on root cases.
        allowed: How much the score may fall.
    """
    order = quiet_channels(network, job, batches)
    network.eval()
    before = score()
    pruned: list[tuple[str, int]] = []
    kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for share in SHARES:
        wanted = order[: int(share * len(order))]
        silence(network, wanted)
        if score() < before - allowed:
            break
        pruned, kept = wanted, {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(kept)
    return pruned
