"""Compare what a picture shows with what was asked for: readings and requests, no pixels."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from scripts.verifiers.pictures.figures import Figure, Reading
from scripts.verifiers.pictures.prompt import AskedGroup, Request, read_prompt

SMALL_BELOW = 0.143  # radius, fraction of the picture side; true: small 0.11 (up to 0.14 inside another), medium 0.155
LARGE_ABOVE = 0.182  # true: large 0.21


@dataclass(frozen=True)
class ObjectVerdict:
    """One figure that was asked for: its group, the figure found for it (None: none), and what is right about it.

    size_right is None when the prompt gives no size.
    """

    group: int
    figure: int | None
    color_right: bool
    shape_right: bool
    size_right: bool | None


@dataclass(frozen=True)
class RelationVerdict:
    """One relation that was asked for.

    holds: the figures found for it stand so; a figure counts when its color or its shape is right.
    strict: they stand so, none of them is missing, and all have the right color and shape.
    """

    holds: bool
    strict: bool


@dataclass(frozen=True)
class PictureVerdict:
    """Everything that was asked for and whether the picture shows it; None where the prompt gives nothing.

    Attributes:
        objects: one per figure asked for.
        counts: one per group: as many figures of its color as asked for.
        figures_right: no figure too many or too few in the whole picture.
        relations: one per relation.
        background_right, pattern_right: color word and pattern of the background.
        places_right: "in the top left corner" and the like.
        wrong: one line per mistake.
    """

    objects: tuple[ObjectVerdict, ...]
    counts: tuple[bool, ...]
    figures_right: bool
    relations: tuple[RelationVerdict, ...]
    background_right: bool | None
    pattern_right: bool | None
    places_right: bool | None
    wrong: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Whether the picture shows everything that was asked for."""
        return not self.wrong


def request_of_scene(scene: Any, caption: str | None = None) -> Request:
    """Return what a scene asks for; with a caption, background and pattern only as far as the caption gives them.

    Args:
        scene: a scene of shapes, with groups (shape, color, size, placements), relations, background, pattern.
        caption: words that describe it, None for all that the scene has.
    """
    groups = tuple(AskedGroup(len(group.placements), group.size, group.color, group.shape) for group in scene.groups)
    if caption is None:
        return Request(groups, tuple(scene.relations), scene.background, scene.pattern)
    given = read_prompt(caption)
    background = scene.background if given.background else ""
    return Request(groups, tuple(scene.relations), background, scene.pattern if given.pattern else "")


def _match(figures: list[Figure], wanted: list[AskedGroup]) -> dict[int, int]:
    """Match the figures asked for to the figures found best: index of `wanted` -> index of `figures`."""
    if not figures or not wanted:
        return {}
    cost = np.zeros((len(wanted), len(figures)))
    for row, asked in enumerate(wanted):
        for column, figure in enumerate(figures):
            cost[row, column] += asked.color not in ("", figure.color)
            cost[row, column] += 0.9 * (asked.shape not in ("", figure.shape))
            cost[row, column] += 0.1 * (_size_right(asked, figure) is False)
            cost[row, column] += 0.05 * (1 - figure.score)
    rows, columns = linear_sum_assignment(cost)
    return {int(row): int(column) for row, column in zip(rows, columns, strict=True)}


def _size_right(asked: AskedGroup, figure: Figure) -> bool | None:
    if not asked.size:
        return None
    return figure.radius < SMALL_BELOW if asked.size == "small" else figure.radius > LARGE_ABOVE


def _stands(relation: str, subject: list[int], other: list[int], figures: list[Figure]) -> bool:
    """Return whether all subject figures stand in the relation to all other figures.

    Beside and above go by centroids: those of the groups are further apart along the asked direction than across it,
    and every figure of one group lies on its side of every figure of the other. What is inside is not beside.
    """
    if relation == "inside":
        return all(figures[index].inside in other for index in subject)
    if any(figures[a].inside == b or figures[b].inside == a for a in subject for b in other):
        return False
    sign = 1 if relation in ("left of", "above") else -1
    along, across = ("x", "y") if relation in ("left of", "right of") else ("y", "x")

    def gap(axis: str, reduce: Any, first: list[int], second: list[int]) -> float:
        return float(reduce([getattr(figures[b], axis) - getattr(figures[a], axis) for a in first for b in second]))

    middle = sign * gap(along, np.mean, subject, other)
    aside = abs(gap(across, np.mean, subject, other))
    nearest = gap(along, np.min if sign > 0 else np.max, subject, other) * sign
    return middle > aside and nearest > 0


def _place_right(place: str, figure: Figure) -> bool:
    """Return whether a figure lies in the named part of the picture: "top", "bottom_left", "center"."""
    if place == "center":
        return abs(figure.x - 0.5) < 0.17 and abs(figure.y - 0.5) < 0.17
    limits = {"left": figure.x < 0.45, "right": figure.x > 0.55, "top": figure.y < 0.45, "bottom": figure.y > 0.55}
    return all(limits[word] for word in place.split("_"))


def _name(asked: AskedGroup) -> str:
    words = (asked.size, asked.color, asked.shape or "figure")
    return " ".join(word for word in words if word)


def _count_right(asked: AskedGroup, figures: list[Figure]) -> bool:
    found = sum(
        figure.color == asked.color if asked.color else asked.shape in ("", figure.shape) for figure in figures
    )
    return found == asked.count if asked.count else found > 0


def _judge_objects(
    figures: list[Figure], wanted: list[tuple[int, AskedGroup]]
) -> tuple[tuple[ObjectVerdict, ...], list[str]]:
    matches = _match(figures, [asked for _, asked in wanted])
    objects, wrong = [], []
    for index, (group, asked) in enumerate(wanted):
        found = matches.get(index)
        if found is None:
            objects.append(ObjectVerdict(group, None, False, False, False if asked.size else None))
            wrong.append(f"{_name(asked)}: missing")
            continue
        figure = figures[found]
        color, shape = asked.color in ("", figure.color), asked.shape in ("", figure.shape)
        size = _size_right(asked, figure)
        objects.append(ObjectVerdict(group, found, color, shape, size))
        if not (color and shape):
            wrong.append(f"{_name(asked)}: the picture shows a {figure.color} {figure.shape}")
        elif size is False:
            wrong.append(f"{_name(asked)}: radius is {figure.radius:.2f} of the picture side")
    return tuple(objects), wrong


def _judge_relations(
    request: Request, figures: list[Figure], objects: Iterable[ObjectVerdict]
) -> tuple[tuple[RelationVerdict, ...], list[str]]:
    verdicts, wrong = [], []
    objects = list(objects)
    for subject, relation, other in request.relations:
        sides = [[o for o in objects if o.group == group] for group in (subject, other)]
        known = [
            [o.figure for o in side if o.figure is not None and (o.color_right or o.shape_right)] for side in sides
        ]
        stands = all(known) and _stands(relation, known[0], known[1], figures)
        clean = all(o.color_right and o.shape_right for side in sides for o in side)
        verdicts.append(RelationVerdict(stands, stands and clean))
        if not stands:
            wrong.append(f"{_name(request.groups[subject])} is not {relation} {_name(request.groups[other])}")
    return tuple(verdicts), wrong


def verify_picture(reading: Reading, scene: Any) -> PictureVerdict:
    """Compare a reading with what was asked for.

    Args:
        reading: what the picture shows.
        scene: a `Request`, or a scene of shapes (then everything the scene has is asked for).

    Returns:
        The verdict, with one line per mistake.
    """
    request = scene if isinstance(scene, Request) else request_of_scene(scene)
    figures = reading.figures
    wanted = [(i, asked) for i, asked in enumerate(request.groups) for _ in range(max(asked.count, 1))]
    objects, wrong = _judge_objects(figures, wanted)
    relations, broken = _judge_relations(request, figures, objects)
    wrong += broken
    counts = tuple(_count_right(asked, figures) for asked in request.groups)
    exact = all(asked.count for asked in request.groups)
    figures_right = len(figures) == len(wanted) if exact else len(figures) >= len(wanted)
    if not figures_right:
        wrong.append(f"{len(figures)} figures instead of {len(wanted)}")
    background = reading.background == request.background if request.background else None
    if background is False:
        wrong.append(f"background is {reading.background} instead of {request.background}")
    pattern = reading.pattern == request.pattern if request.pattern else None
    if pattern is False:
        wrong.append(f"background is {reading.pattern} instead of {request.pattern}")
    spots = [(request.groups[o.group].place, o) for o in objects if request.groups[o.group].place]
    places = (
        all(o.figure is not None and _place_right(place, figures[o.figure]) for place, o in spots) if spots else None
    )
    if places is False:
        wrong.append(f"not at {spots[0][0].replace('_', ' ')}")
    return PictureVerdict(objects, counts, figures_right, relations, background, pattern, places, tuple(wrong))
