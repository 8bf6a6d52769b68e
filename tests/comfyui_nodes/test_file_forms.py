"""Both heads, diffusers and ComfyUI, take the same from every form of file: configuration, weights and output."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ptdit_diffusers import AutoencoderKLOpenSoraPlan, PTDiTTransformer3DModel
from ptdit_diffusers.core.backbones.parameters import PTDiTParameters, VAEParameters
from ptdit_diffusers.core.backbones.ptdit import PTDiTBackbone
from ptdit_diffusers.core.backbones.vae import PTDiTVAEBackbone
from ptdit_diffusers.core.checkpoint_names import (
    find_weights,
    official_transformer_state_dict,
    official_vae_state_dict,
)
from ptdit_diffusers.core.configuration import loaded_transformer_config, loaded_vae_config

from .file_forms import NETWORK, VAE, VAE_SETTINGS, transformer_forms, vae_forms

TRANSFORMERS, VAES = transformer_forms(), vae_forms()
COMFYUI_PREFIXES = ("model.diffusion_model.", "model.")  # that ComfyUI itself removes


def read_as_comfyui(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what ComfyUI hands to detection, where its loader reads the file; deeper nestings are opened here."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            weights, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    else:
        weights, metadata = find_weights(torch.load(path, weights_only=True))[1], {}
    for prefix in COMFYUI_PREFIXES:
        inner = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
        if inner:
            return inner, metadata
    return weights, metadata


def inputs(conditions: bool) -> dict[str, Any]:
    """Return arguments of a forward for 16 x 24 tokens."""
    generator = torch.Generator().manual_seed(3)
    sizes = {"resolution": torch.tensor([[256.0, 384.0]]), "aspect_ratio": torch.tensor([[256 / 384]])}
    return {
        "timestep": torch.tensor([631.3]),
        "encoder_hidden_states": torch.randn(1, 5, NETWORK["caption_channels"], generator=generator),
        **(sizes if conditions else {}),
    }


def latents() -> Tensor:
    return torch.randn(1, 4, 1, 32, 48, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("form", TRANSFORMERS)
@torch.no_grad()
def test_both_heads_take_the_same_transformer_from_a_file(tmp_path, form):
    path = TRANSFORMERS[form](tmp_path / "file")
    diffusers_head = PTDiTTransformer3DModel.from_single_file(path)
    weights, metadata = read_as_comfyui(path)
    config = loaded_transformer_config(weights, metadata=metadata)
    parameters = PTDiTParameters.from_config(config)
    assert PTDiTParameters.from_config(diffusers_head.config) == parameters
    assert (parameters.num_attention_heads == 8) == ("packed" in form or form in ("header", "header with components"))
    assert parameters.additional_conditions == ("conditions" in form)

    comfyui_head = PTDiTBackbone()
    comfyui_head.build(parameters)
    comfyui_head.load_state_dict(official_transformer_state_dict(weights))
    given = inputs(parameters.additional_conditions)
    expected = diffusers_head.flow(diffusers_head(latents(), **given).sample)
    found = comfyui_head.flow(comfyui_head.predict(latents(), **given))
    assert expected.std() > 0.01 and (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("form", VAES)
@torch.no_grad()
def test_both_heads_take_the_same_vae_from_a_file(tmp_path, form):
    path = VAES[form](tmp_path / "file")
    diffusers_head = AutoencoderKLOpenSoraPlan.from_single_file(path)
    weights, metadata = read_as_comfyui(path)
    parameters = VAEParameters.from_config(loaded_vae_config(weights, metadata))
    assert VAEParameters.from_config(diffusers_head.config) == parameters
    settings = VAE_SETTINGS if "header" in form or "packed" in form else {}
    assert parameters == VAEParameters(**VAE | settings)

    comfyui_head = PTDiTVAEBackbone()
    comfyui_head.build(parameters)
    comfyui_head.load_state_dict(official_vae_state_dict(weights))
    pixels = torch.rand(1, 3, 5, 16, 24, generator=torch.Generator().manual_seed(5)) * 2 - 1
    expected = diffusers_head.encode(pixels).latent_dist.parameters
    assert (comfyui_head.encode_moments(pixels) - expected).abs().max() < 1e-5
