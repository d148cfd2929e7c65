"""Clipping an update in L2, at the site, before anything leaves it."""

import numpy as np

from fedvision.updates.layout import FloatVector


def clip_l2(update: FloatVector, clip_norm: float) -> tuple[FloatVector, float]:
    """Scale ``update`` so that its L2 norm is at most ``clip_norm``.

    Guarantee: for every finite input, the float64 norm of the result is at most ``clip_norm``. An update
    with an entry that is not finite becomes all zeros.

    Args:
        update: Shape (d,), float32.
        clip_norm: Largest norm allowed, > 0.

    Returns:
        The clipped update, shape (d,), float32 (the input itself where nothing was to be clipped), and
        the norm before clipping (inf if an entry is not finite).

    Raises:
        ValueError: ``clip_norm`` is not a positive finite number.
    """
    if not (np.isfinite(clip_norm) and clip_norm > 0):
        raise ValueError(f"clip_norm must be > 0 and finite, got {clip_norm}")
    if not np.isfinite(update).all():
        return np.zeros_like(update), float("inf")
    norm = l2_norm(update)
    if norm <= clip_norm:
        return update, norm
    # The factor is a little below clip_norm / norm so that rounding to float32 cannot exceed the bound.
    clipped = (update.astype(np.float64) * (clip_norm / norm * (1 - 2**-22))).astype(np.float32)
    return clipped, norm


def l2_norm(vector: FloatVector) -> float:
    """Return the L2 norm of ``vector``, computed in float64."""
    return float(np.linalg.norm(vector.astype(np.float64)))
