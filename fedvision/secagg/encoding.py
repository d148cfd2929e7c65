"""Updates and statistics as integers modulo 2**32 whose sum over all sites never wraps.

An update travels as one vector ``[w * update, w * metrics, w]`` in fixed point: weights and metrics are
hidden in the sum too. Rules:
- A unit is ``clip_norm / S`` with ``S = floor(2**30 / (n + 8 z))``: n sites add up to 2**30 + n at most and
  8 standard deviations of noise fit on top, in a ring of 2**32.
- Rounding is random, ``floor(x + u)``, so that it has no direction over sites and rounds.
- Statistics are numbers of another size: each is a 60-bit integer in three limbs of 20 bits, every limb a
  coordinate of its own, so that sums over 255 sites carry nothing from limb to limb and are exact.

Sources: section "Encoding" of the design; Kairouz et al. 2021, section 4 (random rounding).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedvision.errors import MessageError
from fedvision.secagg.masking import LongKeystream, MaskVector

MAX_SITES = 255
LIMB_BITS = 20
_FRACTION_BITS = 20
_LIMITS = (255 * ((1 << LIMB_BITS) - 1), 255 << (38 + _FRACTION_BITS - 2 * LIMB_BITS))
_TAIL_PART = 16
_WEIGHT_PART = 2
_SMALLEST_SCALE = 1 << 12
_NORM_SLACK = 1e-6
_SLICE = 1 << 17


@dataclass(frozen=True)
class DecodedSum:
    """What the sum over sites says.

    Attributes:
        mean_update: Shape (d,), float64: ``sum(w * update) / sum(w)``.
        metrics: Means of the metrics, weighted by w.
        total_weight: ``sum(w)``, in sites: n where every site has the largest weight.
        is_weight_moved: Whether the sum held another weight, which its sites can't have.
    """

    mean_update: NDArray[np.float64]
    metrics: tuple[float, ...]
    total_weight: float
    is_weight_moved: bool = False


@dataclass(frozen=True)
class Encoding:
    """How an update, its metrics and its weight become integers; the same at all parties of a job.

    Attributes:
        num_sites: Enrolled sites n, 3..255.
        size: Coordinates d of an update.
        clip_norm: Largest L2 norm of an update, > 0.
        weight_cap: Number of samples from which on a site's weight grows no more, >= 1.
        metric_caps: Largest value of each metric, > 0; the least is 0.
        noise_multiplier: Standard deviation z of the noise of all sites together, in clip norms.
    """

    num_sites: int
    size: int
    clip_norm: float
    weight_cap: int
    metric_caps: tuple[float, ...] = ()
    noise_multiplier: float = 0.0

    def __post_init__(self) -> None:
        if not 3 <= self.num_sites <= MAX_SITES:
            raise ValueError(f"num_sites must be in 3..{MAX_SITES}, got {self.num_sites}")
        if self.size < 1 or self.weight_cap < 1:
            raise ValueError(f"size and weight_cap must be >= 1, got {self.size} and {self.weight_cap}")
        if not (math.isfinite(self.clip_norm) and self.clip_norm > 0):
            raise ValueError(f"clip_norm must be > 0 and finite, got {self.clip_norm}")
        if not all(math.isfinite(cap) and cap > 0 for cap in self.metric_caps):
            raise ValueError(f"metric_caps must be > 0 and finite, got {self.metric_caps}")
        if not (self.noise_multiplier >= 0 and self.scale >= _SMALLEST_SCALE):
            raise ValueError(f"noise_multiplier must be >= 0 and at most 2**14, got {self.noise_multiplier}")

    @property
    def scale(self) -> int:
        """S, the units of one clip norm."""
        return math.floor(2**30 / (self.num_sites + 8 * self.noise_multiplier))

    @property
    def length(self) -> int:
        """Coordinates of an encoded vector: update, metrics, weight."""
        return self.size + len(self.metric_caps) + 1

    @property
    def norm_bound(self) -> float:
        """Largest L2 norm of a compliant encoded vector, in units.

        The update has S at most, each metric S / 16, the weight S / 2, and rounding moves every coordinate by
        less than 1. The weight has the larger part so that a liar within the bound can take away the weight
        of three other sites at most, and not of many.
        """
        tail = len(self.metric_caps) / _TAIL_PART**2 + 1 / _WEIGHT_PART**2
        return self.scale * math.sqrt(1 + tail) + math.sqrt(self.length)

    @property
    def largest_weight(self) -> int:
        """The last coordinate of a vector with the largest weight, in units."""
        return self._step_units * self._steps

    @property
    def _steps(self) -> int:
        """Steps of w from 0 to 1; a whole number of units each, so that the weights add up exactly."""
        return min(self.weight_cap, self.scale // _WEIGHT_PART)

    @property
    def _step_units(self) -> int:
        return self.scale // _WEIGHT_PART // self._steps

    def encode(
        self,
        update: NDArray[np.float32],
        num_samples: int,
        metrics: Sequence[float],
        rounding_key: bytes,
    ) -> MaskVector:
        """Return ``[w * update, w * metrics, w]`` in units, with ``w = min(num_samples, cap) / cap``.

        Where the cap is above S / 2, w is rounded to the nearest of S / 2 steps, the first at least.

        Guarantee: every coordinate is at most S + 1 in absolute value, and its mean is the exact value or
        less, by at most 2**-16 units. For x = w * update * S / clip_norm in float64, |x| <= S * (1 + 2**-50)
        and x is exact up to 2**-23 (S < 2**29, three roundings). ``u = k / 2**16`` for 16 uniform bits k, so
        ``floor(x + u)`` is below S + 1 + 2**-20, not below -S - 1, and it rounds up with the probability of
        the fraction of x, cut to 16 bits. Float32 would not do: it has 24 bits and S has 29 for three sites.

        Args:
            update: Shape (size,), float32, L2 norm at most ``clip_norm`` (a millionth more is scaled down).
            num_samples: Number of samples behind the update, >= 1.
            metrics: One number for each cap; clipped to 0..cap.
            rounding_key: 32 bytes, drawn without regard to the update, one for each vector; no secret.

        Returns:
            Shape (length,), two's complement modulo 2**32.

        Raises:
            ValueError: An entry is not finite, the norm is too large, or a shape or count is wrong.
        """
        if update.shape != (self.size,) or update.dtype != np.float32:
            raise ValueError(f"update must be float32 of shape ({self.size},), got {update.dtype}")
        if num_samples < 1:
            raise ValueError(f"num_samples must be >= 1, got {num_samples}")
        if len(metrics) != len(self.metric_caps) or not all(math.isfinite(value) for value in metrics):
            raise ValueError(f"there must be {len(self.metric_caps)} finite metrics, got {len(metrics)}")
        steps = max(1, round(min(num_samples, self.weight_cap) * self._steps / self.weight_cap))
        largest = self.scale * steps / self._steps  # w * S, the norm of a vector at the bound
        encoded = np.empty(self.length, np.int32)
        coordinates, factor = encoded[: self.size], largest / self.clip_norm
        uniform = LongKeystream(rounding_key)
        norm = _round_into(coordinates, update, factor, uniform, largest * (1 + _NORM_SLACK))
        if norm > largest:
            uniform = LongKeystream(rounding_key)
            _round_into(coordinates, update, factor * (largest / norm), uniform, math.inf)
        caps = self.metric_caps
        tail = [min(max(value, 0.0), cap) / cap for value, cap in zip(metrics, caps, strict=True)]
        _round_into(encoded[self.size : -1], np.array(tail), largest / _TAIL_PART, uniform, math.inf)
        encoded[-1] = steps * self._step_units
        return encoded.view(np.uint32)

    def decode(self, total: MaskVector, num_checked: int | None = None) -> DecodedSum:
        """Return the weighted means that the sum of the sites' encoded vectors holds.

        Args:
            total: Shape (length,), the sum modulo 2**32.
            num_checked: Number of sites in the sum, where the norm of each was checked: a lie about a weight
                is within the norm bound then, and a total that these sites can't have is moved to the nearest
                one that they can. None where nothing was checked: such a total is refused.

        Guarantee: without noise the mean update has an L2 norm of at most ``clip_norm``, as every mean of
        compliant updates has; a longer one, which only a lie about a weight can make, is scaled down.

        Raises:
            MessageError: A wrong shape; or unchecked weights that add up to 0 or to more than the sites can
                have: not a sum of compliant vectors.
        """
        if total.shape != (self.length,) or total.dtype != np.uint32:
            raise MessageError(f"a sum must be uint32 of shape ({self.length},)")
        values = total.view(np.int32)
        noise = 8 * self.noise_multiplier * self.scale
        per_site = self._step_units * self._steps
        weight = int(values[-1])
        least, most = 1.0, self.num_sites * per_site + noise
        if num_checked is not None:
            least, most = num_checked * self._step_units, num_checked * per_site
        is_moved = not least <= weight <= most
        if is_moved and num_checked is None:
            raise MessageError("the weights of a sum are not those of the enrolled sites")
        total_weight = min(max(weight, least), most) / per_site
        slack = self.num_sites + noise
        largest = total_weight * self.scale / _TAIL_PART
        tail = values[self.size : -1].astype(np.float64)
        outside = (tail < -slack) | (tail > largest + slack)
        shares = np.where(outside, np.nan, np.clip(tail / largest, 0.0, 1.0))
        mean = values[: self.size].astype(np.float64)
        mean *= self.clip_norm / (self.scale * total_weight)
        norm = float(np.linalg.norm(mean))
        if norm > self.clip_norm and self.noise_multiplier == 0:
            mean *= self.clip_norm / norm
        return DecodedSum(
            mean_update=mean,
            metrics=tuple(float(s) * cap for s, cap in zip(shares, self.metric_caps, strict=True)),
            total_weight=total_weight,
            is_weight_moved=is_moved,
        )


def _round_into(
    target: NDArray[np.int32],
    values: NDArray[np.floating],
    factor: float,
    uniform: LongKeystream,
    largest_norm: float,
) -> float:
    """Write ``floor(values * factor + u)`` to ``target``.

    Args:
        target: Shape (k,).
        values: Shape (k,).
        factor: Units of 1.
        uniform: The keystream of u, two bytes a coordinate, little-endian.
        largest_norm: Largest L2 norm of the scaled values.

    Returns:
        The L2 norm of the scaled values.

    Raises:
        ValueError: It is larger, or a value is not finite.
    """
    bits = np.empty(_SLICE, "<u2")
    scaled, offsets = np.empty(_SLICE), np.empty(_SLICE)
    squares = 0.0
    for start in range(0, values.size, _SLICE):
        part = values[start : start + _SLICE]
        x, u = scaled[: part.size], offsets[: part.size]
        x[...] = part
        x *= factor
        squares += float(x @ x)
        if not squares <= largest_norm**2:
            raise ValueError("update must be finite and its L2 norm at most clip_norm")
        uniform.fill(bits[: part.size])
        u[...] = bits[: part.size]
        u *= 2.0**-16
        x += u
        np.floor(x, out=x)
        target[start : start + part.size] = x
    return math.sqrt(squares)


def encode_statistics(values: NDArray[np.float64]) -> MaskVector:
    """Return numbers as three limbs each: fixed point with 20 binary places, 60 bits, two's complement.

    Args:
        values: Any shape, finite, absolute value below 2**38.

    Returns:
        Shape (3 * values.size,): all low limbs, all middle limbs (each 0..2**20 - 1), all top limbs
        (signed).

    Raises:
        ValueError: A value is not finite or too large.
    """
    flat = np.asarray(values, np.float64).ravel()
    if not (np.abs(flat) < 2.0**38).all():
        raise ValueError("statistics must be finite and below 2**38")
    whole = np.rint(flat * 2.0**_FRACTION_BITS).astype(np.int64)
    mask = (1 << LIMB_BITS) - 1
    limbs = np.concatenate([whole & mask, (whole >> LIMB_BITS) & mask, whole >> (2 * LIMB_BITS)])
    return limbs.astype(np.int32).view(np.uint32)


def decode_statistics(total: MaskVector, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return the sum of up to 255 arrays that ``encode_statistics`` encoded.

    Guarantee: the integers add up exactly; the result is their sum, rounded once to float64.

    Args:
        total: Shape (3 * size,), the sum of the limbs modulo 2**32.
        shape: Shape of the arrays.

    Raises:
        MessageError: Not such a sum.
    """
    if total.dtype != np.uint32 or total.shape != (3 * math.prod(shape),):
        raise MessageError(f"a sum of statistics must be uint32 of shape ({3 * math.prod(shape)},)")
    low, middle, top = total.view(np.int32).astype(np.int64).reshape(3, -1)
    if ((low < 0) | (middle < 0) | (low > _LIMITS[0]) | (middle > _LIMITS[0])).any():
        raise MessageError("a sum of statistics has a limb out of range")
    if (np.abs(top) > _LIMITS[1]).any():
        raise MessageError("a sum of statistics has a limb out of range")
    high = (top << LIMB_BITS) + middle + (low >> LIMB_BITS)
    rest = low & ((1 << LIMB_BITS) - 1)
    whole = high.astype(np.float64) * 2.0**LIMB_BITS + rest  # high < 2**53: the sum is the only rounding
    return (whole * 2.0**-_FRACTION_BITS).reshape(shape)
