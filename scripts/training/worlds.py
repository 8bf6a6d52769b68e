"""What there is to learn from: pictures of the drawn world and clips of it in motion, behind one set of names.

Must not know any stage.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy

from scripts.drawn_world import VOCABULARY, Scene, describe, is_held_out, render, sample_scene
from scripts.drawn_world.motion import FRAMES, Clip, is_held_out_clip, render_clip, sample_clip
from scripts.drawn_world.motion_captions import CLIP_VOCABULARY, describe_clip


@dataclass(frozen=True)
class World:
    """One kind of thing to draw.

    Attributes:
        frames: frames of each of them, 4n + 1.
        vocabulary: words of its captions and canonical forms.
        sample: (generator, held_out) -> a thing, as `sample_scene`.
        is_held_out: whether training never sees a thing.
        describe: (thing, generator) -> caption and canonical form.
        render: (thing, size) -> uint8 (frames, size, size, 3).
        scene_at: (thing, time from 0 to 1) -> the figures then.
        reversed: the thing with time running backwards; None where there is no time.
    """

    frames: int
    vocabulary: tuple[str, ...]
    sample: Callable[..., Any]
    is_held_out: Callable[[Any], bool]
    describe: Callable[[Any, numpy.random.Generator], tuple[str, str]]
    render: Callable[[Any, int], numpy.ndarray]
    scene_at: Callable[[Any, float], Scene]
    reversed: Callable[[Any], Any] | None = None

    @property
    def latent_frames(self) -> int:
        """Frames of the latents."""
        return (self.frames - 1) // 4 + 1


WORLDS: dict[str, World] = {
    "pictures": World(
        frames=1,
        vocabulary=VOCABULARY,
        sample=sample_scene,
        is_held_out=is_held_out,
        describe=describe,
        render=lambda scene, size: render(scene, size)[None],
        scene_at=lambda scene, time: scene,
    ),
    "clips": World(
        frames=FRAMES,
        vocabulary=CLIP_VOCABULARY,
        sample=sample_clip,
        is_held_out=is_held_out_clip,
        describe=describe_clip,
        render=render_clip,
        scene_at=Clip.seen,
        reversed=Clip.reversed,
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
