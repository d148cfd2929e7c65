"""A site's work: one request in, one reply out. No Flower here, so it runs in a test as it does deployed.

Rules:
- What is sent is checked in full before it is used; the site's own manifest must agree with the job.
- A request that cannot be met is answered with a ``Refusal`` that carries a code. The text, which may
  name a file, goes to the site's own record.
- Weights of another job, another layout or another round than announced are refused.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from fedvision.config import Job
from fedvision.data.manifest import Case, Manifest, load_manifest, pool_manifests
from fedvision.data.readers import CaseStore, Sample
from fedvision.errors import ConfigError, DataError, FedvisionError, MessageError, ProtocolError
from fedvision.storage import append_line, write_text
from fedvision.tasks import CaseResult, initial_network, local_names, task_module
from fedvision.training.evaluation import evaluate
from fedvision.training.loop import TrainingResult, train
from fedvision.updates.layout import (
    Layout,
    flatten,
    float_tensors,
    layout_of,
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
from fedvision_sites.release import (
    ReleasedUpdate,
    encode_judgement,
    encode_update,
    release_statistics,
    release_update,
)
from fedvision_sites.secure import NOTHING, SecureConfig, SecureSite, enrol
from fedvision_sites.state import load_local, save_local
from fedvision_sites.vault import check_job, pin_release

logger = logging.getLogger(__name__)


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
    """

    name: str
    data: tuple[Path, ...]
    state: Path
    threads: int
    cache_bytes: int
    resampling_seed: int = field(repr=False)
    secure: SecureConfig | None = None


@dataclass(frozen=True)
class Prepared:
    """A job made ready at this site: parsed, checked, with network and data at hand."""

    job: Job
    network: nn.Module
    layout: Layout
    local: frozenset[str]
    initial_local: dict[str, torch.Tensor]
    device: torch.device


class Site:
    """Answers requests for one site; keeps the network and the decoded cases warm between rounds."""

    def __init__(self, config: SiteConfig) -> None:
        self.config = config
        self._manifest: Manifest | None = None
        self._prepared: tuple[str, Prepared] | None = None
        self._store: tuple[str, CaseStore] | None = None
        self._secure: dict[str, SecureSite] = {}

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
        if self._prepared is None or self._prepared[0] != request.job_digest:
            job = parse_sent_job(request.job_json, request.job_digest)
            if self.config.secure is not None and not job.aggregation.secure:
                raise ProtocolError(
                    "secure-only", "this site takes part in jobs with secure aggregation only"
                )
            check_agrees(self._data(job)[0], job)
            network = initial_network(job)
            local = local_names(network, job)
            layout = layout_of(network, local)
            own = float_tensors(network)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            kept = {name: own[name].clone() for name in sorted(local)}
            self._prepared = (
                request.job_digest,
                Prepared(job, network.to(device), layout, local, kept, device),
            )
        if self.config.secure is not None and not isinstance(request, HelloRequest):
            check_job(self.config.secure.guard, request.job_digest, request.charter)
        prepared = self._prepared[1]
        if prepared.layout.digest != request.layout_digest:
            raise MessageError("the server's weights have another layout than this site's network")
        return prepared

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
        site, offer = self._secure_site(request.charter), request.offer.tobytes()
        session, model = site.open_session(offer), model_digest(request.weights)
        if session.purpose != "train" or session.round != request.round:
            raise ProtocolError("session", f"{session}: the offer is not for training in this round")
        vector = site.pending(session, model)
        if vector is None:
            released, result = self._train_locally(request, prepared, cases)
            key = (self.config.name, request.round)
            vector = encode_update(released, len(cases), result.loss, job, site.consortium, key)
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
        result = train(prepared.network, job, store, cases, request.round, self.config.name, prepared.device)
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
                "train_loss": result.loss,
                "num_steps": result.num_steps,
                "started": round(started, 3),
                "seconds": round(result.seconds, 3),
            },
        )
        return released, result

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
        site, offer = self._secure_site(request.charter), request.offer.tobytes()
        session, model = site.open_session(offer), model_digest(request.weights)
        purpose = {"val": "validate", "test": "test"}[request.split]
        is_numbered = session.round == request.round or purpose == "test"
        if session.purpose != purpose or not is_numbered:
            raise ProtocolError("session", f"{session}: the offer is not for this split and round")
        vector = site.pending(session, model)
        if vector is None:
            vector = encode_judgement(self._judge(request, prepared).statistics, job, request.is_final)
            site.keep(session, model, vector)
        answer = site.begin(offer, model, vector)
        return ready_reply(self.config.name, request.job_digest, request.round, "ready", answer)

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
            self._draw_examples(job, [cases[index] for _, index in sorted(scores)], judge)
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

    def _draw_examples(
        self,
        job: Job,
        ordered: Sequence[Case],
        judge: Callable[[Sequence[Case]], list[tuple[Sample, CaseResult]]],
    ) -> None:
        """Draw the best, median and worst case, ``ordered`` from worst to best, into the site's folder."""
        from fedvision.report.examples import draw_example

        if not ordered:
            return
        chosen = {"worst": ordered[0], "median": ordered[len(ordered) // 2], "best": ordered[-1]}
        for label, case in chosen.items():
            ((sample, result),) = judge([case])
            path = self.config.state / "examples" / f"{label}.png"
            draw_example(sample, result, job, path, f"{self.config.name}: {label} test case")


def refusal_code(error: FedvisionError) -> str:
    """Return what a refusal says: the class of error and, for a rule of the protocol, its name."""
    return f"{error.code}: {error.rule}" if isinstance(error, ProtocolError) else error.code


def ready_reply(site: str, job_digest: str, number: int, step: Step, answer: bytes) -> SecureReply:
    """Return a reply without a masked input."""
    return SecureReply(job_digest, site, number, step, as_vector(answer), NOTHING)


def may_release(split: str, job: Job) -> bool:
    """Whether a site may send its sums of a split in the clear."""
    return split == "test" and "test" in job.secure_aggregation.release


def parse_sent_job(job_json: str, job_digest: str) -> Job:
    """Validate a job that came in a message.

    Raises:
        MessageError: It does not validate, or is not the job of that digest.
    """
    try:
        job = Job.model_validate_json(job_json)
    except ValidationError:
        raise MessageError("the sent job is not valid for this version of fedvision") from None
    if job.digest() != job_digest or job.data is not None:
        raise MessageError("the sent job does not have the announced digest")
    return job


def check_agrees(manifest: Manifest, job: Job) -> None:
    """Check that a site's data set is what the job trains on.

    Raises:
        DataError: Task, dimensions or classes differ.
    """
    for name, ours, theirs in (
        ("task", manifest.task, job.task.kind),
        ("spatial_dims", manifest.spatial_dims, job.task.spatial_dims),
        ("classes", list(manifest.classes), list(job.task.classes)),
    ):
        if ours != theirs:
            raise DataError(
                f"site {manifest.site}: {name} is {ours} in the manifest, but {theirs} in the job",
                f"the [task] section of the job and the manifest must have the same {name}",
            )
