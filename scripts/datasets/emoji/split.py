"""What training never sees, as names in split.json; chosen once, by hash, so that near-duplicates stay together.

pairs     label -> family of sets in which it is never seen; the others show the concept, other concepts the style
tones     roles never seen in the tones HIDDEN_TONES
genders   roles of one gender never seen at all, while the others of the same role are
unseen    concepts never seen at all
grounds   [set, ground] never seen together
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from scripts.datasets.emoji.drawing import GROUNDS
from scripts.datasets.emoji.icons import FAMILIES, STYLES
from scripts.datasets.emoji.pictures import ROLES, Picture

FILE = Path(__file__).with_name("split.json")
HIDDEN_TONES = (2, 4)  # medium-light and medium-dark
SHARES = {"unseen": 0.05, "pairs": 0.10}  # of the selected concepts
ROLES_HELD_OUT = 12  # concepts each for tones and for genders
GROUNDS_HELD_OUT = 2  # for each set


@dataclass(frozen=True)
class Split:
    """The names that are held out."""

    unseen: frozenset[str]
    genders: frozenset[str]
    tones: frozenset[str]
    pairs: dict[str, str]
    grounds: frozenset[tuple[str, str]]

    def kind(self, picture: Picture) -> str:
        """Return why training never sees a picture, as a name of the file; "" = it does."""
        label = picture.emoji.label
        if label in self.unseen:
            return "unseen"
        if label in self.genders:
            return "genders"
        if label in self.tones and picture.emoji.tone in HIDDEN_TONES:
            return "tones"
        if self.pairs.get(label) == FAMILIES[picture.style]:
            return "pairs"
        return ""


@cache
def read_split() -> Split:
    """Return what the file of this folder holds out."""
    values = json.loads(FILE.read_text(encoding="utf-8"))
    names = {kind: frozenset(values[kind]) for kind in ("unseen", "genders", "tones")}
    return Split(**names, pairs=values["pairs"], grounds=frozenset(map(tuple, values["grounds"])))


def choose(pictures: Iterable[Picture]) -> dict[str, object]:
    """Return the content of the file for these pictures."""
    concepts = {each.emoji.base: each for each in pictures if each.selected}
    groups: dict[str, list[Picture]] = {}
    for each in concepts.values():
        groups.setdefault(each.twins, []).append(each)
    free = dict(groups)

    def take(purpose: str, count: float, among: Sequence[str]) -> list[Picture]:
        """Take whole groups until so many concepts are taken."""
        found: list[Picture] = []
        for name in sorted(among, key=lambda each: place(purpose, each)):
            if len(found) < count and len(groups[name]) <= count - len(found):
                found += free.pop(name)
        return found

    gendered: dict[str, str] = {}  # one gender of each role
    for name in sorted(groups, key=lambda each: place("gender", each)):
        if all(others(each, concepts.values()) for each in groups[name]):
            gendered.setdefault(role(groups[name][0].emoji.label), name)
    genders = take("genders", ROLES_HELD_OUT, list(gendered.values()))
    roles = [name for name, members in free.items() if all(each.emoji.subgroup == ROLES for each in members)]
    tones = take("tones", ROLES_HELD_OUT, roles)
    things = [name for name, members in free.items() if not any(each.emoji.subgroup == ROLES for each in members)]
    unseen = take("unseen", SHARES["unseen"] * len(concepts), things)
    pairs = take("pairs", SHARES["pairs"] * len(concepts), list(free))
    families = sorted(set(FAMILIES.values()))
    return {
        "unseen": labels(unseen),
        "genders": labels(genders),
        "tones": labels(tones),
        "pairs": {
            each.emoji.label: families[place("family", each.twins) % len(families)]
            for each in sorted(pairs, key=lambda each: each.emoji.label)
        },
        "grounds": [
            [style, ground]
            for number, style in enumerate(STYLES)
            for ground in sorted(GROUNDS, key=lambda each: place("grounds", each))[number * GROUNDS_HELD_OUT :][
                :GROUNDS_HELD_OUT
            ]
        ],
    }


def labels(pictures: Iterable[Picture]) -> list[str]:
    """Return the labels of pictures, sorted."""
    return sorted(each.emoji.label for each in pictures)


def others(picture: Picture, concepts: Iterable[Picture]) -> bool:
    """Return whether a picture is of a role that has two more genders, which are no near-duplicates of it."""
    if picture.emoji.subgroup != ROLES:
        return False
    wanted = role(picture.emoji.label)
    same = [each for each in concepts if each.emoji.subgroup == ROLES and role(each.emoji.label) == wanted]
    return len(same) == 3 and sum(each.twins == picture.twins for each in same) == 1


def role(label: str) -> str:
    """Return a label without its gender."""
    return " ".join(word for word in label.split() if word not in ("man", "woman", "person"))


def place(purpose: str, name: str) -> int:
    """Return a number that says nothing about a name, always the same."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {name}".encode()).digest()[:8], "big")
