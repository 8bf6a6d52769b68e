"""Read what a prompt for a picture asks for: groups of figures, relations, places and the background.

The grammar works on words only. Words that are not known are skipped.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from scripts.verifiers.pictures.colors import COLORS
from scripts.verifiers.pictures.shapes import SHAPES


@dataclass(frozen=True)
class AskedGroup:
    """A group that is asked for; "" or 0 where the prompt leaves something open. place as in "top_left"."""

    count: int
    size: str
    color: str
    shape: str
    place: str = ""


@dataclass(frozen=True)
class Request:
    """What a prompt asks for; relations are (subject group, relation, object group), background "" when not given."""

    groups: tuple[AskedGroup, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str = ""
    pattern: str = ""


def phrases(table: Mapping[str | int, str]) -> dict[str, str | int]:
    """Return phrase -> value from value -> phrases that are separated by "|"."""
    return {phrase: value for value, texts in table.items() for phrase in texts.split("|")}


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


_SHAPE_NAMES = phrases(
    {name: name for name in SHAPES}
    | {"circle": "circle|disc|disk", "square": "square|box", "ring": "ring|donut|hoop|doughnut"}
    | {"cross": "cross|plus|plus sign", "crescent": "crescent|moon|crescent moon"}
)
_PATTERNS = {
    "plain": "plain|simple|solid",
    "striped": "striped|stripy|stripes",
    "dotted": "dotted|spotted|polka dot|polka dots|dots|spots",
    "checkered": "checkered|checked|chequered|checkerboard|checks",
}
_RELATIONS = {
    "left of": "left of|left side of",
    "right of": "right of|right side of",
    "above": "above|over|on top of|higher than",
    "below": "below|under|underneath|beneath|lower than",
    "inside": "inside|inside of|within|in the middle of|in the center of",
    "around": "around|surrounding|surrounds|containing|contains",
}
_PLACES = {"center": "middle|center|centre", "top": "top", "bottom": "bottom", "left": "left", "right": "right"}
_CORNERS = {
    f"{down}_{side}": f"{down} {side}|{other} {side}"
    for down, other in (("top", "upper"), ("bottom", "lower"))
    for side in ("left", "right")
}
_WORDS = {
    "THE": phrases({"the": "the"}),
    "NUMBER": phrases({1: "a|an|1|a single|single", 2: "two|2|a pair of|a couple of|both", 3: "three|3", 4: "four|4"}),
    "ONE": phrases({1: "one"}),
    "SIZE": phrases({"small": "small|little|tiny", "large": "large|big|huge", "": "medium"}),
    "COLOR": phrases({name: name for name in COLORS} | {"purple": "purple|violet", "gray": "gray|grey"}),
    "PATTERN": phrases(_PATTERNS),
    "SHAPE": _SHAPE_NAMES,
    "SHAPES": {_plural(noun): name for noun, name in _SHAPE_NAMES.items()},
    "RELATION": phrases(_RELATIONS),
    "BARE": phrases({"above": "on top", "inside": "in it|in them"}),
    "PLACE": phrases(_PLACES | _CORNERS),
    "BACKGROUND": phrases({"": "background|backdrop"}),
    "ONES": phrases({"": "ones"}),
    "IT": phrases({"": "it|them"}),
    "IN": phrases({"": "in"}),
    "SKIP": phrases({"": "in front of|image contains|picture contains|scene contains"}),
    "ON": phrases({"": "on|on a|against|against a"}),
    "WITH": phrases({"": "with"}),
    "BREAK": phrases({"": "and|,|.|;"}),
}
Token = tuple[str, str | int]


def by_words(kinds: Mapping[str, Mapping[str, str | int]]) -> dict[tuple[str, ...], Token]:
    """Return the words of each phrase -> its kind and value."""
    return {tuple(phrase.split()): (kind, value) for kind, table in kinds.items() for phrase, value in table.items()}


PHRASES = by_words(_WORDS)
_PLACE_RELATION = {"center": "inside", "left": "left of", "right": "right of", "top": "above", "bottom": "below"}


def read_tokens(text: str, known: dict[tuple[str, ...], Token] = PHRASES) -> list[Token]:
    """Return the known phrases of a text, longest first, as (kind, value)."""
    longest = max(map(len, known))
    words = re.findall(r"[a-z0-9]+|[,.;]", text.lower())
    found: list[Token] = []
    at = 0
    while at < len(words):
        for length in range(min(longest, len(words) - at), 0, -1):
            token = known.get(tuple(words[at : at + length]))
            if token is not None:
                if token[0] != "SKIP":
                    found.append(token)
                at += length
                break
        else:
            at += 1
    return found


def _background_span(kinds: list[str]) -> tuple[int, int] | None:
    """Return where the background stands: "plain white background", "background is white with dots"."""
    if "BACKGROUND" not in kinds:
        for start in (at for at, kind in enumerate(kinds) if kind == "ON"):
            # "on striped white" at the end of a clause; "on white squares" is not a background
            stop = start + 1
            while stop < len(kinds) and kinds[stop] in ("COLOR", "PATTERN"):
                stop += 1
            if stop > start + 1:
                stop += 2 * (kinds[stop : stop + 2] == ["WITH", "PATTERN"])
                if kinds[stop : stop + 1] in ([], ["BREAK"]):
                    return start, stop
        return None
    middle = kinds.index("BACKGROUND")
    start, stop = middle, middle + 1
    while start > 0 and kinds[start - 1] in ("COLOR", "PATTERN"):
        start -= 1
    if start == middle:
        while stop < len(kinds) and kinds[stop] in ("COLOR", "PATTERN"):
            stop += 1
    if kinds[stop : stop + 2] == ["WITH", "PATTERN"]:
        stop += 2
    if kinds[max(start - 2, 0) : start] == ["WITH", "NUMBER"]:
        return start - 2, stop
    return start - (kinds[max(start - 1, 0) : start] == ["WITH"]), stop


def take_background(tokens: list[Token]) -> tuple[str, str, list[Token]]:
    """Return the background's color and pattern, "" where not given, and the tokens without it."""
    span = _background_span([kind for kind, _ in tokens])
    if span is None:
        return "", "", tokens
    given = {kind: str(value) for kind, value in tokens[span[0] : span[1]]}
    return given.get("COLOR", ""), given.get("PATTERN", ""), tokens[: span[0]] + tokens[span[1] :]


def noun_phrase(tokens: list[Token], at: int) -> tuple[AskedGroup, bool, int] | None:
    """Return a figure's words at a position: (what is asked, whether "the" stands before it, position behind it)."""
    definite, count, size, color, adjectives = False, 0, "", "", 0
    if at < len(tokens) and tokens[at][0] == "THE":
        definite, at = True, at + 1
    if at < len(tokens) and tokens[at][0] in ("NUMBER", "ONE"):
        count, at = int(tokens[at][1]), at + 1
    while at < len(tokens) and tokens[at][0] in ("SIZE", "COLOR"):
        adjectives += 1
        if tokens[at][0] == "SIZE":
            size = str(tokens[at][1])
        else:
            color = str(tokens[at][1])
        at += 1
    if at < len(tokens) and tokens[at][0] in ("SHAPE", "SHAPES"):
        count = count or int(tokens[at][0] == "SHAPE")
        return AskedGroup(count, size, color, str(tokens[at][1])), definite, at + 1
    if at < len(tokens) and adjectives and tokens[at][0] in ("ONE", "ONES"):
        return AskedGroup(count, size, color, ""), definite, at + 1
    return None


class _Reader:
    """Goes over the tokens of a prompt; the last figure named is the subject of the next relation."""

    def __init__(self) -> None:
        self.groups: list[AskedGroup] = []
        self.relations: list[tuple[int, str, int]] = []
        self.last: int | None = None  # figure named last
        self.owner: int | None = None  # figure before "with"
        self.waiting: tuple[int | None, str] | None = None  # subject and relation whose object is still to come
        self.front: tuple[str, int] | None = None  # relation and object whose subject is still to come

    def relate(self, subject: int, relation: str, other: int) -> None:
        """Note a relation once; "around" is "inside" from the other side."""
        if relation == "around":
            subject, relation, other = other, "inside", subject
        if subject != other and (subject, relation, other) not in self.relations:
            self.relations.append((subject, relation, other))

    def figure(self, asked: AskedGroup, definite: bool) -> None:
        """Take a figure: a new one, or one that was named before ("the ring", "the blue one")."""
        known = [
            index
            for index, group in enumerate(self.groups)
            if asked.color in ("", group.color) and asked.shape in ("", group.shape)
        ]
        if definite and known:
            index = known[0]
        else:
            index = len(self.groups)
            self.groups.append(asked)
        if self.waiting is not None:
            subject, relation = self.waiting
            if subject is None:
                self.front = (relation, index)
            else:
                self.relate(subject, relation, index)
            self.waiting = None
        elif self.front is not None:
            self.relate(index, *self.front)
            self.front = None
        self.last = index

    def pronoun(self) -> None:
        """Take "it" or "them" as the object of the relation before it."""
        if self.waiting is not None and self.waiting[0] is not None:
            subject, relation = self.waiting
            others = [index for index in (self.owner, 0) if index is not None and index != subject]
            if others:
                self.relate(subject, relation, others[0])
        self.waiting = None

    def place(self, place: str) -> None:
        """Take "in the middle": a relation behind "with" ("a ring with a star in the middle"), else a place."""
        if self.last is None:
            return
        if self.owner is not None and self.owner != self.last and place in _PLACE_RELATION:
            self.relate(self.last, _PLACE_RELATION[place], self.owner)
        else:
            self.groups[self.last] = replace(self.groups[self.last], place=place)

    def stop(self) -> None:
        """End a clause: a relation without object belongs to the figure before "with" ("... with a star inside")."""
        if self.waiting is not None and self.owner is not None and self.waiting[0] is not None:
            self.relate(self.waiting[0], self.waiting[1], self.owner)
        self.waiting = None

    def read(self, tokens: list[Token]) -> None:
        """Take all tokens of a prompt without its background."""
        at = 0
        while at < len(tokens):
            phrase = noun_phrase(tokens, at)
            if phrase is not None:
                self.figure(phrase[0], phrase[1])
                at = phrase[2]
                continue
            kind, value = tokens[at]
            at += 1
            self.word(kind, str(value), tokens, at)
        self.stop()

    def word(self, kind: str, value: str, tokens: list[Token], behind: int) -> None:
        """Take one token that is not part of a figure's words; `behind` is the position after it."""
        if kind == "RELATION" or (kind == "IN" and noun_phrase(tokens, behind) is not None):
            self.waiting = (self.last, value or "inside")
        elif kind == "COLOR" and self.last is not None and not self.groups[self.last].color:
            self.groups[self.last] = replace(self.groups[self.last], color=value)
        elif kind == "WITH":
            self.owner = self.last
        elif kind == "IT":
            self.pronoun()
        elif kind == "BARE" and self.last is not None:
            self.waiting = (self.last, value)
            self.stop()
        elif kind == "PLACE":
            self.place(value)
        elif kind == "BREAK":
            self.stop()


def read_prompt(text: str) -> Request:
    """Read a prompt.

    Args:
        text: words such as "two small green stars above a purple ring, white background".

    Returns:
        What the prompt asks for.

    Raises:
        ValueError: no word of the prompt names a figure.
    """
    background, pattern, tokens = take_background(read_tokens(text))
    reader = _Reader()
    reader.read(tokens)
    if not reader.groups:
        raise ValueError(f"prompt {text!r} names no figure; it needs one of: {', '.join(SHAPES)}.")
    return Request(tuple(reader.groups), tuple(reader.relations), background, pattern)
