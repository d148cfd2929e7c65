"""The arithmetic of a run done again from its sums: initial weights, every step, the best model, the files.

Nobody's word is taken here but that of the sums: the initial weights come from the job's seed, each sum must
be of exactly the model that the sums before it make, and the files must be those that the server's own code
writes of the result, byte for byte. The record's numbers must follow from the sums, too.
"""

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedvision.audit.claims import Claims
from fedvision.audit.sums import Key, SignedSum, file_name, hides_test
from fedvision.config import Job
from fedvision.errors import MessageError, StorageError, VerificationError
from fedvision.secagg.encoding import DecodedSum, decode_statistics
from fedvision.secagg.schedule import Consortium
from fedvision.storage import load_tensors
from fedvision.tasks import task_module
from fedvision.training.evaluation import judgement_size, split_judgement
from fedvision.updates.clipping import l2_norm
from fedvision.updates.layout import FloatVector, Layout, model_digest

if TYPE_CHECKING:
    from fedvision_server.jobs import RunState

Sums = Mapping[Key, SignedSum]
Watch = Callable[[str, int, int], None]
_CLOSE = 1e-9


@dataclass(frozen=True)
class Replayed:
    """Where the sums lead.

    Attributes:
        last: The state after the last round.
        best: The state after the round whose model is kept.
    """

    last: "RunState" = field(repr=False)
    best: "RunState" = field(repr=False)


def check_initial_weights(claims: Claims, consortium: Consortium, weights: FloatVector) -> None:
    """Check that the job's seed gives the weights that the charter names.

    Raises:
        VerificationError: It gives others here.
    """
    if model_digest(weights).hex() != consortium.charter.initial_weights:
        raise VerificationError(
            claims.secagg / "charter.json",
            "initial-weights",
            "the job's seed gives other initial weights on this machine",
            "environment.json names the versions that made the run: another PyTorch may draw other weights",
        )


def replay(
    claims: Claims, consortium: Consortium, sums: Sums, weights: FloatVector, watch: Watch
) -> Replayed:
    """Return the state that the sums make of the initial weights, after every step was checked.

    Args:
        claims: The run.
        consortium: Roster and charter.
        sums: All sums, checked, with their values.
        weights: The initial weights, checked.
        watch: Is told a sum's name, how many rounds are done, and how many there are.

    Raises:
        VerificationError: A sum is of another model, or the record's numbers do not follow from it.
    """
    from fedvision_server.aggregate import server_step
    from fedvision_server.jobs import RunState, advance
    from fedvision_server.round import lower

    state = RunState(0, weights)
    best = state
    for number in range(1, claims.last_round + 1):
        watch(file_name(("train", number)), number - 1, claims.last_round)
        if number in claims.thrown_away:
            if ("train", number) in sums:
                _must_fail(claims, _decoded, consortium, sums["train", number], state.weights)
            state = replace(state, round=number)
            continue
        if number not in claims.rounds:
            raise VerificationError(claims.record, "record", f"nothing about round {number}")
        decoded = _decoded(consortium, sums["train", number], state.weights)
        following, moments = server_step(state, decoded.mean_update, claims.job)
        judged = sums.get(("validate", number))
        validation = None
        if judged is not None and number in claims.not_judged:
            _must_fail(claims, _judged, claims.job, judged, following)
        elif judged is not None:
            validation = _judged(claims.job, judged, following)
        headline = task_module(claims.job).HEADLINE
        value = None if validation is None else validation["mean_site"].get(headline)
        value = lower(value, claims.rounds[number].get("root_score"))
        state = advance(state, following, value, moments)
        best = state if state.best_round == number else best
        _check_round(claims, consortium, sums["train", number], state, decoded, validation)
    return Replayed(state, best if state.best_round else state)


def _decoded(consortium: Consortium, found: SignedSum, weights: FloatVector) -> DecodedSum:
    """Return what a training sum says, which must be made from ``weights``."""
    _of_model(found, weights)
    try:
        return consortium.encoding.decode(found.total(), found.num_checked)
    except MessageError as error:
        raise VerificationError(found.sum_path, "encoding", str(error)) from None


def _must_fail(
    claims: Claims, read: Callable[[Any, SignedSum, FloatVector], object], *arguments: Any
) -> None:
    """Check that a sum was put aside for a reason: nothing can be read from it."""
    try:
        read(*arguments)
    except VerificationError as error:
        if error.rule == "encoding":
            return
        raise
    path = arguments[1].path
    raise VerificationError(claims.record, "record", f"this sum was not used, but it is good: {path}")


def _of_model(found: SignedSum, weights: FloatVector) -> None:
    if found.checked.model != model_digest(weights):
        raise VerificationError(
            found.path, "model", "this sum is of another model than the sums before it make"
        )


def _judged(job: Job, found: SignedSum, weights: FloatVector) -> dict[str, Any]:
    """Return what a sum of statistics says of a model: mean over sites, and pooled."""
    _of_model(found, weights)
    is_final = found.transcript.session.purpose == "test"
    num_rows = 1 + (job.evaluation.bootstrap if is_final else 0)
    try:
        values = decode_statistics(found.total(), (judgement_size(num_rows, job, is_final),))
    except MessageError as error:
        raise VerificationError(found.sum_path, "encoding", str(error)) from None
    statistics, means = split_judgement(values, num_rows, job, is_final)
    return {"mean_site": means[0], "pooled": task_module(job).metrics(statistics[0], job)}


def _check_round(
    claims: Claims,
    consortium: Consortium,
    found: SignedSum,
    state: "RunState",
    decoded: DecodedSum,
    validation: dict[str, Any] | None,
) -> None:
    """Check that the record's numbers of a round are those of its sums."""
    record = claims.rounds[state.round]
    level = consortium.charter.level
    told = record.get("validation") or {}
    loss = None if claims.job.privacy.is_on else decoded.metrics[0]
    for name, theirs, ours in (
        ("num_sites", record.get("num_sites"), len(found.checked.accepted)),
        ("level", record.get("level"), level),
        ("is_best", record.get("is_best"), state.best_round == state.round),
        ("update_norm", record.get("update_norm"), l2_norm(decoded.mean_update.astype(np.float32))),
        ("train_loss", record.get("train_loss"), loss),
        ("mean_site", told.get("mean_site"), (validation or {}).get("mean_site")),
        ("pooled", told.get("pooled"), (validation or {}).get("pooled")),
    ):
        if not agree(theirs, ours):
            raise VerificationError(
                claims.record, "record", f"{name} of round {state.round} does not follow from the sums"
            )


def agree(told: Any, found: Any) -> bool:
    """Whether a value of the record is the computed one; null stands for what is undefined."""
    if isinstance(told, dict) and isinstance(found, dict):
        return told.keys() == found.keys() and all(agree(told[name], found[name]) for name in told)
    if isinstance(found, float):
        if told is None or isinstance(told, bool) or not isinstance(told, int | float):
            return told is None and not math.isfinite(found)
        return math.isclose(told, found, rel_tol=_CLOSE, abs_tol=1e-12)
    return type(told) is type(found) and told == found


def check_files(claims: Claims, layout: Layout, found: Replayed) -> int:
    """Check that checkpoints and model are the bytes that the server's code writes of the replayed states.

    Returns:
        How many files were compared.

    Raises:
        VerificationError: A file differs, is missing, or should not be there.
    """
    from fedvision_server.jobs import RunFolder

    with tempfile.TemporaryDirectory(prefix="fedvision-verify-") as scratch:
        again = RunFolder(Path(scratch), claims.job, layout)
        if found.best.round:
            again.save(found.best)
        if found.last.round:
            again.save(found.last)
        if claims.is_finished and not claims.is_repaired:
            again.save_model(found.best)
        ours = {path.relative_to(scratch) for path in Path(scratch).rglob("*") if path.is_file()}
        theirs = {Path("checkpoints") / path.name for path in (claims.folder / "checkpoints").glob("[!.]*")}
        for name in sorted(theirs - ours):
            raise VerificationError(claims.folder / name, "record", "not the last checkpoint, nor the best")
        for name in sorted(ours):
            _same_file(claims.folder / name, Path(scratch) / name)
    if claims.is_finished and (claims.test or {}).get("round") != found.best.round:
        raise VerificationError(claims.folder / "test.json", "best-round", "`round` is not the best round")
    return len(ours)


def released_weights(claims: Claims, layout: Layout, found: Replayed) -> FloatVector:
    """Return the weights of the released model: of the best round, or what the repair made of them.

    Raises:
        VerificationError: The model's file is absent or damaged.
    """
    if not claims.is_repaired:
        return found.best.weights
    path = claims.folder / "model.safetensors"
    try:
        tensors, _ = load_tensors(path)
        return np.concatenate([np.asarray(tensors[name], np.float32).ravel() for name in layout.shapes])
    except (StorageError, KeyError, OSError):
        raise VerificationError(path, "format", "not a whole safetensors file of this network") from None


def _same_file(theirs: Path, ours: Path) -> None:
    try:
        if theirs.read_bytes() == ours.read_bytes():
            return
        tensors, metadata = load_tensors(theirs)
    except FileNotFoundError:
        raise VerificationError(theirs, "absent", "no such file") from None
    except (OSError, StorageError):
        raise VerificationError(theirs, "format", "not a whole safetensors file") from None
    expected, expected_metadata = load_tensors(ours)
    if tensors.keys() != expected.keys():
        raise VerificationError(theirs, "model", "other tensors than the network has")
    for name, values in expected.items():
        if values.dtype != tensors[name].dtype or values.tobytes() != tensors[name].tobytes():
            raise VerificationError(theirs, "model", f"tensor {name} is not what the sums make")
    if metadata != expected_metadata:
        raise VerificationError(theirs, "metadata", "the metadata are not those of the replayed run")
    raise VerificationError(
        theirs, "spelling", "the same numbers, but other bytes than fedvision writes for them",
        "somebody wrote the file again, or another version of safetensors did",
    )  # fmt: skip


def check_hidden_test(claims: Claims, sums: Sums, best: FloatVector) -> None:
    """Check the final result where sites released none of their own: it follows from one sum.

    Raises:
        VerificationError: It does not.
    """
    test = claims.test or {}
    if not hides_test(claims):
        return
    found = next(item for (purpose, _), item in sums.items() if purpose == "test")
    judged = _judged(claims.job, found, best)
    told = {"mean_site": test.get("mean_site"), "pooled": (test.get("pooled") or {}).get("metrics")}
    for name, value in told.items():
        if not agree(value, judged[name]):
            raise VerificationError(
                claims.folder / "test.json", "record", f"{name} does not follow from the sum of the test"
            )


def check_models_named(claims: Claims, sums: Sums, layout: Layout) -> int:
    """Check the stored models against the hashes that were signed, for a run that kept no sums.

    Returns:
        How many models were found among the hashes.

    Raises:
        VerificationError: A file holds another model than the one that was offered to the sites.
    """
    from fedvision_server.jobs import RunFolder

    folder = RunFolder(claims.folder, claims.job, layout)
    count = 0
    for path in sorted((claims.folder / "checkpoints").glob("[!.]*")):
        try:
            state = folder.load_round(int(path.stem.removeprefix("round-")))
        except (StorageError, ValueError) as error:
            raise VerificationError(path, "format", str(error).removeprefix(f"{path} ")) from None
        count += _is_named(path, state.weights, claims, sums, state.round)
    path = claims.folder / "model.safetensors"
    if claims.is_finished:
        try:
            tensors, _ = load_tensors(path)
            weights = np.concatenate([np.asarray(tensors[n], np.float32).ravel() for n in layout.shapes])
        except (StorageError, KeyError):
            raise VerificationError(path, "format", "not a whole safetensors file of this network") from None
        if not claims.is_repaired:  # a repaired model was never offered
            count += _is_named(path, weights, claims, sums, int((claims.test or {})["round"]))
    return count


def _is_named(path: Path, weights: FloatVector, claims: Claims, sums: Sums, number: int) -> bool:
    """Whether some sum names the model after round ``number``; if so it must be ``weights``."""
    keys: list[Key] = [("validate", number), ("train", number + 1)]
    offered = {sums[key].checked.model for key in keys if key in sums}
    if offered and offered != {model_digest(weights)}:
        raise VerificationError(path, "model", f"not the model that was offered after round {number}")
    return bool(offered)
