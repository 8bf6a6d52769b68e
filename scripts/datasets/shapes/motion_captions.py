"""Captions of clips, and canonical forms that say exactly what a caption says."""

import numpy as np

from . import motion_words as m
from .captions import VOCABULARY, Phrase, phrase_of, vocabulary, with_background
from .motion import DIRECTIONS, Actor, Clip
from .scenes import pick
from .words import COLOR_WORDS

BACKGROUND_OMITTED = 0.3


def verb(actor: Actor, rng: np.random.Generator) -> tuple[str, str, str]:
    """Return what the actor does in three forms: "moves left", "move left", "moving left"."""
    if actor.motion in DIRECTIONS:
        where = pick(rng, m.DIRECTION_WORDS[actor.motion])
        return tuple(f"{form} {where}" for form in pick(rng, m.MOVES))
    if actor.motion == "changes":
        color = pick(rng, COLOR_WORDS.get(actor.new_color, (actor.new_color,)))
        return tuple(form.format(c=color) for form in pick(rng, m.CHANGES))
    return pick(rng, m.ALONE[actor.motion])


def canonical(actor: Actor, phrase: Phrase) -> str:
    """Return the canonical words: count, size, color, shape, motion, and the new color if there is one."""
    return f"{phrase.canonical} {actor.motion} {actor.new_color}".strip()


def _alone(actor: Actor, phrase: Phrase, rng: np.random.Generator) -> tuple[str, str]:
    """Return (text, name of the form) for one figure."""
    does, _, doing = verb(actor, rng)
    roll = rng.random()
    if roll < 0.35:
        return f"{phrase.full} {does}", "does"
    if roll < 0.45:
        return f"{phrase.full} {pick(rng, ('that', 'which'))} {does}", "opened"
    if roll < 0.52:
        return f"{phrase.full} is {doing}", "does"
    if roll < 0.62:
        return f"{phrase.tag} {doing}", "tags"
    return f"{phrase.full} {doing}", "opened"


def _together(clip: Clip, first: Phrase, second: Phrase, rng: np.random.Generator) -> tuple[str, str]:
    """Return (text, name of the form) for two figures."""
    one, two = (verb(actor, rng) for actor in clip.actors)
    roll = rng.random()
    if clip.crossing and roll < 0.5 and clip.actors[0].motion in ("left", "right"):
        a, b = (first.full, second.full) if clip.actors[0].motion == "right" else (second.full, first.full)
        return pick(rng, m.CROSSINGS).format(a=a, b=b), "crossing"
    if roll < 0.75:
        a, b = (first, one), (second, two)
        if rng.random() < 0.3:
            a, b = b, a
        return f"{a[0].full} {a[1][0]}{pick(rng, (' and ', ' while ', ', '))}{b[0].full} {b[1][0]}", "does"
    if clip.crossing or roll < 0.9:
        return f"{first.full} {one[2]} and {second.full} {two[2]}", "opened"
    return f"{second.full} and {first.full} that {one[0]}", "opened"


def describe_clip(clip: Clip, rng: np.random.Generator) -> tuple[str, str]:
    """Return (caption, canonical form) of the clip; rng chooses the words.

    The canonical form is "<count> <size> <color> <shape> <motion> [<new color>]" per figure, joined by " ; ", and
    ends as that of a scene. The motion is "cross" when the caption does not give the way; the first figure then
    moves right and the other left.
    """
    scene = clip.scene(0)
    phrases = [phrase_of(group, scene.groups, rng) for group in scene.groups]
    if len(phrases) == 1:
        text, form = _alone(clip.actors[0], phrases[0], rng)
    else:
        text, form = _together(clip, *phrases, rng)
    clauses = [canonical(actor, phrase) for actor, phrase in zip(clip.actors, phrases, strict=True)]
    if form == "crossing":
        clauses = [f"{phrase.canonical} cross" for phrase in phrases]
    if form == "opened" and rng.random() < 0.45:
        text = f"{pick(rng, m.VIDEOS)} {text}"
    if rng.random() < BACKGROUND_OMITTED:
        return text, " ; ".join([*clauses, "background any"])
    _, text = with_background(form, text, scene, rng)
    return text, " ; ".join([*clauses, f"background {clip.pattern} {clip.background}"])


CLIP_VOCABULARY: tuple[str, ...] = vocabulary(m, VOCABULARY, "that which is and while cross changes")
