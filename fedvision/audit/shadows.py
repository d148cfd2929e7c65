"""Who could have trained a model, what a model says of each of them, and models whose trainers are known.

Shadow models are trained here on a random half of all patients, pooled: with the job's network, initial
weights, loss and settings, in one place, without clipping, sums or noise. They are not federations.

    OUT/shadows/shadow-01.safetensors     weights; they hold as much of patients as any unprotected model
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedvision.audit.membership import Flags, Values, halves
from fedvision.config import Job
from fedvision.data.manifest import Case, Manifest, pool_manifests
from fedvision.data.readers import CaseStore
from fedvision.errors import ConfigError, DataError, StorageError
from fedvision.seeds import derive_seed
from fedvision.storage import load_tensors, save_tensors
from fedvision.tasks import initial_network, task_module
from fedvision.tasks.networks import resolutions
from fedvision.training.loop import steps_per_round, train
from fedvision.updates.layout import float_tensors

CROPS = 8
"""Crops of an image that are looked at, for segmentation; always the same ones."""
LEAST_PATIENTS = 10
"""Of either kind; with fewer nothing can be said."""

Watch = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Pool:
    """All patients of a run's training sites.

    Attributes:
        manifest: Of all of them together.
        patients: Their cases by name, ``SITE/PATIENT``, sorted.
        members: Whether each one's images trained, shape (N,).
    """

    manifest: Manifest
    patients: Mapping[str, tuple[Case, ...]]
    members: Flags

    @property
    def names(self) -> tuple[str, ...]:
        """The patients, in the order of every array."""
        return tuple(self.patients)

    def sites(self) -> tuple[str, ...]:
        """Return the site of each patient."""
        return tuple(name.split("/", 1)[0] for name in self.patients)


def pool_of(manifests: Mapping[str, Manifest]) -> Pool:
    """Return the patients of sites that trained: members are those of the split train.

    Sites that did not train are left out by the caller: their images may differ from the others, and telling
    them apart by that is no attack on a patient.

    Raises:
        DataError: There are fewer than 10 members or fewer than 10 others.
    """
    manifest = pool_manifests("pool", list(manifests.values()))
    found: dict[str, list[Case]] = {}
    for case in manifest.cases:
        found.setdefault(case.patient, []).append(case)
    patients = {name: tuple(found[name]) for name in sorted(found)}
    members = np.array([any(case.split == "train" for case in cases) for cases in patients.values()])
    inside, outside = int(members.sum()), int((~members).sum())
    if min(inside, outside) < LEAST_PATIENTS:
        raise DataError(
            f"an audit needs {LEAST_PATIENTS} patients who trained and {LEAST_PATIENTS} who did not, got "
            f"{inside} and {outside}",
            "patients who did not train are those of the splits val and test",
        )
    return Pool(manifest, patients, members)


def load_model(path: Path, job: Job) -> nn.Module:
    """Return the job's network with the weights of a file.

    Raises:
        StorageError: The file cannot be read, or does not fit the network.
        ConfigError: The job keeps normalisation layers at the sites: no file has the whole model.
    """
    if job.model.local_normalisation:
        raise ConfigError(
            "a model with model.local_normalisation cannot be audited: a part of it stays at each site"
        )
    network = initial_network(job)
    own, weights = float_tensors(network), load_tensors(path)[0]
    if {name: tuple(value.shape) for name, value in weights.items()} != {
        name: tuple(value.shape) for name, value in own.items()
    }:
        raise StorageError(f"{path} is not a model of this job: its weights have other names or shapes")
    with torch.no_grad():
        for name, values in weights.items():
            own[name].copy_(torch.from_numpy(values))
    return network


def signals_of(
    network: nn.Module, job: Job, pool: Pool, store: CaseStore, device: torch.device
) -> dict[str, Values]:
    """Return what a model says of each patient: the same crops for every model, without augmentation.

    Args:
        network: Any model of the job; its mode is not kept.
        job: Gives the loss.
        pool: The patients.
        store: Reads their cases.
        device: Where to compute.

    Returns:
        ``loss``: the training loss, mean over crops and images of a patient, shape (N,). Segmentation also
        ``boundary``: cross entropy of the pixels at outlines, mean over those of a patient.
    """
    plain = job.model_copy(
        update={"training": job.training.model_copy(update={"augmentation": "none", "amp": "off"})}
    )
    task, network = task_module(job), network.to(device)
    has_outlines = job.task.kind == "segmentation"
    found: dict[str, list[float]] = {"loss": [], **({"boundary": []} if has_outlines else {})}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for cases in pool.patients.values():
            losses, outlines = [], []
            for case in cases:
                seed = derive_seed(0, "audit", case.id)
                torch.manual_seed(seed)  # some detectors draw regions
                samples = [store.load(case)] * (CROPS if has_outlines else 1)
                batch = task.training_batch(samples, plain, np.random.default_rng(seed))
                network.eval()
                losses.append(float(task.training_loss(network, batch, plain, device)))
                if has_outlines:
                    outlines.append(_at_outlines(network, batch, device))
            found["loss"].append(float(np.mean(losses)))
            if has_outlines:
                sums, counts = np.sum(outlines, axis=0)
                found["boundary"].append(sums / max(counts, 1.0))
    signals = {key: np.array(values) for key, values in found.items()}
    return {key: np.nan_to_num(values, nan=1e3, posinf=1e3, neginf=-1e3) for key, values in signals.items()}


def _at_outlines(
    network: nn.Module, batch: Mapping[str, torch.Tensor], device: torch.device
) -> tuple[float, float]:
    """Return the summed cross entropy of pixels that have two classes around them, and how many."""
    label_B1P = batch["label"].to(device)
    dims = label_B1P.ndim - 2
    logits_BKP = resolutions(network(batch["image"].to(device)), dims)[0].float()
    pool = functional.max_pool2d if dims == 2 else functional.max_pool3d
    values = label_B1P.float()
    mixed = pool(values, 3, 1, 1) != -pool(-values, 3, 1, 1)
    each = functional.cross_entropy(logits_BKP, label_B1P[:, 0], reduction="none")
    return float(each[mixed[:, 0]].sum()), float(mixed.sum())


def shadow_steps(job: Job, manifests: Mapping[str, Manifest], most: int) -> int:
    """Return the optimiser steps of a shadow model: those of all sites in all rounds, at most ``most``."""
    of_a_round = sum(
        1 if job.privacy.mode == "distributed" else steps_per_round(job, len(manifest.in_split("train")))
        for manifest in manifests.values()
    )
    return min(job.rounds * of_a_round, most)


class Shadows:
    """Shadow models in a folder: those that are there are used, the others are trained.

    Args:
        job: Of the run.
        pool: The patients.
        folder: Where the models lie.
        count: How many, even.
        steps: Optimiser steps of each.
        seed: Says who trains which.

    Raises:
        ConfigError: ``count`` is odd or below 2.
    """

    def __init__(self, job: Job, pool: Pool, folder: Path, count: int, steps: int, seed: int) -> None:
        if count < 2 or count % 2:
            raise ConfigError(f"--shadows must be even and at least 2, got {count}")
        self._job, self._pool, self._folder, self._steps, self._seed = job, pool, folder, steps, seed
        self.inside = halves(len(pool.names), count, lambda pair: derive_seed(seed, "shadows", pair))

    def signals(self, store: CaseStore, device: torch.device, watch: Watch) -> dict[str, Values]:
        """Return ``signals_of`` every shadow model, each of shape (M, N).

        Raises:
            StorageError: The folder holds shadow models of another job, data set, seed or number of steps.
            TrainingError: The loss is not finite at some step.
        """
        found: list[dict[str, Values]] = []
        for index in range(len(self.inside)):
            network = self._model(index, store, device, watch)
            found.append(signals_of(network, self._job, self._pool, store, device))
            watch("shadow models", index + 1, len(self.inside))
        return {key: np.stack([one[key] for one in found]) for key in found[0]}

    def _model(self, index: int, store: CaseStore, device: torch.device, watch: Watch) -> nn.Module:
        path = self._folder / f"shadow-{index + 1:02d}.safetensors"
        claims = {
            "job": self._job.digest(),
            "seed": str(self._seed),
            "steps": str(self._steps),
            "patients": str(derive_seed(0, *self._pool.names)),
        }
        if path.exists():
            if load_tensors(path)[1] != claims:
                raise StorageError(
                    f"{path} is a shadow model of another job, data set, --seed or number of steps",
                    "choose another --out",
                )
            return load_model(path, self._job)
        network = self._trained(index, store, device, watch)
        weights = {name: value.cpu().numpy() for name, value in float_tensors(network).items()}
        save_tensors(path, weights, claims)
        return network

    def _trained(self, index: int, store: CaseStore, device: torch.device, watch: Watch) -> nn.Module:
        """Train in as many rounds as the run had, with its learning rates, and a new optimiser each round."""
        network = initial_network(self._job).to(device)
        inside = self.inside[index]
        cases = [
            case
            for is_inside, own in zip(inside, self._pool.patients.values(), strict=True)
            if is_inside
            for case in own
        ]
        rounds = min(self._job.rounds, self._steps)
        parts = np.diff(np.linspace(0, self._steps, rounds + 1).round().astype(int))
        for number, steps in enumerate(parts, start=1):
            training = self._job.training.model_copy(update={"steps": int(steps), "epochs": None})
            job = self._job.model_copy(update={"training": training, "rounds": rounds})
            name = f"shadow {self._seed} {index + 1}"
            train(network, job, store, cases, number, name, device)
            watch(f"training shadow model {index + 1}", number, rounds)
        return network
