"""What there is to learn from: pictures, clips and views, behind one set of names. Must not know any stage."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy

from scripts.datasets.layouts import (
    FIGURE_NUMBERS,
    FIGURES,
    FORM_NUMBERS,
    FORMS,
    clip_layout,
    scene_layout,
    views_layout,
)
from scripts.datasets.shapes import VOCABULARY, describe, is_held_out, render, sample_scene
from scripts.datasets.shapes.motion import FRAMES, Clip, is_held_out_clip, render_clip, sample_clip
from scripts.datasets.shapes.motion_captions import CLIP_VOCABULARY, describe_clip
from scripts.datasets.solids import VIEW_VOCABULARY, describe_object, is_held_out_object, render_views, sample_object


@dataclass(frozen=True)
class World:
    """One kind of thing to draw.

    Attributes:
        length: pictures of each of them, unless a setting says otherwise.
        stride: pictures per latent frame after the first: 4 where the VAE decodes time, 1 where it decodes pictures.
        vocabulary: words of its captions and canonical forms.
        sample: (generator, held_out) -> a thing, as `sample_scene`.
        is_held_out: whether training never sees a thing.
        describe: (thing, generator) -> caption and canonical form.
        render: (thing, size, length) -> uint8 (length, size, size, 3).
        kinds: what may stand at a token beside the background.
        layout: (thing, side, latent frames) -> what stands at each token, see `scripts.datasets.layouts`.
        reversed: thing -> itself with time running backwards, or None; None where there is no time.
        numbers: how many numbers the layout has of each token, behind kind and colour.
        chance: thing -> chance in (0, 1] that training takes one that was drawn; None where it takes all.
        rare: part of canonical forms that training meets more often than captions say it by chance; "" = none.
    """

    length: int
    stride: int
    vocabulary: tuple[str, ...]
    sample: Callable[..., Any]
    is_held_out: Callable[[Any], bool]
    describe: Callable[[Any, numpy.random.Generator], tuple[str, str]]
    render: Callable[[Any, int, int], numpy.ndarray]
    kinds: tuple[str, ...]
    layout: Callable[[Any, int, int], numpy.ndarray]
    numbers: int
    reversed: Callable[[Any], Any] | None = None
    chance: Callable[[Any], float] | None = None
    rare: str = ""

    def draw(self, generator: numpy.random.Generator) -> Any:
        """A thing to train on; what is taken seldom is often drawn anew."""
        while True:
            thing = self.sample(generator, held_out=False)
            if self.chance is None or generator.random() < self.chance(thing):
                return thing

    def caption(self, thing: Any, generator: numpy.random.Generator) -> str:
        """A caption to train on; one that does not say what is rare is written anew, once."""
        text, said = self.describe(thing, generator)
        return text if self.rare in said else self.describe(thing, generator)[0]


def clip_chance(clip: Clip) -> float:
    """Chance that training takes a clip: what is hard is taken more often than what is easy.

    Hardest are figures that cross sideways, then single ways to the sides and changes.
    """
    motion = clip.actors[0].motion
    if motion in ("left", "right"):
        return 1.0 if clip.crossing else 0.3
    return {"changes": 0.3, "bounces": 0.25, "rotates": 0.2, "up": 0.12, "down": 0.12}.get(motion, 0.07)


WORLDS: dict[str, World] = {
    "pictures": World(
        length=1,
        stride=1,
        vocabulary=VOCABULARY,
        sample=sample_scene,
        is_held_out=is_held_out,
        describe=describe,
        render=lambda scene, size, length: render(scene, size)[None],
        kinds=FIGURES,
        layout=lambda scene, side, frames: scene_layout(scene, side),
        numbers=FIGURE_NUMBERS,
    ),
    "clips": World(
        length=FRAMES,
        stride=4,
        vocabulary=CLIP_VOCABULARY,
        sample=sample_clip,
        is_held_out=is_held_out_clip,
        describe=describe_clip,
        render=render_clip,
        kinds=FIGURES,
        layout=clip_layout,
        numbers=FIGURE_NUMBERS,
        reversed=Clip.reversed,
        chance=clip_chance,
        rare=" cross ; ",
    ),
    "views": World(
        length=8,
        stride=1,
        vocabulary=VIEW_VOCABULARY,
        sample=sample_object,
        is_held_out=is_held_out_object,
        describe=describe_object,
        render=lambda thing, size, length: render_views(thing, length, size),
        kinds=FORMS,
        layout=views_layout,
        numbers=FORM_NUMBERS,
    ),
}


def find_world(name: str) -> World:
    """The world of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in WORLDS:
        raise ValueError(f"world {name!r} is not known; one of: {', '.join(WORLDS)}.")
    return WORLDS[name]


def pick_world(shares: Mapping[str, float], roll: float) -> str:
    """Name of the world on which a roll in [0, 1) falls, each being as wide as its share.

    Raises:
        ValueError: a name is not known, or the shares do not add up to 1.
    """
    for name in shares:
        find_world(name)
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"shares {dict(shares)} add up to {sum(shares.values()):g}; they must add up to 1.")
    for name, share in shares.items():
        roll -= share
        if roll < 0:
            return name
    return name
