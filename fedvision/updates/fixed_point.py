"""A weighted sum of clipped updates in integers: exact, so the order of the sites does not matter.

A float sum depends on who answers first; an integer sum does not, so a run is reproducible bit for bit
and the server needs one vector only, however many sites there are. The resolution is the clip norm
divided by 2**31, far below float32's own rounding of a typical coordinate.
"""

import numpy as np
from numpy.typing import NDArray

from fedvision.updates.layout import FloatVector

RESOLUTION_BITS = 31
MAX_TOTAL_WEIGHT = 2**31


class WeightedSum:
    """Adds up ``weight * update`` over sites.

    Guarantee: the mean is the same, bit for bit, in whatever order updates are added. No overflow: a
    coordinate is at most ``clip_norm`` and the total weight at most 2**31, so the sum stays below 2**62.

    Args:
        size: Number of coordinates d.
        clip_norm: Largest L2 norm of an update, > 0.
    """

    def __init__(self, size: int, clip_norm: float) -> None:
        self._scale = 2.0**RESOLUTION_BITS / clip_norm
        self._sum: NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self.total_weight = 0

    def add(self, update: FloatVector, weight: int) -> None:
        """Add one site's update.

        Args:
            update: Shape (d,), finite, L2 norm at most the clip norm.
            weight: Integer >= 1, such as the number of training cases.

        Raises:
            ValueError: The weight is below 1, or the total weight would pass 2**31.
        """
        if weight < 1 or self.total_weight + weight > MAX_TOTAL_WEIGHT:
            raise ValueError(f"weight must be >= 1 and the total at most 2**31, got {weight}")
        for start in range(0, update.size, 1 << 18):  # slices keep the temporaries in cache
            part = update[start : start + (1 << 18)]
            encoded = np.rint(part.astype(np.float64) * self._scale).astype(np.int64)
            self._sum[start : start + (1 << 18)] += encoded * weight
        self.total_weight += weight

    def mean(self) -> NDArray[np.float64]:
        """Return the weighted mean update, shape (d,).

        Raises:
            ValueError: Nothing was added.
        """
        if self.total_weight == 0:
            raise ValueError("no update was added")
        return self._sum / (self._scale * self.total_weight)
