"""The verifier of pictures reads rendered pictures right, finds wrong ones wrong, and reads captions of shapes."""

import numpy as np
import pytest

from scripts.datasets.shapes import Group, Placement, Scene, describe, render, sample_scene
from scripts.verifiers.pictures.figures import read_picture
from scripts.verifiers.pictures.prompt import AskedGroup, Request, read_prompt
from scripts.verifiers.pictures.shapes import SHAPES, classify_shape
from scripts.verifiers.pictures.verdict import request_of_scene, verify_picture
from scripts.verifiers.registry import VERIFIERS

SCENES = 100
VERIFIER = VERIFIERS["pictures"]
MAIN_ROWS = ("right colours", "right shapes", "right relations")


def placed(x: float, y: float, radius: float = 0.155) -> Placement:
    return Placement(x, y, radius, 0.0)


def star_above_ring(background: str = "white") -> Scene:
    star = Group("star", "green", "", (placed(0.5, 0.25),))
    ring = Group("ring", "purple", "", (placed(0.5, 0.7),))
    return Scene((star, ring), ((0, "above", 1),), background, "plain")


@pytest.mark.slow
def test_truth_is_read_right_in_99_of_100_cases() -> None:
    tally = VERIFIER.tally(VERIFIER.true_verdicts(SCENES, 1, "as rendered"))
    for row in (*MAIN_ROWS, "right counts", "right sizes", "right background colours", "right background patterns"):
        right, asked = tally[row]
        assert asked > 50 and right >= 0.99 * asked, (row, right, asked)


@pytest.mark.slow
@pytest.mark.parametrize("disturbance", [name for name in VERIFIER.disturbances if name != "as rendered"])
def test_blur_noise_compression_and_recoloring_leave_97_of_100_right(disturbance: str) -> None:
    tally = VERIFIER.tally(VERIFIER.true_verdicts(40, 2, disturbance))
    for row in MAIN_ROWS:
        right, asked = tally[row]
        assert right >= 0.97 * asked, (row, right, asked)


@pytest.mark.slow
def test_changed_requests_are_found_wrong() -> None:
    for kind, (found, asked) in VERIFIER.noticed(SCENES, seed=3).items():
        assert asked > 20 and found >= 0.99 * asked, (kind, found, asked)


def test_a_wrong_color_shape_relation_or_count_is_named() -> None:
    reading = read_picture(render(star_above_ring()))
    star, ring = AskedGroup(1, "", "green", "star"), AskedGroup(1, "", "purple", "ring")
    above = ((0, "above", 1),)
    assert verify_picture(reading, Request((star, ring), above)).right

    verdict = verify_picture(reading, Request((AskedGroup(1, "", "red", "star"), ring), above))
    assert [(item.color_right, item.shape_right) for item in verdict.objects] == [(False, True), (True, True)]
    verdict = verify_picture(reading, Request((AskedGroup(1, "", "green", "heart"), ring), above))
    assert [(item.color_right, item.shape_right) for item in verdict.objects] == [(True, False), (True, True)]
    assert verdict.relations[0].holds and not verdict.relations[0].strict
    verdict = verify_picture(reading, Request((star, ring), ((0, "left of", 1),)))
    assert not verdict.relations[0].holds and verdict.wrong == ("green star is not left of purple ring",)
    verdict = verify_picture(reading, Request((AskedGroup(2, "", "green", "star"), ring), above))
    assert verdict.counts == (False, True) and not verdict.figures_right
    verdict = verify_picture(reading, Request((star,)))
    assert not verdict.figures_right and verdict.wrong == ("2 figures instead of 1",)


def test_only_what_the_caption_says_is_judged() -> None:
    scene = star_above_ring("yellow")
    silent = request_of_scene(scene, "a green star above a purple ring")
    spoken = request_of_scene(scene, "a green star above a purple ring, yellow background")
    assert (silent.background, silent.pattern) == ("", "")
    assert (spoken.background, spoken.pattern) == ("yellow", "")
    reading = read_picture(render(star_above_ring("white")))
    assert verify_picture(reading, silent).background_right is None and verify_picture(reading, silent).right
    assert verify_picture(reading, spoken).background_right is False


def test_an_empty_picture_shows_nothing_that_was_asked_for() -> None:
    verdict = verify_picture(read_picture(np.full((128, 128, 3), 200, dtype=np.uint8)), star_above_ring())
    assert not any(item.color_right or item.shape_right for item in verdict.objects)
    assert not verdict.relations[0].holds and not verdict.right


@pytest.mark.parametrize("container", ["circle", "square", "heart", "ring"])
def test_a_figure_inside_another_is_inside_and_leaves_its_shape_readable(container: str) -> None:
    for shape in SHAPES:
        inner = Group(shape, "yellow", "", (placed(0.5, 0.5, 0.12),))
        outer = Group(container, "blue", "", (placed(0.5, 0.5, 0.38),))
        scene = Scene((inner, outer), ((0, "inside", 1),), "white", "plain")
        assert verify_picture(read_picture(render(scene)), scene).wrong == (), (shape, container)


def test_pictures_of_other_sizes_are_read_alike() -> None:
    scene = star_above_ring()
    for size in (96, 160, 256):
        assert verify_picture(read_picture(render(scene, size)), scene).right, size
    wide = np.concatenate([render(scene, 128), render(scene, 128)], axis=1)
    assert sorted(figure.shape for figure in read_picture(wide).figures) == ["ring", "ring", "star", "star"]


def test_silhouettes_are_named_at_any_place_and_size() -> None:
    y, x = np.mgrid[:90, :120]
    disc = (x - 70) ** 2 + (y - 40) ** 2
    assert classify_shape(disc < 25**2).name == "circle"
    assert classify_shape((disc < 25**2) & (disc > 13**2)).name == "ring"
    assert classify_shape((abs(x - 40) < 9) & (abs(y - 50) < 9)).name == "square"
    splinters = (abs((x - 60) - (y - 45)) < 3) & (abs(x - 60) < 30)
    assert classify_shape(splinters).name == "blob"
    with pytest.raises(ValueError, match="0 pixels"):
        classify_shape(np.zeros((8, 8), dtype=bool))


def test_a_picture_that_is_not_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        read_picture(np.zeros((128, 128, 3)))


def relations_by_color(relations: tuple[tuple[int, str, int], ...], groups: tuple) -> set[tuple[str, str, str]]:
    turned = {"right of": "left of", "below": "above"}
    named = [(groups[a].color, relation, groups[b].color) for a, relation, b in relations]
    return {(b, turned[relation], a) if relation in turned else (a, relation, b) for a, relation, b in named}


def test_the_prompt_reader_agrees_with_the_scenes_of_captions() -> None:
    agreed = 0
    for index in range(300):
        rng = np.random.default_rng([5, index])
        scene = sample_scene(rng, held_out=None)
        caption, canonical = describe(scene, rng)
        request = read_prompt(caption)
        agreed += (
            {(g.count, g.size, g.color, g.shape) for g in request.groups}
            == {(len(g.placements), g.size, g.color, g.shape) for g in scene.groups}
            and len(request.groups) == len(scene.groups)
            and relations_by_color(request.relations, request.groups)
            == relations_by_color(scene.relations, scene.groups)
            and request.background == ("" if canonical.endswith("background any") else scene.background)
            and request.pattern in ("", scene.pattern)
        )
    assert agreed >= 297


@pytest.mark.parametrize(
    ("prompt", "request_"),
    [
        (
            "Two small green stars above a purple ring, white background",
            Request(
                (AskedGroup(2, "small", "green", "star"), AskedGroup(1, "", "purple", "ring")),
                ((0, "above", 1),),
                "white",
            ),
        ),
        (
            "blue heart inside a yellow square",
            Request((AskedGroup(1, "", "blue", "heart"), AskedGroup(1, "", "yellow", "square")), ((0, "inside", 1),)),
        ),
        (
            "a big red disc with a tiny white moon in the middle on gray with dots",
            Request(
                (AskedGroup(1, "large", "red", "circle"), AskedGroup(1, "small", "white", "crescent")),
                ((1, "inside", 0),),
                "gray",
                "dotted",
            ),
        ),
        ("red circle on blue", Request((AskedGroup(1, "", "red", "circle"),), (), "blue")),
        ("a green cross in the top left corner", Request((AskedGroup(1, "", "green", "cross", "top_left"),))),
        ("hearts", Request((AskedGroup(0, "", "", "heart"),))),
    ],
)
def test_prompts_of_strangers_are_read(prompt: str, request_: Request) -> None:
    assert read_prompt(prompt) == request_


def test_a_prompt_without_a_figure_is_refused() -> None:
    with pytest.raises(ValueError, match="names no figure"):
        read_prompt("a sunset over the sea")
