"""Cost of gradients that are clipped patient by patient, and of the noise, against a plain step.

    python tests/benchmarks/private_gradients.py             one thread; a minute or two
    python tests/benchmarks/private_gradients.py --repeats 9

For each network one batch of eight patients, one image each: CPU time of a plain step's gradient (forward and
backward of the whole batch), and of the sum of clipped gradients by each engine, the median of several,
taken in turns. Opacus is measured beside them where it is installed (``pip install opacus``): its hooks,
clipped and summed. Then the discrete noise of 10^7 coordinates beside numpy's Gaussian.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from monai.networks import nets
from torch import nn
from torch.nn import functional

from fedvision.privacy.noise import discrete_gaussian
from fedvision.privacy.per_patient import clipped_gradient_sum

PATIENTS = 8
INSTANCE = ("instance", {"affine": True})
GROUP = ("group", {"num_groups": 8})
ENGINES = (("loop", 1), ("vmap", 1), ("vmap", 2), ("vmap", 4), ("vmap", 8))


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Return networks with the sizes of their images."""
    return {
        "UNet 2D": (nets.UNet(2, 1, 3, (16, 32, 64), (2, 2), num_res_units=2, norm=INSTANCE), (64, 64)),
        "UNet 3D": (nets.UNet(3, 1, 3, (8, 16, 32), (2, 2), num_res_units=2, norm=INSTANCE), (32, 32, 32)),
        "SegResNet 2D": (nets.SegResNet(2, 8, 1, 3, norm=GROUP), (64, 64)),
    }


def loss_of(network: nn.Module, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the cross entropy of a sample."""
    return functional.cross_entropy(network(sample["image"]), sample["label"])


def with_opacus(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], Any] | None:
    """Return Opacus' clipped sum by hooks as a function; None where it is absent or refuses the network."""
    try:
        from opacus import GradSampleModule
    except ImportError:
        return None
    module = GradSampleModule(copy.deepcopy(network))

    def run() -> None:
        for parameter in module.parameters():
            parameter.grad_sample = None
        functional.cross_entropy(module(images), labels).backward()
        parts = [p.grad_sample.flatten(1) * PATIENTS for p in module.parameters()]
        norms = torch.stack([part.norm(dim=1) for part in parts]).norm(dim=0)
        factors = (1.0 / norms).clamp(max=1.0)
        _ = [factors @ part for part in parts]

    try:
        run()
    except RuntimeError as error:
        print(f"    opacus hooks refuse this network: {str(error)[:90]}")
        return None
    return run


def seconds(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median CPU time of each, taken in turns after one run to warm up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            started = time.process_time()
            run()
            if number:
                found[name].append(time.process_time() - started)
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for name, (network, size) in networks().items():
        network.train()
        patients = [
            [{"image": torch.randn(1, 1, *size), "label": torch.randint(0, 3, (1, *size))}]
            for _ in range(PATIENTS)
        ]
        images = torch.cat([one[0]["image"] for one in patients])
        labels = torch.cat([one[0]["label"] for one in patients])

        def plain(network: nn.Module = network, x: Any = images, y: Any = labels) -> None:
            network.zero_grad()
            functional.cross_entropy(network(x), y).backward()

        runs: dict[str, Callable[[], Any]] = {"plain": plain}
        for engine, chunk in ENGINES:
            runs[f"{engine} {chunk}"] = lambda n=network, p=patients, e=engine, c=chunk: clipped_gradient_sum(
                n, loss_of, p, 1.0, e, c
            )
        opacus = with_opacus(network, images, labels)
        if opacus is not None:
            runs["opacus hooks"] = opacus
        found = seconds(runs, repeats)
        print(f"{name}, {sum(p.numel() for p in network.parameters()):,} weights, images {size}")
        for run, took in found.items():
            print(f"    {run:14}{1e3 * took:8.0f} ms  {took / found['plain']:5.2f}")
    size, sigma = 10_000_000, 1e5
    generator = np.random.default_rng()
    found = seconds(
        {
            "numpy's Gaussian": lambda: generator.standard_normal(size),
            "discrete Gaussian": lambda: discrete_gaussian(size, sigma),
        },
        max(2, repeats // 2),
    )
    for name, took in found.items():
        print(f"{name:20}{took:6.2f} s for 10^7 coordinates")


if __name__ == "__main__":
    main()
