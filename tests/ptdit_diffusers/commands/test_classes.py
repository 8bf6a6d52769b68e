"""`ptdit generate --class` on a tiny class-conditional model."""

import os

import pytest
from PIL import Image, ImageChops

from ptdit_diffusers.cli import main
from tests.ptdit_diffusers.class_models import tiny_diffit_pipeline, tiny_folder
from tests.ptdit_diffusers.pipelines.test_pipeline_diffit_image import tiny_pipeline as tiny_image_pipeline


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


def test_diffit_is_guided_as_its_folder_says_and_makes_one_size(tmp_path, capsys):
    folder = tiny_folder(tmp_path / "diffit", tiny_diffit_pipeline)
    assert generate(folder, tmp_path / "a.png", "--class", "1", "--steps", "2") == 0
    with Image.open(tmp_path / "a.png") as image:
        assert image.text["guidance"] == "4.4"
    capsys.readouterr()
    assert generate(folder, tmp_path / "b.png", "--class", "1", "--width", "128") == 2
    assert "--width 128: this model makes 64 x 64 only; nearest: 64" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()


def test_a_model_without_a_vae_makes_images_of_classes(tmp_path, capsys):
    folder = tiny_folder(tmp_path / "pixels", tiny_image_pipeline)
    assert generate(folder, tmp_path / "a.png", "--class", "blue disk") == 0
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (8, 8) and image.text["steps"] == "18" and image.text["guidance"] == "1.0"
    capsys.readouterr()
    words = ("--class", "1", "--height", "48")
    assert generate(folder, tmp_path / "b.png", *words, "--quantize", "fp8") == 2
    assert "--quantize does not fit --model" in capsys.readouterr().err
    assert generate(folder, tmp_path / "b.png", "--class", "reed star") == 2
    assert "there is no class 'reed star'; nearest: red star" in capsys.readouterr().err
    unconditional = tiny_folder(tmp_path / "unconditional", lambda: tiny_image_pipeline(num_classes=0))
    assert generate(unconditional, tmp_path / "b.png", "--class", "1") == 2
    assert "has no classes; use it in Python, with DiffiTImagePipeline" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()
