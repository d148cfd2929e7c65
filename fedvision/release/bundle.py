"""A released model as a MONAI bundle, which builds the network without fedvision.

    configs/metadata.json     what goes in and what comes out
    configs/inference.json    network, weights, intensities, sliding window
    models/model.safetensors  the released weights, byte for byte; what inference.json loads
    models/model.pt           the same with integer buffers, tensors only: for `monai.bundle.load`, which
                              reads nothing else, and reads it with weights_only
    docs/README.md

Rules:
- MONAI evaluates text that begins with $, @ or % in its configuration. No text of a job gets there with one.
- A bundle is written only if MONAI, reading what was written, gives the logits of the run's own network bit
  for bit on an image of noise.
"""

import inspect
import io
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedvision.config import Job
from fedvision.errors import ModelError
from fedvision.storage import load_tensors, write_atomic, write_json, write_text
from fedvision.tasks import initial_network
from fedvision.tasks.networks import NETWORKS, resolutions

Config = dict[str, Any]
WEIGHTS = "models/model.safetensors"
_SPECIAL = ("$", "@", "%")
_HINT = "release without --bundle: model.safetensors goes with fedvision's own network"


def check_bundle(job: Job) -> None:
    """Refuse a job whose model MONAI alone cannot build or feed.

    Raises:
        ModelError: The network, its normalisation or the preprocessing is not MONAI's.
    """
    reason = ""
    if ":" in job.model.name:
        reason = f"{job.model.name} is a function of your own"
    elif job.task.kind == "detection":
        reason = f"MONAI cannot build the detector {job.model.name}, which is torchvision's or our own"
    elif job.model.local_normalisation:
        reason = "the normalisation layers (FedBN) are at the sites, so the released model is not whole"
    elif job.preprocessing.transform is not None:
        reason = f"preprocessing.transform = {job.preprocessing.transform!r} is a function of your own"
    elif _replaces_norm(job):
        reason = f"MONAI's {job.model.name} has no argument for the normalisation that this one has"
    elif _is_special({"args": job.model.args, "classes": job.task.classes}):
        reason = "a class or an argument begins with $, @ or %, which MONAI would evaluate"
    if reason:
        raise ModelError(f"no MONAI bundle: {reason}", _HINT)


def _replaces_norm(job: Job) -> bool:
    """Whether ``fedvision.tasks.networks`` puts other layers into MONAI's network after it was built."""
    args = job.model.args
    return job.model.name == "AttentionUnet" or "group" in (args.get("norm"), args.get("norm_name"))


def _is_special(value: Any) -> bool:
    """Whether there is a text, key or value, that MONAI's reader of configurations would evaluate."""
    if isinstance(value, dict):
        return any(_is_special(key) or _is_special(one) for key, one in value.items())
    if isinstance(value, list | tuple):
        return any(map(_is_special, value))
    return isinstance(value, str) and (value.startswith(_SPECIAL) or value.startswith("_"))


def write_bundle(job: Job, model: Path, description: str, licence: str, readme: str, folder: Path) -> None:
    """Write the bundle of a model.

    Args:
        job: What was trained.
        model: The released weights.
        description: One line.
        licence: Of the weights.
        readme: The text that docs/README.md begins with.
        folder: Where the bundle goes; it is made.

    Raises:
        ModelError: See ``check_bundle``; or what MONAI builds is not the run's network.
        StorageError: The disk is full or the folder is not writable.
    """
    check_bundle(job)
    network = _released(job, model)
    write_atomic(folder / WEIGHTS, model.read_bytes())
    buffer = io.BytesIO()
    torch.save(dict(network.state_dict()), buffer)
    write_atomic(folder / "models" / "model.pt", buffer.getvalue())
    write_json(folder / "configs" / "metadata.json", _metadata(job, description, licence))
    write_json(folder / "configs" / "inference.json", _inference(job))
    write_text(folder / "docs" / "README.md", readme + _usage(job))
    _compare(job, network, folder)


def _released(job: Job, model: Path) -> nn.Module:
    """Return the run's own network with the released weights."""
    network = initial_network(job)
    tensors, _ = load_tensors(model)
    weights = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}
    lost = network.load_state_dict(weights, strict=False)
    state = network.state_dict()
    if lost.unexpected_keys or any(state[name].is_floating_point() for name in lost.missing_keys):
        raise ModelError("no MONAI bundle: the model has other weights than the job's network", _HINT)
    return network.eval()


def _network_definition(job: Job) -> Config:
    """Return MONAI's class and its arguments, with the defaults of ``fedvision.tasks.networks`` filled in."""
    from monai.networks import nets

    parameters = inspect.signature(getattr(nets, job.model.name)).parameters
    filled = {
        "spatial_dims": job.task.spatial_dims,
        "in_channels": job.task.in_channels,
        "out_channels": len(job.task.classes) + 1,
        "img_size": job.training.patch_size,
    }
    found = {key: value for key, value in filled.items() if key in parameters}
    found |= NETWORKS[job.model.name](job, dict(job.model.args)) | job.model.args
    return {"_target_": f"monai.networks.nets.{job.model.name}", **found}


def _intensity(job: Job) -> list[Config]:
    """Return MONAI's transform for the intensities; none for ``unit``, which needs the data type."""
    made = job.preprocessing
    to_unit = {"b_min": 0.0, "b_max": 1.0, "clip": True}
    if made.intensity == "zscore":
        return [{"_target_": "NormalizeIntensity", "channel_wise": True}]
    if made.intensity == "percentile":
        limits = {"lower": 1, "upper": 99.5, "channel_wise": True}
        return [{"_target_": "ScaleIntensityRangePercentiles", **limits, **to_unit}]
    if made.window is not None:
        low, high = made.window
        return [{"_target_": "ScaleIntensityRange", "a_min": low, "a_max": high, **to_unit}]
    return []


def _inference(job: Job) -> Config:
    """Return configs/inference.json."""
    assert job.training.patch_size is not None, "the job file gives a patch for segmentation"
    return {
        "imports": ["$import torch", "$from safetensors.torch import load_file"],
        "bundle_root": ".",
        "weights": f"$@bundle_root + '/{WEIGHTS}'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": _network_definition(job),
        "load_weights": "$@network_def.load_state_dict(load_file(@weights), strict=False)",
        "network": "$(@load_weights, @network_def.to(@device).eval())[1]",
        "preprocessing": {"_target_": "Compose", "transforms": [*_intensity(job), {"_target_": "ToTensor"}]},
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(job.training.patch_size),
            "sw_batch_size": 2 * job.training.batch_size,
            "overlap": job.evaluation.overlap,
            "mode": "gaussian",
        },
    }


def _metadata(job: Job, description: str, licence: str) -> Config:
    """Return configs/metadata.json, with the keys of MONAI's bundle specification."""
    channels, size = job.task.in_channels, list(job.training.patch_size or ())
    names = {str(number): name for number, name in enumerate(("background", *job.task.classes))}
    either = {"type": "image", "num_channels": channels, "spatial_shape": size, "dtype": "float32"}
    low_high = [] if job.preprocessing.intensity == "zscore" else [0, 1]
    image = {
        **either,
        "format": "magnitude",
        "value_range": low_high,
        "is_patch_data": True,
        "channel_def": {str(number): "image" for number in range(channels)},
    }
    logits = {
        **either,
        "format": "segmentation",
        "num_channels": len(names),
        "value_range": [],
        "is_patch_data": True,
        "channel_def": names,
    }
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
        "meta_schema_20240725.json",
        "version": "1.0.0",
        "changelog": {"1.0.0": "released"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"safetensors": version("safetensors")},
        "name": job.name,
        "task": f"{job.task.spatial_dims}D segmentation",
        "description": description,
        "authors": "not stated",
        "copyright": f"licence: {licence}",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": logits}},
    }


def _usage(job: Job) -> str:
    """Return how to use the bundle, and what of the preprocessing is not in it."""
    made = job.preprocessing
    grid = "Volumes are turned to the orientation RAS" if job.task.spatial_dims == 3 else "Pixels are kept"
    if made.spacing_mm is not None:
        grid += f" and resampled to {' x '.join(f'{one:g}' for one in made.spacing_mm)} mm (linear)"
    unit = ""
    if made.intensity == "unit":
        unit = (
            "Divide by the largest value of the image's data type first: `preprocessing` does not know it.\n"
        )
    return f"""
## Use of the bundle

```python
import torch
from monai.bundle import ConfigParser

parser = ConfigParser()
parser.read_config("configs/inference.json")
parser["bundle_root"] = "."
network, inferer = parser.get_parsed_content("network"), parser.get_parsed_content("inferer")
preprocessing = parser.get_parsed_content("preprocessing")
with torch.no_grad():
    logits = inferer(preprocessing(image)[None].to(parser.get_parsed_content("device")), network)
mask = logits.argmax(dim=1)
```

`image` has the shape (channels, *grid). {grid}: do this before `preprocessing`, which sets intensities only.
{unit}
The window is the training patch. fedvision's own test takes larger windows where they fit into memory, so on
images larger than the patch a few voxels at borders can differ.

`models/model.safetensors` is what `inference.json` loads. `models/model.pt` holds the same tensors for
`monai.bundle.load`, which reads no other format.
"""


def _compare(job: Job, network: nn.Module, folder: Path) -> None:
    """Refuse a bundle that MONAI does not read to the run's own network."""
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(folder / "configs" / "inference.json"))
    parser["bundle_root"], parser["device"] = str(folder), "$torch.device('cpu')"
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            built = parser.get_parsed_content("network")
            generator = torch.Generator().manual_seed(0)
            shape = (1, job.task.in_channels, *(job.training.patch_size or ()))
            image = torch.randn(shape, generator=generator)
            ours, theirs = (resolutions(one(image), len(shape) - 2)[0] for one in (network, built))
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise ModelError(f"no MONAI bundle: MONAI cannot build it: {error}", _HINT) from error
    if not torch.equal(ours, theirs):
        raise ModelError("no MONAI bundle: MONAI builds another network from the same arguments", _HINT)
