"""Clips of shapes: one or two figures that move, rotate, grow, shrink, bounce or change color.

Lengths are fractions of the picture side, x right, y down; time runs from 0 to 1.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from .layout import BORDER, GAP, RADII, Placement, between
from .palette import BACKGROUNDS, COLORS, PATTERNS, clear_on, clear_pair
from .render import render
from .scenes import SHAPES, Group, Scene, held_out_by_hash, pick
from .shapes import MAX_TILT, footprint

FRAMES = 17
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = (*DIRECTIONS, "rotates", "grows", "shrinks", "bounces", "changes")
TURNING = tuple(shape for shape in SHAPES if shape not in ("circle", "ring"))
SMALL_RADIUS, LARGE_RADIUS = (0.09, 0.12), (0.24, 0.29)  # before growing, after it
TRAVEL = (0.34, 0.42)  # way of a figure that moves
HOP = (0.19, 0.24)  # height of a bounce
TURN = (84.0, 96.0)  # degrees of a rotation, clockwise: in a quarter of the clip less than half a star's symmetry
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up", "grows": "shrinks", "shrinks": "grows"}


@dataclass(frozen=True)
class Actor:
    """A figure and what it does between its first and its last state ("bounces": between floor and top)."""

    shape: str
    color: str
    size: str
    motion: str
    start: Placement
    end: Placement
    new_color: str = ""

    def at(self, time: float) -> Placement:
        """Return where it is at a time."""
        share = math.sin(math.pi * time) if self.motion == "bounces" else time
        parts = [
            first + (last - first) * share
            for first, last in zip(vars(self.start).values(), vars(self.end).values(), strict=True)
        ]
        return Placement(*parts)

    def reversed(self) -> "Actor":
        """Return the figure when time runs backwards; a bounce is the same both ways."""
        colors = (self.new_color, self.color) if self.motion == "changes" else (self.color, self.new_color)
        states = (self.start, self.end) if self.motion == "bounces" else (self.end, self.start)
        motion = OPPOSITE.get(self.motion, self.motion)
        return Actor(self.shape, colors[0], self.size, motion, *states, colors[1])


@dataclass(frozen=True)
class Clip:
    """One or two figures on a background. Two figures: one stays, or they cross in opposite directions."""

    actors: tuple[Actor, ...]
    background: str
    pattern: str

    def reversed(self) -> "Clip | None":
        """Return the clip from its end to its start: what moved left moves right, what grew shrinks.

        None where a figure rotates: figures rotate clockwise.
        """
        if any(actor.motion == "rotates" for actor in self.actors):
            return None
        return replace(self, actors=tuple(actor.reversed() for actor in self.actors))

    @property
    def crossing(self) -> bool:
        return len(self.actors) == 2 and self.actors[1].motion in DIRECTIONS

    def scene(self, time: float) -> Scene:
        """Return the figures as they are at a time, in their first colors."""
        groups = tuple(Group(actor.shape, actor.color, actor.size, (actor.at(time),)) for actor in self.actors)
        return Scene(groups, (), self.background, self.pattern)

    def scene_with_colors(self, time: float) -> Scene:
        """Return the figures at a time, one that changes in its new color from the middle on."""
        scene = self.scene(time)
        if self.actors[0].motion != "changes" or time < 0.5:
            return scene
        return replace(scene, groups=(replace(scene.groups[0], color=self.actors[0].new_color), *scene.groups[1:]))

    def picture(self, time: float, size: int) -> np.ndarray:
        """Render uint8 (size, size, 3) at a time; a color changes gradually in the middle third."""
        scene = self.scene(time)
        picture = render(scene, size)
        share = min(1.0, max(0.0, 3 * time - 1))
        if share == 0 or self.actors[0].motion != "changes":
            return picture
        changed = replace(scene.groups[0], color=self.actors[0].new_color)
        later = render(replace(scene, groups=(changed, *scene.groups[1:])), size)
        return (picture + (later.astype(np.float32) - picture) * share + 0.5).astype(np.uint8)


def render_clip(clip: Clip, size: int = 128, frames: int = FRAMES) -> np.ndarray:
    """Render uint8 (frames, size, size, 3), from time 0 to time 1. Deterministic."""
    return np.stack([clip.picture(time, size) for time in np.linspace(0, 1, frames)])


HELD_OUT_MOTIONS: frozenset[tuple[str, str, str]] = frozenset(
    (color, shape, motion)
    for color in COLORS
    for shape in SHAPES
    for motion in MOTIONS
    if (motion != "rotates" or shape in TURNING) and held_out_by_hash(f"moving world: {color} {shape} {motion}")
)


def is_held_out_clip(clip: Clip) -> bool:
    """Return whether a figure does what figures of its color and shape never do in training."""
    return any((actor.color, actor.shape, actor.motion) in HELD_OUT_MOTIONS for actor in clip.actors)


# --- sampling --------------------------------------------------------------------------------------------------------


def _room(shape: str, radius: float, whole: bool) -> tuple[float, float, float, float]:
    """Return (left, right, top, bottom) that a figure takes from its center; `whole`: at any angle."""
    foot = footprint(shape)
    sides = (foot.reach,) * 4 if whole else (foot.left, foot.right, foot.top, foot.bottom)
    return tuple(side * radius + BORDER for side in sides)


def _inside(
    rng: np.random.Generator, room: tuple[float, float, float, float], box: tuple[float, float, float, float]
) -> tuple[float, float] | None:
    """Return a center whose figure lies in box (left, top, right, bottom), or None when it does not fit."""
    low_x, high_x, low_y, high_y = box[0] + room[0], box[2] - room[1], box[1] + room[2], box[3] - room[3]
    if low_x > high_x or low_y > high_y:
        return None
    return between(rng, low_x, high_x), between(rng, low_y, high_y)


def _act(
    rng: np.random.Generator,
    shape: str,
    size: str,
    motion: str,
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
) -> tuple[Placement, Placement] | None:
    """Return the first and last state of a figure that does this inside a box; None when there is no room for it."""
    radius = RADII[size] * between(rng, 0.94, 1.06)
    largest = between(rng, *LARGE_RADIUS) if motion in ("grows", "shrinks") else radius
    room = _room(shape, largest, motion == "rotates")
    center = _inside(rng, room, box)
    if center is None:
        return None
    x, y = center
    angle = between(rng, -MAX_TILT, MAX_TILT)
    start = Placement(x, y, radius, angle)
    if motion in ("grows", "shrinks"):
        little = Placement(x, y, between(rng, *SMALL_RADIUS), angle)
        big = replace(little, radius=largest)
        return (little, big) if motion == "grows" else (big, little)
    if motion == "rotates":
        return start, replace(start, angle=angle + between(rng, *TURN))
    if motion == "bounces":
        low = box[3] - room[3] - 0.03 * rng.random()
        top = low - between(rng, *HOP)
        return (replace(start, y=low), replace(start, y=top)) if top - room[2] >= box[1] else None
    if motion in DIRECTIONS:
        return _way(rng, start, motion, room, box)
    return start, start


def _way(
    rng: np.random.Generator,
    placement: Placement,
    direction: str,
    room: tuple[float, float, float, float],
    box: tuple[float, float, float, float],
) -> tuple[Placement, Placement] | None:
    """Return first and last state of a way along one axis of the box."""
    across = direction in ("left", "right")
    low, high = (box[0] + room[0], box[2] - room[1]) if across else (box[1] + room[2], box[3] - room[3])
    way = between(rng, *TRAVEL)
    if high - low < way:
        return None
    first = between(rng, low, high - way)
    last = first + way
    if direction in ("left", "up"):
        first, last = last, first
    if across:
        return replace(placement, x=first), replace(placement, x=last)
    return replace(placement, y=first), replace(placement, y=last)


def _lanes(rng: np.random.Generator, motion: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return two boxes beside each other, along which two figures pass without touching."""
    border = between(rng, 0.44, 0.56)
    if motion in ("left", "right", "rotates", "changes") and (motion in DIRECTIONS or rng.random() < 0.5):
        boxes = (0.0, 0.0, 1.0, border - GAP / 2), (0.0, border + GAP / 2, 1.0, 1.0)
    else:
        boxes = (0.0, 0.0, border - GAP / 2, 1.0), (border + GAP / 2, 0.0, 1.0, 1.0)
    return boxes if rng.random() < 0.5 else boxes[::-1]


def _sample_actors(rng: np.random.Generator, motions: list[str], background: str) -> tuple[Actor, ...] | None:
    boxes = _lanes(rng, motions[0]) if len(motions) == 2 else ((0.0, 0.0, 1.0, 1.0),)
    actors = []
    for motion, box in zip(motions, boxes, strict=True):
        shape = pick(rng, TURNING if motion == "rotates" else SHAPES)
        color, new_color = pick(rng, COLORS), pick(rng, COLORS) if motion == "changes" else ""
        if new_color and not (clear_on(new_color, background) and clear_pair(color, new_color)):
            return None
        roll = rng.random()
        size = "small" if roll < 0.35 else "large" if roll > 0.8 and len(motions) == 1 else ""
        size = "" if motion in ("grows", "shrinks") else size
        states = _act(rng, shape, size, motion, box)
        if states is None or not clear_on(color, background):
            return None
        actors.append(Actor(shape, color, size, motion, *states, new_color))
    if len(actors) == 2 and not clear_pair(actors[0].color, actors[1].color):
        return None
    return tuple(actors)


def sample_clip(rng: np.random.Generator, held_out: bool | None = False) -> Clip:
    """Sample a clip from rng; `held_out` as for `sample_scene`."""
    roll = rng.random()
    while True:
        motions = [pick(rng, MOTIONS)]
        if roll > 0.82:
            motions = [pick(rng, tuple(DIRECTIONS))]
            motions.append(OPPOSITE[motions[0]])
        elif roll > 0.66 and motions[0] not in ("grows", "shrinks"):
            motions.append("stays")
        background = "white" if rng.random() < 0.12 else pick(rng, BACKGROUNDS)
        pattern = "plain" if rng.random() < 0.5 else pick(rng, PATTERNS[1:])
        actors = _sample_actors(rng, motions, background)
        if actors is None:
            continue
        clip = Clip(actors, background, pattern)
        if held_out is None or is_held_out_clip(clip) == held_out:
            return clip
