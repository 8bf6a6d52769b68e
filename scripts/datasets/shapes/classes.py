"""Pictures of one figure, in classes: every color with every shape."""

import numpy as np

from .layout import layout_scene
from .palette import BACKGROUNDS, COLORS, clear_on
from .scenes import SHAPES, Group, Scene, pick

CLASSES: tuple[str, ...] = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
"""Names of the classes by number, e.g. "red circle"."""


def sample_figure(rng: np.random.Generator, held_out: bool | None = False) -> Scene:
    """Sample a scene of one figure, medium or large, on a plain background; all classes are as likely.

    There are no small figures: the VAE of shapes-128 loses one in twenty of them. The class says nothing about the
    background, so a pattern would only be one more thing to learn. Training sees every class, so
    `held_out` changes nothing: what is held out are scenes of other seeds.
    """
    color, shape = pick(rng, CLASSES).split()
    background = pick(rng, [name for name in BACKGROUNDS if clear_on(color, name)])
    size = pick(rng, ("", "large"))
    placements = None
    while placements is None:
        placements = layout_scene(rng, [shape], [size], [1], ())
    return Scene((Group(shape, color, size, placements[0]),), (), background, "plain")


def class_name(scene: Scene) -> str:
    """Return the name of the class of a scene of one figure."""
    (group,) = scene.groups
    return f"{group.color} {group.shape}"
