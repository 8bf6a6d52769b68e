"""Colors of shapes and backgrounds, and which of them can be told apart (sRGB, 0..255)."""

from collections.abc import Sequence

FIGURE_RGB: dict[str, tuple[int, int, int]] = {
    "red": (216, 36, 40),
    "orange": (247, 134, 26),
    "yellow": (252, 214, 38),
    "green": (38, 156, 62),
    "blue": (36, 88, 214),
    "purple": (132, 54, 178),
    "pink": (248, 134, 184),
    "brown": (118, 70, 34),
    "black": (28, 28, 32),
    "white": (250, 250, 250),
}
BACKGROUND_RGB: dict[str, tuple[int, int, int]] = {
    "red": (206, 62, 60),
    "orange": (244, 152, 66),
    "yellow": (248, 220, 96),
    "green": (84, 172, 98),
    "blue": (78, 126, 216),
    "purple": (148, 92, 190),
    "pink": (246, 166, 202),
    "brown": (138, 94, 60),
    "black": (36, 36, 40),
    "white": (246, 246, 245),
    "gray": (144, 146, 150),
}
COLORS = tuple(FIGURE_RGB)
BACKGROUNDS = tuple(BACKGROUND_RGB)
PATTERNS = ("plain", "striped", "dotted", "checkered")
CLEAR = 36.0


def second_tone(name: str) -> tuple[int, int, int]:
    """Return the other tone of a patterned background: darker, except for black, which gets lighter."""
    red, green, blue = BACKGROUND_RGB[name]
    if name == "black":
        return red + 34, green + 34, blue + 36
    strength = 0.86 if name in ("white", "yellow") else 0.82
    return int(red * strength), int(green * strength), int(blue * strength)


def lab(rgb: Sequence[float]) -> tuple[float, float, float]:
    """Return CIE L*a*b* (D65) of an sRGB color with values 0..255."""
    linear = [(v / 255 + 0.055) / 1.055 for v in rgb]
    linear = [base**2.4 if v > 10.3 else v / 255 / 12.92 for base, v in zip(linear, rgb, strict=True)]
    r, g, b = linear
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
    )
    fx, fy, fz = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz)
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def distance(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the Euclidean distance of two sRGB colors in L*a*b*."""
    return sum((a - b) ** 2 for a, b in zip(lab(first), lab(second), strict=True)) ** 0.5


_CLEAR_ON = {
    (figure, ground): figure != ground
    and min(distance(rgb, BACKGROUND_RGB[ground]), distance(rgb, second_tone(ground))) >= CLEAR
    for figure, rgb in FIGURE_RGB.items()
    for ground in BACKGROUNDS
}
_CLEAR_PAIR = {
    (first, second): first != second and distance(FIGURE_RGB[first], FIGURE_RGB[second]) >= CLEAR
    for first in COLORS
    for second in COLORS
}


def clear_on(figure: str, background: str) -> bool:
    """Return whether a figure of this color stands out from both tones of the background."""
    return _CLEAR_ON[figure, background]


def clear_pair(first: str, second: str) -> bool:
    """Return whether a figure of the first color stands out on a figure of the second."""
    return _CLEAR_PAIR[first, second]
