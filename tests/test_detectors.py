"""Every detector by name, its arguments, and what holds for all of them."""

import socket
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from fedvision.config import Job, parse_job
from fedvision.errors import ModelError
from fedvision.tasks.detectors import build_detector, default_anchor_sizes, default_layers
from fedvision.tasks.light_backbone import LightBackbone, group_norm
from fedvision.tasks.normalisation import has_running_statistics

PICTURE = [
    ("RetinaNet", "light"),
    ("RetinaNet", "resnet18"),
    ("RetinaNet", "mobilenet_v3_large"),
    ("FasterRCNN", "light"),
    ("FasterRCNN", "resnet18"),
]

OWN = """
from fedvision.tasks.detectors import build_detector

def narrow(job, width=8):
    model = job.model.model_copy(update={"name": "RetinaNet", "args": {"width": width}})
    return build_detector(job.model_copy(update={"model": model}))

def nothing(job):
    return 3
"""


def make_job(name: str = "RetinaNet", size=(64, 64), channels=3, classes=("a", "b"), **args) -> Job:
    return parse_job(
        {
            "name": "test",
            "rounds": 1,
            "task": {
                "kind": "detection",
                "spatial_dims": len(size),
                "in_channels": channels,
                "classes": list(classes),
            },
            "model": {"name": name, "args": args},
            "training": {"steps": 1, "loss": "detector", "image_size": list(size)},
            "aggregation": {"clip_norm": 1.0},
        },
        "test",
    )


def picture_target(size=64):
    return {"boxes": torch.tensor([[8.0, 8.0, size / 2, size / 2]]), "labels": torch.tensor([2])}


@pytest.mark.parametrize(("name", "backbone"), PICTURE)
def test_a_picture_detector_trains_and_predicts(name, backbone, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a network must not be downloaded")

    monkeypatch.setattr(socket, "socket", refuse)
    torch.manual_seed(0)
    detector = build_detector(make_job(name, backbone=backbone))
    losses = detector([torch.randn(3, 64, 64)], [picture_target()])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    missing = [n for n, p in detector.named_parameters() if p.grad is None]
    assert missing == []
    found = detector.eval()([torch.randn(3, 64, 64)])
    assert set(found[0]) == {"boxes", "labels", "scores"}
    assert found[0]["boxes"].shape == (len(found[0]["scores"]), 4)


@pytest.mark.parametrize(("name", "backbone"), PICTURE)
def test_no_picture_detector_has_batch_statistics(name, backbone):
    detector = build_detector(make_job(name, backbone=backbone))
    assert not any(has_running_statistics(module) for module in detector.modules())
    assert not any("BatchNorm" in type(module).__name__ for module in detector.modules())
    assert list(detector.buffers()) == []


@pytest.mark.parametrize("backbone", ["light", "resnet18"])
def test_a_volume_detector_trains_and_predicts_without_batch_statistics(backbone):
    torch.manual_seed(0)
    detector = build_detector(make_job(size=(32, 32, 32), channels=1, backbone=backbone))
    assert not any(has_running_statistics(module) for module in detector.modules())
    target = {"boxes": torch.tensor([[4.0, 8.0, 12.0, 16.0, 20.0, 28.0]]), "labels": torch.tensor([2])}
    losses = detector([torch.randn(1, 32, 32, 32)], [target])
    sum(losses.values()).backward()
    assert [n for n, p in detector.named_parameters() if p.grad is None] == []
    found = detector.eval()([torch.randn(1, 32, 32, 32)])
    assert set(found[0]) == {"boxes", "labels", "scores"}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("backbone", ["light", "resnet18", "mobilenet_v3_large"])
def test_the_first_layer_reads_the_channels_of_the_job(channels, backbone):
    detector = build_detector(make_job(channels=channels, backbone=backbone))
    assert detector.eval()([torch.randn(channels, 64, 64)])[0]["boxes"].shape[1] == 4


@pytest.mark.parametrize(
    ("name", "size"), [("RetinaNet", (64, 64)), ("FasterRCNN", (64, 64)), ("RetinaNet", (32,) * 3)]
)
def test_weights_load_back_from_plain_tensors(name, size):
    # torchvision renames weights of a state dict without metadata, which is all that a message holds.
    first, second = (build_detector(make_job(name, size)) for _ in range(2))
    plain = {key: value.clone() for key, value in first.state_dict().items()}
    second.load_state_dict(plain)
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in plain.items())


def test_the_light_detector_has_between_half_a_million_and_three_million_weights():
    for name in ("RetinaNet", "FasterRCNN"):
        count = sum(p.numel() for p in build_detector(make_job(name)).parameters())
        assert 5e5 < count < 3e6


def test_images_are_neither_resized_nor_normalised():
    detector = build_detector(make_job(size=(64, 96)))
    image = torch.randn(3, 64, 96) * 50 + 1000
    batch, targets = detector.transform([image], [picture_target()])
    assert torch.equal(batch.tensors[0], image)
    assert torch.equal(targets[0]["boxes"], picture_target()["boxes"])


def test_an_image_is_padded_to_the_largest_stride_and_boxes_stay_inside():
    torch.manual_seed(0)
    detector = build_detector(make_job(size=(50, 70), score_thresh=0.0)).eval()
    batch, _ = detector.transform([torch.randn(3, 50, 70)])
    assert batch.tensors.shape == (1, 3, 64, 80)
    boxes = detector([torch.randn(3, 50, 70)])[0]["boxes"]
    assert len(boxes) and (boxes >= 0).all() and (boxes[:, 2] <= 70).all() and (boxes[:, 3] <= 50).all()


@pytest.mark.parametrize(
    ("name", "size"), [("RetinaNet", (64, 64)), ("FasterRCNN", (64, 64)), ("RetinaNet", (32,) * 3)]
)
def test_under_autocast_anchors_boxes_and_losses_are_float32(name, size):
    torch.manual_seed(0)
    detector = build_detector(make_job(name, size))
    image = torch.randn(3, *size)
    corner = torch.tensor([4.0] * len(size) + [20.0] * len(size))[None]
    target = {"boxes": corner, "labels": torch.tensor([1])}
    torch.manual_seed(1)
    exact = detector([image], [target])
    generator = next(m for n, m in detector.named_modules() if n.endswith("anchor_generator"))
    anchors: list[torch.Tensor] = []
    generator.register_forward_hook(lambda module, inputs, output: anchors.extend(output))
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = detector([image], [target])
        found = detector.eval()([image])
    assert len(anchors) == 2 and all(boxes.dtype == torch.float32 for boxes in anchors)
    assert all(loss.dtype == torch.float32 for loss in rough.values())
    assert found[0]["boxes"].dtype == found[0]["scores"].dtype == torch.float32
    for key, loss in exact.items():
        assert rough[key].item() == pytest.approx(loss.item(), rel=0.05, abs=0.02)


def test_training_goes_on_after_predicting_in_inference_mode():
    # MONAI keeps the anchors of the last image shape, which autograd may not use if made in inference mode.
    detector = build_detector(make_job(size=(32, 32, 32), channels=1))
    image = torch.randn(1, 32, 32, 32)
    with torch.inference_mode():
        detector.eval()([image])
    detector.train()
    target = {"boxes": torch.tensor([[4.0, 4.0, 4.0, 12.0, 12.0, 12.0]]), "labels": torch.tensor([1])}
    sum(detector([image], [target]).values()).backward()
    assert not detector.detector.anchors[0].is_inference()


def test_default_anchors_grow_evenly_from_a_25th_of_the_image_or_three_strides():
    for side, smallest in ((160, 12), (320, 12.8), (1000, 40)):
        sizes = [side for level in default_anchor_sizes((side, 2000), (4, 8, 16)) for side in level]
        assert sizes[0] == pytest.approx(smallest)
        assert sizes[-1] == pytest.approx(0.64 * side)
        steps = [b / a for a, b in pairwise(sizes)]
        assert steps == pytest.approx([steps[0]] * 8)
    assert default_anchor_sizes((16, 16), (4, 8, 16))[-1][-1] == pytest.approx(24)


def test_small_images_get_a_finer_pyramid():
    assert default_layers((160, 160)) == (1, 2, 3)
    assert default_layers((512, 512)) == (2, 3, 4)


@pytest.mark.parametrize(
    ("change", "text", "hint"),
    [
        ({"nms_tresh": 0.3}, "no argument `nms_tresh`", "did you mean `nms_thresh`?"),
        ({"backbone": "resnet"}, "no backbone 'resnet'", "resnet"),
        ({"backbone": "resnet18", "width": 8}, "no argument `width`", "takes"),
        ({"num_classes": 5}, "`num_classes` of RetinaNet is set from the job", "leave it out"),
        ({"weights": "DEFAULT"}, "no argument `weights`", ""),
        ({"anchor_sizes": [[8, 16]]}, "for each of the 3 levels", ""),
        ({"anchor_sizes": [8, 16, 32]}, "for each of the 3 levels", ""),
        ({"anchor_sizes": [[8], [16], [32, 64]]}, "as many sides at every level", ""),
        ({"returned_layers": [1, 7]}, "must be among 1, 2, 3, 4", ""),
        ({"fg_iou_thresh": 0.2}, "cannot be built", ""),
    ],
)
def test_a_wrong_argument_is_refused_by_name(change, text, hint):
    with pytest.raises(ModelError) as caught:
        build_detector(make_job(**change))
    assert text in str(caught.value)
    assert hint in caught.value.hint


def test_a_wrong_argument_of_a_volume_detector_is_refused_by_name():
    with pytest.raises(ModelError, match="no argument `topk_candidate`") as caught:
        build_detector(make_job(size=(32, 32, 32), topk_candidate=5))
    assert caught.value.hint == "did you mean `topk_candidates_per_level`?"
    with pytest.raises(ModelError, match="no backbone 'mobilenet_v3_large'"):
        build_detector(make_job(size=(32, 32, 32), backbone="mobilenet_v3_large"))


def test_a_detector_that_does_not_exist_is_refused():
    with pytest.raises(ModelError, match="no detector 'FasterRCNN' for spatial_dims = 3"):
        build_detector(make_job("FasterRCNN", (32, 32, 32)))


def test_arguments_reach_the_library():
    job = make_job(anchor_sizes=[[4], [8], [16]], aspect_ratios=[0.5, 1, 2], fg_iou_thresh=0.6, width=16)
    detector = build_detector(job)
    assert detector.anchor_generator.num_anchors_per_location() == [3, 3, 3]
    assert detector.proposal_matcher.high_threshold == 0.6
    assert detector.detections_per_img == 100
    assert detector.score_thresh == 0.05


def test_the_users_own_detector_gets_the_job_and_its_arguments(tmp_path: Path, monkeypatch):
    (tmp_path / "own_detectors.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    detector = build_detector(make_job("own_detectors:narrow", width=16))
    assert detector.backbone.stem[0].out_channels == 16
    with pytest.raises(ModelError, match=r"must return a torch\.nn\.Module, got int"):
        build_detector(make_job("own_detectors:nothing"))
    with pytest.raises(ModelError, match="failed: TypeError"):
        build_detector(make_job("own_detectors:nothing", depth=3))


@pytest.mark.parametrize("channels", [3, 8, 12, 16, 24, 36, 40, 64, 72, 120, 184, 200, 480, 960, 2048])
def test_groups_divide_the_channels(channels):
    layer = group_norm(channels)
    assert isinstance(layer, nn.GroupNorm)
    assert channels % layer.num_groups == 0
    assert channels // layer.num_groups <= 16


def test_the_light_backbone_gives_a_map_for_each_layer_at_its_stride():
    for dims in (2, 3):
        backbone = LightBackbone(dims, 1, 8, 16, [2, 4])
        maps = backbone(torch.randn(1, 1, *[64] * dims))
        assert [tuple(level.shape[1:]) for level in maps.values()] == [(16, *[8] * dims), (16, *[2] * dims)]
        assert backbone.strides == [8, 32]
