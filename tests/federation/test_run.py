"""Whole runs in one process: what they produce, how they survive a kill, what they refuse."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedvision.errors import DataError, FedvisionError, ModelError, RoundError, StorageError
from fedvision.simulation.run import make_plan, start_run
from fedvision.storage import load_tensors, read_lines
from tests.conftest import write_site

Run = Callable[..., Path]


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def model(run: Path) -> dict[str, np.ndarray]:
    return load_tensors(run / "model.safetensors")[0]


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


def test_a_run_leaves_everything_a_user_needs(tiny, run_tiny: Run) -> None:
    run = run_tiny(tiny.job)
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    for expected in (
        "job.toml",
        "environment.json",
        "rounds.jsonl",
        "test.json",
        "model.safetensors",
        "sites/a/log.jsonl",
        "sites/b/test-cases.jsonl",
        "sites/c/examples/worst.png",
        "checkpoints/round-0003.safetensors",
    ):
        assert expected in names, expected
    test = json.loads((run / "test.json").read_text())
    assert test["headline"] == "dice"
    assert set(test["sites"]) == {"a", "b", "c"}
    values = [site["metrics"]["dice"] for site in test["sites"].values()]
    assert test["mean_site"]["dice"] == pytest.approx(np.mean(values))
    assert test["worst_site"]["metrics"]["dice"] == min(values)
    low, high = test["pooled"]["intervals"]["dice"]
    assert low <= high
    events = read_lines(run / "rounds.jsonl")
    assert sum(e["event"] == "train" for e in events) == 9
    assert sum(e["event"] == "round" for e in events) == 3


def test_training_improves_the_model(tiny, run_tiny: Run) -> None:
    run = run_tiny(tiny.changed(rounds=8, training__steps=6))
    rounds = [e for e in read_lines(run / "rounds.jsonl") if e["event"] == "round"]
    first, last = (e["validation"]["mean_site"]["dice"] for e in (rounds[0], rounds[-1]))
    assert last > first
    assert last > 0.6


def test_two_runs_of_one_seed_are_the_same_bit_for_bit(tiny, run_tiny: Run) -> None:
    first, second = model(run_tiny(tiny.job, "one")), model(run_tiny(tiny.job, "two"))
    assert same_bits(first, second)
    assert not same_bits(first, model(run_tiny(tiny.changed(seed=1), "three")))


def kill_at(number: int) -> Callable[[dict[str, Any]], None]:
    """Return an observer that kills the run at its ``number``-th event."""
    seen = 0

    def observe(event: dict[str, Any]) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            raise Killed

    return observe


@pytest.mark.parametrize("local", [False, True])
def test_a_run_killed_at_any_event_resumes_to_the_same_weights(tiny, run_tiny: Run, local: bool) -> None:
    job = tiny.changed(model__local_normalisation=local)
    if local:
        job = tiny.changed(
            model__local_normalisation=True,
            model__args={"channels": [4, 8], "strides": [2], "num_res_units": 0, "norm": "batch"},
        )
    for name in "abc":  # no test cases: nothing to draw, so many runs fit into the test
        shutil.rmtree(tiny.root / name)
        write_site(tiny.root, name, (3, 1, 0))
    events: list[dict[str, Any]] = []
    whole = model(run_tiny(job, "whole", events.append))
    for number in range(1, len(events) + 1):
        name = f"killed-{number}"
        with pytest.raises(Killed):
            run_tiny(job, name, kill_at(number))
        run = run_tiny(job, name)
        assert same_bits(model(run), whole), f"killed at event {number}: {events[number - 1]['event']}"
        assert not list(run.rglob("*.tmp"))
        shutil.rmtree(run)


def test_a_torn_checkpoint_name_never_counts(tiny, run_tiny: Run) -> None:
    whole = model(run_tiny(tiny.job, "whole"))
    with pytest.raises(Killed):
        run_tiny(tiny.job, "killed", kill_at(12))
    folder = tiny.root.parent / "killed"
    (folder / "checkpoints" / ".round-0009.safetensors.abc").write_bytes(b"half")
    assert same_bits(model(run_tiny(tiny.job, "killed")), whole)


def test_a_damaged_checkpoint_is_named_and_nothing_is_overwritten(tiny, run_tiny: Run) -> None:
    with pytest.raises(Killed):
        run_tiny(tiny.job, "killed", kill_at(12))
    folder = tiny.root.parent / "killed"
    (last,) = sorted((folder / "checkpoints").glob("round-*"))[-1:]
    last.write_bytes(last.read_bytes()[:100])
    with pytest.raises(StorageError, match=last.name):
        run_tiny(tiny.job, "killed")


def test_a_checkpoint_of_another_job_is_refused(tiny, run_tiny: Run) -> None:
    run_tiny(tiny.job, "one")
    with pytest.raises(StorageError, match="another job"):
        run_tiny(tiny.changed(rounds=4), "one")


def test_a_folder_that_holds_something_is_not_used(tiny) -> None:
    folder = tiny.root.parent / "full"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(StorageError, match="not empty"):
        start_run(make_plan(tiny.job), folder)
    assert [p.name for p in folder.iterdir()] == ["mine.txt"]


def diverge(job: Any) -> torch.nn.Module:
    """A user's network that makes NaN at the site whose pictures were made constant."""
    return Diverging()


class Diverging(torch.nn.Module):
    """One convolution; NaN where the input has no variance."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        spread = image.std()
        return self.layer(image) * torch.where(spread > 0, torch.ones(()), torch.full((), math.nan))


def test_a_site_with_a_loss_that_is_not_finite_is_left_out_and_the_round_goes_on(tiny, run_tiny: Run) -> None:
    from PIL import Image

    for path in (tiny.root / "b").glob("train?.png"):
        Image.fromarray(np.full((32, 32), 7, np.uint8)).save(path)
    job = tiny.changed(model__name=f"{__name__}:diverge", model__args={})
    run = run_tiny(job)
    events = [e for e in read_lines(run / "rounds.jsonl") if e["event"] == "train"]
    assert {(e["site"], e["status"]) for e in events} == {
        ("a", "accepted"),
        ("b", "failed"),
        ("c", "accepted"),
    }
    assert {e.get("reason") for e in events if e["site"] == "b"} == {"training"}
    assert all(np.isfinite(v).all() for v in model(run).values())
    assert "not finite" in (run / "sites" / "b" / "log.jsonl").read_text()
    assert "not finite" not in (run / "rounds.jsonl").read_text()


def test_too_few_updates_fail_the_round_and_keep_the_last_model(tiny, run_tiny: Run) -> None:
    from PIL import Image

    for path in (tiny.root / "b").glob("train?.png"):
        Image.fromarray(np.full((32, 32), 7, np.uint8)).save(path)
    job = tiny.changed(model__name=f"{__name__}:diverge", model__args={}, aggregation__min_sites=3)
    with pytest.raises(RoundError, match="2 of 3 updates were accepted, 3 are needed"):
        run_tiny(job)


def test_clipping_bounds_every_update_and_is_recorded_at_the_site_only(tiny, run_tiny: Run) -> None:
    run = run_tiny(tiny.changed(aggregation__clip_norm=0.01))
    for site in "abc":
        for record in read_lines(run / "sites" / site / "log.jsonl"):
            assert record["norm_before"] > 0.01
            assert record["is_clipped"]
            assert record["share_kept"] == pytest.approx(0.01 / record["norm_before"])
    assert "norm_before" not in (run / "rounds.jsonl").read_text()
    norms = [e["update_norm"] for e in read_lines(run / "rounds.jsonl") if e["event"] == "round"]
    assert max(norms) <= 0.01 * (1 + 1e-6)


def test_a_network_that_shares_batch_statistics_is_refused_by_layer(tiny, run_tiny: Run) -> None:
    job = tiny.changed(model__args={"channels": [4, 8], "strides": [2], "num_res_units": 0, "norm": "batch"})
    with pytest.raises(ModelError, match="BatchNorm"):
        run_tiny(job)


def test_local_normalisation_stays_at_the_site(tiny, run_tiny: Run) -> None:
    args = {"channels": [4, 8], "strides": [2], "num_res_units": 0, "norm": "batch"}
    run = run_tiny(tiny.changed(model__args=args, model__local_normalisation=True))
    assert not [name for name in model(run) if "running" in name]
    local = {
        site: load_tensors(run / "sites" / site / "local" / "round-0003.safetensors")[0] for site in "ab"
    }
    assert local["a"].keys() == local["b"].keys()
    assert not same_bits(local["a"], local["b"])


def test_a_held_out_site_tests_but_never_trains(tiny, run_tiny: Run) -> None:
    run = run_tiny(tiny.changed(data={"root": str(tiny.root), "held_out": ["c"]}))
    test = json.loads((run / "test.json").read_text())
    assert test["sites"]["c"]["role"] == "held_out"
    values = [test["sites"][s]["metrics"]["dice"] for s in "ab"]
    assert test["mean_site"]["dice"] == pytest.approx(np.mean(values))
    assert not (run / "sites" / "c" / "log.jsonl").exists()


def test_uniform_and_sample_weighting_differ(tiny, run_tiny: Run) -> None:
    by_samples = model(run_tiny(tiny.job, "samples"))
    uniform = model(run_tiny(tiny.changed(aggregation__weighting="uniform"), "uniform"))
    assert not same_bits(by_samples, uniform)


@pytest.mark.parametrize("broken", ["image", "mask-shape", "mask-value"])
def test_a_site_with_a_broken_file_answers_with_a_code_only(tiny, run_tiny: Run, broken: str) -> None:
    from PIL import Image

    folder = tiny.root / "b"
    if broken == "image":
        (folder / "train0.png").write_bytes((folder / "train0.png").read_bytes()[:60])
    elif broken == "mask-shape":
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(folder / "train0-mask.png")
    else:
        Image.fromarray(np.full((32, 32), 9, np.uint8)).save(folder / "train0-mask.png")
    run = run_tiny(tiny.changed(training__steps=6))
    failed = [e for e in read_lines(run / "rounds.jsonl") if e["event"] == "train" and e["site"] == "b"]
    assert {(e["status"], e["reason"]) for e in failed} == {("failed", "data")}
    assert "train0" not in (run / "rounds.jsonl").read_text()
    assert "train0" in (run / "sites" / "b" / "log.jsonl").read_text()


def test_a_site_without_a_training_case_is_refused_before_anything_starts(tiny, tmp_path: Path) -> None:
    write_site(tiny.root, "empty", (0, 1, 1))
    with pytest.raises(DataError, match="site empty has no training case"):
        make_plan(tiny.job)


def test_sites_that_do_not_fit_the_job_are_refused(tiny) -> None:
    with pytest.raises(FedvisionError, match="classes"):
        make_plan(tiny.changed(task={"kind": "segmentation", "classes": ["square"]}))
    with pytest.raises(FedvisionError, match="site x is not below"):
        make_plan(tiny.changed(data={"root": str(tiny.root), "sites": ["x"]}))
