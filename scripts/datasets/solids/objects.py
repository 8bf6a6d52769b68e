"""Objects: one solid, one on another, or two beside each other; sampled at random.

Lengths are those of `solids.py`, z up; azimuths are degrees, counterclockwise from above, elevations degrees.
"""

from dataclasses import dataclass

import numpy as np

from scripts.datasets.shapes.layout import between
from scripts.datasets.shapes.palette import BACKGROUND_RGB, BACKGROUNDS, COLORS, FIGURE_RGB, clear_pair, distance
from scripts.datasets.shapes.scenes import held_out_by_hash, pick

from .solids import MARKS, SOLIDS

RELATIONS = ("on", "beside")
FLAT_TOPS = ("cube", "cylinder")
SCALE = (0.9, 1.1)
ELEVATIONS: dict[str, tuple[float, float]] = {"side": (5.0, 8.0), "": (14.0, 20.0), "above": (26.0, 30.0)}
DARKEST, BRIGHTEST = 0.54, 1.0  # light on the far side and on the near side of a solid
CLEAR = 24.0  # least CIELAB distance between a solid in any light and the background


@dataclass(frozen=True)
class Part:
    """One solid: color, mark on its front ("" for none), the mark's color; where it stands and how large it is."""

    solid: str
    color: str
    mark: str = ""
    mark_color: str = ""
    y: float = 0.0
    z: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class SolidObject:
    """One or two parts, the relation of the first to the second, and the camera's height and background.

    Attributes:
        parts: with relation "beside" the first stands left of the second as seen from azimuth 0.
        relation: "", "on" or "beside".
        view: "side", "" or "above", a range of elevations.
        elevation: of the camera, degrees.
        background: color word.
    """

    parts: tuple[Part, ...]
    relation: str
    view: str
    elevation: float
    background: str

    @property
    def height(self) -> float:
        return max(part.z + part.scale * SOLIDS[part.solid].height for part in self.parts)

    @property
    def kinds(self) -> tuple[tuple[str, str, str], ...]:
        return tuple((part.color, part.solid, part.mark) for part in self.parts)


HELD_OUT_SOLIDS: frozenset[tuple[str, str, str]] = frozenset(
    (color, solid, mark)
    for color in COLORS
    for solid in SOLIDS
    for mark in (*MARKS, "")
    if held_out_by_hash(f"solid world: {color} {solid} with {mark or 'nothing'}")
)


def is_held_out_object(obj: SolidObject) -> bool:
    """Return whether a part has a color, form and mark that are never together in training."""
    return any(kind in HELD_OUT_SOLIDS for kind in obj.kinds)


def _tones(rgb: tuple[int, int, int], *lights: float) -> list[tuple[float, ...]]:
    return [tuple(light * value for value in rgb) for light in lights]


_CLEAR_ON = {
    (color, ground): min(
        distance(tone, shadow)
        for tone in _tones(rgb, DARKEST, 0.75, BRIGHTEST)
        for shadow in _tones(BACKGROUND_RGB[ground], 0.78, 1.0)
    )
    >= CLEAR
    for color, rgb in FIGURE_RGB.items()
    for ground in BACKGROUNDS
}


def clear_in_any_light(color: str, background: str) -> bool:
    """Return whether lit and dark side of a solid stand out from the background and from the shadow on it."""
    return _CLEAR_ON[color, background]


def arrange(parts: tuple[Part, ...], relation: str, scale: float) -> tuple[Part, ...]:
    """Place parts: alone, the first on the second, or the first beside the second."""
    if relation == "on":
        upper, lower = parts
        top = 0.8 * scale * SOLIDS[lower.solid].height
        return _placed(upper, 0.0, top, 0.6 * scale), _placed(lower, 0.0, 0.0, 0.8 * scale)
    if relation == "beside":
        return _placed(parts[0], -0.64 * scale, 0.0, 0.6 * scale), _placed(parts[1], 0.64 * scale, 0.0, 0.6 * scale)
    return (_placed(parts[0], 0.0, 0.0, scale),)


def _placed(part: Part, y: float, z: float, scale: float) -> Part:
    return Part(part.solid, part.color, part.mark, part.mark_color, y, z, scale)


def _sample_parts(rng: np.random.Generator, relation: str, background: str) -> tuple[Part, ...] | None:
    """Sample parts whose colors can be told apart, or None."""
    count = 2 if relation else 1
    solids = [pick(rng, tuple(SOLIDS)) for _ in range(count)]
    if relation == "on":
        solids[1] = pick(rng, FLAT_TOPS)
    colors = [pick(rng, COLORS) for _ in range(count)]
    mark_color, mark = pick(rng, COLORS), pick(rng, MARKS)
    bearer = int(rng.random() * count)
    if not all(clear_in_any_light(color, background) for color in (*colors, mark_color)):
        return None
    if not all(clear_pair(mark_color, color) for color in colors) or (count == 2 and not clear_pair(*colors)):
        return None
    return tuple(
        Part(solid, color, mark, mark_color) if index == bearer else Part(solid, color)
        for index, (solid, color) in enumerate(zip(solids, colors, strict=True))
    )


def sample_object(rng: np.random.Generator, held_out: bool | None = False) -> SolidObject:
    """Sample an object from rng.

    held_out False (training): no held-out combination occurs; True (evaluation): at least one does; None: either.
    """
    roll = rng.random()
    relation = "" if roll < 0.6 else "on" if roll < 0.8 else "beside"
    while True:
        background = "white" if rng.random() < 0.3 else pick(rng, BACKGROUNDS)
        parts = _sample_parts(rng, relation, background)
        if parts is None:
            continue
        height = rng.random()
        view = "side" if height < 0.2 else "above" if height > 0.8 else ""
        placed = arrange(parts, relation, between(rng, *SCALE))
        obj = SolidObject(placed, relation, view, between(rng, *ELEVATIONS[view]), background)
        if held_out is None or is_held_out_object(obj) == held_out:
            return obj
