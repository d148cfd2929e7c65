"""Clipped gradients of one patient each, the engines that compute them, and networks that mix patients."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from monai.networks import nets
from torch import nn
from torch.nn import functional
from torchvision.ops import FrozenBatchNorm2d

from fedvision.config import parse_job
from fedvision.errors import ConfigError, TrainingError
from fedvision.privacy.engines import choose_engine
from fedvision.privacy.networks import (
    check_private,
    leaks_between_patients,
    make_private,
    mixing_layers,
    num_groups,
    without_dropout,
)
from fedvision.privacy.per_patient import (
    Sample,
    clipped_gradient_sum,
    load_gradient,
    trained_parameters,
)
from fedvision.tasks import detection
from fedvision.tasks.light_backbone import LightBackbone

INSTANCE = ("instance", {"affine": True})
GROUP = ("group", {"num_groups": 2})
SWIN = {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2), "spatial_dims": 2}

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "UNet 2D instance": (lambda: nets.UNet(2, 1, 2, (4, 8), (2,), num_res_units=1, norm=INSTANCE), (16, 16)),
    "UNet 2D group": (lambda: nets.UNet(2, 1, 2, (4, 8), (2,), norm=GROUP), (16, 16)),
    "UNet 3D instance": (lambda: nets.UNet(3, 1, 2, (4, 8), (2,), norm=INSTANCE), (16,) * 3),
    "UNet 3D group": (lambda: nets.UNet(3, 1, 2, (4, 8), (2,), norm=GROUP), (16,) * 3),
    "BasicUNet": (lambda: nets.BasicUNet(2, 1, 2, (4, 4, 8, 8, 8, 4), norm=INSTANCE), (32, 32)),
    "AttentionUnet": (
        lambda: make_private(nets.AttentionUnet(2, 1, 2, (4, 8), (2,)))[0],
        (16, 16),
    ),
    "SegResNet": (
        lambda: nets.SegResNet(2, 4, 1, 2, norm=GROUP, blocks_down=(1, 1), blocks_up=(1,)),
        (16, 16),
    ),
    "DynUNet": (
        lambda: nets.DynUNet(2, 1, 2, (3, 3, 3), (1, 2, 2), (2, 2), (4, 4, 8), norm_name=INSTANCE),
        (16, 16),
    ),
    "SwinUNETR": (lambda: nets.SwinUNETR(1, 2, norm_name=INSTANCE, **SWIN), (64, 64)),
}


def small_unet(**changes) -> nn.Module:
    torch.manual_seed(0)
    return nets.UNet(2, 1, 2, (4, 8), (2,), **{"norm": INSTANCE, **changes})


def cross_entropy(network: nn.Module, sample: Sample) -> torch.Tensor:
    return functional.cross_entropy(network(sample["image"]), sample["label"])


def patient(number: int, size=(16, 16), samples: int = 1, dtype=torch.float32) -> list[Sample]:
    generator = torch.Generator().manual_seed(number)
    return [
        {
            "image": torch.randn(1, 1, *size, generator=generator, dtype=dtype),
            "label": (torch.rand(1, *size, generator=generator) < 0.1 * (number % 9 + 1)).long(),
        }
        for _ in range(samples)
    ]


def plain_gradient(network: nn.Module, loss, samples: list[Sample]) -> torch.Tensor:
    """The gradient of one patient by ``backward``, on a copy."""
    network = copy.deepcopy(network)
    torch.stack([loss(network, sample) for sample in samples]).mean().backward()
    return torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
            for p in network.parameters()
            if p.requires_grad
        ]
    )


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_the_loop_gives_what_autograd_gives_for_one_patient():
    network = small_unet()
    for samples in (1, 3):
        one = patient(1, samples=samples)
        found = clipped_gradient_sum(network, cross_entropy, [one], math.inf)
        assert difference(found.gradient, plain_gradient(network, cross_entropy, one)) < 1e-6
        assert found.gradient.dtype == torch.float32
        assert found.mean_loss == pytest.approx(
            sum(cross_entropy(network, sample).item() for sample in one) / samples, rel=1e-6
        )


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_a_patient_of_many_images_is_clipped_once(engine):
    network = small_unet()
    patients = [patient(1, samples=4), patient(2)]
    parts = [plain_gradient(network, cross_entropy, one) for one in patients]
    clip_norm = 0.5 * float(min(part.norm() for part in parts))
    found = clipped_gradient_sum(network, cross_entropy, patients, clip_norm, engine, 2)
    assert difference(found.gradient, sum(clip_norm * part / part.norm() for part in parts)) < 1e-5
    assert found.share_clipped == 1.0
    alone = clipped_gradient_sum(network, cross_entropy, patients[:1], clip_norm, engine)
    assert float(alone.gradient.double().norm()) == pytest.approx(clip_norm, rel=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_vmap_gives_what_the_loop_gives(name):
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    # In float64: in float32 the sign of one ReLU or one tie of a maximum makes a difference of 1e-4.
    network = make().double().train()
    weights = [id(parameter) for parameter in network.parameters()]
    before = [parameter.detach().clone() for parameter in network.parameters()]
    patients = [patient(number, size, dtype=torch.float64) for number in range(3)]
    loop = clipped_gradient_sum(network, cross_entropy, patients, math.inf)
    clip_norm = 1.0001 * sorted(loop.norms)[1]
    loop = clipped_gradient_sum(network, cross_entropy, patients, clip_norm)
    found = clipped_gradient_sum(network, cross_entropy, patients, clip_norm, "vmap", 2)
    assert difference(found.gradient, loop.gradient) < 1e-6
    assert found.norms == pytest.approx(loop.norms, rel=1e-9)
    assert found.share_clipped == pytest.approx(1 / 3)
    assert weights == [id(parameter) for parameter in network.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_vmap_agrees_with_the_loop_in_single_precision():
    network = small_unet()
    patients = [patient(number) for number in range(5)]
    loop = clipped_gradient_sum(network, cross_entropy, patients, 0.1)
    for chunk in (1, 2, 4, 8):
        found = clipped_gradient_sum(network, cross_entropy, patients, 0.1, "vmap", chunk)
        assert difference(found.gradient, loop.gradient) < 1e-5
        assert found.mean_loss == pytest.approx(loop.mean_loss, rel=1e-5)


def test_vmap_takes_patients_of_different_forms():
    network = small_unet()
    patients = [patient(1), patient(2, samples=3), patient(3, size=(32, 16)), patient(4), patient(5)]
    patients.append([*patient(6), *patient(7, size=(32, 32))])
    patients.append([{**patient(8)[0], "name": "not a tensor"}])
    loop = clipped_gradient_sum(network, cross_entropy, patients, 0.1)
    found = clipped_gradient_sum(network, cross_entropy, patients, 0.1, "vmap", 2)
    assert difference(found.gradient, loop.gradient) < 1e-5
    assert found.norms == pytest.approx(loop.norms, rel=1e-4)


def test_tied_frozen_and_unused_parameters_are_right_in_both_engines():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
            self.second.weight = self.first.weight
            self.second.bias.requires_grad_(False)
            self.unused = nn.Parameter(torch.ones(3))
            self.last = nn.Conv2d(1, 2, 1)

        def forward(self, image):
            return self.last(self.second(self.first(image).tanh()))

    torch.manual_seed(0)
    network = Tied()
    patients = [patient(number) for number in range(4)]
    wanted = sum(plain_gradient(network, cross_entropy, one) for one in patients)
    assert wanted.numel() == sum(p.numel() for p in trained_parameters(network)) == 3 + 9 + 1 + 2 + 2
    for engine in ("loop", "vmap"):
        found = clipped_gradient_sum(network, cross_entropy, patients, math.inf, engine, 4)
        assert difference(found.gradient, wanted) < 1e-6


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_an_empty_draw_gives_zeros(engine):
    network = small_unet()
    found = clipped_gradient_sum(network, cross_entropy, [], 1.0, engine, 4)
    assert found.gradient.shape == (sum(p.numel() for p in network.parameters()),)
    assert not found.gradient.any() and found.num_patients == 0 and found.share_clipped == 0.0
    assert math.isnan(found.mean_loss)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_the_order_of_patients_does_not_show(engine):
    network = small_unet()
    patients = [patient(number) for number in range(12)]
    patients += [[{**one[0], "image": one[0]["image"] * 1e4}] for one in patients[:4]]
    first = clipped_gradient_sum(network, cross_entropy, patients, 0.1, engine, 3)
    second = clipped_gradient_sum(network, cross_entropy, patients[::-1], 0.1, engine, 3)
    # Patients in other chunks have slightly other gradients; the sum of the same ones is the same.
    assert difference(second.gradient, first.gradient) < (1e-8 if engine == "loop" else 1e-6)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_a_gradient_that_is_not_finite_adds_nothing_and_is_counted(engine):
    network = small_unet()
    patients = [patient(number) for number in range(3)]
    bad = patient(3)
    bad[0]["image"][0, 0, 3, 3] = math.nan
    good = clipped_gradient_sum(network, cross_entropy, patients, 0.1, engine, 4)
    found = clipped_gradient_sum(network, cross_entropy, [bad, *patients], 0.1, engine, 4)
    assert torch.isfinite(found.gradient).all()
    assert difference(found.gradient, good.gradient) < 1e-6
    assert (found.num_not_finite, found.num_patients, found.norms[0]) == (1, 4, math.inf)
    assert found.mean_loss == pytest.approx(good.mean_loss, rel=1e-5)


def test_a_detector_that_gives_up_on_a_patient_adds_nothing_for_him():
    network = small_unet()

    def loss(network: nn.Module, sample: Sample) -> torch.Tensor:
        if not torch.isfinite(sample["image"]).all():
            raise TrainingError("the detector's output is not finite")
        return cross_entropy(network, sample)

    bad = patient(3)
    bad[0]["image"][:] = math.inf
    good = clipped_gradient_sum(network, loss, [patient(1)], 0.1)
    found = clipped_gradient_sum(network, loss, [patient(1), [*patient(2), *bad]], 0.1)
    assert torch.equal(found.gradient, good.gradient) and found.num_not_finite == 1


def test_nobody_is_longer_than_the_clip_norm_however_large():
    network = small_unet(norm=None, act="relu")
    patients = [
        [{**patient(number)[0], "image": patient(number)[0]["image"] * 10.0 ** (3 * number)}]
        for number in range(5)
    ]
    for engine in ("loop", "vmap"):
        for one in patients:
            found = clipped_gradient_sum(network, cross_entropy, [one], 0.01, engine)
            assert float(found.gradient.double().norm()) <= 0.01 * (1 + 1.2e-7)


def test_weights_and_gradients_of_the_network_stay():
    network = small_unet()
    before = copy.deepcopy(network.state_dict())
    clipped_gradient_sum(network, cross_entropy, [patient(1), patient(2)], 1.0, "vmap", 2)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_flat_gradient_is_loaded_for_a_step():
    network = small_unet()
    network.get_parameter("model.0.conv.weight").requires_grad_(False)
    one = patient(1)
    load_gradient(network, clipped_gradient_sum(network, cross_entropy, [one], math.inf).gradient)
    wanted = plain_gradient(small_unet(), cross_entropy, one)
    frozen = network.get_parameter("model.0.conv.weight")
    assert frozen.grad is None
    found = torch.cat([parameter.grad.flatten() for parameter in trained_parameters(network)])
    assert difference(found, wanted[frozen.numel() :]) < 1e-6
    with pytest.raises(RuntimeError, match="split"):
        load_gradient(network, found[1:])


def test_what_a_draw_gave_is_never_printed():
    found = clipped_gradient_sum(small_unet(), cross_entropy, [patient(1)], 1.0)
    assert "gradient" not in repr(found) and "norms" not in str(found)


@pytest.mark.parametrize(
    "changes", [{"clip_norm": 0.0}, {"clip_norm": math.nan}, {"chunk": 0}, {"engine": "fast"}]
)
def test_arguments_out_of_range_are_refused(changes):
    arguments = {"clip_norm": 1.0, "engine": "loop", "chunk": 1, **changes}
    with pytest.raises(ValueError, match=next(iter(changes))):
        clipped_gradient_sum(small_unet(), cross_entropy, [patient(1)], **arguments)
    with pytest.raises(ValueError, match="at least one sample"):
        clipped_gradient_sum(small_unet(), cross_entropy, [[]], 1.0)


def test_a_network_that_mixes_patients_gets_no_gradient():
    with pytest.raises(ConfigError, match=r"model.*BatchNorm2d.*mixes"):
        clipped_gradient_sum(small_unet(norm="batch"), cross_entropy, [patient(1)], 1.0)


# Choosing an engine


def test_the_engine_is_chosen_among_those_that_are_right():
    network = small_unet(dropout=0.3)
    before = {name: (value, value.clone()) for name, value in network.state_dict(keep_vars=True).items()}
    dropout = [layer for layer in network.modules() if isinstance(layer, nn.Dropout)]
    choice = choose_engine(network, cross_entropy, [patient(number) for number in range(8)])
    assert set(choice.seconds) == {"loop", "vmap 1", "vmap 2", "vmap 4", "vmap 8"} and not choice.refused
    fastest = min(choice.seconds, key=lambda name: choice.seconds[name])
    assert fastest == (choice.engine if choice.engine == "loop" else f"vmap {choice.chunk}")
    after = network.state_dict(keep_vars=True)
    assert all(after[name] is old and torch.equal(after[name], kept) for name, (old, kept) in before.items())
    assert dropout and all(layer.training for layer in dropout)


def test_what_vmap_cannot_do_goes_to_the_loop_with_a_reason():
    def with_a_question(network: nn.Module, sample: Sample) -> torch.Tensor:
        loss = cross_entropy(network, sample)
        return loss * 2 if loss.item() > 1 else loss

    choice = choose_engine(small_unet(), with_a_question, [patient(number) for number in range(2)])
    assert (choice.engine, choice.chunk, set(choice.seconds)) == ("loop", 1, {"loop"})
    assert "vmap" in choice.refused["vmap"] and "item" in choice.refused["vmap"]


def test_an_engine_that_gives_something_else_is_not_chosen():
    def wrong_under_vmap(network: nn.Module, sample: Sample) -> torch.Tensor:
        loss = cross_entropy(network, sample)
        return loss if isinstance(next(network.parameters()), nn.Parameter) else loss * 1.001

    def random(network: nn.Module, sample: Sample) -> torch.Tensor:
        return cross_entropy(network, sample) * (1 + torch.rand(()))

    for loss in (wrong_under_vmap, random):
        choice = choose_engine(small_unet(), loss, [patient(number) for number in range(2)], (2,))
        assert choice.engine == "loop" and "differs from the loop by" in choice.refused["vmap"]


def test_an_engine_for_samples_that_cannot_be_stacked_is_the_loop():
    patients = [[{**patient(1)[0], "targets": [1, 2]}]]
    choice = choose_engine(small_unet(), cross_entropy, patients)
    assert choice.engine == "loop" and "not tensors of equal shapes" in choice.refused["vmap"]


# Detection


def detection_job(name: str, size: tuple[int, ...]):
    return parse_job(
        {
            "name": "test",
            "rounds": 1,
            "task": {"kind": "detection", "spatial_dims": len(size), "in_channels": 1, "classes": ["a"]},
            "model": {"name": name, "args": {"width": 8, "fpn_channels": 8, "returned_layers": [1, 2]}},
            "training": {"steps": 1, "loss": "detector", "image_size": list(size)},
            "aggregation": {"clip_norm": 1.0},
        },
        "test",
    )


@pytest.mark.parametrize(
    ("name", "size"), [("RetinaNet", (32, 32)), ("RetinaNet", (32, 32, 32)), ("FasterRCNN", (32, 32))]
)
def test_detectors_go_through_the_loop(name, size):
    torch.manual_seed(0)
    job = detection_job(name, size)
    network = detection.build_network(job)
    assert not mixing_layers(network)

    def loss(network: nn.Module, sample: Sample) -> torch.Tensor:
        torch.manual_seed(0)  # Faster R-CNN draws anchors and regions
        return detection.training_loss(network, sample, job, torch.device("cpu"))

    def sample(number: int, boxes: int) -> Sample:
        generator = torch.Generator().manual_seed(number)
        corner = torch.rand(boxes, len(size), generator=generator) * 16
        target = {
            "boxes": torch.cat([corner, corner + 12], 1),
            "labels": torch.ones(boxes, dtype=torch.int64),
        }
        return {"images": torch.rand(1, 1, *size, generator=generator), "targets": [target]}

    patients = [[sample(1, 1), sample(2, 3)], [sample(3, 0)], [sample(4, 2)]]
    parts = [plain_gradient(network, loss, one) for one in patients]
    clip_norm = sorted(float(part.norm()) for part in parts)[1]
    found = clipped_gradient_sum(network, loss, patients, clip_norm)
    wanted = sum(part * min(1.0, clip_norm / float(part.norm())) for part in parts)
    assert difference(found.gradient, wanted) < 1e-5
    if name == "RetinaNet" and len(size) == 2:
        assert choose_engine(network, loss, patients).engine == "loop"


# Networks that mix patients


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.BatchNorm3d(4).eval(),
        nn.BatchNorm2d(4, affine=False, track_running_stats=False),
        nn.SyncBatchNorm(4),
        nn.LazyBatchNorm2d(),
        nn.InstanceNorm2d(4, track_running_stats=True),
    ],
)
def test_layers_that_mix_patients_are_named(layer):
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Sequential(layer))
    assert mixing_layers(network) == ["1.0"]
    with pytest.raises(ConfigError, match=rf"layer 1\.0 \({type(layer).__name__}\) mixes") as caught:
        check_private(network)
    assert "group" in caught.value.hint
    assert mixing_layers(layer) == [""]


def test_a_layer_of_ones_own_with_running_statistics_is_named():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(1))

    assert mixing_layers(nn.Sequential(Own())) == ["0"]
    assert mixing_layers(make_private(nn.Sequential(Own()))[0]) == ["0"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.InstanceNorm2d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm([4, 8, 8]),
        nn.LocalResponseNorm(2),
        nn.Dropout(0.5),
        FrozenBatchNorm2d(4),
    ],
)
def test_layers_that_keep_patients_apart_are_allowed(layer):
    network = nn.Sequential(nn.Conv2d(1, 4, 1), layer)
    check_private(network)
    assert not leaks_between_patients(network, torch.randn(3, 1, 8, 8))


@pytest.mark.parametrize("name", NETWORKS)
def test_no_network_that_is_offered_leaks(name):
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    network = make().train()
    check_private(network)
    assert not leaks_between_patients(network, torch.randn(2, 1, *size))


def test_the_light_backbone_does_not_leak():
    torch.manual_seed(0)
    assert not leaks_between_patients(LightBackbone(2, 1, 8, 8, (1, 2)), torch.randn(2, 1, 32, 32))


class Through(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images):
        return self.function(self, images)


def _remember(module, images):
    module.seen += images.detach().mean()
    return images * 2


@pytest.mark.parametrize(
    "network",
    [
        nn.BatchNorm2d(1),
        nn.BatchNorm2d(1, affine=False),
        nn.BatchNorm2d(1, track_running_stats=False),
        nn.InstanceNorm2d(1, track_running_stats=True),
        Through(lambda _, images: images - images.mean()),
        Through(lambda _, images: images + 1e-6 * images.mean()),
        Through(lambda _, images: {"a": [images, images / images.detach().abs().max()]}),
        Through(_remember),
    ],
)
def test_every_way_of_mixing_is_found(network):
    torch.manual_seed(0)
    before = copy.deepcopy(network.state_dict())
    assert leaks_between_patients(network.train(), torch.randn(3, 1, 8, 8))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_one_image_cannot_leak_into_another():
    with pytest.raises(ValueError, match="at least 2"):
        leaks_between_patients(nn.Identity(), torch.zeros(1, 1, 8, 8))


def test_the_number_of_groups_leaves_two_channels_a_group():
    assert {c: num_groups(c) for c in (1, 2, 3, 4, 6, 8, 12, 16, 20, 32, 48, 7)} == {
        1: 1, 2: 1, 3: 1, 4: 2, 6: 3, 8: 4, 12: 6, 16: 8, 20: 5, 32: 8, 48: 8, 7: 1,
    }  # fmt: skip


def test_a_network_is_made_private():
    network = nn.Sequential(
        nn.Conv2d(1, 12, 3),
        nn.BatchNorm2d(12, eps=1e-3),
        nn.ReLU(inplace=True),
        nn.InstanceNorm2d(12, affine=True, track_running_stats=True),
        nn.Sequential(nn.BatchNorm2d(12, affine=False), nn.LeakyReLU(inplace=True)),
    )
    network.append(network[1])  # the same layer twice
    nn.init.constant_(network[1].weight, 2.0)
    network[1].bias.requires_grad_(False)
    weight = network[1].weight
    same, changes = make_private(network)
    assert same is network and not mixing_layers(network) and network[5] is network[1]
    assert isinstance(network[1], nn.GroupNorm) and network[1].num_groups == 6 and network[1].eps == 1e-3
    assert network[1].weight is weight and not network[1].bias.requires_grad
    assert network[4][0].weight is None
    assert not any(getattr(layer, "inplace", False) for layer in network.modules())
    assert [change.split(":")[0] for change in changes] == ["1", "2", "3", "4.0", "4.1"]
    assert "BatchNorm2d -> GroupNorm(6, 12" in changes[0]
    assert not leaks_between_patients(network, torch.randn(2, 1, 8, 8))
    assert make_private(network)[1] == []
    assert isinstance(make_private(nn.BatchNorm3d(8))[0], nn.GroupNorm)


def test_dropout_is_switched_off_only_inside_the_block():
    network = nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.5).eval())
    with without_dropout(network):
        assert torch.equal(network(torch.ones(1, 4, 4, 4)), torch.ones(1, 4, 4, 4))
    assert [layer.training for layer in network] == [True, False]


def test_dropout_differs_between_patients_and_keeps_them_apart():
    network = small_unet(dropout=0.5)
    one = patient(1)
    found = clipped_gradient_sum(network, cross_entropy, [one, one], math.inf, "vmap", 2)
    assert found.norms[0] != found.norms[1]
