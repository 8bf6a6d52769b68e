"""Pictures of solids on a turntable: rays walk along signed distances until they meet a surface.

The camera goes round, the light stays: the lit side of an object turns with it, so that shading and shadow show the
azimuth of views without the mark.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from einops import reduce

from scripts.datasets.shapes.palette import BACKGROUND_RGB, FIGURE_RGB

from .objects import SolidObject
from .solids import SOLIDS, marked

SAMPLES = 4  # rays per side of a pixel on an edge
EDGE = 10.0  # bytes between neighbors; more than this is an edge
DISTANCE = 6.5  # from the camera to the middle of the object
HALF_FIELD = 1.5 / DISTANCE  # tangent of half the angle of view
STEPS = 48
NEAR = 0.004  # a ray this near a surface has met it
LIGHT = tuple(
    float(v) for v in (np.cos(0.85) * np.cos(0.42), np.cos(0.85) * np.sin(0.42), np.sin(0.85))
)  # at azimuth 24, elevation 49
SHADOW = 0.24
SHADOW_REACH = 2.0  # from the middle of the ground


@dataclass(frozen=True)
class Surface:
    """What rays meet, (T, N) each.

    Attributes:
        color: index of what is met: -1 the ground, 2 i part i, 2 i + 1 its mark.
        light: light on it, about 0.5 to 1.05; on the ground 1 less the shadow.
        gloss: 0 to 1, how directly it faces the light.
    """

    color: np.ndarray
    light: np.ndarray
    gloss: np.ndarray


def _distances(obj: SolidObject, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> list[np.ndarray]:
    """Return the distance (N,) of points to each part."""
    return [
        SOLIDS[part.solid].distance(x / part.scale, (y - part.y) / part.scale, (z - part.z) / part.scale) * part.scale
        for part in obj.parts
    ]


def _distance(obj: SolidObject, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    found = _distances(obj, x, y, z)
    return found[0] if len(found) == 1 else np.minimum(*found)


def _rays(obj: SolidObject, turns: np.ndarray, across: np.ndarray, down: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return starts and directions (3, T * N) of the rays through points of the picture (N,) from T azimuths."""
    turn, rise = np.radians(turns), np.radians(obj.elevation)
    level = np.zeros_like(turn)
    out = np.stack([np.cos(rise) * np.cos(turn), np.cos(rise) * np.sin(turn), level + np.sin(rise)])
    right = np.stack([-np.sin(turn), np.cos(turn), level])
    up = np.stack([-np.sin(rise) * np.cos(turn), -np.sin(rise) * np.sin(turn), level + np.cos(rise)])
    camera = (out * DISTANCE + np.array([[0.0], [0.0], [obj.height / 2]])).astype(np.float32)
    out, right, up = (axis.astype(np.float32)[:, :, None] for axis in (out, right * HALF_FIELD, up * HALF_FIELD))
    rays = (right * across - up * down - out).reshape(3, -1)
    return camera.repeat(across.size, axis=1), rays / np.sqrt((rays**2).sum(0))


def _box(obj: SolidObject) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and highest corner (3,) of what the object fills."""
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    for part in obj.parts:
        wide, tall = SOLIDS[part.solid].width * part.scale, SOLIDS[part.solid].height * part.scale
        low = np.minimum(low, (-wide, part.y - wide, part.z))
        high = np.maximum(high, (wide, part.y + wide, part.z + tall))
    return (low - 0.01).astype(np.float32), (high + 0.01).astype(np.float32)


def _march(obj: SolidObject, camera: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the rays that meet the object, and how far away."""
    with np.errstate(divide="ignore"):
        walls = [(edge[:, None] - camera) / rays for edge in _box(obj)]
    enter, leave = np.minimum(*walls).max(0), np.maximum(*walls).min(0)
    alive = np.flatnonzero(enter < leave)
    far, end, start, ray = enter[alive], leave[alive], camera[:, alive], rays[:, alive]
    met, where = [], []
    for step in range(STEPS):
        gap = _distance(obj, *(start + ray * far))
        far = far + gap
        if step % 4 == 3 or step == STEPS - 1:
            hit = gap < NEAR
            met.append(alive[hit])
            where.append(far[hit])
            keep = ~hit & (far < end)
            if not keep.any():
                break
            alive, far, end, start, ray = alive[keep], far[keep], end[keep], start[:, keep], ray[:, keep]
    return np.concatenate(met), np.concatenate(where)


def _shade(obj: SolidObject, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return color index, light and gloss (N,) of points (3, N) on the object."""
    x, y, z = points
    gaps = np.stack(_distances(obj, x, y, z))
    which = gaps.argmin(0)
    here, step = gaps.min(0), np.float32(0.003)
    normal = np.stack(
        [_distance(obj, *(points + step * np.eye(3, dtype=np.float32)[a][:, None])) - here for a in range(3)]
    )
    normal /= np.maximum(np.sqrt((normal**2).sum(0)), 1e-6)
    facing = np.tensordot(np.array(LIGHT, dtype=np.float32), normal, 1)
    light = 0.48 + 0.26 * (1 + facing) + 0.1 * np.maximum(normal[2], 0)
    color = 2 * which
    for index, part in enumerate(obj.parts):
        own = (x / part.scale, (y - part.y) / part.scale, (z - part.z) / part.scale)
        color[(which == index) & marked(part.solid, part.mark, *own)] += 1
    return color, light, np.maximum(facing, 0) ** 2


def _shadow(obj: SolidObject, points: np.ndarray) -> np.ndarray:
    """Return the soft shadow (N,), 0 to 1, of points (3, N) on the ground: how nearly the light is blocked."""
    room = np.ones(points.shape[1], dtype=np.float32)
    for way in (0.15, 0.3, 0.5, 0.75, 1.0):
        x, y, z = points + np.array(LIGHT, dtype=np.float32)[:, None] * np.float32(way)
        room = np.minimum(room, _distance(obj, x, y, z) / (0.15 + 0.35 * way) + 0.5 * way)
    return 1 - np.clip(room, 0, 1)


def trace(
    obj: SolidObject, turns: Sequence[float], across: np.ndarray, down: np.ndarray, shadow: bool = True
) -> Surface:
    """Return what the rays through points of views meet.

    Args:
        obj: the object.
        turns: azimuths (T,) of the camera, degrees.
        across, down: points (N,) of the picture, float32, -1 to 1 from left to right and from top to bottom.
        shadow: whether rays go on to the ground.
    """
    camera, rays = _rays(obj, np.asarray(turns), across, down)
    count = rays.shape[1]
    color = np.full(count, -1)
    light, gloss = np.ones(count, dtype=np.float32), np.zeros(count, dtype=np.float32)
    met, far = _march(obj, camera, rays)
    color[met], light[met], gloss[met] = _shade(obj, camera[:, met] + rays[:, met] * far)
    if shadow:
        low = np.flatnonzero((color < 0) & (rays[2] < -1e-3))
        ground = camera[:, low] - rays[:, low] * (camera[2, low] / rays[2, low])
        near = (ground[0] ** 2 + ground[1] ** 2) < SHADOW_REACH**2
        light[low[near]] = 1 - SHADOW * _shadow(obj, ground[:, near])
    return Surface(*(values.reshape(len(turns), -1) for values in (color, light, gloss)))


def pixel_centers(size: int, samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return (across, down), (N,) each, of samples x samples points in every pixel, rows from the top."""
    axis = (((np.arange(size * samples) + 0.5) / (size * samples)) * 2 - 1).astype(np.float32)
    across, down = np.broadcast_arrays(axis[None, :], axis[:, None])
    return across.ravel(), down.ravel()


def _paint(obj: SolidObject, surface: Surface) -> np.ndarray:
    """Return colors (T, N, 3), float32 in 0..255."""
    names = [name for part in obj.parts for name in (part.color, part.mark_color or part.color)]
    tones = np.array([*(FIGURE_RGB[name] for name in names), BACKGROUND_RGB[obj.background]], dtype=np.float32)
    return np.clip(tones[surface.color] * surface.light[..., None] + 14 * surface.gloss[..., None], 0, 255)


def _edges(picture: np.ndarray) -> np.ndarray:
    """Return the indices of the pixels of (H, W, 3) that differ from a neighbor: one ray is not enough for them."""
    edge = np.zeros(picture.shape[:2], dtype=bool)
    down = (abs(picture[1:] - picture[:-1]) > EDGE).any(-1)
    across = (abs(picture[:, 1:] - picture[:, :-1]) > EDGE).any(-1)
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    return np.flatnonzero(edge)


def render_view(obj: SolidObject, azimuth: float, size: int = 128) -> np.ndarray:
    """Render uint8 (size, size, 3), sRGB, from an azimuth in degrees. Deterministic."""
    across, down = pixel_centers(size)
    picture = _paint(obj, trace(obj, [azimuth], across, down))[0]
    edge = _edges(picture.reshape(size, size, 3))
    finer = [offset[:, None] / size for offset in pixel_centers(1, SAMPLES)]
    rays = (points[edge] + offset for points, offset in zip((across, down), finer, strict=True))
    fine = _paint(obj, trace(obj, [azimuth], *(points.ravel() for points in rays)))[0]
    picture[edge] = reduce(fine, "(rays pixels) c -> pixels c", "mean", rays=SAMPLES**2)
    return (picture.reshape(size, size, 3) + 0.5).astype(np.uint8)


def azimuths(count: int) -> Sequence[float]:
    """Return the azimuth of each of `count` views: view i is at i * 360 / count degrees."""
    return [index * 360 / count for index in range(count)]


def render_views(obj: SolidObject, count: int = 8, size: int = 128) -> np.ndarray:
    """Render uint8 (count, size, size, 3), sRGB: the camera goes once round the object, view 0 faces its mark.

    Raises:
        ValueError: count is below 1 or size below 16 pixels.
    """
    if count < 1:
        raise ValueError(f"count {count} is too small: an object has at least 1 view; nearest: 1")
    if size < 16:
        raise ValueError(f"size {size} is too small: a view has at least 16 pixels a side; nearest: 16")
    return np.stack([render_view(obj, azimuth, size) for azimuth in azimuths(count)])
