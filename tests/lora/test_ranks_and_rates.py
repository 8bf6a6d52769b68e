"""Ranks and rates by name, starting from a LoRA, optimizers with arguments, and what files say of themselves."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora.adapter import (
    adapter_parameters,
    adapter_values,
    add_adapter,
    folded_weights,
    layer_ranks,
    lower_rank,
    ranks_of,
    rate_factors,
)
from lora.command_line import make_parser, read_settings
from lora.config import LoRASettings
from lora.export import base_layer_weights, write_lora
from lora.requirements import check_device
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.training.optimizers import make_optimizers
from ptdit_diffusers.training.schedules import named_schedule
from ptdit_diffusers.training.task import trained_parameters
from tests.lora.test_adapter import output, tiny

FILE = "pytorch_lora_weights.safetensors"


def trained(settings: LoRASettings):
    """A model with an adapter that does something, and its folded weights."""
    model = tiny()
    first = add_adapter(model, settings)
    generator = torch.Generator().manual_seed(2)
    for parameter in trained_parameters(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    parameters = {name: value.detach() for name, value in trained_parameters(model).items()}
    return model, folded_weights(model, parameters, first)


def config_of(model) -> dict:
    return {name: value for name, value in model.config.items() if name != "_use_default_values"}


@pytest.mark.parametrize("alpha", [0.0, 3.0])
def test_layers_have_ranks_of_their_own_and_the_files_load(tmp_path, alpha):
    ranks = {r"attn1": 6, r"attn2\.to_q": 0, r"attn1\.to_v": 2}
    settings = LoRASettings(output_dir="x", rank=4, alpha=alpha, rank_pattern=ranks)
    model, weights = trained(settings)
    found = {key.removesuffix(".lora_A.weight"): len(value) for key, value in weights.items() if "lora_A" in key}
    block = "transformer_blocks.0."
    assert found[f"{block}attn1.to_q"] == 6 and found[f"{block}attn1.to_v"] == 2 and found[f"{block}attn3.to_q"] == 4
    assert f"{block}attn2.to_q" not in found and f"{block}attn2.to_k" in found
    assert adapter_values(config_of(model), settings) == sum(value.numel() for value in weights.values())
    write_lora(tmp_path, "mine", weights, {}, "base")
    for load in (tmp_path, load_file(tmp_path / "comfyui" / "mine.safetensors")):
        pipe = PTDiTPipeline(None, None, None, tiny(), None)
        pipe.load_lora_weights(load)
        torch.testing.assert_close(output(pipe.transformer), output(model), atol=2e-4, rtol=1e-3)


def test_a_pattern_that_names_nothing_is_refused():
    layers = ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_q"]
    for patterns, message in (
        ({"blocks.9": 2}, "rank_pattern: 'blocks.9' is in no name of what is trained; nearest: 'transformer_blocks"),
        ({"(": 2}, "rank_pattern: '\\(' is no regular expression"),
        ({"attn": 0}, "leaves no layer with a rank"),
    ):
        with pytest.raises(ValueError, match=message):
            layer_ranks(layers, LoRASettings(output_dir="x", rank_pattern=patterns))
    with pytest.raises(ValueError, match="lr_pattern: 'lora_C' is in no name"):
        rate_factors(["a.lora_A", "a.lora_B"], LoRASettings(output_dir="x", lr_pattern={"lora_C": 2.0}))
    with pytest.raises(ValueError, match=r"rank_pattern\['a'\]=-1 must be at least 0; nearest: 0"):
        LoRASettings(output_dir="x", rank_pattern={"a": -1})


def test_parameters_learn_at_rates_of_their_own(train, tmp_path):
    flags = ["--max-steps", "1", "--lr-pattern", "blocks.0=0", "lora_B=16", r"blocks\.0.*to_q.lora_B=4"]
    assert train("out", *flags, "--checkpoint-every", "0") == 0
    weights = load_file(tmp_path / "out" / "lora" / FILE)
    moved = {key: round(float(value.abs().max()), 3) for key, value in weights.items() if "lora_B" in key}
    moved = {key: value for key, value in moved.items() if value}  # some have no gradient at first
    assert {value for key, value in moved.items() if ".1." in key} == {0.16}  # Adam's first step is lr
    assert {value for key, value in moved.items() if "blocks.0." in key} == {0.16, 0.04}


@pytest.mark.parametrize("options", [{"alpha": 8.0}, {"dora": True}, {"alpha": 2.0, "rslora": True}], ids=str)
@pytest.mark.parametrize("form", [FILE, "comfyui/mine.safetensors"])
def test_a_training_starts_from_a_lora_of_either_form(tmp_path, options, form):
    if "dora" in options and form != FILE:
        pytest.skip("ComfyUI's file has the sizes of the outputs in another form")
    model, weights = trained(LoRASettings(output_dir="x", rank=4, **options))
    write_lora(tmp_path, "mine", weights, base_layer_weights(model, weights), "base")
    fresh = tiny()
    add_adapter(fresh, LoRASettings(output_dir="x", rank=4, start=str(tmp_path / form), **options))
    torch.testing.assert_close(output(fresh), output(model), atol=2e-4, rtol=1e-3)


def test_a_start_of_a_higher_rank_is_cut_to_the_nearest_and_this_is_said(tmp_path, caplog):
    model, weights = trained(LoRASettings(output_dir="x", rank=4, alpha=8.0))
    write_lora(tmp_path, "mine", weights, {}, "base")
    fresh = tiny()
    with caplog.at_level("INFO", "lora"):
        add_adapter(fresh, LoRASettings(output_dir="x", rank=2, start=str(tmp_path)))
    assert "has a higher rank in 20 layers and was cut" in caplog.text
    kept = folded_weights(fresh, adapter_parameters(fresh), {})
    for layer in ranks_of({key: value.shape for key, value in kept.items()}):
        before, after = (each[f"{layer}.lora_B.weight"] @ each[f"{layer}.lora_A.weight"] for each in (weights, kept))
        u, values, v = torch.linalg.svd(before, full_matrices=False)
        torch.testing.assert_close(after, (u[:, :2] * values[:2]) @ v[:2], atol=1e-5, rtol=1e-4)


def test_a_layer_with_fewer_outputs_than_the_rank_is_cut_too():
    a, b = torch.randn(6, 8), torch.randn(3, 6)
    down, up = lower_rank(a, b, 5)
    assert down.shape == (5, 8) and up.shape == (3, 5)
    torch.testing.assert_close(up @ down, b @ a)


def test_the_card_names_the_lora_that_a_run_started_from_also_after_resumes_without_it(train, tmp_path):
    assert train("first", "--max-steps", "1") == 0
    assert train("out", "--max-steps", "3", "--start", tmp_path / "first" / "lora", "--stop-after", "1") == 0
    (tmp_path / "first").rename(tmp_path / "moved")
    for flags in (["--stop-after", "1"], ["--start", tmp_path / "nowhere"]):
        assert train("out", "--max-steps", "3", "--resume", *flags) == 0
    assert "| start | first |" in (tmp_path / "out" / "lora" / "README.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "lora" / "settings.json").read_text())["settings"]["start"] == "first"


def test_a_start_that_does_not_fit_is_refused(tmp_path):
    model, weights = trained(LoRASettings(output_dir="x", rank=4))
    write_lora(tmp_path, "mine", weights, {}, "base")
    for options, message in (
        ({"rank": 8}, "has rank 4 in transformer_blocks.0.*, not 8; nearest: 4"),
        ({"rank": 4, "targets": "to_q"}, "is on 20 layers, targets='to_q' are 5"),
        ({"rank": 4, "dora": True}, "is no DoRA; nearest: dora=False"),
        ({"start": str(tmp_path / "none")}, "is neither a file nor a folder"),
    ):
        settings = LoRASettings(**{"output_dir": "x", "start": str(tmp_path), **options})
        with pytest.raises(ValueError, match=message):
            adapter_values(config_of(model), settings)
    first = "transformer_blocks.0.attn1.to_k.lora_"
    wide, bias = torch.zeros(4, 9), torch.zeros(24)
    for name, change, message in (
        (
            "wide",
            {f"{first}A.weight": wide},
            r"to_k.lora_A.weight has the shape \(4, 9\), not \(4, 48\); nearest: a LoRA",
        ),
        (
            "bias",
            {f"{first}B.bias": bias},
            "also has '.*to_k.lora_B.bias'; nearest: one with lora_A and lora_B alone",
        ),
        ("half", {f"{first}B.weight": None}, "lacks '.*to_k.lora_B.weight'"),
    ):
        changed = {f"transformer.{k}": v for k, v in {**weights, **change}.items() if v is not None}
        save_file(changed, tmp_path / f"{name}.safetensors")
        settings = LoRASettings(output_dir="x", rank=4, start=str(tmp_path / f"{name}.safetensors"))
        with pytest.raises(ValueError, match=message):
            adapter_values(config_of(model), settings)
    with pytest.raises(ValueError, match="init='pissa': start='a' has the first values; nearest: 'default'"):
        LoRASettings(output_dir="x", start="a", init="pissa")


def test_a_dora_for_comfyui_is_refused_as_a_start_and_rates_of_sizes_may_differ(tmp_path):
    options = {"output_dir": "x", "rank": 4, "dora": True}
    model, weights = trained(LoRASettings(**options))
    write_lora(tmp_path, "mine", weights, base_layer_weights(model, weights), "base")
    settings = LoRASettings(**options, start=str(tmp_path / "comfyui" / "mine.safetensors"))
    with pytest.raises(ValueError, match=f"has the sizes of a DoRA in ComfyUI's form; nearest: {FILE} of its folder"):
        adapter_values(config_of(model), settings)
    settings = LoRASettings(**options, start=str(tmp_path), lr_pattern={"magnitude": 2.0})
    assert adapter_values(config_of(model), settings) == sum(value.numel() for value in weights.values())


def test_optimizers_take_arguments_and_classes_may_be_named():
    parameters = {"a": torch.nn.Parameter(torch.zeros(2, 2))}
    (adam,) = make_optimizers(
        parameters, lr=1.0, weight_decay=0.1, arguments={"betas": [0.5, 0.6], "weight_decay": 0.2}
    )
    assert adam.param_groups[0]["betas"] in ([0.5, 0.6], (0.5, 0.6)) and adam.param_groups[0]["weight_decay"] == 0.2
    (found,) = make_optimizers(parameters, "torch.optim.Adafactor", lr=1.0, weight_decay=0.1, arguments={"d": 2.0})
    assert type(found) is torch.optim.Adafactor and found.param_groups[0]["d"] == 2.0
    for name, arguments, message in (
        ("adamw", {"beta": 1}, "optimizer_args: 'beta' is no argument of adamw; nearest: 'betas'"),
        ("adamw", {"lr": 1}, "optimizer_args: set lr=1 outside of it"),
        ("torch.optim.Adamw", {}, "optimizer='torch.optim.Adamw' cannot be imported"),
        ("torch.nn.Linear", {}, "optimizer='torch.nn.Linear' is no optimizer of torch; nearest: 'adamw'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_optimizers(parameters, name, lr=1.0, weight_decay=0.1, arguments=arguments)
    flags = ["--output-dir", "x", "--data", "y", "--optimizer-args", "betas=[0.9, 0.95]", "amsgrad=true", "eps=1e-8"]
    settings = read_settings(make_parser("test").parse_args(flags))
    assert settings.optimizer_args == {"betas": [0.9, 0.95], "amsgrad": True, "eps": 1e-8}
    with pytest.raises(ValueError, match="argument --rank-pattern: 'attn' is not of the form NAME=VALUE"):
        make_parser("test").parse_args(["--rank-pattern", "attn"])


@pytest.mark.parametrize(
    "options", [{"optimizer": "torch.optim.Rprop"}, {"optimizer_args": {"betas": 0.9}}], ids=["Rprop", "betas"]
)
def test_an_optimizer_that_does_not_take_its_arguments_is_refused_before_training(options):
    with pytest.raises(ValueError, match=r"does not take weight_decay and optimizer_args=.*; nearest: 'adamw'"):
        check_device(LoRASettings(output_dir="x", **options), torch.device("cpu"))


def test_the_rate_begins_again_in_each_cycle():
    rate = named_schedule("cosine_with_restarts", 1.0, 2, 12, 2)
    assert [round(rate(step), 3) for step in (1, 2, 6, 7, 11)] == [0.5, 1.0, 0.095, 1.0, 0.095]
    with pytest.raises(ValueError, match="lr_num_cycles=2: schedule='cosine' has no cycles"):
        LoRASettings(output_dir="x", schedule="cosine", lr_num_cycles=2)


def test_files_say_what_they_are_and_have_the_format_asked_for(train, tmp_path):
    flags = ["--max-steps", "1", "--save-precision", "bf16"]
    assert train("out", *flags) == 0
    for path in (tmp_path / "out" / "lora" / FILE, tmp_path / "out" / "lora" / "comfyui" / "out.safetensors"):
        with safe_open(path, "pt") as file:
            facts = file.metadata()
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
        assert facts["modelspec.title"] == "out" and facts["modelspec.resolution"] == "64x64"
        assert facts["ss_network_dim"] == "2" and "modelspec.trigger_phrase" not in facts
        content = path.read_bytes()
        digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
        assert facts["modelspec.hash_sha256"] == f"0x{digest}" and facts["sshs_model_hash"] == digest
    assert (
        json.loads((tmp_path / "out" / "lora" / "settings.json").read_text())["settings"]["save_precision"] == "bf16"
    )
    with pytest.raises(OSError, match="a.lora_B.weight is too large for save_precision='fp16'; nearest: bf16"):
        large = {"a.lora_A.weight": torch.zeros(1, 2), "a.lora_B.weight": torch.full((2, 1), 1e6)}
        write_lora(tmp_path, "large", large, {}, "base", precision="fp16")
