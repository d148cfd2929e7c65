"""What an audit of a model says, and whether the model may be released after it.

The file is JSON with ``format`` 1, ``verdict`` and ``attacks``. A verdict is "passed", or an object whose
``passed`` is true; anything else did not pass. ``model.sha256``, where it is there, must be this model's.
What else an audit may hold is its own business.
"""

from pathlib import Path
from typing import Any

from fedvision.errors import ConfigError, VerificationError
from fedvision.storage import read_json

FILE_NAME = "audit.json"
PASSED = "passed"


def read_audit(path: Path, model_sha256: str) -> dict[str, Any]:
    """Return the result of an audit.

    Raises:
        StorageError: The file is absent or not JSON.
        ConfigError: It is no audit, or one of another model.
    """
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != 1 or not isinstance(found.get("verdict"), dict):
        raise ConfigError(
            f"{path}: expected format 1 and a verdict", "an audit.json that `fedvision audit` wrote"
        )
    model, verdict, attacks = found.get("model"), found["verdict"], found.get("attacks")
    if not isinstance(model, dict) or model.get("sha256") != model_sha256:
        raise ConfigError(f"{path}: an audit of another model", "audit this run again")
    return {
        "verdict": PASSED if verdict.get("passed") is True else "failed",
        "reasons": _texts(verdict.get("reasons")),
        "notes": _texts(verdict.get("notes")),
        "limits": found.get("limits"),
        "attacks": [_without_curve(one) for one in attacks] if isinstance(attacks, list) else [],
        "released_despite": None,
    }


def _texts(found: Any) -> list[str]:
    return [str(one) for one in found] if isinstance(found, list) else []


def _without_curve(attack: Any) -> Any:
    """Return an attack without its ROC curve, which has a point for each patient."""
    if not isinstance(attack, dict):
        return attack
    return {key: value for key, value in attack.items() if key != "roc"}


def allowed(audit: dict[str, Any] | None, despite: str | None, path: Path) -> dict[str, Any] | None:
    """Return what the card says of the audit.

    Guarantee: an audit that did not pass is returned only with a reason, and the reason is in it.

    Args:
        audit: From ``read_audit``, None without one.
        despite: Why the model is released although it did not pass.
        path: What the error names.

    Raises:
        ConfigError: A reason is empty, or given where nothing failed.
        VerificationError: The audit did not pass, and there is no reason.
    """
    has_failed = audit is not None and audit["verdict"] != PASSED
    if despite is not None and (not has_failed or not despite.strip()):
        text = "needs a reason" if has_failed else "is for a model whose audit failed, and this one has none"
        raise ConfigError(f"--despite-audit {text}")
    if audit is None or not has_failed:
        return audit
    if despite is None:
        raise VerificationError(
            path,
            "audit",
            f"the model failed its audit, so it is not released{_because(audit)}",
            "--despite-audit REASON releases it all the same; the reason stands in the card",
        )
    return audit | {"released_despite": " ".join(despite.split())}


def _because(audit: dict[str, Any]) -> str:
    return f": {audit['reasons'][0]}" if audit["reasons"] else ""
