"""The synthetic data sets by name: pictures of shapes and of single figures, clips of shapes, views of solids."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from scripts.datasets.layouts import (
    FIGURE_NUMBERS,
    FIGURES,
    FORM_NUMBERS,
    FORMS,
    clip_layout,
    scene_layout,
    views_layout,
)
from scripts.datasets.shapes import (
    COLORS,
    SHAPES,
    VOCABULARY,
    class_name,
    describe,
    is_held_out,
    render,
    sample_figure,
    sample_scene,
)
from scripts.datasets.shapes.motion import FRAMES, Clip, is_held_out_clip, render_clip, sample_clip
from scripts.datasets.shapes.motion_captions import CLIP_VOCABULARY, describe_clip
from scripts.datasets.solids import VIEW_VOCABULARY, describe_object, is_held_out_object, render_views, sample_object


@dataclass(frozen=True)
class DataSet:
    """One synthetic data set.

    Attributes:
        length: Pictures of a sample, unless a setting says otherwise.
        frame_stride: Pictures per latent frame after the first: 4 where the VAE decodes time, 1 where it decodes
            pictures.
        vocabulary: Words of its captions and canonical forms.
        sample: (generator, held_out) -> a sample; `held_out` as for `sample_scene`.
        is_held_out: Whether a sample holds a combination that training never sees.
        describe: (sample, generator) -> caption and canonical form.
        render: (sample, size, length) -> uint8 (length, size, size, 3).
        layout_kinds: What may stand at a token beside the background.
        layout: (sample, side, latent frames) -> what stands at each token, see `scripts.datasets.layouts`.
        layout_numbers: How many numbers the layout has of each token, behind kind and color.
        reverse: Sample -> itself with time running backwards, or None; None where there is no time.
        training_chance: Sample -> chance in (0, 1] that training takes it; None where it takes all.
        rare_phrase: Part of canonical forms that training meets more often than captions give it by chance; "" = none.
    """

    length: int
    frame_stride: int
    vocabulary: tuple[str, ...]
    sample: Callable[..., Any]
    is_held_out: Callable[[Any], bool]
    describe: Callable[[Any, np.random.Generator], tuple[str, str]]
    render: Callable[[Any, int, int], np.ndarray]
    layout_kinds: tuple[str, ...]
    layout: Callable[[Any, int, int], np.ndarray]
    layout_numbers: int
    reverse: Callable[[Any], Any] | None = None
    training_chance: Callable[[Any], float] | None = None
    rare_phrase: str = ""

    def sample_for_training(self, generator: np.random.Generator) -> Any:
        """Return a sample to train on, each taken with its `training_chance`."""
        while True:
            sample = self.sample(generator, held_out=False)
            if self.training_chance is None or generator.random() < self.training_chance(sample):
                return sample

    def caption_for_training(self, sample: Any, generator: np.random.Generator) -> str:
        """Return a caption to train on; one without `rare_phrase` is written again, once."""
        caption, canonical = self.describe(sample, generator)
        return caption if self.rare_phrase in canonical else self.describe(sample, generator)[0]


def clip_chance(clip: Clip) -> float:
    """Return the chance that training takes a clip: what is hard is taken more often than what is easy.

    Hardest are figures that cross sideways, then single ways to the sides and changes.
    """
    motion = clip.actors[0].motion
    if motion in ("left", "right"):
        return 1.0 if clip.crossing else 0.3
    return {"changes": 0.3, "bounces": 0.25, "rotates": 0.2, "up": 0.12, "down": 0.12}.get(motion, 0.07)


DATA_SETS: dict[str, DataSet] = {
    "pictures": DataSet(
        length=1,
        frame_stride=1,
        vocabulary=VOCABULARY,
        sample=sample_scene,
        is_held_out=is_held_out,
        describe=describe,
        render=lambda scene, size, length: render(scene, size)[None],
        layout_kinds=FIGURES,
        layout=lambda scene, side, frames: scene_layout(scene, side),
        layout_numbers=FIGURE_NUMBERS,
    ),
    "figures": DataSet(
        length=1,
        frame_stride=1,
        vocabulary=(*COLORS, *SHAPES),
        sample=sample_figure,
        is_held_out=lambda scene: False,
        describe=lambda scene, rng: (class_name(scene), class_name(scene)),
        render=lambda scene, size, length: render(scene, size)[None],
        layout_kinds=FIGURES,
        layout=lambda scene, side, frames: scene_layout(scene, side),
        layout_numbers=FIGURE_NUMBERS,
    ),
    "clips": DataSet(
        length=FRAMES,
        frame_stride=4,
        vocabulary=CLIP_VOCABULARY,
        sample=sample_clip,
        is_held_out=is_held_out_clip,
        describe=describe_clip,
        render=render_clip,
        layout_kinds=FIGURES,
        layout=clip_layout,
        layout_numbers=FIGURE_NUMBERS,
        reverse=Clip.reversed,
        training_chance=clip_chance,
        rare_phrase=" cross ; ",
    ),
    "views": DataSet(
        length=8,
        frame_stride=1,
        vocabulary=VIEW_VOCABULARY,
        sample=sample_object,
        is_held_out=is_held_out_object,
        describe=describe_object,
        render=lambda obj, size, length: render_views(obj, length, size),
        layout_kinds=FORMS,
        layout=views_layout,
        layout_numbers=FORM_NUMBERS,
    ),
}


def find_data_set(name: str) -> DataSet:
    """Return the data set of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in DATA_SETS:
        raise ValueError(f"data set {name!r} is not known; one of: {', '.join(DATA_SETS)}.")
    return DATA_SETS[name]


def pick_data_set(shares: Mapping[str, float], roll: float) -> str:
    """Return the name of the data set on which a roll in [0, 1) falls, each being as wide as its share.

    Raises:
        ValueError: A name is not known, or the shares do not add up to 1.
    """
    for name in shares:
        find_data_set(name)
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"shares {dict(shares)} add up to {sum(shares.values()):g}; they must add up to 1.")
    for name, share in shares.items():
        roll -= share
        if roll < 0:
            return name
    return name
