"""A site as a party of a job, and the checks that its steps share."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedvision.errors import ProtocolError
from fedvision.secagg import schedule
from fedvision.secagg.identity import Identity
from fedvision.secagg.masking import MaskVector
from fedvision.secagg.messages import (
    Box,
    Signed,
)
from fedvision.secagg.schedule import Consortium, sign
from fedvision.secagg.site_state import Marks, Phase, SiteSession


@dataclass(frozen=True)
class SiteMember:
    """One site in a job: its number, its keys, and everybody's public pair keys.

    Attributes:
        consortium: Roster and charter.
        number: This site's.
        identity: Its Ed25519 key.
        secrets: X25519 secret key by peer.
        publics: X25519 public keys by (owner, peer), as ``schedule.read_enrolments`` returns them.
    """

    consortium: Consortium
    number: int
    identity: Identity = field(repr=False)
    secrets: Mapping[int, bytes] = field(repr=False)
    publics: Mapping[tuple[int, int], bytes] = field(repr=False)

    @functools.cached_property
    def pair_keys(self) -> dict[int, bytes]:
        """K_ij by peer."""
        return {
            peer: schedule.pair_key(
                self.consortium, self.number, peer, secret, self.publics[peer, self.number]
            )
            for peer, secret in self.secrets.items()
        }

    def sign(self, message: object) -> Signed:
        """Return a message signed by this site."""
        return sign(self.consortium, self.identity, self.number, message)

    def mask_keys(self, peers: Sequence[int], tau: bytes) -> tuple[list[bytes], list[int]]:
        """Return the mask keys towards ``peers`` and their signs."""
        keys = [schedule.mask_key(self.pair_keys[peer], tau) for peer in peers]
        return keys, [schedule.pair_sign(self.number, peer) for peer in peers]


def input_bytes(vector: MaskVector) -> bytes:
    """Return a vector as it is hashed, stored and sent: little-endian uint32."""
    return vector.astype("<u4", copy=False).tobytes()


def vector_digest(vector: MaskVector) -> bytes:
    """Return the SHA-256 of a vector's little-endian bytes."""
    return hashlib.sha256(np.ascontiguousarray(vector, "<u4").data.cast("B")).digest()


def seed_hash(seed: bytes) -> bytes:
    """Return the commitment to a self-mask seed or a beacon number, which are uniform."""
    return schedule.digest_of("seed", seed)


def box_leaf(box: Box) -> bytes:
    """Return what a box is in the Merkle tree: receiver, hash of the share, ciphertext."""
    return bytes([box.receiver]) + box.share_hash + box.sealed


def move(marks: Marks, state: SiteSession, phase: Phase, **changes: object) -> tuple[Marks, SiteSession]:
    """Return marks and state one step further."""
    marks = marks.stepped()
    return marks, replace(state, step=marks.step, phase=phase, **changes)  # type: ignore[arg-type]


def expect_phase(state: SiteSession, *phases: Phase) -> None:
    """Refuse a message out of order."""
    if state.phase not in phases:
        raise ProtocolError("phase", f"{state.session}: a message out of order after {state.phase}")


def require_enough(member: SiteMember, count: int) -> None:
    """Refuse fewer sites than the smallest cohort or the threshold."""
    if count < member.consortium.quorum:
        raise ProtocolError(
            "smallest-cohort", f"{count} sites, but the charter needs {member.consortium.quorum}"
        )


def require_ascending(senders: Sequence[int], allowed: Sequence[int], own: int) -> None:
    """Refuse a list of sites that is not ascending, has one from outside, or lacks this site."""
    if list(senders) != sorted(set(senders)) or not set(senders) <= set(allowed):
        raise ProtocolError("roster", "a list of sites is not ascending, or names one from outside")
    if own not in senders:
        raise ProtocolError("own-entry", "this site is not in a list that it must be in")


def require_session(state: SiteSession, tau: bytes) -> None:
    """Refuse a message of another session."""
    if tau != state.tau:
        raise ProtocolError("session", f"{state.session}: a message is of another session")
