"""Read what a prompt for a clip asks for: figures, what each does, and the background.

The grammar of motion, on top of that of `pictures.prompt`. Words that are not known are skipped.
"""

from dataclasses import dataclass, replace

from scripts.verifiers.pictures.prompt import (
    PHRASES,
    AskedGroup,
    Token,
    by_words,
    noun_phrase,
    phrases,
    read_tokens,
    take_background,
)
from scripts.verifiers.pictures.shapes import SHAPES


@dataclass(frozen=True)
class AskedFigure:
    """A figure that is asked for, what it does ("cross": passes the other, "": not given) and its last color."""

    figure: AskedGroup
    motion: str = ""
    new_color: str = ""


@dataclass(frozen=True)
class ClipRequest:
    """What a prompt asks for; background and pattern are "" when not given."""

    figures: tuple[AskedFigure, ...]
    background: str = ""
    pattern: str = ""


def _forms(verb: str) -> tuple[str, str, str]:
    """Return a verb, what one does, and doing it: move, moves, moving."""
    return verb, verb + ("es" if verb.endswith(("s", "o")) else "s"), verb.removesuffix("e") + "ing"


def _every(verbs: str, tails: str = "") -> str:
    """Return all forms of verbs, each with each tail; tails and the result are separated by "|"."""
    return "|".join(
        f"{form} {tail}".strip() for verb in verbs.split() for form in _forms(verb) for tail in tails.split("|")
    )


_GETTING = "gets|get|getting|becomes|become|becoming|grows|grow|growing".split("|")
_GETTING_LARGER = [f"{verb} {size}" for verb in _GETTING for size in ("bigger", "larger")]
_WORDS = {
    "MOVE": phrases({"": _every("move slide glide go travel") + "|travelling|flies|flying|moved"}),
    "WAY": phrases(
        {
            "left": "from right to left|left side|left",
            "right": "from left to right|right side|right",
            "up": "from bottom to top|up|upwards|upward|top",
            "down": "from top to bottom|down|downwards|downward|bottom",
        }
    ),
    "DOES": phrases(
        {
            "rotates": _every("rotate spin turn", "|around") + "|spinning|spinning around",
            "grows": "|".join([_every("grow"), *_GETTING_LARGER]),
            "shrinks": "|".join([_every("shrink"), *(f"{verb} smaller" for verb in _GETTING)]),
            "bounces": _every("bounce jump", "|up and down"),
            "stays": _every("stand stay", "|still") + "|" + _every("rest") + "|does not move|do not move|not moving",
        }
    ),
    "CHANGE": phrases({"": _every("turn change become", "|to|into|colour to|color to|its colour to|its color to")}),
    "CROSS": phrases({"": _every("cross pass", "|each other")}),
}
_ALL: dict[tuple[str, ...], Token] = {
    **{phrase: token for phrase, token in PHRASES.items() if token[0] not in ("PLACE", "RELATION", "BARE")},
    **by_words(_WORDS),
    ("cross",): ("SHAPE", "cross"),  # a shape behind a color, else what figures do
    ("crosses",): ("SHAPES", "cross"),
}


def _verbs_of_cross(tokens: list[Token]) -> list[Token]:
    """Read "cross" as a verb unless a word of a figure stands before it; it is one in "a ring in red crosses"."""
    found = []
    for at, (kind, value) in enumerate(tokens):
        before = [other for other, _ in tokens[max(0, at - 2) : at]]
        named = before[-1:] and before[-1] in ("THE", "NUMBER", "ONE", "SIZE", "COLOR") and before != ["IN", "COLOR"]
        found.append(
            ("CROSS", "") if value == "cross" and kind in ("SHAPE", "SHAPES") and not named else (kind, value)
        )
    return found


def _turning(tokens: list[Token], at: int) -> str:
    """Return the color behind a verb that may mean a change of color, else ""."""
    return str(tokens[at + 1][1]) if at + 1 < len(tokens) and tokens[at + 1][0] == "COLOR" else ""


def read_clip_prompt(text: str) -> ClipRequest:
    """Read a prompt such as "a red star moves left while a blue ring stands still, white background".

    Raises:
        ValueError: no word of the prompt names a figure.
    """
    background, pattern, tokens = take_background(_verbs_of_cross(read_tokens(text, _ALL)))
    figures: list[AskedFigure] = []
    crossing, moving, at = False, False, 0
    while at < len(tokens):
        phrase = noun_phrase(tokens, at)
        if phrase is not None:
            figures.append(AskedFigure(phrase[0]))
            at, moving = phrase[2], False
            continue
        kind, value = tokens[at]
        color = _turning(tokens, at)
        if figures and not figures[-1].motion:
            if color and (kind == "CHANGE" or (kind == "DOES" and value == "rotates")):
                figures[-1] = AskedFigure(figures[-1].figure, "changes", color)
                at += 1
            elif kind == "DOES":
                figures[-1] = AskedFigure(figures[-1].figure, str(value))
            elif kind == "WAY" and moving:
                figures[-1] = AskedFigure(figures[-1].figure, str(value))
            elif kind == "COLOR" and not figures[-1].figure.color:  # "a ring in black"
                figures[-1] = AskedFigure(replace(figures[-1].figure, color=str(value)))
        moving = kind == "MOVE" or (moving and kind == "THE")
        crossing |= kind == "CROSS"
        at += 1
    if not figures:
        raise ValueError(f"prompt {text!r} names no figure; it needs one of: {', '.join(SHAPES)}.")
    if crossing:
        figures = [AskedFigure(each.figure, each.motion or "cross") for each in figures]
    return ClipRequest(tuple(figures), background, pattern)
