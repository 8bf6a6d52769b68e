"""Captions that change from sample to sample: tags in other orders, tags left out, wildcards."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any
from zlib import crc32

import numpy as np

from ptdit_diffusers.training.randomness import Stream, numpy_generator

WILDCARD = re.compile(r"\{([^{}]*)\}")  # {red|blue}; the innermost of nested ones
ENDING = re.compile(r"\.[\w.-]*\w")


@dataclass(frozen=True, kw_only=True)
class CaptionChoices:
    """What is chosen anew in a caption; the trigger word before it always stays in front.

    Args:
        shuffle_caption: Put the tags into another order.
        caption_tag_dropout_rate: Share of the tags that are left out, 0..1.
        keep_tokens: So many tags at the beginning stay where they are.
        keep_tokens_separator: What stands before the first of them and after the last (`a, b ||| c, d ||| e` changes c
            and d); goes before `keep_tokens` where a caption has it. "" = none.
        caption_separator: Between tags.
        enable_wildcard: Take one of the lines of a caption, and of each {red|blue} one.
        trigger: Word that stands before captions.
    """

    shuffle_caption: bool = False
    caption_tag_dropout_rate: float = 0.0
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    caption_separator: str = ","
    enable_wildcard: bool = False
    trigger: str = ""

    def __post_init__(self) -> None:
        """Raise ValueError naming the first illegal value."""
        changes_tags = self.shuffle_caption or self.caption_tag_dropout_rate > 0
        if not 0 <= (rate := self.caption_tag_dropout_rate) < 1:
            raise ValueError(f"caption_tag_dropout_rate={rate} must be at least 0 and below 1, for example 0.1.")
        if self.keep_tokens < 0:
            raise ValueError(f"keep_tokens={self.keep_tokens} must be at least 0; nearest: 0.")
        if not self.caption_separator.strip():
            raise ValueError(f"caption_separator={self.caption_separator!r} holds no character; nearest: ','.")
        for name in ("keep_tokens", "keep_tokens_separator"):
            if (value := getattr(self, name)) and not changes_tags:
                raise ValueError(f"{name}={value!r} keeps tags that nothing moves; nearest: shuffle_caption: true.")

    @classmethod
    def of(cls, settings: Any) -> "CaptionChoices":
        """Return the choices that settings of the same names ask for.

        Raises:
            ValueError: One is not legal.
        """
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    def __bool__(self) -> bool:
        return self.shuffle_caption or self.caption_tag_dropout_rate > 0 or self.enable_wildcard

    def draw(self, caption: str, choice: np.random.Generator) -> str:
        """Return a caption with everything chosen."""
        if self.trigger and caption == self.trigger:
            return caption
        front = f"{self.trigger}, "
        if self.trigger and caption.startswith(front):
            return front + self.draw(caption.removeprefix(front), choice)
        if self.enable_wildcard:
            lines = [line.strip() for line in caption.splitlines() if line.strip()] or [""]
            caption = lines[choice.integers(len(lines))]
            while match := WILDCARD.search(caption):
                options = match[1].split("|")
                caption = caption[: match.start()] + options[choice.integers(len(options))] + caption[match.end() :]
        if self.shuffle_caption or self.caption_tag_dropout_rate:
            first, moved, last = self.divided(caption)
            moved = [tag for tag in moved if choice.random() >= self.caption_tag_dropout_rate]
            if self.shuffle_caption:
                moved = [moved[i] for i in choice.permutation(len(moved))]
            caption = f"{self.caption_separator} ".join([*first, *moved, *last])
        return caption

    def divided(self, caption: str) -> tuple[list[str], list[str], list[str]]:
        """Return the tags that stay in front, those that may move, and those that stay at the end."""
        if self.keep_tokens_separator and self.keep_tokens_separator in caption:
            first, _, rest = caption.partition(self.keep_tokens_separator)
            moved, _, last = rest.partition(self.keep_tokens_separator)
            return self.tags(first), self.tags(moved), self.tags(last)
        tags = self.tags(caption)
        return tags[: self.keep_tokens], tags[self.keep_tokens :], []

    def tags(self, text: str) -> list[str]:
        """Return the tags of a text."""
        return [tag.strip() for tag in text.split(self.caption_separator) if tag.strip()]

    def variations(self, caption: str, count: int, seed: int) -> list[str]:
        """Return `count` draws of a caption, or the caption alone where nothing is chosen in it.

        They depend on nothing but the arguments. Forms that are drawn several times stay, so that each keeps its share
        where one of them is taken at random.
        """
        drawn = [
            self.draw(caption, numpy_generator(seed, Stream.CAPTION, crc32(caption.encode()), number))
            for number in range(count)
        ]
        return drawn if self else [caption]


def check_ending(name: str, ending: str, media: Sequence[str]) -> None:
    """Raise ValueError unless an ending may be that of caption files; `media` are those of pictures and videos."""
    if not ENDING.fullmatch(ending):
        near = f".{ending.strip('.* ') or 'txt'}"
        raise ValueError(f"{name}={ending!r} is no ending of files; nearest: {near!r}.")
    if ending.lower().endswith(tuple(media)):
        raise ValueError(f"{name}={ending!r} is that of pictures or videos; nearest: '.txt'.")
