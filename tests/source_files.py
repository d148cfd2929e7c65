"""Small sources in foreign layouts, and the real ones where they are at hand, for tests of the importers."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from fedvision.data.assignment import Assignment
from fedvision.data.checks import check_sites
from fedvision.data.importing import Imported, import_data
from fedvision.data.manifest import Manifest, find_manifests
from fedvision.data.sources import SourceOptions

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
ONE = Assignment(site="a")


def picture(path: Path, shape: tuple[int, int] = (20, 30), value: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng([value, *path.name.encode()]).integers(0, 255, shape).astype(np.uint8)
    Image.fromarray(array).save(path)
    return path


def mask(path: Path, values: tuple[int, ...] = (1,), shape: tuple[int, int] = (20, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros(shape, dtype=np.uint8)
    for number, value in enumerate(values):
        array[2 + 3 * number : 4 + 3 * number, 5:9] = value
    Image.fromarray(array).save(path)
    return path


def volume(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def run(
    format_name: str,
    source: Path,
    out: Path,
    how: Assignment = ONE,
    options: SourceOptions | None = None,
    **rest: Any,
) -> Imported:
    return import_data(format_name, source, out, options or SourceOptions(), how, **rest)


def only(imported: Imported) -> Manifest:
    assert len(imported.manifests) == 1
    return imported.manifests[0]


def is_sound(out: Path) -> bool:
    return not [one for one in check_sites(find_manifests(out)) if one.level == "error"]


def science_bowl(source: Path, names: list[str]) -> Path:
    for name in names:
        picture(source / name / "images" / f"{name}.png")
        mask(source / name / "masks" / "one.png", (255,))
        mask(source / name / "masks" / "two.png", (0, 255))
    picture(source / "stage1_test" / "x" / "images" / "x.png")
    return source


def visits(source: Path) -> Path:
    rows = ["file;centre;person;set"]
    for number in range(12):
        name = f"p{number // 2:02d}_v{number % 2}"
        picture(source / "images" / f"{name}.png")
        mask(source / "labels" / f"{name}.png")
        split = "train" if number < 8 else "val" if number < 10 else "test"
        rows.append(f"./images/{name}.png;{'ams' if number < 6 else 'rot'};person {number // 2};{split}")
    text(source / "table.csv", "\ufeff" + "\n".join(rows))
    return source


def real(name: str) -> Path:
    folder = REAL / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not at hand")
    return folder
