"""The manifest of a site's data set: which patient, which files, which split.

A data set is a folder with a ``manifest.json``. Images and labels stay in their own formats and places;
the manifest names them. Rules:
- A path is relative to the manifest's folder, or absolute.
- A split is by patient: no patient is in two splits.
- 2D arrays are (rows, columns), and a box is (x1, y1, x2, y2) in pixels with x along the columns, as in
  torchvision. 3D arrays are in the file's own axis order, and a box is (a1, b1, c1, a2, b2, c2) in voxel
  indices along the three axes, as in MONAI.
- Label value and box label k is ``classes[k - 1]``; 0 is background.
"""

import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedvision.config import Job, Name, PositiveInt
from fedvision.errors import DataError
from fedvision.storage import write_text

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
FILE_NAME = "manifest.json"


class Case(BaseModel):
    """One image with its label: a scan, a slide, a picture."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    id: Annotated[str, Field(min_length=1, max_length=200)]
    patient: Annotated[str, Field(min_length=1, max_length=200)]
    split: Split
    image: tuple[str, ...] = Field(min_length=1, description="one file, or one file a channel")
    label: tuple[str, ...] = Field((), description="mask file; several binary masks are united")
    boxes: tuple[tuple[float, ...], ...] | None = Field(None, description="detection only")
    box_labels: tuple[PositiveInt, ...] | None = Field(None, description="one a box, 1 is the first class")


class Manifest(BaseModel):
    """A site's data set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    site: Name
    task: Literal["segmentation", "detection"]
    spatial_dims: Literal[2, 3]
    classes: tuple[str, ...] = Field(min_length=1)
    label_kind: Literal["semantic", "binary", "instance", "boxes"] = Field(
        description="semantic: value k is class k; binary: every value > 0 is class 1; "
        "instance: every value > 0 is one object of class 1; boxes: detection"
    )
    source: str = Field("", description="where the data came from, for people")
    cases: tuple[Case, ...]

    _folder: Path = Path()

    @model_validator(mode="after")
    def _kinds_agree(self) -> Self:
        if (self.task == "detection") != (self.label_kind == "boxes"):
            raise ValueError('label_kind must be "boxes" for detection, and only there')
        ids = [case.id for case in self.cases]
        if len(set(ids)) != len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise ValueError(f"case id {twice!r} stands twice")
        return self

    @property
    def folder(self) -> Path:
        """The folder that relative paths start from."""
        return self._folder

    def in_split(self, split: Split) -> tuple[Case, ...]:
        """Return the cases of a split, in the manifest's order."""
        return tuple(case for case in self.cases if case.split == split)

    def path(self, name: str) -> Path:
        """Return the path of a file that a case names."""
        return self._folder / name


def load_manifest(folder: Path) -> Manifest:
    """Read ``folder/manifest.json``.

    Raises:
        DataError: The file is absent, is not JSON, or does not validate.
    """
    path = folder / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path}: no manifest", "`fedvision data import --help` shows how to make one from your files"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a JSON manifest: {error}") from None
    return parse_manifest(content, path)


def parse_manifest(content: object, path: Path) -> Manifest:
    """Validate a manifest that stands at ``path``.

    Raises:
        DataError: It does not validate; the message names the case and the field.
    """
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise DataError(f"{path}: {where + ': ' if where else ''}{reason[0].lower()}{reason[1:]}") from None
    manifest._folder = path.parent.resolve()
    return manifest


def save_manifest(manifest: Manifest, folder: Path) -> Path:
    """Write ``folder/manifest.json`` atomically, one line a case, and return its path.

    Raises:
        StorageError: The disk is full or the folder is not writable.
    """
    head = manifest.model_dump(mode="json", exclude={"cases"})
    cases = ",\n  ".join(
        json.dumps(case.model_dump(mode="json", exclude_none=True), ensure_ascii=False)
        for case in manifest.cases
    )
    text = json.dumps(head, ensure_ascii=False, indent=1)[:-2] + f',\n "cases": [\n  {cases}\n ]\n}}\n'
    path = folder / FILE_NAME
    write_text(path, text)
    return path


def find_manifests(root: Path) -> dict[str, Manifest]:
    """Return the manifests of all sites below ``root``, by site name, sorted.

    Args:
        root: A folder whose direct sub-folders are sites' data sets.

    Raises:
        DataError: The folder is absent, holds no manifest, or two sites have one name.
    """
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder", "set data.root in the job file, or run `fedvision data import`"
        )
    manifests: dict[str, Manifest] = {}
    for path in sorted(root.glob(f"*/{FILE_NAME}")):
        manifest = load_manifest(path.parent)
        if manifest.site in manifests:
            raise DataError(
                f"two sites are named {manifest.site}: {manifests[manifest.site].folder} "
                f"and {path.parent.resolve()}",
                "give each site a name of its own in its manifest.json",
            )
        manifests[manifest.site] = manifest
    if not manifests:
        raise DataError(
            f"{root}: no */{FILE_NAME} below this folder",
            "`fedvision data import --help` shows how to make one",
        )
    return dict(sorted(manifests.items()))


def pool_manifests(site: str, manifests: list[Manifest]) -> Manifest:
    """Return one manifest with the cases of several, as if they lay at one site.

    Case and patient names get the site's name in front, so that equal names at two sites stay apart.

    Raises:
        DataError: The manifests differ in task, dimensions, classes or kind of label.
    """
    first = manifests[0]
    for other in manifests[1:]:
        for name in ("task", "spatial_dims", "classes", "label_kind"):
            if getattr(other, name) != getattr(first, name):
                raise DataError(
                    f"{first.site} and {other.site} cannot be pooled: {name} is {getattr(first, name)} "
                    f"and {getattr(other, name)}"
                )
    cases = tuple(
        case.model_copy(
            update={
                "id": f"{m.site}/{case.id}",
                "patient": f"{m.site}/{case.patient}",
                "image": tuple(str(m.path(name)) for name in case.image),
                "label": tuple(str(m.path(name)) for name in case.label),
            }
        )
        for m in manifests
        for case in m.cases
    )
    return first.model_copy(update={"site": site, "cases": cases})


def difference(manifest: Manifest, job: Job) -> tuple[str, object, object] | None:
    """Return what a data set and a job disagree about: the name of a field, the set's value, the job's.

    Returns:
        The first of task, dimensions and classes that differs; None where all agree.
    """
    for name, ours, theirs in (
        ("task", manifest.task, job.task.kind),
        ("spatial_dims", manifest.spatial_dims, job.task.spatial_dims),
        ("classes", list(manifest.classes), list(job.task.classes)),
    ):
        if ours != theirs:
            return name, ours, theirs
    return None
