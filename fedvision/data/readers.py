"""A case of the manifest to the tensors that a task trains on, and a store that keeps them in memory."""

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedvision.config import Job
from fedvision.data.images import RawCase, luminance, read_raw, spacing_of
from fedvision.data.manifest import Case, Manifest
from fedvision.data.preprocessing import (
    apply_user_transform,
    normalise_intensity,
    resample_image,
    resample_label,
    resampled_size,
    to_ras,
)
from fedvision.errors import DataError
from fedvision.references import resolve_reference


@dataclass(frozen=True)
class Sample:
    """One case, read and preprocessed.

    Attributes:
        case_id: As in the manifest.
        patient: As in the manifest.
        image: float32, shape (C, *S), S the spatial grid.
        label: uint8 class indices, shape S; None for detection.
        boxes: float32, shape (N, 2 * dims); see ``manifest`` for the axes. None for segmentation.
        box_labels: int64, shape (N,), 1 is the first class. None for segmentation.
        spacing_mm: Voxel size along each axis of S; ones for pictures without a size.
    """

    case_id: str
    patient: str
    image: torch.Tensor
    label: torch.Tensor | None
    boxes: torch.Tensor | None
    box_labels: torch.Tensor | None
    spacing_mm: tuple[float, ...]

    @property
    def size_bytes(self) -> int:
        """Memory of the tensors."""
        tensors = (self.image, self.label, self.boxes, self.box_labels)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _to_channels(raw: RawCase, wanted: int, case: Case) -> np.ndarray:
    """Return the image with the channels that the network reads."""
    found = len(raw.image)
    if found == wanted:
        return raw.image
    if found == 1 and wanted == 3:
        return np.repeat(raw.image, 3, axis=0)
    if found == 3 and wanted == 1 and raw.image.ndim == 3:
        return luminance(raw.image)
    raise DataError(
        f"case {case.id}: {case.image[0]} has {found} channel{'s' * (found > 1)}, "
        f"task.in_channels is {wanted}",
        f"set task.in_channels to {found}",
    )


def _read_boxes(manifest: Manifest, case: Case, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the boxes of a case, cut at the image's edge, and their labels.

    Raises:
        DataError: The case has no list of boxes, or one of them is empty, outside or of no class.
    """
    where = f"{manifest.folder / 'manifest.json'}: case {case.id}"
    if case.boxes is None:
        raise DataError(f"{where} has no `boxes`", "an image without objects has an empty list")
    labels = case.box_labels or ()
    if len(labels) != len(case.boxes):
        raise DataError(f"{where} has {len(case.boxes)} boxes but {len(labels)} box_labels")
    dims = manifest.spatial_dims
    # A picture's box begins with x, which runs along the columns: the last axis.
    edge = torch.tensor(shape[::-1] if dims == 2 else shape, dtype=torch.float32)
    boxes = torch.zeros((len(labels), 2 * dims))
    for number, (box, label) in enumerate(zip(case.boxes, labels, strict=True)):
        if len(box) != 2 * dims:
            raise DataError(f"{where}: a box needs {2 * dims} numbers, got {len(box)}")
        if label > len(manifest.classes):
            raise DataError(f"{where}: box label {label} is no class, there are {len(manifest.classes)}")
        corners = torch.tensor(box, dtype=torch.float32).reshape(2, dims)
        cut = torch.minimum(corners.clamp(min=0), edge)
        if (cut[1] <= cut[0]).any():
            raise DataError(
                f"{where}: box {list(box)} is empty or outside the image",
                "`fedvision data check` lists every such box",
            )
        boxes[number] = cut.reshape(-1)
    return boxes, torch.tensor(labels, dtype=torch.int64)


def _resample(sample: Sample, wanted: tuple[float, ...], case: Case) -> Sample:
    """Bring a volume to about the wanted voxel size; ``spacing_mm`` is what the whole voxels came to."""
    shape = tuple(sample.image.shape[1:])
    size = resampled_size(shape, sample.spacing_mm, wanted)
    if size == shape:
        return sample
    if max(size) > 16 * max(shape):
        raise DataError(
            f"case {case.id}: {case.image[0]} has voxels of {sample.spacing_mm} mm and would grow to {size}",
            "is the spacing in its header right? compare preprocessing.spacing_mm",
        )
    factors = torch.tensor([new / old for new, old in zip(size, shape, strict=True)])
    return replace(
        sample,
        image=resample_image(sample.image, size),
        label=None if sample.label is None else resample_label(sample.label, size),
        boxes=None if sample.boxes is None else sample.boxes * factors.repeat(2),
        spacing_mm=tuple(mm * old / new for mm, old, new in zip(sample.spacing_mm, shape, size, strict=True)),
    )


def _transformed(sample: Sample, reference: str) -> Sample:
    """Pass a sample through the user's own transform."""
    content = {
        "image": sample.image,
        "label": sample.label,
        "boxes": sample.boxes,
        "box_labels": sample.box_labels,
        "spacing_mm": sample.spacing_mm,
    }
    given = {key: value for key, value in content.items() if value is not None}
    returned = apply_user_transform(resolve_reference(reference), reference, given, sample.case_id)
    return replace(sample, **returned)


def read_case(manifest: Manifest, case: Case, job: Job) -> Sample:
    """Read a case and bring it to the form that the job asks for.

    In this order: channels, orientation (volumes of a segmentation: RAS), spacing, intensity, the
    user's own transform. The intensity of a resampled image is normalised after resampling.

    Raises:
        DataError: A file is absent, damaged or does not fit the manifest or the job.
        ConfigError: The user's transform cannot be imported.
    """
    if manifest.spatial_dims != job.task.spatial_dims:
        raise DataError(
            f"site {manifest.site}: the data has {manifest.spatial_dims} axes, task.spatial_dims is "
            f"{job.task.spatial_dims}",
            f"set task.spatial_dims to {manifest.spatial_dims}",
        )
    settings, dims = job.preprocessing, manifest.spatial_dims
    raw = read_raw(manifest, case)
    image, label, affine = _to_channels(raw, job.task.in_channels, case), raw.label, raw.affine
    if affine is not None and manifest.task == "segmentation":
        image, label, affine = to_ras(image, label, affine)
    values = np.ascontiguousarray(image, dtype=np.float32)
    if not np.isfinite(values).all():
        raise DataError(
            f"{manifest.path(case.image[0])}: the image holds a value that is not finite (NaN or infinity)",
            "repair the file, or take the case out of the manifest",
        )
    boxes = _read_boxes(manifest, case, values.shape[1:]) if manifest.task == "detection" else (None, None)
    sample = Sample(
        case_id=case.id,
        patient=case.patient,
        image=torch.from_numpy(values),
        label=None if label is None else torch.from_numpy(np.ascontiguousarray(label)),
        boxes=boxes[0],
        box_labels=boxes[1],
        spacing_mm=spacing_of(affine, dims),
    )
    if settings.spacing_mm is not None:
        if affine is None:
            raise DataError(
                f"{manifest.path(case.image[0])}: the file does not say how large a pixel is",
                "leave preprocessing.spacing_mm out for pictures",
            )
        sample = _resample(sample, settings.spacing_mm, case)
    try:
        normalised = normalise_intensity(sample.image.numpy(), settings, raw.image.dtype)
    except DataError as error:
        raise DataError(f"{manifest.path(case.image[0])}: {error}", error.hint) from None
    sample = replace(sample, image=torch.from_numpy(normalised))
    return sample if settings.transform is None else _transformed(sample, settings.transform)


def default_limit_bytes() -> int:
    """Return what a store may keep: 2 GiB, or a quarter of the memory that is free now if that is less."""
    import psutil

    return int(min(2 * 2**30, psutil.virtual_memory().available // 4))


class CaseStore:
    """Reads cases of one site and keeps them in memory, the least recently used dropped first.

    A sample is shared between callers: clone a tensor before changing it in place. May be used from
    several threads.
    """

    def __init__(self, manifest: Manifest, job: Job, limit_bytes: int | None = None) -> None:
        """Start empty.

        Args:
            manifest: Of the site.
            job: Says how cases are preprocessed.
            limit_bytes: Memory for samples, >= 0; None for ``default_limit_bytes()``.
        """
        self._manifest = manifest
        self._job = job
        self._limit_bytes = default_limit_bytes() if limit_bytes is None else limit_bytes
        self._samples: OrderedDict[str, Sample] = OrderedDict()
        self._size_bytes = 0
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """Memory that the kept samples take."""
        return self._size_bytes

    def load(self, case: Case) -> Sample:
        """Return the sample of a case, from memory if it is there.

        Raises:
            DataError: See ``read_case``.
        """
        with self._lock:
            if case.id in self._samples:
                self._samples.move_to_end(case.id)
                return self._samples[case.id]
        sample = read_case(self._manifest, case, self._job)
        with self._lock:
            if case.id not in self._samples and sample.size_bytes <= self._limit_bytes:
                self._samples[case.id] = sample
                self._size_bytes += sample.size_bytes
                while self._size_bytes > self._limit_bytes:
                    self._size_bytes -= self._samples.popitem(last=False)[1].size_bytes
        return sample
