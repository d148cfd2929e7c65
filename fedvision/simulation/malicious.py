"""Malicious sites that take part in the real protocol, and the coalition behind them.

Rules:
- Honest sites run the code of a deployment; the lab only looks at what they release. A malicious site is the
  same code too, but for what a liar can do: its training samples, the update it sends, the sketch it claims.
- The coalition is the worst case: it is shown the honest updates of a round before it answers, it knows the
  charter, and its members share everything. It has no honest site's keys and not the root set.
- Whatever it sends goes through the same encoding, masks and signatures as an honest update.
- A malicious site judges models honestly, so that results are those of the model.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedvision.attacks.adaptive import Adaptive, Target
from fedvision.attacks.catalogue import Attack
from fedvision.attacks.data import PoisonedStore
from fedvision.attacks.updates import UPDATES, Knowledge, honest_weights
from fedvision.config import Job
from fedvision.data.manifest import Case, Manifest
from fedvision.data.readers import CaseStore
from fedvision.secagg import site_sketch
from fedvision.secagg.masking import MaskVector
from fedvision.secagg.member import vector_digest
from fedvision.secagg.schedule import Consortium
from fedvision.secagg.site_state import SiteSession
from fedvision.seeds import derive_seed
from fedvision.training.loop import TrainingResult
from fedvision.updates.clipping import clip_l2
from fedvision.updates.layout import FloatVector
from fedvision.wire.messages import SecureReply, SecureRequest, TrainRequest
from fedvision_sites.release import ReleasedUpdate, encode_update
from fedvision_sites.secure import NOTHING, SecureSite, request_digest
from fedvision_sites.vault import SessionFile
from fedvision_sites.work import Site, SiteConfig

if TYPE_CHECKING:
    from fedvision_sites.preparation import Prepared

LIED_STEP, LIED_CLAIM = 0.4, 0.2
"""What a liar sends, and what it claims instead, in clip norms: its partner's claim is within the bound."""


class Coalition:
    """The malicious sites of a run, together.

    Args:
        attack: What they do.
        members: Their names.
        sites: Names of all sites that train.
        job: The job.
        target: The defence, as they know it.
    """

    def __init__(
        self, attack: Attack, members: Sequence[str], sites: Sequence[str], job: Job, target: Target
    ) -> None:
        self.attack = attack
        self.members = tuple(sorted(members))
        self.num_sites = len(sites)
        self._job = job
        self._adaptive = Adaptive(target)
        self._shown: dict[str, tuple[FloatVector, float]] = {}
        self._crafted: dict[int, NDArray[np.float64]] = {}
        self._models: dict[int, FloatVector] = {}
        self._committed: dict[tuple[int, str], MaskVector] = {}
        self._claimed: dict[tuple[int, str], MaskVector] = {}
        self._excluded: set[int] = set()

    def show(self, site: str, update: FloatVector, loss: float) -> None:
        """Show the coalition what an honest site released in this round."""
        self._shown[site] = (update, loss)

    def tell_excluded(self, site: str, number: int) -> None:
        """Tell the coalition who was left out of a round; every site that stays in learns it."""
        if site in self.members:
            self._excluded.add(number)

    def rng(self, number: int, *purpose: str) -> np.random.Generator:
        """Return the coalition's source of noise for a round."""
        return np.random.default_rng(derive_seed(self._job.seed, "coalition", number, *purpose))

    @property
    def loss(self) -> float:
        """What a member gives as its training loss: the honest mean."""
        return float(np.mean([loss for _, loss in self._shown.values()])) if self._shown else 0.0

    def know(self, number: int, weights: FloatVector) -> Knowledge:
        """Return what the coalition knows in a round, whose model is ``weights``."""
        self._models[number] = weights
        before = self._models.get(number - 1, weights)
        honest = np.stack([update for _, (update, _) in sorted(self._shown.items())]).astype(np.float64)
        last_step = weights.astype(np.float64) - before
        return Knowledge(
            honest, len(self.members), self._job.aggregation.clip_norm, last_step, self.rng(number)
        )

    def update(self, site: str, number: int, weights: FloatVector) -> FloatVector:
        """Return a member's update of a round, not clipped, shape (d,)."""
        if number not in self._crafted:
            self._crafted = {number: self._craft(self.know(number, weights), number)}
        vector = self._crafted[number][self.members.index(site)]
        return vector.astype(np.float32)

    def _craft(self, known: Knowledge, number: int) -> NDArray[np.float64]:
        if self.attack.name == "adaptive":
            if number > 1:
                self._adaptive.told(number - 1 in self._excluded)
            return self._adaptive.craft(known)
        if self.attack.name == "lying-sketch":
            mean = known.mean
            length = max(float(np.linalg.norm(mean)), 1e-12)
            return known.all_alike(-LIED_STEP * known.clip_norm / length * mean)
        return UPDATES[self.attack.name](known)

    def commit(self, site: str, number: int, vector: MaskVector, claim: MaskVector) -> None:
        """Note what a member has put in, and what it would rather have sketched."""
        self._committed[number, site] = vector
        self._claimed[number, site] = claim

    def claim(self, site: str, number: int) -> MaskVector | None:
        """Return what a member sketches instead of its input, None for its input.

        Members lie in pairs: the first claims an update like an honest one, the second what is missing from
        the sum of their inputs. The last of an odd number does not lie.
        """
        index = self.members.index(site)
        partner = index ^ 1
        if (number, site) not in self._committed or partner >= len(self.members):
            return None
        if index % 2 == 0:
            return self._claimed[number, site]
        other = self.members[partner]
        if (number, other) not in self._committed:
            return None
        return self._committed[number, site] + self._committed[number, other] - self._claimed[number, other]

    def honest_like(self, number: int) -> FloatVector:
        """Return an update like the honest ones, of length ``LIED_CLAIM`` clip norms."""
        honest = np.stack([update for _, (update, _) in sorted(self._shown.items())]).astype(np.float64)
        vector = (honest_weights(len(honest), 1, self.rng(number, "claim")) @ honest)[0]
        length = max(float(np.linalg.norm(vector)), 1e-12)
        scaled = vector * (LIED_CLAIM * self._job.aggregation.clip_norm / length)
        return np.asarray(scaled, np.float32)


class WatchedSite(Site):
    """An honest site whose released updates the coalition is shown."""

    def __init__(self, config: SiteConfig, coalition: Coalition) -> None:
        super().__init__(config)
        self._coalition = coalition

    def _train_locally(
        self, request: TrainRequest, prepared: "Prepared", cases: Sequence[Case]
    ) -> tuple[ReleasedUpdate, TrainingResult]:
        released, result = super()._train_locally(request, prepared, cases)
        self._coalition.show(self.config.name, released.update, result.loss)
        return released, result


class MaliciousSite(Site):
    """A member of the coalition."""

    def __init__(self, config: SiteConfig, coalition: Coalition) -> None:
        super().__init__(config)
        self._coalition = coalition

    def _data(self, job: Job) -> tuple[Manifest, CaseStore]:
        manifest, store = super()._data(job)
        attack = self._coalition.attack
        if attack.poison is not None and not isinstance(store, PoisonedStore):
            store = PoisonedStore(
                manifest, job, self.config.cache_bytes, attack.poison, attack.poisoned_every
            )
            self._store = (job.digest(), store)
        return manifest, store

    def _train_locally(
        self, request: TrainRequest, prepared: "Prepared", cases: Sequence[Case]
    ) -> tuple[ReleasedUpdate, TrainingResult]:
        coalition, attack = self._coalition, self._coalition.attack
        clip_norm = prepared.job.aggregation.clip_norm
        if attack.poison is None:
            vector = coalition.update(self.config.name, request.round, request.weights)
            update, norm = clip_l2(vector, clip_norm)
            return ReleasedUpdate(update, norm, 1.0), TrainingResult(coalition.loss, 1, 0.0)
        released, result = super()._train_locally(request, prepared, cases)
        if attack.stretch == "bound":
            length = max(float(np.linalg.norm(released.update.astype(np.float64))), 1e-12)
            update, _ = clip_l2((released.update * (clip_norm / length)).astype(np.float32), clip_norm)
            released = dataclasses.replace(released, update=update)
        elif attack.stretch == "over" and not prepared.job.aggregation.secure:
            released = dataclasses.replace(released, update=released.update * np.float32(self._boost))
        return released, result

    @property
    def _boost(self) -> int:
        """The factor of a model replacement: it makes up for all others."""
        return -(-self._coalition.num_sites // len(self._coalition.members))

    def _encode(
        self,
        released: ReleasedUpdate,
        num_cases: int,
        loss: float,
        job: Job,
        consortium: Consortium,
        number: int,
    ) -> MaskVector:
        vector = super()._encode(released, num_cases, loss, job, consortium, number)
        coalition = self._coalition
        if coalition.attack.stretch == "over":
            update = vector.view(np.int32)[: consortium.encoding.size]
            update *= np.int32(self._boost)
        if coalition.attack.name == "lying-sketch":
            other = dataclasses.replace(released, update=coalition.honest_like(number))
            claim = encode_update(other, num_cases, loss, job, consortium, (self.config.name, number))
            coalition.commit(self.config.name, number, vector, claim)
        return vector

    def _secure_site(self, charter: str) -> SecureSite:
        if self._coalition.attack.name != "lying-sketch":
            return super()._secure_site(charter)
        if charter not in self._secure:
            config = self.config
            self._secure = {
                charter: LyingSecureSite(
                    self._secure_config(), config.name, config.state, charter, config.threads
                )
            }
        site = self._secure[charter]
        assert isinstance(site, LyingSecureSite)
        site.coalition = self._coalition
        return site


class LyingSecureSite(SecureSite):
    """A member that sketches another vector than the one it has committed to."""

    coalition: Coalition
    _is_lying = False

    def answer(self, request: SecureRequest) -> SecureReply:
        """Do one step, with the claimed vector where it is sketched."""
        self._is_lying = request.step == "hold"
        try:
            return self._sketch(request) if request.step == "sketch" else super().answer(request)
        finally:
            self._is_lying = False

    def _claim(self, state: SiteSession) -> MaskVector | None:
        if state.session.purpose != "train":
            return None
        return self.coalition.claim(self._name, state.session.round)

    def _sketch(self, request: SecureRequest) -> SecureReply:
        marks = self._vault.marks()
        state, body = self._vault.last(marks).session, request.body.tobytes()
        claim = self._claim(state)
        if claim is None:
            return super().answer(request)
        lied = dataclasses.replace(state, input_digest=vector_digest(claim))
        marks, after, answer = site_sketch.send_sketch(self.member, marks, lied, body, claim)
        after = dataclasses.replace(after, input_digest=state.input_digest)
        self._vault.save(marks, SessionFile(after, request_digest(request.step, body), answer))
        return self._reply(request, answer, NOTHING)

    def _input(self, state: SiteSession) -> MaskVector:
        claim = self._claim(state) if self._is_lying else None
        return super()._input(state) if claim is None else claim
