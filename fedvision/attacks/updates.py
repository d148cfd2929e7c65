"""What a coalition sends instead of updates: pure functions of what it knows.

The coalition is the strongest that the lab can make: it is shown the honest sites' updates of the round
before it answers. No real one is; what survives this survives weaker ones.

Rules:
- Every attack is a linear combination of the honest updates, of the last step of the global model, or of
  noise. Whoever sends it clips it to the bound, because a longer one is found by the verified norm;
  ``replacement`` alone is not clipped, to show that.
- An attack that its authors describe with one vector for all attackers sends one vector here too.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float64]
SIGN_FACTOR = 4.0
INNER_PRODUCT = 0.5
LARGE_INNER_PRODUCT = 10.0
LEAST_DEVIATION = 0.3
LARGEST_STEP = 50.0
SEARCH_STEPS = 25


@dataclass(frozen=True)
class Knowledge:
    """What a coalition knows in a round.

    Attributes:
        honest: The honest sites' clipped updates, shape (h, d).
        num_malicious: Its own size, m.
        clip_norm: The bound.
        last_step: What the global model moved by in the round before, shape (d,); zeros in the first.
        rng: Of its noise.
    """

    honest: Vectors = field(repr=False)
    num_malicious: int
    clip_norm: float
    last_step: Vectors = field(repr=False)
    rng: np.random.Generator = field(repr=False)

    @property
    def mean(self) -> Vectors:
        """Mean of the honest updates, shape (d,)."""
        return np.asarray(self.honest.mean(axis=0))

    @property
    def deviation(self) -> Vectors:
        """Standard deviation of the honest updates in each coordinate, shape (d,)."""
        return np.asarray(self.honest.std(axis=0))

    def all_alike(self, vector: Vectors) -> Vectors:
        """Return one vector for every attacker, shape (m, d)."""
        return np.repeat(vector[None], self.num_malicious, axis=0)


def honest_weights(num_honest: int, count: int, rng: np.random.Generator) -> Vectors:
    """Return weights on the honest updates that make vectors like theirs, shape (count, num_honest).

    Their sum is 1, so the mean is the honest mean; deviations are mixed at random so that the spread is the
    honest spread. No two are alike.
    """
    mixed = rng.standard_normal((count, num_honest))
    mixed -= mixed.mean(axis=1, keepdims=True)
    return np.asarray(1 / num_honest + mixed / np.sqrt(max(1, num_honest - 1)))


def sign_flip(known: Knowledge) -> Vectors:
    """Send the opposite of an update like the honest ones, four times as long.

    Source: Li et al. 2019 (RSA), section 5; the factor is that of Karimireddy et al. 2022, appendix.
    """
    weights = honest_weights(len(known.honest), known.num_malicious, known.rng)
    return -SIGN_FACTOR * (weights @ known.honest)


def noise(known: Knowledge) -> Vectors:
    """Send Gaussian noise as long as the bound allows. Source: Blanchard et al. 2017, section 5."""
    drawn = known.rng.standard_normal((known.num_malicious, known.honest.shape[1]))
    return drawn * (known.clip_norm / np.linalg.norm(drawn, axis=1, keepdims=True))


def inner_product(known: Knowledge) -> Vectors:
    """Send the negative mean times 0.5: small enough to hide. Source: Xie et al. 2019 (IPM), section 4."""
    return known.all_alike(-INNER_PRODUCT * known.mean)


def large_inner_product(known: Knowledge) -> Vectors:
    """Send the negative mean times 10: the bound cuts it. Source: Xie et al. 2019 (IPM), section 4."""
    return known.all_alike(-LARGE_INNER_PRODUCT * known.mean)


def little_is_enough(known: Knowledge) -> Vectors:
    """Move the mean by z standard deviations, with the largest z that a majority hides.

    Where the formula gives less than 0.3, 0.3 is taken: with 2 of 10 it gives 0, which is no attack.
    Source: Baruch et al. 2019 (ALIE), algorithm 3.
    """
    num_sites = len(known.honest) + known.num_malicious
    supporters = num_sites // 2 + 1 - known.num_malicious
    share = (len(known.honest) - supporters) / len(known.honest)
    z = NormalDist().inv_cdf(min(max(share, 1e-3), 1 - 1e-3))
    return known.all_alike(known.mean - max(z, LEAST_DEVIATION) * known.deviation)


def _distances(rows: Vectors, point: Vectors) -> Vectors:
    return np.asarray(((rows - point) ** 2).sum(axis=1))


def _farthest(known: Knowledge, is_hidden: Callable[[Vectors], bool]) -> Vectors:
    """Return the mean moved along the negative standard deviation as far as it stays hidden, by bisection."""
    mean, deviation = known.mean, known.deviation
    length = float(np.linalg.norm(deviation))
    direction = -deviation / length if length > 0 else deviation
    low, high = 0.0, LARGEST_STEP * known.clip_norm
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        if is_hidden(mean + middle * direction):
            low = middle
        else:
            high = middle
    return known.all_alike(mean + low * direction)


def min_max(known: Knowledge) -> Vectors:
    """Go as far as no honest update is farther away than the two most distant honest ones are apart.

    Source: Shejwalkar and Houmansadr 2021, equation 8, with the inverse standard deviation as direction.
    """
    gram = known.honest @ known.honest.T
    squares = np.diag(gram)
    limit = float((squares[:, None] + squares[None] - 2 * gram).max())
    return _farthest(known, lambda vector: float(_distances(known.honest, vector).max()) <= limit)


def min_sum(known: Knowledge) -> Vectors:
    """Go as far as the sum of squared distances is no larger than that of the worst honest update.

    Source: Shejwalkar and Houmansadr 2021, equation 9, with the inverse standard deviation as direction.
    """
    gram = known.honest @ known.honest.T
    squares = np.diag(gram)
    limit = float((squares[:, None] + squares[None] - 2 * gram).sum(axis=1).max())
    return _farthest(known, lambda vector: float(_distances(known.honest, vector).sum()) <= limit)


def free_rider(known: Knowledge) -> Vectors:
    """Do no work: send what the global model moved by before, with a little noise.

    In the first round it is noise alone. Source: Fraboni et al. 2021, disguised free-riding, section 4.3.
    """
    size = len(known.last_step)
    noise_norm = 0.1 * max(float(np.linalg.norm(known.last_step)), 0.01 * known.clip_norm)
    drawn = known.rng.standard_normal((known.num_malicious, size)) * (noise_norm / np.sqrt(size))
    return known.last_step + drawn


UPDATES: dict[str, Callable[[Knowledge], Vectors]] = {
    "sign-flip": sign_flip,
    "noise": noise,
    "ipm": inner_product,
    "ipm-large": large_inner_product,
    "alie": little_is_enough,
    "min-max": min_max,
    "min-sum": min_sum,
    "free-rider": free_rider,
}
