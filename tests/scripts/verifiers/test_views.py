"""The verifier of views: right on true renderings, wrong where views are exchanged, foreign, or not as asked."""

import numpy as np
import pytest

from scripts.datasets.solids import Part, SolidObject, describe_object, render_views, sample_object
from scripts.datasets.solids.objects import arrange
from scripts.verifiers.disturbances import exchange_one_view, freeze, reverse_but_first, soften
from scripts.verifiers.views.prompt import AskedPart, ViewsRequest, read_views_prompt
from scripts.verifiers.views.verdict import verify_views


def mug() -> SolidObject:
    return SolidObject(arrange((Part("mug", "yellow", "stripe", "black"),), "", 1.0), "", "", 17.0, "pink")


@pytest.mark.parametrize("index", range(4))
def test_true_views_are_right(index):
    rng = np.random.default_rng([51, index])
    obj = sample_object(rng, None)
    caption, _ = describe_object(obj, rng)
    verdict = verify_views(read_views_prompt(caption), render_views(obj, 8, 64))
    assert verdict.right and verdict.overlap > 0.85, (caption, verdict)


def test_soft_views_are_right_and_exchanged_or_foreign_ones_are_not():
    request, rng = read_views_prompt("a yellow mug with a black stripe"), np.random.default_rng(0)
    views = render_views(mug(), 8, 64)
    assert verify_views(request, soften(views, rng)).right
    for spoil in (reverse_but_first, freeze):
        assert not verify_views(request, spoil(views, rng)).order, spoil
    assert not verify_views(request, exchange_one_view(views, rng)).one_object


@pytest.mark.parametrize(
    ("prompt", "wrong"),
    [
        ("a yellow cylinder with a black stripe", "solid wrong"),
        ("a red mug with a black stripe", "colour wrong"),
        ("a yellow mug with a black dot", "mark wrong"),
        ("a yellow mug with a blue stripe", "mark wrong"),
        ("a yellow mug with a black stripe seen from above", "camera wrong"),
        ("a yellow mug with a black stripe on a blue background", "background wrong"),
    ],
)
def test_what_is_not_asked_for_is_wrong(prompt, wrong):
    assert verify_views(read_views_prompt(prompt), render_views(mug(), 4, 48)).wrong == (wrong,)


def test_prompts_of_strangers_are_read():
    ball, cube = AskedPart("ball", "red", "stripe", "white"), AskedPart("cube", "blue")
    for prompt in (
        "red sphere with a white stripe on a blue block",
        "A blue cube under a red ball with a white line.",
        "a blue cube with a red ball with a stripe in white on top",
    ):
        assert read_views_prompt(prompt) == ViewsRequest((ball, cube), "on"), prompt
    with pytest.raises(ValueError, match="names 0 solids"):
        read_views_prompt("a red circle")


def test_views_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="allowed"):
        verify_views(ViewsRequest((AskedPart("cube"),)), np.zeros((2, 8, 9, 3), np.uint8))
