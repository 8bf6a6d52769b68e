"""The seven solids as signed distances, in their own coordinates: they stand on z = 0 around the z axis, front at +x.

A solid of scale 1 fits a picture. x, y, z are float32 arrays of one shape (N,); distances are never too large, so that
a ray may always go on by them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Distance = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
STRIPE = 0.2  # half width
MARKS = ("stripe", "dot")


@dataclass(frozen=True)
class Solid:
    """A solid as the renderer needs it.

    Attributes:
        distance: signed distance (N,) of points.
        width: largest distance from the z axis.
        height: of its highest point.
        front: center of its dot, on the surface at azimuth 0.
        dot: radius of its dot.
    """

    distance: Distance
    width: float
    height: float
    front: tuple[float, float, float]
    dot: float = 0.36


def _ball(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y + (z - 0.9) ** 2) - 0.9


def _cube(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.maximum(np.maximum(abs(x), abs(y)), abs(z - 0.72)) - 0.72


def _tube(x: np.ndarray, y: np.ndarray, z: np.ndarray, radius: float, low: float, high: float) -> np.ndarray:
    """Return the distance to a cylinder between two heights."""
    return np.maximum(np.sqrt(x * x + y * y) - radius, abs(z - (low + high) / 2) - (high - low) / 2)


def _cylinder(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return _tube(x, y, z, 0.62, 0.0, 1.6)


def _tapered(across: np.ndarray, z: np.ndarray, width: float, height: float) -> np.ndarray:
    """Return the distance to a cone or pyramid; `across` is that from the axis, `width` that of the rim below."""
    slant = np.hypot(width, height)
    return np.maximum((across * height + z * width - width * height) / slant, -z)


def _cone(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return _tapered(np.sqrt(x * x + y * y), z, 0.85, 1.75)


def _pyramid(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return _tapered(np.maximum(abs(x), abs(y)), z, 0.82, 1.3)


def _torus(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    ring = np.sqrt(x * x + y * y) - 0.72
    return np.sqrt(ring * ring + (z - 0.33) ** 2) - 0.33


def _mug(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return the distance to an open cylinder with a handle at azimuth 90: half a ring, upright."""
    wall = np.maximum(_tube(x, y, z, 0.64, 0.0, 1.4), -_tube(x, y, z, 0.52, 0.14, 2.0))
    ring = np.sqrt((y - 0.6) ** 2 + (z - 0.72) ** 2) - 0.4
    handle = np.maximum(np.sqrt(ring * ring + x * x) - 0.12, 0.58 - y)
    return np.minimum(wall, handle)


SOLIDS: dict[str, Solid] = {
    "cube": Solid(_cube, 1.02, 1.44, (0.72, 0.0, 0.72)),
    "ball": Solid(_ball, 0.9, 1.8, (0.88, 0.0, 1.05)),
    "cone": Solid(_cone, 0.85, 1.75, (0.54, 0.0, 0.64), 0.32),
    "cylinder": Solid(_cylinder, 0.62, 1.6, (0.62, 0.0, 0.9)),
    "torus": Solid(_torus, 1.05, 0.66, (1.0, 0.0, 0.46)),
    "pyramid": Solid(_pyramid, 1.16, 1.3, (0.53, 0.0, 0.46), 0.32),
    "mug": Solid(_mug, 1.12, 1.4, (0.64, 0.0, 0.75)),
}


def marked(solid: str, mark: str, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return which points (N,) of a solid's surface carry its mark: a stripe over its front, or a dot on it."""
    if mark == "stripe":
        return (abs(y) < STRIPE) & (x > 0)
    if mark == "dot":
        front, reach = SOLIDS[solid].front, SOLIDS[solid].dot
        return (x - front[0]) ** 2 + (y - front[1]) ** 2 + (z - front[2]) ** 2 < reach**2
    return np.zeros(x.shape, dtype=bool)
