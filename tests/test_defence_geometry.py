import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvision.defence.geometry import SPREAD, Geometry, cosines, from_gram, from_sketches, from_vectors
from fedvision.errors import DefenceError
from fedvision.secagg.encoding import Encoding
from fedvision.secagg.gram import UNITS, round_sketch
from fedvision.secagg.sketch import TAIL, centred, sketch

CLIP_NORM, SIZE = 3.0, 20_000


def updates(count: int, seed: int = 0, shared: float = 1.0) -> np.ndarray:
    """Updates of norm 0.7 clip norms or so with a common part."""
    rng = np.random.default_rng(seed)
    made = shared * rng.normal(size=SIZE) + rng.normal(size=(count, SIZE))
    return (0.7 * CLIP_NORM * made / np.linalg.norm(made, axis=1).mean()).astype(np.float32)


def sketched(vectors: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """What sites put in: sketches in clip norms, inner products as at level gram, and their unit."""
    encoding = Encoding(len(vectors), SIZE, CLIP_NORM, 1, (4.0,))
    beta, key = bytes([seed]) * 32, bytes(range(32))
    raw = [sketch(encoding.encode(vector, 1, [0.8], key), beta, TAIL) for vector in vectors]
    rounded = np.stack([round_sketch(values, encoding.norm_bound) for values in raw])
    clear = np.stack([centred(values).astype(np.float64) / encoding.scale for values in raw])
    return clear, rounded @ rounded.T, (encoding.norm_bound / encoding.scale / UNITS) ** 2 / 4


def test_norms_and_cosines_of_clear_updates_are_theirs_in_clip_norms() -> None:
    vectors = np.array([[3.0, 0.0], [0.0, 6.0], [-3.0, 0.0]])
    found = from_vectors((7, 2, 5), vectors, 3.0, root=np.array([6.0, 0.0]))
    assert found.norms.tolist() == [1.0, 2.0, 1.0]
    assert found.root_cosines().tolist() == [1.0, 0.0, -1.0]
    assert found.root_norm == 2.0
    assert found.squared_distances[0].tolist() == [0.0, 5.0, 4.0]
    assert found.part([2, 0]).sites == (5, 7)
    assert found.part([2, 0]).gram.tolist() == [[1.0, -1.0], [-1.0, 1.0]]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sketches_and_their_inner_products_say_what_the_updates_say(seed: int) -> None:
    vectors = updates(6, seed)
    exact = from_vectors(range(6), vectors, CLIP_NORM)
    clear, gram, unit = sketched(vectors, seed)
    for found in (from_sketches(range(6), clear, tail=0.25), from_gram(range(6), gram, unit, tail=0.25)):
        typical = float(np.median(exact.norms))
        error = found.error(typical, typical)
        assert 0 < error < 0.05
        assert np.abs(found.gram - exact.gram).max() < 5 * error
        relative = np.abs(found.squared_distances / np.maximum(exact.squared_distances, 1e-9) - 1)
        assert relative[~np.eye(6, dtype=bool)].max() < 5 * SPREAD * np.sqrt(2)


def test_the_weight_of_the_inputs_leaves_a_short_update_as_it_is() -> None:
    vectors = updates(5, 4) * np.float32(0.2)
    exact = from_vectors(range(5), vectors, CLIP_NORM)
    found = from_sketches(range(5), sketched(vectors)[0], tail=0.25)
    assert np.abs(found.gram - exact.gram).max() < 0.15 * exact.gram.max()


def test_rows_of_unknown_weights_are_brought_to_the_same_length() -> None:
    clear, _, _ = sketched(updates(4))
    weights = np.array([0.1, 0.5, 1.0, 0.3])[:, None]
    one, other = (
        from_sketches(range(4), clear, tail=None),
        from_sketches(range(4), clear * weights, tail=None),
    )
    assert np.allclose(np.diag(other.gram), 1.0)
    assert np.allclose(one.gram, other.gram)


def test_the_root_sets_row_is_a_sketch_without_weight_and_loss() -> None:
    vectors = updates(5)
    encoding = Encoding(5, SIZE, CLIP_NORM, 1, (4.0,))
    root = np.zeros(encoding.length, np.uint32)
    root[:SIZE] = np.rint(vectors[0] * (encoding.scale / CLIP_NORM)).astype(np.int32).view(np.uint32)
    row = centred(sketch(root, bytes(32), TAIL)).astype(np.float64) / encoding.scale
    found = from_sketches(range(5), sketched(vectors)[0], 0.25, row)
    exact = from_vectors(range(5), vectors, CLIP_NORM, vectors[0])
    assert np.abs(found.root_cosines() - exact.root_cosines()).max() < 0.1
    assert found.root_norm == pytest.approx(exact.root_norm, rel=0.1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])
def test_a_number_that_is_not_finite_names_its_site(bad: float) -> None:
    vectors = np.ones((4, 8))
    vectors[2, 3] = bad
    with pytest.raises(DefenceError, match=r"site 13 are not finite") as caught:
        from_vectors((11, 12, 13, 14), vectors, 1.0)
    assert "last good model" in caught.value.hint
    sketches = np.ones((3, 2048))
    sketches[1, 0] = bad
    with pytest.raises(DefenceError, match="site 2 are not finite"):
        from_sketches((1, 2, 3), sketches, 0.25)
    with pytest.raises(DefenceError, match="site 2 are not finite"):
        from_sketches((1, 2, 3), sketches, None)


def test_a_root_set_that_learnt_nothing_and_an_empty_input_are_refused() -> None:
    with pytest.raises(DefenceError, match="root set's update is zero"):
        from_vectors((1, 2), np.ones((2, 4)), 1.0, root=np.zeros(4))
    with pytest.raises(DefenceError, match="input of site 2 is zero"):
        from_gram((1, 2), np.diag([1.0, 0.0]), tail=None)
    with pytest.raises(DefenceError, match="needs a root set"):
        from_vectors((1, 2), np.ones((2, 4)), 1.0).root_cosines()


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="distinct"):
        Geometry((1, 1), np.eye(2))
    with pytest.raises(ValueError, match="gram must have shape"):
        Geometry((1, 2), np.eye(3))
    with pytest.raises(ValueError, match="root must have shape"):
        Geometry((1, 2), np.eye(2), np.ones(3), 1.0)
    with pytest.raises(ValueError, match="clip_norm"):
        from_vectors((1, 2), np.ones((2, 4)), 0.0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6), st.floats(0, 1e6))
@settings(max_examples=50)
def test_a_cosine_is_between_minus_one_and_one(products: list[float], length: float) -> None:
    found = cosines(np.array(products), np.full(len(products), length))
    assert (np.abs(found) <= 1).all()
    assert length > 0 or not found.any()
