"""What stands at each token of a sample: targets of the layout head.

Targets are float32 (F * side * side, 2 + numbers), tokens in the order of the transformer. Columns: kind (0 =
background, else 1 + index among the kinds of the data set), color (index in BACKGROUNDS), and numbers that count for
kinds above 0.
"""

import math

import numpy as np

from scripts.datasets.shapes import BACKGROUNDS, SHAPES, Scene
from scripts.datasets.shapes.motion import Clip
from scripts.datasets.solids import SolidObject
from scripts.datasets.solids.render import azimuths, pixel_centers, trace
from scripts.datasets.solids.solids import SOLIDS

FIGURES, FORMS = tuple(SHAPES), tuple(SOLIDS)  # the kinds of shapes and of solids
FIGURE_NUMBERS, FORM_NUMBERS = 5, 3
SYMMETRY = {"circle": 0, "square": 4, "triangle": 3, "star": 5, "heart": 1, "ring": 0, "cross": 4, "crescent": 1}
"""At how many angles a figure looks the same; 0: at all of them."""


def scene_layout(scene: Scene, side: int) -> np.ndarray:
    """Return the targets of a picture of side x side tokens. A smaller figure hides a larger one around it.

    The numbers are the center's distance right and down and the radius, in tokens, and cosine and sine of the angle
    times the number of angles at which the figure looks the same: equal for equal looks.
    """
    centers = (np.arange(side) + 0.5) / side
    x, y = (axis.ravel() for axis in np.meshgrid(centers, centers))
    targets = np.zeros((side * side, 2 + FIGURE_NUMBERS), dtype=np.float32)
    targets[:, 1] = BACKGROUNDS.index(scene.background)
    figures = [(figure, group) for group in scene.groups for figure in group.placements]
    for figure, group in sorted(figures, key=lambda item: -item[0].radius):
        here = np.hypot(x - figure.x, y - figure.y) < figure.radius + 0.25 / side
        targets[here, 0] = 1 + FIGURES.index(group.shape)
        targets[here, 1] = BACKGROUNDS.index(group.color)
        targets[here, 2] = (figure.x - x[here]) * side
        targets[here, 3] = (figure.y - y[here]) * side
        targets[here, 4] = figure.radius * side
        turn = math.radians(figure.angle) * SYMMETRY[group.shape]
        targets[here, 5:] = math.cos(turn), math.sin(turn)
    return targets


def clip_layout(clip: Clip, side: int, frames: int) -> np.ndarray:
    """Return the targets of `frames` frames of a clip, evenly spread over it; each as those of a picture."""
    times = np.linspace(0, 1, frames)
    return np.concatenate([scene_layout(clip.scene_with_colors(float(time)), side) for time in times])


def views_layout(obj: SolidObject, side: int, views: int) -> np.ndarray:
    """Return the targets of views; the numbers are cosine and sine of the azimuth and the elevation / 30."""
    hit = trace(obj, azimuths(views), *pixel_centers(side), shadow=False).color.ravel()  # 2 * part, 1 + on a mark
    turn = np.deg2rad(np.repeat(azimuths(views), side * side))
    tones = [BACKGROUNDS.index(name) for part in obj.parts for name in (part.color, part.mark_color or part.color)]
    kinds = [1 + FORMS.index(part.solid) for part in obj.parts for _ in range(2)]
    ground = BACKGROUNDS.index(obj.background)  # the last of the list, where `hit` is -1
    height = np.full(len(hit), obj.elevation / 30)
    columns = (np.array([*kinds, 0])[hit], np.array([*tones, ground])[hit], np.cos(turn), np.sin(turn))
    return np.stack([*columns, height], axis=1).astype(np.float32)
