"""What happens to a case between its files and the network: grid, intensity, the user's own step."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from fedvision.config import PreprocessingSection
from fedvision.errors import DataError


def to_ras(
    image: NDArray[Any], label: NDArray[Any] | None, affine: NDArray[np.float64]
) -> tuple[NDArray[Any], NDArray[Any] | None, NDArray[np.float64]]:
    """Flip and swap axes so that they point right, anterior, superior as nearly as the grid allows.

    Args:
        image: Shape (C, X, Y, Z).
        label: Shape (X, Y, Z), or None.
        affine: Voxel index to mm in RAS.

    Returns:
        Image, label and affine on the turned grid; voxels are moved, never interpolated.
    """
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    turn = io_orientation(affine)
    shape = image.shape[1:]
    # Axis 0 of the image is the channel: it stays where it is.
    with_channel = np.concatenate([[[0, 1]], np.add(turn, [1, 0])])
    turned = apply_orientation(image, with_channel)
    return (
        turned,
        None if label is None else apply_orientation(label, turn),
        affine @ inv_ornt_aff(turn, shape),
    )


def resampled_size(
    shape: tuple[int, ...], spacing: tuple[float, ...], wanted: tuple[float, ...]
) -> tuple[int, ...]:
    """Return the grid that covers the same extent at about the wanted spacing, at least 1 along each axis."""
    return tuple(max(1, round(n * old / new)) for n, old, new in zip(shape, spacing, wanted, strict=True))


def resample_image(image: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Interpolate a float volume (C, *S) linearly to ``size``."""
    return interpolate(image[None], size=size, mode="trilinear", align_corners=False)[0]


def resample_label(label: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Give every new voxel of a uint8 mask, shape S, the class of the nearest old one."""
    return interpolate(label[None, None].float(), size=size, mode="nearest-exact")[0, 0].to(torch.uint8)


def _zscore(channel: NDArray[np.float32]) -> NDArray[np.float32]:
    # Sums in double precision: a volume has more voxels than single precision can count.
    centred = channel - np.float32(channel.mean(dtype=np.float64))
    deviation = float(centred.std(dtype=np.float64))
    if deviation <= 1e-6 * float(np.abs(channel).max()):
        return np.zeros_like(channel)
    return centred / np.float32(deviation)


def _to_unit(channel: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        return np.zeros_like(channel)
    return np.clip((channel - np.float32(low)) / np.float32(high - low), np.float32(0), np.float32(1))


def normalise_intensity(
    image: NDArray[Any], settings: PreprocessingSection, dtype: np.dtype[Any]
) -> NDArray[np.float32]:
    """Bring the intensities of one image to the network's range, each channel on its own.

    A constant channel becomes all zeros in ``zscore`` and ``percentile``.

    Args:
        image: Shape (C, *S), finite.
        settings: Which of the modes, and the window.
        dtype: Data type of the file, for ``unit``.

    Returns:
        Shape (C, *S).

    Raises:
        DataError: ``unit`` and the file holds floats outside 0..1, so that its range is unknown.
    """
    channels = [channel.astype(np.float32) for channel in image]
    if settings.intensity == "zscore":
        channels = [_zscore(channel) for channel in channels]
    elif settings.intensity == "percentile":
        channels = [_to_unit(channel, *np.percentile(channel, (1.0, 99.5))) for channel in channels]
    elif settings.intensity == "window":
        assert settings.window is not None, "the job file gives the window with the mode"
        low, high = settings.window
        channels = [_to_unit(channel, low, high) for channel in channels]
    elif dtype.kind in "bui":
        limits = (0.0, 1.0) if dtype.kind == "b" else (float(np.iinfo(dtype).min), float(np.iinfo(dtype).max))
        channels = [_to_unit(channel, *limits) for channel in channels]
    elif min(channel.min() for channel in channels) < 0 or max(channel.max() for channel in channels) > 1:
        raise DataError(
            f'intensity = "unit" needs integers, or floats in 0..1, got {image.min():g} to {image.max():g}',
            'use "zscore" or "percentile"',
        )
    return np.stack(channels)


def apply_user_transform(
    function: Callable[..., Any], name: str, content: dict[str, Any], case_id: str
) -> dict[str, Any]:
    """Call the user's own transform on one case and check what it returns.

    Args:
        function: Gets and returns a dict with ``image`` (float32, (C, *S)), ``spacing_mm``, and ``label``
            (uint8, S) or ``boxes`` ((N, 2 * dims)) and ``box_labels`` (N,).
        name: As the job file has it, for the error.
        content: That dict.
        case_id: For the error.

    Returns:
        The dict with tensors of the same data types; the grid may have changed.

    Raises:
        DataError: The function failed, or returned another kind of thing.
    """

    def wrong(found: str) -> DataError:
        return DataError(f"{name}: case {case_id}: {found}", "docs/reference/job-file.md says what it gets")

    try:
        returned = function(dict(content))
    except Exception as error:
        raise wrong(f"{type(error).__name__}: {error}") from error
    if not isinstance(returned, dict) or not set(content) <= set(returned):
        raise wrong(f"must return a dict with {', '.join(content)}, got {_described(returned)}")
    checked: dict[str, Any] = {}
    for key, before in content.items():
        if not isinstance(before, torch.Tensor):
            checked[key] = tuple(float(size) for size in returned[key])
            continue
        try:
            after = torch.as_tensor(returned[key]).detach().to("cpu", before.dtype).contiguous()
        except (TypeError, ValueError, RuntimeError) as error:
            raise wrong(f"`{key}` must be a tensor, got {_described(returned[key])}") from error
        # MONAI's own transforms return a subclass of Tensor; the rest of the program wants the plain one.
        checked[key] = after.as_subclass(torch.Tensor)
    image = checked["image"]
    if image.ndim != content["image"].ndim or image.shape[0] != content["image"].shape[0]:
        raise wrong(f"`image` had shape {tuple(content['image'].shape)}, came back with {tuple(image.shape)}")
    if not torch.isfinite(image).all():
        raise wrong("`image` came back with a value that is not finite")
    if "label" in checked and checked["label"].shape != image.shape[1:]:
        raise wrong(f"`label` has shape {tuple(checked['label'].shape)}, `image` {tuple(image.shape)}")
    if "boxes" in checked and len(checked["boxes"]) != len(checked["box_labels"]):
        raise wrong(f"{len(checked['boxes'])} boxes but {len(checked['box_labels'])} box_labels")
    return checked


def _described(value: object) -> str:
    if isinstance(value, dict):
        return f"a dict with {', '.join(map(str, value)) or 'nothing'}"
    return type(value).__name__
