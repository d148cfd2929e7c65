"""The messages of a run as frozen dataclasses, with the checks that come before any use.

    server -> site   HelloRequest      who are you, and can you run this job?
    site -> server   HelloReply        name and number of cases a split; nothing about a patient
    server -> site   TrainRequest      the global weights of a round
    site -> server   TrainReply        the clipped update and its weight
    server -> site   EvaluateRequest   weights to judge on one split
    site -> server   EvaluateReply     sums of statistics over the site's cases, and bootstrap resamples
    server -> site   SecureRequest     a step of secure aggregation
    site -> server   SecureReply       its answer; a masked input goes beside it
    site -> server   Refusal           the site did not do it; a code, never a text

With secure aggregation ``TrainRequest`` and ``EvaluateRequest`` carry an ``offer``, and are answered by a
``SecureReply`` whose body says "ready": the numbers stay at the site until they are masked. A
``HelloReply`` then says of each split only whether the site has cases in it.

Rules:
- Every message is bound to a job by its digest, and to a round.
- A vector's type, length and finiteness are checked before it is used.
- The reply to a request repeats the request's job digest and round.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedvision.errors import MessageError

Split = Literal["val", "test"]
Step = Literal[
    "enrolled", "ready", "mask", "beacon", "sketch", "hold", "accept", "unmask", "told", "dispute", "open"
]
ByteVector = NDArray[np.uint8]
FloatVector = NDArray[np.float32]
"""As in ``updates.layout``, which needs PyTorch; programs that only carry messages do without."""
MAX_CASES = 10_000_000


@dataclass(frozen=True)
class HelloRequest:
    """Ask a site for its name and whether it can run the job.

    Attributes:
        documents: The encoded ``secagg.messages.Documents``, uint8; empty without secure aggregation.
    """

    job_json: str
    job_digest: str
    layout_digest: str
    documents: ByteVector = field(repr=False)


@dataclass(frozen=True)
class HelloReply:
    """A site's answer: its name and its number of cases in each split.

    With secure aggregation the numbers are 1 or 0, whether there is any case, and ``enrolment`` is the
    encoded, signed ``secagg.messages.Enrolment`` of a site that trains.
    """

    job_digest: str
    site: str
    num_train: int
    num_val: int
    num_test: int
    enrolment: ByteVector = field(repr=False)


@dataclass(frozen=True)
class TrainRequest:
    """The global weights to train from in ``round`` (1 is the first).

    Attributes:
        charter: SHA-256 of the charter in hexadecimal, "" without secure aggregation.
        offer: The signed ``secagg.messages.Offer``, uint8; empty without secure aggregation.
    """

    job_json: str
    job_digest: str
    layout_digest: str
    round: int
    charter: str
    offer: ByteVector = field(repr=False)
    weights: FloatVector = field(repr=False)


@dataclass(frozen=True)
class TrainReply:
    """A site's clipped update: local minus global weights, float32, shape (d,)."""

    job_digest: str
    site: str
    round: int
    num_samples: int
    num_steps: int
    train_loss: float
    seconds: float
    update: FloatVector = field(repr=False)


@dataclass(frozen=True)
class EvaluateRequest:
    """Weights to judge on ``split``; ``is_final`` asks for every metric, intervals and example pictures.

    ``charter`` and ``offer`` are as in ``TrainRequest``.
    """

    job_json: str
    job_digest: str
    layout_digest: str
    round: int
    split: Split
    is_final: bool
    charter: str
    offer: ByteVector = field(repr=False)
    weights: FloatVector = field(repr=False)


@dataclass(frozen=True)
class EvaluateReply:
    """Statistics added up over a site's cases.

    Attributes:
        statistics: float64, shape (1 + B, S): row 0 over all cases, the others over bootstrap resamples
            of the site's patients (B = 0 when no intervals were asked for).
    """

    job_digest: str
    site: str
    round: int
    split: Split
    num_cases: int
    num_patients: int
    statistics: NDArray[np.float64] = field(repr=False)


@dataclass(frozen=True)
class SecureRequest:
    """A step of secure aggregation.

    Attributes:
        charter: SHA-256 of the charter in hexadecimal.
        body: The encoded message of ``fedvision.secagg.messages``, uint8.
    """

    job_digest: str
    round: int
    charter: str
    step: Step
    body: ByteVector = field(repr=False)


@dataclass(frozen=True)
class SecureReply:
    """The answer to a step: an encoded message, and at ``mask`` the masked input.

    Attributes:
        body: uint8.
        masked: uint32, shape (length of the sum,), empty at other steps.
    """

    job_digest: str
    site: str
    round: int
    step: Step
    body: ByteVector = field(repr=False)
    masked: NDArray[np.uint32] = field(repr=False)


@dataclass(frozen=True)
class Refusal:
    """A site says no. ``code`` is a class of error (see ``fedvision.errors``), never a text."""

    job_digest: str
    site: str
    round: int
    code: str


Request = HelloRequest | TrainRequest | EvaluateRequest | SecureRequest
Reply = HelloReply | TrainReply | EvaluateReply | SecureReply | Refusal
EMPTY: ByteVector = np.zeros(0, np.uint8)


def as_vector(data: bytes) -> ByteVector:
    """Return bytes as a read-only uint8 array, which is how they travel."""
    return np.frombuffer(data, np.uint8)


def check_train_reply(reply: TrainReply, size: int, clip_norm: float) -> None:
    """Refuse an update that the aggregation must not see.

    Args:
        reply: What a site sent.
        size: Length of the model's vector.
        clip_norm: The job's clip norm.

    Raises:
        MessageError: The update has the wrong type or length, an entry that is not finite, or a norm
            above the clip norm; or a count is out of range.
    """
    update = reply.update
    if update.dtype != np.float32 or update.shape != (size,):
        raise MessageError(f"update must be float32 of shape ({size},), got {update.dtype} {update.shape}")
    if not np.isfinite(update).all():
        raise MessageError("update has an entry that is not finite")
    norm = float(np.linalg.norm(update.astype(np.float64)))
    if norm > clip_norm * (1 + 1e-6):
        raise MessageError(f"update has norm {norm:.6g}, above the clip norm {clip_norm:.6g}")
    if not 1 <= reply.num_samples <= MAX_CASES:
        raise MessageError(f"num_samples must be in 1..{MAX_CASES}, got {reply.num_samples}")
    if reply.num_steps < 0 or not np.isfinite(reply.train_loss) or not np.isfinite(reply.seconds):
        raise MessageError("num_steps, train_loss and seconds must be finite and >= 0")


def check_evaluate_reply(reply: EvaluateReply, size: int, resamples: int) -> None:
    """Refuse statistics of the wrong shape or with values that are not finite.

    Raises:
        MessageError: See above.
    """
    expected = (1 + resamples, size)
    if reply.statistics.dtype != np.float64 or reply.statistics.shape != expected:
        raise MessageError(
            f"statistics must be float64 of shape {expected}, got "
            f"{reply.statistics.dtype} {reply.statistics.shape}"
        )
    if not np.isfinite(reply.statistics).all():
        raise MessageError("statistics have an entry that is not finite")
    if not 0 <= reply.num_patients <= reply.num_cases <= MAX_CASES:
        raise MessageError("num_cases and num_patients do not fit")
