"""Name the shape of a silhouette by comparing it with templates of the verifier's own.

Every silhouette is moved to its centroid and scaled to unit area, so position and size do not matter.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "crescent")
GRID = 44  # samples per side of the normalized silhouette
EXTENT = 1.3  # half side of the normalized silhouette, in units of sqrt(area)
_FINE = 220  # samples per side of the silhouettes that the templates are made from
# Least score that a silhouette needs to be called a shape at all; thin shapes overlap less when a little off.
_LEAST = {"ring": 0.45, "crescent": 0.5}
_LEAST_OTHERS = 0.65
_BLUNT = 0.13  # radii of blur that round off the corners of every second template
_TILTS = (-24, -18, -12, -6, 0, 6, 12, 18, 24)  # degrees


@dataclass(frozen=True)
class ShapeGuess:
    """Best shape of a silhouette.

    Attributes:
        name: one of `SHAPES`, or "blob" when the silhouette is like none of them.
        score: intersection over union with the best template, 0..1.
        runner_up: second best shape.
        margin: score minus the runner-up's score.
    """

    name: str
    score: float
    runner_up: str
    margin: float


def _polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Test points (H, W) against a closed polygon (K, 2) by the even-odd rule."""
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if ay == by:
            continue
        crosses = ((ay > y) != (by > y)) & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
        inside ^= crosses
    return inside


def _star(x: np.ndarray, y: np.ndarray, waist: float) -> np.ndarray:
    turns = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2 == 0, 1.0, waist)
    return _polygon(x, y, np.stack([reach * np.sin(turns), -reach * np.cos(turns)], axis=1))


def _heart_curve(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    u, v = x * 1.25, -y * 1.25
    return (u * u + v * v - 1) ** 3 - u * u * v**3 < 0


def _heart_lobes(x: np.ndarray, y: np.ndarray, lobe: float) -> np.ndarray:
    """Return two round lobes over a point: the heart as children cut it from paper."""
    lobes = (np.abs(x) - lobe) ** 2 + (y + 0.35) ** 2 < lobe * lobe
    depth = np.clip((y + 0.2) / 1.1, 0, 1)
    return lobes | ((y > -0.35) & (y < 0.9) & (np.abs(x) < 2 * lobe * (1 - depth) * 0.99))


def _crescent(x: np.ndarray, y: np.ndarray, bite: float, shift: float, side: int) -> np.ndarray:
    return (x * x + y * y < 1) & ((x - side * shift) ** 2 + y * y > bite * bite)


def _silhouettes(x: np.ndarray, y: np.ndarray) -> list[tuple[str, bool, np.ndarray]]:
    """Return all template silhouettes (name, whether tilting changes it, mask (H, W)) within the unit circle."""
    radius2 = x * x + y * y
    found = [("circle", False, radius2 < 1)]
    found.append(("square", True, np.maximum(abs(x), abs(y)) < 0.9))
    rounded = np.hypot(np.maximum(abs(x) - 0.65, 0), np.maximum(abs(y) - 0.65, 0)) < 0.25
    found.append(("square", True, rounded))
    for height in (0.8, 1.0, 1.15):
        corners = np.array([[0, -height], [0.9, 0.6], [-0.9, 0.6]])
        found.append(("triangle", True, _polygon(x, y, corners)))
    found += [("star", True, _star(x, y, waist)) for waist in (0.36, 0.43, 0.5)]
    found.append(("heart", True, _heart_curve(x, y)))
    found += [("heart", True, _heart_lobes(x, y, lobe)) for lobe in (0.42, 0.48)]
    found += [
        ("ring", False, (radius2 < 1) & (radius2 > hole * hole)) for hole in (0.28, 0.35, 0.45, 0.55, 0.65, 0.75)
    ]
    for arm in (0.24, 0.32, 0.4):
        plus = (np.minimum(abs(x), abs(y)) < arm) & (np.maximum(abs(x), abs(y)) < 0.95)
        found.append(("cross", True, plus))
    for bite, shift in ((0.8, 0.35), (0.85, 0.5), (0.75, 0.5), (0.95, 0.6)):
        found += [("crescent", True, _crescent(x, y, bite, shift, side)) for side in (-1, 1)]
    return found


def normalize(mask: np.ndarray) -> np.ndarray:
    """Move a silhouette to its centroid and scale it to unit area.

    Args:
        mask: coverage (H, W), bool or float in 0..1, with some coverage.

    Returns:
        Coverage (GRID, GRID) float32, spanning EXTENT roots of the area to each side of the centroid.

    Raises:
        ValueError: the mask is empty.
    """
    mask = mask.astype(np.float32)
    area = float(mask.sum())
    if area <= 0:
        raise ValueError("mask has an area of 0 pixels; a silhouette needs at least 1.")
    rows, columns = mask.sum(axis=1), mask.sum(axis=0)
    center_y = float(rows @ np.arange(rows.size)) / area
    center_x = float(columns @ np.arange(columns.size)) / area
    step = 2 * EXTENT * area**0.5 / GRID
    if step > 1.5:  # many pixels per sample: average before sampling, or thin parts flicker
        mask = ndimage.uniform_filter(mask, size=max(int(round(step)), 1), mode="constant")
    offset = (GRID - 1) / 2 * step
    start = (center_y - offset, center_x - offset)
    return ndimage.affine_transform(mask, (step, step), start, (GRID, GRID), order=1, mode="constant", prefilter=False)


@lru_cache(maxsize=1)
def _templates() -> tuple[np.ndarray, tuple[str, ...]]:
    """Return template silhouettes (T, GRID * GRID) and their names."""
    axis = (np.arange(_FINE) + 0.5) / _FINE * 3 - 1.5
    stack, names = [], []
    base_x, base_y = np.meshgrid(axis, axis)
    unit = _FINE / 3  # samples per radius
    for tilt in _TILTS:
        turn = np.deg2rad(tilt)
        x = base_x * np.cos(turn) + base_y * np.sin(turn)
        y = base_y * np.cos(turn) - base_x * np.sin(turn)
        for name, tilts, mask in _silhouettes(x, y):
            if tilt and not tilts:
                continue
            blunt = ndimage.gaussian_filter(mask.astype(np.float32), _BLUNT * unit) > 0.5
            stack += [normalize(mask).ravel(), normalize(blunt).ravel()]
            names += [name, name]
    return np.stack(stack), tuple(names)


def classify_shape(mask: np.ndarray) -> ShapeGuess:
    """Name the shape of a silhouette.

    Args:
        mask: coverage (H, W), bool or float in 0..1.

    Returns:
        The best shape, with the score and the distance to the second best shape.

    Raises:
        ValueError: the mask is empty.
    """
    stack, names = _templates()
    sample = normalize(mask).ravel()
    overlap = np.minimum(stack, sample).sum(axis=1)
    union = stack.sum(axis=1) + sample.sum() - overlap
    scores = overlap / union
    best_of: dict[str, int] = {}
    for index in np.argsort(-scores, kind="stable"):
        best_of.setdefault(names[index], int(index))
    (name, first), (runner_up, second) = list(best_of.items())[:2]
    margin = float(scores[first] - scores[second])
    if scores[first] < _LEAST.get(name, _LEAST_OTHERS):
        name = "blob"
    return ShapeGuess(name, float(scores[first]), runner_up, margin)
