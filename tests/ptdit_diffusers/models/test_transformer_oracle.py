"""The blocks of the whole model against dense attention over all tokens with a same-window mask, in float64."""

import math

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ptdit_diffusers.core.backbones.embeddings import position_table
from tests.ptdit_diffusers.core.backbones.test_windows import grids, proxy_sets, triples, window_of_token
from tests.ptdit_diffusers.models.test_transformer_ptdit import tiny


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(x):
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def attend(state, name, x, source, keep, heads=2):
    """Dense attention; `keep` says which key a query may see, (queries, keys) or (B, 1, 1, keys)."""
    q, k, v = (
        linear(state, f"{name}.{part}", tokens).unflatten(-1, (heads, -1)).transpose(1, 2)
        for part, tokens in (("to_q", x), ("to_k", source), ("to_v", source))
    )
    logits = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~keep, -math.inf)
    return linear(state, f"{name}.to_out.0", (logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


def block(state, x, text, keep_text, modulation, grid, window, ratio):
    """One block in the order of the paper's figure 4, straight from the definitions."""
    shift1, scale1, gate1, shift2, scale2, gate2 = (state["scale_shift_table"] + modulation).chunk(6, dim=1)
    shift3, scale3, gate3 = (state["proxy_scale_shift_table"] + modulation[:, :3]).chunk(3, dim=1)
    everything = torch.ones((), dtype=torch.bool)
    proxies = torch.stack([x[:, tokens].mean(1) for tokens in proxy_sets(grid, window, ratio)], dim=1)
    proxies = proxies + attend(state, "proxy_attn1", norm(proxies), norm(proxies), everything)
    seen = attend(state, "pvisual_attn2", norm(x), norm(proxies), everything)
    x = x + linear(state, "linear_1_visual", seen)
    for name, shifted, shift, scale in (("attn1", False, shift1, scale1), ("attn3", True, shift3, scale3)):
        number = window_of_token(grid, window, shifted)
        inner = norm(x) * (1 + scale) + shift
        inner = attend(state, name, inner, inner, number[:, None] == number)
        x = x + (linear(state, "linear_2", gate3 * inner) if shifted else gate1 * inner)
    x = x + attend(state, "attn2", x, text, keep_text)
    inner = linear(state, "ff.net.0.proj", norm(x) * (1 + scale2) + shift2)
    return x + gate2 * linear(state, "ff.net.2", F.gelu(inner, approximate="tanh"))


@settings(max_examples=60, deadline=None)
@given(grid=grids, window=triples, ratio=triples, batch=st.integers(1, 3), seed=st.integers(0, 9999), data=st.data())
@torch.no_grad()
def test_the_whole_model_equals_dense_masked_attention(grid, window, ratio, batch, seed, data):
    row = st.lists(st.booleans(), min_size=4, max_size=4).filter(any)
    keep = torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)))
    times = data.draw(st.lists(st.floats(0, 1000), min_size=batch, max_size=batch))
    transformer = tiny(num_layers=2).double()
    generator = torch.Generator().manual_seed(seed)
    latents, text = (
        torch.randn(batch, *shape, dtype=torch.float64, generator=generator)
        for shape in ((4, grid[0], 2 * grid[1], 2 * grid[2]), (4, 12))
    )
    state = transformer.state_dict()
    x = transformer.pos_embed(latents) + position_table(grid, 32, 1, False, latents.device)
    embedded, modulation = transformer.adaln_single(torch.tensor(times), None, None, torch.float64)
    caption = transformer.caption_projection(text)
    for number in range(2):
        prefix = f"transformer_blocks.{number}."
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        x = block(part, x, caption, keep[:, None, None], modulation, grid, window, ratio)
    shift, scale = (state["scale_shift_table"] + embedded[:, None]).chunk(2, dim=1)
    patches = linear(state, "proj_out", norm(x) * (1 + scale) + shift).view(batch, *grid, 2, 2, 8)
    expected = torch.einsum("bfhwpqc->bcfhpwq", patches).reshape(batch, 8, grid[0], 2 * grid[1], 2 * grid[2])

    arguments = (latents, text, torch.tensor(times), keep)
    sizes = {"window_size": window, "proxy_ratio": ratio}
    for _ in range(2):  # as it is, then fused
        assert (transformer(*arguments, **sizes).sample - expected).abs().max() < 1e-11 * expected.abs().max()
        transformer.fuse_linear_layers()
