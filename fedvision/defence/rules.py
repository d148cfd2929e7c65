"""Rules that say which updates of a round stand out, from norms and inner products alone.

Every rule takes a geometry and the share of sites that may attack together, and returns a score for each
site (higher is worse) and one limit, which is positive, so that ``score / limit`` can be compared between
rules.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedvision.defence.geometry import Geometry, Matrix, cosines, rounded
from fedvision.errors import DefenceError

LONGEST = 1.1
"""Norm limit in clip norms: a sketch tells the norm of an update at the bound with an error of 2 %."""
RELATIVE, SHORT = 3.0, 0.1
"""An update is too long above ``RELATIVE`` median norms, but never below ``SHORT`` clip norms: there a sketch
tells lengths poorly, and an update does little. Honest: 1.7 at most, a rare kind of images."""
OPPOSITION, STEADY_OPPOSITION = 0.6, 0.45
"""Honest: 0.50 in a round and 0.38 over rounds at most, the only site of a rare kind."""
ROOT_PULL, STEADY_ROOT_PULL = 0.2, 0.1
"""Honest: 0.07 in a round and -0.05 over rounds at most; swapped labels: 0.18 at least in the mean."""
CLONES = 3.0
"""Honest: 1.6 at most."""
WITHOUT_ROOT = 0.2
"""Largest share of the sites that may attack together where there is no root set."""
ERRORS = 4.0
"""Standard deviations of a sketch by which a limit is above what is usual."""


@dataclass(frozen=True)
class Finding:
    """What one rule says of a round.

    Attributes:
        rule: Its name.
        scores: Shape (n,), higher is worse.
        limit: Largest score that is not outside, > 0.
        outside: Shape (n,), bool: score above the limit.
        steady_limit: Largest mean over rounds (see ``evidence``) that is not outside, > 0; inf for a rule
            whose scores say nothing over rounds.
    """

    rule: str
    scores: Matrix
    limit: float
    outside: NDArray[np.bool_]
    steady_limit: float = math.inf


Rule = Callable[[Geometry, float], Finding]


def _found(rule: str, scores: Matrix, limit: float, steady_limit: float = math.inf) -> Finding:
    """Return a finding whose numbers are rounded as they are written down, before they are compared."""
    written = np.array([rounded(score) for score in scores])
    return Finding(rule, written, rounded(limit), written > rounded(limit), steady_limit)


def num_attackers(num_sites: int, max_malicious: float) -> int:
    """Return how many of ``num_sites`` may attack together: the share, rounded down."""
    return math.floor(num_sites * max_malicious + 1e-9)


def _num_partners(num_sites: int, max_malicious: float) -> int:
    """Return how many partners an attacker may have without a root set: up to a fifth of the sites attack."""
    return max(num_attackers(num_sites, min(max_malicious, WITHOUT_ROOT)) - 1, 0)


def least_sites(rule: str, num_sites: int, max_malicious: float) -> int:
    """Return how many sites of ``num_sites`` a rule needs to say anything."""
    if rule == "multi_krum":  # Blanchard et al. 2017, proposition 1
        return 2 * num_attackers(num_sites, max_malicious) + 3
    if rule == "opposition":  # two others at least, beside its likely partners
        return _num_partners(num_sites, max_malicious) + 3
    return {"norm": 1, "root_cosine": 1}.get(rule, 4)


def _needs(rule: str, geometry: Geometry, max_malicious: float) -> None:
    size = len(geometry.sites)
    least = least_sites(rule, size, max_malicious)
    if size < least:
        raise DefenceError(
            f"rule {rule} needs {least} sites in a round, got {size}",
            "use fewer rules (defence.rules) or more sites",
        )


def _limit(limit: float, usual: float, error: float) -> float:
    """Return a limit that what is usual does not pass by the error of a sketch alone."""
    return max(limit, usual + ERRORS * error)


def norm(geometry: Geometry, max_malicious: float) -> Finding:
    """Norm of the update in clip norms; from 5 sites also against the median norm.

    A clipped replacement of the model has the bound's length. In the first rounds so have honest updates, but
    in the last they have a tenth of it, and one of full length outweighs all others.
    """
    norms, limit = geometry.norms, LONGEST
    if len(norms) >= 5:
        limit = min(limit, max(RELATIVE * float(np.median(norms)), SHORT))
    return _found("norm", norms, limit)


def root_cosine(geometry: Geometry, max_malicious: float) -> Finding:
    """Pull against the root set's update: minus cosine times norm, in median norms.

    After Cao et al. 2021 (FLTrust), section 4, which leaves out every update with a cosine below 0. On sites
    that differ, honest cosines are below 0 often; but an honest update does not pull hard, nor steadily.

    The limits are for a *contrast* as the root set's update: the update that it trains with its right labels,
    minus the mean of those that it trains with wrong ones, same batches. What both have in common (the first
    steps of an optimiser, the look of the images) cancels. What is left tells right labels from wrong ones,
    also at sites whose images the root set hardly knows.
    """
    angles = geometry.root_cosines()
    typical = typical_norm(geometry)
    error = geometry.error(typical, geometry.root_norm) / max(geometry.root_norm * typical, 1e-300)
    pulls = -angles * geometry.norms / max(typical, 1e-300)
    limit = _limit(ROOT_PULL, STEADY_ROOT_PULL, min(error, 1.0))
    return _found("root_cosine", pulls, limit, STEADY_ROOT_PULL)


def typical_norm(geometry: Geometry) -> float:
    """Return the median norm of the updates, in clip norms."""
    return float(np.median(geometry.norms))


def centre_cosines(geometry: Geometry, partners: int = 0) -> tuple[Matrix, Matrix]:
    """Return the cosine of each update with the sum of the others, and the error of that cosine.

    Updates are cut to the median norm before they are added up, so that none counts more than most.

    Args:
        geometry: Of the updates.
        partners: How many of the others are not in the sum: those with the largest cosines with the update,
            which may be its partners in an attack.

    Returns:
        Two arrays of shape (n,): cosines, 0 where an update or the sum of the others is zero; standard
        deviations, 0 for updates in the clear.
    """
    size, norms = len(geometry.sites), geometry.norms
    factors = np.minimum(1.0, typical_norm(geometry) / np.where(norms > 0, norms, 1.0))
    likeness = cosines(geometry.gram, np.outer(norms, norms))
    np.fill_diagonal(likeness, np.inf)
    left_out = np.argsort(-likeness, axis=1, kind="stable")[:, : 1 + partners]  # itself comes first
    weights = np.tile(factors, (size, 1))
    np.put_along_axis(weights, left_out, 0.0, axis=1)
    lengths = np.sqrt(np.maximum(((weights @ geometry.gram) * weights).sum(axis=1), 0.0))
    found = cosines((weights * geometry.gram).sum(axis=1), lengths * norms)
    return found, np.where((lengths > 0) & (norms > 0), geometry.spread, 0.0)


def opposition(geometry: Geometry, max_malicious: float) -> Finding:
    """Minus the cosine with the sum of the other updates but its likely partners, see ``centre_cosines``.

    A site of another kind goes its own way, at a right angle to the others or a little more; one that undoes
    their work goes back along theirs, now or round after round.
    """
    _needs("opposition", geometry, max_malicious)
    partners = _num_partners(len(geometry.sites), max_malicious)
    found, errors = centre_cosines(geometry, partners)
    limit = _limit(OPPOSITION, STEADY_OPPOSITION, float(np.median(errors)))
    return _found("opposition", -found, limit, STEADY_OPPOSITION)


def clones(geometry: Geometry, max_malicious: float) -> Finding:
    """How much nearer a site's nearest neighbour is than that of most sites.

    Colluding sites that send one crafted update, with a little noise or none, are nearer to one another than
    sites that train on the same kind of images, since each of those draws its own batches.
    """
    _needs("clones", geometry, max_malicious)
    distances = np.sqrt(geometry.squared_distances) + np.diag(np.full(len(geometry.sites), np.inf))
    nearest = distances.min(axis=1)
    middle = float(np.median(nearest))
    return _found("clones", middle / np.maximum(nearest, max(1e-3 * middle, 1e-300)), CLONES)


def spectral(geometry: Geometry, max_malicious: float) -> Finding:
    """Distance from the median along the direction in which the updates differ most, in median norms.

    Shejwalkar, Houmansadr 2021 (DnC), algorithm 2, which always leaves out as many as may attack. On sites of
    several kinds these are the honest sites of the rarest kind, so here there is a limit.
    """
    _needs("spectral", geometry, max_malicious)
    projections = top_projections(geometry)
    away = np.abs(projections - np.median(projections))
    return _found("spectral", away / max(typical_norm(geometry), 1e-300), RELATIVE)


def top_projections(geometry: Geometry) -> Matrix:
    """Return each update's coordinate, from the mean, on the first eigenvector of the centred Gram matrix."""
    size = len(geometry.sites)
    centring = np.eye(size) - 1 / size
    values, vectors = np.linalg.eigh(centring @ geometry.gram @ centring)
    return vectors[:, -1] * math.sqrt(max(float(values[-1]), 0.0))


def multi_krum(geometry: Geometry, max_malicious: float) -> Finding:
    """Sum of the squared distances to the nearest others, over its median (Blanchard et al. 2017)."""
    count = num_attackers(len(geometry.sites), max_malicious)
    _needs("multi_krum", geometry, max_malicious)
    scores = krum_scores(geometry.squared_distances, count)
    return _found("multi_krum", scores / max(float(np.median(scores)), 1e-300), 4.0)


def krum_scores(squared_distances: Matrix, num_malicious: int) -> Matrix:
    """Return the sum of each row's n - f - 2 least squared distances to others, shape (n,)."""
    size = len(squared_distances)
    ordered = np.sort(squared_distances, axis=1)[:, 1:]
    return ordered[:, : max(size - num_malicious - 2, 1)].sum(axis=1)


def centre_weights(geometry: Geometry, max_malicious: float) -> Matrix:
    """Return weights of the geometric median after nearest-neighbour mixing."""
    return geometric_median_weights(geometry.squared_distances, mixing(geometry, max_malicious))


def mixing(geometry: Geometry, max_malicious: float) -> Matrix:
    """Return the matrix that replaces each update by the mean of its n - f nearest (Allouah et al. 2023)."""
    size = len(geometry.sites)
    nearest = size - num_attackers(size, max_malicious)
    order = np.argsort(geometry.squared_distances, axis=1, kind="stable")[:, :nearest]
    matrix = np.zeros((size, size))
    np.put_along_axis(matrix, order, 1 / nearest, axis=1)
    return matrix


def geometric_median_weights(squared_distances: Matrix, rows: Matrix | None = None) -> Matrix:
    """Return weights over the updates whose mean is the geometric median (Weiszfeld; Pillutla et al. 2022).

    Args:
        squared_distances: Shape (n, n).
        rows: Shape (m, n): the points are these weighted means of the updates; None for the updates.

    Returns:
        Shape (n,), not negative if ``rows`` is not, adding up to 1.
    """
    size = len(squared_distances)
    points = np.eye(size) if rows is None else rows
    weights = np.full(len(points), 1 / len(points))
    for _ in range(50):
        distances = np.sqrt(distances_to(points, weights @ points, squared_distances))
        inverse = 1 / np.maximum(distances, max(1e-9 * float(distances.max()), 1e-150))
        weights = inverse / inverse.sum()
    return weights @ points


def distances_to(points: Matrix, centre: Matrix, squared_distances: Matrix) -> Matrix:
    """Return the squared distances of weighted means of updates to another: rows and centre add up to 1."""
    differences = points - centre
    return np.maximum(-0.5 * ((differences @ squared_distances) * differences).sum(axis=1), 0.0)


def geometric_median(geometry: Geometry, max_malicious: float) -> Finding:
    """Distance to the geometric median, over the median distance."""
    _needs("geometric_median", geometry, max_malicious)
    weights = geometric_median_weights(geometry.squared_distances)
    return _by_distance("geometric_median", geometry, weights)


def nearest_neighbours(geometry: Geometry, max_malicious: float) -> Finding:
    """Distance to the geometric median of the mixed updates, over the median distance."""
    _needs("nearest_neighbours", geometry, max_malicious)
    return _by_distance("nearest_neighbours", geometry, centre_weights(geometry, max_malicious))


def _by_distance(rule: str, geometry: Geometry, weights: Matrix) -> Finding:
    size = len(geometry.sites)
    distances = np.sqrt(distances_to(np.eye(size), weights, geometry.squared_distances))
    return _found(rule, distances / max(float(np.median(distances)), 1e-300), 2.0)


REPEATED = frozenset({"opposition"})
"""Rules that are applied again after the worst site outside is taken out, since it spoils what the others are
compared with: two that undo the work of all can make a third look so that only does not help."""

RULES: dict[str, Rule] = {
    "norm": norm,
    "root_cosine": root_cosine,
    "opposition": opposition,
    "clones": clones,
    "spectral": spectral,
    "multi_krum": multi_krum,
    "geometric_median": geometric_median,
    "nearest_neighbours": nearest_neighbours,
}


def default_rules(num_sites: int, has_root: bool) -> tuple[str, ...]:
    """Return the rules for a federation of this size.

    Below 5 sites nothing can be told from norms and angles but that an update is too long.

    Args:
        num_sites: Enrolled sites.
        has_root: Whether there is a root set.
    """
    rules = ["norm"]
    if num_sites >= 10:
        rules.append("clones")
    if num_sites >= 5 and has_root:
        rules.append("root_cosine")
    if num_sites >= 10:
        rules += ["opposition", "spectral"]
    return tuple(rules)


def classic_weights(rule: str, geometry: Geometry, max_malicious: float) -> Matrix:
    """Return the weights of a rule as it was published, for updates in the clear; shape (n,).

    ``multi_krum``, ``spectral``: 1 / (n - f) for all but the f worst, f as many as may attack.
    ``geometric_median``, ``nearest_neighbours``: real weights that add up to 1. ``root_cosine``: FLTrust's,
    with its rescaling to the root set's norm.

    Raises:
        ValueError: The rule has no such weights.
    """
    size = len(geometry.sites)
    count = num_attackers(size, max_malicious)
    if rule == "geometric_median":
        return geometric_median_weights(geometry.squared_distances)
    if rule == "nearest_neighbours":
        return centre_weights(geometry, max_malicious)
    if rule == "root_cosine":
        trust = np.maximum(geometry.root_cosines(), 0.0)
        norms = np.where(geometry.norms > 0, geometry.norms, 1.0)
        return trust * geometry.root_norm / norms / max(float(trust.sum()), 1e-300)
    if rule == "multi_krum":
        scores = krum_scores(geometry.squared_distances, count)
    elif rule == "spectral":
        scores = top_projections(geometry) ** 2
    else:
        raise ValueError(f"rule {rule} has no classic weights")
    weights = np.zeros(size)
    weights[np.argsort(scores, kind="stable")[: size - count]] = 1 / (size - count)
    return weights
