"""The text encoder's part of a LoRA in the pipeline: loading, strength, fusing, saving, names, what does not fit."""

import pytest
import torch
from torch import Tensor

from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.pipelines.ptdit_lora_names import convert_foreign_lora

pytest.importorskip("peft")
CLOSE = {"atol": 2e-6, "rtol": 1e-5}


@pytest.fixture(scope="module")
def shared(tiny_model_folder) -> PTDiTPipeline:
    return PTDiTPipeline.from_pretrained(tiny_model_folder)


@pytest.fixture
def pipe(shared) -> PTDiTPipeline:
    yield shared
    shared.unload_lora_weights()


def random_lora(pipe: PTDiTPipeline, *networks: str, seed: int = 0) -> dict[str, Tensor]:
    """A LoRA of rank 2 on queries of the transformer, and on queries and the last layer of the T5."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for network in networks:
        for name, module in getattr(pipe, network).named_modules():
            layer = getattr(module, "base_layer", module)
            if isinstance(layer, torch.nn.Linear) and name.endswith((".to_q", ".q", ".wo")):
                down, up = (layer.in_features, 2), (2, layer.out_features)
                weights[f"{network}.{name}.lora_A.weight"] = (
                    torch.randn(down, generator=generator).T.contiguous() * 0.3
                )
                weights[f"{network}.{name}.lora_B.weight"] = torch.randn(up, generator=generator).T.contiguous() * 0.3
    return weights


@pytest.fixture
def lora(pipe) -> dict[str, Tensor]:
    return random_lora(pipe, "transformer", "text_encoder")


@torch.no_grad()
def embedding(pipe: PTDiTPipeline) -> Tensor:
    return pipe.encode_prompt("a red circle", do_classifier_free_guidance=False)[0]


def test_it_changes_embeddings_as_merged_weights_do_and_goes_again(pipe, lora, tiny_model_folder):
    plain = embedding(pipe)
    pipe.load_lora_weights(lora, adapter_name="style")
    assert pipe.get_list_adapters() == {"transformer": ["style"], "text_encoder": ["style"]}
    loaded = embedding(pipe)
    assert (loaded - plain).abs().max() > 1e-2
    merged = PTDiTPipeline.from_pretrained(tiny_model_folder, vae=None, transformer=None)
    for key, up in lora.items():
        if key.startswith("text_encoder.") and key.endswith("lora_B.weight"):
            layer = merged.text_encoder.get_submodule(key.removeprefix("text_encoder.").removesuffix(".lora_B.weight"))
            layer.weight.data += up @ lora[key.replace("lora_B", "lora_A")]
    torch.testing.assert_close(loaded, embedding(merged), **CLOSE)
    pipe.unload_lora_weights()
    torch.testing.assert_close(embedding(pipe), plain, **CLOSE)
    assert pipe.get_list_adapters() == {}


def test_strengths_adapters_and_fusing_reach_the_text_encoder(pipe, lora):
    plain = embedding(pipe)
    pipe.load_lora_weights(lora)
    full = embedding(pipe)
    pipe.set_adapters("default_0", [{"transformer": 1.0, "text_encoder": 0.0}])
    torch.testing.assert_close(embedding(pipe), plain, **CLOSE)
    pipe.set_adapters("default_0", 0.5)
    half = embedding(pipe)
    assert (half - full).abs().max() > 1e-3 and (half - plain).abs().max() > 1e-3
    pipe.set_adapters("default_0")
    pipe.disable_lora()
    torch.testing.assert_close(embedding(pipe), plain, **CLOSE)
    pipe.enable_lora()
    pipe.fuse_lora()
    torch.testing.assert_close(embedding(pipe), full, **CLOSE)
    pipe.unfuse_lora()
    pipe.load_lora_weights(random_lora(pipe, "transformer"))  # the newest is the active one, also where it has no part
    assert pipe.get_list_adapters() == {"transformer": ["default_0", "default_1"], "text_encoder": ["default_0"]}
    torch.testing.assert_close(embedding(pipe), plain, **CLOSE)
    pipe.set_adapters(["default_0", "default_1"])
    torch.testing.assert_close(embedding(pipe), full, **CLOSE)
    pipe.delete_adapters("default_0")
    torch.testing.assert_close(embedding(pipe), plain, **CLOSE)


def test_the_scale_of_a_call_is_that_of_the_text_encoder_too(pipe, lora):
    pipe.set_progress_bar_config(disable=True)
    seen = []

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["prompt_embeds"])
        return tensors

    def call(scale: float) -> None:
        pipe(
            "a red circle", num_inference_steps=1, output_type="latent", attention_kwargs={"scale": scale},
            callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )  # fmt: skip

    plain = embedding(pipe)
    pipe.load_lora_weights(lora, adapter_name="style")
    full = embedding(pipe)
    pipe.set_adapters("style", 0.5)
    call(0.0)
    call(2.0)
    torch.testing.assert_close(seen[0], plain, **CLOSE)
    torch.testing.assert_close(seen[1], full, **CLOSE)
    layers = [layer for layer in pipe.text_encoder.modules() if hasattr(layer, "lora_A")]
    assert {layer.scaling["style"] for layer in layers} == {0.5}  # as before


def test_a_pipeline_with_both_parts_in_its_weights_is_saved(lora, tiny_model_folder, tmp_path):
    pipe = PTDiTPipeline.from_pretrained(tiny_model_folder)
    pipe.load_lora_weights(lora)
    expected = embedding(pipe)
    with pytest.raises(ValueError, match="has the LoRA default_0"):
        pipe.save_pretrained(tmp_path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    torch.testing.assert_close(embedding(PTDiTPipeline.from_pretrained(tmp_path)), expected, **CLOSE)


def test_a_saved_lora_has_both_parts(pipe, lora, tmp_path):
    pipe.load_lora_weights(lora)
    expected = embedding(pipe)
    parts = {
        f"{name}_lora_layers": {
            key.removeprefix(f"{name}."): value for key, value in lora.items() if key.startswith(f"{name}.")
        }
        for name in ("transformer", "text_encoder")
    }
    PTDiTPipeline.save_lora_weights(tmp_path, **parts)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(embedding(pipe), expected, **CLOSE)
    with pytest.raises(ValueError, match="transformer_lora_layers or text_encoder_lora_layers"):
        PTDiTPipeline.save_lora_weights(tmp_path)


@pytest.mark.parametrize("naming", ["text_encoders.t5xxl.transformer.", "text_encoders.transformer.", "lora_te1_"])
def test_names_of_comfyui_and_kohya_mean_the_same_layers(pipe, naming):
    lora = random_lora(pipe, "text_encoder")
    foreign = {}
    for key, value in lora.items():
        layer, _, kind = key.removeprefix("text_encoder.").rpartition(".lora_")
        foreign[f"{naming}{layer.replace('.', '_') if naming == 'lora_te1_' else layer}.lora_{kind}"] = value
    converted = convert_foreign_lora(foreign)
    assert converted.keys() == lora.keys() and all(torch.equal(converted[key], lora[key]) for key in lora)


def test_what_a_pipeline_does_not_have_is_left_out_with_a_warning(pipe, lora, tiny_model_folder):
    denoiser = PTDiTPipeline.from_pretrained(tiny_model_folder, vae=None, text_encoder=None, tokenizer=None)
    with pytest.warns(UserWarning, match=r"has \d+ weights for the text_encoder, which this pipeline does not have"):
        denoiser.load_lora_weights(lora)
    assert denoiser.get_list_adapters() == {"transformer": ["default_0"]}
    encoder = PTDiTPipeline.from_pretrained(tiny_model_folder, vae=None, transformer=None)
    with pytest.warns(UserWarning, match=r"has \d+ weights for the transformer, which this pipeline does not have"):
        encoder.load_lora_weights(lora)
    pipe.load_lora_weights(lora)
    torch.testing.assert_close(embedding(encoder), embedding(pipe), **CLOSE)


def test_a_lora_for_another_text_encoder_is_refused_before_anything_is_loaded(pipe, lora):
    key = next(key for key in lora if key.startswith("text_encoder."))
    with pytest.raises(
        ValueError, match=r"another model: 1 of \d+ keys .*q.lora_A.weight \(7 inputs, the layer has 32\)"
    ):
        pipe.load_lora_weights({**lora, key: torch.zeros(2, 7)})
    other = {
        f"text_encoder.encoder.block.9.layer.0.SelfAttention.q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"
    }
    with pytest.raises(ValueError, match=r"another model: .*block.9.layer.0.SelfAttention.q.lora_A.weight \(no such"):
        pipe.load_lora_weights({**lora, **other})
    assert not any(pipe.get_list_adapters().values())


def test_weights_of_the_text_encoder_are_not_swapped_in_place(pipe, lora):
    pipe.load_lora_weights(lora, adapter_name="style")
    for weights in (lora, random_lora(pipe, "transformer")):
        with pytest.raises(ValueError, match="hotswap=True is not for a LoRA with weights for the text encoder"):
            pipe.load_lora_weights(weights, adapter_name="style", hotswap=True)
    with pytest.raises(ValueError, match="already"):
        pipe.load_lora_weights(random_lora(pipe, "text_encoder"), adapter_name="style")
