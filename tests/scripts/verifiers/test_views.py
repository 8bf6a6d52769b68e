"""The judge of views: right on true renderings, wrong when views are exchanged, of another object, or not as asked."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.datasets.solids import Part, SolidObject, describe_object, render_views, sample_object
from scripts.datasets.solids.objects import arrange
from scripts.verifiers.registry import SERIES, reversed_but_first, soft, still, with_a_stranger
from scripts.verifiers.views.prompt import AskedPart, ViewsRequest, read_views_prompt
from scripts.verifiers.views.verdict import verify_views
from scripts.verify_sequences import main, strip


def mug() -> SolidObject:
    return SolidObject(arrange((Part("mug", "yellow", "stripe", "black"),), "", 1.0), "", "", 17.0, "pink")


@pytest.mark.parametrize("index", range(4))
def test_true_views_are_right(index):
    rng = np.random.default_rng([51, index])
    thing = sample_object(rng, None)
    caption, _ = describe_object(thing, rng)
    verdict = verify_views(read_views_prompt(caption), render_views(thing, 8, 64))
    assert verdict.right and verdict.overlap > 0.85, (caption, verdict)


def test_soft_views_are_right_and_exchanged_or_foreign_ones_are_not():
    request, rng = read_views_prompt("a yellow mug with a black stripe"), np.random.default_rng(0)
    views = render_views(mug(), 8, 64)
    assert verify_views(request, soft(views, rng)).right
    for spoil in (reversed_but_first, still):
        assert not verify_views(request, spoil(views, rng)).order, spoil
    assert not verify_views(request, with_a_stranger(views, rng)).one_object


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


def test_a_strip_shows_first_and_last():
    pictures = np.arange(17, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3)
    assert strip(pictures, 9)[0, ::4, 0].tolist() == list(range(0, 17, 2))


@pytest.mark.parametrize("world", SERIES)
def test_the_command_checks_the_judge_on_true_series(world, capsys):
    arguments = [world, "--check-truth", "1", "--size", "64", "--length", "5" if world == "clips" else "4"]
    assert main(arguments) == 0
    assert "passed" in capsys.readouterr().out


def test_the_command_refuses_bad_input_with_exit_code_2():
    with pytest.raises(SystemExit) as refusal:
        main(["views", "--check-truth", "0"])
    assert refusal.value.code == 2


def test_the_command_judges_a_model_and_writes_results(tiny_model_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["clips", "--model", str(tiny_model_folder), "--prompts", "2", "--steps", "1", "--length", "5"]
    assert main([*arguments, "--size", "64", "--output", str(output), "--device", "cpu"]) == 0
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert len(results["series"]) == 2 and results["table"]["asked motions"]["asked"] >= 2
    assert results["means"]["flicker, bytes, true pictures"] < 0.1 and results["held_out"]
    assert Image.open(output / "strips" / "0001.png").size == (5 * 64, 64) and (output / "sheet_01.png").exists()
