"""What the server holds during one attempt at a masked sum, and the checks that its steps share."""

from collections.abc import Collection, Mapping

import numpy as np

from fedvision.errors import ProtocolError
from fedvision.secagg.attempt import AttemptError, Measured, Select, Store, Views
from fedvision.secagg.codec import encode
from fedvision.secagg.identity import Identity
from fedvision.secagg.masking import MaskVector
from fedvision.secagg.messages import SERVER, AcceptedEntry, Evidence, Reason, Session, Signed
from fedvision.secagg.schedule import Consortium, sign


class Attempt:
    """The state of one attempt, without its steps; those are in ``server``, ``server_sketch`` and
    ``server_complaint``.

    Args:
        consortium: Roster and charter.
        publics: Pair keys of all sites, see ``schedule.read_enrolments``.
        identity: The server's key.
        session: Which sum.
        model: SHA-256 of the model that is offered.
        length: Number of coordinates of an input.
        norm_bound: Largest L2 norm of a compliant encoded input; for sketches.
        store: Keeps masked inputs.
        threads: CPU threads for removing masks.
        select: Applies the charter's rules at level ``sketch`` or ``gram``; None leaves out nobody.
        root: The root set's update in units, zeros in its tail; None where the charter names no root set.
    """

    def __init__(
        self,
        consortium: Consortium,
        publics: Mapping[tuple[int, int], bytes],
        identity: Identity,
        session: Session,
        model: bytes,
        length: int,
        norm_bound: float,
        store: Store,
        threads: int = 1,
        select: Select | None = None,
        root: MaskVector | None = None,
    ) -> None:
        self.consortium = consortium
        self.publics = publics
        self.session = session
        self.model = model
        self.length = length
        self.norm_bound = norm_bound
        self.level = consortium.level(session.purpose)
        self.apart = consortium.apart(session.purpose)
        self.views = Views()
        self.evidence: list[Evidence] = []
        self.excluded: dict[int, Reason] = {}
        self.accepted: tuple[AcceptedEntry, ...] = ()
        self.cohort: tuple[int, ...] = ()
        self.tau = self.beta = self.root = self.challenge = b""
        self.gram = np.zeros((0, 0), np.int64)
        self.root_sketch = b""
        self.measured: Measured | None = None
        self.judgement = b""
        self.select = select
        self.root_update = root
        self._identity = identity
        self.store = store
        self.threads = threads
        self.said: dict[str, Signed] = {}

    def say(self, message: object) -> bytes:
        """Return a message signed by the server, encoded; the last one of each kind is kept in ``said``."""
        signed = sign(self.consortium, self._identity, SERVER, message)
        self.said[type(message).__name__] = signed
        return encode(signed)

    @property
    def inside(self) -> tuple[int, ...]:
        """The accepted sites."""
        return tuple(entry.site for entry in self.accepted)

    def require_enough(self, present: Collection[int], what: str) -> None:
        """Give the attempt up if fewer sites than the smallest cohort or the threshold are left.

        Raises:
            AttemptError: So it is; it names the sites of the cohort that are absent.
        """
        if len(present) < self.consortium.quorum:
            text = f"{self.session}: {len(present)} {what}, the charter needs {self.consortium.quorum}"
            raise AttemptError(text, self.evidence, set(self.cohort) - set(present))

    def require_session(self, tau: bytes) -> None:
        """Refuse a message of another session."""
        if tau != self.tau:
            raise ProtocolError("session", f"{self.session}: a message is of another session")


def by_site(messages: Mapping[int, Signed]) -> tuple[Signed, ...]:
    """Return messages in ascending order of their senders."""
    return tuple(messages[site] for site in sorted(messages))
