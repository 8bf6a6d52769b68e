"""Tests of core/configuration.py: what a file carries, and what its weights show."""

import json
from pathlib import Path

import pytest
import torch

from ptdit_diffusers.core.backbones.parameters import PTDiTParameters
from ptdit_diffusers.core.backbones.ptdit import PTDiTBackbone
from ptdit_diffusers.core.checkpoint_names import (
    PACKED_CONFIG,
    POSITION_BUFFER,
    ConversionError,
    clean_names,
    is_transformer,
    official_transformer_state_dict,
)
from ptdit_diffusers.core.configuration import (
    SIZE_CONDITIONS,
    carried_config,
    infer_transformer,
    infer_vae,
    loaded_transformer_config,
    pack_config,
    transformer_config,
)

SHAPES = json.loads((Path(__file__).parents[2] / "golden/official_transformer_shapes.json").read_text())
VAE_SHAPES = json.loads((Path(__file__).parents[2] / "golden/official_vae_shapes.json").read_text())


def official() -> dict[str, torch.Tensor]:
    """Return every weight of the official file, without memory."""
    shapes = SHAPES.get("shapes", SHAPES)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items() if isinstance(shape, list)}


def shapes(**changes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return the official shapes without position buffer, some of them changed."""
    found = {name: tuple(value.shape) for name, value in official().items() if name != POSITION_BUFFER}
    return found | changes


@pytest.mark.parametrize("key_prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "transformer.", "model.module."])
def test_the_official_file_gives_the_released_network(key_prefix, prefix):
    weights = {key_prefix + prefix + name: value for name, value in official().items()}
    config = loaded_transformer_config(weights, key_prefix)
    parameters = PTDiTParameters.from_config(config)
    assert parameters == PTDiTParameters()  # its defaults are the released model
    assert (config["base_tokens"], config["latent_scale"], config["latent_rgb"]) == (1024, 0.18215, None)
    backbone = PTDiTBackbone()
    with torch.device("meta"):
        backbone.build(parameters)
    ours = {name: tuple(value.shape) for name, value in backbone.state_dict().items()}
    inner = {name.removeprefix(key_prefix): value for name, value in weights.items()}
    assert ours == {name: tuple(value.shape) for name, value in official_transformer_state_dict(inner).items()}


def test_the_official_vae_gives_the_released_one():
    found = infer_vae({name: tuple(shape) for name, shape in VAE_SHAPES.items()})
    assert found == {
        "in_channels": 3,
        "out_channels": 3,
        "hidden_size": 128,
        "hidden_size_mult": (1, 2, 4, 4),
        "z_channels": 4,
        "num_res_blocks": 2,
    }


@pytest.mark.parametrize(
    ("tokens", "conditions", "sample_size"),
    [(None, False, 32), (None, True, 128), (256, False, 32), (1024, True, 64), (4096, False, 128), (4096, True, 128)],
)
def test_the_position_buffer_shows_the_sample_size_and_without_it_the_size_conditions_do(
    tokens, conditions, sample_size
):
    given = shapes()
    if conditions:
        given[SIZE_CONDITIONS] = (384, 256)
    if tokens:
        given[POSITION_BUFFER] = (1, 3, tokens, 1152)
    config = infer_transformer(given)
    assert (config["sample_size"], config["use_additional_conditions"]) == (sample_size, conditions)
    assert config["sample_frames"] == (3 if tokens else 1)


def test_other_weights_are_not_ours():
    pixart = {"transformer_blocks.0.attn1.to_q.weight": 0, "pos_embed.proj.weight": 0}
    assert loaded_transformer_config(pixart) is None
    assert loaded_transformer_config(official(), "model.") is None
    assert not is_transformer(["other.transformer_blocks.0.proxy_attn1.to_q.weight"])
    assert not is_transformer(["x", "model.x"])  # ambiguous names of another model are no error


def test_two_names_of_one_weight_are_refused():
    with pytest.raises(ConversionError, match="model.x and x in the file both stand for x; keep one of them"):
        clean_names(["model.x", "x"])


@pytest.mark.parametrize("spelling", ["additional_conditions", "use_additional_conditions"])
def test_a_packed_configuration_wins_over_what_is_inferred(spelling):
    given = {"num_attention_heads": 8, "window_size": [1, 4, 4], "base_tokens": 28, "latent_scale": 0.5}
    given |= {spelling: True, "something_else": 1, "proxy_mode": None}
    weights = official() | {PACKED_CONFIG: pack_config(given)}
    assert json.loads(bytes(weights[PACKED_CONFIG].tolist())) == given
    config = loaded_transformer_config(weights)
    assert (config["num_attention_heads"], config["attention_head_dim"]) == (8, 144)
    assert config["window_size"] == config["proxy_ratio"] == (1, 4, 4) and config["base_tokens"] == 28
    assert (config["latent_scale"], config["additional_conditions"], config["proxy_mode"]) == (0.5, True, "mean")
    assert "something_else" not in config
    assert PACKED_CONFIG not in official_transformer_state_dict(weights)


@pytest.mark.parametrize(
    "metadata",
    [
        {"config": '{"num_attention_heads": 12, "num_windows": 16}'},
        {"config": '{"transformer": {"num_attention_heads": 12, "num_windows": 16}, "vae": {}}'},
        {"ptdit.config": '{"_class_name": "PTDiTTransformer3DModel", "num_attention_heads": 12, "num_windows": 16}'},
    ],
    ids=["header", "header with components", "field of GGUF"],
)
def test_metadata_give_a_configuration(metadata):
    config = loaded_transformer_config(official(), metadata=metadata)
    assert (config["num_attention_heads"], config["num_windows"]) == (12, 16)


@pytest.mark.parametrize("text", ["", "no JSON", "[1]", '{"transformer": 1}', "null"])
def test_metadata_of_another_kind_are_no_configuration(text):
    assert carried_config({}, {"config": text}) == {}
    assert carried_config({PACKED_CONFIG: torch.tensor(list(text.encode()), dtype=torch.uint8)}) == {}


def test_what_the_user_says_wins_and_new_windows_have_one_proxy_each():
    carried = {"window_size": [1, 4, 4], "proxy_ratio": [1, 2, 2], "num_attention_heads": 8}
    config = transformer_config(shapes(), "a.pt", carried, {"num_attention_heads": 12})
    assert (config["num_attention_heads"], config["window_size"], config["proxy_ratio"]) == (12, [1, 4, 4], [1, 2, 2])
    config = transformer_config(shapes(), "a.pt", carried, {"window_size": (1, 2, 2)})
    assert (config["num_attention_heads"], config["window_size"], config["proxy_ratio"]) == (8, (1, 2, 2), (1, 2, 2))


def test_heads_that_are_not_known_or_do_not_divide_the_width_are_refused():
    width = {name: shape[:1] and (96, *shape[1:]) for name, shape in shapes().items() if shape[0] == 1152}
    with pytest.raises(ConversionError, match=r"a\.pt: .*width 96 is no known size; known: 288 .*Folder Loader"):
        transformer_config(shapes(**width), "a.pt")
    with pytest.raises(ConversionError, match="num_attention_heads=5 does not divide the width 1152; nearest: 4"):
        transformer_config(shapes(), "a.pt", {"num_attention_heads": 5})
