"""Name colors in the perceptual space CIELAB (D65), with tones of the verifier's own."""

import numpy as np

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")
# What each word looks like, as sRGB bytes: a middle tone and, where the word reaches far, other tones of it.
_TONES = {
    "red": ((215, 38, 45), (170, 25, 30), (235, 70, 70)),
    "orange": ((245, 135, 30), (220, 110, 20), (250, 160, 70)),
    "yellow": ((250, 215, 45), (225, 190, 30), (252, 230, 110)),
    "green": ((45, 160, 70), (25, 115, 45), (95, 190, 110)),
    "blue": ((40, 90, 205), (25, 60, 150), (90, 140, 230)),
    "purple": ((125, 60, 175), (90, 35, 130), (155, 100, 200)),
    "pink": ((245, 135, 185), (225, 105, 160), (250, 170, 205)),
    "brown": ((125, 75, 40), (95, 55, 30), (150, 100, 60)),
    "black": ((25, 25, 28), (5, 5, 8), (50, 50, 54)),
    "white": ((248, 248, 246), (228, 228, 228)),
    "gray": ((140, 140, 143), (100, 100, 104), (180, 180, 182)),
}
_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]],
    dtype=np.float32,
)
_WHITE = np.array([0.95047, 1.0, 1.08883], dtype=np.float32)
_BYTE_TO_LINEAR = np.where(
    np.arange(256) <= 0.04045 * 255,
    np.arange(256) / 255 / 12.92,
    ((np.arange(256) / 255 + 0.055) / 1.055) ** 2.4,
).astype(np.float32)


def to_lab(picture: np.ndarray) -> np.ndarray:
    """Turn sRGB bytes (..., 3) into CIELAB (..., 3) float32: L 0..100, a and b about -110..110."""
    xyz = _BYTE_TO_LINEAR[picture] @ _TO_XYZ.T / _WHITE
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lightness = 116 * root[..., 1] - 16
    return np.stack(
        [lightness, 500 * (root[..., 0] - root[..., 1]), 200 * (root[..., 1] - root[..., 2])], axis=-1
    ).astype(np.float32)


_NAMES = tuple(name for name, tones in _TONES.items() for _ in tones)
_POINTS = to_lab(np.array([tone for tones in _TONES.values() for tone in tones], dtype=np.uint8))
_NAME_INDEX = np.array([COLORS.index(name) for name in _NAMES])
_WEIGHT = np.array([0.7, 1.0, 1.0], dtype=np.float32)  # light changes with shading, hue does not


def name_pixels(lab: np.ndarray) -> np.ndarray:
    """Return the index into `COLORS` of the nearest color word for each CIELAB color (..., 3)."""
    flat = lab.reshape(-1, 3) * _WEIGHT
    points = _POINTS * _WEIGHT
    distance = (flat**2).sum(1)[:, None] - 2 * flat @ points.T + (points**2).sum(1)[None]
    return _NAME_INDEX[distance.argmin(axis=1)].reshape(lab.shape[:-1])


def color_word(lab: np.ndarray) -> str:
    """Return the color word nearest to one CIELAB color (3,)."""
    return COLORS[int(name_pixels(lab[None])[0])]
