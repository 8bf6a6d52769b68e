"""`from_single_file` of transformer and VAE on files as they are released: nested, averaged, nothing else given."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptdit_diffusers import AutoencoderKLOpenSoraPlan, PTDiTTransformer3DModel
from ptdit_diffusers.core.checkpoint_names import ConversionError
from tests.ptdit_diffusers import goldens

GOLDEN = goldens.FOLDER
SMALL = {"num_attention_heads": 4, "window_size": (1, 4, 4)}  # what the golden weights do not tell


def transformer_weights() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "dit_weights.safetensors")


def vae_golden() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights of the VAE of the goldens, and the goldens."""
    golden = load_file(GOLDEN / "causalvae.safetensors")
    return {key.removeprefix("weights."): value for key, value in golden.items() if "weights." in key}, golden


def training_run(weights: dict[str, torch.Tensor], averaged: bool) -> dict:
    """A raw checkpoint of VAE training; where there are averages, the other weights are wrong on purpose."""
    factor = 2 if averaged else 1
    generator = {f"module.{name}": value * factor for name, value in weights.items()} | {"loss.logvar": torch.ones(1)}
    averages = {f"module.{name}": value for name, value in weights.items()} if averaged else {}
    return {"state_dict": {"gen_model": generator}, "ema_state_dict": averages, "step": 7}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights},
        lambda weights: {"state_dict": {name: torch.zeros_like(weights[name]) for name in weights}, "ema": weights},
        lambda weights: training_run(weights, averaged=True),
        lambda weights: training_run(weights, averaged=False),
    ],
    ids=["flat", "state_dict", "averages beside state_dict", "training run", "training run without averages"],
)
@torch.no_grad()
def test_a_raw_checkpoint_of_the_vae_gives_the_goldens(tmp_path, wrap):
    weights, golden = vae_golden()
    torch.save(wrap(weights), tmp_path / "checkpoint.ckpt")
    vae = AutoencoderKLOpenSoraPlan.from_single_file(tmp_path / "checkpoint.ckpt")
    mode = vae.encode(golden["image.pixels"]).latent_dist.mode() * vae.config.scaling_factor
    assert (mode - golden["image.latent_mode_scaled"]).abs().max() < 2e-4


@pytest.mark.parametrize("name", ["official.pt", "official.safetensors"])
@torch.no_grad()
def test_a_transformer_gives_the_goldens_without_a_configuration(tmp_path, name):
    weights, path = transformer_weights(), tmp_path / name
    if name.endswith(".pt"):
        torch.save({"ema": {f"module.{key}": value for key, value in weights.items()}, "model": {}}, path)
    else:
        save_file(weights, path)
    transformer = PTDiTTransformer3DModel.from_single_file(str(path), **SMALL)
    tensors, _ = goldens.load("i_image_square")
    out = transformer(**goldens.inputs(tensors)).sample
    assert (out - tensors["out"]).abs().max() < goldens.LIMIT
    half = PTDiTTransformer3DModel.from_single_file(str(path), dtype=torch.bfloat16, **SMALL)
    assert half.proj_out.weight.dtype == torch.bfloat16


def test_heads_that_no_known_size_has_must_be_said(tmp_path):
    save_file(transformer_weights(), tmp_path / "a.safetensors")
    with pytest.raises(ConversionError, match="width 48 is no known size.*num_attention_heads"):
        PTDiTTransformer3DModel.from_single_file(tmp_path / "a.safetensors")


def test_a_configuration_of_another_depth_is_refused(tmp_path):
    save_file(transformer_weights(), tmp_path / "a.safetensors")
    transformer = PTDiTTransformer3DModel.from_single_file(tmp_path / "a.safetensors", **SMALL)
    for layers, words in ((1, " unexpected: transformer_blocks.1."), (3, " missing: transformer_blocks.2.")):
        transformer.register_to_config(num_layers=layers)
        transformer.save_config(tmp_path / str(layers))
        with pytest.raises(ConversionError, match=words):
            PTDiTTransformer3DModel.from_single_file(tmp_path / "a.safetensors", config=tmp_path / str(layers))


class Evil:
    """Unpickling it would make a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("model", [PTDiTTransformer3DModel, AutoencoderKLOpenSoraPlan])
def test_a_bad_file_is_refused_in_words_and_runs_nothing(tmp_path, model):
    trap, evil, half, other = (tmp_path / name for name in ("trap", "evil.pt", "half.pt", "other.safetensors"))
    evil.write_bytes(pickle.dumps(Evil(trap)))
    torch.save(transformer_weights(), half)
    half.write_bytes(half.read_bytes()[:50_000])
    save_file({"blocks.0.cross_attn.q_linear.weight": torch.ones(4, 4)}, other)
    for path, words in ((evil, "wants to run code"), (half, "cut off"), (other, "seems to be PixArt")):
        with pytest.raises(ConversionError, match=words):
            model.from_single_file(path)
    assert not trap.exists()


def test_groups_of_the_norms_can_be_named_where_widths_are_no_multiples_of_32(tmp_path):
    small = {"hidden_size": 8, "hidden_size_mult": (1, 1, 1, 1), "num_res_blocks": 1, "norm_num_groups": 4}
    vae = AutoencoderKLOpenSoraPlan(**small)
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    with pytest.raises(ConversionError, match="width 8 is not a multiple of norm_num_groups=32"):
        AutoencoderKLOpenSoraPlan.from_single_file(tmp_path / "vae.safetensors")
    loaded = AutoencoderKLOpenSoraPlan.from_single_file(tmp_path / "vae.safetensors", norm_num_groups=4)
    assert {name: loaded.config[name] for name in small} == small | {"hidden_size_mult": [1, 1, 1, 1]}
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in vae.state_dict().items())
