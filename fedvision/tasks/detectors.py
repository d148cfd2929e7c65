"""Detectors by name: torchvision's RetinaNet and Faster R-CNN for pictures, MONAI's RetinaNet for volumes.

All start from random weights; nothing is ever downloaded. Rules that hold for every detector built here:
- It is called like a torchvision detector: ``detector(images, targets)`` gives a dict of losses in training
  mode, ``detector(images)`` a list of dicts with boxes, labels and scores otherwise. Label 0 is background.
- Normalisation layers are GroupNorm: no batch statistics that differ between sites, and no running means.
- Images come in at their final size and intensity: it neither resizes nor normalises them.
- The last layers of every part give float32, also under autocast: anchors, boxes and losses are computed
  in float32, because bfloat16 cannot tell pixel 257 from 258.
- A RetinaNet's loss is the mean over the images of a batch of a number that depends on that image only
  (see ``detection.training_loss``).
"""

import copy
import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, sigmoid_focal_loss

from fedvision.config import Job
from fedvision.errors import ModelError, TrainingError
from fedvision.tasks.light_backbone import LightBackbone, convolution_tower, group_norm
from fedvision.tasks.own_network import MISFIT, build_own_network

Target = dict[str, torch.Tensor]

# Sides of the anchors as shares of the image's shorter side. COCO's default for 800 pixels is 0.04 to 1.
SMALLEST_ANCHOR = 0.04
LARGEST_ANCHOR = 0.64
# An anchor smaller than this many strides says little about where in its cell the object lies. Measured on
# drawn cubes of 12 voxels after 80 steps, stride 4: AP50 0.16 from 0.3 strides on, 0.65 from 2, 0.98 from 3.
SMALLEST_STRIDES = 3.0
ANCHORS_A_LEVEL = 3

# Arguments of torchvision's constructors that are set here, from the job or from other arguments.
_RESERVED = {
    "self", "kwargs", "backbone", "num_classes", "min_size", "max_size", "image_mean", "image_std", "head",
    "anchor_generator", "proposal_matcher", "rpn_anchor_generator", "rpn_head", "box_roi_pool", "box_head",
    "box_predictor",
}  # fmt: skip
_SHARED = {"backbone", "returned_layers", "anchor_sizes", "aspect_ratios"}
_LIGHT = {"width", "fpn_channels"}


def default_anchor_sizes(image_size: Sequence[int], strides: Sequence[int]) -> list[list[float]]:
    """Return the sides of the anchors in pixels, a list for each level, in equal steps of their logarithm.

    Args:
        image_size: Pixels of the training image along each axis.
        strides: Of the levels of the feature pyramid, finest first.
    """
    side, number = min(image_size), len(strides) * ANCHORS_A_LEVEL
    smallest = max(SMALLEST_ANCHOR * side, SMALLEST_STRIDES * strides[0])
    largest = max(LARGEST_ANCHOR * side, 2 * smallest)
    step = math.log(largest / smallest) / (number - 1)
    sizes = [smallest * math.exp(step * i) for i in range(number)]
    return [sizes[i : i + ANCHORS_A_LEVEL] for i in range(0, number, ANCHORS_A_LEVEL)]


def default_layers(image_size: Sequence[int]) -> tuple[int, ...]:
    """Return the layers of the backbone that the pyramid is made from: strides 4 to 16, or 8 to 32."""
    return (1, 2, 3) if min(image_size) < 512 else (2, 3, 4)


def _cast_output(module: nn.Module, inputs: object, output: Any) -> Any:
    """Give a module's output in float32: a forward hook."""
    if isinstance(output, torch.Tensor):
        return output.float() if output.is_floating_point() else output
    if isinstance(output, dict):
        return type(output)((key, _cast_output(module, inputs, value)) for key, value in output.items())
    return type(output)(_cast_output(module, inputs, value) for value in output)


@dataclass(frozen=True)
class Pyramid:
    """A backbone and what the parts behind it need to know.

    Attributes:
        network: From an image to an ordered dict of feature maps, finest first.
        channels: Of every feature map.
        strides: Of each level, in pixels or voxels.
        pooled: Names of the levels that Faster R-CNN pools from.
    """

    network: nn.Module
    channels: int
    strides: list[int]
    pooled: list[str]


def build_detector(job: Job) -> nn.Module:
    """Build the detector that the job names, with fresh weights.

    Args:
        job: A detection job. ``model.args`` are those of the library's constructor that are plain numbers,
            and ``backbone``, ``returned_layers``, ``anchor_sizes`` (a list of sides in pixels for each
            level), ``aspect_ratios``; for ``backbone = "light"`` also ``width`` and ``fpn_channels``.

    Raises:
        ModelError: The name, an argument or a value is not known.
        ConfigError: The user's own reference cannot be imported.
    """
    name, dims, args = job.model.name, job.task.spatial_dims, dict(job.model.args)
    if ":" in name:
        return build_own_network(job, args)
    if (name, dims) not in _BUILDERS:
        known = sorted(known_name for known_name, known_dims in _BUILDERS if known_dims == dims)
        raise ModelError(
            f"model.name: no detector {name!r} for spatial_dims = {dims}",
            f"there are {', '.join(known)}, or your own `package.module:function`",
        )
    try:
        return _BUILDERS[name, dims](job, args)
    except MISFIT as error:
        raise ModelError(f"model.args: {name} cannot be built: {error}") from error


def _check_arguments(job: Job, args: dict[str, Any], allowed: set[str]) -> None:
    for key in args:
        if key not in allowed:
            if key in _RESERVED:
                raise ModelError(
                    f"model.args: `{key}` of {job.model.name} is set from the job", "leave it out"
                )
            nearest = difflib.get_close_matches(key, sorted(allowed), n=1, cutoff=0.5)
            hint = f"did you mean `{nearest[0]}`?" if nearest else f"it takes {', '.join(sorted(allowed))}"
            raise ModelError(f"model.args: {job.model.name} has no argument `{key}`", hint)


def _own_arguments(constructor: Callable[..., Any], backbone: str) -> set[str]:
    """Return the names that a torchvision detector takes from ``model.args``."""
    own = set(inspect.signature(constructor).parameters) - _RESERVED
    return own | _SHARED | (_LIGHT if backbone == "light" else set())


def _levels(job: Job, args: dict[str, Any], strides: list[int]) -> tuple[list[list[float]], list[Any]]:
    """Take the anchors' sides and aspect ratios of each level out of ``args``."""
    assert job.training.image_size is not None
    sizes = args.pop("anchor_sizes", None)
    if sizes is None:
        sizes = default_anchor_sizes(job.training.image_size, strides)
    num_levels = len(strides)
    if len(sizes) != num_levels or not all(isinstance(level, (list, tuple)) and level for level in sizes):
        raise ModelError(
            f"model.args.anchor_sizes needs a list of sides in pixels for each of the {num_levels} levels, "
            f"got {sizes!r}"
        )
    if len({len(level) for level in sizes}) > 1:
        raise ModelError(f"model.args.anchor_sizes needs as many sides at every level, got {sizes!r}")
    default = [1.0] if job.task.spatial_dims == 2 else [[1.0, 1.0]]
    return [[float(side) for side in level] for level in sizes], args.pop("aspect_ratios", default)


def _picture_pyramid(job: Job, args: dict[str, Any]) -> Pyramid:
    """Take the backbone's arguments out of ``args`` and build it for pictures."""
    assert job.training.image_size is not None
    kind, channels = args.pop("backbone", "light"), job.task.in_channels
    layers = sorted(args.pop("returned_layers", default_layers(job.training.image_size)))
    pooled = [str(i) for i in range(len(layers))]
    if kind == "light":
        light = LightBackbone(2, channels, args.pop("width", 32), args.pop("fpn_channels", 64), layers)
        return Pyramid(light, light.out_channels, light.strides, pooled)
    shared: dict[str, Any] = {"weights": None, "norm_layer": group_norm, "returned_layers": layers}
    if kind in ("resnet18", "resnet50"):
        body = resnet_fpn_backbone(backbone_name=kind, trainable_layers=5, **shared)
        strides = [2 ** (layer + 1) for layer in layers]
    elif kind == "mobilenet_v3_large":
        body = mobilenet_backbone(backbone_name=kind, fpn=True, trainable_layers=6, **shared)
        strides = [2 ** min(layer + 1, 5) for layer in layers]
    else:
        raise _no_backbone(kind, BACKBONES)
    if channels != 3:
        _replace_first_convolution(body, channels)
    return Pyramid(body, body.out_channels, [*strides, 2 * strides[-1]], pooled)


def _no_backbone(kind: object, known: Sequence[str]) -> ModelError:
    nearest = difflib.get_close_matches(str(kind), known, n=1, cutoff=0.5)
    hint = f"did you mean `{nearest[0]}`?" if nearest else f"there are {', '.join(known)}"
    return ModelError(f"model.args.backbone: no backbone {kind!r}", hint)


def _replace_first_convolution(network: nn.Module, in_channels: int) -> None:
    """Exchange the first convolution, which reads three channels, for one that reads ``in_channels``."""
    name, old = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    new = copy.deepcopy(old)
    new.in_channels = in_channels
    new.weight = nn.Parameter(torch.empty(old.out_channels, in_channels, *old.kernel_size))
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, new)


def _replace_batch_norm(network: nn.Module) -> None:
    """Exchange every batch norm for a GroupNorm. MONAI's ResNet has ``norm``, but not for its blocks."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.BatchNorm3d):
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, group_norm(layer.num_features))


def _retinanet(job: Job, args: dict[str, Any]) -> nn.Module:
    """torchvision's RetinaNet (Lin et al. 2017) with the backbone and anchors of the job."""
    _check_arguments(job, args, _own_arguments(RetinaNet.__init__, args.get("backbone", "light")))
    is_light = args.get("backbone", "light") == "light"
    pyramid = _picture_pyramid(job, args)
    sizes, ratios = _levels(job, args, pyramid.strides)
    anchors = AnchorGenerator(tuple(map(tuple, sizes)), (tuple(ratios),) * len(sizes))
    num_classes = len(job.task.classes) + 1
    head = RetinaNetHead(
        pyramid.channels, anchors.num_anchors_per_location()[0], num_classes, norm_layer=group_norm
    )
    if is_light:
        for part in (head.classification_head, head.regression_head):
            part.conv = convolution_tower(2, pyramid.channels, 2)
    pyramid.network.register_forward_hook(_cast_output)
    head.register_forward_hook(_cast_output)
    args.setdefault("score_thresh", job.evaluation.score_threshold)
    args.setdefault("detections_per_img", job.evaluation.max_detections)
    detector = RetinaNet(pyramid.network, num_classes, anchor_generator=anchors, head=head, **args)
    detector.transform = Unchanged(max(pyramid.strides))
    return detector


def _faster_rcnn(job: Job, args: dict[str, Any]) -> nn.Module:
    """torchvision's Faster R-CNN (Ren et al. 2015) with the backbone and anchors of the job."""
    _check_arguments(job, args, _own_arguments(FasterRCNN.__init__, args.get("backbone", "light")))
    is_light = args.get("backbone", "light") == "light"
    pyramid = _picture_pyramid(job, args)
    sizes, ratios = _levels(job, args, pyramid.strides)
    anchors = AnchorGenerator(tuple(map(tuple, sizes)), (tuple(ratios),) * len(sizes))
    hidden, resolution = (256 if is_light else 1024), 7
    box_head = TwoMLPHead(pyramid.channels * resolution**2, hidden)
    args.setdefault("box_score_thresh", job.evaluation.score_threshold)
    args.setdefault("box_detections_per_img", job.evaluation.max_detections)
    detector = FasterRCNN(
        pyramid.network,
        rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign(pyramid.pooled, resolution, sampling_ratio=2),
        box_head=box_head,
        box_predictor=FastRCNNPredictor(hidden, len(job.task.classes) + 1),
        **args,
    )
    for module in (pyramid.network, detector.rpn.head, detector.roi_heads.box_predictor):
        module.register_forward_hook(_cast_output)
    detector.transform = Unchanged(max(pyramid.strides))
    return detector


def _volume_retinanet(job: Job, args: dict[str, Any]) -> nn.Module:
    """MONAI's RetinaNet for volumes with the backbone and anchors of the job.

    Anchors are matched by ATSS (Zhang et al. 2020, algorithm 1): in three dimensions hardly an anchor
    overlaps with an object by half, and a fixed threshold leaves one positive anchor an object.
    """
    from monai.apps.detection.networks.retinanet_detector import RetinaNetDetector
    from monai.apps.detection.networks.retinanet_network import RetinaNet as VolumeNetwork
    from monai.apps.detection.networks.retinanet_network import resnet_fpn_feature_extractor
    from monai.apps.detection.utils.anchor_utils import AnchorGenerator as VolumeAnchors
    from monai.networks.nets.resnet import resnet18, resnet50

    selection = {
        "score_thresh": job.evaluation.score_threshold,
        "detections_per_img": job.evaluation.max_detections,
        "nms_thresh": 0.2,  # neighbouring boxes overlap less in three dimensions
        "topk_candidates_per_level": 1000,
    }
    matching = {"num_candidates": 4, "center_in_gt": False}
    kind = args.pop("backbone", "light")
    _check_arguments(job, args, _SHARED | (_LIGHT if kind == "light" else set()) | {*selection, *matching})
    layers = sorted(args.pop("returned_layers", (1, 2, 3)))
    features: nn.Module
    if kind == "light":
        light = LightBackbone(
            3, job.task.in_channels, args.pop("width", 16), args.pop("fpn_channels", 32), layers
        )
        features, strides = light, light.strides
    elif kind in ("resnet18", "resnet50"):
        body = (resnet18 if kind == "resnet18" else resnet50)(
            pretrained=False, spatial_dims=3, n_input_channels=job.task.in_channels, conv1_t_stride=2
        )
        _replace_batch_norm(body)
        features = resnet_fpn_feature_extractor(body, 3, returned_layers=layers)
        strides = [2 ** (layer + 1) for layer in (*layers, layers[-1] + 1)]
    else:
        raise _no_backbone(kind, BACKBONES[:3])
    sizes, ratios = _levels(job, args, strides)
    anchors = VolumeAnchors(sizes, (ratios,) * len(sizes))
    network = VolumeNetwork(
        3, len(job.task.classes), anchors.num_anchors_per_location()[0], features, size_divisible=max(strides)
    )
    if kind == "light":
        for head in (network.classification_head, network.regression_head):
            head.conv = convolution_tower(3, network.feature_map_channels, 2)
    network.register_forward_hook(_cast_output)
    detector = RetinaNetDetector(network, anchors)
    detector.set_atss_matcher(**{key: args.pop(key, value) for key, value in matching.items()})
    detector.set_box_selector_parameters(**{key: args.pop(key, value) for key, value in selection.items()})
    detector.set_cls_loss(FocalLoss())
    detector.set_box_regression_loss(BoxLoss(), encode_gt=True, decode_pred=False)
    return VolumeDetector(detector)


BACKBONES = ("light", "resnet18", "resnet50", "mobilenet_v3_large")
_BUILDERS: dict[tuple[str, int], Callable[[Job, dict[str, Any]], nn.Module]] = {
    ("RetinaNet", 2): _retinanet,
    ("FasterRCNN", 2): _faster_rcnn,
    ("RetinaNet", 3): _volume_retinanet,
}


class Unchanged(GeneralizedRCNNTransform):
    """Hands images on as they are, as one batch, padded at the end to a multiple of the largest stride."""

    def __init__(self, size_divisible: int) -> None:
        super().__init__(1, 1, [0.0], [1.0], size_divisible)

    def normalize(self, image: torch.Tensor) -> torch.Tensor:
        """Return the image; its intensity is the job's preprocessing."""
        return image

    def resize(self, image: torch.Tensor, target: Target | None = None) -> tuple[torch.Tensor, Target | None]:
        """Return the image and its target; its size is ``training.image_size``."""
        return image, target


class FocalLoss(nn.Module):
    """Sigmoid focal loss of one image, over its matched anchors (Lin et al. 2017, section 4.1)."""

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the scalar loss of logits and 0/1 targets of shape (anchors, classes)."""
        return sigmoid_focal_loss(logits, targets, reduction="sum") / targets.sum().clamp(min=1)


class BoxLoss(nn.Module):
    """L1 loss of one image's matched anchors: added up over coordinates, as in torchvision's RetinaNet."""

    def forward(self, encoded: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the scalar loss of encoded boxes of shape (anchors, coordinates)."""
        return (encoded - targets).abs().sum() / max(1, len(encoded))


class VolumeDetector(nn.Module):
    """MONAI's ``RetinaNetDetector`` with torchvision's calling convention.

    MONAI counts classes from 0 and averages losses over the anchors of the whole batch. Here the images go
    in one by one: the weights are the same for all (GroupNorm), so predictions do not change, and each
    image's loss depends on that image only.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: list[torch.Tensor], targets: list[Target] | None = None) -> Any:
        """Return the dict of losses in training mode, else a list of dicts, see the module docstring."""
        if not self.training:
            return [self._predict(image) for image in images]
        assert targets is not None
        losses = [self._losses(image, target) for image, target in zip(images, targets, strict=True)]
        return {key: torch.stack([loss[key] for loss in losses]).mean() for key in losses[0]}

    def _losses(self, image: torch.Tensor, target: Target) -> dict[str, torch.Tensor]:
        # MONAI keeps anchors between calls, also those from inference mode or from another device.
        self.detector.anchors = None
        try:
            losses = self.detector([image], [{"boxes": target["boxes"], "labels": target["labels"] - 1}])
        except ValueError as error:
            if "NaN" not in str(error):
                raise
            raise TrainingError(
                "the detector's output is not finite",
                "lower training.learning_rate, or set training.gradient_clip",
            ) from None
        return {key: loss.to(image.device, torch.float32) for key, loss in losses.items()}

    def _predict(self, image: torch.Tensor) -> Target:
        self.detector.anchors = None
        with torch.no_grad():  # its suppression copies tensors, which autograd does not allow
            found = self.detector([image])[0]
        return {"boxes": found["boxes"], "labels": found["labels"] + 1, "scores": found["labels_scores"]}
