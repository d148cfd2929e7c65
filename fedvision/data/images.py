"""Image and mask files to plain arrays, before any preprocessing.

Rules:
- An array is (C, *S). 2D: S is (rows, columns). 3D: S is the file's own axis order; a TIFF stack is
  (pages, rows, columns).
- Whatever a library says about a file becomes one ``DataError`` that names the file.
"""

import functools
import gzip
import logging
import threading
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvision.data.manifest import Case, Manifest
from fedvision.errors import DataError

NIFTI_SUFFIXES = (".nii", ".nii.gz")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
TIFF_SUFFIXES = (".tif", ".tiff")
IMAGE_SUFFIXES = (*NIFTI_SUFFIXES, *PICTURE_SUFFIXES, *TIFF_SUFFIXES)


@dataclass(frozen=True)
class Grid:
    """What one file holds.

    Attributes:
        array: Shape (C, *S), in the file's own data type.
        affine: Shape (4, 4), voxel index to mm in RAS; None for a file without a position in space.
    """

    array: NDArray[Any]
    affine: NDArray[np.float64] | None


@dataclass(frozen=True)
class RawCase:
    """A case as its files have it: no reorientation, resampling or normalisation.

    Attributes:
        image: Shape (C, *S), in the files' own data type.
        label: uint8 class indices, shape S; None for detection.
        affine: As in ``Grid``, of the image.
    """

    image: NDArray[Any]
    label: NDArray[np.uint8] | None
    affine: NDArray[np.float64] | None


def spacing_of(affine: NDArray[np.float64] | None, dims: int) -> tuple[float, ...]:
    """Return the voxel size along each axis in mm; ones if the file gives none."""
    if affine is None:
        return (1.0,) * dims
    return tuple(round(float(size), 6) for size in np.linalg.norm(affine[:3, :dims], axis=0))


_loading = threading.Lock()


@functools.cache
def _load_libraries() -> None:
    """Import MONAI's readers, once and whole before any thread uses them, and keep the libraries quiet.

    Their remarks do not belong on the terminal: what matters is raised as a ``DataError``.
    """
    with _loading:
        warnings.filterwarnings("ignore", module=r"(PIL|nibabel|tifffile|monai)\b")
        from monai.data import image_reader

        assert image_reader.has_nib, "nibabel is a dependency"
        for name in ("nibabel", "nibabel.global", "tifffile", "PIL"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def file_suffix(path: Path) -> str:
    """Return the suffix in lower case, ``.nii.gz`` as a whole."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()


def file_stem(path: Path) -> str:
    """Return the name without its suffix, without ``.nii.gz`` as a whole."""
    return path.name[: len(path.name) - len(file_suffix(path))]


def _read_nifti(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    from monai.data.image_reader import NibabelReader

    reader = NibabelReader()
    array, meta = reader.get_data(reader.read(path))
    return np.asarray(array), np.asarray(meta["affine"], dtype=np.float64)


def _plain_mode(picture: Any) -> Any:
    """Turn modes whose numbers are not intensities into those whose are; a palette stays as indices."""
    if picture.mode in {"CMYK", "YCbCr", "HSV", "LAB"}:
        return picture.convert("RGB")
    if picture.mode in {"PA", "La", "RGBa"}:
        return picture.convert("RGBA")
    return picture


def _read_picture(path: Path, expand_palette: bool) -> NDArray[Any]:
    from monai.data.image_reader import PILReader

    def convert(picture: Any) -> Any:
        if expand_palette and picture.mode == "P":
            return picture.convert("RGBA" if "transparency" in picture.info else "RGB")
        return _plain_mode(picture)

    reader = PILReader(converter=convert, reverse_indexing=False)
    picture = reader.read(path)
    try:
        return np.array(reader.get_data(picture)[0])
    finally:
        picture.close()


def _read_tiff(path: Path, expand_palette: bool) -> tuple[NDArray[Any], str]:
    """Return the pixels of the first series and its axes, such as ``YX``, ``YXS`` or ``ZYX``."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            return series.asarray(), series.axes
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise
    # Compressions that tifffile leaves to an optional package, such as LZW, are known to Pillow.
    array = _read_picture(path, expand_palette)
    return array, "YX" if array.ndim == 2 else "YXS"


def _channels_first(array: NDArray[Any], axes: str, dims: int) -> NDArray[Any]:
    """Move the colour or channel axis to the front, or add one, and drop axes of length 1."""
    for name in "SC":
        if name in axes:
            axis = axes.index(name)
            array = np.moveaxis(array, axis, 0)
            rest = axes.replace(name, "", 1)
            break
    else:
        array, rest = array[None], axes
    single = [axis for axis, name in enumerate(rest, start=1) if array.shape[axis] == 1 and name not in "YXZ"]
    excess = max(array.ndim - 1 - dims, 0)
    return np.squeeze(array, tuple(single[:excess])) if excess else array


def read_grid(path: Path, dims: int, *, is_mask: bool = False) -> Grid:
    """Read one image or mask file.

    Args:
        path: The file.
        dims: 2 or 3, the spatial axes that are expected.
        is_mask: A palette picture is read as its indices, not as its colours.

    Raises:
        DataError: The file is absent, damaged, of an unknown format, or has other axes.
    """
    _load_libraries()
    suffix = file_suffix(path)
    affine = None
    try:
        if not path.is_file():
            raise DataError(f"{path}: no such file", "was it moved after the import? import again")
        if suffix in NIFTI_SUFFIXES:
            array, affine = _read_nifti(path)
            array = np.moveaxis(array, 3, 0) if array.ndim == 4 else array[None]
            if dims == 2:
                raise DataError(
                    f"{path}: a 2D data set needs pictures, got NIfTI",
                    "set spatial_dims to 3, or export the slices as PNG or TIFF",
                )
        elif suffix in PICTURE_SUFFIXES:
            array = _read_picture(path, not is_mask)
            array = np.moveaxis(array, 2, 0) if array.ndim == 3 else array[None]
        elif suffix in TIFF_SUFFIXES:
            array = _channels_first(*_read_tiff(path, not is_mask), dims)
        else:
            raise DataError(
                f"{path}: unknown image format {suffix or '(no suffix)'!r}",
                f"fedvision reads {', '.join(IMAGE_SUFFIXES)}",
            )
    except DataError:
        raise
    except MemoryError:
        raise DataError(f"{path}: too large for this machine's memory") from None
    except (OSError, EOFError, ValueError, SyntaxError, TypeError, KeyError, IndexError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {_one_line(error)}", "is the file complete?") from None
    except Exception as error:
        # Pillow, nibabel and tifffile have error classes of their own, all for damaged files.
        if type(error).__module__.split(".")[0] not in {"PIL", "nibabel", "tifffile", "struct", "gzip"}:
            raise
        raise DataError(f"{path}: cannot be read: {_one_line(error)}", "is the file complete?") from None
    if array.ndim != dims + 1:
        raise DataError(
            f"{path}: expected {dims} spatial axes, got {array.ndim - 1} (shape {array.shape[1:]})"
        )
    if array.dtype.kind not in "buif":
        raise DataError(f"{path}: expected numbers, got data type {array.dtype}")
    if 0 in array.shape:
        raise DataError(f"{path}: the image is empty, shape {array.shape[1:]}")
    return Grid(array, affine)


def _one_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or its class."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def verify_checksum(path: Path) -> None:
    """Raise ``DataError`` if a gzipped file is not what was packed.

    The reader of volumes stops before the checksum at the end of the file, so a flipped byte would pass
    as an intensity. This reads the file once more, to the end; other formats check themselves.
    """
    if not path.name.endswith(".gz"):
        return
    try:
        with gzip.open(path) as file:
            while file.read(1 << 20):
                pass
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: damaged: {_one_line(error)}", "copy the file again from its origin"
        ) from None


def drop_opaque_alpha(array: NDArray[Any]) -> NDArray[Any]:
    """Return a picture without its alpha channel if every pixel is opaque, else as it is.

    Args:
        array: Shape (C, *S); with C = 2 or 4 the last channel may be alpha.
    """
    if array.dtype == np.uint8 and len(array) in (2, 4) and (array[-1] == 255).all():
        return array[:-1]
    return array


def luminance(array: NDArray[Any]) -> NDArray[np.float32]:
    """Return the grey of a colour picture: (3, *S) to (1, *S), weights of ITU-R BT.601."""
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return np.tensordot(weights, array.astype(np.float32), axes=1)[None]


def _check_same_grid(first: Grid, second: Grid, path: Path, other: Path) -> None:
    """Raise unless two files lie on one grid: same shape, and no corner off by a tenth of a voxel."""
    shape, expected = second.array.shape[1:], first.array.shape[1:]
    if shape != expected:
        raise DataError(f"{path}: shape {shape}, but {other.name} has {expected}")
    if first.affine is None or second.affine is None:
        return
    corners = np.array([(*c, 1.0) for c in np.ndindex(2, 2, 2)]).T
    corners[:3] *= (np.array(expected) - 1.0)[:, None]
    apart = np.abs((first.affine - second.affine) @ corners)[:3].max()
    if apart > 0.1 * min(spacing_of(first.affine, 3)):
        raise DataError(
            f"{path}: lies {apart:.3g} mm away from {other.name}: their affines differ",
            "resample the mask to the image, or correct the header",
        )


def read_image(manifest: Manifest, case: Case) -> Grid:
    """Read the image of a case: one file, or one file a channel.

    A picture loses an opaque alpha channel; one of several files may be in colour and is then made grey.

    Raises:
        DataError: A file cannot be read, or the files of the channels differ in shape or position.
    """
    dims = manifest.spatial_dims
    paths = [manifest.path(name) for name in case.image]
    grids: list[Grid] = []
    for path in paths:
        grid = read_grid(path, dims)
        if dims == 2:
            array = drop_opaque_alpha(grid.array)
            if len(paths) > 1 and len(array) == 3:
                array = luminance(array)
            grid = Grid(array, grid.affine)
        if len(paths) > 1 and len(grid.array) != 1:
            raise DataError(f"{path}: expected 1 channel in each of several files, got {len(grid.array)}")
        if grids:
            _check_same_grid(grids[0], grid, path, paths[0])
        grids.append(grid)
    if len(grids) == 1:
        return grids[0]
    return Grid(np.concatenate([grid.array for grid in grids]), grids[0].affine)


def _mask_values(grid: Grid, path: Path) -> NDArray[Any]:
    """Return the one channel of a mask, shape S, as integers >= 0."""
    array = drop_opaque_alpha(grid.array)
    if any((channel != array[0]).any() for channel in array[1:]):
        raise DataError(f"{path}: a mask needs 1 channel, got {len(array)} that differ")
    values = array[0]
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise DataError(f"{path}: the mask holds a value that is not finite")
        fraction = values[values != np.floor(values)]
        if fraction.size:
            raise DataError(f"{path}: mask values must be integers, got {float(fraction[0]):g}")
        values = values.astype(np.int64)
    if values.dtype.kind == "i" and values.min() < 0:
        raise DataError(f"{path}: mask values must be >= 0, got {int(values.min())}")
    return values


def read_label(manifest: Manifest, case: Case, image: Grid) -> NDArray[np.uint8]:
    """Read the mask of a case as class indices, shape S.

    Args:
        manifest: Of the site; its ``label_kind`` says what a value means.
        case: A case with at least one label file; several binary files are united.
        image: The image that the mask must lie on.

    Raises:
        DataError: A file cannot be read, lies on another grid than the image, or holds a value that is
            not a class.
    """
    if not case.label:
        raise DataError(
            f"{manifest.folder / 'manifest.json'}: case {case.id} has no mask",
            "take the case out of the manifest, or add its mask file",
        )
    if manifest.label_kind == "semantic" and len(case.label) > 1:
        raise DataError(
            f"{manifest.folder / 'manifest.json'}: case {case.id} has {len(case.label)} semantic masks",
            'give one file, or set label_kind to "binary"',
        )
    united = np.zeros(image.array.shape[1:], dtype=np.uint8)
    for name in case.label:
        path = manifest.path(name)
        grid = read_grid(path, manifest.spatial_dims, is_mask=True)
        _check_same_grid(image, grid, path, manifest.path(case.image[0]))
        values = _mask_values(grid, path)
        if manifest.label_kind != "semantic":
            united |= (values > 0).astype(np.uint8)
            continue
        largest = int(values.max())
        if largest > len(manifest.classes):
            names = ", ".join(f"{k} {name}" for k, name in enumerate(manifest.classes, start=1))
            raise DataError(
                f"{path}: mask value {largest} is no class, expected 0 background, {names}",
                'if every value above 0 is the one class, set label_kind to "binary"'
                if len(manifest.classes) == 1
                else "add the class to `classes` in the manifest, or correct the mask",
            )
        united = values.astype(np.uint8)
    return united


def read_raw(manifest: Manifest, case: Case) -> RawCase:
    """Read a case as its files have it.

    Raises:
        DataError: See ``read_image`` and ``read_label``.
    """
    image = read_image(manifest, case)
    label = read_label(manifest, case, image) if manifest.task == "segmentation" else None
    return RawCase(image.array, label, image.affine)
