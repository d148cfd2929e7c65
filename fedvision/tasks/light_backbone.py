"""A small residual network with a feature pyramid, for pictures and volumes, for machines without a GPU."""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from fedvision.errors import ModelError


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a GroupNorm with groups of about eight channels: no statistics over the batch.

    Wu and He 2018, section 4.1, table 3: 16 channels a group do as well as 32 groups, 8 nearly so.
    """
    return nn.GroupNorm(math.gcd(channels, max(channels // 8, 1)), channels)


def _convolution(dims: int, inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
    """Return a convolution over ``dims`` axes that keeps the size but for its stride, without a bias."""
    kind = nn.Conv2d if dims == 2 else nn.Conv3d
    layer = kind(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def convolution_tower(dims: int, channels: int, depth: int) -> nn.Sequential:
    """Return ``depth`` times convolution, GroupNorm, ReLU, nested as in torchvision's heads.

    A flat sequence would not load: torchvision renames ``conv.0.weight`` in a state dict without metadata.
    """
    steps = (
        nn.Sequential(_convolution(dims, channels, channels, 3), group_norm(channels), nn.ReLU(inplace=True))
        for _ in range(depth)
    )
    return nn.Sequential(*steps)


class _Block(nn.Module):
    """A residual block of two convolutions (He et al. 2016, figure 2)."""

    def __init__(self, dims: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(dims, inputs, outputs, 3, stride),
            group_norm(outputs),
            nn.ReLU(inplace=True),
            _convolution(dims, outputs, outputs, 3),
            group_norm(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_convolution(dims, inputs, outputs, 1, stride), group_norm(outputs))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.body(features) + self.shortcut(features), inplace=True)


class LightBackbone(nn.Module):
    """A small residual network with a feature pyramid, for machines without a GPU and for little data.

    Layers 1 to 4 have strides 4, 8, 16 and 32 and 1, 2, 2 and 1 blocks; the pyramid follows Lin et al. 2017
    (figure 3).
    """

    def __init__(
        self, dims: int, in_channels: int, width: int, fpn_channels: int, layers: Sequence[int]
    ) -> None:
        """Build it.

        Args:
            dims: 2 or 3.
            in_channels: Channels of the image.
            width: Channels of the first layer; the others have 2, 4 and 6 times as many.
            fpn_channels: Channels of every level of the pyramid.
            layers: Which of the layers 1 to 4 the pyramid is made from, ascending.
        """
        super().__init__()
        if not layers or not set(layers) <= {1, 2, 3, 4}:
            raise ModelError(f"model.args.returned_layers must be among 1, 2, 3, 4, got {list(layers)}")
        self.out_channels = fpn_channels
        self.strides = [2 ** (layer + 1) for layer in layers]
        self.layers = tuple(layers)
        widths = [width, 2 * width, 4 * width, 6 * width][: max(layers)]
        depths = (1, 2, 2, 1)
        self.stem = nn.Sequential(
            _convolution(dims, in_channels, width, 5 if dims == 2 else 3, 2),
            group_norm(width),
            nn.ReLU(inplace=True),
        )
        stages = []
        inputs = width
        for outputs, depth in zip(widths, depths, strict=False):
            blocks = [
                _Block(dims, inputs if i == 0 else outputs, outputs, 2 if i == 0 else 1) for i in range(depth)
            ]
            stages.append(nn.Sequential(*blocks))
            inputs = outputs
        self.stages = nn.ModuleList(stages)
        self.lateral = nn.ModuleList(_convolution(dims, widths[k - 1], fpn_channels, 1) for k in layers)
        self.smooth = nn.ModuleList(_convolution(dims, fpn_channels, fpn_channels, 3) for _ in layers)

    def forward(self, image: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """Return the feature maps by level, "0" the finest, each of shape (B, out_channels, *S)."""
        features, maps = self.stem(image), []
        for number, stage in enumerate(self.stages, start=1):
            features = stage(features)
            if number in self.layers:
                maps.append(features)
        levels: list[torch.Tensor] = []
        for index in range(len(maps) - 1, -1, -1):
            level = self.lateral[index](maps[index])
            if levels:
                level = level + functional.interpolate(levels[0], size=level.shape[2:], mode="nearest")
            levels.insert(0, level)
        return OrderedDict(
            (str(i), smooth(level)) for i, (smooth, level) in enumerate(zip(self.smooth, levels, strict=True))
        )
