"""Captions of a picture: its label, its tags, its style, its ground, in several forms with weights."""

import numpy as np

from scripts.datasets.emoji.drawing import WHITE
from scripts.datasets.emoji.icons import TONES, WORDS, Emoji

LIKE_A_CONSONANT = ("uni", "uku", "eu", "one ")  # "a unicorn"


def article(words: str) -> str:
    """Return "a" or "an"."""
    words = words.lower()
    return "an" if words[:1] in tuple("aeiou") and not words.startswith(LIKE_A_CONSONANT) else "a"


def subject(emoji: Emoji) -> str:
    """Return the label, with the tone of the skin where it has one."""
    return f"{emoji.label} with {TONES[emoji.tone]} skin" if emoji.tone else emoji.label


def main_caption(emoji: Emoji, style: str, ground: str = WHITE) -> str:
    """Return the plainest caption, which is also the prompt of the evaluation: "a dog face, flat"."""
    name = subject(emoji)
    return f"{article(name)} {name}, {WORDS[style]}{on(ground)}"


def on(ground: str) -> str:
    """Return the words for a ground; white has none."""
    return "" if ground == WHITE else f", on {article(ground)} {ground} background"


def captions(emoji: Emoji, style: str, ground: str, choice: np.random.Generator) -> list[tuple[str, float]]:
    """Return captions with their weights, the plainest first; the generator chooses tags and how a ground is said."""
    name, words = subject(emoji), WORDS[style]
    tags = [tag for tag in emoji.tags if tag.lower() not in emoji.label.lower()]
    tags = [str(tag) for tag in choice.permutation(tags)]
    skin = f" with {TONES[emoji.tone]} skin" if emoji.tone else ""
    forms = [
        (f"{article(name)} {name}, {words}", 3.0),
        (f"{words} emoji of {article(name)} {name}", 2.0),
        (f"{name}, {words}", 1.0),
        (f"{article(emoji.label)} {emoji.label} emoji{skin}, {words}", 1.0),
    ]
    if tags:
        forms += [(f"{name} ({', '.join(tags[:2])}) in {words}", 1.0), (f"{name}, {tags[-1]}, {words}", 1.0)]
    if len(tags) > 2:  # fewer do not say which emoji is meant
        forms.append((f"{', '.join(tags[:3])}{skin}, {words}", 0.5))
    return [(_with_ground(text, ground, choice), weight) for text, weight in forms]


def _with_ground(text: str, ground: str, choice: np.random.Generator) -> str:
    """Return a caption that says the ground; of white, one in four does."""
    if ground == WHITE and choice.random() < 0.75:
        return text
    if choice.random() < 0.25:
        return f"{text}, {ground} background"
    return f"{text}, on {article(ground)} {ground} background"
