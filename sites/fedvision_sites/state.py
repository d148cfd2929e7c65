"""What a site keeps for itself between rounds: its record, its local layers, its example pictures.

    log.jsonl                 one line a round: norm before clipping, share kept, loss
    local/round-0007.safetensors  FedBN: this site's normalisation layers after that round
    test-cases.jsonl          scores of its test cases
    examples/*.png            overlays of its best, median and worst test case

Nothing in this folder is ever sent.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedvision.errors import StorageError
from fedvision.storage import load_tensors, save_tensors
from fedvision.updates.layout import float_tensors

ROUND_FILE = "round-{:04d}.safetensors"


def save_local(folder: Path, round_number: int, network: nn.Module, names: frozenset[str]) -> None:
    """Write the local layers of ``network`` after a round; no file where there are none."""
    if names:
        tensors = {n: t.cpu().numpy() for n, t in float_tensors(network).items() if n in names}
        save_tensors(
            folder / "local" / ROUND_FILE.format(round_number), tensors, {"round": str(round_number)}
        )


def load_local(folder: Path, round_number: int, network: nn.Module, names: frozenset[str]) -> None:
    """Load the local layers as they were after ``round_number``, or the latest before it.

    A site that never trained (or was left out of early rounds) keeps the network's initial layers.

    Raises:
        StorageError: A file is damaged or belongs to another network.
    """
    if not names:
        return
    for earlier in range(round_number, 0, -1):
        path = folder / "local" / ROUND_FILE.format(earlier)
        if path.exists():
            tensors, _ = load_tensors(path)
            own = float_tensors(network)
            with torch.no_grad():
                for name in names & own.keys():
                    if name not in tensors or tensors[name].shape != tuple(own[name].shape):
                        raise StorageError("the site's local layers belong to another network")
                    own[name].copy_(torch.from_numpy(np.array(tensors[name])))
            return
