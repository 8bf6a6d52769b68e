"""Read what a prompt for a clip asks for: figures, what each does, and the background.

The grammar of motion, on top of that of `pictures.prompt`. Words that are not known are skipped.
"""

from dataclasses import dataclass, replace

from scripts.verifiers.pictures.prompt import PHRASES, AskedGroup, Token, noun_phrase, read_tokens, take_background
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


_ING = {"move": "mov", "slide": "slid", "glide": "glid", "cross": "cross", "rest": "rest", "bounce": "bounc"}


def _forms(verb: str) -> tuple[str, str, str]:
    """Return a verb, what one does, and doing it: move, moves, moving."""
    third = verb + ("es" if verb.endswith(("s", "o")) else "s")
    return verb, third, _ING.get(verb, verb[:-1] if verb.endswith("e") else verb) + "ing"


def _every(verbs: str, rest: tuple[str, ...] = ("",)) -> list[str]:
    return [f"{form} {tail}".strip() for verb in verbs.split() for form in _forms(verb) for tail in rest]


_GETS = ["gets", "get", "getting", "becomes", "become", "becoming", "grows", "grow", "growing"]
_WORDS: dict[str, dict[str, str]] = {
    "MOVE": dict.fromkeys(_every("move slide glide go travel") + ["travelling", "flies", "flying", "moved"], ""),
    "WAY": {
        "from right to left": "left",
        "from left to right": "right",
        "from bottom to top": "up",
        "from top to bottom": "down",
        "left side": "left",
        "right side": "right",
        "left": "left",
        "right": "right",
        **dict.fromkeys(("up", "upwards", "upward", "top"), "up"),
        **dict.fromkeys(("down", "downwards", "downward", "bottom"), "down"),
    },
    "DOES": {
        **dict.fromkeys(_every("rotate spin turn", ("", "around")) + ["spinning", "spinning around"], "rotates"),
        **dict.fromkeys(
            _every("grow") + [f"{verb} {size}" for verb in _GETS for size in ("bigger", "larger")], "grows"
        ),
        **dict.fromkeys(_every("shrink") + [f"{verb} smaller" for verb in _GETS], "shrinks"),
        **dict.fromkeys(_every("bounce jump", ("", "up and down")), "bounces"),
        **dict.fromkeys(_every("stand stay", ("", "still")) + _every("rest"), "stays"),
        **dict.fromkeys(("does not move", "do not move", "not moving"), "stays"),
    },
    "CHANGE": dict.fromkeys(
        _every("turn change become", ("", "to", "into", "colour to", "color to", "its colour to", "its color to")), ""
    ),
    "CROSS": dict.fromkeys(_every("cross pass", ("", "each other")), ""),
}
_MOTION_PHRASES: dict[tuple[str, ...], Token] = {
    tuple(phrase.split()): (kind, value) for kind, table in _WORDS.items() for phrase, value in table.items()
}
_ALL: dict[tuple[str, ...], Token] = {
    **{phrase: token for phrase, token in PHRASES.items() if token[0] not in ("PLACE", "RELATION", "BARE")},
    **_MOTION_PHRASES,
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
