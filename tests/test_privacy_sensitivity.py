"""By brute force: how much one patient changes a clipped sum, right and wrong ways of computing it."""

import copy
from collections.abc import Callable

import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss, FocalLoss, GeneralizedDiceLoss, TverskyLoss
from monai.networks import nets
from torch import nn
from torch.nn import functional

from fedvision.config import parse_job
from fedvision.errors import ConfigError
from fedvision.privacy.per_patient import Patient, Sample, clipped_gradient_sum
from fedvision.privacy.sensitivity import GradientSum, check_sensitivity, largest_change, sum_of
from fedvision.tasks import segmentation

INSTANCE = ("instance", {"affine": True})
BatchLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make_network(norm=INSTANCE, dropout=0.0) -> nn.Module:
    torch.manual_seed(0)
    return nets.UNet(2, 1, 2, (4, 8), (2,), norm=norm, dropout=dropout).train()


def make_patients(number: int = 5) -> list[Patient]:
    generator = torch.Generator().manual_seed(1)
    patients = []
    for index in range(number):
        share = 0.02 + 0.88 * index / (number - 1)
        image = torch.randn(1, 1, 16, 16, generator=generator) * (4 if index == 0 else 1)
        label = (torch.rand(1, 1, 16, 16, generator=generator) < share).long()
        patients.append([{"image": image, "label": label}])
    return patients


def of_logits(loss: BatchLoss) -> Callable[[nn.Module, Sample], torch.Tensor]:
    return lambda network, sample: loss(network(sample["image"]), sample["label"])


def median_norm(network: nn.Module, loss: BatchLoss, patients: list[Patient]) -> float:
    return sorted(clipped_gradient_sum(network, of_logits(loss), patients, 1.0).norms)[len(patients) // 2]


def flat(gradients) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def clip(gradient: torch.Tensor, clip_norm: float) -> torch.Tensor:
    return gradient * min(1.0, clip_norm / max(float(gradient.norm()), 1e-30))


def naive_loss_of_the_batch(network: nn.Module, loss: BatchLoss) -> GradientSum:
    """Wrong: each patient's share of the gradient of one loss of the whole batch, as hooks compute it."""

    def gradient_sum(patients, clip_norm):
        total = torch.zeros(sum(p.numel() for p in network.parameters()))
        label = torch.cat([patient[0]["label"] for patient in patients])
        logits = [network(patient[0]["image"]) for patient in patients]
        for number in range(len(patients)):
            parts = [part if i == number else part.detach() for i, part in enumerate(logits)]
            value = loss(torch.cat(parts), label) * len(patients)
            total += clip(
                flat(torch.autograd.grad(value, list(network.parameters()), retain_graph=True)), clip_norm
            )
        return total

    return gradient_sum


def naive_batch_through_the_network(network: nn.Module, loss: BatchLoss) -> GradientSum:
    """Wrong: a loss of each patient, but all of them went through the network as one batch."""

    def gradient_sum(patients, clip_norm):
        total = torch.zeros(sum(p.numel() for p in network.parameters()))
        logits = network(torch.cat([patient[0]["image"] for patient in patients]))
        for number, patient in enumerate(patients):
            value = loss(logits[number : number + 1], patient[0]["label"])
            total += clip(
                flat(torch.autograd.grad(value, list(network.parameters()), retain_graph=True)), clip_norm
            )
        return total

    return gradient_sum


def cross_entropy(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, label[:, 0])


def weighted_cross_entropy(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, label[:, 0], weight=torch.tensor([1.0, 20.0]))


def over_matched_anchors(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """As FCOS: added up over everything, divided by the number of positives of the whole batch."""
    target = label.to(logits.dtype)
    return functional.binary_cross_entropy_with_logits(logits[:, :1], target, reduction="sum") / target.sum()


DICE = {"softmax": True, "to_onehot_y": True, "include_background": False}
LOSSES: dict[str, BatchLoss] = {
    "cross entropy": cross_entropy,
    "weighted cross entropy": weighted_cross_entropy,
    "dice": DiceLoss(**DICE),
    "dice of the batch": DiceLoss(**DICE, batch=True),
    "dice and cross entropy": DiceCELoss(**DICE),
    "generalized dice": GeneralizedDiceLoss(**DICE),
    "focal": FocalLoss(to_onehot_y=True),
    "tversky": TverskyLoss(**DICE),
    "over matched anchors": over_matched_anchors,
}
WRONG = ["weighted cross entropy", "dice of the batch", "over matched anchors"]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_right_when_it_sees_one_patient(name):
    network, patients = make_network(), make_patients()
    clip_norm = median_norm(network, LOSSES[name], patients)
    right = sum_of(network, of_logits(LOSSES[name]))
    factor = check_sensitivity(right, patients, [0.3 * clip_norm, clip_norm, 3 * clip_norm])
    assert factor == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("name", WRONG)
def test_a_loss_that_looks_at_the_whole_batch_is_found(name):
    network, patients = make_network(), make_patients()
    clip_norm = median_norm(network, LOSSES[name], patients)
    wrong = naive_loss_of_the_batch(network, LOSSES[name])
    with pytest.raises(ConfigError, match=r"by \d+\.\d{3} clip norms") as caught:
        check_sensitivity(wrong, patients, [0.3 * clip_norm, clip_norm, 3 * clip_norm])
    assert float(str(caught.value).split(" by ")[1].split()[0]) > 1.001


@pytest.mark.parametrize("name", ["cross entropy", "dice"])
def test_a_plain_mean_over_images_is_right_even_for_a_whole_batch(name):
    network, patients = make_network(), make_patients()
    clip_norm = median_norm(network, LOSSES[name], patients)
    for naive in (naive_loss_of_the_batch, naive_batch_through_the_network):
        factor = check_sensitivity(naive(network, LOSSES[name]), patients, [0.3 * clip_norm, clip_norm])
        assert factor == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_found(affine):
    network, patients = make_network(("batch", {"affine": affine})), make_patients()
    clip_norm = median_norm(make_network(), cross_entropy, patients)
    wrong = naive_batch_through_the_network(network, cross_entropy)
    factor = largest_change(wrong, patients, clip_norm)
    assert factor > 1.1
    with pytest.raises(ConfigError, match=f"{factor:.3f}"):
        check_sensitivity(wrong, patients, [clip_norm])


def test_patients_of_several_images_count_once_and_clipping_each_image_is_found():
    network, patients = make_network(), [
        [make_patients()[i][0], make_patients(6)[i][0], make_patients(7)[i][0]] for i in range(4)
    ]  # fmt: skip
    clip_norm = 0.3 * min(clipped_gradient_sum(network, of_logits(cross_entropy), patients, 1.0).norms)
    right = sum_of(network, of_logits(cross_entropy), "vmap", 2)
    assert check_sensitivity(right, patients, [clip_norm]) == pytest.approx(1.0, abs=1e-4)

    def image_by_image(drawn, clip_norm):
        return right([[sample] for patient in drawn for sample in patient], clip_norm)

    assert largest_change(image_by_image, patients, clip_norm) > 1.5


def test_a_loss_that_remembers_patients_is_found():
    class Remembers:
        def __init__(self):
            self.mean = 1.0

        def __call__(self, network, sample):
            loss = of_logits(cross_entropy)(network, sample)
            self.mean = 0.5 * self.mean + 0.5 * float(sample["label"].float().mean())
            return loss / self.mean

    with pytest.raises(ConfigError, match="clip norms"):
        network, patients = make_network(), make_patients()
        clip_norm = 3 * median_norm(network, cross_entropy, patients)
        check_sensitivity(sum_of(network, Remembers()), patients, [clip_norm])


def test_a_sum_that_is_not_clipped_is_found():
    network, patients = make_network(norm=None), make_patients()

    def not_clipped(drawn, clip_norm):
        return clipped_gradient_sum(network, of_logits(cross_entropy), drawn, 1e9).gradient

    clip_norm = median_norm(network, cross_entropy, patients)
    # Only the outlier is longer than three times the median.
    assert largest_change(not_clipped, patients, 3 * clip_norm) > 2
    assert largest_change(lambda drawn, norm: not_clipped(drawn, norm) * torch.nan, patients, 1.0) == float(
        "inf"
    )


def test_dropout_is_switched_off_while_it_is_measured():
    network, patients = make_network(dropout=0.5), make_patients()
    clip_norm = 0.3 * median_norm(make_network(), cross_entropy, patients)
    right = sum_of(network, of_logits(cross_entropy))
    assert check_sensitivity(right, patients, [clip_norm]) == pytest.approx(1.0, abs=1e-4)


def test_two_patients_are_needed():
    with pytest.raises(ValueError, match="at least 2"):
        largest_change(sum_of(make_network(), of_logits(cross_entropy)), make_patients()[:1], 1.0)


@pytest.mark.parametrize("name", ["dice", "dice_ce", "dice_focal", "tversky", "cross_entropy"])
def test_the_losses_on_offer_are_right(name):
    job = parse_job(
        {
            "name": "test",
            "rounds": 1,
            "task": {"kind": "segmentation", "classes": ["disc"]},
            "model": {"name": "UNet", "args": {"channels": [4, 8], "strides": [2], "num_res_units": 0}},
            "training": {"steps": 1, "loss": name, "patch_size": [16, 16]},
            "aggregation": {"clip_norm": 1.0},
        },
        "test",
    )
    torch.manual_seed(0)
    network, patients = segmentation.build_network(job), make_patients()

    def loss(network: nn.Module, sample: Sample) -> torch.Tensor:
        return segmentation.training_loss(network, sample, job, torch.device("cpu"))

    norms = clipped_gradient_sum(copy.deepcopy(network), loss, patients, 1.0).norms
    factor = check_sensitivity(sum_of(network, loss), patients, [0.3 * min(norms), sorted(norms)[2]])
    assert factor == pytest.approx(1.0, abs=1e-4)
