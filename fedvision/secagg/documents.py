"""JSON documents that governance has signed: one spelling, checked in full before a field is used.

A file or message holds ``kind``, ``document``, ``governance`` (a key) and ``signature``. Rules:
- The signature covers ``"fedvision/governance/v1" | digest of the document``; the digest has the kind in it.
- The reader says which key it accepts; the one in the document is there to be shown.
- A document has one spelling, byte for byte. A changed byte is refused even where the meaning is the same.
- A refusal has two texts: one for the user whose file it is, and one without any value, which may be sent.
"""

import difflib
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedvision.errors import ConfigError
from fedvision.secagg.identity import Identity, is_sound, verify

KEYS = ("kind", "document", "governance", "signature")
LARGEST_DOCUMENT = 1 << 20
"""Bytes; a roster of 255 sites has a twentieth of it."""
LARGEST_SHOWN = 40


class Document(Protocol):
    """What can be signed: a frozen pydantic model with a digest."""

    def digest(self) -> bytes:
        """Return 32 bytes that stand for kind and content."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Return the content."""


M = TypeVar("M", bound=BaseModel)


class Refused(Exception):
    """Why a document does not count.

    Args:
        public: What is wrong, without any value of the document.
        text: The same for the user whose file it is; ``public`` if not given.
        hint: What to do next.
    """

    def __init__(self, public: str, text: str = "", hint: str = "") -> None:
        super().__init__(public)
        self.public, self.text, self.hint = public, text or public, hint

    def of_file(self, path: Path) -> ConfigError:
        """Return the error for the user."""
        return ConfigError(f"{path}: {self.text}", self.hint)


def canonical_json(document: BaseModel) -> bytes:
    """Return a document as what its digest covers: sorted keys, no spaces, UTF-8."""
    content = document.model_dump(mode="json")
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def signed(document: Document, kind: str, governance: Identity) -> dict[str, Any]:
    """Return ``document`` with governance's signature."""
    return {
        "kind": kind,
        "document": document.model_dump(mode="json"),
        "governance": governance.public.hex(),
        "signature": governance.sign(_covered(document)).hex(),
    }


def _covered(document: Document) -> bytes:
    return b"fedvision/governance/v1" + document.digest()


def document_bytes(signed: Mapping[str, Any]) -> bytes:
    """Return the one spelling of a signed document: indented JSON, UTF-8, a line end at the end."""
    return (json.dumps({key: signed[key] for key in KEYS}, indent=2, ensure_ascii=False) + "\n").encode()


def content_of(path: Path) -> bytes:
    """Return a file's bytes, at most one more than a document may have.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(LARGEST_DOCUMENT + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None


def parse_object(content: str | bytes) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        Refused: Too large, not UTF-8, not JSON, or not an object.
    """
    if len(content) > LARGEST_DOCUMENT:
        raise Refused("too large for a document")
    try:
        parsed = json.loads(content.decode() if isinstance(content, bytes) else content)
    except (ValueError, RecursionError):
        raise Refused("not JSON") from None
    if not isinstance(parsed, dict):
        raise Refused("not a JSON object")
    return parsed


def read_signed(content: str | bytes, kind: str, model: type[M], governance_key: bytes) -> M:
    """Return the document in ``content`` after the checks of the module's rules.

    Args:
        content: What was read or arrived.
        kind: Which document is allowed here.
        model: Its fields and rules; has ``digest``.
        governance_key: The key that counts, 32 bytes.

    Raises:
        Refused: A check fails.
    """
    found = parse_object(content)
    for key in sorted(set(found) - set(KEYS)):
        raise _unknown_key(key, "", list(KEYS))
    for key in KEYS:
        if key not in found:
            raise Refused(f"`{key}` is missing", hint="`fedvision keys sign` writes a signed document")
    if found["kind"] != kind:
        raise Refused(f"`kind` is not {kind}")
    if found["governance"] != governance_key.hex():
        raise Refused(
            "`governance` is not the accepted governance key",
            hint="signed with another key: compare the fingerprints that `fedvision keys show` prints",
        )
    document = validated(model, found["document"], "document.")
    try:
        signature = bytes.fromhex(found["signature"])
    except (TypeError, ValueError):
        signature = b""
    if not verify(governance_key, signature, _covered(typing.cast(Document, document))):
        raise Refused("`signature` is wrong", hint="the document was changed after it was signed")
    spelled = document_bytes(
        found | {"document": document.model_dump(mode="json"), "signature": signature.hex()}
    )
    if spelled != (content.encode("utf-8", "replace") if isinstance(content, str) else content):
        raise Refused(
            "the spelling was changed after it was signed, though not the meaning",
            hint="get the file again, as an attachment: an editor or a mail program changed it",
        )
    return document


def signed_kind(path: Path) -> str | None:
    """Return what a file says that it is, unchecked; None if it is no signed document.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        found = parse_object(content_of(path))
    except Refused:
        return None
    kind = found.get("kind")
    return kind if isinstance(kind, str) and "signature" in found else None


def claimed_key(path: Path) -> bytes:
    """Return the governance key that a signed document names. It is to be shown, and proves nothing.

    Raises:
        ConfigError: It is no signed document.
    """
    try:
        public = bytes.fromhex(parse_object(content_of(path)).get("governance", ""))
    except (Refused, TypeError, ValueError):
        public = b""
    if not is_sound(public):
        raise ConfigError(f"{path}: no signed roster or charter")
    return public


def validated(model: type[M], content: Any, prefix: str = "") -> M:
    """Return ``content`` as a model.

    Args:
        model: With unknown keys forbidden.
        content: Parsed JSON.
        prefix: Of field names in the texts, such as ``document.``.

    Raises:
        Refused: A field is unknown, missing or out of range, or a rule is not kept.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        findings = error.errors()
    raise _explained(findings[0], len(findings) - 1, model, prefix)


def _explained(finding: ErrorDetails, others: int, model: type[BaseModel], prefix: str) -> Refused:
    location = finding["loc"]
    more = f" (and {others} more)" if others else ""
    if finding["type"] == "extra_forbidden":
        before = prefix + "".join(f"{step}." for step in location[:-1])
        return _unknown_key(str(location[-1]), before, _fields_at(model, location[:-1]))
    where = (prefix + ".".join(map(str, location))).rstrip(".")
    if finding["type"] == "missing":
        return Refused(f"`{where}` is missing", f"`{where}` is missing{more}")
    reason = finding["msg"].removeprefix("Value error, ")
    shown = repr(finding["input"]) if isinstance(finding["input"], str | int | float) else ""
    got = f", got {shown}" if 0 < len(shown) <= LARGEST_SHOWN else ""
    text = f"{reason[0].lower()}{reason[1:]}{got}{more}"
    if location[-1:] == ("format",):
        hint = "written by a newer version? update fedvision on this machine"
        return Refused(f"`{where}` is wrong", f"`{where}`: {text}", hint)
    if not location:
        return Refused("a rule is not kept", f"`{where}`: {text}" if where else text)
    return Refused(f"`{where}` is wrong", f"`{where}`: {text}")


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for step in location:
        annotation = model.model_fields[step].annotation if isinstance(step, str) else None
        for option in (annotation, *typing.get_args(annotation)):
            if isinstance(option, type) and issubclass(option, BaseModel):
                model = option
    return list(model.model_fields)


def _unknown_key(key: str, prefix: str, known: list[str]) -> Refused:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean `{nearest[0]}`?" if nearest else ""
    return Refused("a key is unknown", f"unknown key `{prefix}{ascii(key)[1:-1][:LARGEST_SHOWN]}`", hint)
