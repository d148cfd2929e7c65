"""What rounds spend, added up: entries of the privacy ledger to mechanisms, an epsilon and a table.

Rules:
- The patients of a data set are known by its name only.
- Groups of a data set share no patient, and "all" is everybody. What "all" spent counts for each group; for
  "all" the spending of all groups is added up, which is an upper bound for each patient.
- Each round is noted for two cases: ``honest``, the other sites add their shares of the noise and the secure
  sum holds; ``broken``, only this site's own noise protects its patients. Who does not say gets ``broken``.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import Field, model_validator

from fedvision.config import Name, Section
from fedvision.privacy.accounting import Mechanism

ALL = "all"

Case = Literal["honest", "broken"]
Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Noise = Annotated[float, Field(ge=0)]
Steps = Counter[tuple[float, float]]
"""Number of steps for each pair of sampling rate and noise multiplier."""
EpsilonOf = Callable[[list[Mechanism], float], float]
"""An accountant: the epsilon of mechanisms at a delta. It gets at least one, and all with noise."""


class Entry(Section):
    """What one round of a job spends at this site."""

    data_set: Name = Field(description="name of the data set, `site` of its manifest")
    manifest: Hex32 = Field(description="digest of the manifest")
    group: Name = Field(ALL, description="group of patients")
    job: Hex32 = Field(description="digest of the job")
    round: Annotated[int, Field(ge=0, lt=1 << 31)]
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    noise_honest: Noise = Field(description="noise multiplier if the other sites add their shares")
    noise_broken: Noise = Field(description="noise multiplier of this site's noise alone")
    steps: Annotated[int, Field(ge=1, lt=1 << 31)]
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        description="chance that the promise does not hold, as the job told the site's people"
    )

    @model_validator(mode="after")
    def _alone_is_not_more(self) -> Self:
        if self.noise_broken > self.noise_honest:
            raise ValueError("noise_broken must be <= noise_honest")
        return self


class Row(NamedTuple):
    """Rounds of a job with the same mechanism; ``first`` and ``last`` are times."""

    data_set: str
    group: str
    job: str
    sampling_rate: float
    noise_honest: float
    noise_broken: float
    rounds: int
    steps: int
    first: str
    last: str


class Spent(NamedTuple):
    """What the patients of a data set have spent.

    Attributes:
        data_set: Its name.
        job: Digest of the job; "" for all together.
        rounds: How many were reserved.
        epsilon: At ``delta``, if secure aggregation holds.
        epsilon_alone: If it fails.
        delta: The smallest of those that the jobs told.
    """

    data_set: str
    job: str
    rounds: int
    epsilon: float
    epsilon_alone: float
    delta: float


def steps_of(entries: Iterable[Entry], data_set: str, group: str, case: Case) -> Steps:
    """Return the steps that the patients of a group took part in.

    Args:
        entries: Of any data sets and jobs.
        data_set: Its name.
        group: "all" adds up every group.
        case: Which noise is counted on.

    Raises:
        ValueError: No such case.
    """
    if case not in ("honest", "broken"):
        raise ValueError(f"case must be honest or broken, got {case}")
    found: Steps = Counter()
    for one in entries:
        if one.data_set == data_set and (group == ALL or one.group in (ALL, group)):
            noise = one.noise_honest if case == "honest" else one.noise_broken
            found[one.sampling_rate, noise] += one.steps
    return found


def merged(steps: Steps) -> list[Mechanism]:
    """Return one mechanism for each pair of parameters, in their order."""
    return [Mechanism(*pair, number) for pair, number in sorted(steps.items())]


def epsilon(steps: Steps, delta: float, epsilon_of: EpsilonOf) -> float:
    """Return the epsilon of steps at ``delta``: 0.0 for none, inf where one is without noise."""
    mechanisms = merged(steps)
    if any(one.noise_multiplier == 0 for one in mechanisms):
        return math.inf
    return epsilon_of(mechanisms, delta) if mechanisms else 0.0


def spent_by(entries: Iterable[Entry], epsilon_of: EpsilonOf, each_job: bool = False) -> list[Spent]:
    """Return what each data set has spent, sorted by name; with ``each_job`` by each of its jobs alone."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for one in entries:
        found.setdefault((one.data_set, one.job if each_job else ""), []).append(one)
    rows = []
    for (data_set, job), own in sorted(found.items(), key=lambda item: item[0][0]):
        delta = min(one.delta for one in own)
        costs = [epsilon(steps_of(own, data_set, ALL, case), delta, epsilon_of) for case in get_args(Case)]
        rows.append(Spent(data_set, job, len(own), costs[0], costs[1], delta))
    return rows


def table(entries: Iterable[tuple[str, Entry]]) -> list[Row]:
    """Return a row for each data set, group, job and mechanism, in the order of their first rounds.

    Args:
        entries: Each with its time.
    """
    found: dict[tuple[Any, ...], Row] = {}
    for time, one in entries:
        key = (
            one.data_set, one.group, one.job, one.sampling_rate, one.noise_honest, one.noise_broken
        )  # fmt: skip
        row = found.get(key) or Row(*key, 0, 0, time, time)
        found[key] = row._replace(rounds=row.rounds + 1, steps=row.steps + one.steps, last=time)
    return list(found.values())
