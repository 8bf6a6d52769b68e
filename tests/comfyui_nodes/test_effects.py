"""Tests of comfyui_nodes/effects.py: what cannot act on a PT-DiT is said, what can is not."""

from types import SimpleNamespace

import pytest

from comfyui_nodes.effects import eager_cache, foreign_sampling, log_lines, without_effect

PATCH = object()


def test_a_bare_model_and_replaced_blocks_give_no_line():
    options = {"patches": {}, "patches_replace": {"dit": {("double_block", 5): PATCH, ("single_block", 0): PATCH}}}
    assert log_lines(None, options, blocks=6) == []


@pytest.mark.parametrize(
    "options, name",
    [
        ({"patches": {"attn1_patch": [PATCH]}}, "attn1_patch"),
        ({"patches_replace": {"attn1": {("middle", 0): PATCH}}}, "attn1 middle 0"),
        ({"patches_replace": {"dit": {("double_block", 6): PATCH}}}, "dit double_block 6"),
        ({"patches_replace": {"dit": {("double_block", 0): PATCH, ("last_block", 0): PATCH}}}, "dit last_block 0"),
    ],
)
def test_patches_that_the_network_never_reads_are_named(options, name):
    (line,) = without_effect(None, options, blocks=6)
    assert line.endswith(f"({name})")


def test_a_control_network_is_named():
    (line,) = log_lines({"input": []}, {}, blocks=6)
    assert line == "PT-DiT cannot use a ControlNet or T2I adapter; it changes nothing."


@pytest.mark.parametrize("threshold, warns", [(0.2, True), (0.05, False)])
def test_a_cache_that_leaves_out_many_steps_is_said(threshold, warns):
    line = eager_cache({"easycache": SimpleNamespace(reuse_threshold=threshold)})
    assert (line is not None and "reuse_threshold 0.2" in line) == warns
    assert eager_cache({}) is None


@pytest.mark.parametrize("name, node", [("rope_options", "ScaleROPE"), ("a2v_cross_attn", "LTXVModalityGuidance")])
def test_options_of_other_networks_are_named_by_their_node(name, node):
    assert log_lines(None, {name: {}}, blocks=6, title="DiT") == [f"DiT cannot use {node}; it changes nothing."]


@pytest.mark.parametrize(
    "fits, time, words", [(True, 1.0, "the time 1 at full noise"), (False, 999.0, "takes what the network predicts")]
)
def test_the_sampling_of_other_models_is_said(fits, time, words):
    assert words in foreign_sampling(fits, time)
    assert foreign_sampling(True, 999.0) is None and foreign_sampling(True, 1000.0) is None
