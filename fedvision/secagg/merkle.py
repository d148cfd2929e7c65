"""Merkle trees over lists of byte strings (RFC 6962, section 2.1): one hash for many, and short proofs.

Leaves and inner nodes are hashed with different prefixes, so that no inner node passes for a leaf.
"""

import hashlib
from collections.abc import Sequence


def _leaf(data: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + data).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _levels(leaves: Sequence[bytes]) -> list[list[bytes]]:
    """Return the tree from the leaves' hashes up to the root; a node without a partner moves up as it is."""
    level = [_leaf(leaf) for leaf in leaves]
    levels = [level]
    while len(level) > 1:
        pairs = [_node(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(pairs) * 2 :]
        levels.append(level)
    return levels


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """Return the root, 32 bytes; of no leaf at all, the hash of nothing."""
    return _levels(leaves)[-1][0] if leaves else hashlib.sha256(b"").digest()


def merkle_paths(leaves: Sequence[bytes]) -> list[tuple[bytes, ...]]:
    """Return, for each leaf, its partners from the bottom up: the proof that it belongs to the root."""
    levels = _levels(leaves)[:-1]
    paths = []
    for leaf in range(len(leaves)):
        path, index = [], leaf
        for level in levels:
            partner = index ^ 1
            if partner < len(level):
                path.append(level[partner])
            index //= 2
        paths.append(tuple(path))
    return paths


def path_fits(root: bytes, leaf: bytes, index: int, count: int, path: Sequence[bytes]) -> bool:
    """Whether ``path`` proves that ``leaf`` is leaf ``index`` of ``count`` below ``root``."""
    if not 0 <= index < count:
        return False
    value, width, at = _leaf(leaf), count, 0
    while width > 1:
        partner = index ^ 1
        if partner < width:
            if at == len(path):
                return False
            value = _node(path[at], value) if index % 2 else _node(value, path[at])
            at += 1
        index, width = index // 2, (width + 1) // 2
    return at == len(path) and value == root
