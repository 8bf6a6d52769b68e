"""Scenes of shapes: what stands where, and which combinations training never sees.

Lengths are fractions of the picture side, x right, y down, origin top left.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .layout import Placement, layout_scene
from .palette import BACKGROUNDS, COLORS, PATTERNS, clear_on, clear_pair

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "crescent")
CONTAINERS = ("circle", "square", "triangle", "heart", "star", "ring")
RELATIONS = ("left of", "right of", "above", "below", "inside")
INVERSE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "inside": "around",
    "around": "inside",
}
HELD_OUT_SHARE = 0.10

T = TypeVar("T")
Kinds = list[tuple[str, str]]
Relations = tuple[tuple[int, str, int], ...]


@dataclass(frozen=True)
class Group:
    """One to four figures of the same shape, color and size; size is "small", "large" or "" (medium)."""

    shape: str
    color: str
    size: str
    placements: tuple[Placement, ...]


@dataclass(frozen=True)
class Scene:
    """One to three groups, relations (subject index, relation, object index) and a background."""

    groups: tuple[Group, ...]
    relations: tuple[tuple[int, str, int], ...]
    background: str
    pattern: str


def held_out_by_hash(combination: str) -> bool:
    """Return whether training never sees a combination: one in ten, by the hash of its words."""
    digest = hashlib.sha256(combination.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


# The hashed strings decide what is held out, so they keep the names that the data sets had first ("drawn world").
HELD_OUT: frozenset[tuple[str, str, str]] = frozenset(
    (color, shape, relation)
    for color in COLORS
    for shape in SHAPES
    for relation in INVERSE
    if (relation != "around" or shape in CONTAINERS) and held_out_by_hash(f"drawn world: {color} {shape} {relation}")
)


def held_out_list() -> list[str]:
    """Return the held-out combinations as sorted lines, "color shape relation"."""
    return sorted(" ".join(triple) for triple in HELD_OUT)


def _held_out_kinds(kinds: Kinds, relations: Relations) -> bool:
    for subject, relation, other in relations:
        if (*kinds[subject], relation) in HELD_OUT or (*kinds[other], INVERSE[relation]) in HELD_OUT:
            return True
    return False


def is_held_out(scene: Scene) -> bool:
    """Return whether a relation of the scene, read from either side, is a held-out combination."""
    return _held_out_kinds([(group.color, group.shape) for group in scene.groups], scene.relations)


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    """Return one of the choices, all as likely."""
    return choices[int(rng.random() * len(choices))]


def _sample_background(rng: np.random.Generator) -> tuple[str, str]:
    color = "white" if rng.random() < 0.12 else pick(rng, BACKGROUNDS)
    pattern = "plain" if rng.random() < 0.4 else pick(rng, PATTERNS[1:])
    return color, pattern


def _sample_relations(rng: np.random.Generator, groups: int) -> Relations:
    if groups == 1:
        return ()
    if groups == 2:
        inside = rng.random() < 0.22
        return ((0, "inside" if inside else pick(rng, RELATIONS[:4]), 1),)
    first = "inside" if rng.random() < 0.15 else pick(rng, RELATIONS[:4])
    return ((0, first, 1), (1, pick(rng, RELATIONS[:4]), 2))


def _sample_kinds(rng: np.random.Generator, relations: Relations, groups: int, background: str) -> Kinds | None:
    """Sample (color, shape) for every group; None when a figure would be hard to see on what lies behind it."""
    kinds: Kinds = []
    for index in range(groups):
        contains = any(relation == "inside" and other == index for _, relation, other in relations)
        kinds.append((pick(rng, COLORS), pick(rng, CONTAINERS if contains else SHAPES)))
    names = [color for color, _ in kinds]
    if len({*names, background}) <= groups or not all(clear_on(name, background) for name in names):
        return None
    if any(rel == "inside" and not clear_pair(names[a], names[b]) for a, rel, b in relations):
        return None
    return kinds


def _sample_counts(
    rng: np.random.Generator, groups: int, relations: Relations, alone: bool, kinds: Kinds
) -> list[int]:
    if groups == 1:
        return [1 if alone else 2 + int(rng.random() * 3)]
    counts = [1] * groups
    if rng.random() < 0.27 and groups == 2:
        if relations[0][1] == "inside":
            counts[0] = 2 if kinds[1][1] in ("circle", "square") else 1
        else:
            many = int(rng.random() * 2)
            counts[many] = 2 + int(rng.random() * 2.25)
            if counts[many] == 2 and rng.random() < 0.3:
                counts[1 - many] = 2 + int(rng.random() * 2)
    elif groups == 3 and rng.random() < 0.12 and relations[0][1] != "inside":
        counts[int(rng.random() * 3)] = 2
    return counts


def _sample_sizes(rng: np.random.Generator, relations: Relations, counts: list[int]) -> list[str]:
    many = len(counts) == 3 or sum(counts) > 2
    sizes = []
    for _ in counts:
        roll = rng.random()
        small, large = (0.42, 0.95) if many else (0.3, 0.74)
        sizes.append("small" if roll < small else "large" if roll > large else "")
    for subject, relation, other in relations:
        if relation == "inside":
            sizes[subject] = "small" if rng.random() < 0.3 else ""
            sizes[other] = "large" if rng.random() < 0.35 else ""
            if len(counts) == 3:
                sizes[2] = "small"
    return sizes


def _groups_and_aloneness(rng: np.random.Generator, held_out: bool | None) -> tuple[int, bool]:
    roll = rng.random()
    if held_out:
        return (2 if roll < 0.72 else 3), False
    if roll < 0.30:
        return 1, roll < 0.15
    return (2 if roll < 0.80 else 3), False


def _sample_words(rng: np.random.Generator, held_out: bool | None) -> tuple[Kinds, Relations, str, str, list[int]]:
    """Sample everything that a caption can name; rejection happens here, before places are looked for."""
    groups, alone = _groups_and_aloneness(rng, held_out)
    while True:
        relations = _sample_relations(rng, groups)
        background, pattern = _sample_background(rng)
        kinds = _sample_kinds(rng, relations, groups, background)
        if kinds is None:
            continue
        if held_out is not None and _held_out_kinds(kinds, relations) != held_out:
            continue
        return kinds, relations, background, pattern, _sample_counts(rng, groups, relations, alone, kinds)


def sample_scene(rng: np.random.Generator, held_out: bool | None = False) -> Scene:
    """Sample a scene from rng.

    held_out False (training): no held-out combination occurs; True (evaluation): at least one does; None: either.
    A few scenes of several groups have no relation, for captions that only list figures. In training scenes their
    places, too, obey a relation that is not held out.
    """
    while True:
        kinds, relations, background, pattern, counts = _sample_words(rng, held_out)
        for _ in range(4):
            sizes = _sample_sizes(rng, relations, counts)
            shapes = [shape for _, shape in kinds]
            places = layout_scene(rng, shapes, sizes, counts, relations)
            if places is not None:
                break
        else:
            continue
        groups = tuple(
            Group(shape, color, size, placements)
            for (color, shape), size, placements in zip(kinds, sizes, places, strict=True)
        )
        listed = not held_out and relations and relations[0][1] != "inside" and rng.random() < 0.08
        return Scene(groups, () if listed else relations, background, pattern)
