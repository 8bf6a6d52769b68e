"""Outlines of the eight shapes in unit coordinates (radius 1, x right, y down, area centroid at the origin)."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

MAX_TILT = 8.0
RING_HOLE = 0.58

Points = tuple[tuple[float, float], ...]


def _circle(radius: float, steps: int = 72) -> np.ndarray:
    angles = np.arange(steps) * (2 * math.pi / steps)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star() -> np.ndarray:
    angles = np.arange(10) * (math.pi / 5) - math.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.16, 0.56)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _heart() -> np.ndarray:
    t = np.arange(72) * (2 * math.pi / 72)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], axis=1) / 15.5


def _crescent() -> np.ndarray:
    """Return a disc of radius 1.08 minus a disc of radius 0.86 moved to the right, so the horns point right."""
    outer, inner, shift = 1.08, 0.86, 0.52
    cut = (outer**2 - inner**2 + shift**2) / (2 * shift)
    horn = math.acos(cut / outer)
    back = math.acos((cut - shift) / inner)
    far = np.linspace(horn, 2 * math.pi - horn, 48)
    near = np.linspace(2 * math.pi - back, back, 40)
    first = outer * np.stack([np.cos(far), np.sin(far)], axis=1)
    second = inner * np.stack([np.cos(near), np.sin(near)], axis=1) + np.array([shift, 0.0])
    return np.concatenate([first, second[1:-1]])


def _cross() -> np.ndarray:
    arm, end = 0.33, 1.02
    corner = [(arm, -end), (arm, -arm), (end, -arm)]
    points = []
    for quarter in range(4):
        for x, y in corner:
            for _ in range(quarter):
                x, y = -y, x
            points.append((x, y))
    return np.array(points)


def _square() -> np.ndarray:
    return 0.87 * np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])


def _triangle() -> np.ndarray:
    return 1.17 * np.array([(0.0, -1.0), (math.sqrt(0.75), 0.5), (-math.sqrt(0.75), 0.5)])


def _centered(points: np.ndarray) -> np.ndarray:
    """Move a simple polygon (n, 2) so that its area centroid is the origin."""
    x, y = points.T
    x2, y2 = np.roll(points, -1, axis=0).T
    turn = x * y2 - x2 * y
    middle = np.array([((x + x2) * turn).sum(), ((y + y2) * turn).sum()]) / (3 * turn.sum())
    return points - middle


_MAKERS = {
    "circle": lambda: _circle(1.0),
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "ring": lambda: _circle(1.0),
    "cross": _cross,
    "crescent": _crescent,
}


@dataclass(frozen=True)
class Footprint:
    """How far a unit shape reaches at any tilt up to MAX_TILT, and its largest inner circle."""

    left: float
    right: float
    top: float
    bottom: float
    reach: float
    inner_x: float
    inner_y: float
    inner_radius: float


@cache
def outline(shape: str) -> np.ndarray:
    """Return the outer outline (n, 2) of the unit shape. ValueError when the shape is not one of the eight."""
    if shape not in _MAKERS:
        raise ValueError(f"shape {shape!r} is unknown: a shape is one of {', '.join(_MAKERS)}; nearest: circle")
    return _centered(_MAKERS[shape]())


def placed_outline(shape: str, x: float, y: float, radius: float, angle: float) -> np.ndarray:
    """Return the outline (n, 2) of a figure at (x, y) with the given radius, tilted by angle degrees."""
    turn = math.radians(angle)
    matrix = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    return radius * (outline(shape) @ matrix) + np.array([x, y])


def _distance_to_edges(point: np.ndarray, points: np.ndarray) -> float:
    start, end = points, np.roll(points, -1, axis=0)
    edge = end - start
    along = np.clip(((point - start) * edge).sum(1) / (edge**2).sum(1), 0.0, 1.0)
    return float(np.linalg.norm(start + along[:, None] * edge - point, axis=1).min())


@cache
def footprint(shape: str) -> Footprint:
    """Return the reach of the unit shape over all allowed tilts, and the circle in which another figure may lie."""
    low, high = np.full(2, np.inf), np.full(2, -np.inf)
    for angle in np.linspace(-MAX_TILT, MAX_TILT, 17):
        points = placed_outline(shape, 0.0, 0.0, 1.0, float(angle))
        low, high = np.minimum(low, points.min(0)), np.maximum(high, points.max(0))
    points = outline(shape)
    # All shapes are symmetric left-right or round, so the best inner circle of a container lies on the y axis.
    heights = np.linspace(-0.5, 0.5, 41)
    room = [_distance_to_edges(np.array([0.0, h]), points) for h in heights]
    best = int(np.argmax(room))
    inner = (0.0, float(heights[best]), room[best])
    if shape == "ring":
        inner = (0.0, 0.0, RING_HOLE)
    reach = float(np.linalg.norm(points, axis=1).max())
    return Footprint(-float(low[0]), float(high[0]), -float(low[1]), float(high[1]), reach, *inner)
