"""Every network by name in 2D and 3D; patches, arguments and the user's own network."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedvision.config import Job, parse_job
from fedvision.errors import ConfigError, ModelError
from fedvision.tasks.networks import NETWORKS, build_network_by_name, resolutions, size_step
from fedvision.tasks.normalisation import has_running_statistics, normalisation_layers

OWN = '''
import threading
import torch
from torch import nn

def convolution(job, width=4, out=None):
    classes = len(job.task.classes) + 1 if out is None else out
    kind = nn.Conv2d if job.task.spatial_dims == 2 else nn.Conv3d
    return nn.Sequential(kind(job.task.in_channels, width, 3, padding=1), kind(width, classes, 1))

class Asking(nn.Module):
    """Looks at values, which a tensor without data does not have."""
    def __init__(self, job):
        super().__init__()
        self.last = nn.Conv2d(job.task.in_channels, len(job.task.classes) + 1, 1)
    def forward(self, x):
        return self.last(x) * (1 if float(x.mean()) >= 0 else 2)

def asking(job):
    return Asking(job)

def smaller(job):
    return nn.Conv2d(job.task.in_channels, len(job.task.classes) + 1, 3)

def holding(job, out=None):
    network = convolution(job, out=out)
    network.lock = threading.Lock()
    return network

def nothing(job):
    return None

def broken(job):
    raise KeyError("width")
'''


def make_job(
    name: str, patch: tuple[int, ...] = (32, 32), args: dict[str, Any] | None = None, classes: int = 2
) -> Job:
    """A segmentation job; the number of axes follows from the patch."""
    return parse_job(
        {
            "name": "test",
            "rounds": 1,
            "task": {
                "kind": "segmentation",
                "spatial_dims": len(patch),
                "in_channels": 2,
                "classes": [f"class{number}" for number in range(classes)],
            },
            "model": {"name": name, "args": args or {}},
            "training": {"steps": 1, "batch_size": 2, "patch_size": list(patch)},
            "aggregation": {"clip_norm": 1.0},
        },
        "test",
    )


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's in the folder where the program was started."""
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)


@pytest.mark.parametrize("dims", (2, 3))
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_builds_without_arguments_and_learns(name: str, dims: int) -> None:
    # SwinUNETR halves the patch five times, BasicUNet four times; instance norm needs more than one voxel.
    patch = {"SwinUNETR": (64, 32, 32), "UNETR": (32, 16, 16), "BasicUNet": (32, 16, 16)}.get(
        name, (16, 16, 16)
    )[:dims]
    job = make_job(name, patch)
    torch.manual_seed(0)
    network = build_network_by_name(job)
    logits = network(torch.randn(1, 2, *patch))
    assert logits.shape == (1, 3, *patch)
    logits.square().mean().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert not any(has_running_statistics(module) for module in network.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_group_norm_needs_no_number_of_groups(name: str) -> None:
    patch = (64, 64) if name == "SwinUNETR" else (32, 32)
    key = "norm" if name in ("UNet", "BasicUNet", "SegResNet", "AttentionUnet") else "norm_name"
    network = build_network_by_name(make_job(name, patch, args={key: "group"}))
    kinds = {type(layer) for _, layer in normalisation_layers(network)}
    assert nn.GroupNorm in kinds
    # AttentionUnet's merging convolution has an instance norm without weights, which nothing can set.
    allowed = {nn.GroupNorm, nn.LayerNorm} | ({nn.InstanceNorm2d} if name == "AttentionUnet" else set())
    assert kinds <= allowed


def test_the_same_seed_gives_the_same_weights_whatever_the_norm() -> None:
    weights = []
    for norm in ("group", ["instance", {"affine": True}]):
        torch.manual_seed(3)
        network = build_network_by_name(make_job("UNet", args={"norm": norm}))
        weights.append(next(p for p in network.parameters() if p.ndim == 4).clone())
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("name", "args", "text", "hint"),
    [
        ("UNet", {"chanels": [8, 16]}, "UNet has no argument `chanels`", "`channels`"),
        ("DynUNet", {"norm": "group"}, "DynUNet has no argument `norm`", "`norm_name`"),
        ("UNet", {"out_channels": 3}, "`out_channels` of UNet is set from task.classes", "leave it out"),
        ("UNETR", {"img_size": [32, 32]}, "`img_size` of UNETR is set from training.patch_size", "leave"),
        ("unet", {}, "no segmentation network 'unet'", "did you mean UNet?"),
        ("SwinUnetr", {}, "no segmentation network 'SwinUnetr'", "did you mean SwinUNETR?"),
        ("ResNet50", {}, "no segmentation network 'ResNet50'", ""),
        ("Quux", {}, "no segmentation network 'Quux'", "there are UNet, BasicUNet"),
        ("SwinUNETR", {"feature_size": 13}, "SwinUNETR cannot be built", ""),
        ("UNet", {"channels": 5}, "UNet cannot be built", ""),
        ("AttentionUnet", {"norm": "layer"}, 'norm must be "instance", "group" or "batch"', ""),
    ],
)
def test_a_wrong_name_or_argument_is_refused(name: str, args: dict[str, Any], text: str, hint: str) -> None:
    with pytest.raises(ModelError) as raised:
        build_network_by_name(make_job(name, args=args))
    assert text in str(raised.value)
    assert hint in raised.value.hint


@pytest.mark.parametrize(
    ("name", "patch", "works"),
    [
        ("UNet", (30, 32), "[32, 32]"),
        ("SegResNet", (20, 24), "[24, 24]"),
        ("DynUNet", (32, 33, 32), "[32, 36, 32]"),
        ("SwinUNETR", (48, 32), "[64, 32]"),
        ("SwinUNETR", (32, 32), "[64, 64]"),
        ("UNETR", (24, 32, 32), "[32, 32, 32]"),
        ("AttentionUnet", (18, 18), "[20, 20]"),
    ],
)
def test_a_patch_that_does_not_fit_is_refused_with_one_that_does(
    name: str, patch: tuple[int, ...], works: str
) -> None:
    with pytest.raises(ModelError) as raised:
        build_network_by_name(make_job(name, patch))
    assert f"training.patch_size = {works} works" in raised.value.hint
    fitting = tuple(int(number) for number in works.strip("[]").split(","))
    build_network_by_name(make_job(name, fitting))


def test_the_multiple_follows_from_the_user_s_strides() -> None:
    args = {"channels": [4, 8, 16, 32, 64, 64]}
    with pytest.raises(ModelError) as raised:
        build_network_by_name(make_job("UNet", (48, 64), args))
    assert "[64, 64] works; multiples of 32 do" in raised.value.hint


def test_dyn_unet_has_no_deep_supervision_unless_asked() -> None:
    image = torch.randn(1, 2, 32, 32)
    assert build_network_by_name(make_job("DynUNet"))(image).shape == (1, 3, 32, 32)
    supervised = build_network_by_name(
        make_job("DynUNet", args={"deep_supervision": True, "deep_supr_num": 1})
    )
    parts = resolutions(supervised(image), 2)
    assert [part.shape for part in parts] == [(1, 3, 32, 32)] * 2
    assert resolutions(supervised.eval()(image), 2)[0].shape == (1, 3, 32, 32)


def test_trying_the_patch_leaves_weights_buffers_and_mode_as_they_were() -> None:
    args = {"norm_name": "batch"}
    torch.manual_seed(1)
    first = build_network_by_name(make_job("DynUNet", args=args))
    size_step(first, make_job("DynUNet", args=args))
    assert first.training
    for name, value in first.state_dict().items():
        assert value.device.type == "cpu"
        if "running_mean" in name:
            assert not value.any()
    torch.manual_seed(1)
    second = build_network_by_name(make_job("DynUNet", args=args))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_size_steps_are_those_of_the_network() -> None:
    jobs = {name: make_job(name, (64, 64) if name == "SwinUNETR" else (32, 32)) for name in NETWORKS}
    steps = {name: size_step(build_network_by_name(job), job) for name, job in jobs.items()}
    assert steps == {
        "UNet": 8,
        "BasicUNet": 1,
        "DynUNet": 8,
        "SegResNet": 8,
        "SwinUNETR": 32,
        "UNETR": None,
        "AttentionUnet": 8,
    }
    network = build_network_by_name(make_job("UNet"))
    with torch.no_grad():
        assert network(torch.zeros(1, 2, 40, 32)).shape == (1, 3, 40, 32)


@pytest.mark.usefixtures("own")
def test_the_user_s_own_network_is_built_with_its_arguments() -> None:
    network = build_network_by_name(make_job("own_networks:convolution", args={"width": 6}))
    assert network[0].out_channels == 6
    assert size_step(network, make_job("own_networks:convolution")) == 1


@pytest.mark.usefixtures("own")
def test_a_network_that_looks_at_values_is_tried_with_zeros() -> None:
    network = build_network_by_name(make_job("own_networks:asking"))
    assert network.training
    assert size_step(network, make_job("own_networks:asking")) is None


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("reference", "args", "error", "text"),
    [
        ("own_networks:convolution", {"out": 5}, ModelError, "gives (1, 5, 32, 32), expected (1, 3, 32, 32)"),
        ("own_networks:smaller", {}, ModelError, "gives (1, 3, 30, 30), expected (1, 3, 32, 32)"),
        ("own_networks:nothing", {}, ModelError, "must return a torch.nn.Module, got NoneType"),
        ("own_networks:broken", {}, ModelError, "own_networks:broken failed: KeyError: 'width'"),
        ("own_networks:convolution", {"depth": 2}, ModelError, "unexpected keyword argument 'depth'"),
        ("own_networks:absent", {}, ConfigError, "absent"),
    ],
)
def test_a_wrong_network_of_the_user_s_is_refused(
    reference: str, args: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as raised:
        build_network_by_name(make_job(reference, args=args))
    assert text in str(raised.value)


@pytest.mark.parametrize("output", ({"out": 1}, [], torch.zeros(2, 3), [torch.zeros(1, 2, 4)]))
def test_an_output_that_is_no_logits_is_refused(output: Any) -> None:
    with pytest.raises(ModelError, match="must return logits of shape"):
        resolutions(output, 2)


@pytest.mark.usefixtures("own")
def test_a_network_that_cannot_be_copied_is_tried_with_zeros() -> None:
    job = make_job("own_networks:holding")
    network = build_network_by_name(job)
    assert size_step(network, job) is None
    with pytest.raises(ModelError, match=r"gives \(1, 4, 32, 32\), expected \(1, 3, 32, 32\)"):
        build_network_by_name(make_job("own_networks:holding", args={"out": 4}))
