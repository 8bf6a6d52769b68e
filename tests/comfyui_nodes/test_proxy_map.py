"""Tests of comfyui_nodes/proxy_map.py: what is recorded, and where it is drawn."""

import torch

from comfyui_nodes.proxy_map import PANEL, Recorder, attention_weights, draw_map, proxies_of_tokens
from ptdit_diffusers.core.backbones.proxies import ProxyPlan, mean_proxies


def test_every_token_belongs_to_the_proxy_that_averages_it():
    for grid, window, ratio in (
        ((1, 8, 8), (1, 4, 4), (1, 4, 4)),
        ((1, 8, 8), (1, 4, 4), (1, 2, 2)),
        ((2, 5, 7), (1, 4, 4), (1, 2, 4)),
        ((1, 8, 8), (1, 2, 2), (1, 4, 4)),
    ):
        plan = ProxyPlan(grid, window, ratio)
        owner = proxies_of_tokens(plan)
        for token in range(len(owner)):
            alone = torch.zeros(1, len(owner), 1)
            alone[0, token] = 1.0
            assert mean_proxies(alone, *plan)[0, :, 0].nonzero().flatten().tolist() == [int(owner[token])]


def test_recorded_weights_are_those_of_attention():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)

    def attention(q, k, v, heads, **_):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    single = attention_weights(query[0], key[0], 1)
    torch.testing.assert_close(single @ value[0], attention(query, key, value, 1)[0])
    recorder = Recorder({1})
    for block in (0, 1):
        for _ in range(3):
            out = recorder(attention, query, key, value, 2, transformer_options={"block_index": block})
            torch.testing.assert_close(out, attention(query, key, value, 2))
    assert set(recorder.maps) == {(1, "proxies"), (1, "injection")}
    torch.testing.assert_close(recorder.maps[1, "proxies"].sum(dim=1), torch.ones(6))


def wide_recorder() -> Recorder:
    """One block over two proxies and eight tokens."""
    recorder = Recorder({0})
    recorder.maps = {(0, "proxies"): torch.eye(2), (0, "injection"): torch.ones(8, 2) / 2}
    return recorder


def test_the_sheet_has_a_row_per_block_and_shows_where_attention_goes():
    plan = ProxyPlan((1, 4, 4), (1, 2, 2), (1, 2, 2))
    recorder = Recorder({0, 1})
    for block in (0, 1):
        recorder.maps[block, "proxies"] = torch.eye(4)
        recorder.maps[block, "injection"] = torch.tensor([[0.0, 0.0, 0.0, 1.0]]).expand(16, -1)
    sheet = draw_map(recorder, plan, torch.zeros(32, 32, 3), frame=0, row=0, column=0)
    assert sheet.shape == (2 * PANEL + 6, 4 * PANEL + 18, 3) and 0 <= sheet.min() and sheet.max() <= 1
    wide = draw_map(wide_recorder(), ProxyPlan((1, 2, 4), (1, 2, 2), (1, 2, 2)), torch.zeros(32, 32, 3), 0, 1, 3)
    assert wide.shape == (PANEL // 2, 4 * PANEL + 18, 3)  # a square picture, given for a wide grid, is fitted to it
    looks_at = sheet[:PANEL, 3 * (PANEL + 6) :].sum(dim=-1)
    assert looks_at[PANEL - 20, PANEL - 20] > looks_at[PANEL - 20, 20]  # the lower right proxy is the bright one
