"""Loading in little memory, as `ptdit generate` does it, and results that are no pictures."""

import gc
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptdit_diffusers.cli import main
from ptdit_diffusers.commands import generate as command
from ptdit_diffusers.commands import loading
from ptdit_diffusers.commands.generate import choose_dtype
from ptdit_diffusers.commands.loading import OFFLOADS, Plan, check_plan, encode, load_rest
from ptdit_diffusers.commands.terminal import UserError

PROMPT = "a red circle above a blue square"


def generate(folder: Path, target: Path, *words: str) -> int:
    fixed = ("--model", str(folder), "--output", str(target), "--steps", "2")
    return main(["generate", PROMPT, *fixed, "--device", "cpu", *words])


def picture(plan: Plan) -> Tensor:
    """Latents of two steps."""
    text = encode(plan, PROMPT, "", True)
    pipe = load_rest(plan)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(**text, num_inference_steps=2, generator=generator, output_type="pt").images.cpu()


def test_the_text_encoder_is_gone_before_the_rest_is_loaded(tiny_model_folder, tmp_path, monkeypatch):
    from transformers import T5EncoderModel

    alive = []

    def load(plan: Plan):
        alive.append(sum(type(thing) is T5EncoderModel for thing in gc.get_objects()))
        return load_rest(plan)

    gc.collect()
    before = sum(type(thing) is T5EncoderModel for thing in gc.get_objects())
    monkeypatch.setattr(command, "load_rest", load)
    assert generate(tiny_model_folder, tmp_path / "a.png") == 0
    assert alive == [before]


def test_encoding_first_changes_nothing(tiny_model_folder):
    from ptdit_diffusers import PTDiTPipeline

    pipe = PTDiTPipeline.from_pretrained(tiny_model_folder)
    generator = torch.Generator().manual_seed(0)
    expected = pipe(PROMPT, num_inference_steps=2, generator=generator, output_type="pt").images
    assert torch.equal(picture(Plan(tiny_model_folder, "cpu", "fp32")), expected)


def test_layers_that_are_brought_in_one_by_one_compute_the_same(tiny_model_folder):
    expected = picture(Plan(tiny_model_folder, "cpu", "fp32"))
    assert torch.equal(picture(Plan(tiny_model_folder, "cpu", "fp32", offload="group")), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("quantized", [None, "fp8"])
def test_offloading_on_a_gpu_computes_the_same(tiny_model_folder, offload, quantized):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    expected = picture(Plan(tiny_model_folder, "cuda", "bf16", quantize=quantized))
    found = picture(Plan(tiny_model_folder, "cuda", "bf16", offload, quantized))
    assert (found - expected).abs().max() < 0.02


def test_what_cannot_save_memory_here_is_refused_in_one_line(tiny_model_folder, tmp_path, capsys, monkeypatch):
    assert generate(tiny_model_folder, tmp_path / "a.png", "--offload", "model") == 2
    assert "--dtype bf16, --quantize int8" in (errors := capsys.readouterr().err) and errors.count("\n") == 1
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    assert generate(tiny_model_folder, tmp_path / "a.png", "--quantize", "int8") == 2
    assert "pip install torchao" in (errors := capsys.readouterr().err) and errors.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_fp8_is_refused_on_apples_gpus_before_anything_is_loaded():
    with pytest.raises(UserError, match="--quantize fp8: mps has no float8; use --dtype bf16 or --quantize int8"):
        check_plan(None, "fp8", "mps")


@pytest.mark.parametrize("real", [True, False])
def test_a_gpu_that_only_emulates_bf16_computes_in_fp32_by_default(tiny_model_folder, monkeypatch, real):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: real or including_emulation)
    assert choose_dtype("auto", "cuda", tiny_model_folder).name == ("bf16" if real else "fp32")


def test_a_large_model_runs_in_bf16_by_default(tiny_model_folder, monkeypatch):
    assert choose_dtype("auto", "cpu", tiny_model_folder).name == "fp32"
    monkeypatch.setattr(command, "LARGE_MODEL", 1000)
    choice = choose_dtype("auto", "cpu", tiny_model_folder)
    assert choice.name == "bf16" and "too large for fp32" in choice.why


def changed(folder: Path, target: Path, part: str, name: str, value: float) -> Path:
    """A copy of a model with all numbers of one weight replaced."""
    shutil.copytree(folder, target)
    (path,) = (target / part).glob("*.safetensors")
    state = load_file(path)
    state[name] = torch.full_like(state[name], value)
    save_file(state, path, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("part", "name", "what"),
    [
        ("text_encoder", "encoder.final_layer_norm.weight", "prompt embeddings"),
        ("transformer", "proj_out.bias", "latents"),
        ("vae", "decoder.conv_out.conv.bias", "decoded pixels"),
    ],
)
def test_numbers_that_overflow_are_an_error_and_no_picture(tiny_model_folder, tmp_path, capsys, part, name, what):
    folder = changed(tiny_model_folder, tmp_path / "model", part, name, float("inf"))
    assert generate(folder, tmp_path / "a.png") == 2
    errors = capsys.readouterr().err.splitlines()[-1]
    assert errors.startswith("ptdit: the ") and what in errors and "NaN" in errors and name in errors
    assert not (tmp_path / "a.png").exists()


def test_a_black_picture_is_saved_with_a_warning(tiny_model_folder, tmp_path, capsys):
    folder = changed(tiny_model_folder, tmp_path / "model", "vae", "decoder.conv_out.conv.bias", -50.0)
    assert generate(folder, tmp_path / "a.png") == 0
    assert "warning: 1 of 1 results are all black" in capsys.readouterr().err
    assert Image.open(tmp_path / "a.png").convert("L").getextrema() == (0, 0)
    assert generate(tiny_model_folder, tmp_path / "b.png") == 0
    assert "black" not in capsys.readouterr().err
