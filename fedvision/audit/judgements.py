"""Whom the rules left out, checked again: each judgement from the numbers that the server measured.

What the server measured at level ``gram``, only it has seen; at level ``sketch`` it follows from the sketches
in the transcript. That a judgement is the one that the sites were shown, its signature says.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedvision.audit.claims import Claims
from fedvision.audit.sums import SignedSum
from fedvision.defence.judge import Judgement
from fedvision.errors import DefenceError, StorageError, VerificationError
from fedvision.secagg.attempt import Measured
from fedvision.secagg.gram import products_in_the_clear
from fedvision.secagg.messages import SERVER, Accepted, Purpose, Sketch
from fedvision.secagg.schedule import Consortium, read_signed

_CLOSE = 1e-4
"""Relative: another machine's linear algebra may differ in the last of the six digits that are written."""


def check_judgements(
    claims: Claims, consortium: Consortium, sums: Mapping[tuple[Purpose, int], SignedSum]
) -> str:
    """Check every judgement of a run; return what was found, in words.

    Raises:
        VerificationError: A judgement is absent, is not the signed one, or does not follow from its numbers.
    """
    from fedvision_server.defence import Defence

    if not consortium.charter.rules:
        return "the charter names no rules"
    defence = Defence(claims.secagg, consortium.charter, consortium.encoding)
    left_out: dict[int, int] = {}
    numbers = sorted(number for purpose, number in sums if purpose == "train")
    for number in numbers:
        found = sums["train", number]
        accepted = read_signed(consortium, found.transcript.accepted, Accepted, SERVER)
        path = claims.secagg / "judgements" / f"train-{number:04d}.json"
        try:
            measured, judgement = defence.read(number)
            again = defence.judge(number, measured)
        except (StorageError, DefenceError) as error:
            raise VerificationError(path, "judgement", str(error).removeprefix(f"{path} ")) from None
        told = json.loads(accepted.judgement or b"null")
        if told != judgement.to_json():
            raise VerificationError(path, "judgement", "not the judgement that the server signed and showed")
        by_rules = tuple(item.site for item in accepted.excluded if item.reason == "by the rules")
        if by_rules != judgement.excluded:
            raise VerificationError(
                found.path, "judgement", "the sites left out are not those of the judgement"
            )
        _same(path, judgement, again)
        if found.checked.level == "sketch":
            _check_gram(path, consortium, found, measured)
        for site in judgement.excluded:
            left_out[site] = left_out.get(site, 0) + 1
    names = {number: consortium.roster.member(number).name for number in left_out}
    said = ", ".join(f"{names[site]} in {count}" for site, count in sorted(left_out.items()))
    rules = ", ".join(consortium.charter.rules)
    return f"{len(numbers)} rounds judged again by {rules}; left out: {said or 'nobody'}"


def _same(path: Path, told: Judgement, again: Judgement) -> None:
    """Refuse a judgement that differs from the one made again, but for the last digits."""
    if told.excluded != again.excluded or not _agree(told.to_json(), again.to_json()):
        raise VerificationError(path, "judgement", "the rules do not say this of these numbers")


def _agree(told: Any, again: Any) -> bool:
    if isinstance(told, dict) and isinstance(again, dict):
        return told.keys() == again.keys() and all(
            key == "reason" or _agree(told[key], again[key]) for key in told
        )
    if isinstance(told, list) and isinstance(again, list):
        return len(told) == len(again) and all(map(_agree, told, again))
    if isinstance(told, float) or isinstance(again, float):
        return math.isclose(told, again, rel_tol=_CLOSE, abs_tol=_CLOSE)
    return bool(told == again)


def _check_gram(path: Path, consortium: Consortium, found: SignedSum, measured: Measured) -> None:
    """Check inner products against the sketches that the sites signed."""
    encoding, rows, betas = consortium.encoding, {}, set()
    for entry in found.transcript.sketches:
        sketch = read_signed(consortium, entry, Sketch)
        if sketch.values:
            rows[entry.sender] = np.frombuffer(sketch.values, "<u4").astype(np.uint32)
            betas.add(sketch.beta)
    if not set(measured.sites) <= rows.keys() or len(betas) != 1:
        raise VerificationError(path, "judgement", "a site was judged that sent no sketch")
    stacked = [rows[site] for site in measured.sites]
    nothing, beta = np.zeros(0, np.int64), betas.pop()
    gram, _ = products_in_the_clear(stacked, nothing, encoding.length, beta, encoding.norm_bound)
    if not np.array_equal(gram, measured.gram):
        raise VerificationError(path, "judgement", "the inner products are not those of the signed sketches")
