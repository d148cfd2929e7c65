"""Normalisation layers in a federation: which are safe to average, and which stay at the site.

- Batch norm keeps running means and variances of the images it saw. Averaged over sites they describe
  nobody's images (scanners differ), and they are statistics of patients. So a layer with running
  statistics may not be shared: it stays at the site, or the network uses instance or group norm.
- FedBN (Li et al. 2021, ICLR, arXiv:2102.07623, algorithm 1 in its appendix): normalisation
  layers are trained at the site and never sent or averaged; all other weights are averaged as usual.
  The paper keeps batch norm local; here this holds for every kind of normalisation layer.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fedvision.config import Job
from fedvision.errors import ModelError

_LAYERS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_RUNNING = ("running_mean", "running_var")


def has_running_statistics(module: nn.Module) -> bool:
    """Say whether a layer learns means or variances of the images it sees, as batch norm does.

    True for batch norm and its kin from any library, but not for torchvision's ``FrozenBatchNorm2d``,
    whose statistics are constants.
    """
    if type(module).__name__.startswith("Frozen"):
        return False
    return any(name in _RUNNING for name, _ in module.named_buffers(recurse=False))


def normalisation_layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every normalisation layer with its name; one that is registered twice comes under both."""
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, _LAYERS) or has_running_statistics(module):
            yield name, module


def local_names(network: nn.Module) -> frozenset[str]:
    """Return the names of the weights that stay at the site under FedBN.

    Returns:
        Names, as in ``state_dict``, of the parameters and floating-point buffers of the normalisation
        layers. A tensor that has several names is returned under all of them.
    """
    persistent = network.state_dict(keep_vars=True).keys()
    names = set()
    for layer, module in normalisation_layers(network):
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        for key, tensor in tensors.items():
            name = f"{layer}.{key}" if layer else key
            if name in persistent and torch.is_floating_point(tensor):
                names.add(name)
    return frozenset(names)


def check_normalisation(network: nn.Module, job: Job) -> None:
    """Refuse a network whose normalisation does not fit ``model.local_normalisation``.

    Guarantee: if this returns, no floating-point buffer named running_mean or running_var of a layer that
    updates it is among the weights that are shared.

    Raises:
        ModelError: A layer has running statistics and would be shared; or FedBN was asked for and the
            network has no normalisation weights that could stay at the site.
    """
    if job.model.local_normalisation:
        if not local_names(network):
            raise ModelError(
                f"model.local_normalisation = true, but {job.model.name} has no normalisation weights",
                'leave it out, or set model.args.norm = ["instance", {affine = true}] '
                "(norm_name in some networks)",
            )
        return
    for name, module in normalisation_layers(network):
        if has_running_statistics(module):
            raise ModelError(
                f"{job.model.name}: layer {name or 'the network itself'} ({type(module).__name__}) has "
                "running statistics of the site's images, which must not be shared",
                "set model.local_normalisation = true to keep such layers at the site, or use instance or "
                'group norm, such as model.args.norm = "instance" (norm_name in some networks)',
            )
