"""Intensity, grid and the user's own transform."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedvision.config import PreprocessingSection
from fedvision.data.preprocessing import normalise_intensity, resampled_size
from fedvision.data.readers import Sample
from fedvision.errors import ConfigError, DataError
from tests.reader_files import job_for, manifest_for, read, write_picture


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A folder with a 6 x 8 picture and its mask, classes 1 and 2."""
    return write_picture(tmp_path)


@given(
    image=arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
        elements=st.floats(-3e5, 3e5, width=32),
    ),
    mode=st.sampled_from(["zscore", "percentile", "window"]),
)
def test_normalised_intensities_are_finite_and_in_range(image: np.ndarray, mode: str) -> None:
    window = (-100.0, 300.0) if mode == "window" else None
    settings = PreprocessingSection.model_validate({"intensity": mode, "window": window})
    result = normalise_intensity(image, settings, image.dtype)
    assert result.shape == image.shape and result.dtype == np.float32
    assert np.isfinite(result).all()
    if mode == "zscore":
        for before, after in zip(image, result, strict=True):
            assert abs(float(after.mean(dtype=np.float64))) < 1e-3
            assert after.std() == pytest.approx(1, abs=1e-3) or not after.any() or before.std() < 1
    else:
        assert result.min() >= 0 and result.max() <= 1


def test_intensity_modes_give_the_numbers_they_promise() -> None:
    ramp = np.arange(1000, dtype=np.int16).reshape(1, 10, 100) - 200

    def run(dtype: type = np.int16, image: np.ndarray = ramp, **settings: Any) -> np.ndarray:
        section = PreprocessingSection.model_validate(settings)
        return normalise_intensity(image.astype(np.float32), section, np.dtype(dtype))

    window = run(intensity="window", window=[0, 400])
    assert window.flat[0] == 0 and window.flat[400] == pytest.approx(0.5) and window.flat[-1] == 1
    percentile = run(intensity="percentile")
    assert percentile.flat[9] == 0 and percentile.flat[500] == pytest.approx((500 - 9.99) / (994.005 - 9.99))
    assert run(np.uint8, np.full((1, 2, 2), 51), intensity="unit").max() == pytest.approx(0.2)
    assert not run(image=np.full((2, 3, 3), 7.0)).any()
    two = run(image=np.stack([ramp[0], 1000.0 * ramp[0]]), intensity="zscore")
    assert np.allclose(two[0], two[1], atol=1e-5)  # each channel on its own
    with pytest.raises(DataError, match=r'"unit" needs integers, or floats in 0..1, got -200 to 799'):
        run(np.float32, intensity="unit")


@given(
    shape=st.lists(st.integers(1, 300), min_size=3, max_size=3),
    old=st.lists(st.floats(0.3, 8), min_size=3, max_size=3),
    new=st.lists(st.floats(0.3, 8), min_size=3, max_size=3),
)
def test_a_resampled_grid_covers_the_same_extent(
    shape: list[int], old: list[float], new: list[float]
) -> None:
    size = resampled_size(tuple(shape), tuple(old), tuple(new))
    for n, mm, m, wanted in zip(shape, old, size, new, strict=True):
        assert m >= 1
        assert abs(m * wanted - n * mm) <= wanted / 2 + 1e-6 or m == 1


def test_the_users_transform_is_found_in_the_working_folder(
    picture: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("code")
    (folder / "own_transforms_for_test.py").write_text(
        "import torch\n"
        "def crop(case):\n"
        "    return {**case, 'image': case['image'][:, :4], 'label': case['label'][:4]}\n"
        "def forget(case):\n    return {'image': case['image']}\n"
        "def tear(case):\n    return {**case, 'label': case['label'][:2]}\n"
        "def fail(case):\n    raise RuntimeError('my own fault')\n"
        "def spoil(case):\n    return {**case, 'image': case['image'] * float('nan')}\n"
    )
    monkeypatch.chdir(folder)

    def run(name: str) -> Sample:
        return read(
            manifest_for(picture), job_for(2, ["x", "y"], transform=f"own_transforms_for_test:{name}")
        )

    sample = run("crop")
    assert sample.image.shape == (1, 4, 8)
    assert sample.label is not None and sample.label.shape == (4, 8)
    for name, told in {
        "forget": "must return a dict with image, label, spacing_mm, got a dict with image",
        "tear": r"`label` has shape \(2, 8\)",
        "fail": "own_transforms_for_test:fail: case one: RuntimeError: my own fault",
        "spoil": "not finite",
    }.items():
        with pytest.raises(DataError, match=told):
            run(name)
    with pytest.raises(ConfigError, match="absent is not in it"):
        run("absent")


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("no_such_module_at_all:f", "no module named no_such_module_at_all"),
        ("fedvision.no_such:f", "no module named fedvision.no_such"),
        ("fedvision.errors:nothing", "nothing is not in it"),
        ("fedvision.data.manifest:SPLITS", "SPLITS is not callable"),
    ],
)
def test_a_reference_that_leads_nowhere_says_where_it_broke(picture: Path, reference: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read(manifest_for(picture), job_for(2, ["x", "y"], transform=reference))
