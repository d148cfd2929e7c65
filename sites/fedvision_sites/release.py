"""The only way out of a site: updates and statistics leave through here.

- An update leaves clipped in L2 to the job's clip norm, or not at all. The norm before clipping is the
  site's own business: it goes to the site's record, never into a message.
- Statistics leave as sums over all cases, and as sums over resamples of the patients that the site
  draws from a seed of its own.
- Beside them a reply holds counts of cases and steps, the mean training loss and the time, no more.
- With secure aggregation update, loss, weight and statistics leave as integers under masks only: they are
  encoded here and masked in ``fedvision.secagg.site``.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedvision.config import Job
from fedvision.errors import TrainingError
from fedvision.privacy.noise import discrete_gaussian
from fedvision.secagg.encoding import encode_statistics
from fedvision.secagg.masking import MaskVector
from fedvision.secagg.schedule import Consortium
from fedvision.seeds import derive_seed
from fedvision.training.evaluation import judgement_values, resample_patients
from fedvision.updates.clipping import clip_l2
from fedvision.updates.layout import FloatVector

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReleasedUpdate:
    """An update that may leave the site.

    Attributes:
        update: float32, shape (d,), L2 norm at most the clip norm.
        norm_before: L2 norm before clipping; private to the site.
        share_kept: ``min(1, clip_norm / norm_before)``.
    """

    update: FloatVector = field(repr=False)
    norm_before: float
    share_kept: float


def release_update(before: FloatVector, after: FloatVector, job: Job) -> ReleasedUpdate:
    """Turn new weights into the update that leaves the site.

    Guarantee: the released update is finite and has an L2 norm of at most ``aggregation.clip_norm``.

    Args:
        before: Global weights of the round, shape (d,).
        after: Weights after local training, shape (d,).
        job: Sets the clip norm.

    Raises:
        TrainingError: A weight is not finite; nothing leaves the site.
    """
    clip_norm = job.aggregation.clip_norm
    with np.errstate(over="ignore", invalid="ignore"):
        update, norm = clip_l2(after - before, clip_norm)
    if not np.isfinite(norm):
        raise TrainingError("the weights are not finite after training", "lower training.learning_rate")
    logger.debug("update norm before clipping %.6g, clip norm %.6g", norm, clip_norm)
    return ReleasedUpdate(update, norm, min(1.0, clip_norm / norm) if norm > 0 else 1.0)


def release_sum(vector: FloatVector, job: Job) -> ReleasedUpdate:
    """Turn minus a sum of clipped gradients into the update that leaves the site, with noise: ``add_noise``.

    Guarantee: finite, and an L2 norm of at most ``aggregation.clip_norm``. Shortening to a norm brings no two
    vectors further apart, so one patient changes the update by ``privacy.clip_norm`` at most, as before.

    Args:
        vector: Shape (d,).
        job: Sets the clip norm.
    """
    update, norm = clip_l2(vector, job.aggregation.clip_norm)
    if not np.isfinite(norm):
        raise TrainingError("a gradient is not finite", "lower training.learning_rate")
    return ReleasedUpdate(update, norm, min(1.0, job.aggregation.clip_norm / norm) if norm > 0 else 1.0)


def add_noise(vector: MaskVector, consortium: Consortium) -> MaskVector:
    """Return an encoded update with this site's share of the charter's noise; weight and loss have none.

    Guarantee: discrete Gaussian noise, drawn from the operating system, of standard deviation
    ``noise_share`` patient clip norms on every coordinate of the update. With the noise of at least
    ``num_honest`` such sites in a sum, that is ``noise_multiplier`` patient clip norms.
    """
    charter, encoding = consortium.charter, consortium.encoding
    sigma = charter.noise_share * charter.patient_clip_norm / charter.clip_norm * encoding.scale
    noise = discrete_gaussian(encoding.size, sigma)
    noisy = vector.copy()
    noisy[: encoding.size] += noise.astype(np.int32).view(np.uint32)
    return noisy


def release_statistics(
    rows: NDArray[np.float64], patients: Sequence[str], resamples: int, private_seed: int
) -> NDArray[np.float64]:
    """Turn the statistics of single cases into what leaves the site, see ``resample_patients``.

    Args:
        rows: One row a case, shape (N, S); stays at the site.
        patients: The patient of each case.
        resamples: How many resamples the job asks for.
        private_seed: Of the draws; the site's own.

    Returns:
        Sums, shape (1 + resamples, S).
    """
    return resample_patients(rows, patients, resamples, private_seed)


def encode_update(
    released: ReleasedUpdate,
    num_cases: int,
    loss: float,
    job: Job,
    consortium: Consortium,
    key: tuple[str, int],
) -> MaskVector:
    """Return the input of a training sum: weighted update, weighted loss, weight; to be masked.

    The rounding is drawn from the job's seed, so that a run can be repeated bit for bit. It hides nothing
    and needs no secret: it makes the rounding unbiased.

    Args:
        released: The clipped update.
        num_cases: The site's training cases; the charter caps what they weigh.
        loss: Mean training loss.
        job: Sets the seed.
        consortium: Its charter sets the encoding.
        key: Site and round, which the rounding is drawn for.
    """
    seed = derive_seed(job.seed, "rounding", *key).to_bytes(8, "big")
    encoding = consortium.encoding
    return encoding.encode(released.update, num_cases, [loss], hashlib.sha256(seed).digest())


def encode_judgement(statistics: NDArray[np.float64], job: Job, is_final: bool) -> MaskVector:
    """Return the input of a statistics sum, see ``judgement_values``; to be masked."""
    return encode_statistics(judgement_values(statistics, job, is_final))
