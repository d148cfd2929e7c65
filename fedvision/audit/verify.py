"""A finished run checked again from top to bottom, and in words what that proves and what it does not.

The checks, each a line of the result:

    roster and charter   signed by governance; the charter is of the run's job
    sums                 every transcript, and every stored sum against it
    arithmetic           from the initial weights over every sum to the released model
    files                checkpoints and model, byte for byte
    rules                each judgement on updates, from the numbers that the server measured
    evidence             against sites that were expelled
    sites' folders       what the sites themselves hold, where it lies here

A check that fails does not stop those that do not need it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedvision.audit.claims import Claims, read_claims
from fedvision.audit.evidence import check_evidence
from fedvision.audit.judgements import check_judgements
from fedvision.audit.meaning import Meaning
from fedvision.audit.replay import (
    Replayed,
    check_files,
    check_hidden_test,
    check_initial_weights,
    check_models_named,
    released_weights,
    replay,
)
from fedvision.audit.site_files import check_site_files
from fedvision.audit.sums import Key, SignedSum, check_charter_of_job, check_sums, load_consortium
from fedvision.errors import ConfigError, VerificationError
from fedvision.secagg.identity import fingerprint, parse_public
from fedvision.secagg.schedule import Consortium
from fedvision.tasks import initial_network, local_names
from fedvision.updates.layout import FloatVector, flatten, layout_of, model_digest

Status = Literal["passed", "failed", "not checked"]
Watch = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Check:
    """One line of the result.

    Attributes:
        name: What was checked.
        status: How it went.
        detail: What was found, in words.
        file: Of a failure: the file that shows it.
        rule: Of a failure: the rule that does not hold.
    """

    name: str
    status: Status
    detail: str
    file: str = ""
    rule: str = ""


@dataclass(frozen=True)
class Verification:
    """The result of all checks.

    Attributes:
        run: The run folder.
        governance: Name and fingerprint of the key that had to have signed.
        is_pinned: Whether the caller gave that key; else it is the run folder's own.
        level: Level of secure aggregation, "" if the charter does not hold.
        num_signatures: Signatures that were verified.
        checks: In the order in which they were made.
        proves: What follows if all passed.
        does_not_prove: What does not.
        failure: The first failure.
    """

    run: Path
    governance: str
    is_pinned: bool
    level: str
    num_signatures: int
    checks: tuple[Check, ...]
    proves: tuple[str, ...]
    does_not_prove: tuple[str, ...]
    failure: VerificationError | None

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        return {
            "run": str(self.run),
            "verified": self.failure is None,
            "governance": self.governance,
            "governance_pinned": self.is_pinned,
            "level": self.level,
            "signatures": self.num_signatures,
            "checks": [
                {"name": c.name, "status": c.status, "detail": c.detail, "file": c.file, "rule": c.rule}
                for c in self.checks
            ],
            "proves": list(self.proves),
            "does_not_prove": list(self.does_not_prove),
        }


class _Checks:
    """The lines made so far."""

    def __init__(self) -> None:
        self.made: list[Check] = []
        self.failures: list[VerificationError] = []

    def run(self, name: str, check: Callable[[], str], needs: bool = True, otherwise: str = "") -> bool:
        """Make a check whose function returns what it found; say whether it passed.

        Args:
            name: What is checked.
            check: Raises ``VerificationError`` if it does not hold.
            needs: Whether what it needs has passed.
            otherwise: Why it is not made, if not.
        """
        if not needs:
            self.made.append(Check(name, "not checked", otherwise or "needs a check above that failed"))
            return False
        try:
            self.made.append(Check(name, "passed", check()))
            return True
        except VerificationError as error:
            text = str(error).removeprefix(f"{error.file}: ")
            self.made.append(Check(name, "failed", text, error.file, error.rule))
            self.failures.append(error)
            return False


def verify_run(folder: Path, governance: tuple[str, bytes] | None, watch: Watch) -> Verification:
    """Check a run folder.

    Guarantee: if there is no failure and ``governance`` was given, roster and charter were signed by its
    owner, every listed sum has the signatures that the protocol asks for, and with stored sums
    ``model.safetensors`` is, byte for byte, what these sums make of the job's initial weights.

    Args:
        folder: The run folder.
        governance: Name and key that the caller trusts; None takes the run folder's own, which proves nothing
            about who signed.
        watch: Is told what is being checked, how many of it are done, and how many there are.

    Raises:
        ConfigError: This is no run folder, or one of a run without secure aggregation.
        StorageError: The record is damaged.
    """
    claims = read_claims(folder)
    key = governance or _own_key(claims)
    checks = _Checks()
    sums: dict[Key, SignedSum] = {}
    network = initial_network(claims.job)
    layout = layout_of(network, local_names(network, claims.job))
    weights = flatten(network, layout)
    del network
    found: list[Consortium] = []

    def documents() -> str:
        found.append(load_consortium(claims, key[1]))
        check_charter_of_job(claims, found[0], layout)
        charter = found[0].charter
        return (
            f"signed by {key[0]}; {len(charter.sites)} sites enrolled, level {charter.level}, "
            f"threshold {charter.threshold}, smallest cohort {charter.smallest_cohort}"
        )

    def transcripts() -> str:
        sums.update(check_sums(claims, found[0], watch))
        return _sums_text(claims, sums)

    signed = checks.run("roster and charter", documents)
    summed = checks.run("sums", transcripts, signed)
    has_sums = claims.job.secure_aggregation.keep_sums
    replayed: list[Replayed] = []
    released: list[FloatVector] = []
    if has_sums:

        def arithmetic() -> str:
            check_initial_weights(claims, found[0], weights)
            replayed.append(replay(claims, found[0], sums, weights, watch))
            released.append(released_weights(claims, layout, replayed[0]))
            check_hidden_test(claims, sums, released[0])
            count = claims.last_round - len(claims.thrown_away)
            return (
                f"{count} {'round' if count == 1 else 'rounds'} done again from the initial weights; "
                "every sum is of the model before it, and the record's numbers follow"
            )

        def files() -> str:
            count = check_files(claims, layout, replayed[0])
            what = f"model.safetensors is that of round {replayed[0].best.round}"
            if claims.is_repaired:
                what = "model.safetensors was repaired on the root set after the last round, see repair.json"
            return f"{count} files compared byte for byte; {what if claims.is_finished else 'no model yet'}"

        stepped = checks.run("arithmetic", arithmetic, summed)
        checks.run("files", files, stepped)
    else:

        def named() -> str:
            check_initial_weights(claims, found[0], weights)
            count = check_models_named(claims, sums, layout)
            return (
                f"{count} stored models are those whose hashes the server signed; their making is not checked"
            )

        checks.run("arithmetic", lambda: "", False, "keep_sums = false: only signatures can be checked")
        checks.run("files", named, summed)
    checks.run("rules", lambda: check_judgements(claims, found[0], sums), summed)
    evidence = _check_evidence(checks, claims, found, signed)
    best = model_digest(released[0]) if released else None
    sites = _check_sites(checks, claims, found, sums, summed, best)
    num_signatures = (
        2 * signed + sum(item.checked.num_signatures for item in sums.values()) + evidence + sites
    )
    failure = checks.failures[0] if checks.failures else None
    meaning = Meaning(claims, found[0], key[0], governance is not None) if failure is None else None
    return Verification(
        folder,
        f"{key[0]} {fingerprint(key[1])}",
        governance is not None,
        found[0].charter.level if found else "",
        num_signatures,
        tuple(checks.made),
        meaning.proves() if meaning else (),
        meaning.does_not_prove() if meaning else (),
        failure,
    )


def _own_key(claims: Claims) -> tuple[str, bytes]:
    path = claims.secagg / "governance.pub"
    try:
        return parse_public(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ConfigError, UnicodeDecodeError):
        raise VerificationError(
            path, "governance", "absent or damaged", "give the key that you trust: --governance GOV.pub"
        ) from None


def _sums_text(claims: Claims, sums: dict[Key, SignedSum]) -> str:
    """Say how many sums of which kind there are, and over how many sites."""
    parts = []
    for purpose, word in (("train", "training"), ("validate", "validation"), ("test", "test")):
        of = [item.checked for (kind, _), item in sums.items() if kind == purpose]
        if of:
            counts = sorted({len(item.accepted) for item in of})
            over = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
            parts.append(f"{len(of)} {word} over {over} sites")
    text = ", ".join(parts) or "none yet"
    if claims.thrown_away:
        text += f"; thrown away: round {', '.join(map(str, sorted(claims.thrown_away)))}"
    if sums and all(item.checked.sketch_fits for (kind, _), item in sums.items() if kind == "train"):
        text += "; training sums fit the sites' sketches"
    return text


def _check_evidence(checks: _Checks, claims: Claims, found: list[Consortium], signed: bool) -> int:
    """Check the evidence; return how many signatures were verified."""
    counted = [0]

    def evidence() -> str:
        items = check_evidence(claims, found[0])
        counted[0] = sum(item.num_signatures for item in items)
        said = [f"{item.site} ({item.rule}{'' if item.is_shown else ', signatures only'})" for item in items]
        return f"against {', '.join(said)}" if said else "nobody was expelled"

    checks.run("evidence", evidence, signed)
    return counted[0]


def _check_sites(
    checks: _Checks,
    claims: Claims,
    found: list[Consortium],
    sums: dict[Key, SignedSum],
    summed: bool,
    best: bytes | None,
) -> int:
    """Check the sites' folders; return how many signatures were verified."""
    counted = [0]
    if not any((claims.folder / "sites").glob("*/secagg")):
        checks.run("sites' folders", lambda: "", False, "not here")
        return 0

    def folders() -> str:
        items = check_site_files(claims, found[0], sums, best)
        if items is None:
            return "none of an enrolled site"
        counted[0] = items.num_signatures
        text = f"{len(items.sites)} sites enrolled under the same roster, charter and keys"
        if items.num_sessions:
            text += f"; {items.num_sessions} saw the last sum as its transcript has it"
        return text + (f"; their inputs add up to {items.summed}" if items.summed else "")

    checks.run("sites' folders", folders, summed)
    return counted[0]
