"""Whole runs with secure aggregation, in one process: real sites, real keys, real state on disk."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedvision.storage import load_tensors, read_json, read_lines

Run = Callable[..., Path]


def model(run: Path) -> np.ndarray:
    tensors, _ = load_tensors(run / "model.safetensors")
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


@pytest.mark.parametrize("level", ["sum", "sketch"])
def test_the_model_is_that_of_plain_aggregation_but_for_rounding(tiny, run_tiny: Run, level: str) -> None:
    hidden = model(run_tiny(tiny.secure(level, rounds=1), "hidden"))
    plain = model(run_tiny(tiny.changed(rounds=1), "plain"))
    assert not np.array_equal(hidden, plain)
    assert np.abs(hidden - plain).max() < 1e-6


def test_a_run_leaves_its_record(tiny, run_tiny: Run) -> None:
    run = run_tiny(tiny.secure())
    rounds = [e for e in read_lines(run / "rounds.jsonl") if e["event"] == "round"]
    assert [e["level"] for e in rounds] == ["sum"] * 3
    assert all(e["train_loss"] > 0 for e in rounds)
    assert rounds[-1]["validation"]["mean_site"]["dice"] > 0
    assert set(read_json(run / "test.json")["sites"]) == {"a", "b", "c"}
