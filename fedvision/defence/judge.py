"""One round's judgement: which sites are left out of the sum, and why, in numbers that can be checked again.

Rules:
- Quarantined sites are left out without being judged, as far as that many may be left out.
- The rules come in their order. What one finds outside is not there for the next, up to the number of sites
  that may attack together: a few long or reversed updates cannot turn the next rule's view of the others.
- A site is outside if a rule's score is above its limit, or the mean of its scores over rounds is above the
  tighter limit for means.
- At most so many sites are left out as the protocol can do without; the worst ones. The others that are
  outside stay in the sum, and the judgement says so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedvision.defence.evidence import STEADY_ROUNDS, Level, Past, Record, finite, level
from fedvision.defence.geometry import Geometry, rounded
from fedvision.defence.rules import (
    REPEATED,
    RULES,
    Finding,
    centre_cosines,
    least_sites,
    num_attackers,
    typical_norm,
)
from fedvision.errors import DefenceError

LONGEST_REASON = 120


@dataclass(frozen=True)
class SiteJudgement:
    """What is said of one site. Numbers have six digits, and are compared as they are written.

    Attributes:
        site: Its number.
        norm: Of its update, in clip norms.
        cosine: With the sum of the other sites' updates, those in quarantine left out; 0 in quarantine.
        root_cosine: With the root set's update; None without one.
        scores: One for each rule of the judgement; None where the site was outside by an earlier rule or in
            quarantine.
        means: Mean of the scores over rounds, one for each rule; None for a rule without such a mean.
        is_excluded: Whether it is left out of the sum.
        reason: Why, or why not although it is outside; at most 120 ASCII characters; empty if nothing.
        momentum: Moving mean of whether the site was outside.
        standing: good, warned or quarantined, after this round.
    """

    site: int
    norm: float
    cosine: float
    root_cosine: float | None
    scores: tuple[float | None, ...]
    means: tuple[float | None, ...]
    is_excluded: bool
    reason: str
    momentum: float
    standing: Level


@dataclass(frozen=True)
class Judgement:
    """What is said of a round.

    Attributes:
        rules: Names, in the order applied.
        limits: Of a single score, one for each rule.
        mean_limits: Of the mean of scores over rounds, one for each rule; None for a rule without.
        sites: In the order of the geometry.
        past: The evidence after this round, for the next.
    """

    rules: tuple[str, ...]
    limits: tuple[float, ...]
    mean_limits: tuple[float | None, ...]
    sites: tuple[SiteJudgement, ...]
    past: Past

    @property
    def excluded(self) -> tuple[int, ...]:
        """Numbers of the sites that are left out, in order."""
        return tuple(sorted(site.site for site in self.sites if site.is_excluded))

    @property
    def accepted(self) -> tuple[int, ...]:
        """Numbers of the sites that are in the sum, in order."""
        return tuple(sorted(site.site for site in self.sites if not site.is_excluded))

    def to_json(self) -> dict[str, Any]:
        """Return what ``from_json`` reads: plain objects, same judgement, same text."""
        return {
            "rules": list(self.rules),
            "limits": list(self.limits),
            "mean_limits": list(self.mean_limits),
            "sites": [
                {
                    "site": site.site,
                    "norm": site.norm,
                    "cosine": site.cosine,
                    "root_cosine": site.root_cosine,
                    "scores": list(site.scores),
                    "means": list(site.means),
                    "excluded": site.is_excluded,
                    "reason": site.reason,
                    "momentum": site.momentum,
                    "standing": site.standing,
                }
                for site in self.sites
            ],
            "past": self.past.to_json(),
        }

    @staticmethod
    def from_json(content: object) -> "Judgement":
        """Read a judgement.

        Raises:
            DefenceError: It is not one.
        """
        whole = _fields(content, {"rules", "limits", "mean_limits", "sites", "past"}, "a judgement")
        rules, sites = whole["rules"], whole["sites"]
        if not (isinstance(rules, list) and all(isinstance(rule, str) and rule in RULES for rule in rules)):
            raise DefenceError("a judgement must name known rules")
        if not isinstance(sites, list):
            raise DefenceError("a judgement must have a list of sites")
        limits = _numbers(whole["limits"], len(rules))
        if any(limit is None for limit in limits):
            raise DefenceError("a judgement must have a limit for each rule")
        return Judgement(
            tuple(rules),
            tuple(limit for limit in limits if limit is not None),
            _numbers(whole["mean_limits"], len(rules)),
            tuple(_site(site, len(rules)) for site in sites),
            Past.from_json(whole["past"]),
        )


def judge(
    geometry: Geometry,
    rules: Sequence[str],
    max_malicious: float,
    most_excluded: int,
    past: Past | None = None,
) -> Judgement:
    """Say which sites are left out of a round's sum.

    A pure function: the same arguments give the same judgement, number for number.

    Guarantee: at most ``most_excluded`` sites are left out, those in quarantine first, then the worst.

    Args:
        geometry: Of the updates.
        rules: Names out of ``RULES``; none accepts every site that is not in quarantine.
        max_malicious: Share of the sites that may attack together, 0..0.45.
        most_excluded: Number of sites that may be left out, less than the sites of the round.
        past: Evidence of earlier rounds; None for none.

    Raises:
        DefenceError: A rule is unknown or needs more sites or a root set.
    """
    past = past or Past()
    size = len(geometry.sites)
    if not 0 <= most_excluded < size:
        raise ValueError(f"most_excluded must be in 0..{size - 1}, got {most_excluded}")
    for rule in rules:
        _check_rule(rule, size, max_malicious)
    held = _held(geometry, past, most_excluded)
    rows = [row for row in range(size) if row not in held]
    records = {row: past.of(geometry.sites[row]) for row in rows}
    found = _apply(geometry, rules, max_malicious, rows, records)
    badness = {row: max((_ratio(f, row, records[row]) for f in found), default=0.0) for row in rows}
    outside = sorted((row for row in rows if badness[row] > 1), key=lambda row: (-badness[row], row))
    excluded = held | set(outside[: most_excluded - len(held)])
    records = {row: record.after_round(badness[row] > 1) for row, record in records.items()}
    cosine = dict(zip(rows, centre_cosines(geometry.part(rows))[0], strict=True))
    root = None if geometry.root is None else geometry.root_cosines()
    judged = []
    for row, site in enumerate(geometry.sites):
        record = records.get(row, past.of(site))
        is_held = row in held
        judged.append(
            SiteJudgement(
                site=site,
                norm=rounded(geometry.norms[row]),
                cosine=rounded(cosine.get(row, 0.0)),
                root_cosine=None if root is None else rounded(root[row]),
                scores=tuple(f.scores.get(row) for f in found),
                means=tuple(_mean(f, record) for f in found),
                is_excluded=row in excluded,
                reason=_reason(found, row, record, is_held, row in excluded, most_excluded),
                momentum=record.momentum,
                standing=record.standing,
            )
        )
    return Judgement(
        tuple(rules),
        tuple(f.limit for f in found),
        tuple(f.mean_limit for f in found),
        tuple(judged),
        past.updated({geometry.sites[row]: record for row, record in records.items()}),
    )


@dataclass(frozen=True)
class _Applied:
    """A rule's finding by row of the round's geometry."""

    rule: str
    scores: dict[int, float]
    limit: float
    mean_limit: float | None


def _check_rule(rule: str, size: int, max_malicious: float) -> None:
    if rule not in RULES:
        raise DefenceError(f"there is no rule {rule!r}", f"rules are {', '.join(RULES)}")
    least = least_sites(rule, size, max_malicious)
    if size < least:
        raise DefenceError(
            f"rule {rule} needs {least} sites in a round, got {size}",
            "use fewer rules (defence.rules) or more sites",
        )


def _held(geometry: Geometry, past: Past, most_excluded: int) -> set[int]:
    """Return the rows of quarantined sites that can be left out, those with the most momentum first."""
    rows = [row for row, site in enumerate(geometry.sites) if past.of(site).standing == "quarantined"]
    rows.sort(key=lambda row: (-past.of(geometry.sites[row]).momentum, row))
    return set(rows[:most_excluded])


def _apply(
    geometry: Geometry,
    rules: Sequence[str],
    max_malicious: float,
    rows: Sequence[int],
    records: dict[int, Record],
) -> list[_Applied]:
    """Apply the rules in order, each to what the ones before left; add the scores to the records."""
    found: list[_Applied] = []
    left, gone = list(rows), 0
    most_gone = num_attackers(len(rows), max_malicious)
    for rule in rules:
        # After many were taken out, too few may be left to compare: then the rule sees all.
        judged = left if _is_enough(rule, left, max_malicious) else list(rows)
        before = dict(records)
        scores: dict[int, float] = {}
        while True:
            finding = _finding(rule, geometry, judged, max_malicious)
            scores.update((row, float(score)) for row, score in zip(judged, finding.scores, strict=True))
            limit = finding.steady_limit
            applied = _Applied(rule, scores, finding.limit, limit if math.isfinite(limit) else None)
            if applied.mean_limit is not None and judged:
                weight = typical_norm(geometry.part(judged))
                for row in judged:
                    records[row] = before[row].with_score(rule, scores[row], weight)
            ratios = {row: _ratio(applied, row, records[row]) for row in judged}
            worst = sorted((row for row in judged if ratios[row] > 1), key=lambda row: (-ratios[row], row))
            worst = [row for row in worst if row in left][: most_gone - gone]
            is_last = rule not in REPEATED or not worst
            worst = worst if is_last else worst[:1]
            gone += len(worst)
            left = [row for row in left if row not in worst]
            if is_last or not _is_enough(rule, left, max_malicious):
                break
            judged = [row for row in judged if row not in worst]
        found.append(applied)
    return found


def _is_enough(rule: str, rows: Sequence[int], max_malicious: float) -> bool:
    return len(rows) >= least_sites(rule, len(rows), max_malicious)


def _finding(rule: str, geometry: Geometry, rows: Sequence[int], max_malicious: float) -> Finding:
    """Apply a rule to some rows; where quarantine left too few to compare, nobody is outside."""
    if not _is_enough(rule, rows, max_malicious):
        return Finding(rule, np.zeros(len(rows)), 1.0, np.zeros(len(rows), np.bool_))
    return RULES[rule](geometry.part(rows), max_malicious)


def _mean(applied: _Applied, record: Record) -> float | None:
    return None if applied.mean_limit is None else record.mean(applied.rule).value


def _ratio(applied: _Applied, row: int, record: Record) -> float:
    """Return a site's score in limits, or the mean of its scores in limits of means if that is more."""
    if row not in applied.scores:
        return 0.0
    ratio = applied.scores[row] / applied.limit
    mean = record.mean(applied.rule)
    if applied.mean_limit is not None and mean.rounds >= STEADY_ROUNDS:
        ratio = max(ratio, mean.value / applied.mean_limit)
    return ratio


def _reason(
    found: Sequence[_Applied], row: int, record: Record, is_held: bool, is_excluded: bool, most_excluded: int
) -> str:
    if is_held:
        return f"in quarantine, outside in {record.num_outside} of {record.num_rounds} rounds"
    parts = []
    for applied in found:
        if _ratio(applied, row, record) <= 1:
            continue
        score, mean, limit = applied.scores[row], record.mean(applied.rule), applied.mean_limit
        if score > applied.limit or limit is None:
            parts.append(f"{applied.rule} {score:.3g} > {applied.limit:.3g}")
        else:
            parts.append(f"{applied.rule} {mean.value:.3g} > {limit:.3g} over {mean.rounds} rounds")
    if parts and not is_excluded:
        parts.insert(0, f"kept, at most {most_excluded} may be left out")
    return "; ".join(parts)[:LONGEST_REASON]


def _fields(content: object, names: set[str], what: str) -> dict[str, Any]:
    if not (isinstance(content, dict) and set(content) == names):
        raise DefenceError(f"{what} must have {', '.join(sorted(names))} and nothing else")
    return content


def _numbers(content: object, count: int) -> tuple[float | None, ...]:
    if not (isinstance(content, list) and len(content) == count):
        raise DefenceError("a judgement must have a number for each rule")
    return tuple(None if value is None else finite(value) for value in content)


def _site(content: object, num_rules: int) -> SiteJudgement:
    names = {
        "site", "norm", "cosine", "root_cosine", "scores", "means", "excluded", "reason", "momentum",
        "standing",
    }  # fmt: skip
    values = _fields(content, names, "a site's judgement")
    site, reason, root = values["site"], values["reason"], values["root_cosine"]
    if type(site) is not int or type(values["excluded"]) is not bool:
        raise DefenceError("a site's judgement must have a number and say whether it is excluded")
    if not (isinstance(reason, str) and len(reason) <= LONGEST_REASON and reason.isascii()):
        raise DefenceError(f"a reason must be at most {LONGEST_REASON} ASCII characters")
    return SiteJudgement(
        site=site,
        norm=finite(values["norm"]),
        cosine=finite(values["cosine"]),
        root_cosine=None if root is None else finite(root),
        scores=_numbers(values["scores"], num_rules),
        means=_numbers(values["means"], num_rules),
        is_excluded=values["excluded"],
        reason=reason,
        momentum=finite(values["momentum"]),
        standing=level(values["standing"]),
    )
