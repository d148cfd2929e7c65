"""AP and FROC from sums, against an exact implementation that shares no code with them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvision.tasks.detection_metrics import (
    FALSE_POSITIVE_RATES,
    NUM_BINS,
    Detections,
    JudgedCase,
    bins_of,
    box_iou,
    judge_case,
    match,
    metrics_from_sums,
    size_of_sums,
)

CLASSES = ("nodule", "cyst")
# Scores so far apart that no two share a bin: then the histograms lose nothing.
SPREAD = [round(0.02 + 0.03 * i, 2) for i in range(32)]


def detections(*rows):
    """Rows of (box, label, score), best first."""
    dims = len(rows[0][0]) if rows else 4
    return Detections(
        np.array([row[0] for row in rows], dtype=np.float32).reshape(-1, dims),
        np.array([row[1] for row in rows], dtype=np.int64),
        np.array([row[2] for row in rows], dtype=np.float32),
    )


def judge(found, objects, classes=CLASSES) -> JudgedCase:
    boxes = np.array([box for box, _ in objects], dtype=np.float32).reshape(-1, 4)
    return judge_case(
        detections(*found), boxes, np.array([label for _, label in objects], dtype=np.int64), classes
    )


def metrics_of(images, classes=CLASSES):
    """Images are (found, objects)."""
    return metrics_from_sums(sum(judge(found, objects, classes).sums for found, objects in images), classes)


def exact_ap(images, label, threshold):
    """COCO's definition, image by image and detection by detection."""
    records, num_objects = [], 0
    for number, (found, objects) in enumerate(images):
        free = [box for box, kind in objects if kind == label]
        num_objects += len(free)
        for place, (box, kind, score) in enumerate(sorted(found, key=lambda row: -row[2])):
            if kind != label:
                continue
            overlaps = [plain_iou(box, other) for other in free]
            is_hit = bool(overlaps) and max(overlaps) >= threshold
            if is_hit:
                free.pop(overlaps.index(max(overlaps)))
            records.append((score, number, place, is_hit))
    if num_objects == 0:
        return math.nan
    records.sort(key=lambda record: (-record[0], record[1], record[2]))
    points, hits = [], 0
    for count, (_, _, _, is_hit) in enumerate(records, start=1):
        hits += is_hit
        points.append((hits, hits / count))
    total = 0.0
    for percent in range(101):
        total += max((p for h, p in points if 100 * h >= percent * num_objects), default=0.0)
    return total / 101


def plain_iou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    common = width * height
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    return common / (area_a + area_b - common)


@st.composite
def image_sets(draw):
    """Some images with boxes on a coarse grid, so that they overlap often; every score occurs once."""
    scores = draw(st.permutations(SPREAD))
    used = 0
    images = []
    for _ in range(draw(st.integers(1, 4))):
        corner, side, label = st.integers(0, 6), st.integers(2, 5), st.integers(1, 2)

        def boxes(number, corner=corner, side=side, label=label):
            rows = draw(st.lists(st.tuples(corner, corner, side, side, label), max_size=number))
            return [((x, y, x + w, y + h), kind) for x, y, w, h, kind in rows]

        objects = boxes(5)
        found = [(box, kind, scores[used + i]) for i, (box, kind) in enumerate(boxes(7))]
        used += len(found)
        images.append((sorted(found, key=lambda row: -row[2]), objects))
    return images


@given(image_sets())
@settings(max_examples=150, deadline=None)
def test_with_one_detection_a_bin_ap_is_exactly_that_of_the_whole_list(images):
    result = metrics_of(images)
    for label, name in enumerate(CLASSES, start=1):
        exact = [exact_ap(images, label, t / 100) for t in range(50, 100, 5)]
        assert result[f"ap50/{name}"] == pytest.approx(exact[0], abs=1e-9, nan_ok=True)
        assert result[f"map/{name}"] == pytest.approx(np.mean(exact), abs=1e-9, nan_ok=True)


@given(image_sets(), st.randoms())
@settings(max_examples=50, deadline=None)
def test_the_order_of_cases_and_their_division_into_sites_do_not_matter(images, random):
    shuffled = images[:]
    random.shuffle(shuffled)
    cut = random.randint(0, len(images))
    vectors = [judge(found, objects).sums for found, objects in shuffled]
    zero = np.zeros(size_of_sums(2))
    pooled = sum(vectors[:cut], zero) + sum(vectors[cut:], zero)
    together = metrics_of(images)
    for name, value in metrics_from_sums(pooled, CLASSES).items():
        assert value == pytest.approx(together[name], abs=0, nan_ok=True)


@given(image_sets())
@settings(max_examples=50, deadline=None)
def test_every_metric_is_a_share_and_cases_that_count_twice_change_nothing(images):
    once = metrics_of(images)
    assert all(math.isnan(value) or 0 <= value <= 1 + 1e-12 for value in once.values())
    # As in a bootstrap resample, whose counts multiply the vectors; bins then hold several detections.
    twice = metrics_of(images + images)
    assert twice["froc"] == pytest.approx(once["froc"], abs=1e-9, nan_ok=True)


def test_a_perfect_detector_has_ap_one_and_a_blind_one_zero():
    box = (0, 0, 10, 10)
    perfect = metrics_of([([(box, 1, 0.9)], [(box, 1)])], ("nodule",))
    assert perfect["map"] == perfect["ap50"] == perfect["froc"] == 1
    blind = metrics_of([([], [(box, 1)])], ("nodule",))
    assert blind["map"] == blind["ap50"] == blind["froc"] == 0


def test_a_false_positive_above_the_only_hit_halves_ap():
    box, elsewhere = (0, 0, 10, 10), (50, 50, 60, 60)
    assert metrics_of([([(elsewhere, 1, 0.9), (box, 1, 0.5)], [(box, 1)])], ("nodule",))["ap50"] == 0.5


def test_a_hit_and_a_false_positive_of_one_score_count_as_evenly_mixed():
    box, elsewhere = (0, 0, 10, 10), (50, 50, 60, 60)
    found = [(box, 1, 0.5), (elsewhere, 1, 0.5)]
    # Half a false positive is expected before the hit: the precision there is 1 / 1.5.
    assert metrics_of([(found, [(box, 1)])], ("nodule",))["ap50"] == pytest.approx(2 / 3)


def test_one_of_two_objects_found_gives_51_of_101_recall_points():
    box, other = (0, 0, 10, 10), (50, 50, 60, 60)
    assert metrics_of([([(box, 1, 0.9)], [(box, 1), (other, 1)])], ("nodule",))["ap50"] == pytest.approx(
        51 / 101
    )


def test_a_box_with_iou_0_6_counts_at_three_of_ten_thresholds():
    found = [((0, 0, 10, 6), 1, 0.9)]
    assert metrics_of([(found, [((0, 0, 10, 10), 1)])], ("nodule",))["map"] == pytest.approx(0.3)


def test_a_second_box_on_the_same_object_is_a_false_positive():
    found = np.array([[0, 0, 10, 10], [0, 0, 10, 9]], dtype=float)
    assert match(found, np.array([[0, 0, 10, 10]], dtype=float))[0].tolist() == [True, False]


def test_a_detection_takes_the_free_object_of_largest_overlap():
    objects = np.array([[0, 0, 10, 8], [0, 0, 10, 10]], dtype=float)
    found = np.array([[0, 0, 10, 10], [0, 0, 10, 10]], dtype=float)
    hits = match(found, objects)
    assert hits[0].tolist() == [True, True]
    assert hits[-1].tolist() == [True, False]


def test_a_detection_of_the_wrong_class_is_no_hit():
    box = (0, 0, 10, 10)
    result = metrics_of([([(box, 2, 0.9)], [(box, 1), ((20, 20, 30, 30), 2)])])
    assert result["ap50/nodule"] == 0
    assert result["ap50/cyst"] == 0


def test_a_class_without_objects_is_undefined_and_left_out_of_the_mean():
    box = (0, 0, 10, 10)
    result = metrics_of([([(box, 1, 0.9), (box, 2, 0.8)], [(box, 1)])])
    assert (
        math.isnan(result["ap50/cyst"]) and math.isnan(result["map/cyst"]) and math.isnan(result["froc/cyst"])
    )
    assert result["ap50"] == 1


def test_without_any_object_or_case_every_metric_is_undefined():
    for sums in (judge([((0, 0, 5, 5), 1, 0.9)], []).sums, np.zeros(size_of_sums(2))):
        assert all(math.isnan(value) for value in metrics_from_sums(sums, CLASSES).values())


def test_froc_by_hand():
    box, elsewhere = (0, 0, 10, 10), (50, 50, 60, 60)
    # Four images, one object each. In order of score: hit, false, hit, false, hit; the fourth is missed.
    images = [
        ([(box, 1, 0.95), (elsewhere, 1, 0.85)], [(box, 1)]),
        ([(box, 1, 0.75), (elsewhere, 1, 0.65)], [(box, 1)]),
        ([(box, 1, 0.55)], [(box, 1)]),
        ([], [(box, 1)]),
    ]
    result = metrics_of(images, ("nodule",))
    # The first false positive is 1/4 an image: at 1/8 one object is found, from 1/4 to below 1/2 two.
    expected = {"0.125": 0.25, "0.25": 0.5, "0.5": 0.75, "1": 0.75, "2": 0.75, "4": 0.75, "8": 0.75}
    for rate, value in expected.items():
        assert result[f"sensitivity@{rate}fp"] == pytest.approx(value)
    assert result["froc"] == pytest.approx(np.mean(list(expected.values())))
    assert len(expected) == len(FALSE_POSITIVE_RATES)


def test_images_without_objects_lower_the_rate_of_false_positives():
    box, elsewhere = (0, 0, 10, 10), (50, 50, 60, 60)
    busy = ([(elsewhere, 1, 0.9), (box, 1, 0.8)], [(box, 1)])
    assert metrics_of([busy], ("nodule",))["sensitivity@0.125fp"] == 0
    assert metrics_of([busy] + [([], [])] * 7, ("nodule",))["sensitivity@0.125fp"] == 1


def simulated(kind, rng, num_objects):
    """Scores and whether each is a hit, as different kinds of detector give them."""
    num_hits, num_false = int(0.85 * num_objects), 3 * num_objects
    if kind == "focal":
        scores = np.concatenate([rng.beta(5, 3, num_hits), 0.05 + 0.95 * rng.beta(0.7, 6, num_false)])
    elif kind == "softmax":
        logits = np.concatenate([rng.normal(5, 2.5, num_hits), rng.normal(-1.5, 2.5, num_false)])
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = rng.random(num_hits + num_false)
    return scores.astype(np.float32), np.arange(len(scores)) < num_hits


@pytest.mark.parametrize("kind", ["focal", "softmax", "random"])
def test_bins_change_ap_by_less_than_0_002_on_average(kind):
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(10):
        scores, is_hit = simulated(kind, rng, 200)
        # An image for each object; a false positive lies far from it.
        box, elsewhere = (0, 0, 10, 10), (50, 50, 60, 60)
        images = [([], [(box, 1)]) for _ in range(200)]
        for index in np.argsort(-scores, kind="stable"):
            number = index if is_hit[index] else int(rng.integers(200))
            images[number][0].append((box if is_hit[index] else elsewhere, 1, scores[index]))
        errors.append(abs(metrics_of(images, ("nodule",))["ap50"] - exact_ap(images, 1, 0.5)))
    assert np.mean(errors) < 0.002
    assert np.max(errors) < 0.01


@given(st.lists(st.floats(0, 1, width=32), min_size=1))
def test_a_higher_score_is_never_in_a_later_bin(scores):
    ordered = np.sort(np.array(scores, dtype=np.float32))[::-1]
    bins = bins_of(ordered)
    assert (np.diff(bins) >= 0).all()
    assert bins.min() >= 0 and bins.max() < NUM_BINS


def test_the_spread_scores_of_these_tests_have_bins_of_their_own():
    assert len(set(bins_of(np.array(SPREAD, dtype=np.float32)))) == len(SPREAD)


def test_boxes_of_volumes_are_compared_by_volume():
    first = np.array([[0, 0, 0, 2, 2, 2]], dtype=float)
    second = np.array([[0, 0, 1, 2, 2, 3], [5, 5, 5, 6, 6, 6]], dtype=float)
    assert box_iou(first, second).tolist() == [[pytest.approx(1 / 3), 0.0]]


def test_the_score_of_a_case_is_f1_of_confident_boxes():
    box, other, elsewhere = (0, 0, 10, 10), (20, 20, 30, 30), (50, 50, 60, 60)
    judged = judge([(box, 1, 0.9), (elsewhere, 1, 0.5), (other, 2, 0.1)], [(box, 1), (other, 2)])
    assert judged.values["f1"] == pytest.approx(2 / 4)
    assert (judged.values["hits"], judged.values["false_positives"], judged.values["misses"]) == (1, 1, 1)
    assert judged.values["misses/cyst"] == 1
    assert judge([], []).values["f1"] == 1
    assert judge([(elsewhere, 1, 0.9)], []).values["f1"] == 0


def test_three_classes_need_fewer_than_ten_thousand_numbers():
    assert size_of_sums(3) < 10_000
