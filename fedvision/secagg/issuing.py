"""Issues what TLS needs: keys, the authority's certificate, and those of server and sites.

What each of them is good for, and the rules: ``fedvision.secagg.certificates``.
"""

import ipaddress
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from fedvision.secagg.certificates import (
    USAGE,
    Purpose,
    check_authority,
    fits,
    parse_certificate,
    parse_private,
    parse_request,
)
from fedvision.secagg.documents import Refused

AUTHORITY_DAYS = 3652
CERTIFICATE_DAYS = 730
CLOCK_SLACK = timedelta(days=1)
"""A certificate counts from a day before it was made, for parties whose clock is behind."""


def new_tls_key() -> bytes:
    """Return a new private key for TLS: EC P-256, PKCS8, PEM."""
    return _private_pem(ec.generate_private_key(ec.SECP256R1()))


def new_node_key() -> bytes:
    """Return a new node key for Flower: EC P-384, PKCS8, PEM."""
    return _private_pem(ec.generate_private_key(ec.SECP384R1()))


def authority_certificate(key: bytes, federation: str, now: datetime) -> bytes:
    """Return the certificate of a new authority, PEM.

    Args:
        key: Its private key, as ``new_tls_key`` makes it.
        federation: Its name, shown in the certificate.
        now: The time, UTC.

    Raises:
        Refused: The key is damaged.
    """
    private, name = parse_private(key), _name(f"fedvision {federation}"[:64])
    builder = _builder(name, private.public_key(), now, AUTHORITY_DAYS).issuer_name(name)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
    return builder.sign(private, hashes.SHA256()).public_bytes(Encoding.PEM)


def server_certificate(
    authority: tuple[bytes, bytes], server_key: bytes, hosts: Iterable[str], now: datetime
) -> bytes:
    """Return a certificate for the server, PEM.

    Args:
        authority: The authority's private key and certificate, PEM.
        server_key: The server's private key for TLS, PEM.
        hosts: DNS names and IP addresses under which sites reach it; the first is the common name.
        now: The time, UTC.

    Raises:
        Refused: A key or the authority is damaged.
        ValueError: No host.
    """
    names = list(dict.fromkeys(hosts))
    if not names:
        raise ValueError("a server certificate needs a DNS name or an IP address")
    public = parse_private(server_key).public_key()
    builder = _issued(authority, names[0][:64], public, "server", now)
    alternatives = x509.SubjectAlternativeName([_general_name(host) for host in names])
    builder = builder.add_extension(alternatives, critical=False)
    return builder.sign(parse_private(authority[0]), hashes.SHA256()).public_bytes(Encoding.PEM)


def make_request(site_key: bytes, name: str) -> bytes:
    """Return a certificate request of a site, PEM.

    Args:
        site_key: The site's private key for TLS, PEM.
        name: Of the site.

    Raises:
        Refused: The key is damaged.
    """
    builder = x509.CertificateSigningRequestBuilder().subject_name(_name(name))
    return builder.sign(parse_private(site_key), hashes.SHA256()).public_bytes(Encoding.PEM)


def site_certificate(authority: tuple[bytes, bytes], request: bytes, name: str, now: datetime) -> bytes:
    """Return a certificate for a site, PEM. Only the public key of the request gets into it.

    Args:
        authority: The authority's private key and certificate, PEM.
        request: The site's certificate request, PEM.
        name: The site's name, which the request must bear.
        now: The time, UTC.

    Raises:
        Refused: See ``check_request``; or the authority is damaged.
    """
    builder = _issued(authority, name, parse_request(request, name), "site", now)
    return builder.sign(parse_private(authority[0]), hashes.SHA256()).public_bytes(Encoding.PEM)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _issued(
    authority: tuple[bytes, bytes],
    name: str,
    public: ec.EllipticCurvePublicKey,
    purpose: Purpose,
    now: datetime,
) -> x509.CertificateBuilder:
    """Return a certificate of a party that is not signed yet."""
    issuer = parse_certificate(authority[1])
    check_authority(authority[1], now)
    if not fits(authority[1], authority[0]):
        raise Refused("the authority's certificate is not that of its key")
    ends = (issuer.not_valid_after_utc - now).days
    builder = _builder(_name(name), public, now, min(CERTIFICATE_DAYS, ends)).issuer_name(issuer.subject)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(digital_signature=True), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([USAGE[purpose]]), critical=True)
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
    )


def _builder(
    name: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    now = now.astimezone(UTC).replace(microsecond=0)
    builder = x509.CertificateBuilder().subject_name(name).public_key(public)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - CLOCK_SLACK).not_valid_after(now + timedelta(days=days))
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(
    digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )
