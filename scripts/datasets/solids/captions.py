"""Captions of objects, and canonical forms that say exactly what a caption says."""

import numpy as np

from scripts.datasets.shapes.captions import VOCABULARY, vocabulary, with_article, with_background
from scripts.datasets.shapes.scenes import Scene, pick
from scripts.datasets.shapes.words import COLOR_WORDS

from . import words as w
from .objects import Part, SolidObject

BACKGROUND_OMITTED = 0.3


def _color(name: str, rng: np.random.Generator) -> str:
    return pick(rng, COLOR_WORDS.get(name, (name,)))


def _part(part: Part, rng: np.random.Generator, alone: bool) -> str:
    """Return the words for a part with its mark: "a red ball with a white stripe"."""
    text = with_article(f"{_color(part.color, rng)} {pick(rng, w.SOLID_WORDS[part.solid])}")
    if not part.mark:
        return text
    mark, color = pick(rng, w.MARK_WORDS[part.mark]), _color(part.mark_color, rng)
    having = pick(rng, ("that has", "which has")) if alone and rng.random() < 0.15 else "with"
    if rng.random() < 0.12:
        return f"{text} {having} {with_article(mark)} in {color}"
    return f"{text} {having} {with_article(f'{color} {mark}')}"


def _together(obj: SolidObject, rng: np.random.Generator) -> str:
    """Return the words for both parts and their relation, sometimes named from the second."""
    first, second = (_part(part, rng, False) for part in obj.parts)
    roll = rng.random()
    if obj.relation == "on" and roll < 0.15 and not obj.parts[1].mark:
        return f"{second} with {first} on top"
    if roll < 0.3:
        return f"{second} {pick(rng, w.INVERSE_WORDS[obj.relation])} {first}"
    return f"{first} {pick(rng, w.RELATION_WORDS[obj.relation])} {second}"


def canonical(part: Part) -> str:
    """Return the canonical words of a part: color, solid, and its mark and the mark's color if it has one."""
    return " ".join(f"{part.color} {part.solid} {part.mark} {part.mark_color}".split())


def describe_object(obj: SolidObject, rng: np.random.Generator) -> tuple[str, str]:
    """Return (caption, canonical form) of the object; rng chooses the words.

    The canonical form is "<color> <solid> [<mark> <color>]" per part, joined by "on" or "beside", then
    " ; view above", " ; view side" or " ; view any", and the background as in that of a scene.
    """
    text = _together(obj, rng) if obj.relation else _part(obj.parts[0], rng, True)
    if rng.random() < 0.5:
        text = f"{pick(rng, w.VIEWS)} {text}"
    if obj.view:
        text = f"{text}{pick(rng, (' ', ' ', ', '))}{pick(rng, w.ELEVATION_WORDS[obj.view])}"
    clauses = f" {obj.relation} ".join(map(canonical, obj.parts)) + f" ; view {obj.view or 'any'}"
    if rng.random() < BACKGROUND_OMITTED:
        return text, f"{clauses} ; background any"
    _, text = with_background("solid", text, Scene((), (), obj.background, "plain"), rng)
    return text, f"{clauses} ; background plain {obj.background}"


VIEW_VOCABULARY: tuple[str, ...] = vocabulary(w, VOCABULARY)
