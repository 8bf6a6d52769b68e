"""Checks the verifier itself: on pictures that are right, also blurred, noisy and recolored, and on wrong ones.

Owns the disturbances and the wrong requests; the renderer of the drawn world makes the pictures.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO

import numpy as np
from PIL import Image
from scipy import ndimage

from scripts.datasets.shapes import Scene, render, sample_scene
from scripts.verifiers.colors import COLORS
from scripts.verifiers.pictures.figures import read_picture
from scripts.verifiers.pictures.prompt import Request
from scripts.verifiers.pictures.shapes import SHAPES
from scripts.verifiers.pictures.verdict import Verdict, request_of_scene, verify_picture

_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", "inside": "left of"}
Disturbance = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _as_drawn(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return picture


def _blurred(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return ndimage.gaussian_filter(picture.astype(float), (0.7, 0.7, 0)).round().astype(np.uint8)


def _compressed(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """JPEG at quality 75 with full color resolution: ringing and blocks, as decoders of small latents leave them."""
    file = BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=75, subsampling=0)
    return np.asarray(Image.open(file).convert("RGB"))


def _noisy(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(picture + rng.normal(0, 4, picture.shape), 0, 255).astype(np.uint8)


def _recolored(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each channel scaled and moved by up to 5 %."""
    scale, move = rng.uniform(0.95, 1.05, 3), rng.uniform(-0.05, 0.05, 3) * 128
    return np.clip(picture * scale + move, 0, 255).astype(np.uint8)


def _all_of_them(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _compressed(_recolored(_blurred(picture, rng), rng), rng)


DISTURBANCES: dict[str, Disturbance] = {
    "as drawn": _as_drawn,
    "blurred (sigma 0.7 pixels)": _blurred,
    "JPEG, quality 75": _compressed,
    "noise (sigma 4 of 255)": _noisy,
    "colours off by 5 %": _recolored,
    "blurred, recoloured and JPEG": _all_of_them,
}


def truth(count: int, seed: int, disturbance: str = "as drawn") -> Iterator[tuple[Scene, np.ndarray, Verdict]]:
    """Draws scenes and judges their pictures against themselves.

    Args:
        count: number of scenes.
        seed: of the scenes and the disturbance.
        disturbance: key of `DISTURBANCES`.
    """
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        scene = sample_scene(rng, held_out=None)
        picture = DISTURBANCES[disturbance](render(scene), rng)
        yield scene, picture, verify_picture(read_picture(picture), scene)


def wrong_requests(scene: Scene, rng: np.random.Generator) -> dict[str, Request]:
    """Requests that a picture of the scene does not fulfil, each with one thing changed, by the thing's name."""
    request = request_of_scene(scene)
    index = int(rng.integers(len(request.groups)))
    group = request.groups[index]

    def change(**what: object) -> Request:
        groups = list(request.groups)
        groups[index] = replace(group, **what)
        return replace(request, groups=tuple(groups))

    others = [name for name in COLORS[:10] if name not in {g.color for g in request.groups}]
    wrong = {
        "colour": change(color=str(rng.choice(others))),
        "shape": change(shape=str(rng.choice([name for name in SHAPES if name != group.shape]))),
        "count": change(count=group.count + 1 if group.count == 1 or rng.random() < 0.5 else group.count - 1),
        "background": replace(request, background=str(rng.choice([c for c in COLORS if c != scene.background]))),
    }
    turned = [replace(g, color=h.color) for g, h in zip(request.groups, request.groups[::-1], strict=True)]
    if {(g.count, g.color, g.shape) for g in turned} != {(g.count, g.color, g.shape) for g in request.groups}:
        wrong["exchange of colours"] = replace(request, groups=tuple(turned), relations=())
    if request.relations:
        first = request.relations[0]
        flipped = (first[0], _OPPOSITE[first[1]], first[2])
        wrong["relation"] = replace(request, relations=(flipped, *request.relations[1:]))
        wrong["exchange of figures"] = _exchanged(request, first[0], first[2])
    return wrong


def _exchanged(request: Request, first: int, second: int) -> Request:
    """The request with two groups in each other's place."""
    groups = list(request.groups)
    groups[first], groups[second] = groups[second], groups[first]
    return replace(request, groups=tuple(groups))


def noticed(count: int, seed: int) -> dict[str, tuple[int, int]]:
    """For each kind of wrong request: (how many were found wrong, how many there were)."""
    sums: dict[str, list[int]] = {}
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        scene = sample_scene(rng, held_out=None)
        reading = read_picture(render(scene))
        for kind, request in wrong_requests(scene, rng).items():
            pair = sums.setdefault(f"wrong {kind} noticed", [0, 0])
            pair[0] += not verify_picture(reading, request).all_right
            pair[1] += 1
    return {kind: (found, asked) for kind, (found, asked) in sums.items()}
