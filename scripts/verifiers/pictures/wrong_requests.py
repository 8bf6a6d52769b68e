"""Requests that a picture does not fulfill, to check whether the verifier notices."""

from dataclasses import replace

import numpy as np

from scripts.verifiers.pictures.colors import COLORS
from scripts.verifiers.pictures.prompt import Request
from scripts.verifiers.pictures.shapes import SHAPES

_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", "inside": "left of"}


def wrong_requests(request: Request, rng: np.random.Generator) -> dict[str, Request]:
    """Return variants of a request with one thing changed, by the name of what is changed."""
    index = int(rng.integers(len(request.groups)))
    group = request.groups[index]

    def change(**what: object) -> Request:
        groups = list(request.groups)
        groups[index] = replace(group, **what)
        return replace(request, groups=tuple(groups))

    others = [name for name in COLORS[:10] if name not in {g.color for g in request.groups}]
    wrong = {
        "color": change(color=str(rng.choice(others))),
        "shape": change(shape=str(rng.choice([name for name in SHAPES if name != group.shape]))),
        "count": change(count=group.count + 1 if group.count == 1 or rng.random() < 0.5 else group.count - 1),
        "background": replace(request, background=str(rng.choice([c for c in COLORS if c != request.background]))),
    }
    turned = [replace(g, color=h.color) for g, h in zip(request.groups, request.groups[::-1], strict=True)]
    if {(g.count, g.color, g.shape) for g in turned} != {(g.count, g.color, g.shape) for g in request.groups}:
        wrong["exchange of colors"] = replace(request, groups=tuple(turned), relations=())
    if request.relations:
        first = request.relations[0]
        flipped = (first[0], _OPPOSITE[first[1]], first[2])
        wrong["relation"] = replace(request, relations=(flipped, *request.relations[1:]))
        wrong["exchange of figures"] = _exchanged(request, first[0], first[2])
    return wrong


def _exchanged(request: Request, first: int, second: int) -> Request:
    """Return the request with two groups in each other's place."""
    groups = list(request.groups)
    groups[first], groups[second] = groups[second], groups[first]
    return replace(request, groups=tuple(groups))
