"""`ptdit generate --class` on a tiny class-conditional model."""

import os

import pytest
from PIL import Image, ImageChops

from ptdit_diffusers.cli import main
from tests.ptdit_diffusers.class_models import tiny_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "classes")


def generate(model, output, *words: str) -> int:
    fixed = ["--model", str(model), "--output", str(output), "--device", "cpu"]
    return main(["generate", *fixed, *words])


def test_a_class_becomes_images_that_carry_what_made_them(model, tmp_path, capsys):
    assert generate(model, tmp_path / "a.png", "--class", "Red Star", "--steps", "2", "--num-images", "2") == 0
    for index in range(2):
        with Image.open(tmp_path / f"a-{index}.png") as image:
            assert image.size == (64, 64)
            assert image.text["class"] == "Red Star" and image.text["seed"] == str(index)
            assert "prompt" not in image.text and image.text["steps"] == "2"
    options = ("--class", "1", "--steps", "2", "--seed", "1", "--guidance", "4")
    assert generate(model, tmp_path / "b.png", *options) == 0
    with Image.open(tmp_path / "a-1.png") as first, Image.open(tmp_path / "b.png") as again:
        assert (
            max(high for _, high in ImageChops.difference(first, again).getextrema()) <= 1
        )  # another batch rounds otherwise
    assert "saved" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--class", "red sta"), "--class: there is no class 'red sta'; nearest: red star"),
        (("--class", "10"), "--class: class label 10 must be 0 to 9; nearest: 9"),
        (("a red star",), "generates images of classes; give --class in place of the prompt"),
        (("a red star", "--class", "1"), "a prompt and --class exclude each other"),
        (("--class", "1", "--negative-prompt", "blue"), "--negative-prompt does not fit --model"),
        (("--class", "1", "--num-views", "4"), "--num-views does not fit --model"),
        ((), "give a prompt, for example"),
        (("--class", "1", "--height", "72"), "72 is not a multiple of 16"),
    ],
)
def test_bad_input_is_one_line_with_exit_code_2_and_leaves_nothing(model, tmp_path, capsys, words, expected):
    assert generate(model, tmp_path / "a.png", *words) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_model_of_prompts_is_not_asked_for_a_class(tiny_model_folder, tmp_path, capsys):
    assert generate(tiny_model_folder, tmp_path / "a.png", "--class", "1") == 2
    assert "reads prompts, not classes; give a prompt in place of --class" in capsys.readouterr().err


def test_fp8_storage_is_used_when_asked_for(model, tmp_path, capsys):
    assert generate(model, tmp_path / "a.png", "--class", "1", "--steps", "2", "--quantize", "fp8") == 0
    assert "quantize: fp8" in capsys.readouterr().out
