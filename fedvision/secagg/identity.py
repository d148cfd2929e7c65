"""Ed25519 identities of sites, server and governance: key files, signatures, fingerprints.

    NAME.pem   the private key, PKCS8, for its owner's eyes only (0600); its first line is that of NAME.pub
    NAME.pub   one line, to be given to everybody: ``fedvision-ed25519 BASE64 NAME``

Rules:
- A key file is never overwritten, and never used while group or others can read it.
- A key of small order is no key: with one, a signature fits every message (RFC 8032, section 5.1, allows
  a verifier to take it; OpenSSL does). It is refused wherever a public key comes in.
- No error text holds a private key.
"""

import base64
import contextlib
import hashlib
import os
import re
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from pydantic import TypeAdapter, ValidationError

from fedvision.config import Name
from fedvision.errors import ConfigError, StorageError

KEY_BYTES = 32
SIGNATURE_BYTES = 64
PUBLIC_KIND = "fedvision-ed25519"
FINGERPRINT_GROUPS = 8
LARGEST_FILE = 16_384
FIELD_PRIME = 2**255 - 19
ORDER_8 = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
SMALL_ORDER = frozenset({0, 1, FIELD_PRIME - 1, ORDER_8, FIELD_PRIME - ORDER_8})
"""The y-coordinates of the curve's eight points whose order divides 8."""

_name = TypeAdapter(Name)


@dataclass(frozen=True, eq=False)
class Identity:
    """A party's private key and the name that it goes by.

    Attributes:
        private: The Ed25519 key; not in the repr.
        name: As in the roster.
    """

    private: Ed25519PrivateKey = field(repr=False)
    name: str

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes (RFC 8032, section 5.1.5)."""
        return self.private.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """Return the signature of ``message``, 64 bytes; the caller puts a label in front of the message."""
        return self.private.sign(message)


def generate(name: str) -> Identity:
    """Return a new identity from the operating system's generator.

    Raises:
        ConfigError: The name does not fit a roster.
    """
    return Identity(Ed25519PrivateKey.generate(), _checked_name(name))


def _checked_name(name: str) -> str:
    try:
        return _name.validate_python(name)
    except ValidationError:
        raise ConfigError(
            f"a name is 1 to 64 of the letters A-Z a-z, digits and _ . -, and begins with a letter or digit, "
            f"got {ascii(name)[:80]}",
            "such as `utrecht` or `site-03`",
        ) from None


def is_sound(public: bytes) -> bool:
    """Return whether ``public`` can be somebody's key: 32 bytes, one spelling, not of small order.

    Guarantee: False for each of the eight points of small order in all their spellings.
    """
    if not isinstance(public, bytes) or len(public) != KEY_BYTES:
        return False
    y = int.from_bytes(public, "little") & (2**255 - 1)
    return y < FIELD_PRIME and y not in SMALL_ORDER


def verify(public: bytes, signature: bytes, message: bytes) -> bool:
    """Return whether ``signature`` is that of ``message`` by the owner of ``public`` (RFC 8032, 5.1.7).

    Guarantee: False, never an exception, for malformed input; False for a key that is not ``is_sound``.

    Args:
        public: 32 bytes.
        signature: 64 bytes.
        message: Any bytes.
    """
    if not is_sound(public):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError, BufferError):
        return False
    return True


def fingerprint(public: bytes) -> str:
    """Return 40 decimal digits in 8 groups of 5, to be compared by voice; digits are read in any language.

    They are SHA-256("fedvision/fingerprint/v1" | key) as a big-endian number, modulo 10**40: 132.9 bits,
    each value equally likely to within a relative 2**-123. To make another key with the same digits takes
    about 2**133 trials; whoever compares two groups only leaves 2**33, which is within anybody's reach.

    Raises:
        ValueError: ``public`` is not 32 bytes.
    """
    if len(public) != KEY_BYTES:
        raise ValueError(f"a public key has {KEY_BYTES} bytes, got {len(public)}")
    digest = hashlib.sha256(b"fedvision/fingerprint/v1" + public).digest()
    digits = f"{int.from_bytes(digest, 'big') % 10 ** (5 * FINGERPRINT_GROUPS):0{5 * FINGERPRINT_GROUPS}d}"
    return " ".join(re.findall(".{5}", digits))


def public_line(name: str, public: bytes) -> str:
    """Return the line of a ``.pub`` file, without its end: ``fedvision-ed25519 BASE64 NAME``."""
    return f"{PUBLIC_KIND} {base64.b64encode(public).decode()} {name}"


def parse_public(text: str, source: str = "public key") -> tuple[str, bytes]:
    """Return name and key of the line of a ``.pub`` file.

    Args:
        text: The line; spaces and line ends around it are allowed.
        source: What the error names.

    Raises:
        ConfigError: Not such a line, or the key is not ``is_sound``.
    """
    hint = "a .pub file, as `fedvision keys new` writes it, is one line"
    words = text.split()
    if len(words) != 3 or words[0] != PUBLIC_KIND or len(text.strip().splitlines()) != 1:
        raise ConfigError(f"{source}: expected one line `{PUBLIC_KIND} KEY NAME`", hint)
    try:
        public = base64.b64decode(words[1], validate=True)
    except ValueError:
        public = b""
    if base64.b64encode(public).decode() != words[1] or not is_sound(public):
        raise ConfigError(f"{source}: the key is damaged", "ask its owner for the file again")
    try:
        return _checked_name(words[2]), public
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}", hint) from None


def save(identity: Identity, path: Path) -> None:
    """Write the private key to ``path`` and the public one beside it, as ``NAME.pub``.

    Guarantee: a file that is there is never changed; the private key is in no file that others can read,
    at no time; after a crash it is there in full or not at all.

    Args:
        identity: The key and its name.
        path: The private file, usually ``NAME.pem``; its folder is made, for this user only, if absent.

    Raises:
        StorageError: One of the files exists, or the folder is not writable.
    """
    line = public_line(identity.name, identity.public) + "\n"
    pem = identity.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    beside = path.with_name(f"{identity.name}.pub")
    for one in (path, beside):
        if os.path.lexists(one):
            raise StorageError(
                f"{one} exists, and keys are never overwritten", "choose another name or folder"
            )
    _write_new(path, line.encode() + pem, 0o600)
    _write_new(beside, line.encode(), 0o644)


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a file that is not there yet, whole or not at all; another writer's file stays as it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.link(name, path)
        finally:
            with contextlib.suppress(OSError):
                Path(name).unlink()
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {(error.strerror or str(error)).lower()}", "choose another folder"
        ) from None


def load(path: Path) -> Identity:
    """Read a private key that ``save`` wrote.

    Raises:
        StorageError: The file is absent, is of another user, can be read by group or others, or does not
            hold an Ed25519 key with its public line.
    """
    content = _private_bytes(path)
    hint = "expected a private key that `fedvision keys new` wrote"
    if content.startswith(PUBLIC_KIND.encode()) and b"PRIVATE KEY" not in content:
        raise StorageError(f"{path}: this is a public key", hint)
    try:
        private = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise StorageError(f"{path}: not an unencrypted private key in PEM form", hint) from None
    if not isinstance(private, Ed25519PrivateKey):
        raise StorageError(f"{path}: not an Ed25519 key", hint)
    try:
        name, public = parse_public(content.splitlines()[0].decode("ascii"))
    except (ConfigError, UnicodeDecodeError):
        raise StorageError(f"{path}: the first line is not the public key", hint) from None
    if public != private.public_key().public_bytes_raw():
        raise StorageError(f"{path}: the public key in the first line is not that of the private key", hint)
    return Identity(private, name)


def _private_bytes(path: Path) -> bytes:
    """Return the content of a file that only its owner, this user, can read; checked on the open file."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise StorageError(f"{path}: not a file")
            if status.st_uid != os.geteuid():
                raise StorageError(
                    f"{path}: the private key belongs to another user", f"make it yours: chown $USER {path}"
                )
            if status.st_mode & 0o077:
                raise StorageError(
                    f"{path}: others can read or change the private key "
                    f"(mode {stat.S_IMODE(status.st_mode):04o})",
                    f"chmod 600 {path}, and make a new key if someone may have read it",
                )
            return file.read(LARGEST_FILE)
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {(error.strerror or str(error)).lower()}",
            "`fedvision keys new NAME` makes a key",
        ) from None
