"""Certificates of a federation: who gets a connection, who does not, and what a request cannot smuggle in."""

import base64
import ssl
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from fedvision.errors import ConfigError, StorageError
from fedvision.secagg import certificates, issuing
from fedvision.secagg.documents import Refused
from tests.tls_peers import NOW, Authority, client, handshake, server

HOST = "fl.example.org"
YEARS = timedelta(days=365)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "lung")


@pytest.fixture
def other(tmp_path: Path) -> Authority:
    """Another federation, of the same name."""
    return Authority(tmp_path / "other")


def test_a_site_and_its_server_connect_with_tls_1_3(authority: Authority) -> None:
    site = authority.site()
    near, far = handshake(client(site), server(authority.server(HOST)))
    assert near.version() == far.version() == "TLSv1.3"
    facts = certificates.facts_of(site.certificate.read_bytes())
    assert certificates.peer_fingerprint(far) == facts.fingerprint
    assert facts.name == "utrecht"


def test_a_serial_is_spelled_as_ssl_spells_it(authority: Authority) -> None:
    called = server(authority.server(HOST))
    for _ in range(40):  # One in 16 begins with a zero.
        site = authority.site()
        found = handshake(client(site), called)[1].getpeercert()
        assert found is not None
        assert found["serialNumber"] == certificates.facts_of(site.certificate.read_bytes()).serial


@pytest.mark.parametrize("host", [HOST, "10.1.2.3", "::1"])
def test_a_server_is_reached_by_each_of_its_names(authority: Authority, host: str) -> None:
    handshake(client(authority.site()), server(authority.server(HOST, "10.1.2.3", "::1")), host)


@pytest.mark.parametrize("host", ["evil.example.org", "10.1.2.4", "example.org"])
def test_a_server_under_another_name_is_refused(authority: Authority, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(client(authority.site()), server(authority.server(HOST, "10.1.2.3")), host)


def test_a_site_refuses_a_server_of_another_federation(authority: Authority, other: Authority) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(client(authority.site()), server(other.server(HOST)))


def test_a_server_refuses_a_site_of_another_federation(authority: Authority, other: Authority) -> None:
    site = other.site()
    site.authority.write_bytes(authority.pair[1])  # It trusts the server, but is not trusted.
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(client(site), server(authority.server(HOST)))


def test_a_server_refuses_a_peer_without_a_certificate(authority: Authority) -> None:
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.load_verify_locations(authority.site().authority)
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        handshake(bare, server(authority.server(HOST)))


@pytest.mark.parametrize("side", ["client", "server"])
def test_tls_1_2_is_refused_on_both_sides(authority: Authority, side: str) -> None:
    near, far = client(authority.site()), server(authority.server(HOST))
    old = near if side == "client" else far
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="PROTOCOL"):
        handshake(near, far)


def test_a_site_cannot_pass_for_the_server(authority: Authority) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(client(authority.site()), server(authority.site(HOST)))


def test_the_server_cannot_pass_for_a_site(authority: Authority) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(client(authority.server(HOST)), server(authority.server(HOST)))


@pytest.mark.parametrize("expired", ["site", "server", "authority"])
def test_what_has_expired_gets_no_connection(tmp_path: Path, expired: str) -> None:
    begun = {"site": 4, "server": 4, "authority": 11}[expired] * YEARS
    authority = Authority(tmp_path / "old", made=NOW - begun)
    then = NOW - 3 * YEARS
    near = authority.site(made=NOW if expired == "server" else then)
    far = authority.server(HOST, made=NOW if expired == "site" else then)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(client(near), server(far))


def test_a_certificate_never_outlives_its_authority(tmp_path: Path) -> None:
    ending = Authority(tmp_path / "x", made=NOW - timedelta(days=issuing.AUTHORITY_DAYS - 100))
    facts = certificates.facts_of(ending.site().certificate.read_bytes())
    assert facts.ends <= certificates.facts_of(ending.pair[1]).ends < NOW + timedelta(days=101)


def test_no_session_is_resumed(authority: Authority) -> None:
    called = server(authority.server(HOST))
    assert called.num_tickets == 0
    near, _ = handshake(client(authority.site()), called)
    assert near.session is None or not near.session.has_ticket


def test_a_site_cannot_issue_certificates(authority: Authority) -> None:
    site = authority.site()
    forged = (site.key.read_bytes(), site.certificate.read_bytes())
    with pytest.raises(Refused, match="not the certificate of a certificate authority"):
        issuing.site_certificate(forged, issuing.make_request(issuing.new_tls_key(), "x"), "x", NOW)


def request_of(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, name: str, smuggle: bool = False
) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    if smuggle:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=3), critical=True)
        alternatives = x509.SubjectAlternativeName([x509.DNSName(HOST)])
        builder = builder.add_extension(alternatives, critical=False)
        usage = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(usage, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def test_of_a_request_only_the_key_is_taken_over(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    made = issuing.site_certificate(authority.pair, request_of(key, "utrecht", True), "utrecht", NOW)
    found = x509.load_pem_x509_certificate(made)
    assert found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [x509.ExtendedKeyUsageOID.CLIENT_AUTH]
    with pytest.raises(x509.ExtensionNotFound):
        found.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert [str(one.value) for one in found.subject] == ["utrecht"]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: request_of(ec.generate_private_key(ec.SECP256R1()), "mainz"), "bears another name"),
        (lambda: request_of(ec.generate_private_key(ec.SECP384R1()), "utrecht"), "not for an EC P-256 key"),
        (lambda: request_of(rsa.generate_private_key(65537, 2048), "utrecht"), "not for an EC P-256 key"),
        (lambda: b"-----BEGIN NOTHING-----\n", "not a certificate request"),
        (lambda: b"x" * 10_000, "too large"),
        (
            lambda: request_of(ec.generate_private_key(ec.SECP256R1()), "utrecht") + b"and more\n",
            "not one certificate request alone",
        ),
    ],
)
def test_a_request_that_does_not_do_is_refused(make: Callable[[], bytes], told: str) -> None:
    with pytest.raises(Refused, match=told):
        certificates.check_request(make(), "utrecht")


def test_a_request_needs_the_signature_of_its_own_key() -> None:
    while True:  # Until two signatures have the same length.
        made = (request_of(ec.generate_private_key(ec.SECP256R1()), "utrecht") for _ in range(2))
        ours, theirs = (x509.load_pem_x509_csr(one) for one in made)
        cut = len(theirs.signature)
        if len(ours.signature) == cut:
            break
    body = ours.public_bytes(Encoding.DER)
    mixed = base64.encodebytes(body[:-cut] + theirs.signature).decode().replace("\n", "")
    lines = "\n".join(mixed[i : i + 64] for i in range(0, len(mixed), 64))
    pem = f"-----BEGIN CERTIFICATE REQUEST-----\n{lines}\n-----END CERTIFICATE REQUEST-----\n".encode()
    with pytest.raises(Refused, match="not signed with its own key"):
        certificates.check_request(pem, "utrecht")


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_and_nothing_else(content: bytes) -> None:
    for check in (
        lambda: certificates.check_request(content, "utrecht"),
        lambda: certificates.check_node_public(content),
        lambda: certificates.facts_of(content),
        lambda: certificates.check_authority(content, NOW),
    ):
        with pytest.raises(Refused):
            check()


def test_a_certificate_counts_for_its_authority_purpose_and_time(
    authority: Authority, other: Authority
) -> None:
    site = authority.site().certificate.read_bytes()
    certificates.check_certificate(site, authority.pair[1], "site", NOW)
    for certificate, issuer, purpose, now, told in (
        (site, other.pair[1], "site", NOW, "not issued by this federation's"),
        (site, authority.pair[1], "server", NOW, "not a certificate for a server"),
        (site, authority.pair[1], "site", NOW + 3 * YEARS, "expired"),
        (site, authority.pair[1], "site", NOW - timedelta(days=2), "not valid yet"),
        (authority.pair[1], authority.pair[1], "site", NOW, "a certificate authority, not a"),
        (site, site, "site", NOW, "not the certificate of a certificate authority"),
    ):
        with pytest.raises(Refused, match=told):
            certificates.check_certificate(certificate, issuer, purpose, now)  # type: ignore[arg-type]


def test_a_node_key_is_what_flower_wants() -> None:
    asymmetric = pytest.importorskip("flwr.supercore.primitives.asymmetric")
    private = issuing.new_node_key()
    key = asymmetric.bytes_to_private_key(private)
    assert asymmetric.uses_nist_ec_curve(key.public_key())
    public = certificates.node_public(private)
    assert public == asymmetric.public_key_to_bytes(key.public_key())
    certificates.check_node_public(public)
    p256 = ec.generate_private_key(ec.SECP256R1()).public_key()
    other = p256.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for wrong in (other, issuing.new_tls_key(), private, public + b"\n", public[:-20]):
        with pytest.raises(Refused):
            certificates.check_node_public(wrong)
    with pytest.raises(Refused, match="P-384"):
        certificates.node_public(issuing.new_tls_key())


def test_a_private_key_that_others_can_read_is_not_used(authority: Authority) -> None:
    site = authority.site()
    for mode in (0o640, 0o604, 0o660):
        site.key.chmod(mode)
        with pytest.raises(StorageError, match="others can read or change the private key"):
            client(site)
    site.key.unlink()
    with pytest.raises(StorageError, match="cannot read"):
        client(site)


def test_a_certificate_of_another_key_is_told(authority: Authority) -> None:
    site = authority.site()
    site.certificate.write_bytes(authority.site().certificate.read_bytes())
    assert not certificates.fits(site.certificate.read_bytes(), site.key.read_bytes())
    with pytest.raises(ConfigError, match=r"not the certificate of x\.key"):
        client(site)


def test_an_encrypted_key_is_refused_without_a_question(authority: Authority) -> None:
    site = authority.site()
    key = load_pem_private_key(site.key.read_bytes(), password=None)
    site.key.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )
    with pytest.raises(ConfigError):
        client(site)


def test_serial_numbers_are_random_and_keys_are_new(authority: Authority) -> None:
    parties = [authority.site() for _ in range(5)]
    facts = [certificates.facts_of(one.certificate.read_bytes()) for one in parties]
    assert len({one.serial for one in facts}) == len({one.key.read_bytes() for one in parties}) == 5
    assert all(len(one.serial) >= 36 for one in facts)
