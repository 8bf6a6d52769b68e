"""Captions of scenes, and canonical forms that say exactly what a caption says."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from . import words as w
from .palette import BACKGROUNDS, COLORS
from .scenes import INVERSE, Group, Scene, pick

BACKGROUND_OMITTED = 0.25  # share of captions without the background


def with_article(text: str) -> str:
    """Put "a" or "an" in front."""
    return ("an " if text[0] in "aeiou" else "a ") + text


@dataclass(frozen=True)
class Phrase:
    """Wording of one group: full ("two small green stars"), tag (no article), short ("the stars"), canonical."""

    full: str
    tag: str
    short: str
    canonical: str
    many: bool

    @property
    def be(self) -> str:
        return "are" if self.many else "is"

    @property
    def it(self) -> str:
        return "them" if self.many else "it"


def phrase_of(group: Group, groups: Sequence[Group], rng: np.random.Generator) -> Phrase:
    """Choose the words for one group among all groups of a scene."""
    count = len(group.placements)
    many = count > 1
    nouns = w.NOUNS[group.shape]
    noun = (nouns[0] if rng.random() < 0.6 else pick(rng, nouns))[many]
    shades = w.COLOR_WORDS.get(group.color, (group.color,))
    color = shades[0] if rng.random() < 0.7 else pick(rng, shades)
    size = pick(rng, w.SIZE_WORDS[group.size]) if group.size else ""
    roll = rng.random()
    if roll < 0.03:
        adjectives = f"{color} {size}"
    elif roll < 0.06:
        adjectives = f"{size} {color} {pick(rng, ('coloured', 'colored'))}"
    else:
        adjectives = f"{size} {color}"
    body = " ".join(f"{adjectives} {noun}".split())
    number = pick(rng, w.COUNT_WORDS[count - 1])
    full = with_article(body) if number == "a" else f"{number} {body}"
    if 0.06 < roll < 0.09:
        named = " ".join(f"{size} {noun}".split())
        full = f"{with_article(named) if number == 'a' else f'{number} {named}'} in {color}"
    tag = f"{number} {body}" if many else body
    alone = sum(other.shape == group.shape for other in groups) == 1
    short = f"the {noun}" if alone and rng.random() < 0.7 else f"the {color} {noun}"
    if rng.random() < 0.15:
        short = f"the {color} {'ones' if many else 'one'}"
    canonical = f"{w.COUNT_NAMES[count - 1]} {group.size or 'medium'} {group.color} {group.shape}"
    return Phrase(full, tag, short, canonical, many)


@dataclass(frozen=True)
class _Core:
    """Middle of a caption; opened says whether words such as "a picture of" may stand before it."""

    form: str
    text: str
    canonical: str
    opened: bool
    many: bool = False


def _relation_core(a: Phrase, relation: str, b: Phrase, rng: np.random.Generator) -> _Core:
    """Return one of the sentence forms for "a relation b"."""
    loose = pick(rng, w.RELATION_WORDS[relation])
    strict = pick(rng, w.VERB_RELATION_WORDS[relation])
    canonical = f"{a.canonical} {w.RELATION_NAMES[relation]} {b.canonical}"
    roll = rng.random()
    if roll < 0.40:
        return _Core("plain", f"{a.full} {loose} {b.full}", canonical, True, a.many)
    if roll < 0.50:
        verb = pick(rng, w.VERBS)[a.many]
        return _Core("verb", f"{a.full} {verb} {strict} {b.full}", canonical, False)
    if roll < 0.55:
        which = pick(rng, ("that", "which"))
        return _Core("relative", f"{a.full} {which} {a.be} {strict} {b.full}", canonical, True, a.many)
    if roll < 0.60:
        return _Core("participle", f"{a.full} {pick(rng, w.PARTICIPLES)} {strict} {b.full}", canonical, True, a.many)
    if roll < 0.69:
        link = pick(rng, (f"there {a.be} ", f"{a.be} ", ", ", "you can see ", "we see "))
        return _Core("front", f"{strict} {b.full}{'' if link[0] == ',' else ' '}{link}{a.full}", canonical, False)
    if roll < 0.80:
        there = f"{strict} {b.it}" if rng.random() < 0.6 else pick(rng, w.BARE_RELATION_WORDS[relation])
        return _Core("with", f"{b.full} with {a.full} {there}", canonical, True, b.many)
    if roll < 0.87:
        stop = pick(rng, (", ", ", ", ". ", ", with ", ", where "))
        verb = "" if "with" in stop else f" {a.be}"
        return _Core("list", f"{a.full} and {b.full}{stop}{a.short}{verb} {strict} {b.short}", canonical, True, a.many)
    return _Core("tags", f"{a.tag} {loose} {pick(rng, (b.tag, b.full))}", canonical, False)


def _chain_core(p: Sequence[Phrase], first: str, second: str, rng: np.random.Generator) -> _Core:
    """Return one of the sentence forms for "p0 first p1" and "p1 second p2"."""
    a, b, c = p
    back = INVERSE[second]
    one = pick(rng, w.VERB_RELATION_WORDS[first])
    two = pick(rng, w.VERB_RELATION_WORDS[second])
    three = pick(rng, w.VERB_RELATION_WORDS[back])
    start = f"{a.canonical} {w.RELATION_NAMES[first]} {b.canonical} ; "
    along = f"{start}{b.canonical} {w.RELATION_NAMES[second]} {c.canonical}"
    against = f"{start}{c.canonical} {w.RELATION_NAMES[back]} {b.canonical}"
    lead = f"{a.full} {one} {b.full}"
    roll = rng.random()
    if roll < 0.20:
        text = f"{lead}{pick(rng, (', and ', ', ', '. ', ' and '))}{b.short} {b.be} {two} {c.full}"
        return _Core("chain_short", text, along, True, a.many)
    if roll < 0.42:
        text = f"{lead}{pick(rng, (', and ', ' and ', ', '))}{c.full} {three} {b.short}"
        return _Core("chain_back", text, against, True, a.many)
    if roll < 0.54:
        return _Core("chain_plain", f"{lead} {two} {c.full}", along, True, a.many)
    if roll < 0.66:
        which = pick(rng, (", which ", ", that ", " which ", " that "))
        return _Core("chain_which", f"{lead}{which}{b.be} {two} {c.full}", along, True, a.many)
    if roll < 0.78:
        text = f"{b.full} with {a.full} {one} {b.it} and {c.full} {three} {b.it}"
        return _Core("chain_with", text, against, True, b.many)
    if roll < 0.90:
        text = f"{a.full}, {b.full} and {c.full}, {a.short} {a.be} {one} {b.short}, {b.short} {b.be} {two} {c.short}"
        return _Core("chain_list", text, along, True, a.many)
    return _Core("chain_tags", f"{a.tag} {one} {b.tag}, {b.short} {two} {c.tag}", along, False)


def _listing_core(p: Sequence[Phrase], rng: np.random.Generator) -> _Core:
    """Return a list of figures without any relation."""
    canonical = " and ".join(phrase.canonical for phrase in p)
    if len(p) == 2:
        link = pick(rng, (" and ", " and ", " and ", " with ", " next to ", " beside ", ", ", " together with "))
        return _Core("listing", link.join(x.full for x in p), canonical, True, p[0].many)
    if rng.random() < 0.3:
        return _Core("listing_tags", ", ".join(x.tag for x in p), canonical, False)
    return _Core("listing", f"{p[0].full}, {p[1].full} and {p[2].full}", canonical, True, p[0].many)


def _place(group: Group) -> str:
    """Return the ninth of the picture where a single figure clearly lies, else ""."""
    if len(group.placements) != 1:
        return ""
    at = group.placements[0]
    across = "left" if at.x < 0.36 else "right" if at.x > 0.64 else "center" if abs(at.x - 0.5) < 0.09 else ""
    down = "top" if at.y < 0.36 else "bottom" if at.y > 0.64 else "center" if abs(at.y - 0.5) < 0.09 else ""
    if not across or not down:
        return ""
    if across == "center" or down == "center":
        return across if down == "center" else down
    return f"{down}_{across}"


def _single_core(group: Group, phrase: Phrase, rng: np.random.Generator) -> _Core:
    place = _place(group) if rng.random() < 0.45 else ""
    where = f" {pick(rng, w.PLACES[place])}" if place else ""
    canonical = phrase.canonical + (f" at {place}" if place else "")
    roll = rng.random()
    if roll < 0.15:
        return _Core("single_tags", phrase.tag + where, canonical, False)
    if roll < 0.25:
        shade = pick(rng, w.COLOR_WORDS.get(group.color, (group.color,)))
        noun = pick(rng, w.NOUNS[group.shape])[phrase.many]
        size = pick(rng, w.SIZE_WORDS[group.size]) if group.size else ""
        named = f"{size} {noun}".strip()
        number = pick(rng, w.COUNT_WORDS[len(group.placements) - 1])
        full = with_article(named) if number == "a" else f"{number} {named}"
        which = pick(rng, ("that", "which"))
        return _Core("single_relative", f"{full}{where} {which} {phrase.be} {shade}", canonical, True, phrase.many)
    if roll < 0.30:
        return _Core("single_only", f"{pick(rng, ('just', 'only'))} {phrase.full}{where}", canonical, False)
    return _Core("single", phrase.full + where, canonical, True, phrase.many)


def _core(scene: Scene, rng: np.random.Generator) -> _Core:
    phrases = [phrase_of(group, scene.groups, rng) for group in scene.groups]
    if len(phrases) == 1:
        return _single_core(scene.groups[0], phrases[0], rng)
    if not scene.relations:
        return _listing_core(phrases, rng)
    if len(phrases) == 2:
        a, relation, b = phrases[0], scene.relations[0][1], phrases[1]
        if rng.random() < (0.2 if relation == "inside" else 0.4):
            a, relation, b = b, INVERSE[relation], a
        return _relation_core(a, relation, b, rng)
    first, second = scene.relations[0][1], scene.relations[1][1]
    if first != "inside" and rng.random() < 0.4:
        return _chain_core(phrases[::-1], INVERSE[second], INVERSE[first], rng)
    return _chain_core(phrases, first, second, rng)


def _open(core: _Core, rng: np.random.Generator) -> tuple[str, str]:
    """Return (sentence form, text), with "a picture of" and the like in front of cores that allow it."""
    roll = rng.random()
    if not core.opened or roll < 0.45:
        return core.form, core.text
    if roll < 0.62:
        return f"{core.form}, picture of", f"{pick(rng, w.PICTURES)} {core.text}"
    if roll < 0.78:
        return f"{core.form}, command", f"{pick(rng, w.COMMANDS)} {core.text}"
    if roll < 0.90:
        return f"{core.form}, there is", f"there {'are' if core.many else 'is'} {core.text}"
    return f"{core.form}, seen", f"{pick(rng, w.SIGHTS)} {core.text}"


def _ground_words(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Return (adjectives, noun tail) of the background: ("striped blue", "") or ("blue", " with stripes")."""
    color = pick(rng, w.COLOR_WORDS.get(scene.background, (scene.background,)))
    pattern = pick(rng, w.PATTERN_WORDS[scene.pattern])
    roll = rng.random()
    if scene.pattern != "plain" and roll < 0.12:
        return color, f" with {pick(rng, w.PATTERN_NOUNS[scene.pattern])}"
    pair = f"{color} {pattern}" if roll > 0.65 and pattern else f"{pattern} {color}"
    if pattern == "plain" and roll < 0.3:
        pair = f"plain {color}"
    return pair.strip(), ""


def with_background(form: str, text: str, scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Return (sentence form, text) with the words for the background before or behind the text."""
    adjectives, tail = _ground_words(scene, rng)
    if rng.random() < 0.13:
        heads = w.BACKGROUND_HEADS if ", " not in form and "tags" not in form else w.BACKGROUND_HEADS[:3]
        head = pick(rng, heads).format(a=with_article(adjectives), n=adjectives)
        return f"{form}, background first", head.replace("background", f"background{tail}") + text
    choice = ", {n} background" if "tags" in form and rng.random() < 0.6 else pick(rng, w.BACKGROUND_TAILS)
    phrase = choice.format(a=with_article(adjectives), n=adjectives)
    if tail and phrase.endswith(("background", "backdrop")):
        return form, text + phrase + tail
    if tail:
        return form, f"{text} on {with_article(adjectives)} background{tail}"
    return form, text + phrase


def describe_with_form(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str]:
    """Return (caption, canonical form, name of the sentence form) of the scene; rng chooses the words."""
    core = _core(scene, rng)
    form, text = _open(core, rng)
    if rng.random() < BACKGROUND_OMITTED:
        return text, f"{core.canonical} ; background any", form
    form, text = with_background(form, text, scene, rng)
    return text, f"{core.canonical} ; background {scene.pattern} {scene.background}", form


def describe(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Return (caption, canonical form) of the scene; rng chooses the words.

    The canonical form is "<count> <size> <color> <shape>" per group joined by one relation word (or "and" when none
    is given), " ; " between two relations, and ends with " ; background <pattern> <color>" or " ; background any".
    """
    caption, canonical, _ = describe_with_form(scene, rng)
    return caption, canonical


def caption_words(text: str) -> list[str]:
    """Return the lower-case words of a caption or canonical form, without punctuation except the latter's ";"."""
    return re.findall(r"[a-z0-9_]+|;", text.lower())


def strings(value: object) -> Iterable[str]:
    """Yield all strings in nested dictionaries, tuples and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from strings(list(value.items()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from strings(item)


_SENTENCE_WORDS = (
    "a an the and with that which where there is are it them its one ones in at next to beside together just only "
    "coloured colored you can we see medium background any on ; "
)


def vocabulary(words: ModuleType, *more: object) -> tuple[str, ...]:
    """Return all words of the tables in a module, and of further strings, in order."""
    tables = [value for name, value in vars(words).items() if name.isupper()]
    text = " ".join(strings([*tables, *more]))
    return tuple(sorted(set(caption_words(re.sub(r"\{[abcn]\}", " ", text)))))


VOCABULARY: tuple[str, ...] = vocabulary(w, BACKGROUNDS, COLORS, _SENTENCE_WORDS)
