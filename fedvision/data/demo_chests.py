"""Drawn chest radiographs for the demo: lungs, ribs, heart and spine, with nodules and calcifications.

A picture is drawn as attenuation (bright = dense) on a square of side 1, x to the right and y down, and
then passed through a site's detector. Nothing comes from a patient.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

CLASSES = ("nodule", "calcification")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ChestScanner:
    """How one site's detector sees a chest.

    Attributes:
        size: Rows and columns of the stored picture.
        gain: Factor on the brightness.
        offset: Added brightness, as a share of white.
        gamma: Power of the display curve.
        noise: Deviation of the noise, as a share of white.
        blur: Deviation of the point spread in pixels.
        objects: Least and largest number of objects in a patient who has any.
        calcified: Share of the objects that are calcifications.
        radius: Least and largest radius of a nodule, as a share of the side.
        healthy_every: Every so many-th patient has no object; 0 for none.
    """

    size: int
    gain: float
    offset: float
    gamma: float
    noise: float
    blur: float
    objects: tuple[int, int]
    calcified: float
    radius: tuple[float, float]
    healthy_every: int


SCANNERS = {
    "north": ChestScanner(192, 1.00, 0.02, 1.00, 0.012, 0.5, (1, 4), 0.45, (0.045, 0.085), 12),
    "east": ChestScanner(192, 0.80, 0.12, 0.80, 0.030, 0.9, (2, 5), 0.55, (0.045, 0.070), 0),
    "south": ChestScanner(176, 1.05, -0.04, 1.25, 0.020, 0.7, (1, 3), 0.30, (0.060, 0.105), 9),
    "west": ChestScanner(208, 0.90, 0.05, 1.10, 0.040, 1.3, (1, 4), 0.45, (0.050, 0.090), 6),
}


def _field(rng: np.random.Generator, size: int, scale: float) -> NDArray[np.float64]:
    """Return smooth noise of mean 0 and deviation 1, with ``scale`` its deviation in pixels."""
    field = gaussian_filter(rng.standard_normal((size, size)), scale, mode="reflect")
    return (field - field.mean()) / field.std()


def _soft(distance: NDArray[np.float64], width: float) -> NDArray[np.float64]:
    """Return 1 inside (distance < 0), 0 outside, with an edge of about ``width``."""
    return 1 / (1 + np.exp(np.clip(distance / width, -40, 40)))


def _lung(x: NDArray[np.float64], y: NDArray[np.float64], side: float, wide: float) -> NDArray[np.float64]:
    """Return about the distance to one lung's edge, negative inside; ``side`` is -1 (left) or 1."""
    reach = np.clip((y - 0.12) / 0.70, 0, 1)
    middle = 0.5 + side * (0.155 + 0.055 * reach) * wide
    half = (0.045 + 0.115 * np.sin(np.pi * np.clip(0.10 + 0.62 * reach, 0, 1)) ** 0.9) * wide
    dome = 0.80 + 0.25 * ((x - middle) / wide) ** 2 * 4 - 0.03 * (side < 0)
    return np.maximum.reduce([np.abs(x - middle) - half, 0.13 - y, y - dome])


def _ribs(x: NDArray[np.float64], y: NDArray[np.float64], tilt: float) -> NDArray[np.float64]:
    """Return the brightness of the ribs' shadows: bands that fall from the spine to the sides."""
    across = np.abs(x - 0.5)
    shadow = np.zeros_like(x)
    for number in range(8):
        start = 0.085 + 0.093 * number
        course = start + tilt * across + 1.1 * np.clip(across - 0.12, 0, None) ** 2
        apart = np.abs(y - course)
        shadow += _soft(apart - 0.018, 0.004) * 0.75 + _soft(np.abs(apart - 0.018) - 0.003, 0.003) * 0.5
    return shadow * (across > 0.035) * (across < 0.40)


def _chest(rng: np.random.Generator, size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw a chest without findings.

    Returns:
        Attenuation and the depth inside the lungs (positive inside), each of shape (size, size).
    """
    y, x = (np.indices((size, size)) + 0.5) / size
    wide, tilt = rng.uniform(0.92, 1.08), rng.uniform(0.28, 0.42)
    x = 0.5 + (x - 0.5 - rng.uniform(-0.015, 0.015))
    y = y + rng.uniform(-0.02, 0.02)

    slope = np.clip(np.abs(x - 0.5) - 0.07, 0, None)
    shoulder = 0.02 + 0.42 * slope + 1.6 * np.clip(slope - 0.28, 0, None) ** 2
    neck = np.maximum(np.abs(x - 0.5) - 0.085, y - 0.2)
    body = np.minimum(np.maximum(np.abs(x - 0.5) - (0.455 + 0.03 * y) * wide, shoulder - y), neck)
    picture = 0.05 + 0.62 * _soft(body, 0.012)
    lungs = np.minimum(_lung(x, y, -1.0, wide), _lung(x, y, 1.0, wide)) + 0.004 * _field(rng, size, size / 40)
    picture -= 0.40 * _soft(lungs, 0.010)
    vessels = _field(rng, size, size / 90) + 0.8 * _field(rng, size, size / 45)
    hilum = np.exp(-(((np.abs(x - 0.5) - 0.10) / 0.09) ** 2) - ((y - 0.45) / 0.16) ** 2)
    picture += _soft(lungs, 0.010) * (0.016 * vessels + 0.13 * hilum * (1 + 0.4 * vessels))
    heart = np.sqrt(((x - 0.545) / (0.155 * wide)) ** 2 + ((y - 0.655) / 0.185) ** 2) - 1
    arch = np.sqrt(((x - 0.535) / 0.055) ** 2 + ((y - 0.34) / 0.06) ** 2) - 1
    dense = np.maximum(_soft(heart, 0.06), 0.7 * _soft(arch, 0.10))
    picture += 0.34 * dense * _soft(lungs, 0.02)
    picture += _ribs(x, y, tilt) * (0.055 * _soft(lungs, 0.02) + 0.035) * _soft(body, 0.01)
    disc = 0.5 + 0.5 * np.sin(2 * np.pi * y / 0.062)
    picture += (0.10 + 0.05 * disc) * _soft(np.abs(x - 0.5) - 0.032, 0.006) * _soft(body, 0.01)
    trachea = np.maximum(np.abs(x - 0.5) - 0.017, y - 0.33)
    picture -= 0.16 * _soft(trachea, 0.006) * (y > 0.03)
    for side in (-1.0, 1.0):
        along = side * (x - 0.5)
        bone = np.abs(y - (0.165 - 0.22 * (along - 0.05) + 0.35 * (along - 0.2) ** 2)) - 0.014
        picture += 0.13 * _soft(np.maximum.reduce([bone, 0.04 - along, along - 0.33]), 0.005)
    return picture, np.minimum(-lungs, 0.2 * heart + 0.02)


def _object(
    rng: np.random.Generator, scanner: ChestScanner, centre: tuple[float, float], label: int
) -> tuple[NDArray[np.float64], Box]:
    """Draw one finding.

    Args:
        rng: Drawn from.
        scanner: Of the site.
        centre: x and y of its middle, shares of the side.
        label: 1 for a nodule, 2 for a calcification.

    Returns:
        Its attenuation, shape (size, size), and its box in pixels.
    """
    size = scanner.size
    y, x = (np.indices((size, size)) + 0.5) / size
    angle = np.arctan2(y - centre[1], x - centre[0])
    if label == 1:
        radius, wobble, edge, dense = rng.uniform(*scanner.radius), 0.10, 0.006, rng.uniform(0.20, 0.28)
    else:
        radius, wobble, edge, dense = rng.uniform(0.026, 0.042), 0.16, 0.0025, rng.uniform(0.42, 0.55)
    phases, waves = rng.uniform(0, 2 * np.pi, 3), rng.uniform(0.3, 1.0, 3)
    ragged = sum(w * np.cos((n + 2) * angle + p) for n, (p, w) in enumerate(zip(phases, waves, strict=True)))
    distance = np.hypot(x - centre[0], (y - centre[1]) * rng.uniform(0.85, 1.15)) - radius * (
        1 + wobble * ragged / 2
    )
    rows, columns = np.nonzero(distance < 0)
    box = (float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1))
    return dense * _soft(distance, edge), box


def draw_chest(
    scanner: ChestScanner, patient_seed: int, visit_seed: int, has_objects: bool
) -> tuple[NDArray[np.uint8], list[Box], list[int]]:
    """Draw one radiograph of a patient.

    Args:
        scanner: Of the site.
        patient_seed: Fixes the anatomy and the findings.
        visit_seed: Fixes exposure and noise.
        has_objects: Whether the patient has any.

    Returns:
        Picture of shape (size, size), boxes (x1, y1, x2, y2) in pixels, and their labels, 1 the first
        of ``CLASSES``. Boxes do not overlap.
    """
    rng, visit = np.random.default_rng(patient_seed), np.random.default_rng(visit_seed)
    size = scanner.size
    picture, depth = _chest(rng, size)
    boxes: list[Box] = []
    labels: list[int] = []
    wanted = int(rng.integers(scanner.objects[0], scanner.objects[1] + 1)) if has_objects else 0
    rows, columns = np.nonzero(depth > 0.038)
    for _ in range(12 * wanted):
        if len(boxes) == wanted:
            break
        pick = rng.integers(len(rows))
        label = 2 if rng.random() < scanner.calcified else 1
        centre = (float(columns[pick] + 0.5) / size, float(rows[pick] + 0.5) / size)
        finding, box = _object(rng, scanner, centre, label)
        apart = 3
        if all(
            box[0] > b[2] + apart or box[2] < b[0] - apart or box[1] > b[3] + apart or box[3] < b[1] - apart
            for b in boxes
        ):
            picture = picture + finding
            boxes.append(box)
            labels.append(label)

    picture = gaussian_filter(picture, scanner.blur)
    exposure = visit.uniform(0.93, 1.07)
    picture = scanner.gain * exposure * picture + scanner.offset
    picture += scanner.noise * visit.standard_normal(picture.shape) * np.sqrt(np.clip(picture, 0.05, 1))
    picture = np.clip(picture * 1.15, 0, 1) ** scanner.gamma
    return np.rint(255 * picture).astype(np.uint8), boxes, labels
