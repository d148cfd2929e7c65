"""An attacker that knows defence and history, and sends the strongest updates that it expects to pass.

It sees the honest updates, the charter's rules with their parameters, and who was left out before. In every
round it applies the server's own rules to what it would send, and looks by bisection for the largest step
against the honest mean that none of its members is left out for. Source: the adaptive attacks of Fang et al.
2020, section 4, and Shejwalkar and Houmansadr 2021, section IV-B, on our rules instead of theirs.

- Each member starts from an update like the honest ones, so no two are alike and all have honest spread.
- After an exclusion it halves its step, and it is bolder again after every round without one.
- All vectors are combinations of the honest updates, so the search needs their Gram matrix only.
- It does not have the root set. It takes the honest mean for the root set's update.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedvision.attacks.updates import Knowledge, Vectors, honest_weights
from fedvision.defence.evidence import Past
from fedvision.defence.geometry import from_gram
from fedvision.defence.judge import Judgement, judge

LONGEST_STEP = 4.0
BISECTIONS = 10
MARGIN = 0.95
BOLDER, MORE_CAREFUL = 1.25, 0.5


@dataclass(frozen=True)
class Target:
    """What an attacker knows of the defence.

    Attributes:
        honest: Numbers of the honest sites, in the order of their updates.
        malicious: Numbers of its own.
        rules: As in the charter; none for no defence.
        max_malicious: As in the charter.
        most_excluded: How many sites a round can do without.
    """

    honest: tuple[int, ...]
    malicious: tuple[int, ...]
    rules: tuple[str, ...]
    max_malicious: float
    most_excluded: int


class Adaptive:
    """The attacker over the rounds of a job.

    Args:
        target: The defence.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._past = Past()
        self.caution = 1.0

    def told(self, was_excluded: bool) -> None:
        """Learn whether a member was left out of the last round."""
        self.caution = (
            max(0.02, self.caution * MORE_CAREFUL) if was_excluded else min(1.0, self.caution * BOLDER)
        )

    def craft(self, known: Knowledge) -> Vectors:
        """Return the members' updates of a round, shape (m, d)."""
        gram = known.honest @ known.honest.T / known.clip_norm**2
        length = float(np.sqrt(max(gram.mean(), 0.0)))
        base = honest_weights(len(known.honest), known.num_malicious, known.rng)
        against = -1 / (len(known.honest) * max(length, 1e-9))

        def weights(step: float) -> Vectors:
            mixed = base + step * against
            norms = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", mixed, gram, mixed), 1e-18))
            return np.asarray(mixed * np.minimum(1.0, 1 / norms)[:, None])

        strongest = self._strongest(lambda step: self._passes(weights(step), gram))
        chosen = weights(self.caution * MARGIN * strongest)
        self._note(chosen, gram)
        return chosen @ known.honest

    def _strongest(self, passes: Callable[[float], bool]) -> float:
        """Return the largest step that passes, as far as bisection finds it; 0 if none does."""
        if passes(LONGEST_STEP):
            return LONGEST_STEP
        low, high = 0.0, LONGEST_STEP
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if passes(middle) else (low, middle)
        return low

    def _judged(self, weights: Vectors, gram: Vectors) -> Judgement:
        """Return the server's judgement, as the attacker expects it."""
        target = self._target
        rows = np.vstack([np.eye(len(gram)), weights])
        products = rows @ gram @ rows.T
        root, root_norm = None, 0.0
        if "root_cosine" in target.rules:
            root = rows @ gram.mean(axis=1)
            root_norm = max(float(np.sqrt(max(gram.mean(), 0.0))), 1e-9)
        numbers = (*target.honest, *target.malicious)
        geometry = from_gram(numbers, products, root=root, root_norm=root_norm)
        return judge(geometry, target.rules, target.max_malicious, target.most_excluded, self._past)

    def _passes(self, weights: Vectors, gram: Vectors) -> bool:
        if not self._target.rules:
            return True
        return not set(self._judged(weights, gram).excluded) & set(self._target.malicious)

    def _note(self, weights: Vectors, gram: Vectors) -> None:
        if self._target.rules:
            self._past = self._judged(weights, gram).past
