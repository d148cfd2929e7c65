from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvision.defence.geometry import Geometry, from_gram, from_sketches, from_vectors
from fedvision.defence.rules import (
    RULES,
    classic_weights,
    default_rules,
    distances_to,
    geometric_median_weights,
    krum_scores,
    least_sites,
    num_attackers,
)
from fedvision.errors import DefenceError
from tests.test_defence_geometry import CLIP_NORM, SIZE, sketched, updates

ROOTLESS = [name for name in RULES if name != "root_cosine"]
Attack = Callable[[np.ndarray], np.ndarray]


def kinds(seed: int = 0) -> np.ndarray:
    """Ten honest updates as on real images: eight of three related kinds, two of a kind of their own."""
    rng = np.random.default_rng(seed)
    common, related, rare = rng.normal(size=SIZE), rng.normal(size=(3, SIZE)), rng.normal(size=SIZE)
    made = [0.7 * common + related[kind] + rng.normal(size=SIZE) for kind in (0, 0, 0, 1, 1, 1, 2, 2)]
    made += [1.7 * (rare - 0.3 * common + 0.6 * rng.normal(size=SIZE)) for _ in range(2)]
    vectors = np.stack(made)
    return (0.5 * CLIP_NORM * vectors / np.median(np.linalg.norm(vectors, axis=1))).astype(np.float32)


def geometry(vectors: np.ndarray, root: np.ndarray | None = None) -> Geometry:
    return from_vectors(range(1, len(vectors) + 1), vectors, CLIP_NORM, root)


def outside(rule: str, of: Geometry, max_malicious: float = 0.2) -> list[int]:
    found = RULES[rule](of, max_malicious)
    assert (found.outside == (found.scores > found.limit)).all()
    return [site for site, is_out in zip(of.sites, found.outside, strict=True) if is_out]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rule", ["norm", "clones", "opposition", "spectral"])
def test_honest_sites_of_a_rare_kind_are_inside(rule: str, seed: int) -> None:
    vectors = kinds(seed)
    assert outside(rule, geometry(vectors)) == []
    assert outside(rule, geometry(np.delete(vectors, 9, axis=0))) == []  # the only one of its kind
    assert outside(rule, from_sketches(range(1, 11), sketched(vectors, seed)[0], 0.25)) == []


@pytest.mark.parametrize("shared", [0.0, 0.1, 20.0])
@pytest.mark.parametrize("rule", ["norm", "clones", "opposition", "spectral"])
def test_updates_that_are_nearly_orthogonal_or_nearly_parallel_are_inside(rule: str, shared: float) -> None:
    vectors = updates(10, 3, shared)
    assert outside(rule, geometry(vectors)) == []
    assert outside(rule, from_sketches(range(1, 11), sketched(vectors)[0], 0.25)) == []


ATTACKS: dict[str, tuple[str, Attack]] = {
    "reversed mean": ("opposition", lambda honest: np.stack([-honest.mean(0), -0.9 * honest.mean(0)])),
    "long reversed mean": (
        "norm",
        lambda honest: -CLIP_NORM * np.stack([honest[0] / np.linalg.norm(honest[0])] * 2) * 1.2,
    ),
    "one crafted update": (
        "clones",
        lambda honest: np.stack([honest.mean(0) - honest.std(0)] * 2),
    ),
    "crafted with a little noise": (
        "clones",
        lambda honest: (
            honest.mean(0)
            - honest.std(0)
            + 0.1 * honest.std() * np.random.default_rng(1).normal(size=(2, SIZE))
        ),
    ),
    "far away": (
        "spectral",
        lambda honest: 4.0 * np.stack([np.roll(honest[0], 1)] * 2) * np.array([[1.0], [1.02]]),
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_rule_finds_the_attack_that_it_is_for_and_nobody_else(name: str) -> None:
    rule, attack = ATTACKS[name]
    honest = kinds(1)
    vectors = honest.copy()
    vectors[[1, 5]] = attack(np.delete(honest, [1, 5], axis=0))
    assert outside(rule, geometry(vectors)) == [2, 6]
    assert outside(rule, from_sketches(range(1, 11), sketched_unbound(vectors), 0.25)) == [2, 6]


def sketched_unbound(vectors: np.ndarray) -> np.ndarray:
    """Sketches of updates of any norm: those at half of it, times two where the weight is not."""
    half = sketched((vectors / 8).astype(np.float32))[0]
    none = sketched(np.zeros_like(vectors[:1]).repeat(len(vectors), 0).astype(np.float32))[0]
    return 8 * (half - none) + none


def test_a_root_set_tells_updates_that_pull_against_it() -> None:
    vectors = kinds(2)
    root = vectors.mean(0)
    vectors[[0, 4]] *= -1
    found = RULES["root_cosine"](geometry(vectors, root), 0.4)
    assert found.outside.nonzero()[0].tolist() == [0, 4]
    assert found.scores[3] < 0 < found.steady_limit < found.limit


@pytest.mark.parametrize("rule", ROOTLESS)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(5, 14), share=st.sampled_from([0.0, 0.1, 0.2]))
@settings(max_examples=25)
def test_the_order_of_the_sites_does_not_matter(rule: str, seed: int, count: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, 40)) + rng.normal(size=40)
    order = rng.permutation(count)
    one, other = RULES[rule](geometry(vectors), share), RULES[rule](geometry(vectors[order]), share)
    assert np.allclose(one.scores[order], other.scores, rtol=1e-4, atol=1e-6)
    assert one.limit == pytest.approx(other.limit)


@pytest.mark.parametrize("rule", [name for name in ROOTLESS if name != "norm"])
@given(seed=st.integers(0, 2**32 - 1), factor=st.floats(1e-3, 1e3))
@settings(max_examples=25)
def test_only_the_norm_rule_depends_on_the_scale(rule: str, seed: int, factor: float) -> None:
    vectors = np.random.default_rng(seed).normal(size=(10, 40)) + 0.5
    one, other = RULES[rule](geometry(vectors), 0.2), RULES[rule](geometry(factor * vectors), 0.2)
    assert np.allclose(one.scores, other.scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_sketches_and_their_inner_products_give_the_same_scores(rule: str) -> None:
    vectors = kinds(3)
    vectors[2] = -vectors[3]
    clear, gram, unit = sketched(vectors)
    root = np.full(10, 0.1)
    one = from_gram(range(10), clear @ clear.T, 0.25, 0.25, root, 0.4)
    other = from_gram(range(10), gram, unit, 0.25, root, 0.4)
    found, again = RULES[rule](one, 0.2), RULES[rule](other, 0.2)
    assert np.allclose(found.scores, again.scores, atol=0.02)
    assert (found.outside == again.outside).all()


def test_a_rule_says_how_many_sites_it_needs() -> None:
    for rule in ("multi_krum", "spectral", "clones", "geometric_median", "nearest_neighbours", "opposition"):
        least = least_sites(rule, 3, 0.4)
        few = geometry(updates(least - 1))
        if least_sites(rule, least - 1, 0.4) > least - 1:
            with pytest.raises(DefenceError, match=f"rule {rule} needs {least}"):
                RULES[rule](few, 0.4)
    with pytest.raises(DefenceError, match="multi_krum needs 7 sites in a round, got 6"):
        RULES["multi_krum"](geometry(updates(6)), 0.4)
    with pytest.raises(DefenceError, match="root set"):
        RULES["root_cosine"](geometry(updates(6)), 0.2)


def test_zero_updates_break_no_rule() -> None:
    vectors = updates(10)
    vectors[[0, 4]] = 0
    for rule in ROOTLESS:
        found = RULES[rule](geometry(vectors), 0.2)
        assert np.isfinite(found.scores).all()
    nothing = geometry(np.zeros_like(vectors))
    for rule in ROOTLESS:
        assert np.isfinite(RULES[rule](nothing, 0.2).scores).all(), rule


def test_the_defaults_grow_with_the_federation() -> None:
    assert default_rules(3, True) == default_rules(4, False) == ("norm",)
    assert default_rules(5, True) == ("norm", "root_cosine")
    assert default_rules(9, False) == ("norm",)
    assert set(default_rules(10, True)) <= set(RULES)
    assert default_rules(10, True).index("root_cosine") < len(default_rules(10, True)) - 1
    assert "root_cosine" not in default_rules(10, False)
    assert num_attackers(10, 0.2) == num_attackers(14, 0.2) == 2
    assert num_attackers(10, 0.3) == 3


def test_krum_scores_are_sums_over_the_nearest() -> None:
    points = np.array([[0.0], [1.0], [3.0], [10.0], [11.0]])
    squares = (points - points.T) ** 2
    assert krum_scores(squares, 1).tolist() == [1 + 9, 1 + 4, 4 + 9, 1 + 49, 1 + 64]


def test_the_geometric_median_is_the_nearest_point_to_all() -> None:
    rng = np.random.default_rng(5)
    points = rng.normal(size=(9, 4))
    points[:3] += 30
    squares = ((points[:, None] - points[None]) ** 2).sum(-1)
    weights = geometric_median_weights(squares)
    median = weights @ points
    best = np.linalg.norm(points - median, axis=1).sum()
    for step in np.concatenate([np.eye(4), -np.eye(4)]) * 0.05:
        assert np.linalg.norm(points - median - step, axis=1).sum() > best - 1e-6
    assert np.allclose(distances_to(np.eye(9), weights, squares), ((points - median) ** 2).sum(1))


@pytest.mark.parametrize("rule", ["multi_krum", "spectral", "geometric_median", "nearest_neighbours"])
def test_classic_weights_add_up_to_one_and_leave_a_far_pair_out(rule: str) -> None:
    vectors = updates(10, 6)
    vectors[[2, 7]] = 1.3 * CLIP_NORM * np.roll(vectors[[2, 7]], 5, axis=1)
    weights = classic_weights(rule, geometry(vectors), 0.2)
    assert weights.sum() == pytest.approx(1)
    assert weights[[2, 7]].max() < 0.5 * np.delete(weights, [2, 7]).min()


def test_fltrust_weighs_by_the_cosine_and_rescales_to_the_root_sets_norm() -> None:
    vectors = np.array([[2.0, 0.0], [0.0, 1.0], [-4.0, 0.0], [3.0, 3.0]])
    weights = classic_weights("root_cosine", geometry(vectors, np.array([1.0, 0.0])), 0.2)
    trust = np.array([1.0, 0.0, 0.0, np.sqrt(0.5)])
    assert np.allclose(weights, trust / np.linalg.norm(vectors, axis=1) / trust.sum())
    with pytest.raises(ValueError, match="no classic weights"):
        classic_weights("norm", geometry(vectors), 0.2)
