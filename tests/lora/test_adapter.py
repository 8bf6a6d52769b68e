"""Target layers by name, and folding the scale into the weights of every initialization."""

import pytest
import torch
from safetensors.torch import save_file

from lora.adapter import add_adapter, folded_weights, target_layers
from lora.config import LoRASettings
from lora.export import adapter_config, base_layer_weights, comfyui_weights
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.training.task import trained_parameters


def tiny() -> PTDiTTransformer3DModel:
    torch.manual_seed(0)
    model = PTDiTTransformer3DModel(
        2, 24, num_layers=1, sample_size=8, caption_channels=8, window_size=(1, 2, 2), proxy_ratio=(1, 2, 2)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def output(model: PTDiTTransformer3DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 4, 1, 8, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
    with torch.no_grad():
        return model(latents, text, torch.tensor([500.0]), return_dict=False)[0]


def test_presets_names_and_expressions_choose_layers():
    model = tiny()
    assert len(target_layers(model, "attention")) == 20
    assert len(target_layers(model, "attention+ff")) == 22
    assert len(target_layers(model, "all-linear")) == 30
    for spelling in ("to_q,ff.net.2", "to_q, ff.net.2", " to_q ff.net.2,"):
        assert len(target_layers(model, spelling)) == 6
    assert target_layers(model, r"transformer_blocks\.0\.attn3\.to_.") == [
        f"transformer_blocks.0.attn3.to_{name}" for name in "qkv"
    ]
    with pytest.raises(ValueError, match="'to_qq' is no linear layer .* nearest: 'to_q'"):
        target_layers(model, "to_qq")
    with pytest.raises(ValueError, match="matches no linear layer; whole names look like"):
        target_layers(model, r"blocks\..*")


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 8.0},
        {"alpha": 3.0, "rslora": True},
        {"init": "pissa"},
        {"init": "olora", "alpha": 8.0},
        {"dora": True, "alpha": 8.0},
    ],
    ids=str,
)
def test_the_folded_file_does_what_the_trained_adapter_does(options, tmp_path):
    model = tiny()
    settings = LoRASettings(output_dir="x", rank=4, targets="attention+ff", **options)
    first = add_adapter(model, settings)
    generator = torch.Generator().manual_seed(2)
    for parameter in trained_parameters(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    expected = output(model)
    parameters = {name: value.detach() for name, value in trained_parameters(model).items()}
    weights = folded_weights(model, parameters, first)
    assert (expected - output(tiny())).abs().max() > 1e-2

    PTDiTPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=weights, transformer_lora_adapter_metadata=adapter_config(weights)
    )
    fresh = PTDiTPipeline(None, None, None, tiny(), None)
    fresh.load_lora_weights(tmp_path)
    torch.testing.assert_close(output(fresh.transformer), expected, atol=2e-4, rtol=1e-3)  # outputs are about 1

    comfyui = comfyui_weights(weights, base_layer_weights(model, weights))
    again = PTDiTPipeline(None, None, None, tiny(), None)
    save_file(comfyui, tmp_path / "comfyui.safetensors")
    again.load_lora_weights(tmp_path, weight_name="comfyui.safetensors")
    torch.testing.assert_close(output(again.transformer), expected, atol=2e-4, rtol=1e-3)
    merged = tiny()
    merge_as_comfyui_does(merged, comfyui)
    torch.testing.assert_close(output(merged), expected, atol=2e-4, rtol=1e-3)


def merge_as_comfyui_does(model: PTDiTTransformer3DModel, weights: dict[str, torch.Tensor]) -> None:
    """W + B A, and with dora_scale each row times dora_scale / |W|."""
    layers = {key.rpartition(".lora_")[0] for key in weights if ".lora_" in key}
    for layer in layers:
        weight = model.get_submodule(layer.removeprefix("diffusion_model.")).weight
        changed = weight + weights[f"{layer}.lora_B.weight"] @ weights[f"{layer}.lora_A.weight"]
        if f"{layer}.dora_scale" in weights:
            changed = changed * weights[f"{layer}.dora_scale"] / weight.norm(dim=1, keepdim=True)
        weight.data = changed.detach()
