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
from dataclasses import dataclass, field
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
from fedvision.updates.layout import FloatVector, Layout, flatten, layout_of, model_digest

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


@dataclass
class _Run:
    """A run folder and what the checks have found in it; a later check builds on it.

    Attributes:
        claims: What the folder says about itself.
        key: Name and key of governance.
        watch: See ``verify_run``.
        layout: Of the job's networks.
        initial: The job's initial weights.
        documents: Roster and charter, once they hold.
        sums: All sums, once their transcripts hold.
        replayed: The rounds done again, once they hold.
        released: The weights that were released, once they hold.
    """

    claims: Claims
    key: tuple[str, bytes]
    watch: Watch
    layout: Layout
    initial: FloatVector = field(repr=False)
    documents: Consortium | None = None
    sums: dict[Key, SignedSum] = field(default_factory=dict)
    replayed: Replayed | None = None
    released: FloatVector | None = field(default=None, repr=False)

    @property
    def consortium(self) -> Consortium:
        """Roster and charter; only for checks that need them to hold."""
        assert self.documents is not None
        return self.documents


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
    run = _open_run(claims, governance or _own_key(claims), watch)
    checks = _Checks()
    signed = checks.run("roster and charter", lambda: _check_documents(run))
    summed = checks.run("sums", lambda: _check_sums(run), signed)
    if claims.job.secure_aggregation.keep_sums:
        stepped = checks.run("arithmetic", lambda: _check_arithmetic(run), summed)
        checks.run("files", lambda: _check_files(run), stepped)
    else:
        checks.run("arithmetic", lambda: "", False, "keep_sums = false: only signatures can be checked")
        checks.run("files", lambda: _check_models_named(run), summed)
    checks.run("rules", lambda: check_judgements(claims, run.consortium, run.sums), summed)
    num_signatures = 2 * signed + sum(item.checked.num_signatures for item in run.sums.values())
    num_signatures += _check_evidence(checks, run, signed)
    num_signatures += _check_sites(checks, run, summed)
    return _result(run, checks, governance is not None, num_signatures)


def _open_run(claims: Claims, key: tuple[str, bytes], watch: Watch) -> _Run:
    """Draw the job's initial weights; nothing of the run is checked yet."""
    network = initial_network(claims.job)
    layout = layout_of(network, local_names(network, claims.job))
    return _Run(claims, key, watch, layout, flatten(network, layout))


def _check_documents(run: _Run) -> str:
    """Check the signatures of governance, and the charter against the job."""
    run.documents = load_consortium(run.claims, run.key[1])
    check_charter_of_job(run.claims, run.documents, run.layout)
    charter = run.documents.charter
    return (
        f"signed by {run.key[0]}; {len(charter.sites)} sites enrolled, level {charter.level}, "
        f"threshold {charter.threshold}, smallest cohort {charter.smallest_cohort}"
    )


def _check_sums(run: _Run) -> str:
    """Check every transcript, and every stored sum against it."""
    run.sums.update(check_sums(run.claims, run.consortium, run.watch))
    return _sums_text(run.claims, run.sums)


def _check_arithmetic(run: _Run) -> str:
    """Go from the initial weights over every sum to the released model."""
    claims = run.claims
    check_initial_weights(claims, run.consortium, run.initial)
    run.replayed = replay(claims, run.consortium, run.sums, run.initial, run.watch)
    run.released = released_weights(claims, run.layout, run.replayed)
    check_hidden_test(claims, run.sums, run.released)
    count = claims.last_round - len(claims.thrown_away)
    return (
        f"{count} {'round' if count == 1 else 'rounds'} done again from the initial weights; "
        "every sum is of the model before it, and the record's numbers follow"
    )


def _check_files(run: _Run) -> str:
    """Compare checkpoints and model with what the sums made, byte for byte."""
    claims = run.claims
    assert run.replayed is not None
    count = check_files(claims, run.layout, run.replayed)
    what = f"model.safetensors is that of round {run.replayed.best.round}"
    if claims.is_repaired:
        what = "model.safetensors was repaired on the root set after the last round, see repair.json"
    return f"{count} files compared byte for byte; {what if claims.is_finished else 'no model yet'}"


def _check_models_named(run: _Run) -> str:
    """Without stored sums: compare the stored models with the hashes that were signed."""
    check_initial_weights(run.claims, run.consortium, run.initial)
    count = check_models_named(run.claims, run.sums, run.layout)
    return f"{count} stored models are those whose hashes the server signed; their making is not checked"


def _result(run: _Run, checks: _Checks, is_pinned: bool, num_signatures: int) -> Verification:
    """Put the result together; what it proves is said only if nothing failed."""
    failure = checks.failures[0] if checks.failures else None
    meaning = Meaning(run.claims, run.consortium, run.key[0], is_pinned) if failure is None else None
    return Verification(
        run.claims.folder,
        f"{run.key[0]} {fingerprint(run.key[1])}",
        is_pinned,
        run.documents.charter.level if run.documents else "",
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


def _check_evidence(checks: _Checks, run: _Run, signed: bool) -> int:
    """Check the evidence; return how many signatures were verified."""
    counted = [0]

    def evidence() -> str:
        items = check_evidence(run.claims, run.consortium)
        counted[0] = sum(item.num_signatures for item in items)
        said = [f"{item.site} ({item.rule}{'' if item.is_shown else ', signatures only'})" for item in items]
        return f"against {', '.join(said)}" if said else "nobody was expelled"

    checks.run("evidence", evidence, signed)
    return counted[0]


def _check_sites(checks: _Checks, run: _Run, summed: bool) -> int:
    """Check the sites' folders; return how many signatures were verified."""
    counted = [0]
    if not any((run.claims.folder / "sites").glob("*/secagg")):
        checks.run("sites' folders", lambda: "", False, "not here")
        return 0
    best = None if run.released is None else model_digest(run.released)

    def folders() -> str:
        items = check_site_files(run.claims, run.consortium, run.sums, best)
        if items is None:
            return "none of an enrolled site"
        counted[0] = items.num_signatures
        text = f"{len(items.sites)} sites enrolled under the same roster, charter and keys"
        if items.num_sessions:
            text += f"; {items.num_sessions} saw the last sum as its transcript has it"
        return text + (f"; their inputs add up to {items.summed}" if items.summed else "")

    checks.run("sites' folders", folders, summed)
    return counted[0]
