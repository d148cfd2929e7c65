"""Crops, losses and inference of the segmentation task."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedvision.config import Job, parse_job
from fedvision.data.readers import Sample
from fedvision.errors import DataError, ModelError
from fedvision.tasks import initial_network, task_module
from fedvision.tasks import segmentation as task
from fedvision.tasks.segmentation_augmentation import blur, class_centres, cut, turn

CPU = torch.device("cpu")
LOSSES = ("dice_ce", "dice", "dice_focal", "tversky", "cross_entropy")


def make_job(
    patch: tuple[int, ...] = (32, 32), evaluation: dict[str, Any] | None = None, **training: Any
) -> Job:
    """A job with two classes; the number of axes follows from the patch."""
    settings = {"steps": 1, "batch_size": 2, "patch_size": list(patch), "augmentation": "none"} | training
    name = settings.pop("network", "UNet")
    return parse_job(
        {
            "name": "test",
            "rounds": 1,
            "task": {"kind": "segmentation", "spatial_dims": len(patch), "classes": ["core", "rim"]},
            "model": {"name": name, "args": settings.pop("args", {})},
            "training": settings,
            "aggregation": {"clip_norm": 1.0},
            "evaluation": evaluation or {},
        },
        "test",
    )


def make_sample(shape: tuple[int, ...], seed: int = 0, spacing: tuple[float, ...] | None = None) -> Sample:
    """An image with a large core (1) and a small rim (2), far apart, brighter than their surroundings."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(0, max(1, n // 4)) for n in shape)] = 1
    label[tuple(slice(n - 2, n - 1) for n in shape)] = 2
    image = rng.standard_normal((1, *shape)).astype(np.float32) * 0.1 + label
    return Sample(
        case_id=f"case{seed}",
        patient=f"patient{seed}",
        image=torch.from_numpy(image),
        label=torch.from_numpy(label),
        boxes=None,
        box_labels=None,
        spacing_mm=spacing or (1.0,) * len(shape),
    )


class Threshold(nn.Module):
    """A network that is right: class by brightness, the same at every pixel."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([-(image - value).abs() for value in (0.0, 1.0, 2.0)], dim=1)


# Crops and augmentation ---------------------------------------------------------------------------


@pytest.mark.parametrize("patch", ((16, 24), (8, 16, 8)))
@pytest.mark.parametrize("augmentation", ("none", "light", "strong"))
def test_a_batch_has_the_promised_shapes_and_types(patch: tuple[int, ...], augmentation: str) -> None:
    shapes = ((40, 30), (10, 50)) if len(patch) == 2 else ((20, 30, 9), (6, 6, 6))
    samples = [make_sample(shape) for shape in shapes]
    batch = task.training_batch(samples, make_job(patch, augmentation=augmentation), np.random.default_rng(0))
    assert batch["image"].shape == batch["label"].shape == (2, 1, *patch)
    assert (batch["image"].dtype, batch["label"].dtype) == (torch.float32, torch.int64)
    assert torch.isfinite(batch["image"]).all()
    assert set(batch["label"].unique().tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("augmentation", ("none", "light", "strong"))
def test_the_same_generator_gives_the_same_bits_and_another_one_does_not(augmentation: str) -> None:
    samples = [make_sample((40, 40), seed) for seed in range(4)]
    job = make_job(augmentation=augmentation)
    first, again, other = (task.training_batch(samples, job, np.random.default_rng(s)) for s in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["image"], other["image"])


def test_torch_s_own_generator_does_not_matter() -> None:
    job = make_job(augmentation="strong")
    batches = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        batches.append(task.training_batch([make_sample((40, 40))] * 8, job, np.random.default_rng(5)))
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(batches[0]["image"], batches[1]["image"])


def test_samples_are_never_changed_in_place() -> None:
    sample = make_sample((32, 32))
    image, label = sample.image.clone(), sample.label.clone()
    for seed in range(20):
        batch = task.training_batch([sample], make_job(augmentation="strong"), np.random.default_rng(seed))
        batch["image"].zero_()
        batch["label"].zero_()
    assert torch.equal(sample.image, image)
    assert torch.equal(sample.label, label)


@pytest.mark.parametrize("shape", ((100, 120), (40, 50, 30)))
def test_crops_contain_foreground_when_asked(shape: tuple[int, ...]) -> None:
    sample = make_sample(shape)
    patch = (8,) * len(shape)
    rng = np.random.default_rng(0)
    always = task.training_batch([sample] * 200, make_job(patch, foreground_fraction=1.0), rng)["label"]
    assert (always.flatten(1).amax(dim=1) > 0).all()
    # Both classes are centres about as often, though core has thousands of voxels and rim one.
    has_rim = (always == 2).flatten(1).any(dim=1).float().mean()
    assert 0.4 < has_rim < 0.6
    never = task.training_batch([sample] * 200, make_job(patch, foreground_fraction=0.0), rng)["label"]
    assert (never > 0).flatten(1).any(dim=1).float().mean() < 0.3


def test_the_centre_of_a_foreground_crop_is_a_labelled_pixel() -> None:
    label = torch.zeros(64, 64, dtype=torch.uint8)
    label[20:40, 30] = 1
    sample = make_sample((64, 64))
    sample = Sample("c", "p", sample.image, label, None, None, (1.0, 1.0))
    batch = task.training_batch(
        [sample] * 50, make_job((16, 16), foreground_fraction=1.0), np.random.default_rng(1)
    )
    assert (batch["label"][:, 0, 8, 8] == 1).all()


def test_a_mask_without_foreground_is_cropped_anywhere() -> None:
    sample = make_sample((40, 40))
    empty = Sample("c", "p", sample.image, torch.zeros(40, 40, dtype=torch.uint8), None, None, (1.0, 1.0))
    batch = task.training_batch([empty] * 2, make_job(foreground_fraction=1.0), np.random.default_rng(0))
    assert batch["label"].sum() == 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), dims=st.sampled_from((2, 3)))
def test_a_crop_is_a_window_of_the_image_with_zeros_around(seed: int, dims: int) -> None:
    rng = np.random.default_rng(seed)
    shape, size = (tuple(int(n) for n in rng.integers(1, 8, dims)) for _ in range(2))
    start = tuple(int(rng.integers(-3, n)) for n in shape)
    start = tuple(max(s, 1 - wanted) for s, wanted in zip(start, size, strict=True))
    image = torch.arange(1, 2 * math.prod(shape) + 1).reshape(2, *shape)
    window = cut(image, start, size)
    assert window.shape == (2, *size)
    for position in np.ndindex(*size):
        where = tuple(s + p for s, p in zip(start, position, strict=True))
        is_inside = all(0 <= w < n for w, n in zip(where, shape, strict=True))
        expected = image[(slice(None), *where)] if is_inside else torch.zeros(2)
        assert torch.equal(window[(slice(None), *position)], expected.to(window.dtype))


def test_an_image_smaller_than_the_patch_is_centred() -> None:
    sample = make_sample((10, 11))
    batch = task.training_batch([sample], make_job((16, 16)), np.random.default_rng(0))
    assert torch.equal(batch["image"][0, :, 3:13, 2:13], sample.image)
    assert torch.equal(batch["label"][0, 0, 3:13, 2:13], sample.label.long())
    assert batch["image"].abs().sum() == pytest.approx(sample.image.abs().sum().item(), rel=1e-5)


@pytest.mark.parametrize("shape", ((12, 12), (8, 12), (6, 6, 6)))
def test_image_and_mask_are_turned_alike_and_every_orientation_occurs(shape: tuple[int, ...]) -> None:
    label = torch.arange(math.prod(shape)).reshape(shape)
    seen = set()
    rng = np.random.default_rng(0)
    for _ in range(200):
        image, turned = turn(label[None].float(), label, (1.0,) * len(shape), rng)
        assert torch.equal(image[0].long(), turned)
        assert turned.shape == label.shape
        seen.add(tuple(turned.flatten().tolist()))
    # The symmetries of a square and of a rectangle; a volume is mirrored from left to right only.
    assert len(seen) == {(12, 12): 8, (8, 12): 4, (6, 6, 6): 2}[shape]
    if len(shape) == 3:
        assert tuple(label.flip(0).flatten().tolist()) in seen


def test_pictures_of_pixels_that_are_not_square_are_flipped_only() -> None:
    label = torch.arange(64).reshape(8, 8)
    seen = set()
    rng = np.random.default_rng(0)
    for _ in range(200):
        seen.add(tuple(turn(label[None].float(), label, (1.0, 3.0), rng)[1].flatten().tolist()))
    assert len(seen) == 4


def test_strong_augmentation_keeps_image_and_mask_together() -> None:
    # Blocks of brightness 1 and class 1: where the augmented image is bright the mask must say so.
    blocks = np.random.default_rng(0).integers(0, 2, (12, 12)).astype(np.uint8)
    label = torch.from_numpy(np.kron(blocks, np.ones((6, 6), np.uint8)))
    sample = Sample("c", "p", label[None].float(), label, None, None, (1.0, 1.0))
    batch = task.training_batch([sample] * 64, make_job(augmentation="strong"), np.random.default_rng(0))
    agreement = ((batch["image"] > 0.5) == (batch["label"] > 0)).float().mean(dim=(1, 2, 3))
    assert agreement.mean() > 0.97
    assert agreement.min() > 0.85


def test_a_blur_keeps_the_mean_of_a_flat_image_and_spreads_a_point() -> None:
    assert torch.allclose(blur(torch.full((2, 6, 7, 5), 3.0), 0.8), torch.tensor(3.0))
    point = torch.zeros(1, 9, 9)
    point[0, 4, 4] = 1.0
    spread = blur(point, 0.7)[0]
    row = np.exp(-0.5 * (np.arange(-3, 4) / 0.7) ** 2)
    row /= row.sum()
    assert np.allclose(spread[1:8, 1:8].numpy(), np.outer(row, row), atol=1e-6)


def test_centres_are_kept_for_a_mask_and_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    label = torch.ones(40, 50, dtype=torch.uint8)
    label[0, :3] = 2
    monkeypatch.setattr("fedvision.tasks.segmentation_augmentation._MOST_CENTRES", 100)
    core, rim = class_centres(label, 3)
    assert len(core) <= 100
    assert np.ptp(np.diff(core)) == 0
    assert core[-1] > 1900
    assert rim.tolist() == [0, 1, 2]
    assert class_centres(label, 3)[0] is core


def test_a_sample_without_a_mask_is_refused() -> None:
    sample = make_sample((32, 32))
    bare = Sample("case7", "p", sample.image, None, None, None, (1.0, 1.0))
    with pytest.raises(DataError, match="case7 has no mask"):
        task.training_batch([bare], make_job(), np.random.default_rng(0))
    with pytest.raises(DataError, match="case7 has no mask"):
        task.evaluate_case(Threshold(), bare, make_job(), CPU, final=False)


# Losses -------------------------------------------------------------------------------------------


def reference_loss(name: str, logits: np.ndarray, label: np.ndarray) -> float:
    """The loss of one image in plain numpy: logits (K, *P), label P."""
    exp = np.exp(logits - logits.max(axis=0))
    p = exp / exp.sum(axis=0)
    truth = np.stack([label == value for value in range(len(logits))]).astype(float)
    tp, fp, fn = (p * truth).sum((1, 2)), (p * (1 - truth)).sum((1, 2)), ((1 - p) * truth).sum((1, 2))
    dice = np.mean((1 - (2 * tp + 1e-5) / (2 * tp + fp + fn + 1e-5))[1:])
    tversky = np.mean((1 - (tp + 1e-5) / (tp + 0.3 * fp + 0.7 * fn + 1e-5))[1:])
    right = (p * truth).sum(axis=0)
    entropy = np.mean(-np.log(right))
    focal = np.mean(-((1 - right) ** 2) * np.log(right)) / len(logits)
    values = {"dice": dice, "tversky": tversky, "cross_entropy": entropy}
    values |= {"dice_ce": dice + entropy, "dice_focal": dice + focal}
    return float(values[name])


class Fixed(nn.Module):
    """A network that returns what it was given, whatever the image."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, image: torch.Tensor) -> Any:
        return self.output


@pytest.mark.parametrize("name", LOSSES)
def test_losses_agree_with_their_formulas(name: str) -> None:
    rng = np.random.default_rng(0)
    logits, label = rng.standard_normal((2, 3, 8, 8)), rng.integers(0, 3, (2, 1, 8, 8))
    batch = {"image": torch.zeros(2, 1, 8, 8), "label": torch.from_numpy(label)}
    loss = task.training_loss(Fixed(torch.from_numpy(logits)), batch, make_job((8, 8), loss=name), CPU)
    expected = np.mean([reference_loss(name, logits[b], label[b, 0]) for b in range(2)])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_a_batch_is_the_mean_of_the_losses_of_its_images(name: str) -> None:
    job = make_job(loss=name, batch_size=3)
    network = initial_network(job)
    samples = [make_sample((40, 40), seed) for seed in range(3)]
    batch = task.training_batch(samples, job, np.random.default_rng(0))
    whole = task.training_loss(network, batch, job, CPU)
    single = [
        task.training_loss(network, {key: value[b : b + 1] for key, value in batch.items()}, job, CPU)
        for b in range(3)
    ]
    assert whole.item() == pytest.approx(torch.stack(single).mean().item(), rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("patch", ((16, 16), (8, 8, 8)))
def test_every_loss_falls_when_the_network_trains(name: str, patch: tuple[int, ...]) -> None:
    job = make_job(patch, loss=name, args={"channels": [8, 16], "num_res_units": 1})
    network = initial_network(job)
    batch = task.training_batch([make_sample(patch), make_sample(patch, 1)], job, np.random.default_rng(0))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = task.training_loss(network, batch, job, CPU)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_deep_supervision_weighs_resolutions_by_halves() -> None:
    rng = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (2, 1, 8, 8), generator=rng)
    outputs = [torch.randn(2, 3, size, size, generator=rng) for size in (8, 4, 2)]
    job = make_job((8, 8), loss="cross_entropy")
    batch = {"image": torch.zeros(2, 1, 8, 8), "label": label}
    loss = task.training_loss(Fixed(outputs), batch, job, CPU)
    # nearest-exact takes the pixel whose centre is nearest: index 1, 3, ... and 2, 6 on the finest grid.
    targets = [label[:, 0], label[:, 0, 1::2, 1::2], label[:, 0, 2::4, 2::4]]
    parts = [functional.cross_entropy(o, t).item() for o, t in zip(outputs, targets, strict=True)]
    assert loss.item() == pytest.approx((parts[0] + parts[1] / 2 + parts[2] / 4) / 1.75, rel=1e-5)


def test_a_deeply_supervised_dyn_unet_trains_and_is_judged() -> None:
    args = {"deep_supervision": True, "deep_supr_num": 1}
    job = make_job(network="DynUNet", args=args)
    network = initial_network(job)
    sample = make_sample((32, 32))
    batch = task.training_batch([sample] * 2, job, np.random.default_rng(0))
    task.training_loss(network, batch, job, CPU).backward()
    assert all(p.grad is not None for p in network.deep_supervision_heads.parameters())
    with torch.inference_mode():
        task.evaluate_case(network.eval(), sample, job, CPU, final=False)


def test_the_user_s_own_loss_is_used_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_losses.py").write_text(
        "def square(logits, label):\n    return (logits[:, 1:2] - label).square().mean()\n"
        "def wrong(logits, label):\n    return logits\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_losses", raising=False)
    batch = {"image": torch.zeros(1, 1, 8, 8), "label": torch.ones(1, 1, 8, 8, dtype=torch.int64)}
    network = Fixed(torch.full((1, 3, 8, 8), 3.0))
    loss = task.training_loss(network, batch, make_job((8, 8), loss="own_losses:square"), CPU)
    assert loss.item() == 4.0
    with pytest.raises(ModelError, match="must return a scalar tensor"):
        task.training_loss(network, batch, make_job((8, 8), loss="own_losses:wrong"), CPU)


@pytest.mark.parametrize("name", LOSSES)
def test_logits_in_half_precision_give_the_loss_in_float32(name: str) -> None:
    half = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    batch = {"image": torch.zeros(2, 1, 32, 32), "label": torch.ones(2, 1, 32, 32, dtype=torch.int64)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task.training_loss(Fixed(half), batch, make_job(loss=name), CPU)
    assert loss.dtype == torch.float32
    assert loss == task.training_loss(Fixed(half.float()), batch, make_job(loss=name), CPU)


# Inference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ((20, 20), (32, 32), (45, 83), (300, 40)))
def test_a_network_that_is_right_has_dice_1_at_every_size(shape: tuple[int, int]) -> None:
    sample = make_sample(shape)
    with torch.inference_mode():
        result = task.evaluate_case(Threshold().eval(), sample, make_job(), CPU, final=True)
    assert result.score == 1.0
    assert result.values == {
        f"{name}/{c}": best
        for c in ("core", "rim")
        for name, best in (("dice", 1.0), ("hd95_mm", 0.0), ("asd_mm", 0.0))
    }
    assert result.prediction["label"].dtype == np.uint8
    assert np.array_equal(result.prediction["label"], sample.label.numpy())
    assert (result.case_id, result.patient) == ("case0", "patient0")
    metrics = task.metrics(result.statistics, make_job())
    assert (metrics["dice"], metrics["hd95_mm"]) == (1.0, 0.0)
    assert len(result.statistics) == task.statistics_size(make_job())


def test_distances_use_the_spacing_of_the_case() -> None:
    sample = make_sample((40, 40), spacing=(1.0, 7.0))
    moved = Sample("c", "p", sample.image.roll(1, dims=2), sample.label, None, None, sample.spacing_mm)
    with torch.inference_mode():
        result = task.evaluate_case(Threshold(), moved, make_job(), CPU, final=True)
        quick = task.evaluate_case(Threshold(), moved, make_job(), CPU, final=False)
        without = make_job(evaluation={"surface_distances": False})
        without_distances = task.evaluate_case(Threshold(), moved, without, CPU, final=True)
    assert result.values["hd95_mm/rim"] == 7.0
    assert set(quick.values) == {"dice/core", "dice/rim"}
    assert "hd95_mm" not in task.metrics(without_distances.statistics, without)


def test_windows_grow_to_the_image_within_two_training_batches() -> None:
    job = make_job((32, 32), batch_size=2)
    limit = 4 * 32 * 32
    assert task.inference_window((20, 32), job, 8) == (32, 32)
    assert task.inference_window((36, 50), job, 8) == (40, 56)
    assert task.inference_window((36, 50), job, None) == (32, 32)
    assert task.inference_window((500, 40), job, 8) == (32, 40)
    for shape in ((64, 64), (65, 64), (33, 120), (1000, 1000)):
        assert math.prod(task.inference_window(shape, job, 1)) <= limit
    # 4 crops of 32 x 40 x 32 allow one window for a volume that is a little larger.
    assert task.inference_window((36, 50, 36), make_job((32, 40, 32), batch_size=2), 8) == (40, 56, 40)


def test_windows_that_overlap_are_blended_into_what_one_window_gives() -> None:
    # A network without normalisation sees as far as its kernel: the seams must not show.
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()
    image = make_sample((90, 70)).image
    with torch.inference_mode():
        whole = network(image[None])[0].argmax(dim=0).numpy()
        slid = task.predict(network, image, make_job((32, 32), evaluation={"overlap": 0.5}), CPU)
    assert (whole[1:-1, 1:-1] == slid[1:-1, 1:-1]).mean() > 0.98


@pytest.mark.parametrize("name", ("UNet", "UNETR"))
def test_volumes_of_every_size_are_predicted_on_their_own_grid(name: str) -> None:
    job = make_job((16, 16, 16), network=name)
    network = initial_network(job).eval()
    with torch.inference_mode():
        for shape in ((9, 16, 30), (36, 20, 17)):
            assert task.predict(network, make_sample(shape).image, job, CPU).shape == shape


def test_a_class_in_neither_mask_leaves_the_score_to_the_others() -> None:
    sample = make_sample((32, 32))
    empty = Sample(
        "c", "p", torch.zeros(1, 32, 32), torch.zeros(32, 32, dtype=torch.uint8), None, None, (1.0, 1.0)
    )
    with torch.inference_mode():
        nothing = task.evaluate_case(Threshold(), empty, make_job(), CPU, final=True)
        label = sample.label.clone()
        label[label == 2] = 0
        core = Sample("c", "p", label[None].float(), label, None, None, (1.0, 1.0))
        one = task.evaluate_case(Threshold(), core, make_job(), CPU, final=True)
    assert (nothing.score, nothing.values) == (1.0, {})
    assert (one.score, set(one.values)) == (1.0, {"dice/core", "hd95_mm/core", "asd_mm/core"})
    assert math.isnan(task.metrics(nothing.statistics, make_job())["dice"])
    assert task.metrics(nothing.statistics + one.statistics, make_job())["dice"] == 1.0


def test_the_task_is_found_and_has_a_headline() -> None:
    assert task_module(make_job()) is task
    assert task.HEADLINE in task.metrics(np.zeros(task.statistics_size(make_job())), make_job())


def test_training_and_judging_are_the_same_bits_twice() -> None:
    job = make_job((16, 16, 16), augmentation="strong")
    samples = [make_sample((20, 24, 18), seed) for seed in range(2)]
    weights, statistics = [], []
    for _ in range(2):
        network = initial_network(job)
        torch.manual_seed(0)
        batch = task.training_batch(samples, job, np.random.default_rng(0))
        task.training_loss(network, batch, job, CPU).backward()
        weights.append([p.grad for p in network.parameters()])
        with torch.inference_mode():
            statistics.append(task.evaluate_case(network.eval(), samples[0], job, CPU, final=True).statistics)
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert np.array_equal(*statistics)
