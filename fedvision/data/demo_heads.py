"""Drawn MR heads for the demo: FLAIR-like volumes with dark ventricles and bright lesions.

Anatomy is drawn in mm (x right, y anterior, z superior, origin in the middle of the brain) and then
sampled on a site's grid, so that sites differ as scanners do. Nothing comes from a patient.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

CLASSES = ("ventricle", "lesion")

# Brightness of a tissue in a FLAIR picture, fat = 1.
SCALP, SKULL, FLUID, GREY, WHITE, LESION = 0.95, 0.07, 0.10, 0.56, 0.44, 0.88


@dataclass(frozen=True)
class HeadScanner:
    """How one site's scanner sees a head.

    Attributes:
        shape: Voxels along x, y, z.
        spacing_mm: Voxel size along x, y, z.
        orientation: Axis codes of the stored file, such as "LPS".
        gain: Stored value of the brightest tissue.
        noise: Deviation of the noise, as a share of the brightest tissue.
        bias: Strength of the uneven coil sensitivity.
        blur_mm: Deviation of the point spread.
        lesions: Least and largest number of lesions in a patient who has any.
        radius_mm: Least and largest radius of a lesion.
        healthy_every: Every so many-th patient has no lesion; 0 for none.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    orientation: str
    gain: float
    noise: float
    bias: float
    blur_mm: float
    lesions: tuple[int, int]
    radius_mm: tuple[float, float]
    healthy_every: int


SCANNERS = {
    "north": HeadScanner((40, 48, 24), (4.0, 4.0, 5.5), "RAS", 900.0, 0.020, 0.15, 1.5, (1, 3), (11, 20), 12),
    "east": HeadScanner((44, 52, 24), (3.7, 3.7, 5.5), "LPS", 240.0, 0.045, 0.25, 2.0, (1, 2), (12, 22), 0),
    "south": HeadScanner((36, 44, 22), (4.4, 4.4, 6.0), "LAS", 2400.0, 0.030, 0.35, 2.8, (2, 4), (10, 16), 9),
    "west": HeadScanner((40, 48, 26), (4.1, 4.1, 5.0), "RPI", 520.0, 0.060, 0.20, 1.8, (1, 2), (14, 25), 6),
}


def _field(rng: np.random.Generator, shape: tuple[int, ...], scale: tuple[float, ...]) -> NDArray[np.float64]:
    """Return smooth noise of mean 0 and deviation 1, with ``scale`` its deviation in voxels."""
    field = gaussian_filter(rng.standard_normal(shape), scale, mode="reflect")
    return (field - field.mean()) / field.std()


def _soft(distance_mm: NDArray[np.float64], width_mm: float = 1.5) -> NDArray[np.float64]:
    """Return 1 inside (distance < 0), 0 outside, with an edge of about ``width_mm``."""
    return 1 / (1 + np.exp(np.clip(distance_mm / width_mm, -40, 40)))


@dataclass(frozen=True)
class _Ellipsoid:
    centre_mm: NDArray[np.float64]
    radii_mm: NDArray[np.float64]
    turn: float = 0.0

    def distance_mm(self, xyz: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return about the distance to the surface, negative inside, for points of shape (3, *S)."""
        x, y, z = (xyz[axis] - self.centre_mm[axis] for axis in range(3))
        cosine, sine = np.cos(self.turn), np.sin(self.turn)
        turned = (cosine * x + sine * y, cosine * y - sine * x, z)
        radius = np.sqrt(sum((part / r) ** 2 for part, r in zip(turned, self.radii_mm, strict=True)))
        return (radius - 1) * self.radii_mm.min()


def _ventricles(rng: np.random.Generator, size: float, swelling: float) -> list[_Ellipsoid]:
    """Return the lateral ventricles: on each side a front horn, a body and a back horn."""
    parts = []
    for side in (-1.0, 1.0):
        wide = swelling * rng.uniform(0.9, 1.1)
        for centre, radii, turn in (
            ((9, 26, 4), (7.5, 17, 11), 0.35),
            ((10, 0, 9), (8, 22, 10), 0.0),
            ((16, -28, 4), (8, 19, 12), -0.40),
        ):
            parts.append(
                _Ellipsoid(
                    size * np.array([side * centre[0], centre[1], centre[2]], dtype=float),
                    size * np.array(radii, dtype=float) * np.array([wide, 1.0, wide]),
                    side * turn,
                )
            )
    return parts


def _lesion_distance(
    rng: np.random.Generator, scanner: HeadScanner, xyz: NDArray[np.float64], size: float, growth: float
) -> NDArray[np.float64]:
    """Return about the distance to the nearest lesion's ragged surface in mm."""
    nearest = np.full(xyz.shape[1:], np.inf)
    ragged = tuple(5.0 / mm for mm in scanner.spacing_mm)
    for _ in range(rng.integers(scanner.lesions[0], scanner.lesions[1] + 1)):
        # Beside the ventricles, not between them.
        direction = rng.standard_normal(3)
        direction[0] = np.copysign(max(abs(direction[0]), 0.6), direction[0])
        direction /= np.linalg.norm(direction)
        centre = direction * rng.uniform(0.42, 0.68) * size * np.array([64.0, 80.0, 48.0])
        radius = rng.uniform(*scanner.radius_mm) * growth
        radii = radius * rng.uniform(0.75, 1.3, 3)
        shape = _Ellipsoid(centre, radii, rng.uniform(0, np.pi)).distance_mm(xyz)
        nearest = np.minimum(nearest, shape + 0.16 * radius * _field(rng, scanner.shape, ragged))
    return nearest


def draw_head(
    scanner: HeadScanner, patient_seed: int, visit_seed: int, growth: float, has_lesion: bool
) -> tuple[NDArray[np.int16], NDArray[np.uint8], NDArray[np.float64]]:
    """Draw one scan of a patient on the scanner's grid, axes x, y, z (RAS).

    Args:
        scanner: Of the site.
        patient_seed: Fixes the anatomy and where the lesions are.
        visit_seed: Fixes noise, coil and position.
        growth: Factor on the lesions' radii; 1 at the first visit.
        has_lesion: Whether the patient has any.

    Returns:
        Image, mask with the values of ``CLASSES``, both of the scanner's shape, and the affine (4, 4).
    """
    rng, visit = np.random.default_rng(patient_seed), np.random.default_rng(visit_seed)
    spacing = np.array(scanner.spacing_mm)
    origin = -0.5 * (np.array(scanner.shape) - 1) * spacing + np.array([0.0, 0.0, 6.0])
    index = np.indices(scanner.shape, dtype=np.float64)
    xyz = index * spacing[:, None, None, None] + origin[:, None, None, None]
    moved = xyz + visit.uniform(-3, 3, 3)[:, None, None, None]

    size = rng.uniform(0.94, 1.05)
    coarse = tuple(18.0 / spacing)
    brain_radii = size * np.array([63.0, 79.0, 58.0]) * rng.uniform(0.97, 1.03, 3)
    brain = _Ellipsoid(np.zeros(3), brain_radii).distance_mm(moved) + 1.5 * _field(rng, scanner.shape, coarse)
    swelling = rng.uniform(0.85, 1.35)
    ventricle = np.minimum.reduce([part.distance_mm(moved) for part in _ventricles(rng, size, swelling)])
    folds = _field(rng, scanner.shape, tuple(4.5 / spacing))
    lesion = np.full(scanner.shape, np.inf)
    if has_lesion:
        lesion = np.maximum(_lesion_distance(rng, scanner, moved, size, growth), brain + 3.0)

    image = SCALP * _soft(brain - 13.0)
    image += (SKULL - image) * _soft(brain - 7.0)
    image += (FLUID - image) * _soft(brain - 1.5)
    image += (GREY - image) * _soft(brain)
    image += (WHITE - image) * _soft(brain + 9.0 + 4.0 * folds, 2.0)
    sulci = (brain > -10) & (np.abs(folds) < 0.22)
    cleft = (np.abs(moved[0]) < 2.6) & (brain > -24) & (brain < 1) & (moved[2] > -25)
    image[(sulci | cleft) & (brain < 0)] *= 0.45
    image += (FLUID - image) * _soft(ventricle)
    brightness = LESION * rng.uniform(0.92, 1.1)
    inside = _soft(lesion) * _soft(-ventricle)
    image += (brightness * (1 + 0.06 * folds) - image) * inside

    image = gaussian_filter(image, scanner.blur_mm / spacing)
    image *= np.exp(scanner.bias * _field(visit, scanner.shape, tuple(55.0 / spacing)) * 0.6)
    noise = scanner.noise * visit.standard_normal((2, *scanner.shape))
    image = scanner.gain * visit.uniform(0.9, 1.1) * np.hypot(image + noise[0], noise[1])

    mask = np.zeros(scanner.shape, dtype=np.uint8)
    mask[lesion < 0] = 2
    mask[ventricle < 0] = 1
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return np.clip(np.rint(image), 0, 32767).astype(np.int16), mask, affine
