"""Masks: the AES-256-CTR keystream of a key, added to a vector modulo 2**32.

Rules:
- A key makes one mask, ever: the initial counter is 0 for all keys. Who derives keys sees to that; here
  two equal keys in one call are refused.
- Words are little-endian on every machine, so all sites make the same mask from the same key.
- Adding wraps modulo 2**32. With a uniform mask the masked word is uniform whatever it hides.

Sources: Bonawitz et al. 2017, fig. 4, round 2 (the sum of masks); NIST SP 800-38A, section 6.5 (CTR);
NIST SP 800-38D, section 7.1 (GCM's counters).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

MaskVector = NDArray[np.uint32]

KEY_BYTES = 32
_WORD = np.dtype("<u4")
_BLOCK_BYTES = 16
SLICE = 1 << 17
"""Coordinates of a slice: 512 KiB, so that the slice and the keystreams stay in cache."""
_ZEROS = memoryview(bytes(SLICE * _WORD.itemsize))


def keystream(key: bytes) -> CipherContext:
    """Return AES-256-CTR of ``key`` with initial counter 0; encrypting zeros gives the keystream.

    Raises:
        ValueError: The key is not 32 bytes.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"a mask key must have {KEY_BYTES} bytes, got {len(key)}")
    return Cipher(algorithms.AES(key), modes.CTR(bytes(_BLOCK_BYTES))).encryptor()


class LongKeystream:
    """The bytes of ``keystream`` in order, faster where there are many.

    From the third block on they are made by AES-GCM: with a nonce of 96 zeros it encrypts with the counters
    2, 3, ..., as CTR does, and OpenSSL's GCM uses wider instructions where the processor has them. The tag,
    which GCM makes of what it encrypts, is never asked for.

    Guarantee: the bytes are those of AES-256-CTR with initial counter 0, for every division into pieces.

    Args:
        key: 32 bytes. It gives 64 GiB at most, where GCM's counter of 32 bits ends.

    Raises:
        ValueError: The key is not 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._first = keystream(key).update(bytes(2 * _BLOCK_BYTES))
        self._rest = Cipher(algorithms.AES(key), modes.GCM(bytes(12))).encryptor()

    def fill(self, target: NDArray[np.generic]) -> None:
        """Set ``target``, contiguous and one-dimensional, to the next bytes of the keystream."""
        view = target.view(np.uint8).data
        if self._first:
            count = min(len(self._first), len(view))
            view[:count], self._first = self._first[:count], self._first[count:]
            view = view[count:]
        for start in range(0, len(view), len(_ZEROS)):
            part = view[start : start + len(_ZEROS)]
            self._rest.update_into(_ZEROS[: len(part)], part)


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
    words = np.empty(size, _WORD)
    LongKeystream(key).fill(words)
    return words.astype(np.uint32, copy=False)


def _add_some(vector: MaskVector, keys: Sequence[bytes], signs: Sequence[int], locks: Sequence[Lock]) -> None:
    """Add the masks of some keys, slice by slice, each under its lock: other threads add theirs."""
    streams = [LongKeystream(key) for key in keys]
    steps = [np.add if sign == signs[0] else np.subtract for sign in signs]
    total, words = np.empty((2, min(SLICE, vector.size)), _WORD)
    for start, lock in zip(range(0, vector.size, SLICE), locks, strict=True):
        part = vector[start : start + SLICE]
        sums, mask = total[: part.size], words[: part.size]
        streams[0].fill(sums)
        for stream, step in zip(streams[1:], steps[1:], strict=True):
            stream.fill(mask)
            step(sums, mask, out=sums)
        with lock:
            (np.add if signs[0] > 0 else np.subtract)(part, sums, out=part)


def add_masks(vector: MaskVector, keys: Sequence[bytes], signs: Sequence[int], threads: int = 1) -> None:
    """Add ``sign * mask_stream(key)`` for every key to ``vector``, in place, modulo 2**32.

    Guarantee: the result is the same for every order of the keys, every number of threads and every byte
    order of the machine. Adding a key with sign +1 and later with -1 leaves the vector as it was.

    Args:
        vector: Shape (d,), uint32.
        keys: 32 bytes each, all different; a key that masks twice would hide nothing.
        signs: +1 or -1 for each key.
        threads: Cores to use; each makes the masks of its own part of the keys.

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
    locks = [Lock() for _ in range(0, vector.size, SLICE)]
    parts = min(threads, len(keys))
    if parts <= 1:
        if keys:
            _add_some(vector, keys, signs, locks)
        return
    with ThreadPoolExecutor(parts) as pool:
        jobs = [
            pool.submit(_add_some, vector, keys[part::parts], signs[part::parts], locks)
            for part in range(parts)
        ]
        for job in jobs:
            job.result()
