"""LoRA through the pipeline: diffusers' files, ComfyUI-style keys, alpha."""

import json
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

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
def lora(pipe) -> dict[str, Tensor]:
    """A random LoRA of rank 2 under diffusers' key names."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, module in pipe.transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and any(name.endswith(target) for target in TARGETS):
            down = torch.randn(2, module.in_features, generator=generator)
            up = torch.randn(module.out_features, 2, generator=generator)
            weights[f"transformer.{name}.lora_A.weight"], weights[f"transformer.{name}.lora_B.weight"] = down, up
    return weights


def draw(pipe: PTDiTPipeline, **arguments) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", num_inference_steps=2, generator=generator, output_type="latent", **arguments).images


def foreign(lora: dict[str, Tensor], alpha: float | None) -> dict[str, Tensor]:
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


def rename(lora: dict[str, Tensor], prefix: str, flat: bool = False, infix: str = "") -> dict[str, Tensor]:
    renamed = {}
    for key, value in lora.items():
        module, _, kind = key.removeprefix("transformer.").rpartition(".lora_")
        module = module.replace(".", "_") if flat else module
        kind = {"A.weight": "down.weight", "B.weight": "up.weight"}[kind] if flat else kind.replace(".", f"{infix}.")
        renamed[f"{prefix}{module}.lora_{kind}"] = value
    return renamed


@pytest.mark.parametrize(
    "names",
    [("lora_unet_", True), ("lora_transformer_", True), ("base_model.model.", False, ".default"), ("", False)],
    ids=["kohya", "kohya-transformer", "peft", "bare"],
)
def test_names_of_other_trainers_mean_the_same_layers(lora, names):
    converted = convert_foreign_lora(rename(lora, *names))
    assert converted.keys() == lora.keys()
    assert all(torch.equal(converted[key], lora[key]) for key in lora)


def test_a_lora_for_another_model_is_refused_and_the_wrong_keys_are_named(pipe, lora):
    key = next(iter(lora))
    with pytest.raises(ValueError, match=r"another model: 1 of \d+ keys .*to_q.lora_A.weight \(7 inputs, .* has 48\)"):
        pipe.load_lora_weights({**lora, key: torch.zeros(2, 7)})
    foreign = {"transformer.blocks.0.attn.qkv.lora_A.weight": torch.zeros(2, 48)}
    with pytest.raises(ValueError, match=r"another model: .*blocks.0.attn.qkv.lora_A.weight \(no such layer\)"):
        pipe.load_lora_weights(foreign)
    assert pipe.get_list_adapters() == {}


@pytest.mark.parametrize("weights", [{}, {"transformer.proj_out.weight": torch.zeros(2, 2)}], ids=["empty", "a model"])
def test_nothing_to_load_is_an_error(pipe, weights):
    with pytest.raises(ValueError, match="this is not a LoRA"):
        pipe.load_lora_weights(weights)


def test_an_alpha_without_matrices_is_an_error(lora):
    with pytest.raises(ValueError, match="nowhere.alpha has no lora_down"):
        convert_foreign_lora({**lora, "diffusion_model.nowhere.alpha": torch.tensor(1.0)})


def test_a_fused_lora_draws_the_same_picture_and_comes_out_again(pipe, lora):
    plain = draw(pipe)
    pipe.load_lora_weights({key: value * 0.3 for key, value in lora.items()})
    loaded = draw(pipe)
    pipe.fuse_lora(lora_scale=1.0)
    torch.testing.assert_close(draw(pipe), loaded, atol=1e-4, rtol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe), plain, atol=1e-4, rtol=1e-4)


def test_each_block_may_have_its_own_scale(pipe, lora):
    pipe.load_lora_weights(lora, adapter_name="style")
    first = {key: value for key, value in lora.items() if "transformer_blocks.0." in key}
    pipe.set_adapters("style", {"transformer": {"transformer_blocks.1": 0.0}})
    only_first = draw(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(first)
    assert torch.equal(draw(pipe), only_first)


def test_the_longest_name_gives_the_scale_and_an_unknown_one_is_refused(pipe, lora):
    pipe.load_lora_weights(lora, adapter_name="style")
    scales = {"transformer_blocks.0": 0.5, "transformer_blocks.0.attn1": 0.25, "transformer_blocks.0.attn1.to_q": 2.0}
    pipe.set_adapters("style", {"transformer": scales})
    block, other = pipe.transformer.transformer_blocks
    found = [m.scaling["style"] for m in (block.attn1.to_q, block.attn1.to_k, block.attn2.to_q, other.attn1.to_q)]
    assert found == [2.0, 0.25, 0.5, 1.0]
    with pytest.raises(ValueError, match="'middle' is no module .* transformer_blocks.0 to transformer_blocks.1"):
        pipe.set_adapters("style", {"transformer": {"middle": 1.0}})


def test_two_adapters_add_up_and_one_can_be_deleted(pipe, lora):
    pipe.load_lora_weights(lora, adapter_name="one")
    once = draw(pipe)
    pipe.load_lora_weights(lora, adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.5, 0.5])
    torch.testing.assert_close(draw(pipe), once, atol=1e-4, rtol=1e-4)
    pipe.delete_adapters("two")
    pipe.set_adapters("one", 1.0)
    assert pipe.get_list_adapters() == {"transformer": ["one"]}
    assert torch.equal(draw(pipe), once)


def test_hotswap_replaces_the_weights_in_place(pipe, lora):
    other = {key: value.flip(0) for key, value in lora.items()}
    pipe.load_lora_weights(other, adapter_name="style")
    expected = draw(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(lora, adapter_name="style")
    pipe.load_lora_weights(other, adapter_name="style", hotswap=True)
    assert torch.equal(draw(pipe), expected)


def test_a_file_without_a_lora_is_an_error_and_names_its_keys(pipe, tmp_path):
    from safetensors.torch import save_file

    save_file({"lora_foo": torch.zeros(1)}, tmp_path / "foo.safetensors")
    with pytest.raises(ValueError, match="none ends with lora_A.weight .*first keys: lora_foo"):
        pipe.load_lora_weights(tmp_path / "foo.safetensors")


def test_a_dictionary_that_names_no_layer_changes_nothing_as_in_diffusers(pipe):
    pipe.load_lora_weights({"lora_foo": torch.tensor(2.0)})
    assert pipe.get_list_adapters() == {}


@pytest.mark.parametrize("kind", ["diff", "diff_b", "half"])
def test_a_file_that_holds_more_or_less_than_pairs_is_refused_and_the_key_is_named(pipe, lora, kind):
    key = next(key for key in lora if key.endswith("lora_A.weight"))
    module = key.removesuffix("lora_A.weight")
    weights = {key: lora[key]} if kind == "half" else {**lora, module + kind: torch.zeros(48)}
    with pytest.raises(ValueError, match=module.replace(".", r"\.")):
        pipe.load_lora_weights(weights)


def test_a_lora_onto_weights_in_8_bits_is_refused_with_the_remedy(pipe, lora):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="Load the LoRA first"):
        pipe.load_lora_weights(lora)


def test_a_pipeline_with_a_lora_is_not_saved_as_one_that_cannot_be_loaded(pipe, lora, tmp_path):
    pipe.load_lora_weights(lora)
    with pytest.raises(ValueError, match="unload_lora_weights"):
        pipe.save_pretrained(tmp_path)
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)


@pytest.mark.parametrize("number", ["99999999", "9" * 5000])
def test_a_block_that_no_model_has_is_refused_at_once(pipe, number):
    stem = f"lora_unet_transformer_blocks_{number}_attn1_to_q"
    wrong = {f"{stem}.lora_down.weight": torch.zeros(4, 48), f"{stem}.lora_up.weight": torch.zeros(48, 4)}
    begin = time.process_time()
    with pytest.raises(ValueError, match="this LoRA is for another model: 2 of 2 keys do not fit"):
        pipe.load_lora_weights(wrong)
    assert time.process_time() - begin < 2


HARD = "([a-z0-9_.]+)+!"  # takes exponential time as a regular expression


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": HARD},
        {"rank_pattern": {HARD: 4}},
        {"r": 10**9, "rank_pattern": {"to_q": 10**9}},
        {"target_modules": 5, "r": "x", "use_dora": "yes"},
    ],
    ids=["names are no patterns", "ranks by pattern", "giant rank", "types"],
)
def test_ranks_and_layers_come_from_the_weights_and_not_from_the_metadata(pipe, lora, tmp_path, change):
    pipe.load_lora_weights(lora)
    expected = draw(pipe)
    pipe.unload_lora_weights()
    metadata = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q"]} | change
    text = json.dumps({f"transformer.{name}": value for name, value in metadata.items()})
    save_file(lora, tmp_path / "a.safetensors", metadata={"format": "pt", "lora_adapter_metadata": text})
    begin = time.process_time()
    pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    assert time.process_time() - begin < 2
    assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "metadata of this LoRA are a list, not the settings"),
        ("[" * 100_000, "is no JSON of an adapter's settings"),
        ("{", "is no JSON of an adapter's settings"),
        ('{"transformer.lora_alpha": "x"}', "no numbers as lora_alpha"),
        ('{"transformer.alpha_pattern": {"(a+)+!": 4}}', "names '.*', which is no name of a layer"),
    ],
)
def test_metadata_that_are_no_settings_are_refused(pipe, lora, tmp_path, text, message):
    save_file(lora, tmp_path / "a.safetensors", metadata={"format": "pt", "lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    assert not pipe.get_list_adapters().get("transformer")


@pytest.mark.parametrize("shape", [(), (4,), (0, 48)])
def test_a_matrix_that_is_none_is_refused(pipe, lora, shape):
    key = next(key for key in lora if key.endswith("lora_A.weight"))
    alpha = {key.replace("lora_A.weight", "alpha"): torch.tensor(1.0)}
    with pytest.raises(ValueError, match="lora_A.weight of this LoRA holds no matrix"):
        pipe.load_lora_weights({**lora, key: torch.zeros(shape), **alpha})


def test_halves_of_two_ranks_and_biases_of_another_size_are_refused(pipe, lora):
    key = next(key for key in lora if key.endswith("lora_A.weight"))
    with pytest.raises(ValueError, match="lora_A.weight has rank 3, and its lora_B rank 2"):
        pipe.load_lora_weights({**lora, key: torch.zeros(3, lora[key].shape[1])})
    with pytest.raises(ValueError, match=r"lora_B.bias \(shape \(\), the layer has"):
        pipe.load_lora_weights({**lora, key.replace("lora_A.weight", "lora_B.bias"): torch.zeros(())})
    assert not pipe.get_list_adapters().get("transformer")
