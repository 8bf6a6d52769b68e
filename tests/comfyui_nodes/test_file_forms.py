"""Both hosts, diffusers and ComfyUI, take the same from every form of file: configuration, weights and output."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptdit_diffusers import AutoencoderKLOpenSoraPlan, PTDiTTransformer3DModel
from ptdit_diffusers.conversion import quantize
from ptdit_diffusers.core.backbones.parameters import PTDiTParameters, VAEParameters
from ptdit_diffusers.core.backbones.ptdit import PTDiTBackbone
from ptdit_diffusers.core.backbones.vae import PTDiTVAEBackbone
from ptdit_diffusers.core.checkpoint_names import (
    find_weights,
    official_transformer_state_dict,
    official_vae_state_dict,
)
from ptdit_diffusers.core.configuration import loaded_transformer_config, loaded_vae_config

from .file_forms import NETWORK, SETTINGS, VAE, VAE_SETTINGS, network, safetensors, transformer_forms, vae_forms
from .graph import Graph

TRANSFORMERS, VAES = transformer_forms(), vae_forms()
COMFYUI_PREFIXES = ("model.diffusion_model.", "model.")  # that ComfyUI itself removes
COMFYUI_NESTINGS = ("flat", "state_dict", "model")  # its loader of networks opens no others; ours of VAEs opens all


def inputs() -> dict[str, Tensor]:
    """Return arguments of a forward for 16 x 24 tokens, and a clip for the VAE."""
    generator = torch.Generator().manual_seed(3)
    return {
        "latents": torch.randn(1, 4, 1, 32, 48, generator=generator),
        "timestep": torch.tensor([631.3]),
        "encoder_hidden_states": torch.randn(1, 5, NETWORK["caption_channels"], generator=generator),
        "pixels": torch.rand(5, 16, 24, 3, generator=generator),
    }


def sizes(conditions: bool) -> dict[str, Tensor]:
    """Return the size conditions that belong to the inputs."""
    if not conditions:
        return {}
    return {"resolution": torch.tensor([[256.0, 384.0]]), "aspect_ratio": torch.tensor([[256 / 384]])}


def in_diffusers(path: Path) -> tuple[PTDiTParameters, Tensor]:
    """Return the configuration of a transformer that diffusers loads, and its prediction with as many windows."""
    model, given = PTDiTTransformer3DModel.from_single_file(path), inputs()
    parameters = PTDiTParameters.from_config(model.config)
    window, ratio = model.auto_windows(*given["latents"].shape[-2:])
    sample = model(
        given["latents"],
        given["encoder_hidden_states"],
        given["timestep"],
        window_size=window,
        proxy_ratio=ratio,
        **sizes(parameters.additional_conditions),
    ).sample
    return parameters, model.flow(sample)


def vae_in_diffusers(path: Path) -> tuple[VAEParameters, Tensor]:
    """Return the configuration of a VAE that diffusers loads, and its latents."""
    vae = AutoencoderKLOpenSoraPlan.from_single_file(path)
    pixels = inputs()["pixels"].movedim(-1, 0).unsqueeze(0) * 2 - 1
    return VAEParameters.from_config(vae.config), vae.encode(pixels).latent_dist.mode()


# --- without ComfyUI: what it asks of the core -----------------------------------------------------------------


def read_as_comfyui(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what ComfyUI hands to detection; nestings that its loader does not open are opened, too."""
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


@pytest.mark.parametrize("form", TRANSFORMERS)
@torch.no_grad()
def test_both_hosts_take_the_same_transformer_from_a_file(tmp_path, form):
    path = TRANSFORMERS[form](tmp_path / "file")
    parameters, expected = in_diffusers(path)
    weights, metadata = read_as_comfyui(path)
    assert PTDiTParameters.from_config(loaded_transformer_config(weights, metadata=metadata)) == parameters
    assert (parameters.num_attention_heads == 8) == ("packed" in form or form in ("header", "header with components"))
    assert parameters.additional_conditions == ("conditions" in form)

    backbone, given = PTDiTBackbone(), inputs()
    backbone.build(parameters)
    backbone.load_state_dict(official_transformer_state_dict(weights))
    found = backbone.flow(
        backbone.predict(
            given["latents"],
            given["timestep"],
            given["encoder_hidden_states"],
            None,
            **sizes(parameters.additional_conditions),
            **dict(zip(("window_size", "proxy_ratio"), backbone.auto_windows(32, 48), strict=True)),
        )
    )
    assert expected.std() > 0.01 and (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("form", VAES)
@torch.no_grad()
def test_both_hosts_take_the_same_vae_from_a_file(tmp_path, form):
    path = VAES[form](tmp_path / "file")
    parameters, expected = vae_in_diffusers(path)
    weights, metadata = read_as_comfyui(path)
    assert VAEParameters.from_config(loaded_vae_config(weights, metadata)) == parameters
    assert parameters == VAEParameters(**VAE | (VAE_SETTINGS if "header" in form or "packed" in form else {}))

    vae = PTDiTVAEBackbone()
    vae.build(parameters)
    vae.load_state_dict(official_vae_state_dict(weights))
    found = vae.encode_moments(inputs()["pixels"].movedim(-1, 0).unsqueeze(0) * 2 - 1).chunk(2, dim=1)[0]
    assert expected.std() > 0.01 and (found - expected).abs().max() < 1e-5


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
@pytest.mark.parametrize("carries", [True, False])
def test_both_hosts_take_the_same_configuration_from_a_gguf_file(tmp_path, monkeypatch, carries):
    import gguf

    folder = tmp_path / "model/transformer"
    settings = SETTINGS if carries else {}
    PTDiTTransformer3DModel.from_single_file(safetensors(network(), settings)(tmp_path / "a")).save_pretrained(folder)
    (tmp_path / "model/model_index.json").write_text("{}")
    if not carries:
        monkeypatch.setattr(quantize, "GGUF_CONFIG", "another.field")
    quantize.quantize(tmp_path / "model", tmp_path / "out", "q8_0", components=("transformer",))
    path = tmp_path / "out/transformer-q8_0.gguf"
    expected = PTDiTParameters.from_config(PTDiTTransformer3DModel.from_single_file(path).config)
    reader = gguf.GGUFReader(path)
    weights = {each.name: torch.empty(*map(int, reversed(each.shape)), device="meta") for each in reader.tensors}
    texts = {name: field.contents() for name, field in reader.fields.items() if name.endswith((".config", ".field"))}
    assert PTDiTParameters.from_config(loaded_transformer_config(weights, metadata=texts)) == expected
    assert expected.num_attention_heads == (8 if carries else 6)


# --- with ComfyUI ----------------------------------------------------------------------------------------------------


def computed(server: Any, base: Path, forms: dict[str, Any], vae: bool) -> dict[str, Path]:
    """Write files of all forms, have ComfyUI compute with each, and return form -> file."""
    files, folder = {}, base / "files"
    folder.mkdir()
    for number, (form, write) in enumerate(forms.items()):
        files[form] = write(folder / str(number))
    save_file(inputs(), base / "inputs.safetensors")
    g = Graph()
    probe = g("ProbeFiles", folder=str(folder), inputs=str(base / "inputs.safetensors"), vae=vae)
    g("PreviewAny", source=probe)
    result = server.queue(g)
    assert result["ok"], result["message"]
    return files


@pytest.fixture(scope="module")
def transformer_files(server, tmp_path_factory) -> Iterator[dict[str, Path]]:
    forms = {form: write for form, write in TRANSFORMERS.items() if comfyui_opens(form)}
    return computed(server, tmp_path_factory.mktemp("transformers"), forms, vae=False)


@pytest.fixture(scope="module")
def vae_files(server, tmp_path_factory) -> dict[str, Path]:
    return computed(server, tmp_path_factory.mktemp("vaes"), VAES, vae=True)


def comfyui_opens(form: str) -> bool:
    """Return whether ComfyUI's own loader of networks opens a form."""
    return form != "packed in a torch file" and ("nesting" not in form or form.split()[-1] in COMFYUI_NESTINGS)


def result_of(path: Path) -> tuple[dict[str, Any], Tensor]:
    """Return configuration and output that ComfyUI left beside a file."""
    beside = path.with_name(f"{path.name}.computed")
    with safe_open(beside, "pt") as file:
        metadata = file.metadata()
    assert "error" not in metadata, metadata["error"]
    return json.loads(metadata["config"]), load_file(beside)["computed"]


@pytest.mark.comfy
@pytest.mark.parametrize("form", [form for form in TRANSFORMERS if comfyui_opens(form)])
@torch.no_grad()
def test_comfyui_itself_takes_the_same_transformer_as_diffusers(transformer_files, form):
    parameters, expected = in_diffusers(transformer_files[form])
    config, found = result_of(transformer_files[form])
    assert PTDiTParameters.from_config(config) == parameters
    assert (found - expected).abs().max() < (0.05 if "format" in form else 2e-5) * expected.abs().max()


@pytest.mark.comfy
@pytest.mark.parametrize("form", VAES)
@torch.no_grad()
def test_comfyui_itself_takes_the_same_vae_as_diffusers(vae_files, form):
    parameters, expected = vae_in_diffusers(vae_files[form])
    config, found = result_of(vae_files[form])
    assert VAEParameters(**config) == parameters
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
