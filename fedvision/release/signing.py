"""The manifest of a release and its signature: what every file must be, and who says so.

    manifest.json   format, name, signer (the line of a .pub file, or null) and of each file size and SHA-256
    manifest.sig    the Ed25519 signature, 128 hexadecimal digits and a line end; absent if nobody signed

Rules:
- The signature covers "fedvision/release/v1" | SHA-256 of the bytes of manifest.json.
- The signer stands in the manifest: a signature that was taken away is missed.
- A folder holds exactly the files of its manifest. A link is no file.
- The key in the manifest is there to be shown. Who signed, only a reader knows who brings the key.
"""

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from fedvision.config import Name, Section
from fedvision.errors import ConfigError, StorageError, VerificationError
from fedvision.secagg.identity import (
    SIGNATURE_BYTES,
    Identity,
    fingerprint,
    parse_public,
    public_line,
    verify,
)
from fedvision.storage import write_text

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
LABEL = b"fedvision/release/v1"
LARGEST_MANIFEST = 1 << 20
CHUNK = 1 << 20
PATH = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*){0,7}$"
Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class File(Section):
    """One file of a release."""

    path: Annotated[str, Field(pattern=PATH, max_length=255)]
    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Hex32


class Manifest(Section):
    """All files of a release but the manifest and its signature."""

    format: Literal[1] = 1
    name: Name
    signer: str | None
    files: tuple[File, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        paths = [file.path for file in self.files]
        if paths != sorted(set(paths)) or {MANIFEST, SIGNATURE} & set(paths):
            raise ValueError("files must be in the order of their paths, each once")
        return self


@dataclass(frozen=True)
class Checked:
    """A release of which everything holds that was checked.

    Attributes:
        name: Of the job.
        num_files: How many files have the hash that the manifest says.
        signer: Name and fingerprint of the key whose signature holds; "" where nobody signed.
        is_pinned: Whether the caller gave that key; else it is the release's own.
    """

    name: str
    num_files: int
    signer: str
    is_pinned: bool


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Raises:
        StorageError: It cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    return digest.hexdigest()


def _covered(manifest: bytes) -> bytes:
    return LABEL + hashlib.sha256(manifest).digest()


def write_manifest(folder: Path, name: str, key: Identity | None) -> None:
    """Write the manifest of everything that is in ``folder``, and with a key its signature.

    Raises:
        StorageError: The disk is full or the folder is not writable.
    """
    files = tuple(
        File(path=path, size_bytes=(folder / path).stat().st_size, sha256=sha256_of(folder / path))
        for path in _files_in(folder)
    )
    signer = None if key is None else public_line(key.name, key.public)
    content = Manifest(name=name, signer=signer, files=files).model_dump(mode="json")
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_text(folder / MANIFEST, text)
    if key is not None:
        write_text(folder / SIGNATURE, key.sign(_covered(text.encode())).hex() + "\n")


def _files_in(folder: Path) -> list[str]:
    """Return the paths of all files below ``folder``, sorted, but the manifest and its signature.

    Raises:
        VerificationError: There is a link, or something else that is neither file nor folder.
    """
    found = []
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            found.append(path.relative_to(folder).as_posix())
        elif not stat.S_ISDIR(mode):
            raise VerificationError(path, "release-files", "neither a file nor a folder")
    return sorted(set(found) - {MANIFEST, SIGNATURE})


def check_release(folder: Path, key: tuple[str, bytes] | None) -> Checked:
    """Check every file of a release against its manifest, and the manifest against its signature.

    Guarantee: if it returns and ``key`` was given, the owner of that key signed exactly these files, and
    there are no others in the folder.

    Args:
        folder: The release.
        key: Name and public key of who must have signed; None takes the one that the release names.

    Raises:
        StorageError: This is no release: there is no manifest.
        VerificationError: Something does not hold.
    """
    path = folder / MANIFEST
    content = _content(path, LARGEST_MANIFEST)
    if content is None:
        raise StorageError(
            f"{folder} is not a release: no {MANIFEST}", "a folder that `fedvision release RUN` made"
        )
    manifest = _parsed(path, content)
    signer = _check_signature(folder, content, manifest.signer, key)
    there, listed = _files_in(folder), [file.path for file in manifest.files]
    if there != listed:
        missing, more = sorted(set(listed) - set(there)), sorted(set(there) - set(listed))
        text = f"{missing[0]} is missing" if missing else f"{more[0]} is not in the manifest"
        raise VerificationError(path, "release-files", text)
    for file in manifest.files:
        one = folder / file.path
        if one.stat().st_size != file.size_bytes or sha256_of(one) != file.sha256:
            raise VerificationError(one, "release-hash", "not the file that was released")
    return Checked(manifest.name, len(manifest.files), signer, key is not None)


def _content(path: Path, largest: int) -> bytes | None:
    """Return the bytes of a small file, at most one more than it may have; None if there is none.

    Raises:
        StorageError: It cannot be read.
        VerificationError: It is a link, or too large.
    """
    if not os.path.lexists(path):
        return None
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise VerificationError(path, "release-files", "not a file")
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    if len(content) > largest:
        raise VerificationError(path, "release-format", "too large")
    return content


def _parsed(path: Path, content: bytes) -> Manifest:
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        text = f"not a manifest of a release: {where} {error.errors()[0]['msg'].lower()}"
        raise VerificationError(path, "release-format", text) from None


def _check_signature(folder: Path, content: bytes, named: str | None, key: tuple[str, bytes] | None) -> str:
    """Check who signed, and return name and fingerprint; "" where nobody did and nobody had to."""
    path = folder / SIGNATURE
    signature = _content(path, 2 * SIGNATURE_BYTES + 1)
    if named is None:
        if key is not None:
            raise VerificationError(folder / MANIFEST, "release-signature", "the release is not signed")
        if signature is not None:
            raise VerificationError(path, "release-signature", "the manifest says that nobody signed it")
        return ""
    try:
        name, public = parse_public(named, "signer")
    except ConfigError as error:
        raise VerificationError(folder / MANIFEST, "release-format", str(error)) from None
    if key is not None and key[1] != public:
        raise VerificationError(
            folder / MANIFEST, "release-signature", f"signed by {name} with another key than the one given"
        )
    if signature is None:
        raise VerificationError(path, "release-signature", "the signature is missing")
    digits = re.fullmatch(rb"([0-9a-f]{128})\n", signature)
    if digits is None or not verify(public, bytes.fromhex(digits[1].decode()), _covered(content)):
        raise VerificationError(path, "release-signature", "the signature does not fit the manifest")
    return f"{name if key is None else key[0]} {fingerprint(public)}"
