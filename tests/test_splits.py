"""Splits and artificial sites: by patient, whatever the numbers."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedvision.data.manifest import SPLITS
from fedvision.data.splits import parse_fractions, split_named, split_patients, spread_patients
from fedvision.errors import ConfigError

names = st.lists(st.text("abcdef0123", min_size=1, max_size=6), min_size=1, max_size=60)
shares = st.tuples(st.integers(1, 10), st.integers(0, 5), st.integers(0, 5))


@given(patients=names, parts=shares, seed=st.integers(0, 100))
def test_every_patient_is_in_one_split_and_sizes_follow_the_fractions(
    patients: list[str], parts: tuple[int, int, int], seed: int
) -> None:
    fractions = [part / sum(parts) for part in parts]
    splits = split_patients(patients, fractions, seed)
    assert set(splits) == set(patients)
    counts = Counter(splits.values())
    wanted = sum(fraction > 0 for fraction in fractions)
    for split, fraction in zip(SPLITS, fractions, strict=True):
        if fraction == 0:
            assert counts[split] == 0
        elif len(splits) >= wanted:
            assert counts[split] >= 1
        if len(splits) >= 3:
            assert abs(counts[split] - fraction * len(splits)) <= 2
    assert counts["train"] >= 1


@given(patients=names, seed=st.integers(0, 100))
def test_the_order_of_the_files_does_not_matter(patients: list[str], seed: int) -> None:
    fractions = (0.7, 0.1, 0.2)
    assert split_patients(patients, fractions, seed) == split_patients(patients[::-1], fractions, seed)


def test_another_seed_gives_another_division() -> None:
    patients = [f"p{number}" for number in range(40)]
    one, two = (split_patients(patients, (0.5, 0.25, 0.25), seed) for seed in (1, 2))
    assert one != two
    assert Counter(one.values()) == Counter(two.values()) == {"train": 20, "val": 10, "test": 10}


@given(patients=names, num_sites=st.integers(1, 5), seed=st.integers(0, 100))
def test_dealt_sites_differ_by_one_patient_at_most(patients: list[str], num_sites: int, seed: int) -> None:
    if num_sites > len(set(patients)):
        with pytest.raises(ConfigError, match="cannot spread"):
            spread_patients(patients, num_sites, seed)
        return
    sites = spread_patients(patients, num_sites, seed)
    assert set(sites) == set(patients)
    counts = Counter(sites.values())
    assert set(counts) == {f"site-{number}" for number in range(1, num_sites + 1)}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_fractions_must_be_three_and_sum_to_one() -> None:
    assert parse_fractions("0.7, 0.1,0.2") == (0.7, 0.1, 0.2)
    assert parse_fractions("1,0,0") == (1.0, 0.0, 0.0)
    for text in ("0.7,0.3", "0.7,0.1,0.1", "a,b,c", "0,0.5,0.5", "1.2,-0.1,-0.1", "", "nan,0,1"):
        with pytest.raises(ConfigError, match="three numbers with sum 1"):
            parse_fractions(text)


def test_common_words_for_splits_are_known() -> None:
    assert [split_named(word) for word in ("Train", " validation", "valid", "TEST", "images")] == [
        "train",
        "val",
        "val",
        "test",
        None,
    ]
