"""Batch statistics are refused; FedBN's names are those of the normalisation layers."""

from typing import Any

import pytest
import torch
from torch import nn

from fedvision.config import Job, parse_job
from fedvision.errors import ModelError
from fedvision.tasks import initial_network
from fedvision.tasks import local_names as names_for_job
from fedvision.tasks.networks import NETWORKS
from fedvision.tasks.normalisation import check_normalisation, local_names
from fedvision.updates.layout import float_tensors, layout_of


def make_job(name: str = "UNet", is_local: bool = False, args: dict[str, Any] | None = None) -> Job:
    return parse_job(
        {
            "name": "test",
            "rounds": 1,
            "task": {"kind": "segmentation", "classes": ["a"]},
            "model": {"name": name, "args": args or {}, "local_normalisation": is_local},
            "training": {"steps": 1, "patch_size": [64, 64]},
            "aggregation": {"clip_norm": 1.0},
        },
        "test",
    )


class OwnBatchNorm(nn.Module):
    """A batch norm that is none of torch's classes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("running_mean", torch.zeros(3))


class FrozenBatchNorm2d(nn.Module):
    """Constant statistics, as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(3),
        nn.BatchNorm2d(3),
        nn.BatchNorm3d(3),
        nn.SyncBatchNorm(3),
        nn.InstanceNorm2d(3, track_running_stats=True),
        OwnBatchNorm(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_running_statistics_are_refused_by_the_name_of_the_layer(layer: nn.Module) -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Sequential(nn.ReLU(), layer))
    with pytest.raises(ModelError) as raised:
        check_normalisation(network, make_job())
    assert f"layer 1.1 ({type(layer).__name__}) has running statistics" in str(raised.value)
    assert "local_normalisation = true" in raised.value.hint
    assert '"instance"' in raised.value.hint
    check_normalisation(network, make_job(is_local=True))


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.InstanceNorm2d(3, affine=True),
        nn.GroupNorm(1, 3),
        nn.LayerNorm(3),
        FrozenBatchNorm2d(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_without_running_statistics_may_be_shared(layer: nn.Module) -> None:
    check_normalisation(nn.Sequential(nn.Conv2d(1, 3, 1), layer), make_job())


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("UNet", {"norm": "batch"}),
        ("BasicUNet", {"norm": "batch"}),
        ("DynUNet", {"norm_name": "batch"}),
        ("SegResNet", {"norm": "batch"}),
        ("SwinUNETR", {"norm_name": "batch"}),
        ("UNETR", {"norm_name": "batch"}),
        ("AttentionUnet", {"norm": "batch"}),
    ],
)
def test_batch_norm_in_any_network_is_refused_or_stays_local(name: str, args: dict[str, Any]) -> None:
    job = make_job(name, args=args)
    with pytest.raises(ModelError, match="has running statistics"):
        names_for_job(initial_network(job), job)
    job = make_job(name, is_local=True, args=args)
    network = initial_network(job)
    shared = layout_of(network, names_for_job(network, job)).shapes
    assert shared
    assert not any("running" in key for key in shared)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_default_network_is_refused(name: str) -> None:
    job = make_job(name)
    assert names_for_job(initial_network(job), job) == frozenset()
    local = names_for_job(initial_network(job), make_job(name, is_local=True))
    assert local
    assert local <= set(initial_network(job).state_dict())


def test_local_names_are_the_weights_and_float_buffers_of_normalisation_layers() -> None:
    network = nn.ModuleDict(
        {
            "conv": nn.Conv2d(1, 4, 1),
            "batch": nn.BatchNorm2d(4),
            "group": nn.GroupNorm(2, 4),
            "layer": nn.LayerNorm(4),
            "instance": nn.InstanceNorm2d(4, affine=True),
            "plain": nn.InstanceNorm2d(4),
            "own": OwnBatchNorm(),
        }
    )
    assert local_names(network) == {
        "batch.weight", "batch.bias", "batch.running_mean", "batch.running_var",
        "group.weight", "group.bias", "layer.weight", "layer.bias", "instance.weight", "instance.bias",
        "own.weight", "own.running_mean",
    }  # fmt: skip


def test_a_layer_under_two_names_is_local_under_both() -> None:
    # DynUNet registers its blocks twice; the layout takes the first name, so both must be known.
    network = initial_network(make_job("DynUNet"))
    local = local_names(network)
    assert {"input_block.norm1.weight", "skip_layers.downsample.norm1.weight"} <= local
    shared = layout_of(network, local).shapes
    norm_weights = {
        id(p) for m in network.modules() if isinstance(m, nn.InstanceNorm2d) for p in m.parameters()
    }
    tensors = dict(network.named_parameters(remove_duplicate=False))
    assert norm_weights
    assert not norm_weights & {id(tensors[name]) for name in shared}
    assert set(shared) | (local & set(float_tensors(network))) == set(float_tensors(network))


def test_a_network_that_is_one_layer_has_names_without_a_dot() -> None:
    assert local_names(nn.LayerNorm(3)) == {"weight", "bias"}


def test_fedbn_without_normalisation_weights_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 1), nn.InstanceNorm2d(3))
    with pytest.raises(ModelError, match="has no normalisation weights") as raised:
        check_normalisation(network, make_job(is_local=True))
    assert "affine" in raised.value.hint
