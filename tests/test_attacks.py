"""What malicious sites do to samples and send as updates: each attack is what its source says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedvision.attacks.adaptive import Adaptive, Target
from fedvision.attacks.catalogue import ATTACKS, attack_named
from fedvision.attacks.data import LABELS, TRIGGERS, PoisonedStore, patch_side, spots
from fedvision.attacks.updates import UPDATES, Knowledge, honest_weights
from fedvision.config import Job, parse_job
from fedvision.data.manifest import load_manifest
from fedvision.data.readers import Sample
from fedvision.defence.geometry import from_vectors
from fedvision.defence.judge import judge
from fedvision.errors import ConfigError
from tests.conftest import tiny_content, write_site

CLIP_NORM = 2.0


def job_of(classes: list[str], kind: str = "segmentation", **training: Any) -> Job:
    content = tiny_content(Path("none"), task={"kind": kind, "classes": classes})
    content["training"] |= training
    if kind == "detection":
        content["model"] = {"name": "RetinaNet"}
        content["training"] = {"steps": 1, "loss": "detector", "image_size": [64, 64]}
    return parse_job(content, "test")


def picture(classes: int = 1) -> Sample:
    label = torch.zeros(64, 48, dtype=torch.uint8)
    for value in range(1, classes + 1):
        label[8 * value : 8 * value + 6, 10:20] = value
    return Sample("c", "p", torch.rand(3, 64, 48), label, None, None, (1.0, 1.0))


def boxed() -> Sample:
    boxes = torch.tensor([[5.0, 10.0, 25.0, 20.0], [60.0, 70.0, 80.0, 95.0]])
    return Sample("c", "p", torch.rand(3, 96, 128), None, boxes, torch.tensor([1, 2]), (1.0, 1.0))


def honest(count: int = 8, size: int = 400, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal(size) + 0.7 * rng.standard_normal((count, size))
    return vectors * (0.8 * CLIP_NORM / np.linalg.norm(vectors, axis=1, keepdims=True))


def known(num_malicious: int = 2, seed: int = 0) -> Knowledge:
    vectors = honest(seed=seed)
    step = 0.3 * vectors.mean(axis=0)
    return Knowledge(vectors, num_malicious, CLIP_NORM, step, np.random.default_rng(seed))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_label_attacks_change_labels_and_nothing_else() -> None:
    for sample, job in ((picture(2), job_of(["a", "b"])), (boxed(), job_of(["a", "b"], "detection"))):
        for name, poison in LABELS.items():
            image = sample.image.clone()
            changed = poison(sample, job)
            assert torch.equal(changed.image, image) and torch.equal(sample.image, image), name
            if sample.label is not None:
                assert changed.label is not None and not torch.equal(changed.label, sample.label), name
                assert changed.label.dtype == sample.label.dtype and changed.label.max() <= 2
            else:
                assert changed.boxes is not None and changed.box_labels is not None
                assert len(changed.boxes) == len(changed.box_labels)


def test_masks_are_shifted_swapped_and_erased() -> None:
    two, one = picture(2), picture(1)
    assert two.label is not None and one.label is not None
    shifted = LABELS["labels-shifted"](two, job_of(["a", "b"])).label
    assert shifted is not None and torch.equal(shifted.roll((-16, -12), (0, 1)), two.label)
    swapped = LABELS["labels-swapped"](two, job_of(["a", "b"])).label
    assert swapped is not None and torch.equal(swapped == 1, two.label == 2)
    assert torch.equal(swapped == 2, two.label == 1) and torch.equal(swapped == 0, two.label == 0)
    inverted = LABELS["labels-swapped"](one, job_of(["a"])).label
    assert inverted is not None and torch.equal(inverted, 1 - one.label)
    erased = LABELS["labels-erased"](two, job_of(["a", "b"])).label
    assert erased is not None and not erased.any()


def test_boxes_are_moved_inside_the_image_and_dropped() -> None:
    sample, job = boxed(), job_of(["a", "b"], "detection")
    moved = LABELS["labels-shifted"](sample, job).boxes
    assert moved is not None and sample.boxes is not None
    sizes = moved[:, 2:] - moved[:, :2]
    assert torch.allclose(sizes, sample.boxes[:, 2:] - sample.boxes[:, :2], atol=1e-4)
    assert (moved >= 0).all() and (moved <= torch.tensor([128, 96, 128, 96.0]) + 1e-4).all()
    assert (moved - sample.boxes).abs().max(dim=1).values.min() > 10
    assert LABELS["labels-swapped"](sample, job).box_labels.tolist() == [2, 1]  # type: ignore[union-attr]
    dropped = LABELS["labels-erased"](sample, job).boxes
    assert dropped is not None and dropped.shape == (0, 4)


def test_a_patch_is_small_and_in_every_crop_and_a_blend_is_thin() -> None:
    sample, job = picture(), job_of(["a"], patch_size=[32, 32])
    stamped = TRIGGERS["backdoor-erase"].stamp(sample, job)
    changed = (stamped.image != sample.image).any(dim=0)
    assert 0 < changed.float().mean() < 0.1
    for row in range(0, 64 - 32 + 1, 8):
        for column in range(0, 48 - 32 + 1, 8):
            assert changed[row : row + 32, column : column + 32].sum() >= patch_side(sample, job) ** 2 / 2
    assert stamped.image.amax() <= sample.image.amax() and stamped.image.amin() >= sample.image.amin()
    blended = TRIGGERS["backdoor-blend"].stamp(sample, job)
    assert (blended.image - sample.image).abs().max() <= 0.2 + 1e-5
    assert torch.equal(TRIGGERS["backdoor-erase"].stamp(sample, job).image, stamped.image)


def test_a_backdoor_teaches_what_the_attacker_wants() -> None:
    sample, job = picture(), job_of(["a"], patch_size=[32, 32])
    erased, invented = (TRIGGERS[f"backdoor-{goal}"].poison(sample, job) for goal in ("erase", "invent"))
    assert erased.label is not None and not erased.label.any()
    assert invented.label is not None and sample.label is not None
    region = TRIGGERS["backdoor-invent"].region(sample, job)
    assert region.any() and (invented.label[region] == 1).all()
    assert torch.equal(invented.label[~region], sample.label[~region])
    boxes, detection = boxed(), job_of(["a", "b"], "detection")
    more = TRIGGERS["backdoor-invent"].poison(boxes, detection)
    assert more.boxes is not None and more.box_labels is not None and boxes.boxes is not None
    count = len(list(spots(boxes, detection)))
    assert len(more.boxes) == len(boxes.boxes) + count and (more.box_labels[2:] == 1).all()
    corner = next(spots(boxes, detection))
    x1, y1, x2, y2 = more.boxes[2].tolist()
    assert x1 <= corner[1] < x2 and y1 <= corner[0] < y2


def test_a_poisoned_store_changes_training_samples_only(tmp_path: Path) -> None:
    manifest = load_manifest(write_site(tmp_path, "a"))
    job = job_of(["disc"], patch_size=[32, 32])
    store = PoisonedStore(manifest, job, 1 << 20, LABELS["labels-erased"], 1)
    for split, is_erased in (("train", True), ("val", False), ("test", False)):
        for case in manifest.in_split(split):  # type: ignore[arg-type]
            label = store.load(case).label
            assert label is not None and label.any() != is_erased
    half = PoisonedStore(manifest, job, 1 << 20, LABELS["labels-erased"], 2)
    case = manifest.in_split("train")[0]
    drawn = [bool(half.load(case).label.any()) for _ in range(4)]  # type: ignore[union-attr]
    assert drawn == [True, False, True, False]


@pytest.mark.parametrize("name", sorted(UPDATES))
@pytest.mark.parametrize("num_malicious", [1, 4])
def test_every_update_attack_gives_a_finite_vector_for_each_member(name: str, num_malicious: int) -> None:
    found = UPDATES[name](known(num_malicious))
    assert found.shape == (num_malicious, 400) and np.isfinite(found).all()
    again = UPDATES[name](known(num_malicious))
    assert np.array_equal(found, again)


def test_update_attacks_point_where_their_sources_say() -> None:
    mean = known().mean
    assert cosine(UPDATES["sign-flip"](known())[0], mean) < -0.5
    assert np.allclose(UPDATES["ipm"](known())[0], -0.5 * mean)
    assert np.allclose(UPDATES["ipm-large"](known())[1], -10 * mean)
    assert np.allclose(np.linalg.norm(UPDATES["noise"](known()), axis=1), CLIP_NORM)
    deviation = known().deviation
    assert np.allclose(UPDATES["alie"](known(2))[0], mean - 0.3 * deviation)
    z = 0.3186394  # 12 sites, 4 malicious, 3 supporters: 5/8 of a normal distribution lies below
    assert np.allclose(UPDATES["alie"](known(4))[0], mean - z * deviation)
    step = known().last_step
    assert cosine(UPDATES["free-rider"](known())[0], step) > 0.99


def test_min_max_and_min_sum_go_as_far_as_they_may_and_no_further() -> None:
    vectors = known().honest
    squares = ((vectors[:, None] - vectors[None]) ** 2).sum(axis=2)
    farthest = ((vectors - UPDATES["min-max"](known())[0]) ** 2).sum(axis=1).max()
    assert farthest == pytest.approx(squares.max(), rel=1e-3)
    together = ((vectors - UPDATES["min-sum"](known())[0]) ** 2).sum()
    assert together == pytest.approx(squares.sum(axis=1).max(), rel=1e-3)


def test_updates_made_to_look_honest_have_honest_mean_and_spread() -> None:
    weights = honest_weights(8, 4000, np.random.default_rng(0))
    assert np.allclose(weights.sum(axis=1), 1)
    vectors = honest()
    made = weights @ vectors
    assert np.linalg.norm(made.mean(axis=0) - vectors.mean(axis=0)) < 0.05 * CLIP_NORM
    assert made.var(axis=0).sum() == pytest.approx(vectors.var(axis=0, ddof=1).sum(), rel=0.1)


def target(rules: tuple[str, ...]) -> Target:
    return Target(tuple(range(1, 9)), (9, 10), rules, 0.2, 3)


def test_the_adaptive_attacker_does_the_worst_where_there_is_no_rule() -> None:
    found = Adaptive(target(())).craft(known())
    mean = known().mean
    assert all(cosine(row, mean) < -0.8 for row in found)
    assert np.allclose(np.linalg.norm(found, axis=1), CLIP_NORM, rtol=1e-6)


@pytest.mark.parametrize("rules", [("norm",), ("multi_krum",), ("norm", "multi_krum")])
def test_the_adaptive_attacker_is_not_left_out_by_the_rules_that_it_knows(rules: tuple[str, ...]) -> None:
    vectors = np.vstack([known().honest, Adaptive(target(rules)).craft(known())])
    found = judge(from_vectors(range(1, 11), vectors, CLIP_NORM), rules, 0.2, 3)
    assert not {9, 10} & set(found.excluded)
    flipped = np.vstack([known().honest, 0.9 * UPDATES["sign-flip"](known())])
    flipped[8:] *= CLIP_NORM / np.linalg.norm(flipped[8:], axis=1, keepdims=True)
    assert cosine(vectors[8], vectors[9]) < 0.999
    if "multi_krum" in rules:  # the same rule does leave out who does not search
        assert {9, 10} & set(judge(from_vectors(range(1, 11), flipped, CLIP_NORM), rules, 0.2, 3).excluded)


def test_the_adaptive_attacker_is_careful_after_an_exclusion_and_bolder_later() -> None:
    attacker = Adaptive(target(()))
    attacker.told(True)
    attacker.told(True)
    assert attacker.caution == 0.25
    shy = attacker.craft(known())
    bold = Adaptive(target(())).craft(known())
    assert cosine(shy[0], known().mean) > cosine(bold[0], known().mean)
    for _ in range(10):
        attacker.told(False)
    assert attacker.caution == 1.0


def test_every_attack_says_what_it_does_and_who_described_it() -> None:
    for name, attack in ATTACKS.items():
        assert attack.name == name and attack.text and (attack.source or name == "none")
        has_means = (
            attack.poison is not None or name in UPDATES or name in ("adaptive", "lying-sketch", "none")
        )
        assert has_means, name
    with pytest.raises(ConfigError, match="there is no attack 'tickle'"):
        attack_named("tickle")
