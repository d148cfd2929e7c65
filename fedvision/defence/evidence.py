"""What earlier rounds say of each site: its mean scores, and its standing.

A site may stand out once for a strange batch, and a site that is merely different stands out a little and
never by much. An attacker stands out in the same way round after round. So two things are kept of each site:

- For each rule whose scores have a sign, the mean over rounds, weighted by the median norm of the round's
  updates and forgetting a tenth each round. It is held to a tighter limit than a single score, from the
  second round on: what is chance averages out.
- Momentum, a moving mean of whether the site was outside. Above ``WARNED_AT`` the site is warned, above
  ``QUARANTINED_AT``, which takes three rounds outside in a row, it is quarantined: left out of every round
  until a person lifts the quarantine or expels the site.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from fedvision.defence.geometry import rounded
from fedvision.errors import DefenceError

Level = Literal["good", "warned", "quarantined"]
MEMORY = 0.9
"""Weight of a mean's last round against the round before it."""
STEADY_ROUNDS = 2
"""Rounds from which on a mean is held to its limit."""
MOMENTUM = 0.7
WARNED_AT = 0.25
QUARANTINED_AT = 0.6


@dataclass(frozen=True)
class Mean:
    """A weighted mean of a rule's scores over rounds.

    Attributes:
        total: Sum of weight times score.
        weight: Sum of weights.
        rounds: Number of scores in it.
    """

    total: float = 0.0
    weight: float = 0.0
    rounds: int = 0

    @property
    def value(self) -> float:
        """The mean; 0 before the first score."""
        return rounded(self.total / self.weight) if self.weight > 0 else 0.0

    def after(self, score: float, weight: float) -> "Mean":
        """Return the mean with one more score."""
        total = rounded(MEMORY * self.total + weight * score)
        return Mean(total, rounded(MEMORY * self.weight + weight), self.rounds + 1)


@dataclass(frozen=True)
class Record:
    """What is kept of one site.

    Attributes:
        momentum: Moving mean of whether the site was outside a limit, 0..1.
        standing: good, warned or quarantined.
        num_rounds: Rounds in which the site was judged.
        num_outside: Rounds in which it was outside a limit.
        means: Of the scores over rounds, by rule.
    """

    momentum: float = 0.0
    standing: Level = "good"
    num_rounds: int = 0
    num_outside: int = 0
    means: Mapping[str, Mean] = field(default_factory=dict)

    def mean(self, rule: str) -> Mean:
        """Return the mean of a rule's scores."""
        return self.means.get(rule, Mean())

    def with_score(self, rule: str, score: float, weight: float) -> "Record":
        """Return the record with a rule's score of this round."""
        means = {**self.means, rule: self.mean(rule).after(score, weight)}
        return replace(self, means=dict(sorted(means.items())))

    def after_round(self, is_outside: bool) -> "Record":
        """Return the record after a round in which the site was judged.

        A quarantined site stays so: only a person ends it.
        """
        momentum = rounded(MOMENTUM * self.momentum + (1 - MOMENTUM) * is_outside)
        standing: Level = "good"
        if self.standing == "quarantined" or momentum > QUARANTINED_AT:
            standing = "quarantined"
        elif momentum > WARNED_AT:
            standing = "warned"
        return replace(
            self,
            momentum=momentum,
            standing=standing,
            num_rounds=self.num_rounds + 1,
            num_outside=self.num_outside + is_outside,
        )


@dataclass(frozen=True)
class Past:
    """What is kept of all sites, by number. A site without a record is new."""

    records: Mapping[int, Record] = field(default_factory=dict)

    def of(self, site: int) -> Record:
        """Return the record of a site; an empty one for a new site."""
        return self.records.get(site, Record())

    @property
    def quarantined(self) -> tuple[int, ...]:
        """The quarantined sites' numbers, in order."""
        return tuple(s for s, r in sorted(self.records.items()) if r.standing == "quarantined")

    def updated(self, records: Mapping[int, Record]) -> "Past":
        """Return the past with some records replaced."""
        return Past(dict(sorted({**self.records, **records}.items())))

    def lifted(self, site: int) -> "Past":
        """Return the past after a person has lifted a site's quarantine or warning: it begins anew."""
        return self.updated({site: Record()})

    def to_json(self) -> dict[str, Any]:
        """Return what ``from_json`` reads."""
        return {
            str(site): {
                "momentum": record.momentum,
                "standing": record.standing,
                "rounds": record.num_rounds,
                "outside": record.num_outside,
                "means": {
                    rule: [mean.total, mean.weight, mean.rounds] for rule, mean in record.means.items()
                },
            }
            for site, record in sorted(self.records.items())
        }

    @staticmethod
    def from_json(content: object) -> "Past":
        """Read a past.

        Raises:
            DefenceError: It is not one.
        """
        if not isinstance(content, dict):
            raise DefenceError("a past must be an object")
        records = {_number(key): _record(value) for key, value in content.items()}
        return Past(dict(sorted(records.items())))


def finite(value: object) -> float:
    """Return a number that was read.

    Raises:
        DefenceError: It is none, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DefenceError("evidence must be numbers")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DefenceError("evidence must be finite numbers")
    return number


def level(value: object) -> Level:
    """Return a standing that was read.

    Raises:
        DefenceError: There is no such standing.
    """
    for known in get_args(Level):
        if value == known:
            return known
    raise DefenceError(f"a standing must be one of {', '.join(get_args(Level))}")


def _number(key: object) -> int:
    if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 3):
        raise DefenceError("a past must name sites by number")
    if str(int(key)) != key:
        raise DefenceError("a past must name sites by number")
    return int(key)


def _record(value: object) -> Record:
    names = {"momentum", "standing", "rounds", "outside", "means"}
    if not (isinstance(value, dict) and set(value) == names and isinstance(value["means"], dict)):
        raise DefenceError(f"a record must have {', '.join(sorted(names))} and nothing else")
    means = {str(rule)[:40]: _mean(mean) for rule, mean in sorted(value["means"].items())}
    return Record(
        finite(value["momentum"]),
        level(value["standing"]),
        _count(value["rounds"]),
        _count(value["outside"]),
        means,
    )


def _mean(value: object) -> Mean:
    if not (isinstance(value, list) and len(value) == 3):
        raise DefenceError("a mean must be a sum, a weight and a number of rounds")
    return Mean(finite(value[0]), finite(value[1]), _count(value[2]))


def _count(value: object) -> int:
    if not (type(value) is int and 0 <= value < 2**31):
        raise DefenceError("a number of rounds must be a whole number >= 0")
    return value
