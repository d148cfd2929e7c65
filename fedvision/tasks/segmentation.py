"""Semantic segmentation in 2D and 3D: a network from MONAI, crops, a Dice-like loss, sliding windows.

The functions are those that every task offers, see ``fedvision.tasks``. Legend of shapes: B batch, C
channels, K classes and background, S the spatial grid of a case, P the patch.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from fedvision.config import Job
from fedvision.data.readers import Sample
from fedvision.errors import DataError, ModelError
from fedvision.references import resolve_reference
from fedvision.tasks import CaseResult
from fedvision.tasks.networks import build_network_by_name, resolutions, size_step
from fedvision.tasks.segmentation_augmentation import crop
from fedvision.tasks.segmentation_metrics import judge, metrics_of, size_of_statistics, statistics_of

HEADLINE = "dice"

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Above this many numbers (1 GiB) the logits of a whole case are put together in main memory.
_LARGE = 2**28


def build_network(job: Job) -> nn.Module:
    """Build the job's network with fresh weights; see ``networks.build_network_by_name``."""
    return build_network_by_name(job)


def training_batch(samples: Sequence[Sample], job: Job, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Cut one augmented crop out of each sample; see ``segmentation_augmentation.crop``.

    Returns:
        ``image``, float32, shape (B, C, *P), and ``label``, int64, shape (B, 1, *P). The same samples and the
        same state of ``rng`` give the same bits.

    Raises:
        DataError: A sample has no mask.
    """
    crops = [crop(sample, job, rng) for sample in samples]
    return {
        "image": torch.stack([image for image, _ in crops]),
        "label": torch.stack([label for _, label in crops])[:, None],
    }


def _cross_entropy(logits_BKP: torch.Tensor, label_B1P: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits_BKP, label_B1P[:, 0])


def _one_hot(logits_BKP: torch.Tensor, label_B1P: torch.Tensor) -> torch.Tensor:
    """Return the mask as K channels of 0 and 1; MONAI's writes in place, which ``torch.vmap`` cannot do."""
    classes = torch.arange(logits_BKP.shape[1], device=label_B1P.device)
    return (label_B1P == classes.view(1, -1, *(1,) * (label_B1P.ndim - 2))).to(logits_BKP.dtype)


@cache
def loss_by_name(name: str) -> Loss:
    """Return the function from logits (B, K, *P) and mask (B, 1, *P) to a scalar loss.

    Softmax over background and classes. The overlap terms (Dice, Tversky) leave the background out; cross
    entropy and focal keep it. Every loss is the mean over the images of a batch of a number that depends on
    that image alone.

    Args:
        name: ``dice``; ``dice_ce`` and ``dice_focal``, Dice plus cross entropy or focal loss (gamma 2) in
            equal parts; ``tversky`` with 0.3 for false positives and 0.7 for false negatives (Salehi et al.
            2017, section 3); ``cross_entropy``; or the user's ``package.module:function``.

    Raises:
        ConfigError: The user's function cannot be imported.
    """
    if ":" in name:
        return resolve_reference(name)
    if name == "cross_entropy":
        return _cross_entropy
    from monai.losses import DiceLoss, FocalLoss, TverskyLoss

    overlap = {"include_background": False, "softmax": True}
    if name == "tversky":
        tversky: Loss = TverskyLoss(**overlap, alpha=0.3, beta=0.7)
        return lambda logits_BKP, label_B1P: tversky(logits_BKP, _one_hot(logits_BKP, label_B1P))
    dice: Loss = DiceLoss(**overlap)
    # MONAI's DiceFocalLoss would leave the background out of the focal term too, and take a sigmoid there.
    focal: Loss = FocalLoss(use_softmax=True)

    def with_dice(logits_BKP: torch.Tensor, label_B1P: torch.Tensor) -> torch.Tensor:
        target_BKP = _one_hot(logits_BKP, label_B1P)
        overlap_loss = dice(logits_BKP, target_BKP)
        if name == "dice":
            return overlap_loss
        if name == "dice_focal":
            return overlap_loss + focal(logits_BKP, target_BKP)
        return overlap_loss + _cross_entropy(logits_BKP, label_B1P)

    return with_dice


def training_loss(
    network: nn.Module, batch: dict[str, torch.Tensor], job: Job, device: torch.device
) -> torch.Tensor:
    """Return the loss of one batch, a float32 scalar.

    Under deep supervision the losses of the resolutions are weighted 1, 1/2, 1/4, ..., divided by their
    sum (Isensee et al. 2021, supplementary note 2); the mask is reduced to each grid by nearest neighbour.

    Guarantee: with a network that treats the images of a batch independently, the loss is the mean of the
    losses of its images, except for a loss of the user's own.

    Raises:
        ModelError: The network's output, or the value of the user's loss, has the wrong form.
    """
    label_B1P = batch["label"].to(device, non_blocking=True)
    outputs = resolutions(network(batch["image"].to(device, non_blocking=True)), label_B1P.ndim - 2)
    loss_of = loss_by_name(job.training.loss)
    total, weights = torch.zeros((), device=device), 0.0
    for level, logits_BKP in enumerate(outputs):
        target = label_B1P
        if logits_BKP.shape[2:] != target.shape[2:]:
            target = functional.interpolate(target.float(), logits_BKP.shape[2:], mode="nearest-exact").long()
        # Sums over many voxels in half precision would lose the loss.
        loss = loss_of(logits_BKP.float(), target)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise ModelError(f"training.loss = {job.training.loss!r} must return a scalar tensor")
        total = total + loss.reshape(()) * 0.5**level
        weights += 0.5**level
    return total / weights


def _window_budget(job: Job) -> int:
    """Return how many voxels go through the network at once: what two training batches hold."""
    return 2 * job.training.batch_size * math.prod(job.training.patch_size or ())


def inference_window(shape: Sequence[int], job: Job, step: int | None) -> tuple[int, ...]:
    """Return the size of the sliding window for an image: the patch, or along some axes the whole image.

    Fewer and larger windows are faster and see more context. A window grows only while it stays within
    what two training batches hold: a forward pass without gradients keeps less than half of what training
    keeps for each voxel, so inference needs no more memory than training.

    Args:
        shape: Spatial shape of the image.
        job: Gives patch and batch size.
        step: Sizes that the network takes, see ``networks.size_step``.
    """
    patch = job.training.patch_size
    assert patch is not None, "the job file gives a patch for segmentation"
    window = list(patch)
    if step is None:
        return tuple(window)
    limit = _window_budget(job)
    for axis in sorted(range(len(patch)), key=lambda axis: shape[axis] / patch[axis]):
        grown = list(window)
        grown[axis] += step * max(0, math.ceil((shape[axis] - patch[axis]) / step))
        if math.prod(grown) <= limit:
            window = grown
    return tuple(window)


def predict(network: nn.Module, image_CS: torch.Tensor, job: Job, device: torch.device) -> NDArray[np.uint8]:
    """Return the predicted class of every voxel, shape S.

    Windows overlap by ``evaluation.overlap`` and are blended with a Gaussian weight, unless one window
    covers the image.

    Args:
        network: On ``device``, in evaluation mode.
        image_CS: Preprocessed, shape (C, *S).
        job: Gives patch, batch size and overlap.
        device: Where to compute.
    """
    from monai.inferers.utils import sliding_window_inference

    shape = image_CS.shape[1:]
    window = inference_window(shape, job, size_step(network, job))
    is_one = all(size <= covered for size, covered in zip(shape, window, strict=True))

    def full_resolution(windows: torch.Tensor) -> torch.Tensor:
        return resolutions(network(windows), len(shape))[0].float()

    logits = sliding_window_inference(
        image_CS[None].to(device),
        window,
        sw_batch_size=max(1, _window_budget(job) // math.prod(window)),
        predictor=full_resolution,
        overlap=job.evaluation.overlap,
        mode="constant" if is_one else "gaussian",
        device=torch.device("cpu") if math.prod(shape) * (len(job.task.classes) + 1) > _LARGE else device,
    )
    predicted: NDArray[np.uint8] = logits[0].argmax(dim=0).to(torch.uint8).cpu().numpy()
    return predicted


def evaluate_case(
    network: nn.Module, sample: Sample, job: Job, device: torch.device, final: bool
) -> CaseResult:
    """Segment one case and compare it with the expert's mask; see ``segmentation_metrics``.

    Args:
        network: On ``device``, in evaluation mode.
        sample: With its mask.
        job: Classes, patch and what is measured.
        device: Where to compute.
        final: Also surface distances, if the job asks for them.

    Returns:
        ``score`` is the mean Dice over the classes that count, 1 if none does; ``values`` has
        ``dice/<class>``, ``hd95_mm/<class>`` and ``asd_mm/<class>`` where they are defined.

    Raises:
        DataError: The sample has no mask.
    """
    if sample.label is None:
        raise DataError(f"case {sample.case_id} has no mask", "a model is judged on cases with a mask")
    predicted_S = predict(network, sample.image, job, device)
    judged = judge(
        predicted_S,
        sample.label.numpy(),
        len(job.task.classes),
        sample.spacing_mm,
        with_surfaces=final and job.evaluation.surface_distances,
    )
    values = {
        f"{name}/{class_name}": value
        for class_name, j in zip(job.task.classes, judged, strict=True)
        for name, value in (("dice", j.dice), ("hd95_mm", j.hd95_mm), ("asd_mm", j.asd_mm))
        if not math.isnan(value)
    }
    dices = [j.dice for j in judged if not math.isnan(j.dice)]
    return CaseResult(
        case_id=sample.case_id,
        patient=sample.patient,
        statistics=statistics_of(judged, final),
        score=sum(dices) / len(dices) if dices else 1.0,
        values=values,
        prediction={"label": predicted_S},
    )


def statistics_size(job: Job) -> int:
    """Return the length of a case's statistics."""
    return size_of_statistics(len(job.task.classes))


def metrics(statistics: NDArray[np.float64], job: Job) -> dict[str, float]:
    """Return metrics by name from added-up statistics; see ``segmentation_metrics.metrics_of``."""
    return metrics_of(statistics, job.task.classes, job.evaluation.surface_distances)
