"""TLS of a federation: its own certificate authority, certificates for server and sites, and TLS contexts.

    authority     EC P-256, 10 years, may issue no other authority; signs for this federation only
    server        EC P-256, 2 years, serverAuth, with every DNS name and IP address that sites use
    site          EC P-256, 2 years, clientAuth, CN = name of the site; made from the site's own request
    node key      EC P-384, for Flower, which takes it for a routing hint

Rules:
- A private key is made where it is used, and is a file of its owner only (0600). Only requests travel.
- TLS 1.3 or newer, both sides with a certificate, and no other authority counts than the federation's.
- Of a request only the public key is taken over, after its signature, its name and its type were checked.
- There is no revocation list: the server looks up the fingerprint of each peer's certificate among the sites
  that are enrolled (``peer_fingerprint``). No session is resumed: every connection shows its certificate.
- A certificate proves who may connect. Who said what is proved by the parties' signatures, never by TLS.
"""

import hashlib
import os
import ssl
import stat
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedvision.errors import ConfigError, StorageError
from fedvision.secagg.documents import Refused
from fedvision.secagg.identity import LARGEST_FILE

LARGEST_PEM = 8192
Purpose = Literal["server", "site"]
USAGE = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "site": ExtendedKeyUsageOID.CLIENT_AUTH}
MALFORMED = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion, x509.DuplicateExtension)


@dataclass(frozen=True)
class CertificateFacts:
    """What is looked up in a certificate.

    Attributes:
        name: Its common name.
        serial: Its serial number as ``ssl`` shows it: hexadecimal in capitals, two digits a byte.
        fingerprint: SHA-256 of the certificate (DER), hexadecimal.
        begins: From when it counts, UTC.
        ends: Until when it counts, UTC.
    """

    name: str
    serial: str
    fingerprint: str
    begins: datetime
    ends: datetime


def node_public(private_pem: bytes) -> bytes:
    """Return the public half of a node key as Flower wants it: SubjectPublicKeyInfo, PEM.

    Raises:
        Refused: Not an EC P-384 key.
    """
    key = parse_private(private_pem)
    if not isinstance(key.curve, ec.SECP384R1):
        raise Refused("not an EC P-384 key")
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def check_node_public(public_pem: bytes) -> None:
    """Check a node's public key that another party sent.

    Raises:
        Refused: Not an EC P-384 key in PEM, or not in its one spelling.
    """
    if len(public_pem) > LARGEST_PEM:
        raise Refused("not an EC P-384 public key")
    try:
        key = load_pem_public_key(public_pem)
    except MALFORMED:
        raise Refused("not an EC P-384 public key") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise Refused("not an EC P-384 public key")
    if key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) != public_pem:
        raise Refused("not an EC P-384 public key in its one spelling")


def check_request(request: bytes, name: str) -> None:
    """Check a certificate request that a site sent.

    Guarantee: its key is EC P-256, its sender has the private half, and its common name is ``name``.

    Raises:
        Refused: A check fails, or it is damaged.
    """
    parse_request(request, name)


def facts_of(certificate: bytes) -> CertificateFacts:
    """Return what a certificate says, without checking that it counts.

    Raises:
        Refused: It is damaged.
    """
    found = parse_certificate(certificate)
    return CertificateFacts(
        name=_common_name(found.subject),
        serial=found.serial_number.to_bytes((found.serial_number.bit_length() + 7) // 8).hex().upper(),
        fingerprint=found.fingerprint(hashes.SHA256()).hex(),
        begins=found.not_valid_before_utc,
        ends=found.not_valid_after_utc,
    )


def check_certificate(certificate: bytes, authority: bytes, purpose: Purpose, now: datetime) -> None:
    """Check that a certificate counts.

    Guarantee: the owner of the authority's key issued it, as one for ``purpose`` only, and it is valid now.

    Args:
        certificate: PEM.
        authority: The authority's certificate, PEM.
        purpose: What it must be for.
        now: The time, UTC.

    Raises:
        Refused: A check fails.
    """
    found, issuer = parse_certificate(certificate), parse_certificate(authority)
    _check_authority(issuer, now)
    try:
        found.verify_directly_issued_by(issuer)
    except (InvalidSignature, *MALFORMED):
        raise Refused("not issued by this federation's certificate authority") from None
    if _is_authority(found):
        raise Refused("a certificate authority, not a certificate of a party")
    try:
        usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        is_right = list(usage) == [USAGE[purpose]]
    except (x509.ExtensionNotFound, *MALFORMED):
        is_right = False
    if not is_right:
        raise Refused(f"not a certificate for a {purpose}")
    _check_dates(found, now)


def check_authority(certificate: bytes, now: datetime) -> None:
    """Check that this is the certificate of an authority, signed with its own key, and valid now.

    Raises:
        Refused: It is not.
    """
    _check_authority(parse_certificate(certificate), now)


def fits(certificate: bytes, private_key: bytes) -> bool:
    """Return whether a certificate is that of a private key.

    Raises:
        Refused: One of them is damaged.
    """
    own = parse_private(private_key).public_key()
    return _spki(own) == _spki(parse_certificate(certificate).public_key())


def certified_key(certificate: bytes) -> str:
    """Return SHA-256 of a certificate's public key, hexadecimal: the same in each certificate of that key.

    Raises:
        Refused: It is damaged.
    """
    return hashlib.sha256(_spki(parse_certificate(certificate).public_key())).hexdigest()


def requested_key(request: bytes) -> str:
    """Return SHA-256 of the public key in a checked certificate request, as ``certified_key``."""
    return hashlib.sha256(_spki(x509.load_pem_x509_csr(request).public_key())).hexdigest()


def read_private(path: Path) -> bytes:
    """Return the content of a private key's file.

    Raises:
        StorageError: It is absent, of another user, or readable by group or others.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise StorageError(f"{path}: not a file")
            if status.st_uid != os.geteuid():
                raise StorageError(f"{path}: the private key belongs to another user", "run as its owner")
            if status.st_mode & 0o077:
                raise StorageError(
                    f"{path}: others can read or change the private key "
                    f"(mode {stat.S_IMODE(status.st_mode):04o})",
                    f"chmod 600 {path}, and make a new key if someone may have read it",
                )
            return file.read(LARGEST_FILE)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None


def server_context(authority: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """Return the TLS context of the port for sites.

    Guarantee: a peer without a certificate of this authority for a site, or with TLS below 1.3, gets no
    connection. Whether the site is still enrolled, the caller looks up: ``peer_fingerprint``.

    Args:
        authority: File of the authority's certificate; the only one that counts.
        certificate: File of the server's certificate.
        key: File of its private key.

    Raises:
        StorageError, ConfigError: A file cannot be read or does not belong to the others.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0
    return _loaded(context, authority, certificate, key)


def client_context(authority: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """Return the TLS context of a site.

    Guarantee: it connects only to a server that has a certificate of this authority for a server, with the
    name that was called, and TLS 1.3 or newer. The machine's own list of authorities is not read.

    Args:
        authority: File of the authority's certificate; the only one that counts.
        certificate: File of the site's certificate.
        key: File of its private key.

    Raises:
        StorageError, ConfigError: A file cannot be read or does not belong to the others.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.hostname_checks_common_name = False
    assert context.check_hostname and context.verify_mode is ssl.CERT_REQUIRED
    return _loaded(context, authority, certificate, key)


def peer_fingerprint(connection: ssl.SSLSocket | ssl.SSLObject) -> str | None:
    """Return SHA-256 of the peer's certificate, hexadecimal, as in ``CertificateFacts``; None without one."""
    found = connection.getpeercert(binary_form=True)
    return None if found is None else hashlib.sha256(found).hexdigest()


def _loaded(context: ssl.SSLContext, authority: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    read_private(key)
    for path in (authority, certificate):
        if not path.is_file():
            raise StorageError(f"cannot read {path}: no such file")
    try:
        context.load_verify_locations(cafile=authority)
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError):
        raise ConfigError(
            f"{certificate} is damaged, or not the certificate of {key.name}, or {authority.name} is damaged"
        ) from None
    return context


def parse_private(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """Return an EC private key.

    Raises:
        Refused: It is no such key, or encrypted.
    """
    try:
        key = load_pem_private_key(pem, password=None)
    except MALFORMED:
        raise Refused("not an unencrypted private key in PEM form") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Refused("not an EC private key")
    return key


def parse_certificate(pem: bytes) -> x509.Certificate:
    """Return a certificate of an EC key, in its one spelling; who issued it is not checked.

    Raises:
        Refused: It is no such certificate.
    """
    if len(pem) > LARGEST_PEM:
        raise Refused("too large for a certificate")
    try:
        found = x509.load_pem_x509_certificate(pem)
        public = found.public_key()
    except MALFORMED:
        raise Refused("not a certificate in PEM form") from None
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise Refused("not a certificate of an EC key")
    if found.public_bytes(Encoding.PEM) != pem:
        raise Refused("not one certificate alone, in PEM form")
    return found


def parse_request(request: bytes, name: str) -> ec.EllipticCurvePublicKey:
    """Return the key of a certificate request after the checks of ``check_request``."""
    if len(request) > LARGEST_PEM:
        raise Refused("too large for a certificate request")
    try:
        found = x509.load_pem_x509_csr(request)
        public = found.public_key()
        is_signed = found.is_signature_valid
        subject = _common_name(found.subject)
    except (InvalidSignature, *MALFORMED):
        raise Refused("not a certificate request in PEM form") from None
    if found.public_bytes(Encoding.PEM) != request:
        raise Refused("not one certificate request alone, in PEM form")
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise Refused("the certificate request is not for an EC P-256 key")
    if not is_signed:
        raise Refused("the certificate request is not signed with its own key")
    if subject != name:
        raise Refused("the certificate request bears another name than the site")
    return public


def _common_name(subject: x509.Name) -> str:
    """Return the one common name, "" if there are none or several."""
    found = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if len(found) == 1 else ""


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, *MALFORMED):
        return False


def _check_authority(certificate: x509.Certificate, now: datetime) -> None:
    if not _is_authority(certificate):
        raise Refused("not the certificate of a certificate authority")
    try:
        certificate.verify_directly_issued_by(certificate)
    except (InvalidSignature, *MALFORMED):
        raise Refused("not the certificate of an authority that signed itself") from None
    _check_dates(certificate, now)


def _check_dates(certificate: x509.Certificate, now: datetime) -> None:
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begins:
        raise Refused("not valid yet", f"not valid before {begins:%Y-%m-%d %H:%M} UTC", "is the clock right?")
    if now > ends:
        raise Refused("expired", f"expired at {ends:%Y-%m-%d %H:%M} UTC", "is the clock right?")


def _spki(public: object) -> bytes:
    assert isinstance(public, ec.EllipticCurvePublicKey)
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
