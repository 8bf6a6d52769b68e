"""Captions of the solid world, and the regular form that says exactly what a caption said."""

import numpy as np

from scripts.datasets.shapes.captions import VOCABULARY, caption_words, strings, with_article, with_background
from scripts.datasets.shapes.scenes import Scene, pick
from scripts.datasets.shapes.words import COLOUR_WORDS

from . import words as w
from .objects import Part, SolidObject

BACKGROUND_UNSAID = 0.3


def _colour(name: str, rng: np.random.Generator) -> str:
    return pick(rng, COLOUR_WORDS.get(name, (name,)))


def _part(part: Part, rng: np.random.Generator, alone: bool) -> str:
    """A part with its mark: "a red ball with a white stripe"."""
    text = with_article(f"{_colour(part.colour, rng)} {pick(rng, w.SOLID_WORDS[part.solid])}")
    if not part.mark:
        return text
    mark, colour = pick(rng, w.MARK_WORDS[part.mark]), _colour(part.mark_colour, rng)
    having = pick(rng, ("that has", "which has")) if alone and rng.random() < 0.15 else "with"
    if rng.random() < 0.12:
        return f"{text} {having} {with_article(mark)} in {colour}"
    return f"{text} {having} {with_article(f'{colour} {mark}')}"


def _together(thing: SolidObject, rng: np.random.Generator) -> str:
    """Both parts and their relation, now and then told from the second."""
    first, second = (_part(part, rng, False) for part in thing.parts)
    roll = rng.random()
    if thing.relation == "on" and roll < 0.15 and not thing.parts[1].mark:
        return f"{second} with {first} on top"
    if roll < 0.3:
        return f"{second} {pick(rng, w.INVERSE_WORDS[thing.relation])} {first}"
    return f"{first} {pick(rng, w.RELATION_WORDS[thing.relation])} {second}"


def canonical(part: Part) -> str:
    """The regular words of a part: colour, solid, and its mark and the mark's colour if it has one."""
    return " ".join(f"{part.colour} {part.solid} {part.mark} {part.mark_colour}".split())


def describe_object(thing: SolidObject, rng: np.random.Generator) -> tuple[str, str]:
    """(caption, canonical form) of the object; draws its wording from rng.

    The canonical form is "<colour> <solid> [<mark> <colour>]" per part, joined by "on" or "beside", then
    " ; view above", " ; view side" or " ; view any", and the background as in that of a scene.
    """
    text = _together(thing, rng) if thing.relation else _part(thing.parts[0], rng, True)
    if rng.random() < 0.5:
        text = f"{pick(rng, w.VIEWS)} {text}"
    if thing.view:
        text = f"{text}{pick(rng, (' ', ' ', ', '))}{pick(rng, w.ELEVATION_WORDS[thing.view])}"
    said = f" {thing.relation} ".join(map(canonical, thing.parts)) + f" ; view {thing.view or 'any'}"
    if rng.random() < BACKGROUND_UNSAID:
        return text, f"{said} ; background any"
    _, text = with_background("solid", text, Scene((), (), thing.background, "plain"), rng)
    return text, f"{said} ; background plain {thing.background}"


def _vocabulary() -> tuple[str, ...]:
    tables = [value for name, value in vars(w).items() if name.isupper()]
    return tuple(sorted({*VOCABULARY, *caption_words(" ".join(strings(tables)))}))


VIEW_VOCABULARY: tuple[str, ...] = _vocabulary()
