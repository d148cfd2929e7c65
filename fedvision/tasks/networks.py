"""Segmentation networks by name: MONAI's, with MONAI's own argument names, or the user's function.

- What the job already says (dimensions, channels, patch) is filled in; ``model.args`` gives the rest; what
  is left gets a default that is small and safe to federate.
- No default has running statistics. ``norm = "group"`` needs no number of groups: it is chosen for each
  layer. MONAI's AttentionUnet has no argument for its normalisation; here it has ``norm``.
- A network is tried on its patch before anything trains, on tensors without data, which takes milliseconds.
"""

import copy
import difflib
import inspect
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fedvision.config import Job
from fedvision.errors import ModelError
from fedvision.tasks.own_network import MISFIT, build_own_network

Args = dict[str, Any]

_FILLED = {"spatial_dims": "task.spatial_dims", "in_channels": "task.in_channels",
           "out_channels": "task.classes", "img_size": "training.patch_size"}  # fmt: skip
_INSTANCE = ("instance", {"affine": True})


def _depth(job: Job) -> int:
    """Return how often a U-Net of default size halves the patch: 4 times, or less if that is too small."""
    assert job.training.patch_size is not None, "the job file gives a patch for segmentation"
    depth = 4
    while depth > 2 and any(size % 2**depth or size < 4 * 2**depth for size in job.training.patch_size):
        depth -= 1
    return depth


def _widths(levels: int) -> tuple[int, ...]:
    return tuple(min(16 * 2**level, 256) for level in range(levels))


def _channels_and_strides(job: Job, args: Args) -> Args:
    """Return defaults for ``channels`` and ``strides``; one that is given sets the length of the other."""
    if "strides" in args and isinstance(args["strides"], Sequence):
        levels = len(args["strides"]) + 1
    elif "channels" in args and isinstance(args["channels"], Sequence):
        levels = len(args["channels"])
    else:
        levels = _depth(job) + 1
    return {"channels": _widths(levels), "strides": (2,) * (levels - 1)}


def _dyn_unet(job: Job, args: Args) -> Args:
    strides = args.get("strides", (1, *(2,) * _depth(job)))
    levels = len(strides) if isinstance(strides, Sequence) else 1
    return {
        "kernel_size": (3,) * levels,
        "strides": strides,
        "upsample_kernel_size": strides[1:] if isinstance(strides, Sequence) else strides,
        "filters": _widths(levels),
        "norm_name": _INSTANCE,
    }


def _fixed(**defaults: Any) -> Callable[[Job, Args], Args]:
    return lambda job, args: defaults


def _u_net(job: Job, args: Args) -> Args:
    return {**_channels_and_strides(job, args), "num_res_units": 2, "norm": _INSTANCE}


# Name in MONAI -> defaults from the job and from the arguments that were given.
NETWORKS: dict[str, Callable[[Job, Args], Args]] = {
    "UNet": _u_net,
    "BasicUNet": _fixed(features=(16, 16, 32, 64, 128, 16), norm=_INSTANCE),
    "DynUNet": _dyn_unet,
    "SegResNet": _fixed(init_filters=8, norm=("group", {"num_groups": 8})),
    "SwinUNETR": _fixed(feature_size=12, norm_name=_INSTANCE),
    "UNETR": _fixed(hidden_size=192, mlp_dim=768, num_heads=6, norm_name=_INSTANCE),
    "AttentionUnet": _channels_and_strides,
}


def _frozen(value: Any) -> Any:
    """Turn lists into tuples: TOML has only lists, MONAI asks for tuples in places."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return value


def _check_names(name: str, given: Args, allowed: set[str]) -> None:
    for key in given:
        if key in _FILLED:
            raise ModelError(f"model.args: `{key}` of {name} is set from {_FILLED[key]}", "leave it out")
        if key not in allowed:
            nearest = difflib.get_close_matches(key, sorted(allowed), n=1, cutoff=0.5)
            hint = f"did you mean `{nearest[0]}`?" if nearest else f"it takes {', '.join(sorted(allowed))}"
            raise ModelError(f"model.args: {name} has no argument `{key}`", hint)


def _normaliser(norm: str, dims: int) -> Callable[[int], nn.Module]:
    """Return a function from a number of channels to a normalisation layer."""
    if norm == "group":
        # Wu & He 2018, section 3.1; one group a channel for the few channels of a last layer.
        return lambda channels: nn.GroupNorm(math.gcd(channels, 8), channels)
    if norm == "instance":
        instance = nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d
        return lambda channels: instance(channels, affine=True)
    if norm == "batch":
        return nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d
    raise ModelError(f'model.args: norm must be "instance", "group" or "batch", got {norm!r}')


def _replace_norm(network: nn.Module, make: Callable[[int], nn.Module]) -> None:
    """Replace every batch or instance norm in place by ``make(channels)``; no random numbers are drawn."""
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d | nn.BatchNorm3d | nn.InstanceNorm2d | nn.InstanceNorm3d):
                setattr(module, name, make(child.num_features))


def _construct(job: Job) -> nn.Module:
    """Build the network without trying it.

    Raises:
        ModelError: The name, an argument or a value is not known to MONAI, or a function of the user's fails.
        ConfigError: The user's own reference cannot be imported.
    """
    name, dims = job.model.name, job.task.spatial_dims
    given: Args = {key: _frozen(value) for key, value in job.model.args.items()}
    if ":" in name:
        return build_own_network(job, given)
    if name not in NETWORKS:
        by_lower = {known.lower(): known for known in NETWORKS}
        nearest = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
        raise ModelError(
            f"model.name: no segmentation network {name!r}",
            f"did you mean {by_lower[nearest[0]]}?"
            if nearest
            else f"there are {', '.join(NETWORKS)}, or your own `package.module:function`",
        )
    from monai.networks import nets

    kind = getattr(nets, name)
    parameters = inspect.signature(kind).parameters
    norm_key = "norm_name" if "norm" not in parameters and "norm_name" in parameters else "norm"
    _check_names(name, given, (set(parameters) | {norm_key}) - set(_FILLED))
    arguments = {**NETWORKS[name](job, given), **given}
    replacement: str | None = None
    if norm_key not in parameters:
        replacement = arguments.pop(norm_key, "instance")
    elif arguments[norm_key] == "group":
        replacement, arguments[norm_key] = "group", _INSTANCE
    filled = {
        "spatial_dims": dims,
        "in_channels": job.task.in_channels,
        "out_channels": len(job.task.classes) + 1,
        "img_size": job.training.patch_size,
    }
    try:
        network: nn.Module = kind(**{k: v for k, v in filled.items() if k in parameters}, **arguments)
    except MISFIT as error:
        raise ModelError(
            f"model.args: {name} cannot be built: {str(error) or type(error).__name__}"
        ) from error
    if replacement is not None:
        _replace_norm(network, _normaliser(replacement, dims))
    return network


def resolutions(output: Any, dims: int) -> list[torch.Tensor]:
    """Return what a network gave as a list of logits (B, K, *grid), the full resolution first.

    Deep supervision gives several: a list or tuple, or a stack (B, N, K, *grid) as MONAI's DynUNet.

    Raises:
        ModelError: It is something else.
    """
    if isinstance(output, torch.Tensor):
        parts = list(output.unbind(1)) if output.ndim == dims + 3 else [output]
    else:
        parts = list(output) if isinstance(output, list | tuple) else []
    if not parts or not all(isinstance(part, torch.Tensor) and part.ndim == dims + 2 for part in parts):
        found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ModelError(
            "the network must return logits of shape (batch, classes + 1, *patch), or a list of such, "
            f"got {found}"
        )
    return parts


def _without_data(network: nn.Module) -> nn.Module | None:
    """Return a copy whose tensors are on the meta device: shapes without data, and no memory for them.

    None if the network cannot be copied: a user's that holds an open file, say, or a trained one that keeps
    tensors with a gradient history, as MONAI's DynUNet does under deep supervision.
    """
    # Given as the memo of deepcopy, these stand in for the tensors, which are then not copied.
    # torch.func.functional_call is no way: it leaves modules that are registered twice (DynUNet) broken.
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in network.parameters()
    }
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in network.buffers()}
    try:
        return copy.deepcopy(network, memo)
    except MISFIT:
        return None


def _misfit(network: nn.Module | None, job: Job, size: tuple[int, ...], device: str = "meta") -> str:
    """Say why an input of ``size`` does not go through to logits on the same grid; "" if it does."""
    if network is None:
        return "the network cannot be copied"
    shape = (job.training.batch_size, job.task.in_channels, *size)
    wanted = (job.training.batch_size, len(job.task.classes) + 1, *size)
    try:
        with torch.no_grad():
            output = network(torch.zeros(shape, device=device))
        found = tuple(resolutions(output, len(size))[0].shape)
    except MISFIT as error:
        return str(error).strip().split("\n")[0] or type(error).__name__
    except ModelError as error:
        return str(error)
    return "" if found == wanted else f"an input of shape {shape} gives {found}, expected {wanted}"


def _with_training(job: Job, **changes: Any) -> Job:
    return job.model_copy(update={"training": job.training.model_copy(update=changes)})


def _patch_hint(job: Job, patch: tuple[int, ...]) -> str:
    """Return which patch near ``patch`` the network takes, or ''."""
    for multiple in (2, 4, 8, 16, 32, 64):
        near = tuple(multiple * math.ceil(size / multiple) for size in patch)
        try:
            with torch.random.fork_rng(devices=[]):
                network = _construct(_with_training(job, patch_size=near))
        except ModelError:
            continue
        if not _misfit(_without_data(network), job, near):
            return f"training.patch_size = {list(near)} works; multiples of {multiple} do"
    return ""


# Copies without data of the networks that were built here, made while they could be copied.
_TRIALS: weakref.WeakKeyDictionary[nn.Module, nn.Module | None] = weakref.WeakKeyDictionary()
# Found once for each network: the dry runs take some tens of milliseconds.
_STEPS: weakref.WeakKeyDictionary[nn.Module, int | None] = weakref.WeakKeyDictionary()


def build_network_by_name(job: Job) -> nn.Module:
    """Build the segmentation network that the job names, with fresh weights, and try it on the patch.

    The user's own function is called as ``function(job, **model.args)`` and must return a network from
    (B, in_channels, *patch) to logits (B, classes + 1, *patch), or a list of such with the full resolution
    first (deep supervision).

    Raises:
        ModelError: The name, an argument or a value is not known; or the patch does not go through: the
            message says why, the hint which patch would.
        ConfigError: The user's own reference cannot be imported.
    """
    patch = job.training.patch_size
    if patch is None:
        raise ModelError("training.patch_size is required to build a segmentation network")
    is_own = ":" in job.model.name
    try:
        network = _construct(job)
    except ModelError as error:
        # MONAI's UNETR looks at the patch when it is built.
        hint = "" if is_own or error.hint else _patch_hint(job, patch)
        raise ModelError(str(error), error.hint or hint) from error
    trial = _TRIALS[network] = _without_data(network)
    reason = _misfit(trial, job, patch)
    if reason and is_own:
        # It may do what a tensor without data cannot, such as ask for a value: one forward pass with zeros.
        network.eval()
        reason = _misfit(network, _with_training(job, batch_size=1), patch, "cpu")
        network.train()
    if reason:
        hint = "" if is_own else _patch_hint(job, patch)
        raise ModelError(
            f"training.patch_size = {list(patch)} does not go through {job.model.name}: {reason}", hint
        )
    return network


def size_step(network: nn.Module, job: Job) -> int | None:
    """Return the smallest power of two by which an input may be larger than the patch along every axis.

    Args:
        network: Goes with the patch of ``job``.
        job: Gives patch and channels.

    Returns:
        1 to 64, or None for a network that takes only the patch (UNETR).
    """
    if network not in _STEPS:
        if network not in _TRIALS:
            _TRIALS[network] = _without_data(network)
        trial, patch = _TRIALS[network], job.training.patch_size
        assert patch is not None, "the job file gives a patch for segmentation"
        steps = (2**power for power in range(7))
        fitting = (s for s in steps if not _misfit(trial, job, tuple(size + s for size in patch)))
        _STEPS[network] = next(fitting, None)
    return _STEPS[network]
