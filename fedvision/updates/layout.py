"""A network's weights as one contiguous float32 vector with a fixed, hashed layout.

The vector is what travels and what clipping, secure aggregation, noise and defence act on. Rules:
- It holds every floating-point parameter and float buffer once, sorted by name. Weights that two names
  share are taken once, under the name that comes first.
- Integer buffers (index tables, step counters) are never sent or averaged.
- Names that stay at the site (FedBN's normalisation layers) are not part of it.
- Both sides compare the layout's SHA-256 before a vector is used.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedvision.errors import MessageError, ModelError

FloatVector = NDArray[np.float32]


def float_tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return the floating-point parameters and buffers of ``network`` by name, each storage once.

    Names are those of ``state_dict``, sorted; a tensor that is registered under several names stands
    under the first of them.
    """
    named: dict[str, torch.Tensor] = dict(network.named_parameters(remove_duplicate=False))
    persistent = network.state_dict(keep_vars=True)
    named.update({name: value for name, value in persistent.items() if isinstance(value, torch.Tensor)})
    seen: set[int] = set()
    tensors = {}
    for name in sorted(named):
        tensor = named[name]
        if name in persistent and tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in the flat vector.

    Attributes:
        shapes: Tensor shapes by name, in the order of the vector.
    """

    shapes: Mapping[str, tuple[int, ...]]

    @property
    def size(self) -> int:
        """Number of coordinates of the vector."""
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes.values())

    @property
    def digest(self) -> str:
        """SHA-256 of names and shapes in order, hexadecimal."""
        text = json.dumps([[name, list(shape)] for name, shape in self.shapes.items()], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def split(self, vector: FloatVector) -> dict[str, FloatVector]:
        """Return views of ``vector`` by tensor name.

        Raises:
            MessageError: The vector is not float32 of shape (size,).
        """
        if vector.dtype != np.float32 or vector.shape != (self.size,):
            raise MessageError(
                f"weights must be float32 of shape ({self.size},), got {vector.dtype} {vector.shape}"
            )
        parts, start = {}, 0
        for name, shape in self.shapes.items():
            stop = start + int(np.prod(shape, dtype=np.int64))
            parts[name] = vector[start:stop].reshape(shape)
            start = stop
        return parts


def layout_of(network: nn.Module, local: Collection[str] = ()) -> Layout:
    """Return the layout of ``network`` without the names in ``local``.

    Raises:
        ModelError: Nothing is left to send.
    """
    shapes = {name: tuple(t.shape) for name, t in float_tensors(network).items() if name not in local}
    if not shapes:
        raise ModelError("the network has no weights to train together")
    return Layout(shapes)


def flatten(network: nn.Module, layout: Layout) -> FloatVector:
    """Return the weights of ``network`` as one vector, shape (layout.size,), a copy."""
    tensors = float_tensors(network)
    vector = np.empty(layout.size, dtype=np.float32)
    for name, part in layout.split(vector).items():
        part[...] = tensors[name].to(device="cpu", dtype=torch.float32).numpy()
    return vector


def load_vector(network: nn.Module, layout: Layout, vector: FloatVector) -> None:
    """Copy ``vector`` into the weights of ``network``, in place.

    Raises:
        MessageError: The vector does not fit the layout.
    """
    tensors = float_tensors(network)
    with torch.no_grad():
        for name, part in layout.split(vector).items():
            tensors[name].copy_(torch.from_numpy(np.array(part)))


def model_digest(weights: FloatVector) -> bytes:
    """Return the SHA-256 of a flat model, little-endian float32: what names a model to all parties."""
    return hashlib.sha256(np.ascontiguousarray(weights, "<f4").data.cast("B")).digest()
