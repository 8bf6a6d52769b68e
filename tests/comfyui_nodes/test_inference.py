"""Tests of comfyui_nodes/inference.py: the configuration read from weights."""

import json
from pathlib import Path

import pytest
import torch

from comfyui_nodes.inference import (
    CONFIG_KEY,
    NETWORK,
    infer_config,
    inner_prefix,
    pack_config,
    strip_weights,
    unpack_config,
)
from ptdit_diffusers.core.backbones.parameters import PTDiTParameters
from ptdit_diffusers.core.backbones.ptdit import PTDiTBackbone

SHAPES = json.loads((Path(__file__).parents[1] / "golden/official_transformer_shapes.json").read_text())


def official() -> dict[str, torch.Tensor]:
    """Every weight of the official file, without memory."""
    shapes = SHAPES.get("shapes", SHAPES)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items() if isinstance(shape, list)}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "module."])
def test_the_official_file_gives_the_released_network(prefix):
    weights = {prefix + name: value for name, value in official().items()}
    config = infer_config(weights, prefix)
    assert config["num_attention_heads"] == 16 and config["attention_head_dim"] == 72
    assert (config["num_layers"], config["caption_channels"], config["out_channels"]) == (28, 4096, 8)
    assert config["window_size"] == config["proxy_ratio"] == (1, 8, 8) and config["shift_window"]
    backbone = PTDiTBackbone()
    with torch.device("meta"):
        backbone.build(PTDiTParameters(**{name: config[name] for name in NETWORK}))
    ours = {name: tuple(value.shape) for name, value in backbone.state_dict().items()}
    assert ours == {name: tuple(value.shape) for name, value in strip_weights(official()).items()}


def test_other_weights_are_not_ours():
    pixart = {"transformer_blocks.0.attn1.to_q.weight": 0, "pos_embed.proj.weight": 0}
    assert inner_prefix(pixart, "") is None
    assert inner_prefix(official(), "") == "" and inner_prefix(official(), "model.") is None


def test_a_packed_configuration_wins_over_what_is_inferred():
    weights = official()
    given = {"num_attention_heads": 8, "window_size": [1, 4, 4], "base_tokens": 28, "latent_scale": 0.5}
    weights[CONFIG_KEY] = pack_config(given)
    assert unpack_config(weights[CONFIG_KEY]) == given
    config = infer_config(weights)
    assert (config["num_attention_heads"], config["attention_head_dim"]) == (8, 144)
    assert config["window_size"] == config["proxy_ratio"] == (1, 4, 4) and config["base_tokens"] == 28
    assert CONFIG_KEY not in strip_weights(weights)


def test_the_header_of_the_file_gives_a_configuration():
    config = infer_config(official(), metadata={"config": json.dumps({"num_attention_heads": 12, "num_windows": 16})})
    assert (config["num_attention_heads"], config["num_windows"]) == (12, 16)


def test_an_unknown_width_without_configuration_says_where_to_go():
    weights = {
        name: value[:96] if value.shape and value.shape[0] == 1152 else value for name, value in official().items()
    }
    with pytest.raises(ValueError, match="width 96.*known widths: 288.*Folder Loader"):
        infer_config(weights)
