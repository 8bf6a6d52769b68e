"""Find the one object of solids that explains all views best.

Silhouettes give solids, size and camera height, then colors the mark. The search uses the renderer, not the captions.
n views are read at SIDE pixels a side; pictures are (n, SIDE, SIDE, 3), colors bytes, elevations degrees.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from einops import rearrange
from PIL import Image
from scipy import ndimage

from scripts.datasets.solids.objects import FLAT_TOPS, Part, SolidObject, arrange
from scripts.datasets.solids.render import azimuths, pixel_centers, trace
from scripts.verifiers.pictures.colors import color_word, to_lab
from scripts.verifiers.views.prompt import SOLIDS

SIDE = 40
_ELEVATIONS, _SCALES = (7.0, 17.0, 27.0), (0.92, 1.0, 1.08)  # where the search starts
_STEPS = ((4.0, 0.05), (1.5, 0.02))  # of elevation and scale
_WAYS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1))  # both change the height of an object
_SHADOW = 0.7  # least light on the ground
_FINALISTS = 3
_BLUR = 0.6  # pixels of blur that views are taken to have
_SAME = 16.0  # CIELAB distance below which a mark has the color of its solid

Kind = tuple[tuple[str, ...], str]  # solids and their relation


@dataclass(frozen=True)
class Fit:
    """The best object, its colors, and how its silhouettes overlap with those of the views.

    Attributes:
        obj: the object; its colors are color words.
        tones: color (2 * parts, 3) of each part and its mark in full light.
        overlaps: intersection over union of the silhouettes, for each view.
    """

    obj: SolidObject
    tones: np.ndarray
    overlaps: tuple[float, ...]


@dataclass(frozen=True)
class Views:
    """Views (n, SIDE, SIDE, 3) float32, their backgrounds (n, 3) and their silhouettes (n, SIDE, SIDE)."""

    pictures: np.ndarray
    grounds: np.ndarray
    masks: np.ndarray


def read_views(views: np.ndarray) -> Views:
    """Cut the object out of views (n, H, W, 3): what is neither background nor background in shadow.

    Raises:
        ValueError: the views are not square pictures of bytes.
    """
    if views.ndim != 4 or views.shape[1] != views.shape[2] or views.shape[3] != 3 or views.dtype != np.uint8:
        raise ValueError(f"views have shape {views.shape} and type {views.dtype}; allowed: (n, S, S, 3) of uint8.")
    small = [Image.fromarray(view).resize((SIDE, SIDE), Image.Resampling.BOX) for view in views]
    pictures = np.stack([np.asarray(view) for view in small])
    rim = np.ones((SIDE, SIDE), dtype=bool)
    rim[2:-2, 2:-2] = False
    grounds = np.median(pictures[:, rim].astype(np.float32), axis=1)
    flat = pictures.astype(np.float32)
    light = (flat * grounds[:, None, None]).sum(-1) / np.maximum((grounds**2).sum(-1), 1)[:, None, None]
    shaded = grounds[:, None, None] * np.clip(light, _SHADOW, 1.06)[..., None]
    away = np.linalg.norm(to_lab(pictures) - to_lab(np.clip(shaded, 0, 255).astype(np.uint8)), axis=-1)
    # A pixel on the edge is half object: the limit is half of what the object itself differs by.
    limits = [np.clip(0.45 * np.median(view[view > 12]), 12, 30) if (view > 12).any() else 12 for view in away]
    return Views(flat, grounds, away > np.array(limits)[:, None, None])


def overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the intersection over union (...) of masks (..., H, W); 0 where both are empty."""
    both, either = (first & second).sum((-1, -2)), (first | second).sum((-1, -2))
    return both / np.maximum(either, 1)


def _object(kind: Kind, elevation: float, scale: float) -> SolidObject:
    solids, relation = kind
    return SolidObject(
        arrange(tuple(Part(solid, "") for solid in solids), relation, scale), relation, "", elevation, ""
    )


def _silhouettes(obj: SolidObject, count: int) -> np.ndarray:
    """Return masks (count, SIDE, SIDE) of an object."""
    surface = trace(obj, azimuths(count), *pixel_centers(SIDE), shadow=False)
    return rearrange(surface.color >= 0, "views (h w) -> views h w", h=SIDE)


@lru_cache(maxsize=128)
def _first_silhouettes(kind: Kind, count: int) -> np.ndarray:
    """Return masks (elevations * scales, count, SIDE, SIDE) where the search for a kind of object starts."""
    return np.stack([_silhouettes(_object(kind, e, s), count) for e in _ELEVATIONS for s in _SCALES])


def _rivals(kind: Kind) -> Iterator[Kind]:
    """Yield the kind that was asked for, and others that differ in one solid or lack one."""
    solids, relation = kind
    yield kind
    if not relation:
        yield from (((solid,), "") for solid in SOLIDS if solid != solids[0])
        return
    for index in range(2):
        for solid in FLAT_TOPS if relation == "on" and index == 1 else SOLIDS:
            changed = (*solids[:index], solid, *solids[index + 1 :])
            if changed != solids:
                yield changed, relation
    if solids[0] != solids[1] and (relation == "beside" or solids[0] in FLAT_TOPS):
        yield solids[::-1], relation
    yield from (((solid,), "") for solid in dict.fromkeys(solids))


def _first_guess(kind: Kind, views: Views) -> tuple[float, float, float]:
    """Return (mean overlap, elevation, scale) of the best place to start from."""
    found = overlap(_first_silhouettes(kind, len(views.masks)), views.masks).mean(1)
    row, column = divmod(int(found.argmax()), len(_SCALES))
    return float(found.max()), _ELEVATIONS[row], _SCALES[column]


def _climb(
    score: Callable[[float, float], float], elevation: float, scale: float, ways: tuple[tuple[int, int], ...]
) -> tuple[float, float, float]:
    """Return (best score, elevation, scale) by ever smaller steps in these ways."""
    best = score(elevation, scale)
    for rise, growth in _STEPS:
        for up, out in ways:
            while True:
                there = float(np.clip(elevation + up * rise, 2, 35)), scale + out * growth
                found = score(*there)
                if found <= best:
                    break
                best, (elevation, scale) = found, there
    return best, elevation, scale


def _climb_by_silhouettes(kind: Kind, views: Views) -> tuple[float, float]:
    """Return (elevation, scale) at which the silhouettes overlap best."""

    def score(elevation: float, scale: float) -> float:
        masks = _silhouettes(_object(kind, elevation, scale), len(views.masks))
        return float(overlap(masks, views.masks).mean())

    return _climb(score, *_first_guess(kind, views)[1:], _WAYS)[1:]


def _climb_by_colors(obj: SolidObject, views: Views) -> tuple[float, SolidObject]:
    """Return (error, object) at the elevation that explains the colors best: silhouettes may not tell it."""

    def score(elevation: float, scale: float) -> float:
        return -_tones(replace(obj, elevation=elevation), views)[1]

    best, elevation, _ = _climb(score, obj.elevation, 1.0, ((1, 0), (-1, 0)))
    return -best, replace(obj, elevation=elevation)


def predict(obj: SolidObject, tones: np.ndarray, ground: np.ndarray, count: int) -> np.ndarray:
    """Render views (count, SIDE, SIDE, 3), float32, of an object in tones (2 * parts, 3) on a ground (3,)."""
    surface = trace(obj, azimuths(count), *pixel_centers(SIDE))
    colors = np.concatenate([tones, ground[None]])[surface.color]
    views = colors * surface.light[..., None] + 14 * surface.gloss[..., None]
    sharp = rearrange(np.clip(views, 0, 255), "views (h w) c -> views h w c", h=SIDE).astype(np.float32)
    return ndimage.gaussian_filter(sharp, (0, _BLUR, _BLUR, 0))


def _tones(obj: SolidObject, views: Views) -> tuple[np.ndarray, float]:
    """Return colors (2 * parts, 3) in full light that explain the views best, and the error that they leave.

    Pixels of a blurred view mix colors, so that a narrow stripe shows in none of them as it is: the colors are the
    least-squares solution for all pixels of the object, each a mixture of blurred areas.
    """
    surface = trace(obj, azimuths(len(views.masks)), *pixel_centers(SIDE), shadow=False)
    color, light, gloss = (rearrange(each, "views (h w) -> views h w", h=SIDE) for each in vars(surface).values())
    where = views.masks | (color >= 0)

    def soft(values: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(values.astype(np.float32), (0, _BLUR, _BLUR))[where]

    shares = np.stack([soft(light * (color == index)) for index in range(2 * len(obj.parts))], axis=1)
    grounds = np.broadcast_to(views.grounds[:, None, None], views.pictures.shape)[where]
    rest = views.pictures[where] - 14 * soft(gloss)[:, None] - grounds * soft(color < 0)[:, None]
    tones = np.linalg.solve(shares.T @ shares + 1e-2 * np.eye(shares.shape[1]), shares.T @ rest)
    return tones.astype(np.float32), float(abs(shares @ tones - rest).mean())


def _marks(obj: SolidObject) -> Iterator[SolidObject]:
    """Yield the object without a mark, and with each mark on each part."""
    yield obj
    for index, part in enumerate(obj.parts):
        for mark in ("stripe", "dot"):
            parts = list(obj.parts)
            parts[index] = replace(part, mark=mark)
            yield replace(obj, parts=tuple(parts))


def lab_of(tones: np.ndarray) -> np.ndarray:
    """Return CIELAB (..., 3) of colors (..., 3) in bytes or beyond."""
    return to_lab(np.clip(tones, 0, 255).round().astype(np.uint8))


def _word(tone: np.ndarray) -> str:
    """Return the color word of a solid; gray is white or black in wrong light."""
    lab = lab_of(tone)
    word = color_word(lab)
    return word if word != "gray" else "white" if lab[0] > 50 else "black"


def _named(obj: SolidObject, tones: np.ndarray) -> SolidObject:
    """Return the object with color words; a mark in the color of its solid is none."""
    parts = []
    for part, own, other in zip(obj.parts, tones[::2], tones[1::2], strict=True):
        plain = not part.mark or np.linalg.norm(lab_of(own) - lab_of(other)) < _SAME
        parts.append(
            replace(
                part,
                color=_word(own),
                mark="" if plain else part.mark,
                mark_color="" if plain else _word(other),
            )
        )
    return replace(obj, parts=tuple(parts))


def fit_views(views: Views, kind: Kind) -> Fit:
    """Return the object that explains all views best, among the kind that is asked for and its rivals.

    Args:
        views: from `read_views`.
        kind: solids and relation that are asked for.
    """
    likely = sorted(_rivals(kind), key=lambda rival: -_first_guess(rival, views)[0])[:_FINALISTS]
    objects = [_object(rival, *_climb_by_silhouettes(rival, views)) for rival in likely]
    shape = min(objects, key=lambda obj: min(_tones(marked, views)[1] for marked in _marks(obj)))
    _, best = min((_climb_by_colors(marked, views) for marked in _marks(shape)), key=lambda pair: pair[0])
    tones, _ = _tones(best, views)
    overlaps = overlap(_silhouettes(best, len(views.masks)), views.masks)
    return Fit(_named(best, tones), tones, tuple(float(value) for value in overlaps))
