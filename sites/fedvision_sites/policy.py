"""The site's policy: what may run here, whoever asks. It is checked against every job before anything runs.

The section ``[policy]`` of ``site.toml`` loads into one frozen ``Policy``. Rules:
- An empty section allows what is safe only; every key is a limit, and a job that breaks one is refused.
- ``check`` is pure. Each ``Finding`` names a rule, which may be sent, and a text for the site's people.
- A job can name code in few places, see ``references``. What is named must be a network of the library, or
  be allowed by name.
- Hours do not refuse a job: outside of them it waits.
"""

import math
import re
import zoneinfo
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field

from fedvision.config import Job, Name, PositiveInt, Section
from fedvision.data.manifest import Manifest
from fedvision.secagg.identity import fingerprint
from fedvision.secagg.roster import Charter, Hex32, Level, Roster, colluding_bound
from fedvision_sites.hours import DAYS, parse_span

Network = Literal[
    "UNet", "BasicUNet", "DynUNet", "SegResNet", "SwinUNETR", "UNETR", "AttentionUnet",
    "RetinaNet", "FasterRCNN",
]  # fmt: skip
Task = Literal["segmentation", "detection"]
Rule = Literal[
    "tasks", "models", "callables", "datasets", "smallest-cohort", "least-max-colluding", "secure-only",
    "levels", "release-test",
    "largest-clip-norm", "largest-rounds", "largest-steps", "largest-weights", "least-noise-multiplier",
    "governance", "rosters", "hours", "charter", "too-many-jobs",
]  # fmt: skip
"""Names of the rules. One that is a key of the policy is that key, with ``-`` for ``_``."""

FREE_TEXT = frozenset({"task.classes"})
"""Places of a job whose strings are shown to people only."""
LARGEST_SHOWN, MOST_SHOWN = 80, 20


def _a_span(text: str) -> str:
    parse_span(text)
    return text


def _a_callable(text: str) -> str:
    if not all(text.partition(":")):
        raise ValueError("a callable is written `package.module:function`")
    return text


def _a_key(text: str) -> str:
    digits = text.replace(" ", "")
    if not re.fullmatch("[0-9a-f]{64}|[0-9]{40}", digits):
        raise ValueError("expected the 40 digits of a fingerprint, or a public key of 64 hexadecimal digits")
    return digits


def _a_zone(name: str) -> str:
    if name:
        try:
            zoneinfo.ZoneInfo(name)
        except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
            raise ValueError(
                'no such time zone on this machine; they are named as "Europe/Amsterdam"'
            ) from None
    return name


Limit = Annotated[float, Field(gt=0, allow_inf_nan=True)]
"""An epsilon; inf for no limit."""


class Policy(Section):
    """What may run at this site. Without a key its default holds."""

    automatic: bool = Field(
        False,
        description="a job that keeps to the policy runs without asking; else a person allows each job",
    )
    tasks: tuple[Task, ...] = Field(get_args(Task), description="tasks that may run")
    models: tuple[Network, ...] = Field(
        get_args(Network), description="networks of the library that may run, by name"
    )
    callables: tuple[Annotated[str, AfterValidator(_a_callable)], ...] = Field(
        (),
        description="your own installed code that a job may name, as `package.module:function`: a network, "
        "a loss, a transform",
    )
    datasets: tuple[Name, ...] = Field(
        (),
        description="names of data sets (`site` of the manifest) that jobs may use; empty means any name",
    )
    secure_only: bool = Field(
        True, description="jobs with secure aggregation only: without it the server sees this site's update"
    )
    levels: tuple[Level, ...] = Field(
        get_args(Level), description="levels of secure aggregation that may be used"
    )
    smallest_cohort: Annotated[int, Field(ge=3, le=255)] = Field(
        5, description="least sites whose updates a job may add up, with secure aggregation"
    )
    least_max_colluding: Literal["auto"] | Annotated[int, Field(ge=1, le=84)] = Field(
        "auto",
        description="least `max_colluding` of a charter: from how many other sites that help the server this "
        "site's update stays hidden at least; auto: the most there can be, a third of the sites less one",
    )
    release_test: bool = Field(
        True, description="this site's own sums of test statistics may be released, in the clear"
    )
    largest_clip_norm: Annotated[float, Field(gt=0)] = Field(
        100.0, description="largest `aggregation.clip_norm`"
    )
    largest_rounds: PositiveInt = Field(500, description="largest number of rounds")
    largest_steps: PositiveInt = Field(10_000, description="most optimiser steps a round at this site")
    largest_weights: PositiveInt = Field(
        500_000_000, description="most weights that a model may have, by the charter"
    )
    least_noise_multiplier: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="least `privacy.noise_multiplier` of a job; above 0 a job without privacy is refused",
    )
    largest_epsilon: Limit = Field(
        math.inf,
        description="most that a data set's patients may spend over all jobs, if secure aggregation holds; a "
        "job that would pass it is refused",
    )
    largest_epsilon_alone: Limit = Field(
        math.inf, description="the same if secure aggregation fails: with this site's own noise alone"
    )
    governance: tuple[Annotated[str, AfterValidator(_a_key)], ...] = Field(
        (),
        description="whose signature counts: fingerprints (40 digits, spaces allowed) or public keys (64 "
        "hexadecimal digits); empty means the key that `fedvision-site join` pinned",
    )
    rosters: tuple[Hex32, ...] = Field(
        (), description="digests of the rosters that a job may use; empty means any that governance signed"
    )
    hours: tuple[Annotated[str, AfterValidator(_a_span)], ...] = Field(
        (),
        description='when jobs may run: "22:00-06:00", "sat-sun 00:00-24:00"; outside of it they wait; empty '
        "means always",
    )
    time_zone: Annotated[str, AfterValidator(_a_zone)] = Field(
        "", description='of `hours`, such as "Europe/Amsterdam"; empty means that of the machine'
    )
    gpu_share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="largest share of the GPU's memory that a job gets"
    )


@dataclass(frozen=True)
class Finding:
    """Why a job does not run.

    Attributes:
        rule: A name of ``Rule``; it may be sent.
        text: For the site's people: what the job wants, what the site allows, which key says so. Stays here.
        is_temporary: The job need not change: it waits.
    """

    rule: Rule
    text: str
    is_temporary: bool = False

    @property
    def key(self) -> str:
        """The key of the policy that says so; "" if none does."""
        key = self.rule.replace("-", "_")
        return key if key in Policy.model_fields else ""


@dataclass(frozen=True)
class DataSet:
    """What the rules need to know of a data set."""

    name: str
    num_train: int
    num_val: int
    num_test: int

    @classmethod
    def of(cls, manifest: Manifest) -> "DataSet":
        """Return a data set's name and numbers of cases."""
        train, val, test = (len(manifest.in_split(split)) for split in ("train", "val", "test"))
        return cls(manifest.site, train, val, test)


def shown(value: object, most: int = LARGEST_SHOWN) -> str:
    """Return what somebody else wrote for a terminal: one line, no control characters, not too long."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value)[: most + 1])
    return text if len(text) <= most else text[: most - 1] + "…"


def references(job: Job) -> list[tuple[str, str]]:
    """Return every place of a job that can name code, with what it names: any string with a colon.

    Guarantee: no string that ``resolve_reference`` would import is left out, wherever in the job it stands,
    but for the texts of ``FREE_TEXT``, which nothing imports.
    """
    return [
        (place, text)
        for place, text in _strings(job.public().model_dump(mode="json"), "")
        if ":" in text and place not in FREE_TEXT
    ]


def _strings(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(inner, f"{place}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, place)


def check(
    policy: Policy,
    job: Job,
    charter: Charter | None,
    roster: Roster | None,
    manifest: Manifest | DataSet,
    now: datetime,
    *,
    governance: bytes | None = None,
) -> list[Finding]:
    """Return in what a job breaks a policy, what is temporary last; nothing if it may run.

    Args:
        policy: The site's.
        job: The public part of the job, as it was sent.
        charter: Of the job, its signature verified; None without secure aggregation.
        roster: That of the charter, its signature verified.
        manifest: The data set that the job would run on.
        now: With its time zone.
        governance: The key that signed charter and roster, 32 bytes.

    Raises:
        ValueError: ``now`` has no time zone.
    """
    data = DataSet.of(manifest) if isinstance(manifest, Manifest) else manifest
    found = [*_documents(policy, job, charter, roster, governance), *_code(policy, job)]
    found += [*_protection(policy, job, charter), *_limits(policy, job, charter, data)]
    if not is_open(policy, now):
        local = _local(policy, now)
        found.append(
            _finding(
                "hours",
                f"it is {DAYS[local.weekday()]} {local:%H:%M}",
                f"jobs run at {', '.join(policy.hours)}",
                is_temporary=True,
            )
        )
    return found


def is_open(policy: Policy, now: datetime) -> bool:
    """Whether ``hours`` let jobs run at a moment. In summer and winter time, the clock on the wall counts.

    Raises:
        ValueError: ``now`` has no time zone.
    """
    if now.tzinfo is None:
        raise ValueError("now must have a time zone")
    local = _local(policy, now)
    return not policy.hours or any(parse_span(text).holds(local) for text in policy.hours)


def _local(policy: Policy, now: datetime) -> datetime:
    return now.astimezone(zoneinfo.ZoneInfo(policy.time_zone) if policy.time_zone else None)


def _finding(rule: Rule, wants: str, allows: str, is_temporary: bool = False) -> Finding:
    key = rule.replace("-", "_")
    return Finding(
        rule, f"{wants}; at this site {allows} (`{key}` under [policy] in site.toml)", is_temporary
    )


def _words(words: tuple[str, ...]) -> str:
    return ", ".join(words) if words else "none"


def _documents(
    policy: Policy, job: Job, charter: Charter | None, roster: Roster | None, governance: bytes | None
) -> Iterator[Finding]:
    """Yield what is wrong with who signed what."""
    if charter is None and job.aggregation.secure:
        yield Finding("charter", "the job wants secure aggregation, but came without a signed charter")
    if charter is not None and charter.job != job.digest():
        yield Finding("charter", "the charter is that of another job")
    if charter is not None and (roster is None or charter.roster != roster.digest().hex()):
        yield Finding("charter", "the charter is for another roster")
    if policy.governance:
        names = set() if governance is None else {governance.hex(), fingerprint(governance).replace(" ", "")}
        if not names & set(policy.governance):
            by = "nobody" if governance is None else f"the key {fingerprint(governance)}"
            yield _finding("governance", f"the job is signed by {by}", "other signatures count")
    if policy.rosters and (roster is None or roster.digest().hex() not in policy.rosters):
        digest = "no roster" if roster is None else f"the roster {roster.digest().hex()}"
        yield _finding("rosters", f"the job is of {digest}", "only listed rosters may be used")


def _code(policy: Policy, job: Job) -> Iterator[Finding]:
    """Yield what the job would run and must not."""
    if job.task.kind not in policy.tasks:
        yield _finding("tasks", f"the task is {job.task.kind}", f"these may run: {_words(policy.tasks)}")
    if ":" not in job.model.name and job.model.name not in policy.models:
        yield _finding(
            "models", f"the network is {shown(job.model.name)}", f"these may run: {_words(policy.models)}"
        )
    unknown = [(place, text) for place, text in references(job) if text not in policy.callables]
    for place, text in unknown[:MOST_SHOWN]:
        yield _finding("callables", f"{shown(place)} names the code {shown(text)}", "it is not allowed")


def _protection(policy: Policy, job: Job, charter: Charter | None) -> Iterator[Finding]:
    """Yield what would leave the site and must not."""
    is_secure = job.aggregation.secure
    if policy.secure_only and not is_secure:
        yield _finding(
            "secure-only",
            "the job shows this site's own update to the server",
            "secure aggregation is a must",
        )
    if charter is not None and charter.level not in policy.levels:
        yield _finding(
            "levels",
            f"the level of secure aggregation is {charter.level}",
            f"allowed: {_words(policy.levels)}",
        )
    cohort = job.secure_aggregation.smallest_cohort
    if charter is not None:
        cohort = min(cohort, charter.smallest_cohort)
    if is_secure and cohort < policy.smallest_cohort:
        yield _finding(
            "smallest-cohort",
            f"the job adds up updates of as few as {cohort} sites",
            f"{policy.smallest_cohort} are the least",
        )
    if charter is not None:
        most = colluding_bound(len(charter.sites))
        least = most if policy.least_max_colluding == "auto" else min(policy.least_max_colluding, most)
        if charter.max_colluding < least:
            yield _finding(
                "least-max-colluding",
                f"the job hides updates from the server and {charter.max_colluding} sites that help it",
                f"{least} are the least",
            )
    by_site = "test" in job.secure_aggregation.release or not is_secure
    if charter is not None:
        by_site = by_site or "test_by_site" in charter.releases
    if by_site and not policy.release_test:
        yield _finding(
            "release-test",
            "the job releases this site's own sums of test statistics",
            "they must not be released",
        )
    noise = job.privacy.noise_multiplier if job.privacy.is_on else 0.0
    if noise < policy.least_noise_multiplier:
        yield _finding(
            "least-noise-multiplier",
            f"the job adds noise of {noise:g} clip norms",
            f"{policy.least_noise_multiplier:g} is the least",
        )


def _limits(policy: Policy, job: Job, charter: Charter | None, data: DataSet) -> Iterator[Finding]:
    """Yield what is too much: the job's own word or the charter's, whichever is larger."""
    if policy.datasets and data.name not in policy.datasets:
        yield _finding(
            "datasets",
            f"the job would run on the data set {shown(data.name)}",
            f"these may be used: {_words(policy.datasets)}",
        )
    clip_norm, rounds = job.aggregation.clip_norm, job.rounds
    if charter is not None:
        clip_norm, rounds = max(clip_norm, charter.clip_norm), max(rounds, charter.rounds)
        if charter.size > policy.largest_weights:
            yield _finding(
                "largest-weights",
                f"the model has {charter.size:,} weights",
                f"{policy.largest_weights:,} are the most",
            )
    if clip_norm > policy.largest_clip_norm:
        yield _finding(
            "largest-clip-norm",
            f"the clip norm is {clip_norm:g}",
            f"at most {policy.largest_clip_norm:g} may be",
        )
    if rounds > policy.largest_rounds:
        yield _finding(
            "largest-rounds", f"the job has {rounds} rounds", f"{policy.largest_rounds} are the most"
        )
    steps = num_steps(job, data.num_train)
    if steps > policy.largest_steps:
        yield _finding(
            "largest-steps",
            f"the job trains {steps:,} steps a round",
            f"{policy.largest_steps:,} are the most",
        )


def num_steps(job: Job, num_train: int) -> int:
    """Return the optimiser steps of a round, as ``fedvision.training.loop`` counts them; 10**18 for more."""
    if job.training.steps is not None:
        return job.training.steps
    assert job.training.epochs is not None, "the job file gives steps or epochs"
    return max(1, round(min(job.training.epochs * num_train / job.training.batch_size, 1e18)))
