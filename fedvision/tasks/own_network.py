"""A user's own network, named ``package.module:function`` in ``model.name``."""

from typing import Any

from torch import nn

from fedvision.config import Job
from fedvision.errors import ModelError
from fedvision.references import resolve_reference

# What a network's constructor or forward pass raises when its arguments do not fit.
MISFIT = (TypeError, ValueError, LookupError, AttributeError, AssertionError, RuntimeError)


def build_own_network(job: Job, args: dict[str, Any]) -> nn.Module:
    """Return ``function(job, **args)``.

    Raises:
        ModelError: The function fails, or returns something else than a network.
        ConfigError: The function cannot be imported.
    """
    name = job.model.name
    try:
        own = resolve_reference(name)(job, **args)
    except MISFIT as error:
        raise ModelError(
            f"{name} failed: {type(error).__name__}: {error}", "it gets (job, **model.args)"
        ) from error
    if not isinstance(own, nn.Module):
        raise ModelError(f"{name} must return a torch.nn.Module, got {type(own).__name__}")
    return own
