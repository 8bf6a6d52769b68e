"""A LoRA on the small text encoder: it learns with the transformer, resumes, loads everywhere; what is refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from PIL import Image, ImageChops
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel

from lora.adapter import (
    adapter_layers,
    adapter_parameters,
    adapter_values,
    add_adapter,
    folded_weights,
    layer_ranks,
    rate_factors,
)
from lora.config import LoRASettings
from lora.export import base_layer_weights, write_lora
from lora.task import LoRATask
from lora.text_encoder import checked_text_encoder, embed, text_layers
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.training.base_model import BaseModel
from ptdit_diffusers.training.networks import Networks

CPU = torch.device("cpu")
FILE = "lora/pytorch_lora_weights.safetensors"
PROMPT = "a red star"
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
IDS, MASK = torch.tensor([[3, 4, 1], [5, 1, 0]]), torch.tensor([[True, True, True], [True, True, False]])


@pytest.fixture
def text_cache(cached, tmp_path):
    return shutil.copytree(cached, tmp_path / "own-cache")


def test_both_networks_learn_resume_and_load(train, pictures, text_cache, tmp_path, tiny_model_folder, monkeypatch):
    embeddings, export = {}, LoRATask.export

    def keep(task, folder):
        embeddings[folder.name] = task.embedding_of(PROMPT)
        export(task, folder)

    monkeypatch.setattr(LoRATask, "export", keep)
    flags = ["--train-text-encoder", "--cache-dir", text_cache, "--targets", "attention+ff", "--ema", "0.5"]
    flags += ["--max-steps", "2", "--lr-pattern", "text_encoder=5", "--checkpoint-every", "0"]
    shown = ["--validation-prompts", PROMPT, "--validation-steps", "1"]
    assert train("straight", "--data", pictures, *flags, *shown) == 0
    assert train("resumed", *flags, *shown, "--stop-after", "1") == 0  # from the cache, which has the tokens now
    assert train("resumed", *flags, *shown, "--resume") == 0
    one, two = load_file(tmp_path / "straight" / FILE), load_file(tmp_path / "resumed" / FILE)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    for network, layers in (("transformer.", 44), ("text_encoder.", 6)):
        moved = [value.abs().max() for key, value in one.items() if key.startswith(network) and "lora_B" in key]
        assert len(moved) == layers and max(moved) > 1e-3

    pipe = PTDiTPipeline.from_pretrained(tiny_model_folder)
    pipe.set_progress_bar_config(disable=True)
    before = pipe.encode_prompt(PROMPT)[0][0]
    pipe.load_lora_weights(tmp_path / "straight" / "lora")
    after = pipe.encode_prompt(PROMPT)[0][0]
    torch.testing.assert_close(after, embeddings["straight"], **CLOSE)
    assert (after - before).abs().max() > 1e-3
    generator = torch.Generator().manual_seed(0)
    drawn = pipe(PROMPT, num_inference_steps=1, guidance_scale=4.0, generator=generator).images[0]
    with Image.open(tmp_path / "straight" / "validation" / "step-00000002-0.png") as picture:
        assert max(high for _, high in ImageChops.difference(picture, drawn).getextrema()) <= 2
    check_what_the_files_say(tmp_path / "straight" / "lora", pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "straight" / "lora" / "comfyui", weight_name="straight.safetensors")
    torch.testing.assert_close(pipe.encode_prompt(PROMPT)[0][0], after, **CLOSE)


def check_what_the_files_say(folder, pipe) -> None:
    """Settings, card and metadata name the text encoder; ComfyUI's keys are those that its stock loader maps."""
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        facts = file.metadata()
    settings = json.loads(facts["lora_adapter_metadata"])
    assert settings["text_encoder.r"] == settings["transformer.r"] == 2
    assert facts["trained_networks"] == "transformer, text_encoder"
    assert "The text encoder is trained, too: 6 of the layers" in (folder / "README.md").read_text(encoding="utf-8")
    keys = load_file(folder / "comfyui" / "straight.safetensors")
    modules = {key.rpartition(".lora_")[0] for key in keys if not key.startswith("diffusion_model.")}
    named_by_comfyui = [f"t5xxl.transformer.{name}" for name in pipe.text_encoder.state_dict()]
    known = {f"text_encoders.{name.removesuffix('.weight').replace('.base_layer', '')}" for name in named_by_comfyui}
    assert len(modules) == 6 and modules <= known


def test_a_cache_without_tokens_is_not_enough(train, capsys):
    assert train("out", "--train-text-encoder") == 2
    assert "lacks 2 of 7 entries" in (message := capsys.readouterr().err) and "give `data`" in message


@pytest.fixture
def networks(tiny_model_folder) -> Networks:
    base = BaseModel(str(tiny_model_folder))
    return Networks(base.load_transformer(torch.float32, "none", CPU), base.load_text_encoder(CPU))


def settings_of(**options) -> LoRASettings:
    return LoRASettings(output_dir="x", rank=2, train_text_encoder=True, **options)


def made(model: Networks, settings: LoRASettings) -> dict[str, torch.Tensor]:
    """An adapter with random values, as it is written."""
    first = add_adapter(model, settings)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(model).values():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return folded_weights(model, {name: p.detach() for name, p in adapter_parameters(model).items()}, first)


@pytest.mark.parametrize("options", [{"alpha": 8.0}, {"dora": True}, {"init": "pissa"}], ids=str)
def test_every_kind_loads_in_both_forms_and_starts_another(networks, tiny_model_folder, tmp_path, options):
    weights = made(networks, settings_of(**options))
    with torch.no_grad():
        expected = embed(networks.text_encoder, IDS, MASK)
    comfyui = write_lora(tmp_path, "mine", weights, base_layer_weights(networks, weights), "base")
    for folder, name in ((tmp_path, "pytorch_lora_weights.safetensors"), (comfyui.parent, comfyui.name)):
        pipe = PTDiTPipeline.from_pretrained(tiny_model_folder, vae=None)
        pipe.load_lora_weights(folder, weight_name=name)
        with torch.no_grad():
            torch.testing.assert_close(embed(pipe.text_encoder, IDS, MASK), expected, **CLOSE)
    base = BaseModel(str(tiny_model_folder))
    fresh = Networks(base.load_transformer(torch.float32, "none", CPU), base.load_text_encoder(CPU))
    rank = 4 if options.get("init") else 2  # PiSSA is written with twice the rank
    start = {"start": str(tmp_path), "alpha": 3.0, "dora": options.get("dora", False)}
    add_adapter(fresh, LoRASettings(output_dir="x", rank=rank, train_text_encoder=True, **start))
    with torch.no_grad():
        torch.testing.assert_close(embed(fresh.text_encoder, IDS, MASK), expected, **CLOSE)
    with pytest.raises(ValueError, match="also has weights for the text encoder; nearest: train_text_encoder=True"):
        add_adapter(base.load_transformer(torch.float32, "none", CPU), LoRASettings(output_dir="x", **start))


def test_padding_does_not_change_an_embedding(networks):
    with torch.no_grad():
        both, alone = embed(networks.text_encoder, IDS, MASK), embed(networks.text_encoder, IDS[1:, :2], None)
    torch.testing.assert_close(both[1, :2], alone[0], **CLOSE)


def test_a_start_without_the_text_encoder_is_refused(networks, tiny_model_folder, tmp_path):
    weights = made(networks, settings_of())
    rest = {key: value for key, value in weights.items() if not key.startswith("text_encoder.")}
    write_lora(tmp_path, "mine", rest, {}, "base")
    base = BaseModel(str(tiny_model_folder))
    with pytest.raises(ValueError, match="has no weights for the text encoder; nearest: train_text_encoder=False"):
        adapter_values(base.transformer_config, settings_of(start=str(tmp_path)), base.empty_text_encoder())


def test_targets_ranks_and_rates_reach_the_text_encoder(tiny_model_folder):
    base = BaseModel(str(tiny_model_folder))
    encoder = base.empty_text_encoder()
    assert [len(text_layers(encoder, name)) for name in ("attention", "attention+ff", "all-linear", "to_q")] == [
        4,
        6,
        6,
        4,
    ]
    layers = adapter_layers(base.transformer_config, settings_of(), encoder)
    ranks = layer_ranks(layers, settings_of(rank_pattern={"text_encoder": 5}))
    query = "text_encoder.encoder.block.0.layer.0.SelfAttention.q"
    assert ranks[query] == 5 and ranks["transformer_blocks.0.attn1.to_q"] == 2
    factors = rate_factors(ranks, settings_of(lr_pattern={r"^text_encoder\.": 0.5}))
    assert factors[query] == 0.5 and factors["transformer_blocks.0.attn1.to_q"] == 1
    with pytest.raises(ValueError, match="no layer of the text encoder .*nearest: train_text_encoder=False"):
        layer_ranks(layers, settings_of(rank_pattern={"text_encoder": 0}))


@pytest.mark.parametrize(
    "sizes, size",
    [
        ({"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}, "4762 M"),
        ({"d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16}, "341 M"),
    ],
    ids=["XXL", "large"],
)
def test_a_large_text_encoder_stays_frozen(sizes, size):
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **sizes))
    base = SimpleNamespace(name="big", empty_text_encoder=lambda: encoder)
    with pytest.raises(ValueError, match=f"'big' has {size} parameters, more than 150 M, .* train_text_encoder=False"):
        checked_text_encoder(base, None)


def test_a_base_without_text_encoder_and_shared_weights_are_refused(tiny_model_folder, tmp_path):
    shutil.copytree(tiny_model_folder, tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "text_encoder")
    with pytest.raises(ValueError, match="has no text encoder"):
        checked_text_encoder(BaseModel(str(tmp_path / "base")), None)
    with pytest.raises(ValueError, match="train_text_encoder was not made for FSDP2"):
        checked_text_encoder(BaseModel(str(tiny_model_folder)), SimpleNamespace(distributed_type=DistributedType.FSDP))
