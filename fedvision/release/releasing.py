"""A run made into a release: checked, described, signed, and written whole or not at all.

    FOLDER/
      model.safetensors   the run's, byte for byte
      card.json           the model card as data
      MODEL_CARD.md       the same for people
      bundle/             with --bundle: the model as a MONAI bundle
      manifest.json       SHA-256 of every file
      manifest.sig        its signature, if somebody signed

Rules:
- What fails before a release is complete leaves nothing behind.
- A folder that is there is never changed.
- A run with secure aggregation is released only if all checks of ``fedvision verify`` pass.
"""

import contextlib
import datetime
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvision.audit.membership import audit_folder
from fedvision.audit.verify import verify_run
from fedvision.errors import StorageError
from fedvision.release.audited import FILE_NAME, allowed, read_audit
from fedvision.release.bundle import check_bundle, write_bundle
from fedvision.release.card import USE, Card, Guarantee, Statement, card_of
from fedvision.release.signing import sha256_of, write_manifest
from fedvision.release.text import card_text
from fedvision.report.record import read_run
from fedvision.secagg.identity import Identity
from fedvision.storage import sync_folder, write_atomic, write_json, write_text

MODEL, CARD, CARD_TEXT, BUNDLE = "model.safetensors", "card.json", "MODEL_CARD.md", "bundle"
Watch = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Wishes:
    """What the user says about a release.

    Attributes:
        licence: Of the weights.
        intended_use: What the model is for.
        key: Who signs; None for nobody.
        governance: Name and key that must have signed roster and charter; None takes the run's own.
        audit: The audit's result; None for the run's own, if there is one.
        despite_audit: Why the model is released although its audit failed.
        with_bundle: Whether a MONAI bundle is written too.
    """

    licence: str = "not stated"
    intended_use: str = USE
    key: Identity | None = None
    governance: tuple[str, bytes] | None = None
    audit: Path | None = None
    despite_audit: str | None = None
    with_bundle: bool = False


def release_run(run: Path, out: Path, wishes: Wishes, guarantee: Guarantee | None, watch: Watch) -> Card:
    """Release the model of a finished run.

    Args:
        run: The run folder.
        out: The new folder.
        wishes: What the user says.
        guarantee: What training cost the patients; None where nothing was promised or it is not known.
        watch: Is told how far the checks are, see ``verify_run``.

    Returns:
        The card.

    Raises:
        ConfigError: This is no run folder, or the wishes contradict each other.
        ModelError: There is no bundle of such a model.
        StorageError: The run is not finished, the folder exists, or the disk is full.
        VerificationError: The run does not show what it claims, or the audit failed.
    """
    record = read_run(run)
    if record.test is None or not (run / MODEL).is_file():
        raise StorageError(f"{run} is not finished", f"go on with `fedvision simulate --resume {run}`")
    _refuse_existing(out)
    if wishes.with_bundle:
        check_bundle(record.job)
    digest = sha256_of(run / MODEL)
    statement = Statement(
        licence=wishes.licence,
        intended_use=wishes.intended_use,
        released=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model_sha256=digest,
        guarantee=guarantee,
        audit=_audit(run, wishes, digest),
        verification=_verified(run, wishes, watch) if is_secure(run, record.job.aggregation.secure) else None,
    )
    card = card_of(record, statement)
    with _whole(out) as folder:
        write_atomic(folder / MODEL, (run / MODEL).read_bytes())
        if sha256_of(folder / MODEL) != digest:
            raise StorageError(f"{run / MODEL} changed while it was released", "start again")
        write_json(folder / CARD, card)
        text = card_text(card)
        write_text(folder / CARD_TEXT, text)
        if wishes.with_bundle:
            description = f"{record.job.name}, trained by a federation; see docs/README.md"
            write_bundle(record.job, folder / MODEL, description, wishes.licence, text, folder / BUNDLE)
        write_manifest(folder, record.job.name, wishes.key)
    return card


def is_secure(run: Path, job_says: bool) -> bool:
    """Whether a run must be verified: a charter counts even where the job file was made to say otherwise."""
    return job_says or (run / "secagg" / "charter.json").exists()


def _audit(run: Path, wishes: Wishes, digest: str) -> dict[str, Any] | None:
    """Return what the card says of the audit, where the model may be released."""
    path = wishes.audit or audit_folder(run) / FILE_NAME
    there = wishes.audit is not None or path.exists()
    return allowed(read_audit(path, digest) if there else None, wishes.despite_audit, path)


def _verified(run: Path, wishes: Wishes, watch: Watch) -> dict[str, Any]:
    """Make the checks of ``fedvision verify``, and return what the card says of them."""
    found = verify_run(run, wishes.governance, watch)
    if found.failure is not None:
        raise found.failure
    said = found.to_json()
    keys = ("governance", "governance_pinned", "signatures", "checks", "proves", "does_not_prove")
    return {key: said[key] for key in keys}


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise StorageError(f"{out} exists, and a release is never overwritten", "choose another --out")


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Give a folder that becomes ``out`` when nothing went wrong, and is gone otherwise."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            yield work
            for folder in (work, *(path for path in work.rglob("*") if path.is_dir())):
                folder.chmod(0o755)
                sync_folder(folder)
            _refuse_existing(out)
            work.rename(out)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        sync_folder(out.parent)
    except OSError as error:
        raise StorageError(
            f"cannot write {out}: {(error.strerror or str(error)).lower()}", "choose another --out"
        ) from None
