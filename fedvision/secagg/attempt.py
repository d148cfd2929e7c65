"""What an attempt at a masked sum holds, at the server, and how it may end."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedvision.errors import RoundError
from fedvision.secagg.masking import MaskVector, add_masks
from fedvision.secagg.messages import (
    Box,
    Evidence,
    SealedShare,
    Signed,
)


class Store(Protocol):
    """Keeps masked inputs by site until an attempt is over, outside of memory."""

    def put(self, site: int, vector: MaskVector) -> None:
        """Keep a vector, the first one of each site."""
        ...

    def get(self, site: int) -> MaskVector:
        """Return it, read-only."""
        ...


@dataclass(frozen=True)
class Measured:
    """What the server learns of the updates of one sum, at level ``sketch`` or ``gram``.

    All numbers are of sketches rounded to units of ``norm_bound / 4096``, four tables added up.

    Attributes:
        sites: Whose updates, ascending; those with a norm above the bound are not among them.
        gram: Their inner products, shape (n, n), int64.
        root: Their inner products with the root set's update, shape (n,), int64; None without one.
        root_square: The squared norm of the root set's update.
        most_excluded: How many of them can be left out.
    """

    sites: tuple[int, ...]
    gram: NDArray[np.int64] = field(repr=False)
    root: NDArray[np.int64] | None = field(repr=False)
    root_square: int
    most_excluded: int


@dataclass(frozen=True)
class Selected:
    """Which of them the rules leave out, and what is said about it.

    Attributes:
        excluded: Numbers of sites, ``most_excluded`` at most.
        judgement: All findings, for the ``Accepted`` message.
    """

    excluded: frozenset[int]
    judgement: bytes = field(repr=False)


Select = Callable[[Measured], Selected]
"""Applies the charter's rules; a function of its argument and of what is known before the sum, no more."""


class AttemptError(RoundError):
    """An attempt cannot be finished; another one, with fresh masks, may be.

    Args:
        message: What is missing.
        evidence: What was proven against sites; they are left out from now on.
        absent: Sites that did not do their part, with nothing proven.
    """

    def __init__(self, message: str, evidence: Sequence[Evidence] = (), absent: Collection[int] = ()) -> None:
        super().__init__(message)
        self.evidence = tuple(evidence)
        self.absent = frozenset(absent)


class Disputed(RoundError):
    """Shares of sketches contradict each other before anything was unmasked: somebody lied."""


@dataclass
class Views:
    """What the sites of an attempt sent, by site, after its checks."""

    ready: dict[int, Signed] = field(default_factory=dict)
    boxes: dict[int, dict[int, Box]] = field(default_factory=dict)
    masked: dict[int, Signed] = field(default_factory=dict)
    digests: dict[int, bytes] = field(default_factory=dict)
    beacons: dict[int, Signed] = field(default_factory=dict)
    numbers: dict[int, bytes] = field(default_factory=dict)
    sketches: dict[int, Signed] = field(default_factory=dict)
    values: dict[int, MaskVector] = field(default_factory=dict, repr=False)
    sealed: dict[int, dict[int, SealedShare]] = field(default_factory=dict, repr=False)
    products: dict[int, Signed] = field(default_factory=dict, repr=False)
    product_shares: dict[int, bytes] = field(default_factory=dict, repr=False)
    zero_shares: dict[int, bytes] = field(default_factory=dict, repr=False)
    root_shares: dict[int, bytes] = field(default_factory=dict, repr=False)
    acks: dict[int, Signed] = field(default_factory=dict)
    keys: dict[int, dict[int, bytes]] = field(default_factory=dict, repr=False)
    shares: dict[int, dict[int, bytes]] = field(default_factory=dict, repr=False)
    sum_shares: dict[int, bytes] = field(default_factory=dict, repr=False)
    unmasks: dict[int, Signed] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class MaskedSum:
    """The outcome of an attempt.

    Attributes:
        total: Sum of the accepted inputs mod 2**32, uint32.
        fits: Whether it is the sum of the sketches; True at level ``sum``, which has none.
        seeds: Self-mask seeds of the accepted sites: public now, needed for a dispute.
    """

    total: MaskVector = field(repr=False)
    fits: bool
    seeds: Mapping[int, bytes] = field(repr=False)


def remove_masks(total: MaskVector, keys: Sequence[bytes], signs: Sequence[int], threads: int) -> None:
    """Add signed masks in place; keys that liars made equal are taken one after the other."""
    left = list(zip(keys, signs, strict=True))
    while left:
        batch: dict[bytes, int] = {}
        again = []
        for key, sign in left:
            if key in batch:
                again.append((key, sign))
            else:
                batch[key] = sign
        add_masks(total, list(batch), list(batch.values()), threads)
        left = again
