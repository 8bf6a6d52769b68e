"""LoRA through the pipeline: diffusers' files, ComfyUI-style keys, alpha."""

import pytest
import torch

from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.pipelines.ptdit_lora import convert_foreign_lora

peft = pytest.importorskip("peft")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture
def pipe(tiny_model_folder) -> PTDiTPipeline:
    pipe = PTDiTPipeline.from_pretrained(tiny_model_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def lora(pipe) -> dict[str, torch.Tensor]:
    """A random LoRA of rank 2 under diffusers' key names."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, module in pipe.transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and any(name.endswith(target) for target in TARGETS):
            down = torch.randn(2, module.in_features, generator=generator)
            up = torch.randn(module.out_features, 2, generator=generator)
            weights[f"transformer.{name}.lora_A.weight"], weights[f"transformer.{name}.lora_B.weight"] = down, up
    return weights


def draw(pipe: PTDiTPipeline, **arguments) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", num_inference_steps=2, generator=generator, output_type="latent", **arguments).images


def foreign(lora: dict[str, torch.Tensor], alpha: float | None) -> dict[str, torch.Tensor]:
    renamed = {}
    for key, value in lora.items():
        key = key.replace("transformer.", "diffusion_model.", 1)
        renamed[key.replace("lora_A", "lora_down").replace("lora_B", "lora_up")] = value
        if alpha is not None:
            renamed[key.rpartition(".lora_")[0] + ".alpha"] = torch.tensor(alpha)
    return renamed


def test_a_lora_loads_scales_and_unloads(pipe, lora):
    plain = draw(pipe)
    pipe.load_lora_weights(lora, adapter_name="style")
    loaded = draw(pipe)
    assert pipe.get_list_adapters() == {"transformer": ["style"]}
    assert (loaded - plain).abs().max() > 1e-3
    assert torch.equal(draw(pipe, attention_kwargs={"scale": 0.0}), plain)
    half = draw(pipe, attention_kwargs={"scale": 0.5})
    pipe.set_adapters("style", 0.5)
    torch.testing.assert_close(draw(pipe), half, atol=1e-5, rtol=0)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)


def test_keys_of_comfyui_give_the_same_picture(pipe, lora):
    pipe.load_lora_weights(lora)
    expected = draw(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(foreign(lora, alpha=None))
    assert torch.equal(draw(pipe), expected)


def test_alpha_is_folded_into_the_weights(lora):
    converted = convert_foreign_lora(foreign(lora, alpha=1.0))
    assert converted.keys() == lora.keys()
    for key, value in converted.items():
        torch.testing.assert_close(value, lora[key] * (0.5 if "lora_B" in key else 1.0))


def test_a_saved_lora_loads_again(pipe, lora, tmp_path):
    pipe.load_lora_weights(lora)
    expected = draw(pipe)
    layers = {key.removeprefix("transformer."): value for key, value in lora.items()}
    PTDiTPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(draw(pipe), expected)
