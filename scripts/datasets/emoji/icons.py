"""Icons of the sets as SVG texts, joined with labels and tags by code point."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.datasets.emoji.packages import read_json

STYLES = {"noto": "shaded", "fluent": "soft 3D", "fluent-flat": "flat", "twemoji": "bold flat"}  # set -> style words
FIFTH = "fluent-high-contrast"  # a set that only a LoRA learns
WORDS = {**STYLES, FIFTH: "black ink"}  # which captions of the four use, too
FAMILIES = {"noto": "noto", "fluent": "fluent", "fluent-flat": "fluent", "twemoji": "twemoji"}  # drawn by one hand
TONES = ("", "light", "medium-light", "medium", "medium-dark", "dark")  # of skin, by Unicode's number; 0 = yellow
# The three faces whose yellow comes out only where a gradient does not inherit the transform of the one it refers to.
NOT_INHERITED = ("thinking-face", "face-with-hand-over-mouth", "face-with-open-eyes-and-hand-over-mouth")
GRADIENT = re.compile(r"<(linear|radial)Gradient\b[^>]*>")


@dataclass(frozen=True)
class Emoji:
    """One emoji in one skin tone.

    Attributes:
        code: Code points, lower case, without variation selectors: "1f469-1f680".
        label: Of the emoji without a tone: "woman astronaut".
        tags: Other words for it.
        tone: Of its skin, an index of TONES.
        group, subgroup: "animals-nature", "animal-mammal".
        base: Code of the emoji without a tone.
    """

    code: str
    label: str
    tags: tuple[str, ...]
    tone: int
    group: str
    subgroup: str
    base: str


def plain_code(code: str) -> str:
    """Return code points in the form in which they are compared: "1F44B-FE0F" -> "1f44b"."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def read_emoji(packages: Path) -> list[Emoji]:
    """Return all emoji with their tones; those of two people in different tones are left out.

    Args:
        packages: Folder of the packages.
    """
    names = read_json(packages, "emojibase", "meta/groups.json")
    found = []
    for line in read_json(packages, "emojibase", "en/data.json"):
        if "group" not in line:  # letters of flags
            continue
        group, subgroup = names["groups"][str(line["group"])], names["subgroups"][str(line["subgroup"])]
        base = plain_code(line["hexcode"])
        for tone in (line, *line.get("skins", ())):
            if isinstance(number := tone.get("tone", 0), int):
                code = plain_code(tone["hexcode"])
                facts = (line["label"], tuple(line.get("tags", ())), number, group, subgroup, base)
                found.append(Emoji(code, *facts))
    return found


def read_names(packages: Path, style: str) -> dict[str, str]:
    """Return code -> name of the icon of a set. The 3D set has no table; its names are those of the flat one."""
    table = read_json(packages, "fluent-flat" if style == "fluent" else style, "chars.json")
    return {plain_code(code): name for code, name in table.items()}


def read_svgs(packages: Path, style: str) -> dict[str, str]:
    """Return code -> SVG text of a set, square."""
    icons = read_json(packages, style, "icons.json")
    names = read_names(packages, style)
    return {code: svg_text(style, name, icons) for code, name in names.items() if name in icons["icons"]}


def svg_text(style: str, name: str, icons: Mapping[str, Any]) -> str:
    """Return the SVG of an icon, padded to a square around its center."""
    icon = icons["icons"][name]
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    side = max(width, height)
    box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    body = icon["body"]
    if style == "noto" and name not in NOT_INHERITED:
        body = with_inherited_transforms(body)
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {space} viewBox="{box}">{body}</svg>'


def with_inherited_transforms(body: str) -> str:
    """Copy gradientTransform to gradients from the one that they refer to, as SVG asks; resvg does not do so."""
    transforms = {}
    for match in GRADIENT.finditer(body):
        if (name := _attribute(match[0], "id")) and (value := _attribute(match[0], "gradientTransform")):
            transforms[name] = value

    def complete(match: re.Match[str]) -> str:
        tag = match[0]
        value = transforms.get(_attribute(tag, "href").lstrip("#"))
        if not value or _attribute(tag, "gradientTransform"):
            return tag
        end = "/>" if tag.endswith("/>") else ">"
        return f'{tag[: -len(end)]} gradientTransform="{value}"{end}'

    return GRADIENT.sub(complete, body)


def _attribute(tag: str, name: str) -> str:
    match = re.search(rf'(?:^|[\s:]){name}="([^"]*)"', tag)
    return match[1] if match else ""
