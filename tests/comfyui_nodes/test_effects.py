"""Tests of comfyui_nodes/effects.py: what cannot act on a PT-DiT is said, what can is not."""

from types import SimpleNamespace

import pytest

from comfyui_nodes.effects import coarse_cache, log_lines, without_effect

PATCH = object()


def test_a_bare_model_and_replaced_blocks_give_no_line():
    options = {"patches": {}, "patches_replace": {"dit": {("double_block", 5): PATCH, ("single_block", 0): PATCH}}}
    assert log_lines(None, options, (1, 4, 16, 16), blocks=6) == []


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
    (line,) = log_lines({"input": []}, {}, (1, 4, 16, 16), blocks=6)
    assert line.startswith("a ControlNet or T2I adapter is connected") and "changes nothing" in line


@pytest.mark.parametrize("shape, warns", [((1, 4, 16, 16), True), ((1, 4, 1, 48, 64), True), ((1, 4, 128, 64), False)])
def test_a_cache_that_compares_few_cells_is_said(shape, warns):
    options = {"easycache": SimpleNamespace(subsample_factor=8)}
    assert (coarse_cache(options, shape) is not None) == warns
    assert coarse_cache({}, shape) is None
