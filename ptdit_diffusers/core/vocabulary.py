"""What the embedded models were taught, beyond what their word lists hold.

A word list also holds words that no caption of the training uses, and words of the data sets that a model started
from. A model reads such a word and renders something else.
"""

import json
import re
import unicodedata
from collections.abc import Collection
from functools import cache

from .embedded import WEIGHTS

OWN_CAPTIONS = "<own-captions>"  # word of a tokenizer whose model was trained on captions of the user's own
_SHAPES = (
    "circle circles disc discs disk disks square squares box boxes triangle triangles star stars heart hearts ring "
    "rings donut donuts doughnut doughnuts hoop hoops cross crosses plus pluses crescent crescents moon moons"
)
_SOLIDS = "cube block ball sphere cone cylinder torus pyramid mug cup"
_COLORS = "red, orange, yellow, green, blue, purple, pink, brown, black and white (gray: backgrounds only)"
_FIGURES = f"circle, square, triangle, star, heart, ring, cross and crescent in {_COLORS}"
MAKES = {  # data set -> what a model of it can make
    "shapes": f"pictures of one to four of a kind of {_FIGURES}",
    "clips": f"clips and pictures of {_FIGURES}; a figure moves, grows, shrinks, bounces or changes color",
    "views": "views of cube, ball, cone, cylinder, torus, pyramid and mug, alone, on or beside another, with a stripe "
    f"or a dot, in {_COLORS}",
}
_NOUNS = {"shapes": set(_SHAPES.split()), "clips": set(_SHAPES.split()), "views": set(_SOLIDS.split())}
_NEVER = (  # numbers, looks and relations that no caption of any data set holds
    "zero five six no bright dark light tone tones lines edge lowest behind between beyond among along outside "
    "surrounded encloses enclosing contained holding holds"
)
_UNTAUGHT = {
    "shapes": set(f"{_NEVER} not stripe".split()),
    "clips": set(f"{_NEVER} stripe".split()),
    "views": set(
        f"{_NEVER} {_SHAPES} not two three four 2 3 4 pair small large big huge little tiny striped stripes stripy "
        "dotted dots spots spotted polka checked checkered chequered checkerboard checks inside within around "
        "containing surrounding".split()
    ),
}
_NUMBER = "(?:one|two|three|four|1|2|3|4)"
_NUMBERS = re.compile(rf"\b{_NUMBER}(?: {_NUMBER})+\b")
_PATTERN = "(?:plain|simple|solid|striped|stripy|dotted|spotted|polka dot|checkered|checked|chequered|checkerboard)"
_GRAY_GROUND = re.compile(
    rf"\bgr[ae]y(?= (?:{_PATTERN} )*(?:background|backdrop)\b)|(?<=background )gr[ae]y\b|(?<=background is )"
    rf"(?:{_PATTERN} )*gr[ae]y\b|(?<=background ){_PATTERN} gr[ae]y\b"
)


def data_set_of(vocabulary: Collection[str]) -> str | None:
    """Return "shapes", "clips" or "views" for the words of an embedded model, or of one that started from it.

    None for other words, and for a model that was trained on the user's own captions: nobody knows what it was taught.
    """
    if OWN_CAPTIONS in vocabulary or not ("doughnut" in vocabulary and "crescent" in vocabulary):
        return None
    return "views" if "turntable" in vocabulary else "clips" if "bounces" in vocabulary else "shapes"


def untaught_words(vocabulary: Collection[str], prompt: str) -> list[str]:
    """Return what stands in a prompt, although the model of this vocabulary was never taught it; in order, once each.

    Words outside the vocabulary are not among them. Symbols are: the tokenizer drops them.
    """
    kind = data_set_of(vocabulary)
    if kind is None:
        return []
    symbols = [
        sign for sign in prompt if ord(sign) > 127 and unicodedata.category(sign)[0] in "SC" and sign.isprintable()
    ]
    text = plain_words(prompt)
    numbers = _NUMBERS.findall(text)
    words = [word for word in _GRAY_GROUND.sub("", text).split() if word in _UNTAUGHT[kind] | {"gray", "grey"}]
    return list(dict.fromkeys([*symbols, *numbers, *words]))


def refusal(vocabulary: Collection[str], prompt: str, negative: bool = False) -> str | None:
    """Return why a model of this vocabulary cannot make what a prompt says, or None.

    Args:
        vocabulary: Words of the tokenizer.
        prompt: The text, cleaned if it is to be cleaned.
        negative: It is a negative prompt, which need not name a figure.
    """
    kind = data_set_of(vocabulary)
    if kind is None:
        return None
    wrong = untaught_words(vocabulary, prompt)
    if wrong:
        return f"this model was not taught {', '.join(map(repr, wrong))}; it makes {MAKES[kind]}"
    if not negative and not any(_names_something(word, kind, vocabulary) for word in plain_words(prompt).split()):
        return f"the prompt {prompt!r} names nothing that this model can make; it makes {MAKES[kind]}"
    return None


def plain_words(prompt: str) -> str:
    """Return a prompt as the tokenizers of the embedded models split it: small letters and digits, single spaces."""
    letters = unicodedata.normalize("NFKD", prompt).lower()
    letters = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return re.sub(r"[\W_]+", " ", re.sub("['’]", "", letters)).strip()


def _names_something(word: str, kind: str, vocabulary: Collection[str]) -> bool:
    """Whether a word is a noun of the data set, or may be: one that is unknown, or was added to the vocabulary."""
    return word in _NOUNS[kind] or word not in vocabulary or word not in _original_words(kind)


@cache
def _original_words(kind: str) -> frozenset[str]:
    """Return the words of the embedded model of a data set; none where its weights are not installed."""
    paths = sorted(WEIGHTS.glob(f"{kind}-*/tokenizer/tokenizer.json"))
    return frozenset(word for path in paths for word in json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"])
