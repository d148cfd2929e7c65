"""The detection task: batches, augmentation, losses, and cases from the image to the metrics."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedvision.config import Job, parse_job
from fedvision.data.readers import Sample
from fedvision.errors import ModelError
from fedvision.tasks import detection, task_module
from fedvision.tasks.detection_augmentation import resize_image, training_case

CPU = torch.device("cpu")

# A detector that always answers the same: one box of each class, one of them hardly sure, one unknown.
OWN = """
import torch
from torch import nn

class Fixed(nn.Module):
    def forward(self, images, targets=None):
        if self.training:
            return {}
        dims = images[0].ndim - 1
        low, high = torch.full((4, dims), 8.0), torch.tensor([[16.0], [24.0], [32.0], [16.0]]).expand(4, dims)
        return [{
            "boxes": torch.cat([low, high], dim=1),
            "labels": torch.tensor([1, 2, 1, 7]),
            "scores": torch.tensor([0.2, 0.9, 0.01, 0.8]),
        }]

class Wrong(nn.Module):
    def forward(self, images, targets=None):
        return torch.zeros(1)

def fixed(job):
    return Fixed()

def wrong(job):
    return Wrong()
"""


def make_job(size=(64, 64), name="RetinaNet", augmentation="light", **changes) -> Job:
    content = {
        "name": "test",
        "rounds": 1,
        "task": {"kind": "detection", "spatial_dims": len(size), "classes": ["disc", "bar"]},
        "model": {"name": name, "args": changes.pop("args", {})},
        "training": {
            "steps": 1,
            "loss": "detector",
            "image_size": list(size),
            "augmentation": augmentation,
        },
        "aggregation": {"clip_norm": 1.0},
        "evaluation": changes,
    }
    return parse_job(content, "test")


def make_sample(shape=(64, 64), boxes=(), labels=None, image=None) -> Sample:
    dims = len(shape)
    return Sample(
        case_id="c",
        patient="p",
        image=torch.zeros(1, *shape) if image is None else image,
        label=None,
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 2 * dims),
        box_labels=torch.tensor(labels if labels is not None else [1] * len(boxes), dtype=torch.int64),
        spacing_mm=(1.0,) * dims,
    )


def drawn(shape, box):
    """An image that is 1 inside a box (axes as in the manifest) and 0 elsewhere."""
    image, dims = torch.zeros(1, *shape), len(shape)
    low, high = (box[:dims], box[dims:]) if dims == 3 else (box[1::-1], box[:1:-1])
    image[(0, *(slice(a, b) for a, b in zip(low, high, strict=True)))] = 1
    return image


def extent(image, level):
    """The box around what is brighter than ``level``, axes as in the manifest."""
    where = (image[0] > level).nonzero()
    low, high = where.min(dim=0).values, where.max(dim=0).values + 1
    return torch.cat([low, high] if image.ndim == 4 else [low.flip(0), high.flip(0)]).float()


def test_the_task_of_a_detection_job_is_this_module():
    assert task_module(make_job()) is detection
    assert detection.HEADLINE in detection.metrics(
        np.zeros(detection.statistics_size(make_job())), make_job()
    )


@pytest.mark.parametrize("strength", ["none", "light", "strong"])
@pytest.mark.parametrize(
    ("shape", "size", "box"),
    [
        ((64, 64), (64, 64), (20, 24, 44, 32)),
        ((120, 80), (96, 96), (20, 24, 60, 84)),
        ((40, 60), (80, 48), (16, 12, 40, 24)),
        ((32, 40, 24), (48, 32, 32), (8, 12, 6, 20, 32, 18)),
    ],
)
def test_boxes_stay_on_their_objects(shape, size, box, strength):
    changed = set()
    for seed in range(25):
        rng = np.random.default_rng(seed)
        image, boxes, labels = training_case(
            drawn(shape, box) * 10, torch.tensor([box]), torch.tensor([2]), size, strength, rng
        )
        assert image.shape == (1, *size)
        assert labels.tolist() == [2]
        assert (boxes[0] - extent(image, 5)).abs().max() <= 1.5
        changed.add(tuple(boxes[0].round().tolist()))
    assert (len(changed) > 1) == (strength != "none")


def test_a_square_picture_is_turned_to_all_eight_positions():
    positions = set()
    for seed in range(100):
        _, boxes, _ = training_case(
            torch.zeros(1, 64, 64), torch.tensor([[4, 8, 20, 40]]), torch.tensor([1]), (64, 64), "light",
            np.random.default_rng(seed),
        )  # fmt: skip
        positions.add(tuple(boxes[0].tolist()))
    assert len(positions) == 8


def test_without_augmentation_an_image_of_the_right_size_is_unchanged():
    image, boxes = torch.randn(1, 32, 32), torch.tensor([[1.0, 2.0, 3.5, 9.0]])
    same, same_boxes, _ = training_case(
        image, boxes, torch.tensor([1]), (32, 32), "none", np.random.default_rng(0)
    )
    assert torch.equal(same, image)
    assert torch.equal(same_boxes, boxes)


def test_zoom_leaves_out_boxes_that_are_hardly_visible_and_cuts_the_others():
    grid = torch.tensor([[x, y, x + 8, y + 8] for x in range(0, 64, 8) for y in range(0, 64, 8)])
    counts = set()
    for seed in range(30):
        _, boxes, labels = training_case(
            torch.zeros(1, 64, 64),
            grid,
            torch.arange(64) % 2 + 1,
            (64, 64),
            "strong",
            np.random.default_rng(seed),
        )
        assert len(boxes) == len(labels)
        assert (boxes >= 0).all() and (boxes <= 64).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
        counts.add(len(boxes))
    assert min(counts) < 50 and max(counts) == 64


def test_a_box_below_a_pixel_after_resizing_is_left_out_of_training():
    sample = make_sample((640, 640), [(10, 10, 14, 200), (100, 100, 300, 300)], [1, 2])
    batch = detection.training_batch([sample], make_job(augmentation="none"), np.random.default_rng(0))
    assert batch["targets"][0]["labels"].tolist() == [2]
    assert batch["targets"][0]["boxes"].tolist() == [[10, 10, 30, 30]]


@pytest.mark.parametrize("size", [(48, 64), (24, 32, 16)])
@pytest.mark.parametrize("strength", ["light", "strong"])
def test_the_same_generator_gives_the_same_batch_and_leaves_the_samples_alone(size, strength):
    shape = tuple(2 * side for side in size)
    image = torch.randn(1, *shape)
    samples = [
        make_sample(shape, [(4,) * len(size) + (12,) * len(size)], [1], image.clone()),
        make_sample(shape),
    ]
    job = make_job(size, augmentation=strength)
    first, second, other = (
        detection.training_batch(samples, job, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first["images"], second["images"])
    assert torch.equal(first["targets"][0]["boxes"], second["targets"][0]["boxes"])
    assert not torch.equal(first["images"], other["images"])
    assert first["images"].shape == (2, 1, *size) and first["images"].dtype == torch.float32
    assert first["targets"][1]["boxes"].shape == (0, 2 * len(size))
    assert torch.equal(samples[0].image, image)


def test_resizing_down_does_not_alias():
    # Stripes of one pixel average out; without a filter every fourth pixel would be taken as it is.
    for shape, size in (((64, 64), (16, 16)), ((64, 64, 64), (16, 16, 16))):
        stripes = torch.zeros(1, *shape)
        stripes[:, ::2] = 1
        assert (resize_image(stripes, size) - 0.5).abs().max() < 0.1


def test_resizing_a_volume_keeps_its_axes():
    ramp = torch.arange(12.0).reshape(1, 12, 1, 1).expand(1, 12, 8, 6).contiguous()
    resized = resize_image(ramp, (24, 4, 3))
    assert resized.shape == (1, 24, 4, 3)
    assert (resized.diff(dim=1) >= 0).all()
    assert torch.allclose(resized, resized[:, :, :1, :1].expand_as(resized), atol=1e-5)


@pytest.mark.parametrize(
    ("size", "name"), [((64, 64), "RetinaNet"), ((64, 64), "FasterRCNN"), ((32,) * 3, "RetinaNet")]
)
def test_images_without_boxes_have_a_finite_loss_with_gradients(size, name):
    torch.manual_seed(0)
    job = make_job(size, name)
    network = detection.build_network(job).eval()
    batch = detection.training_batch([make_sample(size)] * 2, job, np.random.default_rng(0))
    loss = detection.training_loss(network, batch, job, CPU)
    assert loss.shape == () and torch.isfinite(loss)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("size", [(64, 64), (32, 32, 32)])
def test_the_loss_of_a_batch_is_the_mean_of_its_images_losses(size):
    torch.manual_seed(0)
    job, dims = make_job(size, augmentation="none"), len(size)
    network = detection.build_network(job)
    corners = [(4,) * dims + (20,) * dims, (8,) * dims + (30,) * dims, (2,) * dims + (9,) * dims]
    samples = [make_sample(size, corners[:count], image=torch.randn(1, *size)) for count in (0, 1, 3)]

    def loss_of(chosen):
        batch = detection.training_batch(chosen, job, np.random.default_rng(0))
        return detection.training_loss(network, batch, job, CPU).item()

    assert loss_of(samples) == pytest.approx(np.mean([loss_of([sample]) for sample in samples]), rel=1e-4)


def test_a_case_is_judged_on_its_own_grid(tmp_path: Path, monkeypatch):
    (tmp_path / "own_answers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    job = make_job((64, 64), "own_answers:fixed")
    network = detection.build_network(job)
    # 64 x 64 comes from 128 rows and 32 columns: x shrinks to a half, y doubles.
    sample = make_sample((128, 32), [(4, 16, 12, 48)], [2])
    result = detection.evaluate_case(network, sample, job, CPU, final=True)
    assert result.prediction["boxes"].tolist() == [[4, 16, 12, 48], [4, 16, 8, 32]]
    assert result.prediction["labels"].tolist() == [2, 1]
    assert result.prediction["scores"].tolist() == pytest.approx([0.9, 0.2])
    assert result.score == 1
    assert result.statistics.shape == (detection.statistics_size(job),)
    assert detection.metrics(result.statistics, job)["map"] == 1
    assert network.training

    volume = make_job((64, 64, 64), "own_answers:fixed")
    sample = make_sample((128, 32, 64), [(16, 4, 8, 48, 12, 24)], [2])
    result = detection.evaluate_case(network, sample, volume, CPU, final=False)
    assert result.prediction["boxes"][0].tolist() == [16, 4, 8, 48, 12, 24]
    assert detection.metrics(result.statistics, volume)["map/bar"] == 1


def test_the_jobs_threshold_and_number_of_boxes_hold_for_every_detector(tmp_path: Path, monkeypatch):
    (tmp_path / "own_answers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    for changes, expected in (
        ({"max_detections": 1}, [2]),
        ({"score_threshold": 0.3}, [2]),
        ({"score_threshold": 0.0}, [2, 1, 1]),
    ):
        job = make_job((64, 64), "own_answers:fixed", **changes)
        found = detection.evaluate_case(
            detection.build_network(job), make_sample(), job, CPU, False
        ).prediction
        assert found["labels"].tolist() == expected


def test_a_network_that_is_no_detector_is_refused(tmp_path: Path, monkeypatch):
    (tmp_path / "own_answers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    job = make_job((64, 64), "own_answers:wrong")
    network = detection.build_network(job)
    batch = detection.training_batch([make_sample()], job, np.random.default_rng(0))
    with pytest.raises(ModelError, match="must return a dict of losses in training mode, got Tensor"):
        detection.training_loss(network, batch, job, CPU)
    with pytest.raises(ModelError, match="must return a list of dicts with boxes, labels and scores"):
        detection.evaluate_case(network, make_sample(), job, CPU, False)


def object_samples(shape, number, seed=0):
    """Images on noise with up to four bright squares or cubes of side 12 in cells of side 16."""
    rng, samples = np.random.default_rng(seed), []
    cells = np.indices([side // 16 for side in shape]).reshape(len(shape), -1).T
    for _ in range(number):
        image = torch.from_numpy(rng.normal(0, 0.3, (1, *shape))).float()
        boxes = []
        for cell in rng.permutation(cells)[: rng.integers(1, 5)]:
            low = (16 * cell + rng.integers(0, 5, len(shape))).tolist()
            boxes.append((*low, *(corner + 12 for corner in low)))
            image += drawn(shape, boxes[-1]) * 3
        samples.append(make_sample(shape, boxes, image=image))
    return samples


FEW_REGIONS = {
    "rpn_pre_nms_top_n_train": 200,
    "rpn_post_nms_top_n_train": 50,
    "rpn_post_nms_top_n_test": 50,
    "box_batch_size_per_image": 32,
}


@pytest.mark.parametrize(
    ("shape", "name", "batch_size", "args"),
    [
        ((64, 64), "RetinaNet", 2, {"width": 16, "fpn_channels": 32}),
        ((64, 64), "FasterRCNN", 2, {"width": 16, "fpn_channels": 32, **FEW_REGIONS}),
        ((32, 32, 32), "RetinaNet", 4, {"width": 8, "fpn_channels": 16}),
    ],
)
def test_a_detector_learns_from_scratch_to_find_objects_in_new_images(shape, name, batch_size, args):
    torch.manual_seed(0)
    job, rng = make_job(shape, name, args=args), np.random.default_rng(0)
    network = detection.build_network(job)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    samples = object_samples(shape, 24)
    for step in range(60):
        chosen = [samples[(batch_size * step + i) % len(samples)] for i in range(batch_size)]
        loss = detection.training_loss(network, detection.training_batch(chosen, job, rng), job, CPU)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    new = object_samples(shape, 6, seed=1)
    with torch.inference_mode():
        results = [detection.evaluate_case(network, sample, job, CPU, True) for sample in new]
    metrics = detection.metrics(sum(result.statistics for result in results), job)
    assert metrics["ap50/disc"] > 0.8
    assert np.isnan(metrics["ap50/bar"])
