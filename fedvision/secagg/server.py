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

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedvision.errors import MessageError, ProtocolError
from fedvision.secagg import holding, schedule, shamir
from fedvision.secagg.attempt import (
    AttemptError,
    Disputed,
    MaskedSum,
    Measured,
    Select,
    Store,
    Views,
    remove_masks,
)
from fedvision.secagg.codec import decode, encode, kind_of
from fedvision.secagg.gram import over_bound, products_in_the_clear, round_sketch
from fedvision.secagg.identity import Identity
from fedvision.secagg.masking import MaskVector
from fedvision.secagg.member import box_leaf, seed_hash, vector_digest
from fedvision.secagg.merkle import merkle_paths, merkle_root
from fedvision.secagg.messages import (
    SERVER,
    SHARE_BYTES,
    SKETCH_BYTES,
    Accepted,
    AcceptedEntry,
    Ack,
    AckRoll,
    AckUpload,
    Beacon,
    BeaconRoll,
    Cohort,
    CohortEntry,
    Complaint,
    Evidence,
    Exclusion,
    Holding,
    HoldingEntry,
    Masked,
    MaskedRoll,
    Offer,
    Products,
    Ready,
    ReadyUpload,
    Reason,
    Reveal,
    Session,
    Signed,
    Sketch,
    SketchUpload,
    Unmask,
)
from fedvision.secagg.roster import colluding_bound
from fedvision.secagg.schedule import Consortium, read_signed, sign
from fedvision.secagg.site import open_box
from fedvision.secagg.sketch import PROOF_SLACK, is_within
from fedvision.secagg.sketch import sketch as sketch_of


class SumRound:
    """One attempt at one masked sum.

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
        self._select = select
        self._root = root
        self._identity = identity
        self._store = store
        self._threads = threads
        self.said: dict[str, Signed] = {}

    def say(self, message: object) -> bytes:
        """Return a message signed by the server, encoded; the last one of each kind is kept in ``said``."""
        signed = sign(self.consortium, self._identity, SERVER, message)
        self.said[type(message).__name__] = signed
        return encode(signed)

    def _require(self, present: Collection[int], what: str) -> None:
        if len(present) < self.consortium.quorum:
            text = f"{self.session}: {len(present)} {what}, the charter needs {self.consortium.quorum}"
            raise AttemptError(text, self.evidence, set(self.cohort) - set(present))

    def _of_session(self, tau: bytes) -> None:
        if tau != self.tau:
            raise ProtocolError("session", f"{self.session}: a message is of another session")

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
        self._require(self.cohort, "sites are ready")
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
            self._judge_complaint(site, signed)
        masked = read_signed(self.consortium, signed, Masked, site)
        self._of_session(masked.tau)
        if vector.dtype != np.uint32 or vector.shape != (self.length,):
            raise MessageError(f"masked input must be uint32 of shape ({self.length},)")
        if vector_digest(vector) != masked.digest:
            raise ProtocolError("digest", f"{self.session}: a masked input does not have the signed hash")
        self._store.put(site, vector)
        self.views.masked[site] = signed
        self.views.digests[site] = masked.digest

    def _judge_complaint(self, site: int, signed: Signed) -> None:
        """Convict the dealer whose box does not open, or the site that complains about a sound one.

        Raises:
            AttemptError: Always, with the evidence; ``ProtocolError`` if it is no complaint of this session.
        """
        complaint = read_signed(self.consortium, signed, Complaint, site)
        accused = complaint.accused
        if complaint.session != self.session or accused not in self.cohort or accused == site:
            raise ProtocolError("session", f"{self.session}: a complaint about another session")
        culprit = accused
        if schedule.public_of(complaint.secret) != self.publics[site, accused]:
            culprit = site  # not the key it enrolled with
        else:
            public = self.publics[accused, site]
            pair = schedule.pair_key(self.consortium, site, accused, complaint.secret, public)
            if self._box_is_sound(pair, accused, site):
                culprit = site
        proof = (self.views.ready[accused], *filter(None, [self.views.sketches.get(accused)]), signed)
        self.evidence.append(Evidence(culprit, "box", proof))
        raise AttemptError(f"{self.session}: site number {culprit} broke the rule about boxes", self.evidence)

    def _box_is_sound(self, pair: bytes, dealer: int, receiver: int) -> bool:
        """Whether what a dealer sealed to a receiver opens and is what it committed to."""
        ready = read_signed(self.consortium, self.views.ready[dealer], Ready, dealer)
        try:
            if dealer in self.views.sealed:
                share = self.views.sealed[dealer][receiver]
                count = len(self.views.beacons)
                holding.open_share(self.consortium, pair, self.tau, ready.nonce, dealer, share, count)
            else:
                open_box(pair, self.session, ready, dealer, receiver, self.views.boxes[dealer][receiver])
        except MessageError:
            return False
        return True

    def masked_roll(self) -> bytes:
        """Return the list of all hashes of masked inputs, for the sites in ``views.masked``.

        Raises:
            AttemptError: Too few masked inputs came.
        """
        self._require(self.views.masked, "masked inputs came")
        for site in set(self.cohort) - set(self.views.masked):
            self.excluded[site] = "no masked input"
        self.root = schedule.masked_root(self.views.digests)
        return self.say(MaskedRoll(self.tau, _by_site(self.views.masked)))

    def add_beacon(self, site: int, data: bytes) -> None:
        """Take a site's signed ``Beacon``.

        Raises:
            ProtocolError, MessageError: It is refused; the site counts as dropped out.
        """
        if site not in self.views.masked or site in self.views.beacons:
            raise ProtocolError("phase", f"{self.session}: a beacon number that was not asked for")
        signed = decode(data, Signed)
        beacon = read_signed(self.consortium, signed, Beacon, site)
        self._of_session(beacon.tau)
        ready = read_signed(self.consortium, self.views.ready[site], Ready, site)
        if beacon.root != self.root or seed_hash(beacon.number) != ready.beacon_hash:
            raise ProtocolError("beacon", f"{self.session}: a beacon number is not the committed one")
        self.views.beacons[site] = signed
        self.views.numbers[site] = beacon.number

    def beacon_roll(self) -> bytes:
        """Fix the sketch's seed and return the list of all beacon numbers, for those in ``views.beacons``.

        Raises:
            AttemptError: Too few beacon numbers came.
        """
        self._require(self.views.beacons, "beacon numbers came")
        for site in set(self.views.masked) - set(self.views.beacons):
            self.excluded[site] = "no beacon"
        self.beta = schedule.make_beta(self.tau, self.root, self.views.numbers)
        if self._root is not None:
            self.root_sketch = holding.root_bytes(
                round_sketch(sketch_of(self._root, self.beta, self.apart), self.norm_bound)
            )
        return self.say(BeaconRoll(self.tau, _by_site(self.views.beacons)))

    def add_sketch(self, site: int, data: bytes) -> None:
        """Take a site's ``SketchUpload``.

        Raises:
            ProtocolError, MessageError: It is refused; the site counts as dropped out.
        """
        if site not in self.views.beacons or site in self.views.sketches:
            raise ProtocolError("phase", f"{self.session}: a sketch that was not asked for")
        upload = decode(data, SketchUpload)
        sketch = read_signed(self.consortium, upload.sketch, Sketch, site)
        self._of_session(sketch.tau)
        if sketch.beta != self.beta:
            raise ProtocolError("beacon", f"{self.session}: a sketch of another map")
        if self.level == "gram":
            receivers = tuple(share.receiver for share in upload.shares)
            if sketch.values or receivers != tuple(sorted(self.views.beacons)):
                raise ProtocolError(
                    "box", f"{self.session}: there must be one share for each site of the set"
                )
            if holding.shares_root(upload.shares) != sketch.shares_root:
                raise ProtocolError("box", f"{self.session}: the shares are not the signed ones")
            self.views.sealed[site] = {share.receiver: share for share in upload.shares}
        else:
            if len(sketch.values) != SKETCH_BYTES or upload.shares:
                raise MessageError("a sketch must have 2048 values and no shares")
            self.views.values[site] = np.frombuffer(sketch.values, "<u4").astype(np.uint32)
        self.views.sketches[site] = upload.sketch

    def hold(self, challenge: bytes = b"") -> dict[int, bytes]:
        """Return each holder's ``Holding`` message; level ``gram``.

        Args:
            challenge: 32 bytes that no dealer could know, see ``holding.fresh_challenge``; drawn if absent.

        Raises:
            AttemptError: Too few sketches were shared.
        """
        dealers, points = sorted(self.views.sketches), sorted(self.views.beacons)
        self._require(dealers, "sketches were shared")
        self.challenge = challenge or holding.fresh_challenge()
        paths = {
            d: merkle_paths([holding.share_leaf(self.views.sealed[d][p]) for p in points]) for d in dealers
        }
        messages = {}
        for site in dealers:
            index = points.index(site)
            entries = tuple(
                HoldingEntry(self.views.sketches[d], self.views.sealed[d][site], paths[d][index])
                for d in dealers
            )
            messages[site] = self.say(Holding(self.tau, self.challenge, self.root_sketch, entries))
        return messages

    def add_products(self, site: int, data: bytes) -> None:
        """Take a site's signed ``Products``, or its ``Complaint`` about a dealer.

        Raises:
            ProtocolError, MessageError: It is refused; the site counts as dropped out.
            AttemptError: A complaint was made: this attempt is over, its evidence names who lied.
        """
        if site not in self.views.sketches or site in self.views.products:
            raise ProtocolError("phase", f"{self.session}: products that were not asked for")
        signed = decode(data, Signed)
        if kind_of(signed.body) is Complaint:
            self._judge_complaint(site, signed)
        products = read_signed(self.consortium, signed, Products, site)
        self._of_session(products.tau)
        dealers = sorted(self.views.sketches)
        sketches = [self.views.sketches[dealer] for dealer in dealers]
        if products.basis != holding.basis(self.challenge, sketches, self.root_sketch):
            raise ProtocolError("session", f"{self.session}: products of other dealings")
        if list(products.dealers) != dealers or len(products.zeros) != 8 * len(dealers):
            raise ProtocolError("roster", f"{self.session}: products of other dealers")
        if len(products.values) != 8 * (len(dealers) * (len(dealers) + 1) // 2):
            raise MessageError("there must be one product for each pair of dealers")
        if len(products.root) != (8 * len(dealers) if self.root_sketch else 0):
            raise MessageError("there must be one product with the root set for each dealer")
        self.views.products[site] = signed
        self.views.product_shares[site] = products.values
        self.views.zero_shares[site] = products.zeros
        self.views.root_shares[site] = products.root

    def _judge_gram(self) -> None:
        """Leave out sites whose norm is above the bound.

        Raises:
            Disputed: The shares contradict each other.
        """
        dealers = sorted(self.views.sketches)
        needed = 2 * self.consortium.charter.max_colluding + 1
        if len(self.views.products) < max(needed, self.consortium.quorum):
            raise AttemptError(
                f"{self.session}: {len(self.views.products)} sites multiplied shares, too few",
                self.evidence,
                set(dealers) - set(self.views.products),
            )
        try:
            self.gram = holding.read_gram(
                self.consortium, len(dealers), self.views.product_shares, self.views.zero_shares
            )
            root = self._read_root()
        except MessageError as error:
            raise Disputed(f"{self.session}: {error}") from None
        proof = tuple(self.views.products[site] for site in sorted(self.views.products))
        for index in over_bound(self.gram):
            self.excluded[dealers[index]] = "norm above the bound"
        charter = self.consortium.charter
        liars = colluding_bound(len(charter.sites))  # so few cannot lie unnoticed about what all see as one
        is_proof = len(proof) > 2 * charter.max_colluding + liars
        for index in over_bound(self.gram, PROOF_SLACK) if is_proof else ():
            self.evidence.append(Evidence(dealers[index], "norm", proof))
        for site in set(dealers) - set(self.views.products):
            self.excluded.setdefault(site, "no shares")
        self._apply_rules(dealers, self.gram, root)

    def _read_root(self) -> NDArray[np.int64] | None:
        if not self.root_sketch:
            return None
        return holding.read_root(self.consortium, self.gram, self.root_sketch, self.views.root_shares)

    def _judge_sketches(self) -> None:
        """Leave out sites whose norm is above the bound, and those that the rules leave out."""
        for site, values in self.views.values.items():
            if not is_within(values, self.norm_bound):
                self.excluded[site] = "norm above the bound"
            if not is_within(values, self.norm_bound, PROOF_SLACK):
                proof = (self.views.masked[site], self.views.sketches[site])
                self.evidence.append(Evidence(site, "norm", proof))
        inside = sorted(self.views.values.keys() - self.excluded.keys())
        if self._select is None or not inside:
            return
        gram, root = products_in_the_clear(
            [self.views.values[site] for site in inside],
            holding.root_values(self.root_sketch),
            self.length,
            self.beta,
            self.norm_bound,
        )
        self._apply_rules(inside, gram, root if self.root_sketch else None)

    def _apply_rules(
        self, sites: Sequence[int], gram: NDArray[np.int64], root: NDArray[np.int64] | None
    ) -> None:
        """Leave out the sites that the charter's rules leave out, of those that are not out already."""
        left = [index for index, site in enumerate(sites) if site not in self.excluded]
        most = len(left) - self.consortium.quorum
        if self._select is None or most < 0:
            return
        public = holding.root_values(self.root_sketch)
        self.measured = Measured(
            tuple(sites[index] for index in left),
            gram[np.ix_(left, left)],
            None if root is None else root[left],
            int(public @ public),
            most,
        )
        selected = self._select(self.measured)
        self.judgement = selected.judgement
        for site in sorted(selected.excluded):
            self.excluded[site] = "by the rules"

    def accept(self) -> bytes:
        """Choose whose inputs are added, by norm bound and rules, and return the ``Accepted`` message.

        Raises:
            AttemptError: Too few are left.
        """
        candidates = set(self.views.masked)
        for site in set(self.cohort) - candidates:
            self.excluded[site] = "no masked input"
        if self.level != "sum":
            for site in set(self.views.beacons) - set(self.views.sketches):
                self.excluded[site] = "no sketch"
        if self.level == "gram":
            self._judge_gram()
        if self.level == "sketch":
            self._judge_sketches()
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
        self._require(inside, "inputs may be added")
        self.accepted = tuple(AcceptedEntry(site, self.views.digests[site]) for site in sorted(inside))
        excluded = tuple(Exclusion(site, self.excluded[site]) for site in sorted(self.excluded))
        return self.say(Accepted(self.tau, self.accepted, excluded, self.judgement))

    def masked_input(self, site: int) -> MaskVector:
        """Return a masked input that was kept."""
        return self._store.get(site)

    @property
    def inside(self) -> tuple[int, ...]:
        """The accepted sites."""
        return tuple(entry.site for entry in self.accepted)

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
        self._of_session(ack.tau)
        self._of_session(reveal.tau)
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
        return self.say(AckRoll(self.tau, _by_site(self.views.acks)))

    def add_unmask(self, site: int, data: bytes) -> None:
        """Take a site's signed ``Unmask``.

        Raises:
            ProtocolError, MessageError: It is refused; a share that is not the committed one is evidence.
        """
        if site not in self.views.acks or site in self.views.shares:
            raise ProtocolError("phase", f"{self.session}: shares that were not asked for")
        signed = decode(data, Signed)
        unmask = read_signed(self.consortium, signed, Unmask, site)
        self._of_session(unmask.tau)
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
            np.add(total, self._store.get(site), out=total)
        keys = [schedule.self_key(seeds[site], self.tau) for site in self.inside]
        signs = [-1] * len(keys)
        for site in self.inside:
            for peer, key in self.views.keys.get(site, {}).items():
                keys.append(key)
                signs.append(-schedule.pair_sign(site, peer))
        remove_masks(total, keys, signs, self._threads)
        fits = True
        if self.level == "sketch":
            claimed = np.zeros(2048, np.uint32)
            for site in self.inside:
                claimed += self.views.values[site]
            fits = bool(np.array_equal(sketch_of(total, self.beta, self.apart), claimed))
        if self.level == "gram":
            found = sketch_of(total, self.beta, self.apart)
            fits = holding.sum_fits(self.consortium, len(self.inside), self.views.sum_shares, found)
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


def _by_site(messages: Mapping[int, Signed]) -> tuple[Signed, ...]:
    return tuple(messages[site] for site in sorted(messages))
