"""Read what a prompt for views asks for: solids, their marks, how they stand, the camera's height, the background.

The grammar of solids, on top of the words of `pictures.prompt`. Words that are not known are skipped.
"""

from dataclasses import dataclass, replace

from scripts.verifiers.pictures.prompt import PHRASES, Token, read_tokens, take_background

SOLIDS = ("cube", "ball", "cone", "cylinder", "torus", "pyramid", "mug")


@dataclass(frozen=True)
class AskedPart:
    """A solid that is asked for, with its mark ("stripe", "dot"); "" where the prompt leaves something open."""

    solid: str
    color: str = ""
    mark: str = ""
    mark_color: str = ""


@dataclass(frozen=True)
class ViewsRequest:
    """What a prompt asks for; relation "on" or "beside" (then the first is left), view "above" or "side", or ""."""

    parts: tuple[AskedPart, ...]
    relation: str = ""
    view: str = ""
    background: str = ""


_WORDS: dict[str, dict[str, str]] = {
    "SOLID": {
        **{word: name for name in SOLIDS for word in (name, name + "s")},
        **dict.fromkeys(("block", "box"), "cube"),
        **dict.fromkeys(("sphere", "orb"), "ball"),
        **dict.fromkeys(("donut", "doughnut", "ring"), "torus"),
        "cup": "mug",
    },
    "MARK": {**dict.fromkeys(("stripe", "line", "band"), "stripe"), **dict.fromkeys(("dot", "spot"), "dot")},
    "RELATION": {
        **dict.fromkeys(("on top of", "above", "over", "standing on", "sitting on", "placed on"), "on"),
        **dict.fromkeys(("standing on a", "sitting on a", "placed on a"), "on"),
        **dict.fromkeys(("under", "below", "underneath", "beneath", "on top"), "under"),
        **dict.fromkeys(("beside", "next to", "left of"), "beside"),
        "right of": "right of",
    },
    "VIEW": {"from above": "above", "from the side": "side", "eye level": "side"},
}
_KEPT = ("NUMBER", "ONE", "COLOR", "PATTERN", "BACKGROUND", "ON", "IN", "WITH", "BREAK")
_ALL: dict[tuple[str, ...], Token] = {
    **{phrase: token for phrase, token in PHRASES.items() if token[0] in _KEPT},
    **{tuple(phrase.split()): (kind, value) for kind, table in _WORDS.items() for phrase, value in table.items()},
}


def read_views_prompt(text: str) -> ViewsRequest:
    """Read a prompt such as "a red ball with a white stripe on a blue cube, seen from above".

    Raises:
        ValueError: no word of the prompt names a solid, or more than two do.
    """
    background, _, tokens = take_background(read_tokens(text, _ALL))
    parts: list[AskedPart] = []
    relation, view, color, last = "", "", "", ""
    for kind, value in tokens:
        if kind == "COLOR" and last == "IN" and parts and parts[-1].mark:  # "a stripe in red"
            parts[-1] = replace(parts[-1], mark_color=str(value))
        elif kind == "COLOR":
            color = str(value)
        elif kind == "SOLID":
            parts.append(AskedPart(str(value), color))
            color = ""
        elif kind == "MARK" and parts:
            parts[-1] = replace(parts[-1], mark=str(value), mark_color=color)
            color = ""
        elif kind == "RELATION" or (kind == "ON" and parts):
            relation = str(value) or relation or "on"
        elif kind == "VIEW":
            view = str(value)
        last = kind
    if not 1 <= len(parts) <= 2:
        raise ValueError(f"prompt {text!r} names {len(parts)} solids; it needs 1 or 2 of: {', '.join(SOLIDS)}.")
    if relation in ("under", "right of"):
        parts, relation = parts[::-1], {"under": "on", "right of": "beside"}[relation]
    return ViewsRequest(tuple(parts), (relation or "beside") if len(parts) == 2 else "", view, background)
