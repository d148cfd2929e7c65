"""Norms and inner products of a round's updates: all that the defence knows, however it came to know them.

The rules take a ``Geometry`` and nothing else, so that they decide alike from updates in the clear, from
their sketches, and from the Gram matrix of sketches that nobody has seen. Units are squared clip norms: an
update at the bound has 1 on the diagonal.

What a secure sum holds beside the update. A site's input ends with its weight, the constant 1/2 clip norm,
and with its loss, 1/16 at most. At level ``gram`` these have buckets of their own in the sketch, so the
constant's square is in every inner product and nothing else of it: ``tail`` takes it off. At level
``sketch`` they are projected out before the inner products are made, and there is no tail.

Where the weights differ from site to site (``weighting = "samples"``) and are hidden, ``tail`` is None: rows
are brought to the same length before anything else, which takes the weights out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedvision.errors import DefenceError

Matrix = NDArray[np.float64]
TABLES = 4
"""Tables of a sketch; its squared norm is that of the vector times this, on average."""
SPREAD = 2048**-0.5
"""Of a sketch with 2048 rows; see ``Geometry.spread``."""


@dataclass(frozen=True)
class Geometry:
    """A round's updates as norms and inner products.

    Attributes:
        sites: Distinct site numbers, in the order of the rows.
        gram: Shape (n, n), symmetric, in squared clip norms.
        root: Shape (n,), inner products with the root set's update; None without a root set.
        root_norm: Norm of the root set's update, in clip norms; 0 without.
        spread: Standard deviation of the inner product of the sketches of two orthogonal unit vectors; 0 for
            updates in the clear.
    """

    sites: tuple[int, ...]
    gram: Matrix
    root: Matrix | None = None
    root_norm: float = 0.0
    spread: float = 0.0

    def __post_init__(self) -> None:
        size = len(self.sites)
        if size == 0 or len(set(self.sites)) != size:
            raise ValueError(f"sites must be distinct and at least one, got {size}")
        if self.gram.shape != (size, size):
            raise ValueError(f"gram must have shape ({size}, {size}), got {self.gram.shape}")
        _refuse_not_finite(self.gram, self.sites)
        if self.root is not None:
            if self.root.shape != (size,):
                raise ValueError(f"root must have shape ({size},), got {self.root.shape}")
            _refuse_not_finite(self.root[:, None], self.sites)
            if not (math.isfinite(self.root_norm) and self.root_norm > 0):
                raise DefenceError("the root set's update is zero or not finite", "look at the root set")

    @property
    def norms(self) -> Matrix:
        """Shape (n,), in clip norms; an estimate below zero counts as zero."""
        return np.sqrt(np.maximum(np.diag(self.gram), 0.0))

    @property
    def squared_distances(self) -> Matrix:
        """Shape (n, n), zero on the diagonal, never below zero."""
        squares = np.diag(self.gram)
        distances = np.maximum(squares[:, None] + squares[None, :] - 2 * self.gram, 0.0)
        np.fill_diagonal(distances, 0.0)
        return distances

    def error(self, norm: float, other: float) -> float:
        """Return the standard deviation of an inner product of two updates with these norms."""
        return self.spread * norm * other

    def root_cosines(self) -> Matrix:
        """Shape (n,), -1..1: the cosine of each update with the root set's; 0 for a zero update.

        Raises:
            DefenceError: There is no root set.
        """
        if self.root is None:
            raise DefenceError(
                "rule root_cosine needs a root set", "add one, or take the rule out of defence.rules"
            )
        return cosines(self.root, self.norms * self.root_norm)

    def part(self, rows: Sequence[int]) -> "Geometry":
        """Return the geometry of some rows, in the given order."""
        index = list(rows)
        return Geometry(
            tuple(self.sites[row] for row in index),
            self.gram[np.ix_(index, index)],
            None if self.root is None else self.root[index],
            self.root_norm,
            self.spread,
        )


def cosines(products: Matrix, lengths: Matrix) -> Matrix:
    """Return ``products / lengths`` cut to -1..1, and 0 where a length is 0."""
    safe = np.where(lengths > 0, lengths, 1.0)
    return np.where(lengths > 0, np.clip(products / safe, -1.0, 1.0), 0.0)


def rounded(value: float) -> float:
    """Return a number with six significant digits: numbers are compared as they are written down."""
    return float(f"{float(value):.6g}") + 0.0


def _refuse_not_finite(rows: Matrix, sites: Sequence[int]) -> None:
    bad = [site for site, row in zip(sites, rows, strict=True) if not np.isfinite(row).all()]
    if bad:
        # One bad sketch spoils its row and its column: name the sites whose own square is bad, if any.
        square = rows.shape[0] == rows.shape[1]
        own = [site for index, site in enumerate(sites) if square and not np.isfinite(rows[index, index])]
        named = ", ".join(str(site) for site in own or bad)
        raise DefenceError(
            f"the numbers of site {named} are not finite",
            "the round is thrown away and the last good model kept",
        )


def from_vectors(
    sites: Sequence[int],
    vectors: Sequence[NDArray[np.floating]] | NDArray[np.floating],
    clip_norm: float,
    root: NDArray[np.floating] | None = None,
) -> Geometry:
    """Return the geometry of updates in the clear.

    Args:
        sites: Site numbers.
        vectors: One update of shape (d,) a site.
        clip_norm: The bound on their norm, > 0.
        root: The root set's update, shape (d,).

    Raises:
        DefenceError: An entry is not finite.
    """
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise ValueError(f"clip_norm must be > 0 and finite, got {clip_norm}")
    scaled = np.stack([np.asarray(vector, np.float64) for vector in vectors]) / clip_norm
    with np.errstate(over="ignore", invalid="ignore"):
        gram = scaled @ scaled.T
        if root is None:
            return Geometry(tuple(sites), gram)
        row = np.asarray(root, np.float64) / clip_norm
        return Geometry(tuple(sites), gram, scaled @ row, float(np.linalg.norm(row)))


def from_sketches(
    sites: Sequence[int],
    sketches: NDArray[np.floating],
    tail: float | None = 0.0,
    root: NDArray[np.floating] | None = None,
) -> Geometry:
    """Return the geometry of updates from their sketches.

    Args:
        sites: Site numbers.
        sketches: Shape (n, 2048), in clip norms.
        tail: See ``from_gram``.
        root: Sketch of the root set's update without weight and loss, shape (2048,), in clip norms.

    Raises:
        DefenceError: An entry is not finite.
    """
    rows = np.asarray(sketches, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        gram = rows @ rows.T / TABLES
        if root is None:
            return from_gram(sites, gram, tail=tail)
        row = np.asarray(root, np.float64)
        products = rows @ row / TABLES
        return from_gram(
            sites, gram, tail=tail, root=products, root_norm=math.sqrt(float(row @ row) / TABLES)
        )


def from_gram(
    sites: Sequence[int],
    gram: NDArray[np.floating] | NDArray[np.integer],
    unit: float = 1.0,
    tail: float | None = 0.0,
    root: NDArray[np.floating] | None = None,
    root_norm: float = 0.0,
) -> Geometry:
    """Return the geometry of updates from inner products of what the sites have put in.

    Args:
        sites: Site numbers.
        gram: Shape (n, n).
        unit: Squared clip norms of 1 in ``gram``. Level gram: ``(norm_bound / scale / 4096)**2 / 4``.
        tail: Square of the constant part of every input, in squared clip norms: 1/4 for a weight of 1/2 that
            all sites have, 0 for none. None where the weights differ: rows are normalised, and norms are not
            known any more.
        root: Inner products with the root set's update, in squared clip norms, shape (n,).
        root_norm: Norm of the root set's update, in clip norms.

    Raises:
        DefenceError: A number is not finite, or a site has put in nothing where ``tail`` is None.
    """
    whole = np.asarray(gram, np.float64) * unit
    products = None if root is None else np.asarray(root, np.float64)
    numbers = tuple(int(site) for site in sites)
    if tail is not None:
        return Geometry(numbers, whole - tail, products, root_norm, SPREAD)
    _refuse_not_finite(whole, numbers)
    lengths = np.sqrt(np.maximum(np.diag(whole), 0.0))
    if not (lengths > 0).all():
        site = numbers[int(np.argmin(lengths))]
        raise DefenceError(f"the input of site {site} is zero, without even a weight")
    scaled = whole / np.outer(lengths, lengths)
    products = None if products is None else products / lengths
    return Geometry(numbers, scaled, products, root_norm, SPREAD)
