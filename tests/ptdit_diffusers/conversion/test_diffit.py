"""Checkpoints of DiffiT: single files, `ptdit convert`, smaller copies, and what is refused, with nothing written."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from ptdit_diffusers import ClassToImagePipeline, DiffiT2DModel, DiT2DModel
from ptdit_diffusers.cli import main
from ptdit_diffusers.conversion.folder import convert, diffit_guidance
from ptdit_diffusers.conversion.quantize import load_in_fp8, quantize
from ptdit_diffusers.core.backbones.dit import grid_positions
from ptdit_diffusers.core.checkpoint_names import ConversionError
from tests.ptdit_diffusers import diffit_goldens, dit_goldens
from tests.ptdit_diffusers.class_models import tiny_diffit_pipeline, tiny_folder
from tests.ptdit_diffusers.models.test_transformer_diffit import CASE, WINDOWS, error_of, tiny

WEIGHTS = diffit_goldens.weights(CASE)
INDEX = "blocks.1.attn.relative_position_index"
TABLE = "blocks.1.attn.relative_position_bias_table"


def write(form: str, folder) -> str:
    """A checkpoint in one of the forms that exist; its path."""
    path = folder / f"{form}.safetensors"
    if form == "half":
        content = {name: value.half() if value.is_floating_point() else value for name, value in WEIGHTS.items()}
        save_file(content, path)
    elif form == "official":
        save_file(WEIGHTS, path)
    else:
        path = folder / f"{form}.pt"
        content = diffit_goldens.parameters(CASE)
        torch.save({"model": WEIGHTS, "ema": content} if form == "nested" else content, path)
    return str(path)


FORMS = ("official", "half", "nested", "without_indexes")


@pytest.mark.parametrize("form", FORMS)
def test_a_single_file_of_any_form_gives_the_official_numbers(tmp_path, form):
    transformer = DiffiT2DModel.from_single_file(write(form, tmp_path))  # the tables show heads and windows
    assert error_of(transformer.float()) < diffit_goldens.LIMIT
    assert torch.equal(transformer.pos_embed, WEIGHTS["pos_embed"])
    assert transformer.config.num_attention_heads == 4 and transformer.config.window_size is None


@pytest.mark.parametrize("form", ("official", "without_indexes"))
def test_convert_writes_a_folder_of_the_class_conditional_pipeline(tmp_path, form):
    lines = []
    convert(tmp_path / "out", write(form, tmp_path), report=lines.append)
    pipe = ClassToImagePipeline.from_pretrained(tmp_path / "out")
    assert error_of(pipe.transformer) < diffit_goldens.LIMIT
    assert pipe.config.guidance_channels == 3 and pipe.config.guidance_schedule == "power_cosine"
    stored = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == diffit_goldens.parameters(CASE).keys()
    found = "DiffiT of width 48 with 2 layers, 4 heads, windows of 8 x 8 tokens, 10 classes, latents of 16, with"
    assert any(found in line for line in lines)
    count = 2 if form == "official" else 0
    assert any(f"{count} index buffers, checked and left out" in line for line in lines)


def test_guidance_is_chosen_by_the_size_of_latents():
    assert diffit_guidance(32) == {"guidance_scale": 4.4, "guidance_schedule": "power_cosine", "guidance_power": 4.0}
    assert diffit_guidance(64) == {"guidance_scale": 1.49, "guidance_schedule": "constant"}


def test_models_with_small_windows_are_recognized(tmp_path):
    transformer = tiny(**WINDOWS)
    save_file(transformer.state_dict(), tmp_path / "model.safetensors")
    again = DiffiT2DModel.from_single_file(tmp_path / "model.safetensors", shift_window=True)
    assert (again.config.window_size, again.config.sample_size) == (2, 8)
    transformer.save_pretrained(tmp_path / "folder")
    beside = DiffiT2DModel.from_single_file(tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    assert beside.config.shift_window and beside.config.window_size == 2


def test_a_dictionary_of_weights_goes_the_way_of_diffusers(tmp_path):
    diffit_goldens.model(CASE).save_config(tmp_path)
    assert error_of(DiffiT2DModel.from_single_file(dict(WEIGHTS), config=str(tmp_path))) < diffit_goldens.LIMIT
    wrong = WEIGHTS | {INDEX: WEIGHTS[INDEX].T.contiguous()}
    with pytest.raises(ValueError, match=f"{INDEX} is not the index of a window of 8 x 8"):
        DiffiT2DModel.from_single_file(wrong, config=str(tmp_path))


@pytest.mark.slow
def test_files_become_pictures_by_commands_alone(tmp_path, capsys):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(block_out_channels=(32,) * 4, layers_per_block=1, **blocks).save_pretrained(tmp_path / "vae")
    weights = diffit_goldens.weights("diffit_sampler")
    save_file(weights, tmp_path / "diffit.safetensors")
    out, vae = tmp_path / "out", tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    words = ["--transformer", str(tmp_path / "diffit.safetensors"), "--vae", str(vae), "--output", str(out)]
    assert main(["convert", *words]) == 0
    generate = ["generate", "--model", str(out), "--class", "3", "--steps", "2", "--device", "cpu"]
    assert main([*generate, "--output", str(tmp_path / "a.png")]) == 0
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (64, 64) and image.text["guidance"] == "4.4"
    capsys.readouterr()
    assert main([*generate, "--output", str(tmp_path / "b.png"), "--height", "128"]) == 2
    error = capsys.readouterr().err
    assert "--height 128: this model makes 64 x 64 only; nearest: 64" in error and error.count("\n") == 1
    assert not (tmp_path / "b.png").exists()


# --- smaller copies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "package"), [("fp8", "torch"), ("int8", "torchao"), ("q8_0", "gguf")])
@torch.no_grad()
def test_smaller_copies_load_and_compute_nearly_the_same(tmp_path, form, package):
    pytest.importorskip(package)
    folder, smaller = tiny_folder(tmp_path / "model", tiny_diffit_pipeline), tmp_path / form
    if form != "fp8":
        quantize(folder, smaller, form, ("transformer",))
    inputs, same = (torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.tensor([3])), {"dtype": torch.float32}
    expected = diffit_goldens.model("diffit_sampler")(*inputs).sample
    load = {
        "fp8": lambda: load_in_fp8(folder, "transformer", torch.float32),
        "int8": lambda: DiffiT2DModel.from_pretrained(smaller / "transformer", **same),
        "q8_0": lambda: DiffiT2DModel.from_single_file(smaller / "transformer-q8_0.gguf", **same),
    }[form]
    assert 0 < (load()(*inputs).sample - expected).norm() < 0.1 * expected.norm()


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(tmp_path, content, match, **options):
    path = tmp_path / "model.safetensors"
    save_file(content, path)
    attempts = [lambda: DiffiT2DModel.from_single_file(path, **options)]
    if not options:
        attempts.append(lambda: convert(tmp_path / "out", path))
    for attempt in attempts:
        with pytest.raises(ConversionError, match=match) as raised:
            attempt()
        assert "\n" not in str(raised.value)
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"]  # nothing half-written


def test_wrong_index_buffers_are_refused(tmp_path):
    mirrored = WEIGHTS | {INDEX: WEIGHTS[INDEX].T.contiguous()}
    refused(tmp_path, mirrored, f"{INDEX} is not the index of a window of 8 x 8 tokens")
    refused(tmp_path, WEIGHTS | {INDEX: torch.zeros(4, 4, dtype=torch.long)}, f"{INDEX} is not the index")


def test_a_file_for_256_px_is_refused_by_a_configuration_for_512_px(tmp_path):
    match = r"latents of 32.*pos_embed is \(1, 64, 48\), must be \(1, 256, 48\).*bias_table is \(225, 4\), must be"
    refused(tmp_path, WEIGHTS, match, sample_size=32)


def test_tables_of_another_size_than_the_positions_are_refused(tmp_path):
    larger = WEIGHTS | {"pos_embed": grid_positions(6, 6, 48)[None].contiguous()}
    refused(tmp_path, larger, r"bias_table is \(225, 4\), must be \(121, 4\)")
    odd = {name: value for name, value in WEIGHTS.items() if name != INDEX} | {TABLE: torch.zeros(224, 4)}
    refused(tmp_path, odd, r"1 misshapen: blocks.1.*bias_table is \(224, 4\), must be \(225, 4\)")


def test_weights_that_are_missing_or_surplus_are_named(tmp_path):
    content = {name: value for name, value in WEIGHTS.items() if name != TABLE}
    refused(tmp_path, content, f"seems to be DiffiT; 1 missing: {TABLE}; 1 unexpected: {INDEX}")
    refused(tmp_path, WEIGHTS | {"extra": torch.zeros(1)}, "1 unexpected: extra")
    refused(tmp_path, WEIGHTS | {"pos_embed": WEIGHTS["pos_embed"] + 2e-3}, "pos_embed is not DiT's position table")


def test_heads_that_the_tables_do_not_have_are_refused(tmp_path):
    refused(tmp_path, WEIGHTS, "num_attention_heads=6 does not fit .* 4 heads; nearest: 4", num_attention_heads=6)


def test_dit_and_diffit_are_told_apart(tmp_path):
    save_file(WEIGHTS, tmp_path / "diffit.safetensors")
    save_file(dit_goldens.weights("dit_p2"), tmp_path / "dit.safetensors")
    with pytest.raises(ConversionError, match="weights of a DiT; it seems to be DiffiT"):
        DiT2DModel.from_single_file(tmp_path / "diffit.safetensors", num_attention_heads=4)
    with pytest.raises(ConversionError, match="weights of a DiffiT; it seems to be DiT"):
        DiffiT2DModel.from_single_file(tmp_path / "dit.safetensors")
    with pytest.raises(ConversionError, match="is a DiffiT, which --window-size does not fit; leave it out"):
        convert(tmp_path / "out", tmp_path / "diffit.safetensors", window_size=(1, 2, 2))


def test_a_folder_whose_weights_are_for_another_size_is_refused(tmp_path):
    folder = tiny_folder(tmp_path / "model", tiny_diffit_pipeline)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": 16}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"bias_table is \(49, 4\), must be \(225, 4\)"):
        ClassToImagePipeline.from_pretrained(folder)
