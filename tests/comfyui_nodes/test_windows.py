"""Tests of comfyui_nodes/windows.py: presets, rules by step range, what they cost."""

import pytest

from comfyui_nodes.windows import AUTO, CHECKPOINT, CUSTOM, FAST, FINE, WindowRule, check_custom, explain, rule_for
from comfyui_nodes.windows import window_and_ratio as chosen
from ptdit_diffusers.core.backbones.ptdit import PTDiTBackbone


@pytest.fixture
def network():
    """What rules read of the released network, without its weights."""
    backbone = PTDiTBackbone()
    backbone.patch_size, backbone.num_windows, backbone.proxy_mode = 2, 64, "mean"
    backbone.trained_windows = (1, 8, 8), (1, 8, 8)
    return backbone


@pytest.mark.parametrize("pixels, side", [(512, 4), (1024, 8), (2048, 16)])
def test_match_resolution_keeps_sixty_four_windows_as_the_paper_does(network, pixels, side):
    assert chosen(network, WindowRule(AUTO), pixels // 8, pixels // 8) == ((1, side, side), (1, side, side))
    assert "64 of them; 64 proxies" in explain(network, WindowRule(AUTO), pixels, pixels)


def test_presets_change_what_their_names_say(network):
    assert chosen(network, WindowRule(CHECKPOINT), 64, 64) == ((1, 8, 8), (1, 8, 8))
    assert chosen(network, WindowRule(FAST), 128, 128) == ((1, 8, 8), (1, 16, 16))
    assert chosen(network, WindowRule(FINE), 128, 128) == ((1, 8, 8), (1, 4, 4))
    rule = WindowRule(CUSTOM, window=(0, 4, 16), proxy=(0, 2, 0))
    assert chosen(network, rule, 128, 128) == ((1, 4, 16), (1, 2, 16))


def test_the_last_rule_whose_range_fits_counts():
    rules = tuple(tuple(WindowRule(mode, start=a, end=b)) for mode, a, b in ((FAST, 0, 0.5), (FINE, 0.3, 1)))
    assert [rule_for(rules, progress).mode for progress in (0.0, 0.29, 0.3, 0.9)] == [FAST, FAST, FINE, FINE]
    assert rule_for((tuple(WindowRule(FAST, start=0.5)),), 0.1) == WindowRule()


def test_the_words_count_pairs_as_attention_does(network):
    words = explain(network, WindowRule(CHECKPOINT), 1024, 1024)
    windows = 64 * 64**2  # 64 windows of 64 tokens
    # the shifted cut gives, per axis, one run of 4, seven of 8, one of 4
    shifted = sum((a * b) ** 2 for a in (4, *[8] * 7, 4) for b in (4, *[8] * 7, 4))
    pairs = windows + shifted + 64**2 + 4096 * 64
    assert f"{pairs:,} pairs" in words and f"{100 * pairs / 4096**2:.1f} %" in words


@pytest.mark.parametrize("proxy, nearest", [((0, 3, 0), "2 or 4"), ((0, 0, 12), "8 or 16")])
def test_a_proxy_that_fits_no_window_is_refused_with_the_nearest(proxy, nearest):
    with pytest.raises(ValueError, match=f"neither divides.*nearest: {nearest}"):
        check_custom((1, 8, 8), proxy)
    check_custom((1, 8, 8), (0, 4, 16))
