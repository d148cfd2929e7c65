"""The demo data: the same bytes each time, and different as hospitals are."""

import hashlib
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fedvision.data.checks import check_sites
from fedvision.data.demo import SITES, SIZES, make_demo
from fedvision.data.facts import gather_facts
from fedvision.data.manifest import SPLITS, find_manifests
from fedvision.errors import ConfigError


def digest(root: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        total.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, task: str) -> None:
    roots = [make_demo(tmp_path / name, task, size="tiny", num_sites=2) for name in "ab"]
    assert digest(roots[0]) == digest(roots[1])
    assert digest(make_demo(tmp_path / "c", task, size="tiny", num_sites=2, seed=1)) != digest(roots[0])
    assert roots[0] == tmp_path / "a" / task
    assert list(find_manifests(roots[0])) == sorted(SITES[:2])


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_demo_passes_the_checks(tmp_path: Path, task: str) -> None:
    manifests = find_manifests(make_demo(tmp_path, task, size="tiny"))
    for name, manifest in manifests.items():
        counts = {split: len(manifest.in_split(split)) for split in SPLITS}
        assert counts == {split: SIZES["tiny"][split][SITES.index(name)] for split in SPLITS}
    assert [one for one in check_sites(manifests) if one.level == "error"] == []


def test_a_small_demo_has_repeat_visits_within_one_split() -> None:
    from fedvision.data.demo import _visits

    for number, site in enumerate(SITES):
        visits = list(_visits(site, {split: SIZES["small"][split][number] for split in SPLITS}))
        patients = {visit.patient for visit in visits}
        assert len({visit.case_id for visit in visits}) == len(visits)
        assert len(patients) < len(visits)
        assert len({(visit.patient, visit.split) for visit in visits}) == len(patients)
        assert 12 <= sum(visit.split == "train" for visit in visits) <= 24
        assert sum(visit.split == "test" for visit in visits) > 6


def test_sites_differ_in_scale_grid_and_orientation(tmp_path: Path) -> None:
    manifests = find_manifests(make_demo(tmp_path, "segmentation", size="tiny"))
    facts = {site: gather_facts(one, one.cases) for site, one in manifests.items()}
    tops = {site: np.median([one.percentiles[2] for one in many]) for site, many in facts.items()}
    assert max(tops.values()) > 5 * min(tops.values())
    assert len({many[0].spacing_mm for many in facts.values()}) == 4
    orientations = set()
    for manifest in manifests.values():
        image, label = (
            nibabel.load(manifest.path(name[0]))
            for name in (manifest.cases[0].image, manifest.cases[0].label)
        )
        orientations.add(nibabel.aff2axcodes(image.affine))
        assert np.array_equal(image.affine, label.affine) and image.shape == label.shape
        assert image.header.get_xyzt_units()[0] == "mm"
    assert len(orientations) == 4


def test_findings_stand_out_from_what_is_around_them(tmp_path: Path) -> None:
    manifest = find_manifests(make_demo(tmp_path, "segmentation", size="tiny", num_sites=1))["north"]
    for case in manifest.cases[1:4]:
        image = nibabel.load(manifest.path(case.image[0])).get_fdata()
        mask = nibabel.load(manifest.path(case.label[0])).get_fdata()
        brain = image[(mask == 0) & (image > 0.3 * image.max())]
        assert image[mask == 1].mean() < 0.6 * np.median(brain)
        if (mask == 2).any():
            assert image[mask == 2].mean() > 1.25 * np.median(brain)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"task": "sorting"}, "segmentation or detection"),
        ({"task": "detection", "num_sites": 5}, "1 to 4 sites"),
        ({"task": "detection", "size": "huge"}, "one of tiny, small, large"),
    ],
)
def test_an_impossible_demo_is_refused(tmp_path: Path, arguments: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make_demo(tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []
