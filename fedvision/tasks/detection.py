"""Detection: boxes around objects in pictures (torchvision) and volumes (MONAI).

The functions are those that ``fedvision.tasks`` describes. How cases are judged: ``detection_metrics``.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedvision.config import Job
from fedvision.data.readers import Sample
from fedvision.errors import ModelError
from fedvision.tasks import CaseResult
from fedvision.tasks.detection_augmentation import resize_image, swap_picture_axes, training_case
from fedvision.tasks.detection_metrics import Detections, judge_case, metrics_from_sums, size_of_sums

HEADLINE = "map"


def build_network(job: Job) -> nn.Module:
    """Return the job's detector with fresh weights.

    Raises:
        ModelError: The name or an argument is not known.
    """
    from fedvision.tasks.detectors import build_detector

    return build_detector(job)


def _image_size(job: Job) -> tuple[int, ...]:
    assert job.training.image_size is not None, "the job's validation sees to it"
    return job.training.image_size


def training_batch(samples: Sequence[Sample], job: Job, rng: np.random.Generator) -> dict[str, Any]:
    """Resize, augment and stack samples.

    Args:
        samples: B cases with boxes; a case may have none.
        job: Gives ``training.image_size`` (S) and ``training.augmentation``.
        rng: Source of every random number: the same state gives the same batch.

    Returns:
        ``images``: float32, shape (B, C, *S). ``targets``: for each image a dict of ``boxes``, float32, shape
        (N, 2 * dims), none of them empty, and ``labels``, int64, shape (N,), 1 the first class.
    """
    images, targets = [], []
    for sample in samples:
        assert sample.boxes is not None and sample.box_labels is not None
        image, boxes, labels = training_case(
            sample.image, sample.boxes, sample.box_labels, _image_size(job), job.training.augmentation, rng
        )
        images.append(image)
        targets.append({"boxes": boxes, "labels": labels})
    return {"images": torch.stack(images), "targets": targets}


def training_loss(network: nn.Module, batch: dict[str, Any], job: Job, device: torch.device) -> torch.Tensor:
    """Return the sum of the detector's losses, a scalar; puts ``network`` in training mode.

    RetinaNet, pictures (torchvision): focal loss and L1 box loss are added up over the anchors of one image
    and divided by the number of that image's own matched anchors (at least 1); then the mean over images is
    taken. Volumes (MONAI): images go in one by one with the same normalisation. So in both each image's loss
    depends on that image only, and the batch's loss is their mean: what clipping of per-image gradients
    needs. Faster R-CNN does not have this: it divides by the anchors and regions that were drawn for the
    whole batch, a number that changes a little from batch to batch, and draws them from torch's generator.

    Args:
        network: From ``build_network``, on ``device``.
        batch: From ``training_batch``.
        job: Not used; every task has it.
        device: Where to compute.

    Raises:
        ModelError: The user's own detector does not return a dict of losses.
    """
    network.train()
    images = list(batch["images"].to(device, non_blocking=True))
    targets = [{key: value.to(device) for key, value in target.items()} for target in batch["targets"]]
    losses = network(images, targets)
    if not isinstance(losses, dict) or not losses:
        raise ModelError(
            f"{job.model.name} must return a dict of losses in training mode, got {type(losses).__name__}",
            "a detector is called as detector(images, targets), like torchvision's",
        )
    return torch.stack([loss.float() for loss in losses.values()]).sum()


def evaluate_case(
    network: nn.Module, sample: Sample, job: Job, device: torch.device, final: bool
) -> CaseResult:
    """Find the objects of one case and judge them on the sample's own grid.

    Boxes below ``evaluation.score_threshold`` are dropped, and of the others the best
    ``evaluation.max_detections`` are kept.

    Args:
        network: From ``build_network``, on ``device``; its mode is as before afterwards.
        sample: The case.
        job: What is judged, and how.
        device: Where to compute.
        final: Not used: a case is always judged in full.
    """
    assert sample.boxes is not None and sample.box_labels is not None
    was_training = network.training
    network.eval()
    with torch.no_grad():
        image = resize_image(sample.image, _image_size(job)).to(device)
        found = network([image])
    network.train(was_training)
    detections = _on_sample_grid(found, sample, job)
    judged = judge_case(detections, sample.boxes.numpy(), sample.box_labels.numpy(), tuple(job.task.classes))
    return CaseResult(
        case_id=sample.case_id,
        patient=sample.patient,
        statistics=judged.sums,
        score=judged.values["f1"],
        values=judged.values,
        prediction={"boxes": detections.boxes, "labels": detections.labels, "scores": detections.scores},
    )


def _on_sample_grid(found: Any, sample: Sample, job: Job) -> Detections:
    """Return what the detector found in the resized image, best first, in pixels of the sample.

    Raises:
        ModelError: The user's own detector returns something else.
    """
    if not (isinstance(found, list) and len(found) == 1 and {"boxes", "labels", "scores"} <= set(found[0])):
        raise ModelError(
            f"{job.model.name} must return a list of dicts with boxes, labels and scores in evaluation mode, "
            f"got {type(found).__name__}",
            "a detector is called as detector(images), like torchvision's",
        )
    boxes, labels, scores = (found[0][key].detach().cpu() for key in ("boxes", "labels", "scores"))
    is_kept = (scores >= job.evaluation.score_threshold) & (labels >= 1) & (labels <= len(job.task.classes))
    boxes, labels, scores = boxes[is_kept].float(), labels[is_kept].long(), scores[is_kept].float()
    order = torch.argsort(scores, descending=True, stable=True)[: job.evaluation.max_detections]
    factors = torch.tensor(
        [old / new for old, new in zip(sample.image.shape[1:], _image_size(job), strict=True)] * 2
    )
    boxes = swap_picture_axes(swap_picture_axes(boxes[order]) * factors)
    return Detections(boxes.numpy(), labels[order].numpy(), scores[order].numpy())


def statistics_size(job: Job) -> int:
    """Return the length of a case's statistics."""
    return size_of_sums(len(job.task.classes))


def metrics(statistics: NDArray[np.float64], job: Job) -> dict[str, float]:
    """Return the metrics of cases whose statistics were added up; NaN where a class has no object.

    Keys: ``map`` (AP over IoU 0.50 to 0.95, mean of the classes), ``ap50``, ``froc`` (mean sensitivity at
    the rates of false positives that follow), ``sensitivity@0.125fp`` to ``sensitivity@8fp`` (false
    positives an image, IoU 0.5, all classes together), and ``map/<class>``, ``ap50/<class>``,
    ``froc/<class>``.
    """
    return metrics_from_sums(statistics, tuple(job.task.classes))
