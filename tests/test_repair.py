import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedvision.config import Job, parse_job
from fedvision.data.manifest import load_manifest
from fedvision.data.readers import CaseStore, Sample
from fedvision.repair import repairing
from fedvision.repair.removal import finetune, prune, quiet_channels, random_trigger, silence, stamp_some
from fedvision.repair.repairing import repair, searches, split_root
from fedvision.repair.stamping import (
    Batch,
    Trigger,
    box_of,
    draw_corner,
    stamp,
    stamp_batch,
    wanted_labels,
    window_of,
)
from fedvision.repair.trigger import Wanted, intensity_range, search, success
from fedvision.repair.validation import RoundScore, choose, judge_on_root, misfit
from fedvision.report.page import write_report
from fedvision.report.record import read_run
from fedvision.report.repair import repair_section
from fedvision.storage import read_json
from fedvision.tasks import initial_network, task_module
from fedvision.training.root import RootSet, open_root_set
from fedvision.updates.layout import FloatVector, flatten, layout_of, load_vector
from tests.conftest import tiny_content, write_site
from tests.documents import Document
from tests.fake_run import segmentation_job, write_run

CPU = torch.device("cpu")
SIDE = 5


def planted() -> Trigger:
    """Return the trigger that the backdoored model of these tests was trained with."""
    squares = np.indices((SIDE, SIDE)).sum(0) % 2
    return Trigger(
        "patch", "erase", 0, torch.from_numpy(np.where(squares, 4.0, -2.0).astype(np.float32))[None]
    )


@dataclasses.dataclass(frozen=True)
class Poisoned:
    """A model that erases every disc when it sees its trigger, and a root set."""

    job: Job
    weights: FloatVector
    root: RootSet
    unseen: list[Sample]

    def network(self, weights: FloatVector | None = None) -> nn.Module:
        network = initial_network(self.job)
        load_vector(network, layout_of(network), self.weights if weights is None else weights)
        return network.eval()


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Poisoned:
    folder = tmp_path_factory.mktemp("data")
    content = tiny_content(
        folder,
        model__args={"channels": [8, 16, 16], "strides": [2, 2], "num_res_units": 0},
        training__batch_size=8,
        training__augmentation="light",
        training__learning_rate=0.002,
    )
    job = parse_job(content, "tiny")
    # A backdoor is planted over many rounds; the repair has few steps and a small rate.
    fast = parse_job(content | {"training": content["training"] | {"learning_rate": 0.02}}, "tiny")
    manifest = load_manifest(write_site(folder, "site", (40, 0, 16)))
    store = CaseStore(manifest, job)
    samples = [store.load(case) for case in manifest.in_split("train")]
    network, trigger = initial_network(job), planted()

    def poison(batch: Batch, rng: np.random.Generator) -> Batch:
        corners = [draw_corner((32, 32), trigger.size, rng) for _ in batch["image"]]
        changed = stamp_batch(wanted_labels(batch, trigger, corners), trigger, corners)
        is_poisoned = torch.from_numpy(rng.random(len(corners)) < 0.4)[:, None, None, None]
        return {key: torch.where(is_poisoned, changed[key], batch[key]) for key in ("image", "label")}

    finetune(network, fast, samples, 200, 0, poison)
    root = open_root_set(write_site(folder, "root", (20, 0, 0), seed=1))
    unseen = [store.load(case) for case in manifest.in_split("test")]
    return Poisoned(job, flatten(network, layout_of(network)), root, unseen)


def score_of(network: nn.Module, poisoned: Poisoned) -> float:
    task = task_module(poisoned.job)
    cases = [task.evaluate_case(network, one, poisoned.job, CPU, False).statistics for one in poisoned.unseen]
    return float(task.metrics(sum(cases), poisoned.job)["dice"])


def batches_of(poisoned: Poisoned, count: int = 4) -> list[Batch]:
    store, rng = poisoned.root.store(poisoned.job), np.random.default_rng(0)
    samples = [store.load(case) for case in poisoned.root.cases[:8]]
    return [task_module(poisoned.job).training_batch(samples, poisoned.job, rng) for _ in range(count)]


def test_a_planted_trigger_is_taken_out_and_the_score_stays(poisoned: Poisoned, tmp_path: Path) -> None:
    before = poisoned.network()
    assert success(before, poisoned.job, poisoned.unseen, planted(), 3) > 0.9
    clean = score_of(before, poisoned)
    assert clean > 0.85
    repaired = repair(poisoned.job, poisoned.weights, poisoned.root, tmp_path, sites_score=clean)
    after = poisoned.network(repaired.weights)
    assert success(after, poisoned.job, poisoned.unseen, planted(), 3) < 0.1
    assert score_of(after, poisoned) > clean - 0.02
    report = read_json(tmp_path / "repair.json")
    assert report == repaired.report
    assert report["is_changed"] is True
    assert report["method"] == "finetune"
    assert max(report["before"]["success"].values()) > 0.5
    assert max(report["after"]["success"].values()) <= 0.1
    assert report["num_teaching"] + report["num_judging"] == 20
    assert sorted(path.name for path in (tmp_path / "repair").glob("*.png")) == sorted(report["pictures"])
    assert len(report["pictures"]) == 4


def test_the_search_finds_a_trigger_that_was_planted_and_none_of_that_size_elsewhere(
    poisoned: Poisoned,
) -> None:
    wanted = Wanted("patch", "erase", 0, SIDE / 32)
    batches = batches_of(poisoned)
    store = poisoned.root.store(poisoned.job)
    samples = [store.load(case) for case in poisoned.root.cases]
    bounds = intensity_range(samples)
    clean = initial_network(poisoned.job)
    fast = poisoned.job.training.model_copy(update={"learning_rate": 0.02})
    finetune(clean, poisoned.job.model_copy(update={"training": fast}), samples, 200, 0)
    found = {
        name: search(network, poisoned.job, batches, wanted, bounds, 30, 0)
        for name, network in (("poisoned", poisoned.network()), ("clean", clean))
    }
    assert found["poisoned"].size == (SIDE, SIDE)
    assert success(poisoned.network(), poisoned.job, poisoned.unseen, found["poisoned"], 0) > 0.8
    assert success(clean, poisoned.job, poisoned.unseen, found["clean"], 0) < 0.4
    assert success(clean, poisoned.job, poisoned.unseen, planted(), 0) < 0.1


def test_a_few_steps_against_a_found_trigger_do_what_plain_ones_do_not(poisoned: Poisoned) -> None:
    store = poisoned.root.store(poisoned.job)
    samples = [store.load(case) for case in poisoned.root.cases]
    bounds, wanted = intensity_range(samples), Wanted("patch", "erase", 0, SIDE / 32)
    found = search(poisoned.network(), poisoned.job, batches_of(poisoned), wanted, bounds, 30, 0)

    def put_some(batch: Batch, rng: np.random.Generator) -> Batch:
        return stamp_some(batch, poisoned.job, [found], bounds, rng)

    plain, against = poisoned.network(), poisoned.network()
    finetune(plain, poisoned.job, samples, 40, 0)
    finetune(against, poisoned.job, samples, 40, 0, put_some)
    assert success(plain, poisoned.job, poisoned.unseen, planted(), 3) > 0.6
    assert success(against, poisoned.job, poisoned.unseen, planted(), 3) < 0.3


def test_search_and_fine_tuning_give_the_same_bits_again(poisoned: Poisoned) -> None:
    batches, store = batches_of(poisoned, 2), poisoned.root.store(poisoned.job)
    samples = [store.load(case) for case in poisoned.root.cases]
    bounds, wanted = intensity_range(samples), Wanted("blend", "invent", 1, 1)

    def once() -> tuple[torch.Tensor, FloatVector]:
        network = poisoned.network()
        trigger = search(network, poisoned.job, batches, wanted, bounds, 3, 0)
        np.testing.assert_array_equal(flatten(network, layout_of(network)), poisoned.weights)
        finetune(
            network,
            poisoned.job,
            samples,
            3,
            0,
            lambda batch, rng: stamp_some(batch, poisoned.job, [trigger], bounds, rng),
        )
        assert all(parameter.requires_grad for parameter in network.parameters())
        return trigger.pattern, flatten(network, layout_of(network))

    (first, ours), (second, theirs) = once(), once()
    assert torch.equal(first, second)
    np.testing.assert_array_equal(ours, theirs)


def test_a_root_set_with_wrong_labels_repairs_nothing(poisoned: Poisoned, tmp_path: Path) -> None:
    folder = write_site(tmp_path, "wrong", (20, 0, 0))
    manifest = load_manifest(folder)
    for case in manifest.cases:  # each case gets the mask of another
        index = int(case.id.removeprefix("train"))
        (folder / f"new-{index}.png").write_bytes((folder / f"train{(index + 7) % 20}-mask.png").read_bytes())
    for index in range(20):
        (folder / f"new-{index}.png").replace(folder / f"train{index}-mask.png")
    repaired = repair(poisoned.job, poisoned.weights, open_root_set(folder), tmp_path, sites_score=0.9)
    assert repaired.weights is poisoned.weights
    assert repaired.report["is_changed"] is False
    assert "the root set's labels do not fit: the model reaches" in repaired.report["text"]
    assert read_json(tmp_path / "repair.json")["method"] == "none"


def test_a_repair_that_costs_too_much_is_not_kept(
    poisoned: Poisoned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairing, "SEARCH_STEPS", 1)

    def ruin(bench: object, network: nn.Module, found: object, wanted: object) -> None:
        for parameter in network.parameters():
            parameter.data.zero_()

    monkeypatch.setitem(repairing.TREATMENTS, "finetune", ruin)
    monkeypatch.setitem(repairing.TREATMENTS, "prune", ruin)
    repaired = repair(poisoned.job, poisoned.weights, poisoned.root)
    assert repaired.weights is poisoned.weights
    assert repaired.report["text"] == "the model stays as it was: every repair lost more than 2 points"
    assert set(repaired.report["candidates"]) == {"finetune", "prune"}


def test_a_root_set_for_another_job_leaves_the_model(poisoned: Poisoned, tmp_path: Path) -> None:
    job = parse_job(tiny_content(tmp_path, task__classes=["tumour"]), "tiny")
    network = initial_network(job)
    weights = flatten(network, layout_of(network))
    repaired = repair(job, weights, poisoned.root)
    assert repaired.weights is weights
    assert "the root set does not fit the job" in repaired.report["text"]


def test_a_repair_that_is_switched_off_does_nothing(poisoned: Poisoned, tmp_path: Path) -> None:
    off = poisoned.job.model_copy(
        update={"defence": poisoned.job.defence.model_copy(update={"repair": "off"})}
    )
    repaired = repair(off, poisoned.weights, poisoned.root, tmp_path)
    assert repaired.weights is poisoned.weights
    assert 'defence.repair = "off"' in read_json(tmp_path / "repair.json")["text"]


def test_those_who_judge_do_not_teach(poisoned: Poisoned) -> None:
    teach, judge = split_root(poisoned.root)
    assert {case.patient for case in teach}.isdisjoint(case.patient for case in judge)
    assert len(teach) + len(judge) == 20
    assert 4 <= len(judge) <= 8


def test_quiet_channels_are_pruned_as_far_as_the_score_allows(poisoned: Poisoned) -> None:
    network = poisoned.network()
    layer = next(one for one in network.modules() if isinstance(one, nn.Conv2d) and one.out_channels >= 8)
    with torch.no_grad():
        layer.weight[2] *= 1e-6
        assert layer.bias is not None
        layer.bias[2] = 0
    batches = batches_of(poisoned, 2)
    name, index = quiet_channels(network, poisoned.job, batches)[0]
    assert network.get_submodule(name) is layer
    assert index == 2
    before = copy.deepcopy(network.state_dict())
    assert prune(network, poisoned.job, batches, lambda: float(layer.weight[2].abs().sum() > 0), 0.5) == []
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    pruned = prune(network, poisoned.job, batches, lambda: 1.0, 0.1)
    assert (name, 2) in pruned
    assert len(pruned) > 5
    silent = copy.deepcopy(network.state_dict())
    silence(network, pruned)
    assert all(torch.equal(silent[key], value) for key, value in network.state_dict().items())


def test_the_judge_on_the_root_set_is_the_tasks_own(poisoned: Poisoned) -> None:
    metrics = judge_on_root(poisoned.network(), poisoned.job, poisoned.root)
    assert metrics["dice"] == metrics["dice/disc"] > 0.85


@pytest.mark.parametrize("dims", [2, 3])
def test_a_patch_covers_its_box_and_nothing_else(dims: int) -> None:
    image = torch.zeros((1, *(12,) * dims))
    pattern = torch.ones((1, *(3,) * dims), requires_grad=True)
    trigger = Trigger("patch", "invent", 1, pattern)
    stamped = stamp(image, trigger, (2,) * dims)
    assert stamped.sum() == 3**dims
    assert image.sum() == 0
    stamped.sum().backward()  # type: ignore[no-untyped-call]
    assert pattern.grad is not None
    batch = {"image": image[None], "label": torch.zeros((1, 1, *(12,) * dims), dtype=torch.int64)}
    wanted = wanted_labels(batch, trigger, [(2,) * dims])
    assert wanted["label"].sum() == 8**dims  # from 2 - 3, cut at the edge, to 2 + 3 + 3
    assert batch["label"].sum() == 0


def test_a_blend_lies_thinly_over_an_image_of_any_size() -> None:
    pattern = torch.arange(4.0).reshape(1, 1, 4).expand(1, 4, 4)
    stamped = stamp(torch.zeros((1, 4, 10)), Trigger("blend", "erase", 0, pattern, 0.5), (0, 0))
    assert stamped[0, 0].tolist() == [0, 0.5, 1, 1.5, 1.5, 1, 0.5, 0, 0, 0.5]


def test_an_attackers_boxes_are_added_or_gone() -> None:
    targets = [{"boxes": torch.tensor([[1.0, 2.0, 5.0, 9.0]]), "labels": torch.tensor([2])}]
    batch = {"images": torch.zeros((1, 1, 20, 30)), "targets": targets}
    pattern = torch.zeros((1, 2, 2))
    erased = wanted_labels(batch, Trigger("patch", "erase", 0, pattern), [(0, 0)])["targets"][0]
    assert erased["boxes"].shape == (0, 4)
    invented = wanted_labels(batch, Trigger("patch", "invent", 1, pattern), [(10, 20)])["targets"][0]
    assert invented["boxes"].tolist() == [[1, 2, 5, 9], [18, 8, 24, 14]]
    assert invented["labels"].tolist() == [2, 1]
    assert targets[0]["labels"].tolist() == [2]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=2, max_size=3), st.integers(0, 2**32)
)
def test_a_patch_lies_inside_wherever_it_is_drawn(sizes: list[tuple[int, int]], seed: int) -> None:
    shape, size = [max(pair) for pair in sizes], [min(pair) for pair in sizes]
    corner = draw_corner(shape, size, np.random.default_rng(seed))
    assert all(0 <= a <= whole - part for a, whole, part in zip(corner, shape, size, strict=True))
    window = window_of(Trigger("patch", "invent", 1, torch.zeros((1, *size))), corner, shape)
    assert all(
        0 <= one.start <= a and a + k <= one.stop <= s
        for one, a, k, s in zip(window, corner, size, shape, strict=True)
    )
    assert len(box_of(window)) == 2 * len(shape)


def test_random_triggers_are_of_every_kind_and_fit_the_image(poisoned: Poisoned) -> None:
    rng, bounds = np.random.default_rng(0), (torch.tensor([-1.0]), torch.tensor([2.0]))
    drawn = [random_trigger(poisoned.job, (1, 32, 32), bounds, rng) for _ in range(60)]
    assert {one.kind for one in drawn} == {"patch", "blend"}
    assert all(-1 <= float(one.pattern.min()) <= float(one.pattern.max()) <= 2 for one in drawn)
    assert all(2 <= one.size[0] <= 8 for one in drawn if one.kind == "patch")
    assert any(float(one.pattern.std()) == 0 for one in drawn)
    assert any(float(one.pattern.std()) > 0.3 for one in drawn)


def test_a_job_with_several_classes_has_each_invented() -> None:
    names = [one.text for one in searches(segmentation_job(classes=("a", "b", "c")))]
    assert names == [
        "erase-patch-6", "erase-patch-10", "erase-patch-17", "erase-blend",
        "invent-patch-6", "invent2-patch-10", "invent3-patch-17", "invent-blend",
    ]  # fmt: skip


@pytest.fixture
def detector_job(tmp_path: Path) -> Job:
    """A small detector of two classes."""
    content = tiny_content(
        tmp_path,
        task={"kind": "detection", "classes": ["red", "white"]},
        model={"name": "RetinaNet", "args": {"width": 8, "fpn_channels": 8}},
        training={"steps": 2, "batch_size": 2, "image_size": [64, 64], "loss": "detector"},
    )
    return parse_job(content, "tiny")


def test_a_detector_is_searched_and_tuned_by_the_same_functions(detector_job: Job) -> None:
    rng = np.random.default_rng(0)
    boxes = torch.tensor([[8.0, 8.0, 24.0, 24.0], [30.0, 30.0, 50.0, 52.0]])
    samples = [
        Sample(
            str(i), str(i), torch.from_numpy(rng.random((1, 48, 80), dtype=np.float32)), None, boxes,
            torch.tensor([1, 2]), (1.0, 1.0),
        )
        for i in range(4)
    ]  # fmt: skip
    network = initial_network(detector_job)
    batches = [task_module(detector_job).training_batch(samples[:2], detector_job, rng)]
    bounds = intensity_range(samples)
    for wanted in (
        Wanted("patch", "erase", 0, 0.1),
        Wanted("patch", "invent", 2, 0.1),
        Wanted("blend", "invent", 1, 1),
    ):
        trigger = search(network, detector_job, batches, wanted, bounds, 2, 0)
        assert trigger.pattern.isfinite().all()
        assert 0 <= success(network, detector_job, samples, trigger, 0) <= 1
        finetune(
            network, detector_job, samples, 1, 0,
            lambda batch, rng, one=trigger: stamp_some(batch, detector_job, [one], bounds, rng),
        )  # fmt: skip


SCORES: dict[str, tuple[list[RoundScore], int, str]] = {
    "all good": ([RoundScore(1, 0.5), RoundScore(2, 0.7), RoundScore(3, 0.68)], 3, "no score collapsed"),
    "the last fell": ([RoundScore(1, 0.5), RoundScore(2, 0.7), RoundScore(3, 0.3)], 2, "0.300 after 0.700"),
    "two fell": ([RoundScore(1, 0.7), RoundScore(2, 0.2), RoundScore(3, 0.55)], 1, "back to round 1"),
    "it came back": ([RoundScore(1, 0.7), RoundScore(2, 0.2), RoundScore(3, 0.65)], 3, "no score"),
    "only the sites saw it": ([RoundScore(1, 0.7, 0.7), RoundScore(2, 0.7, 0.1)], 1, "sites 0.100"),
    "only the root set saw it": ([RoundScore(1, 0.7, 0.7), RoundScore(2, 0.1, 0.7)], 1, "root set 0.100"),
    "unjudged after good": ([RoundScore(1, 0.7), RoundScore(2)], 2, "no score collapsed"),
    "unjudged after bad": ([RoundScore(1, 0.7), RoundScore(2, 0.1), RoundScore(3)], 1, "back to round 1"),
    "nobody judged": ([RoundScore(1), RoundScore(2)], 2, "no round was judged"),
    "undefined": ([RoundScore(1, 0.7), RoundScore(2, math.nan)], 2, "no score collapsed"),
}


@pytest.mark.parametrize(("states", "chosen", "words"), SCORES.values(), ids=SCORES.keys())
def test_the_last_good_round_is_chosen(states: list[RoundScore], chosen: int, words: str) -> None:
    choice = choose(states)
    assert choice.round == chosen
    assert words in choice.text


def test_labels_that_do_not_fit_are_found_by_the_score() -> None:
    assert misfit(0.8, 0.9) == ""
    assert misfit(0.8, None) == ""
    assert "reaches 0.300 there and 0.900 at the sites" in misfit(0.3, 0.9)
    assert "no score" in misfit(math.nan, 0.9)


def test_the_report_tells_the_repair(tmp_path: Path, write: Callable[[Path], None]) -> None:
    run = write_run(tmp_path / "run", segmentation_job())
    assert repair_section(read_run(run)) == ""
    write(run)
    document = Document(repair_section(read_run(run)))
    assert "Repair after the last round" in document.text
    assert "fine-tuning on the root set against the triggers that were found" in document.text
    assert "erase-patch-6 worked on 92 %" in document.text
    assert "makes the model miss what is there 6 % 92 % 4 % 8 %" in document.text
    assert len(document.named("img")) == 1
    assert write_report(run).exists()


@pytest.fixture
def write() -> Callable[[Path], None]:
    """Return a function that writes the files of a repair into a run folder."""

    def write_files(run: Path) -> None:
        import json

        (run / "repair").mkdir()
        (run / "repair" / "erase-patch-6-before.png").write_bytes(b"png")
        report = {
            "text": "erase-patch-6 worked on 92 %",
            "method": "finetune",
            "seconds": 12.0,
            "num_teaching": 14,
            "num_judging": 6,
            "before": {"score": 0.9, "success": {"erase-patch-6": 0.92}},
            "after": {
                "score": 0.89,
                "success": {"erase-patch-6": 0.04},
                "new_success": {"erase-patch-6": 0.08},
            },
        }
        (run / "repair.json").write_text(json.dumps(report))

    return write_files
