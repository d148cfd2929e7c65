"""The machine and the versions of a run: what a person needs to know to get the same run again."""

import datetime
import importlib.metadata
import os
import platform
from typing import Any

import psutil

PACKAGES = ("fedvision", "torch", "torchvision", "monai", "flwr", "ray", "numpy")


def describe_machine() -> dict[str, Any]:
    """Return time, versions, platform, cores, memory and GPUs of this machine, for ``environment.json``."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
