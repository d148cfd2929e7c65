"""Seeds for everything that must be reproducible, and nothing else.

A seed reproduces a run bit for bit on the same machine. Secrets and masks never come from here.
"""

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a seed in [0, 2**63) for one purpose, independent of every other purpose.

    Args:
        seed: The job's seed.
        purpose: What the seed is for, such as ``"train", round_number, site``. Order and type matter.

    Returns:
        The first 63 bits of SHA-256 over the seed and the purpose.
    """
    text = repr((int(seed), *purpose)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
