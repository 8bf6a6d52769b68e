"""Read a picture of shapes: which figures it shows, where, and on what background; from pixels only.

H, W are picture rows and columns; positions and radii are fractions of the picture side, x right, y down.
"""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from scipy import ndimage

from scripts.verifiers.pictures.background import background_pattern, background_word, find_tones
from scripts.verifiers.pictures.colors import COLORS, name_pixels, to_lab
from scripts.verifiers.pictures.shapes import classify_shape

SIDE = 128  # pictures are read at this many pixels on their shorter side
SMALLEST = 140  # pixels at SIDE, half of the smallest figure; less is a dot of the pattern or an artifact
_FLAT = 7.0  # CIELAB units between neighbors; more than this is an edge
_TONE = 15.0  # CIELAB units around a background tone that still are background
_ALIKE = 14.0  # CIELAB units around a figure's color that still are the figure
_REACH = 4  # pixels over which an edge pixel may belong to a flat area
_WHITE, _GRAY = COLORS.index("white") + 1, COLORS.index("gray") + 1
# Area of each shape of radius 1, as the data set defines "radius".
_AREA = {
    "circle": 3.14,
    "square": 3.03,
    "triangle": 1.78,
    "star": 1.91,
    "heart": 2.35,
    "ring": 2.08,
    "cross": 2.26,
    "crescent": 1.76,
    "blob": 3.14,
}
_FOUR = ndimage.generate_binary_structure(2, 1)
_EIGHT = ndimage.generate_binary_structure(2, 2)


@dataclass
class Figure:
    """One figure found in a picture.

    Attributes:
        color: color word.
        shape: shape word, or "blob".
        x, y: centroid of the silhouette, fractions of the width and height.
        radius: estimated radius, fraction of the shorter side.
        area: pixels of the silhouette over pixels of the picture, holes filled where another figure lies in them.
        score: how well the silhouette fits the shape, 0..1.
        inside: index of the figure that surrounds this one, None on the background.
    """

    color: str
    shape: str
    x: float
    y: float
    radius: float
    area: float
    score: float
    inside: int | None = None


@dataclass
class Reading:
    """What a picture shows: its figures, the color word and pattern of its background, and each figure's pixels.

    Silhouettes are masks (H, W) of the picture with a shorter side of SIDE pixels.
    """

    figures: list[Figure] = field(default_factory=list)
    background: str = ""
    pattern: str = "plain"
    silhouettes: list[np.ndarray] = field(default_factory=list, repr=False, compare=False)


def _prepare(array: np.ndarray) -> np.ndarray:
    """Return picture bytes (H, W, 3) with the shorter side SIDE."""
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(f"picture has shape {array.shape} and type {array.dtype}; allowed: (H, W, 3) of uint8.")
    height, width = array.shape[:2]
    if min(height, width) == SIDE:
        return array
    scale = SIDE / min(height, width)
    size = (max(round(width * scale), SIDE), max(round(height * scale), SIDE))
    return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.LANCZOS))


def _steepness(lab: np.ndarray) -> np.ndarray:
    """Return the largest color step (H, W) from each pixel to its four neighbors, CIELAB units."""
    down = np.sqrt(((lab[1:] - lab[:-1]) ** 2).sum(-1))
    right = np.sqrt(((lab[:, 1:] - lab[:, :-1]) ** 2).sum(-1))
    steep = np.zeros(lab.shape[:2], dtype=np.float32)
    np.maximum(steep[1:], down, out=steep[1:])
    np.maximum(steep[:-1], down, out=steep[:-1])
    np.maximum(steep[:, 1:], right, out=steep[:, 1:])
    np.maximum(steep[:, :-1], right, out=steep[:, :-1])
    return steep


def _distance(lab: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the distance (...) from each color (..., 3) to the nearest of the points (K, 3)."""
    return np.sqrt(np.stack([((lab - point) ** 2).sum(-1) for point in points]).min(axis=0))


def _label_pixels(lab: np.ndarray, steep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give each pixel 0 (background) or 1 + index of its color word.

    Flat areas get their own nearest word. An edge pixel is a mixture, so its own word means nothing: it joins that
    flat area within _REACH pixels whose color is nearest.

    Returns:
        Labels (H, W) int, and the background's tones (K, 3).
    """
    flat = steep < _FLAT
    tones = find_tones(lab, flat)
    names = name_pixels(lab) + 1
    names[_distance(lab, tones) < _TONE] = 0
    if (names == _WHITE).sum() >= SMALLEST:
        names[names == _GRAY] = _WHITE  # no figure is gray: it is a shadow on a white one
    best = np.full(flat.shape, np.inf, dtype=np.float32)
    labels = np.zeros(flat.shape, dtype=int)
    for name in np.unique(names[flat]):
        core = flat & (names == name)
        if name:
            core = _without_specks(core, 6)
            if core.sum() < 20:
                continue
        points = tones if name == 0 else np.median(lab[core], axis=0)[None]
        if name:
            # Thin parts (tips of stars, thin rings) are nowhere flat, but have the color of what they are joined to.
            alike = core | (_distance(lab, points) < _ALIKE)
            core = ndimage.binary_dilation(core, _EIGHT, iterations=3, mask=alike)
        near = ndimage.distance_transform_edt(~core) <= _REACH
        gap = np.where(core, -1.0, _distance(lab, points))
        better = near & (gap < best)
        labels[better] = name
        best[better] = gap[better]
    _find_lost(labels, lab, tones)
    return labels, tones


def _find_lost(labels: np.ndarray, lab: np.ndarray, tones: np.ndarray) -> None:
    """Label (in place) what is nowhere flat and yet no background, such as a thin ring behind strong compression."""
    away = _distance(lab, tones)
    lost = (labels == 0) & (away > 25)
    areas, count = ndimage.label(lost, _EIGHT)
    thick = ndimage.binary_opening(lost, _EIGHT)
    for index in range(1, count + 1):
        area = areas == index
        if area.sum() >= SMALLEST and (area & thick).sum() >= 0.5 * area.sum():
            middle = area & (away >= np.median(away[area]))  # the rest is mixed with the background
            labels[area] = int(name_pixels(np.median(lab[middle], axis=0)[None])[0]) + 1


def _without_specks(mask: np.ndarray, smallest: int) -> np.ndarray:
    """Drop connected parts of fewer than `smallest` pixels from a mask (H, W)."""
    parts, _ = ndimage.label(mask, _EIGHT)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return (sizes >= smallest)[parts]


@dataclass
class _Part:
    """A connected area of one color: label, mask (H, W), the mask with its holes filled, and what surrounds it."""

    label: int
    mask: np.ndarray
    filled: np.ndarray
    holder: int | None = None
    see_through: bool = False  # the holder's holder, seen through a hole


def _fit(mask: np.ndarray) -> float:
    """Return how well an area (H, W), with or without its holes, looks like any shape, 0..1."""
    return max(classify_shape(mask).score, classify_shape(ndimage.binary_fill_holes(mask)).score)


def _split(mask: np.ndarray) -> list[np.ndarray]:
    """Divide two or more figures of one color that touch; an area that looks like one shape stays whole."""
    if mask.sum() < 2 * SMALLEST or (whole := _fit(mask)) > 0.82:
        return [mask]
    for depth in (1, 2, 3):
        cores, count = ndimage.label(ndimage.binary_erosion(mask, _EIGHT, iterations=depth), _FOUR)
        large = [i for i in range(1, count + 1) if (cores == i).sum() >= SMALLEST // 2]
        if len(large) < 2:
            continue
        far = np.stack([ndimage.distance_transform_edt(cores != i) for i in large])
        pieces = [mask & (far.argmin(axis=0) == i) for i in range(len(large))]
        if min(_fit(piece) for piece in pieces) > whole + 0.05:
            return [part for piece in pieces for part in _split(piece)]
    return [mask]


def _parts(labels: np.ndarray) -> list[_Part]:
    """Return connected areas that are large enough to be figures, largest (holes filled) first, with their holders."""
    found = []
    for name in np.unique(labels[labels > 0]):
        areas, count = ndimage.label(labels == name, _FOUR)
        for index, size in enumerate(np.bincount(areas.ravel(), minlength=count + 1)):
            if index and size >= SMALLEST:
                found += [_Part(int(name), mask, ndimage.binary_fill_holes(mask)) for mask in _split(areas == index)]
    found.sort(key=lambda part: -int(part.filled.sum()))
    for index, part in enumerate(found):
        holders = [i for i in range(index) if _surrounds(found[i], part)]
        part.holder = holders[-1] if holders else None
        above = found[part.holder].holder if holders else None
        part.see_through = above is not None and found[above].label == part.label
    return found


def _rim(mask: np.ndarray) -> np.ndarray:
    """Return the three pixels around a mask (H, W)."""
    return ndimage.binary_dilation(mask, _EIGHT, iterations=3) & ~mask


def _surrounds(outer: _Part, inner: _Part) -> bool:
    """Return whether `inner` lies on `outer` or in a hole of it, and does not reach far over its edge."""
    size = inner.filled.sum()
    if (outer.filled & inner.filled).sum() >= 0.8 * size:
        return True
    rim = _rim(inner.filled)
    if (outer.mask & rim).sum() < 0.5 * rim.sum():
        return False
    both = ndimage.binary_fill_holes(outer.mask | inner.filled)
    return bool((both & rim).sum() >= 0.8 * rim.sum())


def _silhouette(part: _Part, children: list[_Part]) -> np.ndarray:
    """Return the part's mask (H, W), with the figures that lie on it filled in; those in its own hole are not."""
    own = part.mask
    for child in children:
        rim = _rim(child.filled)
        if (part.mask & rim).sum() >= 0.5 * rim.sum():
            own = own | ndimage.binary_dilation(child.filled, _EIGHT, iterations=2)
    return own


def _is_fringe(part: _Part, larger: list[_Part], lab: np.ndarray, tones: np.ndarray, score: float) -> bool:
    """Return whether an area is thin and of no shape, or a darker strip of a background or figure that it touches."""
    thickness = ndimage.distance_transform_edt(part.mask).max()
    if (score > 0.8 and part.label != _GRAY) or thickness > 5:
        return False
    rim = _rim(part.mask)
    beside = [other for other in larger if (other.mask & rim).any()]
    if beside and score < 0.7:
        return True
    color = np.median(lab[part.mask], axis=0)
    grounds = [*tones, *(np.median(lab[other.mask], axis=0) for other in beside)]
    for ground in grounds:
        light = color[0] / max(float(ground[0]), 1.0)
        if 0.65 < light < 1 and np.linalg.norm(color - ground * light) < 12:
            return True
    return False


def read_picture(array: np.ndarray) -> Reading:
    """Find the figures of a picture.

    Args:
        array: sRGB bytes (H, W, 3), any size.

    Returns:
        The figures, largest first, and the background.

    Raises:
        ValueError: the array is not a picture of bytes.
    """
    picture = _prepare(array)
    lab = to_lab(picture)
    lab = np.stack([ndimage.median_filter(lab[..., c], size=3, mode="nearest") for c in range(3)], axis=-1)
    labels, tones = _label_pixels(lab, _steepness(lab))
    parts = _parts(labels)
    height, width = labels.shape
    reading = Reading([], background_word(tones), background_pattern(lab[..., 0], labels > 0))
    place: dict[int, int] = {}
    for index, part in enumerate(parts):
        if part.see_through or COLORS[part.label - 1] == reading.background:
            continue  # no figure has the background's own color
        own = _silhouette(part, [child for child in parts if child.holder == index and not child.see_through])
        guess = classify_shape(own)
        if _is_fringe(part, parts[:index], lab, tones, guess.score):
            continue
        place[index] = len(reading.figures)
        rows, columns = np.nonzero(own)
        area = float(own.sum())
        reading.figures.append(
            Figure(
                color=COLORS[part.label - 1],
                shape=guess.name,
                x=float(columns.mean() + 0.5) / width,
                y=float(rows.mean() + 0.5) / height,
                radius=(area / _AREA[guess.name]) ** 0.5 / min(height, width),
                area=area / (height * width),
                score=guess.score,
                inside=place.get(part.holder) if part.holder is not None else None,
            )
        )
        reading.silhouettes.append(own)
    return reading
