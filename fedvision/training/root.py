"""The root set: a few cases with labels that people checked, kept where the sums are made, never sent.

It is a data set like a site's, and serves three ends: its own update of a round shows which way an honest
update points (Cao et al. 2021, FLTrust, section 4), its cases judge the model between rounds and after the
last one, and the model is repaired on it. Rules:
- Its update only judges directions. It is never added to the sum, so the root set does not train the model
  of a round, however few or odd its cases are.
- Every case counts, in whatever split it stands.
- It is named by one digest over its manifest and all its files. The digest stands in the charter; a file
  that changed is found when the set is opened, and again after its cases were read, before one is used.
- Cases are read once and kept in memory between rounds.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedvision.config import Job
from fedvision.data.checks import check_site
from fedvision.data.facts import CaseFacts, gather_facts
from fedvision.data.manifest import Case, Manifest, difference, load_manifest
from fedvision.data.readers import CaseStore, Sample
from fedvision.data.wrong_labels import WRONG_LABELS
from fedvision.errors import ConfigError, DataError, TrainingError
from fedvision.tasks import local_names
from fedvision.training.loop import train
from fedvision.updates.clipping import clip_l2
from fedvision.updates.layout import FloatVector, flatten, layout_of, load_vector

LEAST_CASES = 10
"""A smaller set is refused. FLTrust used 100 cases; from 20 on the update's direction is of use."""
LEAST_PATIENTS = 5
MOST_FULL = 0.95
"""Share of an image that a mask or a box may fill; more is taken for a mask that was turned round."""
MOST_ODD = 0.1
"""Share of the cases that may be filled like that."""
NAME = "root set"
FRANK_WOLFE_STEPS = 1000


class RootSet:
    """A root set that passed its checks, with its cases at hand.

    Attributes:
        folder: Of its data set.
        manifest: What the folder's manifest says.
        digest: Names the set, hexadecimal; see ``digest_of``.
    """

    def __init__(self, manifest: Manifest, digest: str) -> None:
        self.folder = manifest.folder
        self.manifest = manifest
        self.digest = digest
        self._stores: dict[str, CaseStore] = {}

    @property
    def cases(self) -> tuple[Case, ...]:
        """All cases, in the manifest's order."""
        return self.manifest.cases

    def store(self, job: Job) -> CaseStore:
        """Return what holds the cases for a job: all are read the first time, and kept as memory allows.

        Raises:
            ConfigError: The set does not fit the job.
            DataError: A file cannot be read, or changed since the set was opened.
        """
        key = job.digest()
        if key not in self._stores:
            check_fits(self.manifest, job)
            store = CaseStore(self.manifest, job)
            for case in self.cases:
                store.load(case)
            if digest_of(self.manifest) != self.digest:
                raise _changed(self.folder)
            self._stores = {key: store}
        return self._stores[key]


def open_root_set(folder: Path, digest: str = "") -> RootSet:
    """Open the root set in a folder.

    Args:
        folder: With a ``manifest.json``.
        digest: What it must be; "" takes it as it is, and looks whether it can serve.

    Raises:
        DataError: It changed since it was added, or cannot serve; see ``check_root_set``.
    """
    manifest = load_manifest(folder)
    found = digest_of(manifest)
    if digest and found != digest:
        raise _changed(folder)
    if not digest:
        check_root_set(manifest)
    return RootSet(manifest, found)


def _changed(folder: Path) -> DataError:
    return DataError(
        f"the root set in {folder} is not the one that was added: a file or the manifest changed",
        "restore it, or add the set again for jobs to come",
    )


def digest_of(manifest: Manifest) -> str:
    """Return the SHA-256 over a manifest and the hash of every file that it names, hexadecimal.

    The folder's own place is not part of it, so a set with relative paths can be moved.

    Raises:
        DataError: A file is absent or cannot be read.
    """
    content = json.dumps(manifest.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    whole = hashlib.sha256(b"fedvision/root-set/v1\n" + content.encode() + b"\n")
    for case in manifest.cases:
        for name in (*case.image, *case.label):
            try:
                with manifest.path(name).open("rb") as file:
                    whole.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise DataError(f"cannot read {manifest.path(name)}: {reason}") from None
    return whole.hexdigest()


def check_root_set(manifest: Manifest) -> None:
    """Check that a data set can serve as a root set: large enough, every class in it, labels that fit.

    Labels that are wrong in a plausible way, such as outlines that are shifted, are not found here. They
    show when a trained model is judged on the set, see ``fedvision.repair.validation``.

    Raises:
        DataError: See above; the text names the case or the class.
    """
    if len(manifest.cases) < LEAST_CASES:
        raise DataError(
            f"the root set is too small: {len(manifest.cases)} cases, at least {LEAST_CASES} are needed",
            "20 to 100 cases of many patients, from every kind of site, serve well",
        )
    num_patients = len({case.patient for case in manifest.cases})
    if num_patients < LEAST_PATIENTS:
        raise DataError(
            f"the root set is too small: its cases are of {num_patients} patients, at least {LEAST_PATIENTS} "
            "are needed",
            "some patients teach in a repair, and others judge",
        )
    for one in check_site(manifest):
        if one.level == "error":
            where = f"case {one.case}: " if one.case else ""
            raise DataError(f"the root set's labels or files do not fit: {where}{one.text}", one.hint)
    facts = gather_facts(manifest, manifest.cases)
    for number, name in enumerate(manifest.classes):
        if not any(one.class_sizes[number] for one in facts):
            raise DataError(
                f"the root set has no case with class {name}", "a model cannot be judged on what is not there"
            )
    _check_amounts(manifest, facts)


def _check_amounts(manifest: Manifest, facts: Sequence[CaseFacts]) -> None:
    """Refuse masks that are nearly all foreground or mostly absent, and boxes as large as the image."""
    empty = [one.case.id for one in facts if not any(one.class_sizes)]
    what = "masks are all background" if manifest.task == "segmentation" else "images have no box"
    if 2 * len(empty) > len(facts):
        raise DataError(
            f"the root set's labels do not fit: {len(empty)} of {len(facts)} {what}, such as {empty[0]}",
            "labels of most cases must show something",
        )
    full = [one.case.id for one in facts if _largest_share(manifest, one) > MOST_FULL]
    if len(full) > MOST_ODD * len(facts):
        what = "masks are" if manifest.task == "segmentation" else "images have a box that is"
        raise DataError(
            f"the root set's labels do not fit: {len(full)} of {len(facts)} {what} nearly all foreground, "
            f"such as {full[0]}",
            "are foreground and background exchanged?",
        )


def _largest_share(manifest: Manifest, one: CaseFacts) -> float:
    """Return the share of an image that its mask fills, or its largest box."""
    size = float(torch.Size(one.shape).numel()) or 1.0
    if manifest.task == "segmentation":
        return sum(one.class_sizes) / size
    corners = torch.tensor(one.case.boxes or [[0.0] * 2 * manifest.spatial_dims], dtype=torch.float64)
    sides = corners[:, manifest.spatial_dims :] - corners[:, : manifest.spatial_dims]
    return float(sides.prod(dim=1).max()) / size


def check_fits(manifest: Manifest, job: Job) -> None:
    """Check that a root set is of the kind that a job trains on.

    Raises:
        ConfigError: Task, dimensions or classes differ.
    """
    found = difference(manifest, job)
    if found is not None:
        name, ours, theirs = found
        raise ConfigError(
            f"the root set does not fit the job: {name} is {ours} in its manifest, {theirs} in the job",
            'write defence.root = "off" to train without it',
        )


def kinds_of(cases: Sequence[Case]) -> list[tuple[Case, ...]]:
    """Return a root set's cases by kind: what stands before the first ``/`` of the patient, as in
    ``histology/0231``. Kinds of a single case, and patients without a kind, are one kind together."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(case.patient.rpartition("/")[0].partition("/")[0], []).append(case)
    alone = [case for kind in found.values() if len(kind) == 1 for case in kind]
    kinds = [tuple(kind) for kind in found.values() if len(kind) > 1]
    return [*kinds, tuple(alone)] if alone else kinds


def root_update(
    root: RootSet, job: Job, network: nn.Module, weights: FloatVector, round_number: int
) -> FloatVector:
    """Return a direction that right labels have over wrong ones: what an honest update is compared with.

    Of each kind of cases (``kinds_of``) a contrast: the update that a site with these cases would send, less
    the mean of those that it would send with its labels shifted, swapped and erased. All four start from the
    same weights and see the same images in the same order, so that what they share cancels: where the round
    goes anyhow, and what is peculiar to the few images. What is left is what the labels teach. The plain
    update is no good for this: honest sites with other images go against it.

    Kinds that differ may contradict each other. So the direction is the shortest vector among the weighted
    means of the contrasts, each of length 1 (Désidéri 2012, multiple-gradient descent; Sener, Koltun 2018,
    section 3.2): it is at an acute angle with every contrast, and no kind is outvoted by more frequent ones.

    The same arguments give the same bits on the same machine. It is never added to a sum.

    Args:
        root: The set.
        job: What is trained; the number of steps is that of a site with as many cases.
        network: Of the job. Layers that stay at a site (FedBN) keep here what the calls before left in them.
        weights: Global weights of the round, shape (d,).
        round_number: 1 is the first.

    Returns:
        float32, shape (d,), as long as the clip norm; zero if the kinds contradict each other wholly.

    Raises:
        TrainingError: The loss or a weight is not finite.
        ConfigError: The set does not fit the job.
    """
    layout = layout_of(network, local_names(network, job))
    device = next(network.parameters()).device

    def trained(store: CaseStore, cases: Sequence[Case]) -> FloatVector:
        load_vector(network, layout, weights)
        train(network, job, store, cases, round_number, NAME, device)
        return flatten(network, layout) - weights

    store = root.store(job)
    contrasts = []
    for cases in kinds_of(root.cases):
        contrast = trained(store, cases)
        for change in WRONG_LABELS.values():
            contrast -= trained(_Changed(store, job, change), cases) / np.float32(len(WRONG_LABELS))
        length = float(np.linalg.norm(contrast.astype(np.float64)))
        if not np.isfinite(length):
            raise TrainingError(
                "the weights are not finite after training on the root set", "lower training.learning_rate"
            )
        if length > 0:
            contrasts.append(contrast / np.float32(length))
    if not contrasts:
        return np.zeros_like(weights)
    rows = np.stack(contrasts)
    shares = shortest_mean((rows @ rows.T).astype(np.float64))
    direction = shares.astype(np.float32) @ rows
    length = float(np.linalg.norm(direction.astype(np.float64)))
    if length == 0:
        return np.zeros_like(weights)
    update, _ = clip_l2(direction * np.float32(job.aggregation.clip_norm / length), job.aggregation.clip_norm)
    return update


def shortest_mean(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weights, at least 0 and 1 in sum, of the shortest weighted mean of some vectors.

    Args:
        gram: Their inner products, shape (k, k). Method: Frank and Wolfe 1956, with exact line search.
    """
    weights = np.full(len(gram), 1 / len(gram))
    for _ in range(FRANK_WOLFE_STEPS):
        products = gram @ weights
        best = int(np.argmin(products))
        step = -weights
        step[best] += 1
        curvature = float(step @ gram @ step)
        gain = float(-(weights @ gram @ step))
        if gain <= 1e-9 or curvature <= 0:
            break
        weights = weights + min(1.0, gain / curvature) * step
    return weights


class _Changed(CaseStore):
    """A store whose samples have other labels; the images are those of another store.

    Args:
        store: Reads the cases.
        job: What is trained.
        change: What happens to a sample.
    """

    def __init__(self, store: CaseStore, job: Job, change: Callable[[Sample, Job], Sample]) -> None:
        self._store, self._job, self._change = store, job, change

    def load(self, case: Case) -> Sample:
        """Return a case with the labels changed."""
        return self._change(self._store.load(case), self._job)
