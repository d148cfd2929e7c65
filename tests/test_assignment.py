"""Site, patient and split of imported cases: what the user says, and what cannot be."""

from collections import Counter
from pathlib import Path

import pytest

from fedvision.data.assignment import Assignment
from fedvision.errors import ConfigError, DataError
from tests.source_files import run, text, visits


def test_sites_patients_and_splits_come_from_a_table(tmp_path: Path) -> None:
    how = Assignment(
        sites_from="table.csv:centre", patient_from="table.csv:person", split_from="table.csv:set"
    )
    imported = run("masks", visits(tmp_path / "in"), tmp_path / "out", how)
    assert [(one.site, len(one.cases)) for one in imported.manifests] == [("ams", 6), ("rot", 6)]
    assert imported.manifests[0].cases[1].patient == "person 0"
    assert Counter(case.split for case in imported.manifests[1].cases) == {"train": 2, "val": 2, "test": 2}


def test_a_pattern_keeps_the_visits_of_a_patient_together(tmp_path: Path) -> None:
    source = visits(tmp_path / "in")
    for how in (
        Assignment(site="a", patient_pattern=r"^(p\d+)_"),
        Assignment(random_sites=3, patient_pattern=r"^(p\d+)_", fractions=(0.5, 0.0, 0.5)),
    ):
        imported = run("masks", source, tmp_path / "out", how, overwrite=True)
        places = {}
        for manifest in imported.manifests:
            for case in manifest.cases:
                place = (manifest.site, case.split)
                assert places.setdefault(case.patient, place) == place
        assert len(places) == 6
        assert not any("patient of its own" in note for note in imported.notes)


@pytest.mark.parametrize(
    ("how", "error", "told"),
    [
        (Assignment(), ConfigError, "exactly one way which site"),
        (Assignment(site="a", random_sites=2), ConfigError, "exactly one way which site"),
        (
            Assignment(site="a", patient_from="t:c", patient_pattern="(x)"),
            ConfigError,
            "one of --patient-from",
        ),
        (Assignment(site="a", split_from="t:c", fractions=(1, 0, 0)), ConfigError, "one of --split-from"),
        (Assignment(site="a", patient_pattern="p(["), ConfigError, "--patient-pattern"),
        (Assignment(site="a", patient_pattern="p"), ConfigError, "needs a group"),
        (Assignment(site="a", patient_pattern="^(p00)_"), DataError, "matches 2 of 12 names, not p01_v0"),
        (Assignment(site="!!"), DataError, "a site cannot be named"),
        (Assignment(random_sites=99), ConfigError, "cannot spread 12 patients over 99"),
        (Assignment(sites_from="table.csv"), ConfigError, "expected FILE.csv:COLUMN"),
        (Assignment(sites_from="gone.csv:x"), DataError, "cannot read gone.csv"),
        (Assignment(sites_from="table.csv:x"), DataError, "no column 'x'"),
        (Assignment(sites_from="other.csv:b"), DataError, "no column names the cases"),
        (
            Assignment(sites_from="part.csv:b"),
            DataError,
            r"no b for 10 of 12 cases \(p01_v0, p01_v1, p02_v0, ...\)",
        ),
        (Assignment(sites_from="twice.csv:b"), DataError, "has both 'x' and 'y' as b"),
        (Assignment(site="a", split_from="table.csv:centre"), DataError, "is train, val or test, got 'ams'"),
        (
            Assignment(site="a", split_from="torn.csv:b", patient_pattern=r"^(p\d+)_"),
            DataError,
            r"6 patients would be in two splits \(p00, p01, p02, ...\)",
        ),
    ],
)
def test_choices_that_cannot_work_are_explained_and_nothing_is_written(
    tmp_path: Path, how: Assignment, error: type[Exception], told: str
) -> None:
    source = visits(tmp_path / "in")
    text(source / "other.csv", "a,b\nhello,x\n")
    text(source / "part.csv", "a,b\np00_v0,x\np00_v1,y\nunknown,z\n")
    text(source / "twice.csv", "a,b\np00_v0,x\np00_v0,y\n")
    rows = [
        f"p{number:02d}_v{visit},{'train' if visit else 'test'}" for number in range(6) for visit in range(2)
    ]
    text(source / "torn.csv", "a,b\n" + "\n".join(rows))
    with pytest.raises(error, match=told):
        run("masks", source, tmp_path / "out", how)
    assert not (tmp_path / "out").exists()
