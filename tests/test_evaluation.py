import numpy as np
import pytest

from fedvision.training.evaluation import resample_patients
from fedvision_server.aggregate import intervals
from fedvision_sites.release import release_statistics

PATIENTS = ["p", "q", "p", "r"]
ROWS = np.eye(4)  # column j counts how often case j is in


def test_the_first_row_is_the_plain_sum() -> None:
    rows = np.arange(12.0).reshape(4, 3)
    assert np.array_equal(resample_patients(rows, PATIENTS, 0, seed=1), rows.sum(axis=0, keepdims=True))


def test_a_patient_is_drawn_with_all_of_their_cases() -> None:
    drawn = resample_patients(ROWS, PATIENTS, 200, seed=1)[1:]
    assert np.array_equal(drawn[:, 0], drawn[:, 2])
    assert not np.array_equal(drawn[:, 0], drawn[:, 1])
    patients = drawn[:, [0, 1, 3]]
    assert (patients.sum(axis=1) == 3).all()
    assert patients.mean(axis=0) == pytest.approx(1, abs=0.2)


def test_no_case_gives_rows_of_zeros() -> None:
    assert not resample_patients(np.zeros((0, 2)), [], 3, seed=1).any()


def test_resamples_depend_on_the_seed_of_the_site_alone() -> None:
    once, again = (release_statistics(ROWS, PATIENTS, 20, 7) for _ in range(2))
    assert np.array_equal(once, again)
    assert not np.array_equal(once, release_statistics(ROWS, PATIENTS, 20, 8))


def test_the_interval_of_a_mean_covers_it_about_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        values = rng.normal(5, 1, size=40)
        rows = np.stack([values, np.ones(40)], axis=1)
        sums = resample_patients(rows, [str(i) for i in range(40)], 200, seed=trial)
        low, high = intervals(sums[1:], lambda row: {"mean": row[0] / row[1]})["mean"]
        covered += low <= 5 <= high
    assert 0.89 <= covered / 300 <= 0.98
