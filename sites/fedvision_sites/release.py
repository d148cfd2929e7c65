"""The only way out of a site: updates and statistics leave through here.

- An update leaves clipped in L2 to the job's clip norm, or not at all. The norm before clipping is the
  site's own business: it goes to the site's record, never into a message.
- Statistics leave as sums over all cases, and as sums over resamples of the patients that the site
  draws from a seed of its own.
- Beside them a reply holds counts of cases and steps, the mean training loss and the time, no more.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedvision.config import Job
from fedvision.errors import TrainingError
from fedvision.training.evaluation import resample_patients
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
