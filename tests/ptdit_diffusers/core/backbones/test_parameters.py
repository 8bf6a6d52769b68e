"""Parameters of the networks: what is read from a configuration, and what is refused with the nearest legal value."""

import dataclasses

import pytest

from ptdit_diffusers.core.backbones.parameters import PTDiTParameters, VAEParameters


def test_a_configuration_gives_its_values_and_the_released_ones_for_the_rest():
    parameters = PTDiTParameters.from_config({"num_layers": 2, "window_size": [1, 4, 4], "_class_name": "something"})
    assert parameters == PTDiTParameters(num_layers=2, window_size=(1, 4, 4))
    assert parameters.dim == 1152 and parameters.window_size == (1, 4, 4)
    vae = VAEParameters.from_config({"hidden_size": 64, "hidden_size_mult": [1, 1, 2, 2]})
    assert vae.widths == [64, 64, 128, 128]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, False),
        ({"sample_size": 128}, True),
        ({"sample_size": 128, "use_additional_conditions": None}, True),
        ({"sample_size": 128, "use_additional_conditions": False}, False),
        ({"additional_conditions": True}, True),
    ],
)
def test_size_conditions_follow_the_official_rule_unless_they_are_named(config, expected):
    assert PTDiTParameters.from_config(config).additional_conditions is expected


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (PTDiTParameters, {"num_layers": 0}, "num_layers=0 must be an integer >= 1; nearest: 1"),
        (PTDiTParameters, {"patch_size": 2.0}, "patch_size=2.0 must be an integer >= 1; nearest: 2"),
        (PTDiTParameters, {"attention_head_dim": 71, "sample_size": 128}, "= 1136 must be .* 3 .*nearest: 1152"),
        (PTDiTParameters, {"attention_head_dim": 9, "num_attention_heads": 3}, "= 27 must be .* 16 .*nearest: 32"),
        (PTDiTParameters, {"window_size": (1, 8)}, "window_size=.*three integers >= 1 .*nearest: .1, 8, 1"),
        (PTDiTParameters, {"proxy_mode": "max"}, "proxy_mode='max' is unknown; choose one of mean, random, first"),
        (VAEParameters, {"z_channels": "4"}, "z_channels='4' must be an integer >= 1"),
        (VAEParameters, {"hidden_size_mult": (1, 2, 4)}, "has 3 levels; it must have 4"),
        (VAEParameters, {"hidden_size": 40}, "level width 40 is not a multiple of norm_num_groups=32; nearest: 32"),
    ],
)
def test_an_illegal_value_is_refused_with_the_nearest_legal_one(kind, given, message):
    with pytest.raises(ValueError, match=message):
        kind(**given)


def test_a_name_that_is_no_field_is_refused():
    with pytest.raises(TypeError, match="windows"):
        PTDiTParameters(windows=(1, 8, 8))
    with pytest.raises(dataclasses.FrozenInstanceError):
        PTDiTParameters().num_layers = 2
