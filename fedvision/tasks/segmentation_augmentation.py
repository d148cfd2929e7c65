"""Training crops of images and masks, and their augmentation. All randomness comes from one numpy generator.

Legend of shapes: C channels, S the spatial grid of a case, P the patch.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from fedvision.config import Job
from fedvision.data.readers import Sample
from fedvision.errors import DataError

# Voxels of a class that are remembered as possible centres of crops.
_MOST_CENTRES = 20_000

# Where each class lies in a mask, kept as long as the mask: large volumes are searched once.
_centres: WeakIdKeyDictionary = WeakIdKeyDictionary()


def class_centres(label: torch.Tensor, num_classes: int) -> list[NDArray[np.int64]]:
    """Return flat voxel indices of each class that the mask has, at most 20 000 a class, evenly spread.

    Args:
        label: uint8 class indices, shape S.
        num_classes: Classes without background.
    """
    if label not in _centres:
        flat = label.numpy().ravel()
        found = []
        for value in range(1, num_classes + 1):
            indices = np.flatnonzero(flat == value)
            if indices.size:
                found.append(indices[:: -(-indices.size // _MOST_CENTRES)].copy())
        _centres[label] = found
    centres: list[NDArray[np.int64]] = _centres[label]
    return centres


def _start(
    label: torch.Tensor, window: tuple[int, ...], job: Job, rng: np.random.Generator
) -> tuple[int, ...]:
    """Draw where a window starts; along an axis where the image is smaller, it is centred (start <= 0)."""
    centre: tuple[int, ...] | None = None
    if rng.random() < job.training.foreground_fraction:
        by_class = class_centres(label, len(job.task.classes))
        if by_class:
            indices = by_class[rng.integers(len(by_class))]
            centre = tuple(int(i) for i in np.unravel_index(indices[rng.integers(len(indices))], label.shape))
    start = []
    for axis, (size, wanted) in enumerate(zip(label.shape, window, strict=True)):
        room = size - wanted
        if room <= 0:
            start.append(-(-room // 2))
        elif centre is None:
            start.append(int(rng.integers(room + 1)))
        else:
            start.append(min(max(centre[axis] - wanted // 2, 0), room))
    return tuple(start)


def cut(tensor: torch.Tensor, start: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
    """Return the window of the last axes that starts at ``start``; what lies outside is 0.

    Args:
        tensor: Shape (..., S).
        start: May be negative.
        size: Of the window, along each axis of S.
    """
    inside: list[slice] = []
    padding: list[tuple[int, int]] = []
    for first, wanted, length in zip(start, size, tensor.shape[-len(size) :], strict=True):
        low, high = max(first, 0), min(first + wanted, length)
        inside.append(slice(low, high))
        padding.append((low - first, first + wanted - high))
    leading = [slice(None)] * (tensor.ndim - len(size))
    part = tensor[tuple(leading + inside)]
    if any(any(pair) for pair in padding):
        part = functional.pad(part, [number for pair in reversed(padding) for number in pair])
    return part


def crop(sample: Sample, job: Job, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one training crop of a case, augmented as the job says.

    With probability ``foreground_fraction`` its centre is a voxel of a class, drawn evenly among the classes
    that the mask has (moved where the window would leave the image); otherwise the window lies anywhere. An
    image smaller than the window is padded with 0 on both sides.

    Returns:
        The image, float32, shape (C, *P), and the mask, int64, shape P.

    Raises:
        DataError: The case has no mask.
    """
    patch = job.training.patch_size
    assert patch is not None, "the job file gives a patch for segmentation"
    if sample.label is None:
        raise DataError(f"case {sample.case_id} has no mask", "training needs a mask for every case")
    is_strong = job.training.augmentation == "strong"
    window = patch
    if is_strong and rng.random() < 0.5:
        zoom = float(np.exp(rng.uniform(np.log(0.75), np.log(4 / 3))))
        window = tuple(max(1, round(size / zoom)) for size in patch)
    start = _start(sample.label, window, job, rng)
    image, label = cut(sample.image, start, window), cut(sample.label, start, window).long()
    if window != patch:
        mode = "bilinear" if len(patch) == 2 else "trilinear"
        image = functional.interpolate(image[None], size=patch, mode=mode, align_corners=False)[0]
        values = functional.interpolate(label[None, None].float(), size=patch, mode="nearest-exact")
        label = values[0, 0].long()
    if job.training.augmentation != "none":
        image, label = turn(image, label, sample.spacing_mm, rng)
        image = vary_intensity(image, rng)
    if is_strong:
        image = degrade(image, rng)
    return image, label


def turn(
    image: torch.Tensor, label: torch.Tensor, spacing_mm: tuple[float, ...], rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirror a crop, and turn a picture, to an orientation that real images have as well.

    A picture, 2D, has no up: each axis is flipped with probability 1/2, and it is turned by 0, 90, 180 or 270
    degrees if patch and pixels are square. A volume has: it is read in anatomical orientation, so only its
    first axis, from left to right, is flipped.

    Args:
        image: Shape (C, *P).
        label: Shape P.
        spacing_mm: Voxel size along each axis.
        rng: Where the numbers come from.
    """
    dims = label.ndim
    # Counted from the end, an axis has the same number in the image and in the mask.
    axes = [axis - dims for axis in range(2 if dims == 2 else 1) if rng.random() < 0.5]
    if axes:
        image, label = image.flip(axes), label.flip(axes)
    if dims == 2 and label.shape[0] == label.shape[1] and abs(spacing_mm[0] / spacing_mm[1] - 1) < 0.01:
        times = int(rng.integers(4))
        image, label = image.rot90(times, (-2, -1)), label.rot90(times, (-2, -1))
    return image, label


def _per_channel(image: torch.Tensor, values: NDArray[np.float64]) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32)).reshape(-1, *(1,) * (image.ndim - 1))


def _deviation(image: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation of each channel, to measure changes in; shape (C, 1, ...)."""
    return image.flatten(1).std(dim=1, correction=0).reshape(-1, *(1,) * (image.ndim - 1))


def vary_intensity(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Scale each channel by 0.9 to 1.1 and shift it by up to 0.1 standard deviations."""
    scale = _per_channel(image, rng.uniform(0.9, 1.1, len(image)))
    shift = _per_channel(image, rng.uniform(-0.1, 0.1, len(image)))
    return image * scale + shift * _deviation(image)


def degrade(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Change contrast, blur and add noise, each with a probability of its own.

    Contrast (0.3): distances from the mean times 0.65 to 1.5, cut at the old range. Blur (0.2): Gaussian of
    0.5 to 1 voxels. Noise (0.3): Gaussian of up to 0.15 standard deviations.
    """
    if rng.random() < 0.3:
        flat = image.flatten(1)
        mean = flat.mean(dim=1).reshape(-1, *(1,) * (image.ndim - 1))
        low, high = (bound.reshape(mean.shape) for bound in (flat.amin(dim=1), flat.amax(dim=1)))
        image = (mean + (image - mean) * rng.uniform(0.65, 1.5)).clamp(low, high)
    if rng.random() < 0.2:
        image = blur(image, rng.uniform(0.5, 1.0))
    if rng.random() < 0.3:
        noise = torch.from_numpy(rng.standard_normal(tuple(image.shape), dtype=np.float32))
        image = image + noise * _deviation(image) * rng.uniform(0.0, 0.15)
    return image


def blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Return the image (C, *P) under a Gaussian of ``sigma`` voxels, cut at 3 voxels; edges are repeated."""
    kernel = torch.exp(-0.5 * (torch.arange(-3, 4) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).reshape(1, 1, -1)
    for axis in range(1, image.ndim):
        rows = image.movedim(axis, -1)
        padded = functional.pad(rows.reshape(-1, 1, rows.shape[-1]), (3, 3), mode="replicate")
        image = functional.conv1d(padded, kernel).reshape(rows.shape).movedim(-1, axis)
    return image
