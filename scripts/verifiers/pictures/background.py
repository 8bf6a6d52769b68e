"""Find and name the background of a picture: its tones, color word and pattern."""

import numpy as np
from scipy import ndimage

from scripts.verifiers.pictures.colors import color_word

_SOFT = 1.0  # pixels of blur before gradients are taken
_PLAIN = 0.75  # root mean square of the lightness change per pixel, CIELAB units, below which there is no pattern


def find_tones(lab: np.ndarray, flat: np.ndarray) -> np.ndarray:
    """Return the colors that the rim of the picture is made of.

    Args:
        lab: picture (H, W, 3), CIELAB.
        flat: pixels (H, W) that are on no edge.

    Returns:
        Tones of the background (K, 3), most frequent first.
    """
    rim = np.ones(flat.shape, dtype=bool)
    rim[4:-4, 4:-4] = False
    chosen = rim & flat
    colors = lab[chosen if chosen.sum() > 200 else rim]
    cells, member, counts = np.unique(
        np.round(colors / 5).astype(int), axis=0, return_inverse=True, return_counts=True
    )
    member = member.ravel()
    centers = np.stack([np.bincount(member, colors[:, c]) for c in range(3)], axis=1) / counts[:, None]
    tones: list[np.ndarray] = []
    weights: list[float] = []
    for index in np.argsort(-counts, kind="stable"):
        gaps = [float(np.linalg.norm(centers[index] - tone)) for tone in tones]
        if gaps and min(gaps) < 10:
            weights[int(np.argmin(gaps))] += float(counts[index])
        else:
            tones.append(centers[index])
            weights.append(float(counts[index]))
    share = np.array(weights) / sum(weights)
    order = [int(i) for i in np.argsort(-share, kind="stable") if share[i] > 0.06]
    return np.stack([tones[i] for i in order]).astype(np.float32)


def background_word(tones: np.ndarray) -> str:
    """Return the color word of a background of tones (K, 3): a pattern darkens its color, but lightens black."""
    darkest, brightest = tones[tones[:, 0].argmin()], tones[tones[:, 0].argmax()]
    return color_word(darkest if darkest[0] < 28 else brightest)


def background_pattern(lightness: np.ndarray, figures: np.ndarray) -> str:
    """Return the pattern of a background, by the directions of its edges.

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
    strength = np.hypot(down, right)
    power = float((strength**2).sum())
    if power < _PLAIN**2 * free.sum():
        return "plain"
    turn = right + 1j * down
    twofold = abs((turn**2).sum()) / power
    fourfold = abs((turn**4 / np.maximum(strength, 1e-6) ** 2).sum()) / power
    return "striped" if twofold > 0.6 else "checkered" if fourfold > 0.45 else "dotted"
