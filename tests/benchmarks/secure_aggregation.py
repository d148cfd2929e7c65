"""Cost of secure aggregation at a site and at the server, beside Flower's SecAgg+, CKKS and plain sums.

    python tests/benchmarks/secure_aggregation.py --quick     under a minute, one size
    python tests/benchmarks/secure_aggregation.py             10^6 and 10^7 coordinates, some minutes
    python tests/benchmarks/secure_aggregation.py --full      the curve up to 10^8 coordinates

Every row is the median of interleaved runs after one warm-up, with the least and the largest. CPU time is
that of the whole process, in one thread unless a row says otherwise. All read the same float32 update from
memory. Each method is measured twice: up to the hidden vector in memory (an array, or CKKS ciphertexts), and
up to the bytes object that a message holds. No network, no files.

- ours: stochastic rounding and n masks (n - 1 pairs and one of its own), with the derivation of their keys.
- Flower: the client's function of its stage `collect_masked_vectors`, default ranges, all sites neighbours;
  up to the vector with its `ndarray_to_bytes` replaced by nothing.
- TenSEAL: CKKS as NVIDIA FLARE's example has it (8192; 60, 40, 40), on at most 10^6 coordinates, scaled.
  `pip install tenseal`; without it there is no row.
"""

import argparse
import hashlib
import importlib
import os
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from fedvision.report.palette import LIGHT, Theme, render
from fedvision.secagg.encoding import Encoding
from fedvision.secagg.masking import SLICE, LongKeystream, add_masks
from fedvision.secagg.sketch import sketch
from fedvision.storage import write_atomic

Task = Callable[[], Any]
CLIP_NORM = 5.0
CKKS_COORDINATES = 1_000_000
HIDES, SENDS = "vector", "bytes"
OURS, CKKS = "ours: round and mask", "TenSEAL CKKS"
DROPPED_SLICE = 1 << 20


@dataclass
class Times:
    """Seconds of one task over the runs."""

    cpu: list[float]
    wall: list[float]
    factor: float = 1.0

    def text(self, size: int) -> str:
        """Return CPU and wall medians with their range, and ns a coordinate."""
        cpu, wall = ([value * self.factor for value in values] for values in (self.cpu, self.wall))
        return (
            f"{statistics.median(cpu):9.4f} ({min(cpu):.4f} to {max(cpu):.4f})  "
            f"{statistics.median(wall):9.4f} ({min(wall):.4f} to {max(wall):.4f})  "
            f"{statistics.median(cpu) / size * 1e9:8.2f}"
        )

    @property
    def seconds(self) -> float:
        """Median CPU time."""
        return statistics.median(self.cpu) * self.factor


def measure(tasks: dict[str, Task], runs: int) -> dict[str, Times]:
    """Run all tasks in turn, ``runs`` times after a warm-up."""
    found = {name: Times([], []) for name in tasks}
    for run in range(runs + 1):
        for name, task in tasks.items():
            wall, cpu = time.perf_counter(), time.process_time()
            task()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if run:
                found[name].cpu.append(cpu)
                found[name].wall.append(wall)
    return found


def make_update(size: int) -> np.ndarray:
    """Return a float32 update of norm just below the clip norm."""
    update = np.random.default_rng(7).standard_normal(size, dtype=np.float32)
    update *= np.float32(CLIP_NORM * 0.999 / np.linalg.norm(update.astype(np.float64)))
    return update


def mask_input(encoding: Encoding, update: np.ndarray, pairs: list[bytes], threads: int = 1) -> np.ndarray:
    """Do what a site does between training and upload."""
    tau = os.urandom(32)
    keys = [HKDFExpand(hashes.SHA256(), 32, b"fedvision/mask/v1" + tau).derive(pair) for pair in pairs]
    vector = encoding.encode(update, 100, [0.5], os.urandom(32))
    add_masks(vector, keys, [1 if index % 2 else -1 for index in range(len(keys))], threads)
    return vector


def flower_client(num_sites: int, update: np.ndarray) -> dict[str, Task]:
    """Return the third stage of Flower's client for one of ``num_sites``, its first two stages done; without
    and with what makes bytes of the vector."""
    from flwr.app import ConfigRecord
    from flwr.common import ndarrays_to_parameters
    from flwr.common.secure_aggregation.secaggplus_constants import Key

    # A function of the same name hides the module as an attribute
    flower = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
    settings = ConfigRecord(
        {
            Key.SAMPLE_NUMBER: num_sites,
            Key.SHARE_NUMBER: num_sites,
            Key.THRESHOLD: 2 * num_sites // 3 + 1,
            Key.CLIPPING_RANGE: 8.0,
            Key.TARGET_RANGE: 1 << 22,
            Key.MOD_RANGE: 1 << 32,
            Key.MAX_WEIGHT: 1000.0,
        }
    )
    states, keys = {}, {}
    for site in range(1, num_sites + 1):
        states[site] = flower.SecAggPlusState()
        states[site].nid = site
        sent = flower._setup(states[site], settings)
        keys[str(site)] = [sent[Key.PUBLIC_KEY_1], sent[Key.PUBLIC_KEY_2]]
    sources, sealed = [], []
    for site, state in states.items():
        shared = flower._share_keys(state, ConfigRecord(dict(keys)))
        for receiver, text in zip(shared[Key.DESTINATION_LIST], shared[Key.CIPHERTEXT_LIST], strict=True):
            if receiver == 1:
                sources.append(site)
                sealed.append(text)
    received = ConfigRecord({Key.CIPHERTEXT_LIST: sealed, Key.SOURCE_LIST: sources})
    parameters = ndarrays_to_parameters([update])

    def send() -> Any:
        return flower._collect_masked_vectors(states[1], received, 100, parameters)[Key.MASKED_PARAMETERS]

    def hide() -> Any:
        to_bytes, flower.ndarray_to_bytes = flower.ndarray_to_bytes, lambda array: array
        try:
            return send()
        finally:
            flower.ndarray_to_bytes = to_bytes

    return {HIDES: hide, SENDS: send}


def ckks_client(update: np.ndarray) -> dict[str, Task]:
    """Return the encryption of an update, slot by slot; without and with what makes bytes of ciphertexts."""
    import tenseal

    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=8192, coeff_mod_bit_sizes=[60, 40, 40], n_threads=1
    )
    context.global_scale = 2**40
    parts = [update[start : start + 4096] for start in range(0, update.size, 4096)]
    return {
        HIDES: lambda: [tenseal.ckks_vector(context, part) for part in parts],
        SENDS: lambda: [tenseal.ckks_vector(context, part).serialize() for part in parts],
    }


def sent_bytes(result: Any) -> int:
    """Return the bytes of an upload."""
    return sum(len(part) for part in result) if isinstance(result, list) else len(result)


def print_site(num_sites: int, size: int, runs: int, threads: int, ckks_size: int) -> None:
    """Print what a site pays for one upload."""
    update = make_update(size)
    pairs = [os.urandom(32) for _ in range(num_sites)]
    encoding = Encoding(num_sites, size, CLIP_NORM, 100, (1.0,))
    upload, beta = mask_input(encoding, update, pairs), os.urandom(32)

    def ours(threads: int) -> dict[str, Task]:
        return {
            HIDES: lambda: mask_input(encoding, update, pairs, threads),
            SENDS: lambda: mask_input(encoding, update, pairs, threads).tobytes(),
        }

    methods: dict[str, dict[str, Task]] = {
        "plain floats times weight": {
            HIDES: lambda: update * np.float32(0.5),
            SENDS: lambda: (update * np.float32(0.5)).tobytes(),
        },
        OURS: ours(1),
        f"ours, {threads} threads": ours(threads),
        "Flower SecAgg+": flower_client(num_sites, update),
    }
    extra: dict[str, Task] = {
        "ours: SHA-256 of the upload": lambda: hashlib.sha256(upload).digest(),
        "ours: sketch": lambda: sketch(upload, beta),
    }
    scaled = min(ckks_size, size)
    if installed("tenseal"):
        methods[CKKS] = ckks_client(update[:scaled])
    tasks = {f"{name}, {end}": task for name, ends in methods.items() for end, task in ends.items()}
    found = measure({**tasks, **extra}, runs)
    for name in methods.keys() & {CKKS}:
        for end in (HIDES, SENDS):
            found[f"{name}, {end}"].factor = size / scaled
    print(f"\nSite, n = {num_sites}, d = {size:,}")
    print(f"{'':34s} {'CPU s, median (range)':>30s}  {'wall s':>30s}  ns/coord  bytes/coord  CPU / ours")
    for name, times in found.items():
        method, _, end = name.rpartition(", ")
        sent = note = ratio = ""
        if method:
            ratio = f"{times.seconds / found[f'{OURS}, {end}'].seconds:10.2f}"
        if method == CKKS and scaled < size:
            note = f"  (scaled from {scaled:,})"
        if end == SENDS:
            sent = f"{sent_bytes(tasks[name]()) / (scaled if method == CKKS else size):.2f}"
        print(f"{name:34s} {times.text(size)}  {sent:>11s}  {ratio:>10s}{note}")
    beside = found["ours: sketch"].seconds
    for end in (HIDES, SENDS):
        with_sketch = found[f"{OURS}, {end}"].seconds + beside
        ratios = [
            f"{name} {found[f'{name}, {end}'].seconds / with_sketch:.2f}"
            for name in ("Flower SecAgg+", CKKS)
            if name in methods
        ]
        print(f"with the sketch, up to the {end}: {with_sketch:.4f} s; CPU / ours: {', '.join(ratios)}")
    if CKKS not in methods:
        print(f"{CKKS:34s} not installed")


def print_throughput(size: int, runs: int, threads: int) -> float:
    """Print GB/s of masks beside the limits of this machine; return that of AES alone."""
    vector, other = np.zeros(size, np.uint32), np.ones(size, np.uint32)
    part, words = vector[:SLICE], np.ones(SLICE, np.uint32)
    keys = [os.urandom(32) for _ in range(10)]

    def streams() -> None:
        stream = LongKeystream(keys[0])
        for _ in range(0, 10 * size, SLICE):
            stream.fill(words)

    def adds() -> None:
        for _ in range(0, 10 * size, SLICE):
            np.add(part, words, out=part)

    def memory() -> None:
        for _ in range(10):
            np.add(vector, other, out=vector)

    signs = [1, -1] * 5
    found = measure(
        {
            "10 masks added, 1 thread": lambda: add_masks(vector, keys, signs),
            f"10 masks added, {threads} threads": lambda: add_masks(vector, keys, signs, threads),
            "AES-256 alone, in slices": streams,
            "np.add alone, in slices": adds,
            "np.add alone, from memory": memory,
        },
        runs,
    )
    print(f"\nMasks, d = {size:,}: GB of masks a second, by CPU time and by wall time")
    for name, times in found.items():
        rates = [40 * size / statistics.median(values) / 1e9 for values in (times.cpu, times.wall)]
        print(f"{name:34s} {rates[0]:8.2f} {rates[1]:8.2f}")
    return 40 * size / found["AES-256 alone, in slices"].seconds


def print_server(num_sites: int, size: int, runs: int) -> None:
    """Print what the server pays for one round, and its memory."""
    arriving = [
        np.random.default_rng(i).integers(0, 2**32, size, dtype=np.uint32).tobytes() for i in range(2)
    ]
    keys = [os.urandom(32) for _ in range(num_sites)]
    total = np.zeros(size, np.uint32)

    def add_uploads(target: np.ndarray) -> None:
        for site in range(num_sites):
            target += np.frombuffer(arriving[site % 2], "<u4")

    dropped = num_sites // 10
    revealed = [os.urandom(32) for _ in range(dropped * (num_sites - dropped))]
    part = total[:DROPPED_SLICE]
    found = measure(
        {
            f"sum of {num_sites} uploads": lambda: add_uploads(total),
            f"{num_sites} self masks": lambda: add_masks(total, keys, [-1] * num_sites),
            f"{len(revealed)} pair masks": lambda: add_masks(part, revealed, [1] * len(revealed)),
        },
        runs,
    )
    found[f"{len(revealed)} pair masks"].factor = size / part.size
    print(f"\nServer, n = {num_sites}, d = {size:,}, one thread")
    print(f"{'':34s} {'CPU s, median (range)':>30s}  {'wall s':>30s}  ns/coord")
    for name, times in found.items():
        note = ""
        if "pair" in name:
            scaled = f"; scaled from {part.size:,}" if part.size < size else ""
            note = f"  ({dropped} of {num_sites} leave after ready{scaled})"
        print(f"{name:34s} {times.text(size)}{note}")
    tracemalloc.start()
    base = tracemalloc.get_traced_memory()[0]
    fresh = np.zeros(size, np.uint32)
    for site in range(num_sites if size <= 10**6 else 20):
        message = bytearray(arriving[site % 2])  # an upload as it arrives
        fresh += np.frombuffer(message, "<u4")
        del message
    add_masks(fresh, keys[:20], [-1] * 20)
    peak = tracemalloc.get_traced_memory()[1] - base
    tracemalloc.stop()
    print(f"{'memory peak, in vectors of d':34s} {peak / (4 * size):9.2f}  (the sum and the upload arriving)")


def print_curve(sites: list[int], sizes: list[int], runs: int, aes: float, figure: Path | None) -> None:
    """Print and draw a site's time over size and number of sites, beside the bound."""
    points: dict[tuple[int, int], Task] = {}
    for size in sizes:
        update = make_update(size)
        for count in sites:
            encoding = Encoding(count, size, CLIP_NORM, 100, (1.0,))
            pairs = [os.urandom(32) for _ in range(count)]
            points[count, size] = lambda e=encoding, u=update, p=pairs: mask_input(e, u, p)
    found = measure({f"{count} {size}": task for (count, size), task in points.items()}, runs)
    print("\nSite, round and mask: CPU s, and the bound (0.5 ns of memory traffic and n AES streams)")
    seconds, bounds = {}, {}
    for count, size in points:
        seconds[count, size] = found[f"{count} {size}"].seconds
        bounds[count, size] = size * (0.5e-9 + 4 * count / aes)
        print(
            f"n = {count:4d}  d = {size:>11,}  {seconds[count, size]:9.4f}  {bounds[count, size]:9.4f}  "
            f"{seconds[count, size] / bounds[count, size]:5.2f} times"
        )
    if figure is not None:
        write_atomic(figure, draw_curve(sites, sizes, seconds, bounds) or b"")
        print(f"figure: {figure}")


def draw_curve(
    sites: list[int],
    sizes: list[int],
    seconds: dict[tuple[int, int], float],
    bounds: dict[tuple[int, int], float],
) -> bytes | None:
    """Return the figure as PNG."""

    def draw(theme: Theme) -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.5, 4.6))
        axes = figure.subplots()
        axes.set_title("Time of a site to round and mask its update, one core")
        ends = [sizes[0], sizes[-1]]
        axes.plot(
            sizes, [size * 4 * 8 / 1e9 for size in sizes], ":", color=theme.muted, label="upload at 1 Gbit/s"
        )
        for count, colour in zip(sites, theme.sites, strict=False):
            times = [seconds[count, size] for size in sizes]
            axes.plot(sizes, times, "o-", color=colour, markersize=5, label=f"{count} sites")
            axes.plot(ends, [bounds[count, size] for size in ends], "--", color=colour, linewidth=1)
        axes.plot([], [], "--", color=theme.muted, linewidth=1, label="bound: AES and memory")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.set_xticks(
            sizes, [f"{size // 1000:,} thousand".replace(",000 thousand", " M") for size in sizes]
        )
        low, high = min(bounds.values()), max(seconds.values())
        ticks = [10.0**power for power in range(-5, 4) if low / 2 <= 10.0**power <= high * 2]
        axes.set_yticks(ticks, [f"{tick:g} s" if tick >= 0.1 else f"{tick * 1000:g} ms" for tick in ticks])
        axes.set_ylim(low / 2, high * 2)
        axes.set_xlabel("coordinates of the update")
        axes.set_ylabel("CPU time")
        handles, labels = axes.get_legend_handles_labels()
        order = [*range(len(sites), 0, -1), len(sites) + 1, 0]
        figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside right center")
        return figure

    return render(draw, LIGHT, "png")


def installed(package: str) -> str:
    """Return the version of a package, empty where it is absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one size, under a minute")
    parser.add_argument("--full", action="store_true", help="the curve up to 10^8 coordinates")
    parser.add_argument("--sites", type=int, default=10, help="sites in the table of a site")
    parser.add_argument("--sizes", type=int, nargs="+", help="coordinates in the table of a site")
    parser.add_argument("--runs", type=int, default=5, help="runs after the warm-up")
    parser.add_argument("--threads", type=int, default=2, help="threads of the rows with threads")
    parser.add_argument("--figure", type=Path, help="where to draw the curve, a PNG file")
    arguments = parser.parse_args()
    sizes = arguments.sizes or ([10**6] if arguments.quick else [10**6, 10**7])
    curve = [10**6, 10**7, 10**8] if arguments.full else [10**5, 10**6] if arguments.quick else sizes
    packages = ("cryptography", "numpy", "scipy", "flwr", "tenseal")
    print(
        f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, load "
        f"{os.getloadavg()[0]:.1f}; Python {platform.python_version()}, "
        + ", ".join(f"{package} {installed(package) or 'absent'}" for package in packages)
        + f"; median of {arguments.runs} interleaved runs"
    )
    aes = print_throughput(1 << (22 if arguments.quick else 24), arguments.runs, arguments.threads)
    for size in sizes:
        ckks = CKKS_COORDINATES // (10 if arguments.quick else 1)
        print_site(arguments.sites, size, arguments.runs, arguments.threads, ckks)
    print_server(200, 10**6 if arguments.quick else 10**7, arguments.runs)
    print_curve([10, 50, 100, 200], curve, arguments.runs, aes, arguments.figure)


if __name__ == "__main__":
    main()
