"""Places for the figures of a scene: blocks of equal figures, set so that every relation is true.

Lengths are fractions of the picture side, x right, y down.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .shapes import MAX_TILT, footprint

RADII = {"small": 0.11, "": 0.155, "large": 0.21}
JITTER = 0.06
BORDER = 0.02
GAP = 0.03
CONTAINER_RADII = (0.34, 0.40)
INNER_RADII = (0.11, 0.14)
ALONE_RADII = (0.27, 0.38)
STEEPNESS = 1.35
TRIES = 12


@dataclass(frozen=True)
class Placement:
    """Where a figure lies: center, radius (fractions of the side) and tilt in degrees."""

    x: float
    y: float
    radius: float
    angle: float


@dataclass
class _Block:
    """Figures of one group around a local origin that is their mean place; bounds are distances from it."""

    placements: list[Placement]
    left: float
    right: float
    top: float
    bottom: float
    x: float = 0.0
    y: float = 0.0

    def placed(self) -> tuple[Placement, ...]:
        return tuple(Placement(t.x + self.x, t.y + self.y, t.radius, t.angle) for t in self.placements)


_ARRANGEMENTS: dict[int, tuple[tuple[tuple[float, float], ...], ...]] = {
    1: (((0, 0),),),
    2: (((0, 0), (1, 0)), ((0, 0), (0, 1)), ((0, 0), (1, 1)), ((0, 1), (1, 0))),
    3: (
        ((0, 0), (1, 0), (2, 0)),
        ((0, 0), (0, 1), (0, 2)),
        ((0, 0), (1, 0), (0.5, 1)),
        ((0.5, 0), (0, 1), (1, 1)),
    ),
    4: (
        ((0, 0), (1, 0), (0, 1), (1, 1)),
        ((0, 0), (1, 0), (0, 1), (1, 1)),
        ((0, 0), (1, 0), (2, 0), (3, 0)),
        ((0, 0), (0, 1), (0, 2), (0, 3)),
    ),
}


def between(rng: np.random.Generator, low: float, high: float) -> float:
    """Return a number from low to high, all as likely."""
    return low + (high - low) * rng.random()


def _block(rng: np.random.Generator, shape: str, radius: float, count: int) -> _Block | None:
    """Set count figures side by side, one above the other or in a grid; None when the picture is too narrow."""
    foot = footprint(shape)
    cells = _ARRANGEMENTS[count][int(rng.random() * len(_ARRANGEMENTS[count]))]
    widest = radius * (1 + JITTER)
    air = GAP + 0.07 * rng.random() if count > 1 else 0.0
    wide = (foot.left + foot.right) * widest + air
    high = (foot.top + foot.bottom) * widest + air
    play = max(0.0, (air - GAP) / 2)
    placements = []
    for column, row in cells:
        x = column * wide + between(rng, -play, play)
        y = row * high + between(rng, -play, play)
        size = radius * (1 + JITTER * between(rng, -1, 1))
        placements.append((x, y, size, between(rng, -MAX_TILT, MAX_TILT)))
    mean_x = sum(t[0] for t in placements) / count
    mean_y = sum(t[1] for t in placements) / count
    moved = [Placement(x - mean_x, y - mean_y, size, angle) for x, y, size, angle in placements]
    block = _Block(
        moved,
        max(foot.left * t.radius - t.x for t in moved),
        max(foot.right * t.radius + t.x for t in moved),
        max(foot.top * t.radius - t.y for t in moved),
        max(foot.bottom * t.radius + t.y for t in moved),
    )
    room = 1 - 2 * BORDER
    return block if block.left + block.right <= room and block.top + block.bottom <= room else None


def _room(anchor: _Block, other: _Block, relation: str) -> tuple[float, float, float, float]:
    """Return the space (left, right, top, bottom) to keep free for `other` beside the anchor."""
    wide, high = other.left + other.right + GAP, other.top + other.bottom + GAP
    return (
        wide if relation == "right of" else 0.0,
        wide if relation == "left of" else 0.0,
        high if relation == "below" else 0.0,
        high if relation == "above" else 0.0,
    )


def _set_anchor(rng: np.random.Generator, anchor: _Block, rooms: Sequence[tuple[float, ...]]) -> bool:
    left, right, top, bottom = (max((room[side] for room in rooms), default=0.0) for side in range(4))
    low_x, high_x = BORDER + anchor.left + left, 1 - BORDER - anchor.right - right
    low_y, high_y = BORDER + anchor.top + top, 1 - BORDER - anchor.bottom - bottom
    if low_x > high_x or low_y > high_y:
        return False
    anchor.x, anchor.y = between(rng, low_x, high_x), between(rng, low_y, high_y)
    return True


def _set_beside(rng: np.random.Generator, block: _Block, relation: str, anchor: _Block) -> bool:
    """Place the block so that "block relation anchor" is true; False when there is no room."""
    low_x, high_x = BORDER + block.left, 1 - BORDER - block.right
    low_y, high_y = BORDER + block.top, 1 - BORDER - block.bottom
    if relation == "left of":
        high_x = min(high_x, anchor.x - anchor.left - GAP - block.right)
    elif relation == "right of":
        low_x = max(low_x, anchor.x + anchor.right + GAP + block.left)
    elif relation == "above":
        high_y = min(high_y, anchor.y - anchor.top - GAP - block.bottom)
    else:
        low_y = max(low_y, anchor.y + anchor.bottom + GAP + block.top)
    if low_x > high_x or low_y > high_y:
        return False
    if relation in ("left of", "right of"):
        block.x = between(rng, low_x, high_x)
        reach = abs(block.x - anchor.x) / STEEPNESS
        low_y, high_y = max(low_y, anchor.y - reach), min(high_y, anchor.y + reach)
        if low_y > high_y:
            return False
        block.y = between(rng, low_y, high_y)
    else:
        block.y = between(rng, low_y, high_y)
        reach = abs(block.y - anchor.y) / STEEPNESS
        low_x, high_x = max(low_x, anchor.x - reach), min(high_x, anchor.x + reach)
        if low_x > high_x:
            return False
        block.x = between(rng, low_x, high_x)
    return True


def _apart(first: _Block, second: _Block) -> bool:
    return (
        first.x + first.right + GAP <= second.x - second.left
        or second.x + second.right + GAP <= first.x - first.left
        or first.y + first.bottom + GAP <= second.y - second.top
        or second.y + second.bottom + GAP <= first.y - first.top
    )


def _set_inside(rng: np.random.Generator, shape: str, count: int, container: str, block: _Block) -> _Block | None:
    """Place figures in the largest inner circle of a placed container (in a ring: in its hole)."""
    foot, hull = footprint(shape), footprint(container)
    outer = block.placements[0]
    turn = math.radians(outer.angle)
    x = block.x - math.sin(turn) * hull.inner_y * outer.radius
    y = block.y + math.cos(turn) * hull.inner_y * outer.radius
    room = hull.inner_radius * outer.radius - BORDER
    # A pair sits on a line through the center, each half a pitch away from it.
    slope = between(rng, 0, 2 * math.pi)
    most = room / foot.reach if count == 1 else (room - GAP / 2) / (2 * foot.reach)
    if most < INNER_RADII[0]:
        return None
    radius = between(rng, INNER_RADII[0], min(INNER_RADII[1], most))
    half = 0.0 if count == 1 else radius * foot.reach + GAP / 2 + 1e-6
    free = room - half - radius * foot.reach
    away, side = free * math.sqrt(rng.random()), between(rng, 0, 2 * math.pi)
    middle_x, middle_y = x + away * math.cos(side), y + away * math.sin(side)
    placements = []
    for sign in (1, -1)[:count]:
        tilt = between(rng, -MAX_TILT, MAX_TILT)
        placements.append(Placement(sign * half * math.cos(slope), sign * half * math.sin(slope), radius, tilt))
    return _Block(placements, 0.0, 0.0, 0.0, 0.0, middle_x, middle_y)


def _radius(rng: np.random.Generator, size: str, contains: bool, groups: int) -> float:
    if not contains:
        return RADII[size]
    low, high = CONTAINER_RADII
    # _block varies the radius by JITTER, so the bounds are narrowed by it.
    # Beside a third group only the smallest fits.
    low, high = low / (1 - JITTER), high / (1 + JITTER)
    return low if groups == 3 else between(rng, low, high)


_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _attempt(
    rng: np.random.Generator,
    shapes: Sequence[str],
    sizes: Sequence[str],
    counts: Sequence[int],
    relations: Sequence[tuple[int, str, int]],
) -> tuple[tuple[Placement, ...], ...] | None:
    inside = bool(relations) and relations[0][1] == "inside"
    blocks: list[_Block | None] = []
    for index, (shape, size, count) in enumerate(zip(shapes, sizes, counts, strict=True)):
        if inside and index == 0:
            blocks.append(None)
            continue
        radius = _radius(rng, size, inside and index == 1, len(shapes))
        block = _block(rng, shape, radius, count)
        if block is None:
            return None
        blocks.append(block)
    anchor = blocks[min(1, len(blocks) - 1)]
    neighbors = []
    for subject, relation, other in relations:
        if relation != "inside":
            # The anchor is group 1: the object of the first relation, the subject of the second.
            index, side = (subject, relation) if other == 1 else (other, _OPPOSITE[relation])
            neighbors.append((blocks[index], side))
    if not _set_anchor(rng, anchor, [_room(anchor, block, _OPPOSITE[side]) for block, side in neighbors]):
        return None
    if not all(_set_beside(rng, block, side, anchor) for block, side in neighbors):
        return None
    if len(neighbors) == 2 and not _apart(neighbors[0][0], neighbors[1][0]):
        return None
    if inside:
        blocks[0] = _set_inside(rng, shapes[0], counts[0], shapes[1], anchor)
        if blocks[0] is None:
            return None
    return tuple(block.placed() for block in blocks)


def layout_scene(
    rng: np.random.Generator,
    shapes: Sequence[str],
    sizes: Sequence[str],
    counts: Sequence[int],
    relations: Sequence[tuple[int, str, int]],
) -> tuple[tuple[Placement, ...], ...] | None:
    """Return the figures of every group, all relations true, nothing overlapping; None when no places were found.

    shapes, sizes ("small", "" or "large") and counts have one entry per group. Relations form the chain
    (0, r, 1), (1, r2, 2); only the first may be "inside".
    """
    for _ in range(TRIES):
        places = _attempt(rng, shapes, sizes, counts, relations)
        if places is not None:
            return places
    return None


def place_alone(rng: np.random.Generator, shape: str) -> Placement:
    """Return a place for the only figure of a picture, which fills most of it; all places inside are as likely."""
    foot, radius = footprint(shape), between(rng, *ALONE_RADII)
    return Placement(
        between(rng, BORDER + foot.left * radius, 1 - BORDER - foot.right * radius),
        between(rng, BORDER + foot.top * radius, 1 - BORDER - foot.bottom * radius),
        radius,
        between(rng, -MAX_TILT, MAX_TILT),
    )
