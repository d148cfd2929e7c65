import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from fedvision.errors import MessageError, ModelError
from fedvision.updates.clipping import clip_l2, l2_norm
from fedvision.updates.fixed_point import WeightedSum
from fedvision.updates.layout import flatten, float_tensors, layout_of, load_vector

finite = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


class Shared(nn.Module):
    """A network with a shared weight, an integer buffer and batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("index", torch.arange(4))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def test_the_vector_holds_every_float_weight_once_and_no_integer() -> None:
    layout = layout_of(Shared())
    assert list(layout.shapes) == [
        "again.bias",
        "again.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.weight",
    ]
    assert layout.size == 3 + 9 + 4 * 3


def test_loading_what_was_flattened_restores_every_weight() -> None:
    source, target = Shared(), Shared()
    with torch.no_grad():
        for tensor in float_tensors(source).values():
            tensor.normal_()
    layout = layout_of(source)
    load_vector(target, layout, flatten(source, layout))
    for name, tensor in float_tensors(source).items():
        assert torch.equal(tensor, float_tensors(target)[name]), name


def test_local_names_are_left_out_and_change_the_digest() -> None:
    network = Shared()
    whole, partial = layout_of(network), layout_of(network, {"norm.weight"})
    assert "norm.weight" not in partial.shapes
    assert whole.digest != partial.digest
    with pytest.raises(ModelError):
        layout_of(network, set(whole.shapes))


def test_a_vector_of_another_length_or_type_is_refused() -> None:
    network = Shared()
    layout = layout_of(network)
    for wrong in (
        np.zeros(layout.size + 1, np.float32),
        np.zeros(layout.size),
        np.zeros((1, layout.size), np.float32),
    ):
        with pytest.raises(MessageError):
            load_vector(network, layout, wrong)


@given(arrays(np.float32, st.integers(1, 50), elements=finite), st.floats(1e-6, 1e6))
def test_a_clipped_update_never_exceeds_the_clip_norm(update: np.ndarray, clip_norm: float) -> None:
    clipped, norm = clip_l2(update, clip_norm)
    assert l2_norm(clipped) <= clip_norm
    assert norm == pytest.approx(np.linalg.norm(update.astype(np.float64)))
    if norm <= clip_norm:
        assert clipped is update


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_becomes_zero(bad: float) -> None:
    clipped, norm = clip_l2(np.array([1, bad, 2], np.float32), 1.0)
    assert not clipped.any()
    assert norm == np.inf


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clip_norm_that_bounds_nothing_is_an_error(clip_norm: float) -> None:
    with pytest.raises(ValueError, match="clip_norm"):
        clip_l2(np.ones(2, np.float32), clip_norm)


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**32 - 1), st.randoms())
def test_the_mean_does_not_depend_on_the_order_of_the_sites(sites, size, seed, shuffler) -> None:
    rng = np.random.default_rng(seed)
    clip_norm = 3.0
    parts = [
        (clip_l2(rng.normal(size=size).astype(np.float32), clip_norm)[0], int(rng.integers(1, 500)))
        for _ in range(sites)
    ]
    forward, shuffled = WeightedSum(size, clip_norm), WeightedSum(size, clip_norm)
    for update, weight in parts:
        forward.add(update, weight)
    shuffler.shuffle(parts)
    for update, weight in parts:
        shuffled.add(update, weight)
    assert np.array_equal(forward.mean(), shuffled.mean())
    expected = np.average([u.astype(np.float64) for u, _ in parts], axis=0, weights=[w for _, w in parts])
    assert np.allclose(forward.mean(), expected, rtol=0, atol=clip_norm * 2**-31)


def test_a_sum_of_extreme_updates_does_not_wrap() -> None:
    total = WeightedSum(1, 5.0)
    half = 2**30
    total.add(np.array([5.0], np.float32), half)
    total.add(np.array([5.0], np.float32), half)
    assert total.mean() == pytest.approx(5.0)
    with pytest.raises(ValueError, match="total"):
        total.add(np.array([5.0], np.float32), 1)


def test_a_sum_of_nothing_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no update"):
        WeightedSum(3, 1.0).mean()
