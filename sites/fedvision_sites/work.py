"""A site's work: one request in, one reply out. No Flower here, so it runs in a test as it does deployed.

Rules:
- What is sent is checked in full before it is used; the site's own manifest must agree with the job.
- A request that cannot be met is answered with a ``Refusal`` that carries a code. The text, which may
  name a file, goes to the site's own record.
- Weights of another job, another layout or another round than announced are refused.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fedvision.config import Job
from fedvision.data.manifest import Case, Manifest, difference, load_manifest, pool_manifests
from fedvision.data.readers import CaseStore, Sample
from fedvision.errors import ConfigError, DataError, FedvisionError, MessageError, ProtocolError
from fedvision.privacy.ledger import Ledger
from fedvision.privacy.networks import check_private
from fedvision.secagg import identity
from fedvision.secagg.codec import decode
from fedvision.secagg.masking import MaskVector
from fedvision.secagg.messages import Documents, Purpose
from fedvision.secagg.schedule import Consortium
from fedvision.storage import append_line, write_text
from fedvision.tasks import CaseResult, task_module
from fedvision.training.evaluation import evaluate
from fedvision.training.loop import TrainingResult, train
from fedvision.training.private import (
    PrivateGradient,
    crops_rng,
    descent,
    patients_of,
    train_privately,
)
from fedvision.updates.layout import (
    flatten,
    float_tensors,
    load_vector,
    model_digest,
)
from fedvision.wire.messages import (
    EvaluateReply,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    Refusal,
    Reply,
    Request,
    SecureReply,
    SecureRequest,
    Step,
    TrainReply,
    TrainRequest,
    as_vector,
)
from fedvision_sites.budget import (
    LEDGER,
    NO_LIMIT,
    Budget,
    check_budget,
    entry_of,
    note_reserved,
    planned_cost,
)
from fedvision_sites.preparation import Prepared, build, draw_examples, parse_sent_job
from fedvision_sites.release import (
    ReleasedUpdate,
    add_noise,
    encode_judgement,
    encode_update,
    release_statistics,
    release_sum,
    release_update,
)
from fedvision_sites.secure import NOTHING, SecureConfig, SecureSite, enrol, read_documents
from fedvision_sites.state import load_local, save_local
from fedvision_sites.vault import check_job, load_documents, pin_release, save_documents

logger = logging.getLogger(__name__)
Decide = Callable[[Job, bytes, Manifest], str]
"""Says whether a job may run: from the job, its signed documents (``secagg.messages.Documents``, encoded and
verified; empty without secure aggregation) and the site's data set. Returns "" or a code that travels:
``WAITING`` while nobody decided, ``DENIED`` if they said no, ``POLICY`` if its policy does."""
WAITING, DENIED, POLICY = "waiting", "denied", "policy"


class Withheld(FedvisionError):
    """The site's people or its policy do not let a job run, or not yet.

    Args:
        reason: The code that travels.
    """

    code = "policy"

    def __init__(self, reason: str) -> None:
        super().__init__(f"this site does not run the job: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class SiteConfig:
    """What a site knows about itself.

    Attributes:
        name: The site's name in the federation.
        data: Folder of its data set. Several folders are trained on as one pooled data set.
        state: Folder of what it keeps, see ``fedvision_sites.state``.
        threads: CPU threads for training.
        cache_bytes: Memory for decoded cases.
        resampling_seed: Draws the bootstrap resamples; the site's own, never sent.
        secure: Its keys for secure aggregation; None if it takes part in jobs without it only.
        decide: Is asked before anything of a job runs, and again at every request that has a job in it; must
            be hashable, as functions and bound methods are. None lets every job run.
        budget: What its people allow to be spent on its patients.
        log: Writes to the audit log; must be hashable. A simulated site has none.
    """

    name: str
    data: tuple[Path, ...]
    state: Path
    threads: int
    cache_bytes: int
    resampling_seed: int = field(repr=False)
    secure: SecureConfig | None = None
    decide: Decide | None = None
    budget: Budget = NO_LIMIT
    log: Callable[..., None] | None = None


class Site:
    """Answers requests for one site; keeps the network and the decoded cases warm between rounds."""

    def __init__(self, config: SiteConfig) -> None:
        self.config = config
        self._manifest: Manifest | None = None
        self._prepared: tuple[str, Prepared] | None = None
        self._store: tuple[str, CaseStore] | None = None
        self._secure: dict[str, SecureSite] = {}
        self._gradient: tuple[str, PrivateGradient] | None = None

    def answer(self, request: Request) -> Reply:
        """Do what is asked, or refuse with a code. Never raises a ``FedvisionError``."""
        number = 0 if isinstance(request, HelloRequest) else request.round
        try:
            if isinstance(request, SecureRequest):
                return self._secure_step(request)
            torch.set_num_threads(self.config.threads)
            prepared = self._prepare(request)
            if isinstance(request, HelloRequest):
                return self._hello(request, prepared)
            if isinstance(request, TrainRequest):
                return self._train(request, prepared)
            return self._evaluate(request, prepared)
        except FedvisionError as error:
            logger.warning("round %s refused: %s", number, error)
            append_line(
                self.config.state / "log.jsonl", {"round": number, "refused": str(error), "hint": error.hint}
            )
            return Refusal(request.job_digest, self.config.name, number, refusal_code(error))

    def _data(self, job: Job) -> tuple[Manifest, CaseStore]:
        if self._manifest is None:
            manifests = [load_manifest(folder) for folder in self.config.data]
            self._manifest = (
                manifests[0] if len(manifests) == 1 else pool_manifests(self.config.name, manifests)
            )
        if self._store is None or self._store[0] != job.digest():
            self._store = (job.digest(), CaseStore(self._manifest, job, self.config.cache_bytes))
        return self._manifest, self._store[1]

    def _prepare(self, request: HelloRequest | TrainRequest | EvaluateRequest) -> Prepared:
        known = self._prepared is not None and self._prepared[0] == request.job_digest
        job = self._prepared[1].job if self._prepared and known else self._read_job(request)
        self._require_leave(request, job)
        if self._prepared is None or not known:
            self._prepared = (request.job_digest, build(job))
        if self.config.secure is not None and not isinstance(request, HelloRequest):
            check_job(self.config.secure.guard, request.job_digest, request.charter)
        prepared = self._prepared[1]
        if prepared.layout.digest != request.layout_digest:
            raise MessageError("the server's weights have another layout than this site's network")
        return prepared

    def _read_job(self, request: HelloRequest | TrainRequest | EvaluateRequest) -> Job:
        job = parse_sent_job(request.job_json, request.job_digest)
        if self.config.secure is not None and not job.aggregation.secure:
            raise ProtocolError("secure-only", "this site takes part in jobs with secure aggregation only")
        check_agrees(self._data(job)[0], job)
        return job

    def _require_leave(self, request: HelloRequest | TrainRequest | EvaluateRequest, job: Job) -> None:
        """Ask whether the job may run here; nothing of it is built before.

        Raises:
            Withheld: It may not, or not yet.
        """
        if self.config.decide is None:
            return
        documents = b""
        if job.aggregation.secure:
            documents = load_documents(self.config.state)
            if isinstance(request, HelloRequest):
                documents = request.documents.tobytes()
            read_documents(decode(documents, Documents), self._secure_config().governance)
        reason = self.config.decide(job, documents, self._data(job)[0])
        if reason:
            raise Withheld(reason)

    def _load(self, prepared: Prepared, weights: np.ndarray, after_round: int) -> None:
        """Set the network to the sent weights and to this site's local layers as of ``after_round``."""
        if not np.isfinite(weights).all():
            raise MessageError("the sent weights are not finite")
        load_vector(prepared.network, prepared.layout, weights)
        own = float_tensors(prepared.network)
        with torch.no_grad():
            for name, initial in prepared.initial_local.items():
                own[name].copy_(initial)
        load_local(self.config.state, after_round, prepared.network, prepared.local)

    def _hello(self, request: HelloRequest, prepared: Prepared) -> HelloReply:
        job = prepared.job
        manifest, _ = self._data(job)
        train, val, test = (len(manifest.in_split(split)) for split in ("train", "val", "test"))
        enrolment = b""
        if job.aggregation.secure:
            train, val, test = min(train, 1), min(val, 1), min(test, 1)
            enrolment = enrol(
                self._secure_config(),
                self.config.name,
                self.config.state,
                job,
                prepared.layout,
                request.documents.tobytes(),
            )
            save_documents(self.config.state, request.documents.tobytes())
            if job.privacy.is_on and train:
                documents = decode(request.documents.tobytes(), Documents)
                charter = read_documents(documents, self._secure_config().governance).charter
                check_private(prepared.network)
                check_budget(self._ledger(), self.config.budget, job, charter, manifest)
        return HelloReply(request.job_digest, self.config.name, train, val, test, as_vector(enrolment))

    def _secure_config(self) -> SecureConfig:
        if self.config.secure is None:
            raise ConfigError(
                "this site has no key for secure aggregation", "make one with `fedvision keys new`"
            )
        return self.config.secure

    def _secure_site(self, charter: str) -> SecureSite:
        if charter not in self._secure:
            config = self.config
            self._secure = {
                charter: SecureSite(self._secure_config(), config.name, config.state, charter, config.threads)
            }
        return self._secure[charter]

    def _secure_step(self, request: SecureRequest) -> SecureReply:
        site = self._secure_site(request.charter)
        if request.step != "enrolled":
            return site.answer(request)
        site.save_roll(request.body.tobytes())
        return ready_reply(self.config.name, request.job_digest, request.round, "enrolled", b"")

    def _train(self, request: TrainRequest, prepared: Prepared) -> TrainReply | SecureReply:
        job = prepared.job
        cases = self._data(job)[0].in_split("train")
        if not cases:
            raise DataError(f"site {self.config.name} has no training case")
        if not job.aggregation.secure:
            released, result = self._train_locally(request, prepared, cases)
            return TrainReply(
                request.job_digest,
                self.config.name,
                request.round,
                len(cases),
                result.num_steps,
                result.loss,
                result.seconds,
                released.update,
            )
        site = self._secure_site(request.charter)

        def make() -> MaskVector:
            released, result = self._train_locally(request, prepared, cases)
            return self._encode(released, len(cases), result.loss, job, site.consortium, request.round)

        return self._get_ready(request, site, "train", make)

    def _encode(
        self,
        released: ReleasedUpdate,
        num_cases: int,
        loss: float,
        job: Job,
        consortium: Consortium,
        number: int,
    ) -> MaskVector:
        """Return the input of a training sum, to be masked; of a private job without the loss, with noise."""
        key = (self.config.name, number)
        if not job.privacy.is_on:
            return encode_update(released, num_cases, loss, job, consortium, key)
        vector = encode_update(released, 1, 0.0, job, consortium, key)
        return add_noise(vector, consortium) if job.privacy.mode == "distributed" else vector

    def _get_ready(
        self,
        request: TrainRequest | EvaluateRequest,
        site: SecureSite,
        purpose: Purpose,
        make: Callable[[], MaskVector],
    ) -> SecureReply:
        """Begin a session: with the input of an earlier attempt if there is one, else with the one that
        ``make`` returns. The offer that was answered last is answered again with the same bytes."""
        offer, model = request.offer.tobytes(), model_digest(request.weights)
        session = site.read_offer(offer)
        is_numbered = session.round == request.round or purpose == "test"
        if session.purpose != purpose or not is_numbered:
            raise ProtocolError("session", f"{session}: the offer is not for this round of {purpose}")
        answer = site.repeated(offer, model)
        if answer is None:
            site.open_session(offer)
            vector = site.pending(session, model)
            if vector is None:
                vector = make()
                site.keep(session, model, vector)
            answer = site.begin(offer, model, vector)
        return ready_reply(self.config.name, request.job_digest, request.round, "ready", answer)

    def _train_locally(
        self, request: TrainRequest, prepared: Prepared, cases: Sequence[Case]
    ) -> tuple[ReleasedUpdate, TrainingResult]:
        """Train on the site's cases, and return the clipped update and how training went."""
        job = prepared.job
        _, store = self._data(job)
        self._load(prepared, request.weights, request.round - 1)
        started = time.time()
        if job.privacy.is_on:
            released, result = self._train_privately(request, prepared, cases)
        else:
            result = train(
                prepared.network, job, store, cases, request.round, self.config.name, prepared.device
            )
            released = release_update(request.weights, flatten(prepared.network, prepared.layout), job)
        save_local(self.config.state, request.round, prepared.network, prepared.local)
        append_line(
            self.config.state / "log.jsonl",
            {
                "round": request.round,
                "norm_before": released.norm_before,
                "clip_norm": job.aggregation.clip_norm,
                "share_kept": released.share_kept,
                "is_clipped": released.share_kept < 1,
                "train_loss": result.loss if math.isfinite(result.loss) else None,
                "num_steps": result.num_steps,
                "started": round(started, 3),
                "seconds": round(result.seconds, 3),
            },
        )
        return released, result

    def _train_privately(
        self, request: TrainRequest, prepared: Prepared, cases: Sequence[Case]
    ) -> tuple[ReleasedUpdate, TrainingResult]:
        """Do a round of a private job, which is in the ledger before; the weights of the round are loaded."""
        job, name = prepared.job, self.config.name
        manifest, store = self._data(job)
        charter = self._secure_site(request.charter).consortium.charter
        ledger = self._ledger()
        with ledger.held():
            check_budget(ledger, self.config.budget, job, charter, manifest)
            receipt = ledger.reserve(entry_of(job, charter, manifest, request.round))
            first = ledger.first_of(job.digest())
        if self.config.log is not None and first is not None and first[0] == receipt.number:
            note_reserved(self.config.log, first, job, manifest.site, planned_cost(job, charter, manifest))
        if receipt.warning:
            logger.warning("%s", receipt.warning)
        if self._gradient is None or self._gradient[0] != request.job_digest:
            patients = patients_of(cases, job)
            made = PrivateGradient(prepared.network, job, store, patients, prepared.device)
            self._gradient = (request.job_digest, made)
        gradient = self._gradient[1]
        if job.privacy.mode == "local":
            result = train_privately(gradient, request.round, name)
            return release_update(request.weights, flatten(prepared.network, prepared.layout), job), result
        started = time.perf_counter()
        found = gradient.sum(crops_rng(job, request.round, name))
        released = release_sum(descent(found.gradient, prepared.network, prepared.layout), job)
        return released, TrainingResult(found.mean_loss, 1, time.perf_counter() - started)

    def _ledger(self) -> Ledger:
        secure = self._secure_config()
        path = self.config.budget.ledger or self.config.state / LEDGER
        return Ledger(path, secure.guard, identity.load(secure.identity))

    def _evaluate(self, request: EvaluateRequest, prepared: Prepared) -> EvaluateReply | SecureReply:
        job = prepared.job
        is_hidden = bool(request.charter)
        if job.aggregation.secure and not is_hidden and not may_release(request.split, job):
            raise ProtocolError(
                "releases", f"the charter does not release statistics of {request.split} by site"
            )
        if not is_hidden:
            if job.aggregation.secure:
                pin_release(self._secure_config().guard, request.job_digest, model_digest(request.weights))
            return self._judge(request, prepared)
        purpose: Purpose = "validate" if request.split == "val" else "test"

        def make() -> MaskVector:
            return encode_judgement(self._judge(request, prepared).statistics, job, request.is_final)

        return self._get_ready(request, self._secure_site(request.charter), purpose, make)

    def _judge(self, request: EvaluateRequest, prepared: Prepared) -> EvaluateReply:
        """Judge the model on the site's cases of a split."""
        job = prepared.job
        manifest, store = self._data(job)
        cases = manifest.in_split(request.split)
        self._load(prepared, request.weights, request.round)

        def judge(some: Sequence[Case]) -> list[tuple[Sample, CaseResult]]:
            return list(evaluate(prepared.network, job, store, some, prepared.device, request.is_final))

        rows = np.zeros((len(cases), task_module(job).statistics_size(job)))
        scores: list[tuple[float, int]] = []
        records = []
        for index, case in enumerate(cases):
            ((_, result),) = judge([case])
            rows[index] = result.statistics
            scores.append((result.score, index))
            records.append(
                {"case": case.id, "patient": case.patient, "score": result.score, "values": result.values}
            )
        if request.is_final:
            text = "".join(json.dumps(record) + "\n" for record in records)
            write_text(self.config.state / f"{request.split}-cases.jsonl", text)
            ordered = [cases[index] for _, index in sorted(scores)]
            draw_examples(self.config.state / "examples", self.config.name, job, ordered, judge)
        resamples = job.evaluation.bootstrap if request.is_final else 0
        patients = [case.patient for case in cases]
        statistics = release_statistics(rows, patients, resamples, self.config.resampling_seed)
        return EvaluateReply(
            request.job_digest,
            self.config.name,
            request.round,
            request.split,
            len(cases),
            len(set(patients)),
            statistics,
        )


def refusal_code(error: FedvisionError) -> str:
    """Return what a refusal says: the class of error and, for a rule of the protocol, its name."""
    if isinstance(error, Withheld):
        return error.reason
    return f"{error.code}: {error.rule}" if isinstance(error, ProtocolError) else error.code


def ready_reply(site: str, job_digest: str, number: int, step: Step, answer: bytes) -> SecureReply:
    """Return a reply without a masked input."""
    return SecureReply(job_digest, site, number, step, as_vector(answer), NOTHING)


def may_release(split: str, job: Job) -> bool:
    """Whether a site may send its sums of a split in the clear."""
    return split == "test" and "test" in job.secure_aggregation.release


def check_agrees(manifest: Manifest, job: Job) -> None:
    """Check that a site's data set is what the job trains on.

    Raises:
        DataError: Task, dimensions or classes differ.
    """
    found = difference(manifest, job)
    if found is not None:
        name, ours, theirs = found
        raise DataError(
            f"site {manifest.site}: {name} is {ours} in the manifest, but {theirs} in the job",
            f"the [task] section of the job and the manifest must have the same {name}",
        )
