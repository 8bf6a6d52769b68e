"""Read what a prompt for views asks for: solids, their marks, how they stand, the camera's height, the background.

The grammar of solids, on top of the words of `pictures.prompt`. Words that are not known are skipped.
"""

from dataclasses import dataclass, replace

from scripts.verifiers.pictures.prompt import PHRASES, by_words, phrases, read_tokens, take_background

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


_SYNONYMS = {"cube": "block|box", "ball": "sphere|orb", "torus": "donut|doughnut|ring", "mug": "cup"}
_RELATIONS = {
    "on": "on top of|above|over|standing on|sitting on|placed on|standing on a|sitting on a|placed on a",
    "under": "under|below|underneath|beneath|on top",
    "beside": "beside|next to|left of",
    "right of": "right of",
}
_WORDS = {
    "SOLID": phrases({name: f"{name}|{name}s" for name in SOLIDS}) | phrases(_SYNONYMS),
    "MARK": phrases({"stripe": "stripe|line|band", "dot": "dot|spot"}),
    "RELATION": phrases(_RELATIONS),
    "VIEW": phrases({"above": "from above", "side": "from the side|eye level"}),
}
_KEPT = ("NUMBER", "ONE", "COLOR", "PATTERN", "BACKGROUND", "ON", "IN", "WITH", "BREAK")
_ALL = {phrase: token for phrase, token in PHRASES.items() if token[0] in _KEPT} | by_words(_WORDS)


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
