"""The server's side of a masked sum: one attempt, message by message, without I/O.

The order of calls is that of the protocol: ``offer``, ``add_ready``..., ``weave``, ``add_masked``...,
at level ``sketch`` or ``gram`` ``masked_roll``, ``add_beacon``..., ``beacon_roll``, ``add_sketch``...,
then ``accept``, ``add_ack``..., ``ack_roll``, ``add_unmask``..., ``finish``.

Rules:
- What a site sends is checked in full before it changes anything; a site whose message is refused is
  treated as one that dropped out. A lie that its signatures prove is kept as ``Evidence``.
- The server holds one sum, not one vector a site: the masked inputs are kept by a ``Store``, on disk, until
  the attempt is over.
- An attempt is a function of what it is given: the same messages and the same challenge, in the same order,
  make the same attempt again, which says the same bytes. So a server that keeps them can be killed.
"""

from collections.abc import Sequence

import numpy as np

from fedvision.errors import MessageError, ProtocolError
from fedvision.secagg import schedule, server_sketch, shamir
from fedvision.secagg.attempt import AttemptError, MaskedSum, remove_masks
from fedvision.secagg.codec import decode, kind_of
from fedvision.secagg.masking import MaskVector
from fedvision.secagg.member import box_leaf, seed_hash, vector_digest
from fedvision.secagg.merkle import merkle_paths, merkle_root
from fedvision.secagg.messages import (
    SHARE_BYTES,
    Accepted,
    AcceptedEntry,
    Ack,
    AckRoll,
    AckUpload,
    Cohort,
    CohortEntry,
    Complaint,
    Evidence,
    Exclusion,
    Masked,
    Offer,
    Ready,
    ReadyUpload,
    Reveal,
    Signed,
    Unmask,
)
from fedvision.secagg.schedule import read_signed
from fedvision.secagg.server_complaint import judge_complaint
from fedvision.secagg.server_state import Attempt, by_site


class SumRound(Attempt):
    """One attempt at one masked sum: its steps. What it is given and what it holds: see ``Attempt``."""

    def offer(self) -> bytes:
        """Return the offer, the same for all sites."""
        return self.say(Offer(self.session, self.model))

    def add_ready(self, site: int, data: bytes) -> None:
        """Take a site's ``ReadyUpload``.

        Raises:
            ProtocolError, MessageError: It is refused; the site is not in the cohort.
        """
        if self.cohort:
            raise ProtocolError("phase", f"{self.session}: a ready message after the cohort was fixed")
        upload = decode(data, ReadyUpload)
        ready = read_signed(self.consortium, upload.ready, Ready, site)
        if ready.session != self.session or ready.model != self.model:
            raise ProtocolError("session", f"{self.session}: a ready message is of another session or model")
        if tuple(box.receiver for box in upload.boxes) != self.consortium.charter.sites:
            raise ProtocolError("box", f"{self.session}: there must be one box for each enrolled site")
        if merkle_root([box_leaf(box) for box in upload.boxes]) != ready.boxes_root:
            raise ProtocolError("box", f"{self.session}: the boxes are not the signed ones")
        self.views.ready[site] = upload.ready
        self.views.boxes[site] = {box.receiver: box for box in upload.boxes}

    def weave(self) -> dict[int, bytes]:
        """Fix the cohort and return each site's ``Cohort`` message.

        Raises:
            AttemptError: Fewer sites are ready than the smallest cohort or the threshold.
        """
        self.cohort = tuple(sorted(self.views.ready))
        self.require_enough(self.cohort, "sites are ready")
        readies = [self.views.ready[site] for site in self.cohort]
        self.tau = schedule.make_tau(self.consortium, self.session, self.model, readies)
        sites = self.consortium.charter.sites
        paths = {i: merkle_paths([box_leaf(self.views.boxes[i][j]) for j in sites]) for i in self.cohort}
        messages = {}
        for site in self.cohort:
            index = sites.index(site)
            entries = tuple(
                CohortEntry(self.views.ready[i], self.views.boxes[i][site], paths[i][index])
                for i in self.cohort
            )
            messages[site] = self.say(Cohort(self.session, entries))
        return messages

    def add_masked(self, site: int, data: bytes, vector: MaskVector) -> None:
        """Take a site's signed ``Masked`` with its masked input, or its ``Complaint`` with no input.

        Raises:
            ProtocolError, MessageError: It is refused; the site counts as dropped out.
            AttemptError: A complaint was made: this attempt is over, its evidence names who lied.
        """
        if site not in self.cohort or site in self.views.masked or self.root or self.accepted:
            raise ProtocolError("phase", f"{self.session}: a masked input that was not asked for")
        signed = decode(data, Signed)
        if kind_of(signed.body) is Complaint:
            judge_complaint(self, site, signed)
        masked = read_signed(self.consortium, signed, Masked, site)
        self.require_session(masked.tau)
        if vector.dtype != np.uint32 or vector.shape != (self.length,):
            raise MessageError(f"masked input must be uint32 of shape ({self.length},)")
        if vector_digest(vector) != masked.digest:
            raise ProtocolError("digest", f"{self.session}: a masked input does not have the signed hash")
        self.store.put(site, vector)
        self.views.masked[site] = signed
        self.views.digests[site] = masked.digest

    def masked_roll(self) -> bytes:
        """Return the list of all hashes of masked inputs; see ``server_sketch``, as for the next five."""
        return server_sketch.masked_roll(self)

    def add_beacon(self, site: int, data: bytes) -> None:
        """Take a site's signed ``Beacon``."""
        server_sketch.add_beacon(self, site, data)

    def beacon_roll(self) -> bytes:
        """Fix the sketch's seed and return the list of all beacon numbers."""
        return server_sketch.beacon_roll(self)

    def add_sketch(self, site: int, data: bytes) -> None:
        """Take a site's ``SketchUpload``."""
        server_sketch.add_sketch(self, site, data)

    def hold(self, challenge: bytes = b"") -> dict[int, bytes]:
        """Return each holder's ``Holding`` message; level ``gram``."""
        return server_sketch.hold(self, challenge)

    def add_products(self, site: int, data: bytes) -> None:
        """Take a site's signed ``Products``, or its ``Complaint`` about a dealer."""
        server_sketch.add_products(self, site, data)

    def accept(self) -> bytes:
        """Choose whose inputs are added, by norm bound and rules, and return the ``Accepted`` message.

        Raises:
            AttemptError: Too few are left.
            Disputed: Shares of sketches contradict each other; level ``gram``.
        """
        candidates = set(self.views.masked)
        for site in set(self.cohort) - candidates:
            self.excluded[site] = "no masked input"
        if self.level != "sum":
            server_sketch.judge(self)
        return self._announce(candidates - set(self.excluded))

    def shrink(self) -> bytes:
        """Return an ``Accepted`` message for the sites that acknowledged, when others have vanished.

        Raises:
            AttemptError: Too few are left. Or the level is ``sum``, where sites sign one set only; or
                ``gram``, where two sets would open the difference of two sums of sketches.
        """
        if self.level != "sketch":
            gone = set(self.inside) - set(self.views.acks)
            raise AttemptError(f"{self.session}: {len(gone)} sites vanished", self.evidence, gone)
        for entry in self.accepted:
            if entry.site not in self.views.acks:
                self.excluded[entry.site] = "vanished"
        left = set(self.views.acks)
        self.views.acks.clear()
        return self._announce(left)

    def _announce(self, inside: set[int]) -> bytes:
        self.require_enough(inside, "inputs may be added")
        self.accepted = tuple(AcceptedEntry(site, self.views.digests[site]) for site in sorted(inside))
        excluded = tuple(Exclusion(site, self.excluded[site]) for site in sorted(self.excluded))
        return self.say(Accepted(self.tau, self.accepted, excluded, self.judgement))

    def masked_input(self, site: int) -> MaskVector:
        """Return a masked input that was kept."""
        return self.store.get(site)

    def add_ack(self, site: int, data: bytes) -> None:
        """Take a site's ``AckUpload``.

        Raises:
            ProtocolError, MessageError: It is refused; the site counts as vanished.
        """
        if site not in self.inside or site in self.views.acks:
            raise ProtocolError("phase", f"{self.session}: an ack that was not asked for")
        upload = decode(data, AckUpload)
        ack = read_signed(self.consortium, upload.ack, Ack, site)
        reveal = read_signed(self.consortium, upload.reveal, Reveal, site)
        self.require_session(ack.tau)
        self.require_session(reveal.tau)
        if ack.root != schedule.accepted_root(self.accepted):
            raise ProtocolError("accepted-set", f"{self.session}: an ack of another accepted set")
        if [item.site for item in reveal.keys] != sorted(self.excluded):
            raise ProtocolError("accepted-set", f"{self.session}: mask keys are not of the sites left out")
        self.views.acks[site] = upload.ack
        self.views.keys[site] = {item.site: item.key for item in reveal.keys}

    @property
    def needs_shrinking(self) -> bool:
        """Whether a site that vanished holds a mask key that is needed, or had too few companions."""
        return bool(self.excluded) and len(self.views.acks) < len(self.accepted)

    def ack_roll(self) -> bytes:
        """Return the list of all acks.

        Raises:
            AttemptError: Fewer than the threshold.
        """
        if len(self.views.acks) < self.consortium.charter.threshold:
            raise AttemptError(
                f"{self.session}: {len(self.views.acks)} sites agreed to the accepted set, "
                f"the threshold is {self.consortium.charter.threshold}",
                self.evidence,
                set(self.inside) - set(self.views.acks),
            )
        return self.say(AckRoll(self.tau, by_site(self.views.acks)))

    def add_unmask(self, site: int, data: bytes) -> None:
        """Take a site's signed ``Unmask``.

        Raises:
            ProtocolError, MessageError: It is refused; a share that is not the committed one is evidence.
        """
        if site not in self.views.acks or site in self.views.shares:
            raise ProtocolError("phase", f"{self.session}: shares that were not asked for")
        signed = decode(data, Signed)
        unmask = read_signed(self.consortium, signed, Unmask, site)
        self.require_session(unmask.tau)
        if tuple(item.site for item in unmask.shares) != self.inside:
            raise ProtocolError("accepted-set", f"{self.session}: shares are not of the accepted sites")
        for item in unmask.shares:
            box = self.views.boxes[item.site][site]
            if schedule.share_hash(item.site, site, item.share) != box.share_hash:
                self.evidence.append(Evidence(site, "share", (self.views.ready[item.site], signed)))
                raise ProtocolError("share", f"{self.session}: a share is not the committed one")
        if len(unmask.sum_share) != (SHARE_BYTES if self.level == "gram" else 0):
            raise MessageError("a share of the sum of sketches has another length")
        self.views.shares[site] = {item.site: item.share for item in unmask.shares}
        self.views.sum_shares[site] = unmask.sum_share
        self.views.unmasks[site] = signed

    def finish(self) -> MaskedSum:
        """Remove the masks and check the sum against the sketches.

        Raises:
            AttemptError: Too few shares, or shares that a site dealt wrongly.
        """
        holders = sorted(self.views.shares)[: self.consortium.charter.threshold]
        if len(holders) < self.consortium.charter.threshold:
            raise AttemptError(
                f"{self.session}: shares of {len(holders)} sites, "
                f"the threshold is {self.consortium.charter.threshold}",
                self.evidence,
                set(self.views.acks) - set(self.views.shares),
            )
        seeds = self._recover_seeds(holders)
        total = np.zeros(self.length, np.uint32)
        for site in self.inside:
            np.add(total, self.store.get(site), out=total)
        keys = [schedule.self_key(seeds[site], self.tau) for site in self.inside]
        signs = [-1] * len(keys)
        for site in self.inside:
            for peer, key in self.views.keys.get(site, {}).items():
                keys.append(key)
                signs.append(-schedule.pair_sign(site, peer))
        remove_masks(total, keys, signs, self.threads)
        fits = self.level == "sum" or server_sketch.sum_fits(self, total)
        return MaskedSum(total, fits, seeds)

    def _recover_seeds(self, holders: Sequence[int]) -> dict[int, bytes]:
        rows = [
            [np.frombuffer(self.views.shares[h][site], np.uint8) for site in self.inside] for h in holders
        ]
        found = shamir.recover_many(holders, np.array(rows))
        seeds = dict(zip(self.inside, found, strict=True))
        for site, seed in seeds.items():
            ready = read_signed(self.consortium, self.views.ready[site], Ready, site)
            if seed_hash(seed) != ready.seed_hash:
                self.evidence.append(Evidence(site, "seed", (self.views.ready[site],)))
        if any(item.rule == "seed" for item in self.evidence):
            raise AttemptError(f"{self.session}: a site dealt shares that do not fit its seed", self.evidence)
        return seeds
