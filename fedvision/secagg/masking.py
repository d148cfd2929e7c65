"""Masks: the AES-256-CTR keystream of a key, added to a vector modulo 2**32.

Rules:
- A key makes one mask, ever: the initial counter is 0 for all keys. Who derives keys sees to that; here
  two equal keys in one call are refused.
- Words are little-endian on every machine, so all sites make the same mask from the same key.
- Adding wraps modulo 2**32. With a uniform mask the masked word is uniform whatever it hides.

Sources: Bonawitz et al. 2017, fig. 4, round 2 (the sum of masks); NIST SP 800-38A, section 6.5 (CTR).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

MaskVector = NDArray[np.uint32]

KEY_BYTES = 32
_WORD = np.dtype("<u4")
_BLOCK_BYTES = 16
SLICE = 1 << 16
"""Coordinates of a slice: 256 KiB, so that the slice and the keystream stay in a core's cache."""
_ZEROS = bytes(SLICE * _WORD.itemsize)


def keystream(key: bytes, start: int = 0) -> CipherContext:
    """Return AES-256-CTR of ``key`` from byte ``start`` of its keystream on, a multiple of 16.

    The initial counter is 0; encrypting zeros gives the keystream itself.

    Raises:
        ValueError: The key is not 32 bytes, or the start is not the first byte of a block.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"a mask key must have {KEY_BYTES} bytes, got {len(key)}")
    if start < 0 or start % _BLOCK_BYTES:
        raise ValueError(f"a keystream must start at a multiple of {_BLOCK_BYTES} bytes, got {start}")
    counter = (start // _BLOCK_BYTES).to_bytes(_BLOCK_BYTES, "big")
    return Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()


def mask_stream(key: bytes, size: int) -> MaskVector:
    """Return the mask of ``key``: its AES-256-CTR keystream from counter 0 as little-endian words.

    Args:
        key: 32 bytes.
        size: Number of words, >= 0.

    Returns:
        Shape (size,), the same values on every machine.

    Raises:
        ValueError: The key is not 32 bytes.
    """
    cipher = keystream(key)
    words = np.empty(size, _WORD)
    target = words.view(np.uint8).data
    for start in range(0, len(target), len(_ZEROS)):
        part = target[start : start + len(_ZEROS)]
        cipher.update_into(_ZEROS[: len(part)], part)
    return words.astype(np.uint32, copy=False)


def _add_range(vector: MaskVector, keys: Sequence[bytes], signs: Sequence[int], start: int) -> None:
    """Add the masks to ``vector``, which begins at coordinate ``start`` of the whole."""
    ciphers = [keystream(key, start * _WORD.itemsize) for key in keys]
    steps = [np.add if sign > 0 else np.subtract for sign in signs]
    words = np.empty(min(SLICE, vector.size), _WORD)
    target = words.view(np.uint8).data
    for first in range(0, vector.size, SLICE):
        part = vector[first : first + SLICE]
        size_bytes = part.size * _WORD.itemsize
        zeros, mask, view = _ZEROS[:size_bytes], words[: part.size], target[:size_bytes]
        for cipher, step in zip(ciphers, steps, strict=True):
            cipher.update_into(zeros, view)
            step(part, mask, out=part)


def add_masks(vector: MaskVector, keys: Sequence[bytes], signs: Sequence[int], threads: int = 1) -> None:
    """Add ``sign * mask_stream(key)`` for every key to ``vector``, in place, modulo 2**32.

    Guarantee: the result is the same for every order of the keys, every number of threads and every byte
    order of the machine. Adding a key with sign +1 and later with -1 leaves the vector as it was.

    Args:
        vector: Shape (d,), uint32.
        keys: 32 bytes each, all different; a key that masks twice would hide nothing.
        signs: +1 or -1 for each key.
        threads: Cores to use; each works on its own part of the vector.

    Raises:
        ValueError: Two keys are equal, a key is not 32 bytes, a sign is not +1 or -1, or the vector is
            not one-dimensional of 32-bit words. The vector is then unchanged.
    """
    if vector.ndim != 1 or vector.dtype.newbyteorder("=") != np.uint32:
        raise ValueError(f"vector must be uint32 of one dimension, got {vector.dtype} {vector.shape}")
    if any(len(key) != KEY_BYTES for key in keys):
        raise ValueError(f"mask keys must have {KEY_BYTES} bytes")
    if len(set(keys)) != len(keys):
        raise ValueError("mask keys must differ from each other, got one twice")
    if len(signs) != len(keys) or any(sign not in (1, -1) for sign in signs):
        raise ValueError("every mask key needs a sign, +1 or -1")
    if threads < 1:
        raise ValueError(f"threads must be >= 1, got {threads}")
    num_slices = -(-vector.size // SLICE)
    parts = max(1, min(threads, num_slices))
    bounds = [num_slices * part // parts * SLICE for part in range(parts)] + [vector.size]
    if parts == 1:
        _add_range(vector, keys, signs, 0)
        return
    with ThreadPoolExecutor(parts) as pool:
        jobs = [
            pool.submit(_add_range, vector[first:last], keys, signs, first)
            for first, last in pairwise(bounds)
        ]
        for job in jobs:
            job.result()
