"""Identities: who can read a key file, what counts as a signature, what a fingerprint says."""

import base64
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedvision.errors import ConfigError, StorageError
from fedvision.secagg.identity import (
    FIELD_PRIME,
    SMALL_ORDER,
    Identity,
    fingerprint,
    generate,
    is_sound,
    load,
    parse_public,
    public_line,
    save,
    verify,
)

# RFC 8032, section 7.1, test 1.
RFC_SECRET = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
RFC_PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
RFC_SIGNATURE = bytes.fromhex(
    "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0"
    "595bbe24655141438e7a100b"
)
OWNER = Identity(Ed25519PrivateKey.from_private_bytes(RFC_SECRET), "owner")
IDENTITY_POINT = bytes([1]) + bytes(31)


def secrets_of(identity: Identity) -> list[str]:
    raw = identity.private.private_bytes_raw()
    pem = identity.private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return [raw.hex(), base64.b64encode(raw).decode()[:40], pem.decode().splitlines()[1][-40:]]


def test_keys_and_signatures_are_those_of_the_standard() -> None:
    assert OWNER.public == RFC_PUBLIC
    assert OWNER.sign(b"") == RFC_SIGNATURE
    assert verify(RFC_PUBLIC, RFC_SIGNATURE, b"")


def test_a_signature_fits_one_message_and_one_key_only() -> None:
    signature, other = OWNER.sign(b"message"), generate("other")
    assert verify(OWNER.public, signature, b"message")
    assert not verify(OWNER.public, signature, b"Message")
    assert not verify(other.public, signature, b"message")
    for wrong in (signature[:-1], signature + b"\0", b"", bytes(64), other.sign(b"message")):
        assert not verify(OWNER.public, wrong, b"message")


@given(st.binary(max_size=70), st.binary(max_size=70), st.binary(max_size=20))
def test_arbitrary_bytes_never_verify_and_never_raise(
    public: bytes, signature: bytes, message: bytes
) -> None:
    assert verify(public, signature, message) is False
    assert verify(OWNER.public, signature, message) is False


@pytest.mark.parametrize("wrong", [None, 3, "text", [1, 2], bytearray(RFC_PUBLIC)])
def test_values_of_other_types_do_not_verify(wrong: object) -> None:
    assert verify(wrong, RFC_SIGNATURE, b"") is False  # type: ignore[arg-type]
    assert wrong == RFC_PUBLIC or verify(RFC_PUBLIC, wrong, b"") is False  # type: ignore[arg-type]
    assert verify(RFC_PUBLIC, RFC_SIGNATURE, None) is False  # type: ignore[arg-type]


def test_a_key_with_which_anybody_can_sign_is_refused() -> None:
    # With the identity as key, R = identity and s = 0 satisfy s B = R + k A for every message.
    forged = IDENTITY_POINT + bytes(32)
    Ed25519PublicKey.from_public_bytes(IDENTITY_POINT).verify(forged, b"anything")
    assert not verify(IDENTITY_POINT, forged, b"anything")
    with pytest.raises(ConfigError, match="the key is damaged"):
        parse_public(public_line("site", IDENTITY_POINT))


def add(p: tuple[int, int], q: tuple[int, int]) -> tuple[int, int]:
    """Add two points of -x^2 + y^2 = 1 + d x^2 y^2 (RFC 8032, section 5.1)."""
    d = -121665 * pow(121666, -1, FIELD_PRIME)
    t = d * p[0] * q[0] * p[1] * q[1]
    x = (p[0] * q[1] + q[0] * p[1]) * pow(1 + t, -1, FIELD_PRIME)
    y = (p[1] * q[1] + p[0] * q[0]) * pow(1 - t, -1, FIELD_PRIME)
    return x % FIELD_PRIME, y % FIELD_PRIME


def points_with(y: int) -> set[tuple[int, int]]:
    d = -121665 * pow(121666, -1, FIELD_PRIME)
    square = (y * y - 1) * pow(d * y * y + 1, -1, FIELD_PRIME) % FIELD_PRIME
    x = pow(square, (FIELD_PRIME + 3) // 8, FIELD_PRIME)
    if x * x % FIELD_PRIME != square:
        x = x * pow(2, (FIELD_PRIME - 1) // 4, FIELD_PRIME) % FIELD_PRIME
    assert x * x % FIELD_PRIME == square
    return {(x, y), (-x % FIELD_PRIME, y)}


def test_the_refused_keys_are_all_eight_points_of_small_order_in_every_spelling() -> None:
    points = {point for y in SMALL_ORDER for point in points_with(y)}
    assert len(points) == 8
    for point in points:
        doubled = point
        for _ in range(3):
            doubled = add(doubled, doubled)
        assert doubled == (0, 1)
    spellings = [y + bit for y in SMALL_ORDER for bit in (0, 1 << 255)]
    spellings += [y + FIELD_PRIME + bit for y in (0, 1, 18) for bit in (0, 1 << 255)]
    assert not any(is_sound(spelling.to_bytes(32, "little")) for spelling in spellings)
    assert is_sound(RFC_PUBLIC) and all(is_sound(generate("x").public) for _ in range(20))


def test_a_fingerprint_is_eight_groups_of_five_digits_and_never_changes() -> None:
    assert fingerprint(RFC_PUBLIC) == "50560 19301 12714 50291 13021 91878 31379 54547"
    with pytest.raises(ValueError, match="32 bytes"):
        fingerprint(RFC_PUBLIC[:31])


@given(st.binary(min_size=32, max_size=32), st.integers(0, 255))
def test_one_changed_bit_changes_most_groups_of_the_fingerprint(public: bytes, bit: int) -> None:
    changed = bytearray(public)
    changed[bit // 8] ^= 1 << bit % 8
    groups, others = fingerprint(public).split(), fingerprint(bytes(changed)).split()
    assert [len(group) for group in groups] == [5] * 8 and "".join(groups).isdecimal()
    assert sum(a == b for a, b in zip(groups, others, strict=True)) <= 2


def test_a_saved_identity_loads_back(tmp_path: Path) -> None:
    made = generate("utrecht")
    save(made, tmp_path / "keys" / "utrecht.pem")
    loaded = load(tmp_path / "keys" / "utrecht.pem")
    assert (loaded.name, loaded.public) == ("utrecht", made.public)
    text = (tmp_path / "keys" / "utrecht.pub").read_text()
    assert parse_public(text) == ("utrecht", made.public)
    assert text == public_line("utrecht", made.public) + "\n"


def test_the_name_survives_another_file_name(tmp_path: Path) -> None:
    save(generate("utrecht"), tmp_path / "identity.pem")
    (tmp_path / "identity.pem").rename(tmp_path / "moved.pem")
    assert load(tmp_path / "moved.pem").name == "utrecht"
    assert (tmp_path / "utrecht.pub").exists()


def test_other_programs_read_the_private_key(tmp_path: Path) -> None:
    save(OWNER, tmp_path / "a.pem")
    key = serialization.load_pem_private_key((tmp_path / "a.pem").read_bytes(), None)
    assert isinstance(key, Ed25519PrivateKey) and key.private_bytes_raw() == RFC_SECRET


def test_only_the_owner_can_read_a_private_key_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        save(OWNER, tmp_path / "keys" / "a.pem")
    finally:
        os.umask(before)
    assert (tmp_path / "keys" / "a.pem").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "keys" / "owner.pub").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("there", ["a.pem", "owner.pub"])
def test_no_file_is_ever_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_bytes(b"precious")
    with pytest.raises(StorageError, match=f"{there} exists, and keys are never overwritten"):
        save(OWNER, tmp_path / "a.pem")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {there: b"precious"}


def test_not_even_a_link_that_leads_nowhere_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.pem").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="exists"):
        save(OWNER, tmp_path / "a.pem")
    assert not (tmp_path / "elsewhere").exists()


def test_of_many_who_save_at_once_one_succeeds(tmp_path: Path) -> None:
    path, saved = tmp_path / "a.pem", []
    start = threading.Barrier(8)

    def attempt(number: int) -> None:
        identity = generate(f"site-{number}")
        start.wait()
        try:
            save(identity, path)
        except StorageError:
            return
        saved.append(identity)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(saved) == 1 and load(path).public == saved[0].public
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.pem", f"{saved[0].name}.pub"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file exists"):
        save(OWNER, tmp_path / "file" / "a.pem")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o601, 0o777, 0o620])
def test_a_key_that_others_can_touch_is_not_used(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a.pem"
    save(OWNER, path)
    path.chmod(mode)
    with pytest.raises(StorageError, match=f"mode 0{mode:o}") as caught:
        load(path)
    assert caught.value.hint.startswith(f"chmod 600 {path}")
    path.chmod(0o400)
    assert load(path).public == OWNER.public


def test_a_key_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pem"
    save(OWNER, path)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(StorageError, match="belongs to another user"):
        load(path)


def x25519(path: Path) -> bytes:
    return X25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def encrypted(path: Path) -> bytes:
    return OWNER.private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"word"),
    )


def without_first_line(path: Path) -> bytes:
    return path.read_bytes().split(b"\n", 1)[1]


def with_another_first_line(path: Path) -> bytes:
    return public_line("owner", generate("x").public).encode() + b"\n" + without_first_line(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lambda path: b"", "not an unencrypted private key"),
        (lambda path: b"\xff\x00 nothing", "not an unencrypted private key"),
        (lambda path: path.read_bytes()[:-60], "not an unencrypted private key"),
        (lambda path: public_line("owner", OWNER.public).encode(), "this is a public key"),
        (x25519, "not an Ed25519 key"),
        (encrypted, "not an unencrypted private key"),
        (without_first_line, "first line is not the public key"),
        (with_another_first_line, "is not that of the private key"),
    ],
)
def test_what_is_not_a_key_of_ours_is_refused(
    tmp_path: Path, content: Callable[[Path], bytes], told: str
) -> None:
    path = tmp_path / "a.pem"
    save(OWNER, path)
    path.write_bytes(content(path))
    with pytest.raises(StorageError, match=told) as caught:
        load(path)
    text = str(caught.value) + caught.value.hint
    assert not any(secret in text for secret in secrets_of(OWNER))
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("name", ["absent.pem", "folder"])
def test_a_file_that_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=rf"cannot read .*{name}"):
        load(tmp_path / name)


def test_no_text_of_an_identity_holds_its_key() -> None:
    for text in (repr(OWNER), str(OWNER), f"{OWNER!r}"):
        assert not any(secret in text for secret in secrets_of(OWNER))


@given(st.text(max_size=20))
def test_a_name_is_one_that_a_roster_can_hold(name: str) -> None:
    allowed = name.isascii() and name[:1].isalnum() and all(c.isalnum() or c in "_.-" for c in name)
    if allowed:
        assert generate(name).name == name
    else:
        with pytest.raises(ConfigError, match="a name is"):
            generate(name)


def test_two_identities_are_never_the_same() -> None:
    assert len({generate("x").public for _ in range(50)}) == 50


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=80))
def test_arbitrary_text_is_no_public_key(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_public(text)


LINE = public_line("owner", OWNER.public)


@pytest.mark.parametrize(
    "text",
    [
        LINE + "\n" + LINE,
        LINE.replace(" ", "\n"),
        LINE + " more",
        LINE.replace("fedvision-", "ssh-"),
        LINE.replace("owner", "ow/ner"),
        LINE.replace("= owner", " owner"),
        LINE.replace("= owner", "== owner"),
        LINE[:30] + " owner",
        "fedvision-ed25519 " + base64.b64encode(OWNER.public + b"\0").decode() + " owner",
        # Another spelling of the same 32 bytes: bits that base64 throws away.
        LINE.replace("URo= ", "URp= "),
    ],
)
def test_a_public_key_has_one_spelling(text: str) -> None:
    assert parse_public(f"  {LINE}\r\n") == ("owner", OWNER.public)
    with pytest.raises(ConfigError):
        parse_public(text)
