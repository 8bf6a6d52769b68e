"""`ptdit generate --lora`: the picture is the pipeline's, strengths count, bad files end before anything is loaded."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ptdit_diffusers import PTDiTPipeline
from ptdit_diffusers.cli import main
from ptdit_diffusers.core.few_steps import DISTILLED, LORA_FILE
from tests.ptdit_diffusers.class_models import tiny_folder
from tests.ptdit_diffusers.pipelines.test_ptdit_lora_text import random_lora

pytest.importorskip("peft")
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def files(tiny_model_folder, tmp_path_factory):
    """Two LoRAs: one for both networks in a folder, and one of few steps for the transformer in a file."""
    folder, pipe = tmp_path_factory.mktemp("loras"), PTDiTPipeline.from_pretrained(tiny_model_folder)
    (folder / "style").mkdir()
    save_file(random_lora(pipe, "transformer", "text_encoder"), folder / "style" / LORA_FILE)
    facts = {DISTILLED: json.dumps({"steps": 3})}
    save_file(random_lora(pipe, "transformer", seed=1), folder / "few.safetensors", facts)
    return folder


def generate(model, output, *words: str) -> int:
    fixed = ["--model", str(model), "--output", str(output), "--device", "cpu"]
    return main(["generate", *fixed, *words])


def picture(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_the_picture_is_that_of_the_pipeline_with_the_same_loras(files, tiny_model_folder, tmp_path, capsys):
    loras = ["--lora", str(files / "style"), "--lora", str(files / "few.safetensors")]
    words = [PROMPT, "--steps", "2", "--guidance", "1"]
    assert (
        generate(tiny_model_folder, tmp_path / "a.png", *words, *loras, "--lora-scale=-0.5", "--lora-scale=1.5") == 0
    )
    assert "left out" not in capsys.readouterr().err  # each half of the pipeline lacks the other
    assert generate(tiny_model_folder, tmp_path / "plain.png", *words) == 0

    pipe = PTDiTPipeline.from_pretrained(tiny_model_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(files / "style", adapter_name="style")
    pipe.load_lora_weights(files, weight_name="few.safetensors", adapter_name="few")
    pipe.set_adapters(["style", "few"], [-0.5, 1.5])
    expected = pipe(
        PROMPT, num_inference_steps=2, guidance_scale=1, generator=[torch.Generator().manual_seed(0)]
    ).images[0]
    assert np.abs(picture(tmp_path / "a.png") - np.asarray(expected)).max() <= 1
    assert np.abs(picture(tmp_path / "a.png") - picture(tmp_path / "plain.png")).max() > 5
    with Image.open(tmp_path / "a.png") as image:
        assert image.text["lora_0"] == "style, scale -0.5" and image.text["lora_1"] == "few.safetensors, scale 1.5"


def test_a_lora_of_few_steps_brings_its_steps_and_no_guidance(files, tiny_model_folder, tmp_path, capsys):
    assert generate(tiny_model_folder, tmp_path / "a.png", PROMPT, "--lora", str(files / "few.safetensors")) == 0
    with Image.open(tmp_path / "a.png") as image:
        assert image.text["steps"] == "3" and image.text["guidance"] == "1.0"
    assert "distilled" not in capsys.readouterr().err


def test_a_class_model_takes_a_lora(tmp_path):
    model = tiny_folder(tmp_path / "model")
    layer = "transformer.blocks.0.mlp.fc1"
    save_file({f"{layer}.lora_A.weight": torch.ones(2, 48), f"{layer}.lora_B.weight": torch.ones(192, 2)},
              tmp_path / "lora.safetensors")  # fmt: skip
    words = ("--class", "red star", "--steps", "2")
    assert generate(model, tmp_path / "a.png", *words, "--lora", str(tmp_path / "lora.safetensors")) == 0
    assert generate(model, tmp_path / "plain.png", *words) == 0
    assert not np.array_equal(picture(tmp_path / "a.png"), picture(tmp_path / "plain.png"))


def test_bad_files_and_numbers_are_one_line_before_anything_is_loaded(
    files, tiny_model_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("ptdit_diffusers.commands.generate.load_parts", lambda *_: pytest.fail("loaded"))
    save_file({"layer.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((files / "few.safetensors").read_bytes()[:30])
    (tmp_path / "lora.bin").write_bytes(b"pickle")
    style, few = str(files / "style"), str(files / "few.safetensors")
    before = sorted(os.listdir(tmp_path))
    for words, expected in (
        (["--lora", str(tmp_path / "none.safetensors")], "is not there"),
        (["--lora", str(tmp_path)], f"has no {LORA_FILE}"),
        (["--lora", str(tmp_path / "lora.bin")], "is no .safetensors file"),
        (["--lora", str(tmp_path / "cut.safetensors")], "cannot be read"),
        (["--lora", str(tmp_path / "model.safetensors")], "is no LoRA; its first weights are layer.weight"),
        (["--lora", style, "--lora-scale", "1", "--lora-scale", "2"], "2 --lora-scale for 1 --lora"),
        (["--lora-scale", "1"], "1 --lora-scale for 0 --lora"),
        (["--lora", style, "--lora-scale", "nan"], "--lora-scale"),
        (["--lora", few, "--lora", few], "both distilled for few steps"),
        (["--lora", style, "--quantize", "int8"], "--lora changes weights that --quantize keeps"),
    ):
        assert generate(tiny_model_folder, tmp_path / "a.png", PROMPT, *words) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1, error
    assert sorted(os.listdir(tmp_path)) == before


def test_a_bad_file_is_refused_before_a_model_is_downloaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ptdit_diffusers.commands.generate.download", lambda *_: pytest.fail("downloaded"))
    assert generate("owner/name", tmp_path / "a.png", PROMPT, "--lora", str(tmp_path / "none.safetensors")) == 2
    assert "is not there" in capsys.readouterr().err


def test_a_lora_of_another_model_is_refused_and_leaves_no_picture(tiny_model_folder, tmp_path, capsys):
    layer = "transformer.transformer_blocks.0.attn1.to_q"
    save_file({f"{layer}.lora_A.weight": torch.ones(2, 9), f"{layer}.lora_B.weight": torch.ones(9, 2)},
              tmp_path / "wide.safetensors")  # fmt: skip
    assert generate(tiny_model_folder, tmp_path / "a.png", PROMPT, "--lora", str(tmp_path / "wide.safetensors")) == 2
    assert "attn1.to_q" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
