"""Images and boxes to a training size, and random changes that keep them together.

Every random number comes from the generator that is passed in. Boxes are (N, 2 * dims) in the order of the
image's axes inside this module: (row1, column1, row2, column2) for pictures, while torchvision and the
manifest have x first; ``training_case`` turns them round at its ends.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch.nn import functional

# A box is left out of training when less than this share of it is still in the picture after a crop, or a
# side of it is shorter than this many pixels.
VISIBLE_SHARE = 0.25
SMALLEST_SIDE = 1.0


def swap_picture_axes(boxes: torch.Tensor) -> torch.Tensor:
    """Turn (x1, y1, x2, y2) to (y1, x1, y2, x2) or back; boxes of volumes stay as they are."""
    return boxes[:, [1, 0, 3, 2]] if boxes.shape[1] == 4 else boxes


def resize_image(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize an image linearly, with a filter against aliasing along axes that shrink.

    Args:
        image: float32, shape (C, *S) with two or three spatial axes.
        size: The new S.
    """
    if tuple(image.shape[1:]) == tuple(size):
        return image
    if image.ndim == 3:
        return _resize_plane(image[None], size)[0]
    # torch filters pictures only: two axes with the first of them as channels, then the first.
    rows, columns, planes = size
    image = _resize_plane(image, (columns, planes))
    turned = image.transpose(1, 2)
    return _resize_plane(turned, (rows, planes)).transpose(1, 2).contiguous()


def _resize_plane(images: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return functional.interpolate(images, tuple(size), mode="bilinear", align_corners=False, antialias=True)


def training_case(
    image: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    size: Sequence[int],
    strength: Literal["none", "light", "strong"],
    rng: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Resize one image with its boxes and change them at random.

    light: mirror along each axis, exchange the axes of a square picture (with the mirrors, all its
    right-angle turns), gain 0.9 to 1.1, offset -0.1 to 0.1. strong: also zoom and shift, gain 0.75 to 1.33,
    offset -0.3 to 0.3 for each channel, and at times blur and noise.

    Args:
        image: float32, shape (C, *S). Not changed.
        boxes: float32, shape (N, 2 * dims), axes as in the manifest. N may be 0.
        labels: int64, shape (N,).
        size: The new S, ``training.image_size``.
        strength: ``training.augmentation``.
        rng: Source of every random number.

    Returns:
        Image, boxes (none empty) and labels at the new size.
    """
    dims = image.ndim - 1
    factors = torch.tensor([new / old for new, old in zip(size, image.shape[1:], strict=True)] * 2)
    boxes = swap_picture_axes(boxes.to(torch.float32)) * factors
    image = resize_image(image, size)
    if strength != "none":
        image, boxes = _turn(image, boxes, rng)
    if strength == "strong":
        image, boxes, labels = _zoom(image, boxes, labels, rng)
    if strength != "none":
        image = _intensity(image, strength == "strong", rng)
    is_kept = ((boxes[:, dims:] - boxes[:, :dims]) >= SMALLEST_SIDE).all(dim=1)
    return image.contiguous(), swap_picture_axes(boxes[is_kept]).contiguous(), labels[is_kept]


def _turn(
    image: torch.Tensor, boxes: torch.Tensor, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirror along random axes; exchange the axes of a square picture in half of the calls."""
    dims = image.ndim - 1
    mirrors, is_exchanged = rng.random(dims) < 0.5, rng.random() < 0.5
    if dims == 2 and image.shape[1] == image.shape[2] and is_exchanged:
        image, boxes = image.transpose(1, 2), boxes[:, [1, 0, 3, 2]]
    boxes = boxes.clone()
    for axis in np.flatnonzero(mirrors):
        low, high = boxes[:, axis].clone(), boxes[:, dims + axis].clone()
        boxes[:, axis], boxes[:, dims + axis] = image.shape[1 + axis] - high, image.shape[1 + axis] - low
    return torch.flip(image, [1 + int(axis) for axis in np.flatnonzero(mirrors)]), boxes


def _zoom(
    image: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Magnify by 0.75 to 1.33 and shift; what comes in from outside the picture is zero.

    A point at p along an axis of length L goes to zoom * (p - start), start being where the new picture
    begins: anywhere inside the old one, or so that the old one lies anywhere inside the new.
    """
    dims, lengths = image.ndim - 1, torch.tensor(image.shape[1:], dtype=torch.float32)
    zoom = float(np.exp(rng.uniform(np.log(0.75), np.log(1 / 0.75))))
    start = torch.from_numpy(rng.uniform(size=dims)).float() * lengths * (1 - 1 / zoom)
    # affine_grid wants output -> input in units of half the length, last axis first.
    matrix = torch.zeros(1, dims, dims + 1)
    matrix[0, :, :dims] = torch.eye(dims) / zoom
    matrix[0, :, dims] = ((2 * start / lengths) + 1 / zoom - 1).flip(0)
    grid = functional.affine_grid(matrix, [1, *image.shape], align_corners=False)
    image = functional.grid_sample(image[None], grid, mode="bilinear", align_corners=False)[0]
    moved = (boxes - start.repeat(2)) * zoom
    cut = torch.minimum(moved.clamp(min=0), lengths.repeat(2))
    before = (moved[:, dims:] - moved[:, :dims]).prod(dim=1)
    is_kept = (cut[:, dims:] - cut[:, :dims]).prod(dim=1) >= VISIBLE_SHARE * before
    return image, cut[is_kept], labels[is_kept]


def _intensity(image: torch.Tensor, is_strong: bool, rng: np.random.Generator) -> torch.Tensor:
    """Change gain and offset; strong: blur in a quarter of the calls, noise in half."""
    channels, dims = len(image), image.ndim - 1
    widest, offset = (np.log(4 / 3), 0.3) if is_strong else (np.log(1.1), 0.1)
    gain = float(np.exp(rng.uniform(-widest, widest)))
    shifts = torch.from_numpy(rng.uniform(-offset, offset, size=channels)).float()
    if not is_strong:
        shifts = shifts[:1].expand(channels)
    image = image * gain + shifts.reshape(-1, *[1] * dims)
    if not is_strong:
        return image
    if rng.random() < 0.25:
        # Binomial weights 1 2 1 along every axis: a Gaussian of about 0.7 pixels.
        weights = torch.tensor([0.25, 0.5, 0.25])
        for axis in range(dims):
            shape = [1] * dims
            shape[axis] = 3
            padding = [0] * (2 * dims)
            padding[2 * (dims - 1 - axis)] = padding[2 * (dims - 1 - axis) + 1] = 1
            padded = functional.pad(image[:, None], padding, mode="replicate")
            kernel = weights.reshape(1, 1, *shape)
            image = (functional.conv2d if dims == 2 else functional.conv3d)(padded, kernel)[:, 0]
    if rng.random() < 0.5:
        image = image + torch.from_numpy(rng.normal(0, rng.uniform(0, 0.1), size=tuple(image.shape))).float()
    return image
