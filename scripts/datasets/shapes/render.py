"""Pictures of scenes: anti-aliased figures with soft light and a faint shadow."""

import math
from functools import lru_cache

import numpy as np
from einops import reduce
from PIL import Image, ImageDraw, ImageFilter

from .palette import BACKGROUND_RGB, FIGURE_RGB, second_tone
from .scenes import Group, Scene
from .shapes import RING_HOLE, placed_outline

SUPERSAMPLE = 4
SHADOW = 0.26
CELLS = 8


@lru_cache(maxsize=128)
def _pattern_mask(pattern: str, size: int) -> np.ndarray:
    """Return the share (size, size) of the second tone, float32 in 0..1."""
    fine = size * SUPERSAMPLE
    axis = (np.arange(fine) + 0.5) / fine * CELLS
    x, y = axis[None, :], axis[:, None]
    if pattern == "striped":
        mask = ((x + y) % 2 < 1).astype(np.float32)
    elif pattern == "checkered":
        mask = ((np.floor(x) + np.floor(y)) % 2).astype(np.float32) * np.ones_like(x + y)
    elif pattern == "dotted":
        shift = 0.5 * (np.floor(y) % 2)
        mask = ((((x + shift) % 1 - 0.5) ** 2 + (y % 1 - 0.5) ** 2) < 0.27**2).astype(np.float32)
    elif pattern == "lined":  # in no training scene; scripts/teach_word.py teaches it
        mask = (y % 1 < 0.5).astype(np.float32) * np.ones_like(x + y)
    else:
        mask = np.zeros((fine, fine), dtype=np.float32)
    return reduce(mask, "(h y) (w x) -> h w", "mean", y=SUPERSAMPLE, x=SUPERSAMPLE).astype(np.float32)


@lru_cache(maxsize=256)
def _ground(color: str, pattern: str, size: int) -> np.ndarray:
    """Return the background (size, size, 3), float32 in 0..255, with a light fall-off towards the corners."""
    mask = _pattern_mask(pattern, size)[..., None]
    base = np.array(BACKGROUND_RGB[color], dtype=np.float32)
    other = np.array(second_tone(color), dtype=np.float32)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    corner = axis[None, :] ** 2 + axis[:, None] ** 2
    light = 1.02 - 0.13 * corner - 0.02 * (axis[None, :] + axis[:, None])
    return (base + (other - base) * mask) * light[..., None].astype(np.float32)


def _mask(points: np.ndarray, hole: np.ndarray | None, box: tuple[int, int, int, int]) -> Image.Image:
    """Return the coverage (mode "L") of a polygon less its hole, inside box (left, top, right, bottom in pixels)."""
    left, top, right, bottom = box
    fine = Image.new("L", ((right - left) * SUPERSAMPLE, (bottom - top) * SUPERSAMPLE), 0)
    pen = ImageDraw.Draw(fine)
    # Pillow puts pixel centers on whole numbers, hence the half pixel.
    origin = np.array([left, top], dtype=np.float64)
    pen.polygon(((points - origin) * SUPERSAMPLE - 0.5).ravel().tolist(), fill=255)
    if hole is not None:
        pen.polygon(((hole - origin) * SUPERSAMPLE - 0.5).ravel().tolist(), fill=0)
    return fine.reduce(SUPERSAMPLE)


def figure_box_and_mask(
    shape: str, x: float, y: float, radius: float, angle: float, size: int, pad: int = 0
) -> tuple[tuple[int, int, int, int], Image.Image]:
    """Return the box (left, top, right, bottom) of a figure in pixels, and its coverage there (PIL "L").

    x, y and radius are fractions of the side, angle is in degrees, pad is extra room in pixels.
    """
    points = placed_outline(shape, x, y, radius, angle) * size
    hole = placed_outline("circle", x, y, radius * RING_HOLE, 0.0) * size if shape == "ring" else None
    low, high = np.floor(points.min(0)).astype(int) - pad, np.ceil(points.max(0)).astype(int) + pad
    left, top = max(0, int(low[0])), max(0, int(low[1]))
    right, bottom = min(size, int(high[0])), min(size, int(high[1]))
    return (left, top, right, bottom), _mask(points, hole, (left, top, right, bottom))


def _render_group(canvas: np.ndarray, group: Group, size: int) -> None:
    """Render the figures of the group onto canvas (size, size, 3), float32 in 0..255, in place."""
    color = np.array(FIGURE_RGB[group.color], dtype=np.float32)
    blur = 0.012 * size
    drop = max(1, round(0.012 * size))
    pad = math.ceil(3 * blur) + drop
    for figure in group.placements:
        box, image = figure_box_and_mask(group.shape, figure.x, figure.y, figure.radius, figure.angle, size, pad)
        left, top, right, bottom = box
        soft = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)), dtype=np.float32) * (1 / 255)
        mask = np.asarray(image, dtype=np.float32)[..., None] * (1 / 255)
        patch = canvas[top:bottom, left:right]
        shadow = np.zeros_like(soft)
        shadow[drop:, drop:] = soft[:-drop, :-drop]
        patch *= (1 - SHADOW * shadow)[..., None]
        across = (np.arange(left, right, dtype=np.float32) + 0.5) / size - figure.x
        down = (np.arange(top, bottom, dtype=np.float32) + 0.5) / size - figure.y
        slope = -(across[None, :] * 0.6 + down[:, None] * 0.8) / figure.radius
        light = np.clip(slope, -1.2, 1.2)
        rim = 1 - np.clip(soft * 2 - 1, 0, 1)
        factor = 1 + 0.07 * light - 0.10 * rim
        lit = color * factor[..., None] + (9 * np.clip(light, 0, None))[..., None]
        patch += (lit - patch) * mask


def render(scene: Scene, size: int = 128) -> np.ndarray:
    """Render the scene as uint8 (size, size, 3), sRGB. Deterministic. ValueError when size < 16 pixels."""
    if size < 16:
        raise ValueError(f"size {size} is too small: a picture has at least 16 pixels a side; nearest: 16")
    canvas = _ground(scene.background, scene.pattern, size).copy()
    # What lies inside another figure is listed first but rendered last.
    inner = [subject for subject, relation, _ in scene.relations if relation == "inside"]
    order = sorted(range(len(scene.groups)), key=lambda index: index in inner)
    for index in order:
        _render_group(canvas, scene.groups[index], size)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
