"""Pictures of one figure, in classes: every color with every shape."""

import numpy as np

from .layout import place_alone
from .palette import BACKGROUNDS, COLORS, clear_on
from .scenes import SHAPES, Group, Scene, pick

CLASSES: tuple[str, ...] = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
"""Names of the classes by number, e.g. "red circle"."""


def sample_figure(rng: np.random.Generator, held_out: bool | None = False) -> Scene:
    """Sample a scene of one figure on a plain background, half to three quarters of the picture wide.

    All classes are as likely, and all colors on which the figure is legible. The class says nothing about the
    background, so a pattern would only be one more thing to learn; and small figures would teach more about places
    than about shapes. Training sees every class, so `held_out` changes nothing: what is held out are scenes of other
    seeds.
    """
    color, shape = pick(rng, CLASSES).split()
    background = pick(rng, [name for name in BACKGROUNDS if clear_on(color, name)])
    group = Group(shape, color, "large", (place_alone(rng, shape),))
    return Scene((group,), (), background, "plain")


def class_name(scene: Scene) -> str:
    """Return the name of the class of a scene of one figure."""
    (group,) = scene.groups
    return f"{group.color} {group.shape}"
