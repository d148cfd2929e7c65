"""Dice and surface distances against brute force; sums that pool cases."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedvision.tasks.segmentation_metrics import (
    FIELDS,
    TAIL,
    confusion,
    judge,
    metrics_of,
    size_of_statistics,
    statistics_of,
    surface_distances,
)

Mask = NDArray[np.bool_]


def brute_surface(mask: Mask) -> list[tuple[int, ...]]:
    """List voxels of the mask with a neighbour across a face that is not in it, one by one."""
    found = []
    for voxel in itertools.product(*map(range, mask.shape)):
        if not mask[voxel]:
            continue
        for axis, move in itertools.product(range(mask.ndim), (-1, 1)):
            other = list(voxel)
            other[axis] += move
            is_inside = 0 <= other[axis] < mask.shape[axis]
            if not is_inside or not mask[tuple(other)]:
                found.append(voxel)
                break
    return found


def brute_distances(a: Mask, b: Mask, spacing: tuple[float, ...]) -> list[float]:
    """Distance in mm of each surface voxel of ``a`` to the nearest one of ``b``, over all pairs."""
    other = brute_surface(b)
    return [
        min(math.sqrt(sum((s * (i - j)) ** 2 for i, j, s in zip(x, y, spacing, strict=True))) for y in other)
        for x in brute_surface(a)
    ]


def percentile(values: list[float], percent: float) -> float:
    """Linear interpolation between the ranks."""
    ranked = sorted(values)
    position = percent / 100 * (len(ranked) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (position - low) * (ranked[high] - ranked[low])


def random_masks(seed: int, dims: int) -> tuple[Mask, Mask, tuple[float, ...]]:
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, 9 if dims == 2 else 6, dims))
    masks = [rng.random(shape) < rng.uniform(0.1, 0.9) for _ in range(2)]
    for mask in masks:
        mask[tuple(int(rng.integers(n)) for n in shape)] = True
    return masks[0], masks[1], tuple(float(s) for s in rng.uniform(0.3, 4.0, dims))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), dims=st.sampled_from((2, 3)))
def test_surface_distances_agree_with_brute_force_on_random_masks(seed: int, dims: int) -> None:
    a, b, spacing = random_masks(seed, dims)
    there, back = brute_distances(a, b, spacing), brute_distances(b, a, spacing)
    hd95, asd = surface_distances(a, b, spacing)
    assert hd95 == pytest.approx(max(percentile(there, 95), percentile(back, 95)), abs=1e-9)
    assert asd == pytest.approx(sum(there + back) / len(there + back), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), dims=st.sampled_from((2, 3)), classes=st.integers(1, 4))
def test_dice_agrees_with_brute_force_on_random_label_maps(seed: int, dims: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 7, dims))
    prediction, label = (rng.integers(0, classes + 1, shape).astype(np.uint8) for _ in range(2))
    for value, judged in enumerate(judge(prediction, label, classes, (1.0,) * dims, False), start=1):
        ours = {v for v in np.ndindex(*shape) if prediction[v] == value}
        theirs = {v for v in np.ndindex(*shape) if label[v] == value}
        assert (judged.intersection, judged.predicted, judged.labelled) == (
            len(ours & theirs),
            len(ours),
            len(theirs),
        )
        if ours or theirs:
            assert judged.dice == 2 * len(ours & theirs) / (len(ours) + len(theirs))
        else:
            assert math.isnan(judged.dice)
        assert judged.missed == (bool(ours) != bool(theirs))
        assert math.isnan(judged.hd95_mm)


def test_a_shift_along_a_thick_axis_is_measured_in_mm() -> None:
    a, b = np.zeros((8, 8, 8), bool), np.zeros((8, 8, 8), bool)
    a[2:4, 2:4, 2:4] = True
    b[2:4, 2:4, 3:5] = True
    # Half of each cube's voxels lie in the other, half are one voxel of 5 mm away.
    assert surface_distances(a, b, (1.0, 1.0, 5.0)) == pytest.approx((5.0, 2.5))
    assert surface_distances(a.transpose(2, 0, 1), b.transpose(2, 0, 1), (0.5, 1.0, 1.0)) == pytest.approx(
        (0.5, 0.25)
    )


def test_one_far_voxel_in_a_hundred_does_not_move_hd95_but_moves_asd() -> None:
    a = np.zeros((30, 110), bool)
    a[5, :100] = True
    b = a.copy()
    b[25, 0] = True
    hd95, asd = surface_distances(b, a, (1.0, 1.0))
    assert hd95 == 0.0
    assert asd == pytest.approx(20 / 201)


def test_the_inside_of_a_mask_is_no_surface_and_the_edge_of_the_image_is() -> None:
    full = np.ones((5, 5), bool)
    centre = np.zeros((5, 5), bool)
    centre[2, 2] = True
    # The 16 voxels along the edge are 2, sqrt(5) or sqrt(8) away; the inner ring is no surface.
    there = [2.0] * 4 + [math.sqrt(5)] * 8 + [math.sqrt(8)] * 4
    hd95, asd = surface_distances(full, centre, (1.0, 1.0))
    assert hd95 == pytest.approx(percentile(there, 95))
    assert asd == pytest.approx((sum(there) + 2.0) / 17)


def test_equal_masks_have_dice_1_and_no_distance() -> None:
    label = np.array([[0, 1, 1], [2, 2, 0]], np.uint8)
    for judged in judge(label, label, 2, (1.0, 2.0), True):
        assert (judged.dice, judged.hd95_mm, judged.asd_mm, judged.missed) == (1.0, 0.0, 0.0, False)


def test_surface_distances_agree_with_monai() -> None:
    import torch
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.surface_distance import compute_average_surface_distance

    for seed in range(8):
        a, b, spacing = random_masks(seed, 2 + seed % 2)
        as_tensors = [torch.from_numpy(mask)[None, None] for mask in (a, b)]
        options = {"include_background": True, "spacing": spacing}
        hd95 = compute_hausdorff_distance(*as_tensors, percentile=95, **options)
        asd = compute_average_surface_distance(*as_tensors, symmetric=True, **options)
        assert surface_distances(a, b, spacing) == pytest.approx((float(hd95), float(asd)), rel=1e-5)


def test_confusion_counts_masks_larger_than_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedvision.tasks.segmentation_metrics._CHUNK", 7)
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 3, (6, 11)).astype(np.uint8) for _ in range(2))
    expected = [[int(((a == i) & (b == j)).sum()) for j in range(3)] for i in range(3)]
    assert confusion(a, b, 3).tolist() == expected


CLASSES = ("core", "rim")


def statistics(prediction: list[int], label: list[int], is_final: bool = True) -> NDArray[np.float64]:
    """Statistics of a case of one row of pixels, 2 mm apart along the row."""
    masks = [np.array([row], np.uint8) for row in (prediction, label)]
    return statistics_of(judge(*masks, len(CLASSES), (1.0, 2.0), is_final), is_final)


def test_a_class_absent_in_both_masks_is_not_counted() -> None:
    case = statistics([1, 1, 0], [1, 0, 0])
    metrics = metrics_of(case, CLASSES, True)
    assert metrics["dice/core"] == metrics["dice"] == pytest.approx(2 / 3)
    for name in ("dice/rim", "hd95_mm/rim", "asd_mm/rim", "missed/rim", "voxel_dice/rim"):
        assert math.isnan(metrics[name])
    assert metrics["hd95_mm"] == metrics["hd95_mm/core"]


@pytest.mark.parametrize(("prediction", "label"), [([1, 0], [0, 0]), ([0, 0], [0, 1])])
def test_a_class_in_one_mask_only_has_dice_0_and_is_missed(prediction: list[int], label: list[int]) -> None:
    metrics = metrics_of(statistics(prediction, label), CLASSES, True)
    assert metrics["dice/core"] == 0.0
    assert metrics["missed/core"] == 1.0
    assert math.isnan(metrics["hd95_mm/core"])
    assert math.isnan(metrics["asd_mm/core"])


def test_added_up_statistics_give_means_over_cases() -> None:
    first, second = statistics([1, 1, 0, 0], [0, 1, 1, 0]), statistics([1, 1, 1, 1], [1, 1, 1, 1])
    third = statistics([0, 0, 2, 2], [0, 0, 0, 0])
    metrics = metrics_of(first + second + third, CLASSES, True)
    assert metrics["dice/core"] == pytest.approx((0.5 + 1.0) / 2)
    assert metrics["dice/rim"] == 0.0
    assert metrics["dice"] == pytest.approx(0.375)
    # The first case's masks are two pixels shifted by one of 2 mm; the second's are equal.
    assert metrics["hd95_mm/core"] == pytest.approx((percentile([0, 2], 95) + 0) / 2)
    assert metrics["asd_mm/core"] == pytest.approx((1.0 + 0.0) / 2)
    assert metrics["voxel_dice/core"] == pytest.approx(2 * (1 + 4) / (4 + 8))
    assert metrics["missed/core"] == 0.0
    assert (first + second + third)[-2:].tolist() == [3.0, 3.0]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_order_and_grouping_of_cases_do_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cases = [statistics(*(rng.integers(0, 3, 6).tolist() for _ in range(2))) for _ in range(5)]
    whole = metrics_of(sum(cases), CLASSES, True)
    grouped = metrics_of((cases[3] + cases[1]) + (cases[4] + cases[0] + cases[2]), CLASSES, True)
    assert whole == pytest.approx(grouped, nan_ok=True)
    dices = [metrics_of(case, CLASSES, True)["dice/core"] for case in cases]
    defined = [dice for dice in dices if not math.isnan(dice)]
    assert whole["dice/core"] == pytest.approx(np.mean(defined) if defined else math.nan, nan_ok=True)


def test_validation_gives_dice_only_and_the_final_test_everything() -> None:
    dice_only = {"dice", "dice/core", "dice/rim"}
    assert set(metrics_of(statistics([1], [1], is_final=False), CLASSES, True)) == dice_only
    final = set(metrics_of(statistics([1], [1]), CLASSES, True))
    more = {f"{m}/{c}" for m in ("hd95_mm", "asd_mm", "voxel_dice", "missed") for c in CLASSES}
    assert final == dice_only | more | {"hd95_mm", "asd_mm"}
    without = set(metrics_of(statistics([1], [1]), CLASSES, False))
    assert without == {name for name in final if "_mm" not in name}


def test_no_case_at_all_gives_undefined_metrics() -> None:
    metrics = metrics_of(np.zeros(size_of_statistics(2)), CLASSES, True)
    assert set(metrics) == {"dice", "dice/core", "dice/rim"}
    assert all(math.isnan(value) for value in metrics.values())


def test_statistics_are_finite_and_of_the_promised_length() -> None:
    for masks in (([0, 0], [0, 0]), ([1, 0], [0, 2]), ([1, 2], [1, 2])):
        case = statistics(*masks)
        assert case.shape == (size_of_statistics(2),) == (2 * len(FIELDS) + len(TAIL),)
        assert np.isfinite(case).all()
