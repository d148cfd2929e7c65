"""The key schedule: every key, hash and signature of the protocol is made here, each with a label of its own.

    K_ij    HKDF-SHA256(X25519(secret_i, public_j), salt = H(charter), "fedvision/pair/v1" | i | j | keys)
    tau     SHA-256("fedvision/round/v1" | H(charter) | session | H(model) | Merkle root of ready messages)
    k_ij    HKDF-Expand(K_ij, "fedvision/mask/v1" | tau)         the mask of a pair, for one session
    self    HKDF-Expand(b_i, "fedvision/self/v1" | tau)          a site's own mask
    share   HKDF-Expand(K_ij, "fedvision/share/v1" | ... | nonce of the dealer | from | to)
    beta    SHA-256("fedvision/beacon/v1" | tau | root | all beacon numbers)

Each key encrypts or masks once: tau and the dealer's nonce hold fresh randomness of every site, so neither
another round, nor another attempt, nor a restored state folder can bring a key back.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from fedvision.errors import MessageError, ProtocolError
from fedvision.secagg.codec import decode, encode
from fedvision.secagg.encoding import Encoding
from fedvision.secagg.identity import Identity, verify
from fedvision.secagg.merkle import merkle_root
from fedvision.secagg.messages import SERVER, AcceptedEntry, Enrolment, Purpose, Session, Signed
from fedvision.secagg.roster import Charter, Roster
from fedvision.secagg.sketch import TAIL

LOW_ORDER = frozenset(
    bytes.fromhex(text)
    for text in (
        "00" * 32,
        "01" + "00" * 31,
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)
"""The u-coordinates of low order on Curve25519 (RFC 7748, section 6.1), with the highest bit clear."""
PURPOSES = ("train", "validate", "test")
T = TypeVar("T")


@dataclass(frozen=True)
class Consortium:
    """What all parties of a job have agreed on: the signed roster and charter, already verified."""

    roster: Roster
    charter: Charter

    @functools.cached_property
    def digest(self) -> bytes:
        """H(charter); the charter names the roster by its digest."""
        return self.charter.digest()

    @property
    def quorum(self) -> int:
        """The least sites whose inputs may be added: the larger of smallest cohort and threshold."""
        return self.charter.quorum

    @functools.cached_property
    def encoding(self) -> Encoding:
        """How updates become integers."""
        charter = self.charter
        return Encoding(
            len(charter.sites),
            charter.size,
            charter.clip_norm,
            charter.weight_cap,
            charter.metric_caps,
            charter.input_noise,
        )

    def level(self, purpose: Purpose) -> str:
        """Return the level of a sum: the charter's for training, ``sum`` for statistics."""
        return self.charter.level if purpose == "train" else "sum"

    def apart(self, purpose: Purpose) -> int:
        """Return how many coordinates at the end of an input have buckets of their own in its sketch."""
        return TAIL if self.level(purpose) == "gram" else 0

    def key_of(self, sender: int) -> bytes:
        """Return the Ed25519 key of the server or of an enrolled site.

        Raises:
            ProtocolError: The sender is not enrolled.
        """
        if sender == SERVER:
            return bytes.fromhex(self.roster.server)
        if sender not in self.charter.sites:
            raise ProtocolError("roster", f"site number {sender} is not enrolled in this job")
        return bytes.fromhex(self.roster.member(sender).key)


def _labelled(label: str, *parts: bytes) -> bytes:
    return b"fedvision/" + label.encode() + b"/v1" + b"".join(parts)


def digest_of(label: str, *parts: bytes) -> bytes:
    """Return SHA-256 of the label and the parts, which have fixed lengths but for the last."""
    return hashlib.sha256(_labelled(label, *parts)).digest()


def expand(key: bytes, label: str, *parts: bytes) -> bytes:
    """Return a 32-byte key for one use (HKDF-Expand with SHA-256, RFC 5869, section 2.3)."""
    return HKDFExpand(hashes.SHA256(), 32, _labelled(label, *parts)).derive(key)


def sign(consortium: Consortium, identity: Identity, sender: int, message: object) -> Signed:
    """Return ``message`` signed for this charter by ``sender``."""
    body = encode(message)
    covered = _labelled("message", consortium.digest, bytes([sender]), body)
    return Signed(sender, body, identity.sign(covered))


def read_signed(consortium: Consortium, signed: Signed, expected: type[T], sender: int | None = None) -> T:
    """Return the message in ``signed`` after its signature was verified.

    Args:
        consortium: Whose keys count.
        signed: What arrived.
        expected: The message that is allowed here.
        sender: Who must have signed it; None for any enrolled site.

    Raises:
        ProtocolError: Another sender, one that is not enrolled, or a wrong signature.
        MessageError: The message is malformed.
    """
    if (sender is not None and signed.sender != sender) or (sender is None and signed.sender == SERVER):
        raise ProtocolError("sender", "a message comes from another party than it must")
    covered = _labelled("message", consortium.digest, bytes([signed.sender]), signed.body)
    if not verify(consortium.key_of(signed.sender), signed.signature, covered):
        raise ProtocolError("signature", "a signature does not fit its message")
    return decode(signed.body, expected)


def read_server(consortium: Consortium, data: bytes, expected: type[T]) -> T:
    """Return the server's signed message in ``data``; see ``read_signed``."""
    return read_signed(consortium, decode(data, Signed), expected, SERVER)


def session_bytes(session: Session) -> bytes:
    """Return a session as 7 bytes."""
    purpose = PURPOSES.index(session.purpose).to_bytes(1, "big")
    return purpose + session.round.to_bytes(4, "big") + session.attempt.to_bytes(2, "big")


def make_tau(consortium: Consortium, session: Session, model: bytes, readies: Sequence[Signed]) -> bytes:
    """Return the hash that names a session with exactly this model and these ready messages."""
    leaves = [bytes([ready.sender]) + ready.body for ready in readies]
    return digest_of("round", consortium.digest, session_bytes(session), model, merkle_root(leaves))


def make_beta(tau: bytes, root: bytes, numbers: Mapping[int, bytes]) -> bytes:
    """Return the sketch's seed from all beacon numbers, by site."""
    return digest_of("beacon", tau, root, *(bytes([i]) + numbers[i] for i in sorted(numbers)))


def masked_root(digests: Mapping[int, bytes]) -> bytes:
    """Return the Merkle root over sites and hashes of their masked inputs."""
    return merkle_root([bytes([i]) + digests[i] for i in sorted(digests)])


def accepted_root(entries: Sequence[AcceptedEntry]) -> bytes:
    """Return the Merkle root that sites sign to agree on an accepted set."""
    return masked_root({entry.site: entry.digest for entry in entries})


def make_pair_keys(peers: Sequence[int]) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """Return a fresh X25519 key pair for each peer: secrets and public keys, by peer."""
    secrets = {peer: X25519PrivateKey.generate() for peer in peers}
    publics = {peer: key.public_key().public_bytes_raw() for peer, key in secrets.items()}
    return {peer: key.private_bytes_raw() for peer, key in secrets.items()}, publics


def public_of(secret: bytes) -> bytes:
    """Return the X25519 public key of a secret key."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def pair_key(consortium: Consortium, own: int, peer: int, secret: bytes, public: bytes) -> bytes:
    """Return K_ij, the same from either end.

    Args:
        consortium: Its charter is the salt.
        own: Number of the site whose ``secret`` this is.
        peer: Number of the other site.
        secret: X25519 secret key that ``own`` made for ``peer``.
        public: X25519 public key that ``peer`` made for ``own``.

    Raises:
        ProtocolError: The public key is of low order, so the shared secret would be zero.
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(secret).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError:
        raise ProtocolError("pair-key", f"site number {peer} sent a key of low order") from None
    ends = {own: public_of(secret), peer: public}
    low, high = sorted(ends)
    info = _labelled("pair", bytes([low, high]), ends[low], ends[high])
    return HKDF(hashes.SHA256(), 32, consortium.digest, info).derive(shared)


def mask_key(pair: bytes, tau: bytes) -> bytes:
    """Return k_ij, the key of a pair's mask in the session ``tau``."""
    return expand(pair, "mask", tau)


def self_key(seed: bytes, tau: bytes) -> bytes:
    """Return the key of a site's own mask in the session ``tau``, from its seed b_i."""
    return expand(seed, "self", tau)


def pair_sign(own: int, peer: int) -> int:
    """Return +1 where ``own`` adds the pair's mask, -1 where it subtracts it."""
    return 1 if peer > own else -1


def _seal_key(pair: bytes, what: str, context: bytes, nonce: bytes, dealer: int, receiver: int) -> bytes:
    return expand(pair, what, context, nonce, bytes([dealer, receiver]))


def seal(
    pair: bytes, what: str, context: bytes, nonce: bytes, dealer: int, receiver: int, text: bytes
) -> bytes:
    """Encrypt what ``dealer`` gives to ``receiver`` (AES-256-GCM; the key is used once, so the nonce is 0).

    Args:
        pair: K_ij of the two.
        what: Label of the content.
        context: Session or tau.
        nonce: 32 fresh bytes of the dealer.
        dealer: Who seals.
        receiver: Who opens.
        text: The content.
    """
    key = _seal_key(pair, what, context, nonce, dealer, receiver)
    return AESGCM(key).encrypt(bytes(12), text, None)


def unseal(
    pair: bytes, what: str, context: bytes, nonce: bytes, dealer: int, receiver: int, sealed: bytes
) -> bytes:
    """Decrypt what ``seal`` made.

    Raises:
        MessageError: The content, the session, the nonce, the dealer or the receiver is another one.
    """
    key = _seal_key(pair, what, context, nonce, dealer, receiver)
    try:
        return AESGCM(key).decrypt(bytes(12), sealed, None)
    except (InvalidTag, ValueError):
        raise MessageError("a sealed share does not open") from None


def share_hash(dealer: int, receiver: int, share: bytes) -> bytes:
    """Return the commitment to a share; shares are uniform, so the hash hides them."""
    return digest_of("share-hash", bytes([dealer, receiver]), share)


def read_enrolments(consortium: Consortium, entries: Sequence[Signed]) -> dict[tuple[int, int], bytes]:
    """Return all pair keys (owner, peer) -> X25519 public key, after every check.

    Raises:
        ProtocolError: A site is absent, twice, not signed by the roster's key, has keys for other sites than
            its peers, or a key stands twice.
    """
    sites = consortium.charter.sites
    if [entry.sender for entry in entries] != list(sites):
        raise ProtocolError("roster", "the enrolled sites are not the charter's")
    publics: dict[tuple[int, int], bytes] = {}
    for entry in entries:
        enrolment = read_signed(consortium, entry, Enrolment)
        peers = [site for site in sites if site != entry.sender]
        if [item.peer for item in enrolment.keys] != peers:
            raise ProtocolError("pair-key", f"site number {entry.sender} has not one key for each peer")
        for item in enrolment.keys:
            if item.key[31] & 0x80 or item.key in LOW_ORDER:  # the bit is ignored: a second spelling
                raise ProtocolError("pair-key", f"site number {entry.sender} sent a key of low order")
            publics[entry.sender, item.peer] = item.key
    if len(set(publics.values())) != len(publics):
        raise ProtocolError("duplicate-key", "a pair key stands twice among the enrolments")
    return publics
