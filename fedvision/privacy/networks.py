"""Which networks keep patients apart, and how to make one that does.

A gradient belongs to one patient only if no layer looks at another patient: neither at one in the same
batch, nor through statistics of images seen earlier.

- Batch norm of any kind mixes: by the statistics of the batch in training, by running statistics later. So
  does a batch norm without weights (affine=False), which some validators let pass, and a frozen one.
- Layers that normalise within one image are fine: GroupNorm, LayerNorm, InstanceNorm without running
  statistics. ``FrozenBatchNorm2d`` (torchvision) is fine: its statistics are constants.
- Random layers such as dropout are fine: what they draw does not depend on any patient.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from fedvision.errors import ConfigError

_RUNNING = ("running_mean", "running_var")
_LARGEST_GROUPS = 8


def _mixes(layer: nn.Module) -> bool:
    if isinstance(layer, _BatchNorm):
        return True
    if isinstance(layer, _InstanceNorm):
        return bool(layer.track_running_stats) or layer.running_mean is not None
    if type(layer).__name__.startswith("Frozen"):
        return False
    return any(name in _RUNNING for name, _ in layer.named_buffers(recurse=False))


def mixing_layers(network: nn.Module) -> list[str]:
    """Return the names of the layers that mix patients, one that is registered twice under its first name.

    Known by kind (batch norm, instance norm with running statistics) or by buffers named ``running_mean`` or
    ``running_var``. A network's own way of mixing is not seen here; ``leaks_between_patients`` looks for it.
    """
    return [name for name, layer in network.named_modules() if _mixes(layer)]


def check_private(network: nn.Module) -> None:
    """Refuse a network with a layer that mixes patients.

    Raises:
        ConfigError: With the layer's name and what to use instead.
    """
    mixing = mixing_layers(network)
    if mixing:
        name = mixing[0]
        layer = network.get_submodule(name)
        raise ConfigError(
            f"layer {name or 'the network itself'} ({type(layer).__name__}) mixes the images of several "
            "patients, which private training does not allow",
            'use group or instance norm without running statistics, such as model.args.norm = "group" '
            "(norm_name in some networks); privacy.networks.make_private does it for a network of your own",
        )


def num_groups(channels: int) -> int:
    """Return the groups of a GroupNorm: the largest divisor of ``channels`` up to 8 that leaves two a group.

    One channel a group would be instance norm, which loses the brightness of a channel and fails where one
    voxel is left. A prime number of channels gives one group.
    """
    return max(
        n for n in range(1, _LARGEST_GROUPS + 1) if channels % n == 0 and (n == 1 or 2 * n <= channels)
    )


def _replacement(layer: nn.Module) -> nn.Module | None:
    """Return a layer that does not mix patients, with the same weights; None if there is no known one."""
    new: nn.Module
    if isinstance(layer, _BatchNorm):
        new = nn.GroupNorm(num_groups(layer.num_features), layer.num_features, layer.eps, layer.affine)
    elif isinstance(layer, _InstanceNorm):
        new = type(layer)(layer.num_features, layer.eps, affine=layer.affine)
    else:
        return None
    if layer.affine:
        new.weight, new.bias = layer.weight, layer.bias
    new.train(layer.training)
    return new


def make_private(network: nn.Module) -> tuple[nn.Module, list[str]]:
    """Exchange what mixes patients, or stands in the way of per-patient gradients, in place.

    Batch norm becomes GroupNorm with ``num_groups`` groups and the same weights and eps; instance norm loses
    its running statistics; activations no longer work in place. A network trained with batch norm has to be
    trained again. No random numbers are drawn. A layer with running statistics of an unknown kind stays, and
    ``check_private`` refuses it.

    Returns:
        The network (another object only if it is itself such a layer), and one line a change.
    """
    changes: list[str] = []
    replaced: dict[int, nn.Module] = {}
    for name, layer in list(network.named_modules(remove_duplicate=False)):
        if getattr(layer, "inplace", False) is True:
            layer.inplace = False
            changes.append(f"{name or 'network'}: {type(layer).__name__} no longer in place")
        if not _mixes(layer):
            continue
        if id(layer) not in replaced:
            new = _replacement(layer)
            if new is None:
                continue
            replaced[id(layer)] = new
            changes.append(f"{name or 'network'}: {type(layer).__name__} -> {new}")
        if not name:
            return replaced[id(layer)], changes
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, replaced[id(layer)])
    return network, changes


@contextlib.contextmanager
def without_dropout(network: nn.Module) -> Iterator[None]:
    """Switch dropout and stochastic depth off inside the ``with`` block, so that two runs can be compared."""
    layers = [
        layer
        for layer in network.modules()
        if (isinstance(layer, _DropoutNd) or type(layer).__name__ in ("DropPath", "StochasticDepth"))
        and layer.training
    ]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """Yield the floating-point tensors of a network's output."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, Iterable):
        for value in output:
            yield from _tensors(value)


def _per_image(output: Any) -> torch.Tensor:
    """Return a random weighted sum of each image's output, shape (B,)."""
    generator = torch.Generator().manual_seed(0)
    sums = []
    for tensor in _tensors(output):
        flat = tensor.flatten(1)
        weights = torch.randn(flat.shape[1], generator=generator).to(flat)
        sums.append(flat @ weights)
    return torch.stack(sums).sum(dim=0)


def leaks_between_patients(network: nn.Module, batch: torch.Tensor) -> bool:
    """Say whether the output for one image depends on another image of the batch, or on an earlier one.

    Three tests, in the mode the network is in: the gradient of one image's output with respect to another
    image is exactly zero; other images in the others' places change nothing (which also finds statistics
    that are detached); no floating-point buffer changes. Buffers are put back afterwards.

    Args:
        network: From (B, ...) to tensors that begin with B, or a list or dict of such.
        batch: Images of B >= 2 patients, shape (B, C, *S).

    Raises:
        ValueError: The batch has fewer than two images.
    """
    if len(batch) < 2:
        raise ValueError(f"batch must hold at least 2 images, got {len(batch)}")
    kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
    try:
        with without_dropout(network):
            images = batch.detach().clone().requires_grad_(True)
            values = _per_image(network(images))
            for row in range(len(batch)):
                (gradient,) = torch.autograd.grad(values[row], images, retain_graph=True)
                others = torch.cat([gradient[:row], gradient[row + 1 :]])
                if not bool((others == 0).all()):
                    return True
            with torch.no_grad():
                changed = torch.cat([batch[:1], 1 - 3 * batch[1:].flip(-1)])
                moved = (_per_image(network(changed))[0] - values[0]).abs()
        is_same = bool(moved <= 1e-4 * values[0].abs().clamp(min=1e-3))
        buffers = dict(network.named_buffers())
        stayed = all(torch.equal(buffers[name], old) for name, old in kept.items() if old.is_floating_point())
        return not (is_same and stayed)
    finally:
        with torch.no_grad():
            for name, buffer in network.named_buffers():
                buffer.copy_(kept[name])
