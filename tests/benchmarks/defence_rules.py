"""The defence's rules and Flower's robust strategies on the same updates, and what the defence costs.

    python tests/benchmarks/defence_rules.py record JOB.toml --out updates.npz     some minutes of training
    python tests/benchmarks/defence_rules.py compare updates.npz                   rules against attacks
    python tests/benchmarks/defence_rules.py cost                                  CPU time and bytes

`record` trains a job's sites round after round as honest sites (plain mean), and keeps, for every round, each
site's clipped update and the one that it would have trained with erased labels, the root set's update, its
contrast (right labels minus the mean of erased, flipped and moved ones, same batches), and the model.
`compare` puts attacks on top and gives the same vectors to everybody. Flower's functions see them in the
clear; ours get full vectors, the sites' sketches, or the rounded inner products of level gram. Printed for
each rule: distance of the aggregate from the mean of the honest updates, in norms of that mean (median over
rounds; 0 is best, 1 is as bad as no update), and the rise of the loss on the root set over that of the honest
mean's step (median). `cost` compares a judgement with masking 10^7 coordinates in the same run.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import numpy as np
import torch

from fedvision.config import Job, load_job
from fedvision.data.manifest import load_manifest
from fedvision.data.readers import CaseStore, Sample
from fedvision.defence.evidence import Past
from fedvision.defence.geometry import Geometry, from_gram, from_sketches, from_vectors
from fedvision.defence.judge import judge
from fedvision.defence.rules import classic_weights, num_attackers
from fedvision.secagg.encoding import Encoding
from fedvision.secagg.gram import UNITS, round_sketch
from fedvision.secagg.masking import add_masks
from fedvision.secagg.sketch import TAIL, centred, sketch
from fedvision.tasks import initial_network, task_module
from fedvision.training.loop import train
from fedvision.updates.clipping import clip_l2
from fedvision.updates.layout import flatten, layout_of, load_vector

Vectors = np.ndarray
RULES = ("norm", "clones", "opposition", "spectral")
WITH_ROOT = ("norm", "clones", "root_cosine", "opposition", "spectral")
DEVICE = torch.device("cpu")


class Relabelled(CaseStore):
    """Cases of a site with wrong labels."""

    def __init__(self, store: CaseStore, how: str, classes: int) -> None:
        self._inner, self._how, self._classes = store, how, classes

    def load(self, case):  # type: ignore[no-untyped-def]
        sample: Sample = self._inner.load(case)
        label = sample.label
        assert label is not None
        if self._how == "erased":
            return replace(sample, label=torch.zeros_like(label))
        if self._how == "moved":
            moved = torch.roll(label, tuple(size // 3 for size in label.shape), tuple(range(label.ndim)))
            return replace(sample, label=moved)
        return replace(sample, label=(self._classes - label.long()).clamp(min=0).to(label.dtype))


def record(path: Path, out: Path) -> None:
    """Train, and keep what every rule is given."""
    job = load_job(path)
    assert job.data is not None
    folders = sorted(one.parent for one in job.data.root.glob("*/manifest.json"))
    folders = [one for one in folders if one.name not in job.data.held_out]
    sets = {one.name: load_manifest(one) for one in [*folders, *filter(None, [job.data.root_set])]}
    stores = {name: CaseStore(manifest, job) for name, manifest in sets.items()}
    sites = [one.name for one in folders if sets[one.name].in_split("train")]
    network = initial_network(job)
    layout = layout_of(network)
    weights = flatten(network, layout).copy()
    clip_norm, classes = job.aggregation.clip_norm, len(job.task.classes)

    def trained(name: str, number: int, how: str = "") -> Vectors:
        load_vector(network, layout, weights)
        store = Relabelled(stores[name], how, classes) if how else stores[name]
        train(network, job, store, sets[name].in_split("train"), number, name, DEVICE)
        return clip_l2(flatten(network, layout) - weights, clip_norm)[0]

    kept: dict[str, list[Vectors]] = {key: [] for key in ("honest", "erased", "root", "contrast", "model")}
    for number in range(1, job.rounds + 1):
        kept["model"].append(weights)
        kept["honest"].append(np.stack([trained(name, number) for name in sites]))
        kept["erased"].append(np.stack([trained(name, number, "erased") for name in sites]))
        if job.data.root_set is not None:
            root = trained(job.data.root_set.name, number)
            wrong = [trained(job.data.root_set.name, number, how) for how in ("erased", "flipped", "moved")]
            kept["root"].append(root)
            kept["contrast"].append(clip_l2(root - np.mean(wrong, axis=0), clip_norm)[0])
        weights = weights + kept["honest"][-1].mean(axis=0)
        print(f"round {number} of {job.rounds}", flush=True)
    arrays = {key: np.stack(values).astype(np.float32) for key, values in kept.items() if values}
    np.savez(out, clip_norm=clip_norm, job=str(path), **arrays)


def bounded(vector: Vectors, clip_norm: float) -> Vectors:
    """Return a vector cut to the clip norm."""
    return vector * min(1.0, clip_norm / max(float(np.linalg.norm(vector)), 1e-12))


def attacked(
    attack: str, honest: Vectors, erased: Vectors, rows: Sequence[int], clip_norm: float, seed: int
) -> Vectors:
    """Return the updates of a round with those of ``rows`` replaced by an attack within the norm bound."""
    vectors = honest.astype(np.float64)
    others = np.delete(vectors, rows, axis=0)
    mean, spread = others.mean(axis=0), others.std(axis=0)
    noise = np.random.default_rng(seed)
    for row in rows:
        if attack == "erased labels":
            vectors[row] = erased[row]
        elif attack == "sign flip x4":
            vectors[row] = bounded(-4 * vectors[row], clip_norm)
        elif attack == "reversed mean":
            vectors[row] = -mean * (clip_norm / np.linalg.norm(mean))
        elif attack == "min-max":
            vectors[row] = bounded(min_max(others, mean, spread), clip_norm)
        elif attack == "noise":
            vectors[row] = bounded(noise.normal(size=mean.size) * clip_norm, clip_norm)
        else:
            assert attack == "none"
    return vectors


def min_max(others: Vectors, mean: Vectors, spread: Vectors) -> Vectors:
    """Return Shejwalkar and Houmansadr's update: as far from the mean as two honest updates are apart."""
    direction = -spread / np.linalg.norm(spread)
    squares = ((others[:, None] - others[None]) ** 2).sum(axis=-1).max()
    low, high = 0.0, 50 * float(np.linalg.norm(mean))
    for _ in range(30):
        middle = (low + high) / 2
        far = ((others - mean - middle * direction) ** 2).sum(axis=1).max()
        low, high = (middle, high) if far <= squares else (low, middle)
    return mean + low * direction


def flower(name: str, vectors: Vectors, count: int) -> Vectors:
    """Return what Flower's function makes of the updates."""
    from flwr.server.strategy import aggregate as made

    results = [([vector], 1) for vector in vectors]
    if name == "Krum":
        return made.aggregate_krum(results, count, 0)[0]
    if name == "multi-Krum":
        return made.aggregate_krum(results, count, len(vectors) - count)[0]
    if name == "median":
        return made.aggregate_median(results)[0]
    if name == "trimmed mean":
        return made.aggregate_trimmed_avg(results, count / len(vectors))[0]
    # Bulyan needs 4 f + 3 clients
    return made.aggregate_bulyan(
        results, min(count, (len(vectors) - 3) // 4), made.aggregate_krum, to_keep=0
    )[0]


def sketched(vectors: Vectors, encoding: Encoding, number: int) -> Vectors:
    """Return what the sites would put in for their sketches at level sketch, shape (n, 2048), uint32."""
    beta = bytes([number]) * 32
    keys = [bytes([number, row]) * 16 for row in range(len(vectors))]
    return np.stack(
        [
            sketch(encoding.encode(vector.astype(np.float32), 1, [0.3], key), beta, TAIL)
            for vector, key in zip(vectors, keys, strict=True)
        ]
    )


def geometries(
    vectors: Vectors, encoding: Encoding, number: int, root: Vectors | None
) -> dict[str, Geometry]:
    """Return a round as full vectors, as clear sketches, and as inner products at level gram."""
    sites = range(1, len(vectors) + 1)
    raw = sketched(vectors, encoding, number)
    clear = np.stack([centred(row).astype(np.float64) for row in raw]) / encoding.scale
    rounded = np.stack([round_sketch(row, encoding.norm_bound) for row in raw])
    unit = (encoding.norm_bound / encoding.scale / UNITS) ** 2 / 4
    full = from_vectors(sites, vectors, encoding.clip_norm, root)
    if root is None:
        return {
            "vectors": full,
            "sketches": from_sketches(sites, clear, 0.25),
            "gram": from_gram(sites, rounded @ rounded.T, unit, 0.25),
        }
    beta, scale = bytes([number]) * 32, encoding.scale
    row = np.zeros(encoding.length, np.int32)
    row[: encoding.size] = np.rint(root.astype(np.float64) * (scale / encoding.clip_norm))
    line = centred(sketch(row.view(np.uint32), beta, TAIL)).astype(np.float64) / scale
    norm = float(np.linalg.norm(line)) / 2
    return {
        "vectors": full,
        "sketches": from_sketches(sites, clear, 0.25, line),
        "gram": from_gram(sites, rounded @ rounded.T, unit, 0.25, clear @ line / 4, norm),
    }


Loss = Callable[[Vectors], float]


def loss_on(job: Job) -> Loss:
    """Return the loss of a model on fixed crops of the root set."""
    assert job.data is not None
    assert job.data.root_set is not None
    manifest = load_manifest(job.data.root_set)
    store, task, network = CaseStore(manifest, job), task_module(job), initial_network(job)
    layout = layout_of(network)
    samples = [store.load(case) for case in manifest.in_split("train")[:16]]
    batch = task.training_batch(samples, job, np.random.default_rng(0))

    def loss(weights: Vectors) -> float:
        load_vector(network, layout, weights.astype(np.float32))
        network.eval()
        with torch.no_grad():
            return float(task.training_loss(network, batch, job, DEVICE))

    return loss


ATTACKS = ("none", "sign flip x4", "reversed mean", "min-max", "noise", "erased labels")
FLOWER = ("Krum", "multi-Krum", "trimmed mean", "median", "Bulyan")
CLASSIC = ("spectral", "geometric_median", "nearest_neighbours", "root_cosine")


def compare(path: Path, share: float, has_loss: bool) -> None:
    """Print the tables."""
    kept = np.load(path, allow_pickle=False)
    honest, erased, clip_norm = kept["honest"], kept["erased"], float(kept["clip_norm"])
    contrast = kept["contrast"] if "contrast" in kept.files else None
    num_sites = honest.shape[1]
    count = num_attackers(num_sites, share)
    loss = loss_on(load_job(Path(str(kept["job"])))) if has_loss else None
    encoding = Encoding(num_sites, honest.shape[2], clip_norm, 1, (4.0,))
    rows = sorted(np.random.default_rng(7).permutation(num_sites)[:count].tolist())
    print(f"{path}: {num_sites} sites, {honest.shape[2]} weights, {len(honest)} rounds; attackers {rows}\n")
    for attack in ATTACKS:
        print_attack(attack, kept, honest, erased, contrast, rows, share, encoding, loss)


def print_attack(
    attack: str,
    kept: np.lib.npyio.NpzFile,
    honest: Vectors,
    erased: Vectors,
    contrast: Vectors | None,
    rows: list[int],
    share: float,
    encoding: Encoding,
    loss: Loss | None,
) -> None:
    """Print one attack's table."""
    num_sites, count = honest.shape[1], len(rows)
    rows = [] if attack == "none" else rows
    sums: dict[str, list[Vectors]] = {}
    targets, decisions, out, caught = [], [], [], []
    pasts = {(kind, rooted): Past() for kind in ("vectors", "sketches", "gram") for rooted in (False, True)}
    for number in range(len(honest)):
        vectors = attacked(attack, honest[number], erased[number], rows, encoding.clip_norm, number)
        targets.append(np.delete(vectors, rows, axis=0).mean(axis=0))
        made = {"FedAvg": vectors.mean(axis=0)}
        made.update({f"Flower {name}": flower(name, vectors, count) for name in FLOWER})
        root = None if contrast is None else contrast[number]
        plain = None if contrast is None else kept["root"][number]
        exact = from_vectors(range(num_sites), vectors, encoding.clip_norm, plain)
        for rule in CLASSIC if contrast is not None else CLASSIC[:-1]:
            made[f"published {rule}"] = classic_weights(rule, exact, share) @ vectors
        for rooted in (False, True) if contrast is not None else (False,):
            found = {}
            for kind, one in geometries(vectors, encoding, number, root if rooted else None).items():
                rules = WITH_ROOT if rooted else RULES
                most = num_sites - (2 * num_sites // 3 + 1)
                judged = judge(one, rules, share, most, pasts[kind, rooted])
                pasts[kind, rooted] = judged.past
                accepted = [site - 1 for site in judged.accepted]
                made[f"ours {'with root ' * rooted}{kind}"] = vectors[accepted].mean(axis=0)
                found[kind] = set(judged.excluded)
            decisions += [found["gram"] == found["sketches"], found["gram"] == found["vectors"]]
            if rooted == (contrast is not None):
                out.append(len({site - 1 for site in found["gram"]} - set(rows)))
                caught.append(len({site - 1 for site in found["gram"]} & set(rows)))
        for name, value in made.items():
            sums.setdefault(name, []).append(value)
    print(f"== {attack}, {len(rows)} of {num_sites}")
    print(f"{'aggregate':34s} {'distance':>9s} {'loss rise':>10s}")
    for name, values in sums.items():
        far = [float(np.linalg.norm(v - t) / np.linalg.norm(t)) for v, t in zip(values, targets, strict=True)]
        rise = (
            "" if loss is None else f"{statistics.median(rises(loss, kept['model'], values, targets)):10.4f}"
        )
        print(f"{name:34s} {statistics.median(far):9.3f} {rise:>10s}")
    print(f"same decisions from gram as from sketches or vectors: {np.mean(decisions):.3f}")
    print(f"caught a round {np.mean(caught):.2f}, honest left out a round {np.mean(out):.2f}\n", flush=True)


def rises(loss: Loss, models: Vectors, values: list[Vectors], targets: list[Vectors]) -> list[float]:
    """Return, for each round, the loss after an aggregate's step less that after the honest mean's."""
    return [loss(m + v) - loss(m + t) for m, v, t in zip(models, values, targets, strict=True)]


def cost(runs: int) -> None:
    """Print CPU time and bytes of a judgement beside those of masking 10^7 coordinates."""
    vector = np.zeros(10_000_000, np.uint32)
    print(f"{'sites':>5s} {'judge ms':>10s} {'masking ms':>11s} {'ratio':>7s} {'judgement bytes':>16s}")
    for num_sites in (10, 50, 200):
        rng = np.random.default_rng(num_sites)
        rows = rng.normal(size=(num_sites, 64)) / 8 + 0.1
        rows[: num_sites // 5] *= -1
        one = from_gram(range(num_sites), rows @ rows.T, root=rows @ rows[-1], root_norm=1.0)
        keys = [bytes([index % 256, index // 256]) * 16 for index in range(num_sites)]
        signs = [1 if index % 2 else -1 for index in range(num_sites)]
        times: dict[str, list[float]] = {"judge": [], "mask": []}
        size = 0
        for run in range(runs + 1):
            started = time.process_time()
            found = judge(one, WITH_ROOT, 0.2, num_sites - (2 * num_sites // 3 + 1))
            judged = time.process_time()
            add_masks(vector, keys, signs)
            masked = time.process_time()
            size = len(repr(found.to_json()))
            if run:
                times["judge"].append(judged - started)
                times["mask"].append(masked - judged)
        judging, masking = (1e3 * statistics.median(times[name]) for name in ("judge", "mask"))
        print(
            f"{num_sites:5d} {judging:10.2f} {masking:11.1f} {judging / masking:7.1%} {size:16d}", flush=True
        )


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="train a job's sites and keep their updates")
    recording.add_argument("job", type=Path)
    recording.add_argument("--out", type=Path, required=True)
    comparing = commands.add_parser("compare", help="rules against attacks on recorded updates")
    comparing.add_argument("updates", type=Path)
    comparing.add_argument("--malicious", type=float, default=0.2)
    comparing.add_argument("--loss", action="store_true", help="also the loss after each step; slower")
    costing = commands.add_parser("cost", help="CPU time and bytes")
    costing.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.command == "record":
        record(arguments.job.resolve(), arguments.out)
    elif arguments.command == "compare":
        compare(arguments.updates, arguments.malicious, arguments.loss)
    else:
        cost(arguments.runs)


if __name__ == "__main__":
    main()
