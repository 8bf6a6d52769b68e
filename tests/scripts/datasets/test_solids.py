"""Solids: views turn as they should, colors and captions are the data set's, held-out objects are kept apart."""

from dataclasses import replace

import numpy as np
import pytest

from scripts.datasets.shapes.captions import caption_words
from scripts.datasets.shapes.palette import FIGURE_RGB
from scripts.datasets.solids import (
    VIEW_VOCABULARY,
    Part,
    SolidObject,
    describe_object,
    is_held_out_object,
    render_views,
)
from scripts.datasets.solids.objects import ELEVATIONS, HELD_OUT_SOLIDS, MARKS, RELATIONS, arrange, sample_object
from scripts.datasets.solids.render import pixel_centers, trace
from scripts.datasets.solids.solids import SOLIDS
from scripts.verifiers.views.prompt import read_views_prompt


def objects(number: int, held_out: bool | None = False) -> list[SolidObject]:
    return [sample_object(np.random.default_rng([8, index]), held_out) for index in range(number)]


def alone(solid: str, mark: str = "stripe", elevation: float = 15.0) -> SolidObject:
    return SolidObject(arrange((Part(solid, "red", mark, "blue"),), "", 1.0), "", "", elevation, "white")


def share(obj: SolidObject, azimuth: float, color: int) -> tuple[float, float]:
    """(pixels of a color index over all pixels, their mean place across) in one view."""
    across, down = pixel_centers(64)
    chosen = trace(obj, [azimuth], across, down).color[0] == color
    return float(chosen.mean()), float(across[chosen].mean()) if chosen.any() else 0.0


def test_distances_are_never_too_large_and_change_sign_at_the_surface():
    rng = np.random.default_rng(0)
    for name, solid in SOLIDS.items():
        one, other = (rng.uniform((-1.5, -1.5, -0.5), (1.5, 1.5, 2.5), (4000, 3)).T for _ in range(2))
        step = np.sqrt(((one - other) ** 2).sum(0))
        assert (abs(solid.distance(*one) - solid.distance(*other)) <= step + 1e-6).all(), name
        inside = solid.distance(*one) < 0
        assert inside.any() and (np.hypot(one[0], one[1])[inside] <= solid.width + 1e-6).all(), name
        assert (one[2][inside] <= solid.height).all() and (one[2][inside] >= 0).all(), name


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("solid", SOLIDS)
def test_the_mark_faces_view_0_and_leaves_to_the_left(solid, mark):
    obj = alone(solid, mark)
    front, place = share(obj, 0, 1)
    assert front > 0.008 and abs(place) < 0.02
    assert share(obj, 45, 1)[1] < -0.05 and share(obj, 315, 1)[1] > 0.05
    assert share(obj, 180, 1)[0] < 0.35 * front  # a stripe over the top still shows from behind


def test_views_are_deterministic_and_a_quarter_of_eight_views_is_one_of_four():
    obj = objects(1)[0]
    eight = render_views(obj, 8, 64)
    assert eight.shape == (8, 64, 64, 3) and eight.dtype == np.uint8
    assert np.array_equal(eight[::2], render_views(obj, 4, 64))


def test_the_lit_side_of_a_ball_turns_with_it():
    views = render_views(alone("ball", "", 15.0), 4, 64).astype(float)[..., 0]
    assert views[0, 32, 32] > views[2, 32, 32] + 40  # the light comes from the front
    assert abs(views[0, 32, 32] - FIGURE_RGB["red"][0]) < 25


def test_objects_fit_the_picture_and_the_ground_is_of_one_color():
    for obj in objects(60):
        color = trace(obj, (0, 45, 90), *pixel_centers(32), shadow=False).color.reshape(3, 32, 32)
        assert (color[:, [0, -1]] < 0).all() and (color[:, :, [0, -1]] < 0).all(), obj


def test_sampled_objects_are_of_every_kind_and_their_cameras_as_said():
    placements = objects(300, None)
    assert {obj.relation for obj in placements} == {"", *RELATIONS}
    assert {part.solid for obj in placements for part in obj.parts} == set(SOLIDS)
    for obj in placements:
        low, high = ELEVATIONS[obj.view]
        assert low <= obj.elevation <= high
        assert sum(bool(part.mark) for part in obj.parts) == 1
        assert len({part.color for part in obj.parts}) == len(obj.parts)


@pytest.mark.parametrize("held_out", [False, True])
def test_held_out_objects_are_kept_apart(held_out):
    assert {is_held_out_object(obj) for obj in objects(150, held_out)} == {held_out}
    assert 0.06 < len(HELD_OUT_SOLIDS) / (10 * len(SOLIDS) * (len(MARKS) + 1)) < 0.14


def test_every_caption_is_short_of_known_words_and_read_as_it_is_meant():
    for index, obj in enumerate(objects(1200, None)):
        caption, canonical = describe_object(obj, np.random.default_rng([9, index]))
        assert set(caption_words(f"{caption} {canonical}")) <= set(VIEW_VOCABULARY), caption
        assert len(caption.split()) <= 28, caption
        request = read_views_prompt(caption)
        parts = [f"{p.color} {p.solid} {p.mark} {p.mark_color}".split() for p in request.parts]
        said = f" {request.relation} ".join(map(" ".join, parts)) + f" ; view {request.view or 'any'} ; background "
        assert said + (f"plain {request.background}" if request.background else "any") == canonical, caption


def test_bad_counts_and_sizes_are_refused():
    obj = alone("cube")
    with pytest.raises(ValueError, match="count 0 .* nearest: 1"):
        render_views(obj, 0)
    with pytest.raises(ValueError, match="size 8 .* nearest: 16"):
        render_views(obj, 4, 8)
    assert replace(obj, elevation=30.0).height == obj.height
