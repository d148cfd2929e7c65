"""Whole runs with secure aggregation, in one process: real sites, real keys, real state on disk."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedvision.errors import ConfigError
from fedvision.secagg.roster import level_for
from fedvision.storage import load_tensors, read_json, read_lines
from tests.conftest import write_site

Run = Callable[..., Path]


def model(run: Path) -> np.ndarray:
    tensors, _ = load_tensors(run / "model.safetensors")
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def test_the_statistics_of_a_sum_are_those_of_plain_aggregation(tiny, run_tiny: Run) -> None:
    job = tiny.secure(rounds=1, secure_aggregation__release=[])
    hidden = read_json(run_tiny(job, "hidden") / "test.json")
    plain = read_json(run_tiny(tiny.changed(rounds=1), "plain") / "test.json")
    assert hidden["sites"] == {}
    for name in ("mean_site", "mean_site_intervals"):
        for metric, value in plain[name].items():
            assert hidden[name][metric] == pytest.approx(value, abs=1e-4), (name, metric)
    for metric, value in plain["pooled"]["metrics"].items():
        assert hidden["pooled"]["metrics"][metric] == pytest.approx(value, abs=1e-4), metric


@pytest.mark.parametrize("level", ["sum", "sketch"])
def test_the_model_is_that_of_plain_aggregation_but_for_rounding(tiny, run_tiny: Run, level: str) -> None:
    hidden = model(run_tiny(tiny.secure(level, rounds=1), "hidden"))
    plain = model(run_tiny(tiny.changed(rounds=1, secure_aggregation__level=level), "plain"))
    assert not np.array_equal(hidden, plain)
    assert np.abs(hidden - plain).max() < 1e-6


@pytest.mark.parametrize("level", ["sketch", "gram"])
def test_a_small_model_is_refused_where_updates_are_sketched(tiny, run_tiny: Run, level: str) -> None:
    write_site(tiny.root, "d")
    small = {"channels": [4, 8], "strides": [2], "num_res_units": 0}
    with pytest.raises(ConfigError, match="needs a model of 10000 weights or more, this one has 580"):
        run_tiny(tiny.secure(level, model__args=small))


@pytest.mark.parametrize(
    ("num_sites", "size", "level"),
    [(4, 10_000, "sum"), (5, 10_000, "sketch"), (10, 10_000, "gram"), (5, 9_999, "sum"), (10, 580, "sum")],
)
def test_the_level_follows_from_the_number_of_sites_and_weights(
    num_sites: int, size: int, level: str
) -> None:
    assert level_for("auto", num_sites, size) == level


def test_level_gram_runs_with_four_sites(tiny, run_tiny: Run) -> None:
    write_site(tiny.root, "d")
    hidden = model(run_tiny(tiny.secure("gram", rounds=1), "hidden"))
    plain = model(run_tiny(tiny.changed(rounds=1, secure_aggregation__level="gram"), "plain"))
    assert np.abs(hidden - plain).max() < 1e-6


def test_a_run_leaves_its_record(tiny, run_tiny: Run) -> None:
    run = run_tiny(tiny.secure())
    rounds = [e for e in read_lines(run / "rounds.jsonl") if e["event"] == "round"]
    assert [e["level"] for e in rounds] == ["sum"] * 3
    assert all(e["train_loss"] > 0 for e in rounds)
    assert rounds[-1]["validation"]["mean_site"]["dice"] > 0
    assert set(read_json(run / "test.json")["sites"]) == {"a", "b", "c"}
