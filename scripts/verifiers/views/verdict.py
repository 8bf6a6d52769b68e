"""Compare views of an object with their prompt: one object has to explain all of them, each from its own side."""

from dataclasses import dataclass

import numpy as np

from scripts.datasets.solids.render import azimuths
from scripts.verifiers.pictures.colors import color_word
from scripts.verifiers.views.fit import Fit, Views, fit_views, lab_of, predict, read_views
from scripts.verifiers.views.prompt import ViewsRequest

LEAST_OVERLAP = 0.7  # below it the silhouettes are of no solid
TURNS = 24  # azimuths that a view is compared with
TOLERANCE = 30.0  # degrees by which the azimuth of a view may be off
CLEARLY = 1.12  # an azimuth is wrong when another leaves so many times less unexplained
FOREIGN = (2.0, 2.5)  # bytes and multiples of the median error; a view that leaves more shows something else
VIEW_LIMITS = {"side": (0.0, 11.0), "above": (22.5, 90.0)}  # degrees of elevation


@dataclass(frozen=True)
class ViewsVerdict:
    """What is right about the views.

    Attributes:
        solids, colors, marks: for each part that was asked for; a mark is right in kind, color and place.
        relation: the parts stand as asked.
        view: the camera's height is as asked, None when not given.
        background: its color is as asked, None when not given.
        overlaps: of the silhouettes of one object with those of the views, for each view.
        azimuths: best azimuth of each view, degrees.
        one_object: no view leaves far more unexplained than the others do.
        order: every view shows the object from its own side, see `_in_order`.
    """

    solids: tuple[bool, ...]
    colors: tuple[bool, ...]
    marks: tuple[bool, ...]
    relation: bool
    view: bool | None
    background: bool | None
    overlaps: tuple[float, ...]
    azimuths: tuple[float, ...]
    one_object: bool
    order: bool

    @property
    def overlap(self) -> float:
        """Mean silhouette overlap, 0 to 1."""
        return sum(self.overlaps) / len(self.overlaps)

    @property
    def wrong(self) -> tuple[str, ...]:
        """One line per mistake."""
        parts = {"solid": self.solids, "colour": self.colors, "mark": self.marks}
        wrong = [f"{name} wrong" for name, answers in parts.items() if not all(answers)]
        whole = {"relation": self.relation, "camera": self.view, "background": self.background}
        wrong += [f"{name} wrong" for name, answer in whole.items() if answer is False]
        return (*wrong, *(() if self.one_object else ("not one object",)), *(() if self.order else ("order wrong",)))

    @property
    def right(self) -> bool:
        """Everything that was asked."""
        return not self.wrong


def _errors(fit: Fit, views: Views) -> np.ndarray:
    """Return the mean difference of a byte (n, TURNS) between each view and the fitted object from each azimuth."""
    ground = np.median(views.grounds, axis=0)
    rendered = predict(fit.obj, fit.tones, ground, TURNS)
    return np.stack([abs(rendered - view).mean((1, 2, 3)) for view in views.pictures])


def _in_order(errors: np.ndarray) -> bool:
    """Return whether the views' azimuths grow by 360 / n from view to view, beginning at 0.

    A view is off when an azimuth further than TOLERANCE from its own explains it clearly better; views from which the
    mark cannot be seen may look alike. None may be off, and at least half must be nearest to their own azimuth.
    """
    wanted = np.array(azimuths(len(errors)))
    away = abs((np.array(azimuths(TURNS))[None] - wanted[:, None] + 180) % 360 - 180)
    own = np.where(away <= TOLERANCE, errors, np.inf).min(1)
    near = away[np.arange(len(errors)), errors.argmin(1)] <= TOLERANCE
    return bool((own <= CLEARLY * errors.min(1)).all() and near.mean() >= 0.5)


def verify_views(request: ViewsRequest, pictures: np.ndarray) -> ViewsVerdict:
    """Compare what a prompt asks for with views of bytes (n, S, S, 3), view i from azimuth i * 360 / n."""
    views = read_views(pictures)
    fit = fit_views(views, (tuple(part.solid for part in request.parts), request.relation))
    found = fit.obj.parts
    alike = len(found) == len(request.parts) and sum(fit.overlaps) / len(fit.overlaps) >= LEAST_OVERLAP
    pairs = list(zip(request.parts, found, strict=False)) if alike else []
    missing = (False,) * (len(request.parts) - len(pairs))
    errors = _errors(fit, views)
    left = errors.min(1)
    low, high = VIEW_LIMITS.get(request.view, (0.0, 90.0))
    ground = color_word(lab_of(np.median(views.grounds, axis=0)))
    return ViewsVerdict(
        solids=(*(asked.solid == part.solid for asked, part in pairs), *missing),
        colors=(*(asked.color in ("", part.color) for asked, part in pairs), *missing),
        marks=(
            *(asked.mark == part.mark and asked.mark_color in ("", part.mark_color) for asked, part in pairs),
            *missing,
        ),
        relation=alike and fit.obj.relation == request.relation,
        view=low <= fit.obj.elevation <= high if request.view else None,
        background=ground == request.background if request.background else None,
        overlaps=fit.overlaps,
        azimuths=tuple(float(index * 360 / TURNS) for index in errors.argmin(1)),
        one_object=bool((left <= FOREIGN[0] + FOREIGN[1] * np.median(left)).all()),
        order=_in_order(errors),
    )
