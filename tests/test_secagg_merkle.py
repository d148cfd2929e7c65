"""Merkle trees: a path proves one leaf at one place, and nothing else."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvision.secagg.merkle import merkle_paths, merkle_root, path_fits

leaves_of = st.lists(st.binary(max_size=40), min_size=1, max_size=40)


def tree_hash(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, word for word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    split = 1 << ((len(leaves) - 1).bit_length() - 1)
    return hashlib.sha256(b"\x01" + tree_hash(leaves[:split]) + tree_hash(leaves[split:])).digest()


@given(leaves_of)
def test_the_root_is_the_one_of_rfc_6962(leaves: list[bytes]) -> None:
    assert merkle_root(leaves) == tree_hash(leaves)


def test_the_root_of_nothing_is_the_hash_of_nothing() -> None:
    assert merkle_root([]) == tree_hash([])
    assert not path_fits(merkle_root([]), b"", 0, 0, ())


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 254, 255])
def test_every_leaf_has_a_path_of_eight_hashes_at_most(count: int) -> None:
    leaves = [bytes([index]) for index in range(count)]
    root = merkle_root(leaves)
    for index, leaf in enumerate(leaves):
        path = merkle_paths(leaves)[index]
        assert path_fits(root, leaf, index, count, path)
        assert len(path) <= 8


@settings(max_examples=200)
@given(leaves_of, st.data())
def test_a_path_fits_no_other_leaf_place_count_or_root(leaves: list[bytes], data: st.DataObject) -> None:
    count = len(leaves)
    index = data.draw(st.integers(0, count - 1), label="index")
    root, path = merkle_root(leaves), merkle_paths(leaves)[index]
    leaf = leaves[index]
    assert path_fits(root, leaf, index, count, path)
    assert not path_fits(root, leaf + b"\0", index, count, path)
    assert not path_fits(merkle_root([*leaves, b"more"]), leaf, index, count, path)
    assert not path_fits(root, leaf, index, count, (*path, bytes(32)))
    if path:
        assert not path_fits(root, leaf, index, count, path[:-1])
        assert not path_fits(root, leaf, index, count, path[1:])
        at = data.draw(st.integers(0, len(path) - 1), label="at")
        flipped = bytes([path[at][0] ^ 1]) + path[at][1:]
        assert not path_fits(root, leaf, index, count, (*path[:at], flipped, *path[at + 1 :]))
    for other in range(-1, count + 1):
        if other != index and (not 0 <= other < count or leaves[other] != leaf):
            assert not path_fits(root, leaf, other, count, path)


@given(st.lists(st.binary(max_size=8), min_size=2, max_size=20, unique=True), st.data())
def test_a_place_is_proven_for_one_count_only_where_the_tree_differs(
    leaves: list[bytes], data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(leaves) - 1), label="index")
    path, root = merkle_paths(leaves)[index], merkle_root(leaves)
    for count in range(1, 40):
        if path_fits(root, leaves[index], index, count, path):
            sides = []
            for width in (len(leaves), count):
                at, seen = index, []
                while width > 1:
                    if at ^ 1 < width:
                        seen.append(at % 2)
                    at, width = at // 2, (width + 1) // 2
                sides.append(seen)
            assert sides[0] == sides[1]


def test_an_inner_node_does_not_pass_for_a_leaf() -> None:
    leaves = [b"a", b"b", b"c", b"d"]
    root = merkle_root(leaves)
    left = hashlib.sha256(b"\x01" + tree_hash([b"a"]) + tree_hash([b"b"])).digest()
    right = hashlib.sha256(b"\x01" + tree_hash([b"c"]) + tree_hash([b"d"])).digest()
    assert hashlib.sha256(b"\x01" + left + right).digest() == root
    inner = tree_hash([b"a"]) + tree_hash([b"b"])
    for leaf in (inner, b"\x01" + inner, left):
        assert not path_fits(root, leaf, 0, 2, (right,))
        assert not path_fits(root, leaf, 0, 1, ())
        assert merkle_root([leaf, tree_hash([b"c"]) + tree_hash([b"d"])]) != root


@given(leaves_of, leaves_of)
def test_lists_that_differ_have_roots_that_differ(first: list[bytes], second: list[bytes]) -> None:
    assert (merkle_root(first) == merkle_root(second)) == (first == second)
