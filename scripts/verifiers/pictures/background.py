"""Finds and names the background of a picture: its tones, colour word and pattern.

Owns what is known of backgrounds; knows nothing of figures beyond a mask of where they are.
"""

import numpy
from scipy import ndimage

from scripts.verifiers.colors import colour_word

_SOFT = 1.0  # pixels of blur before gradients are taken
_PLAIN = 0.75  # root mean square of the lightness change per pixel, CIELAB units, below which there is no pattern


def find_tones(lab: numpy.ndarray, flat: numpy.ndarray) -> numpy.ndarray:
    """Colours that the rim of the picture is made of.

    Args:
        lab: picture (H, W, 3), CIELAB.
        flat: pixels (H, W) that are on no edge.

    Returns:
        Tones of the background (K, 3), most frequent first.
    """
    rim = numpy.ones(flat.shape, dtype=bool)
    rim[4:-4, 4:-4] = False
    chosen = rim & flat
    colours = lab[chosen if chosen.sum() > 200 else rim]
    cells, member, counts = numpy.unique(
        numpy.round(colours / 5).astype(int), axis=0, return_inverse=True, return_counts=True
    )
    member = member.ravel()
    centres = numpy.stack([numpy.bincount(member, colours[:, c]) for c in range(3)], axis=1) / counts[:, None]
    tones: list[numpy.ndarray] = []
    weights: list[float] = []
    for index in numpy.argsort(-counts, kind="stable"):
        gaps = [float(numpy.linalg.norm(centres[index] - tone)) for tone in tones]
        if gaps and min(gaps) < 10:
            weights[int(numpy.argmin(gaps))] += float(counts[index])
        else:
            tones.append(centres[index])
            weights.append(float(counts[index]))
    share = numpy.array(weights) / sum(weights)
    order = [int(i) for i in numpy.argsort(-share, kind="stable") if share[i] > 0.06]
    return numpy.stack([tones[i] for i in order]).astype(numpy.float32)


def background_word(tones: numpy.ndarray) -> str:
    """Colour word of a background of tones (K, 3): a pattern darkens its colour, but lightens black."""
    darkest, brightest = tones[tones[:, 0].argmin()], tones[tones[:, 0].argmax()]
    return colour_word(darkest if darkest[0] < 28 else brightest)


def background_pattern(lightness: numpy.ndarray, figures: numpy.ndarray) -> str:
    """Names the pattern of a background by the directions of its edges.

    Stripes have edges of one direction, a checkerboard of two at right angles, dots of all directions.

    Args:
        lightness: CIELAB L (H, W).
        figures: where figures are (H, W), bool.

    Returns:
        "plain", "striped", "dotted" or "checkered"; "plain" when too little background is to be seen.
    """
    free = ~ndimage.binary_dilation(figures, iterations=7)
    free[:3], free[-3:], free[:, :3], free[:, -3:] = False, False, False, False
    if free.sum() < 400:
        return "plain"
    down = ndimage.gaussian_filter(lightness, _SOFT, order=(1, 0))[free]
    right = ndimage.gaussian_filter(lightness, _SOFT, order=(0, 1))[free]
    strength = numpy.hypot(down, right)
    power = float((strength**2).sum())
    if power < _PLAIN**2 * free.sum():
        return "plain"
    turn = right + 1j * down
    twofold = abs((turn**2).sum()) / power
    fourfold = abs((turn**4 / numpy.maximum(strength, 1e-6) ** 2).sum()) / power
    return "striped" if twofold > 0.6 else "checkered" if fourfold > 0.45 else "dotted"
