"""The backbone against the reference's tensors: every case, every sub-step, and what the reference gets wrong."""

import pytest
import torch
from torch import Tensor

from ptdit_diffusers.core.backbones.parameters import PTDiTParameters
from ptdit_diffusers.core.backbones.ptdit import PTDiTBackbone
from ptdit_diffusers.core.backbones.windows import Windows
from tests.ptdit_diffusers import goldens
from tests.ptdit_diffusers.goldens import CASES, LIMIT

WITH_ACTIVATIONS = ("i_image_square", "ii_proxy_finer", "iii_video_f8", "viii_single_window", "ix_ratio_one_h")


def difference(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    return (left - right).abs().max().item()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_output_equals_the_golden(case):
    name, options = CASES[case]
    tensors, _ = goldens.load(case)
    sample = goldens.model(case, **options)(**goldens.inputs(tensors)).sample
    assert difference(sample, tensors[name]) < LIMIT


@torch.no_grad()
def test_scrambled_positions_reproduce_the_official_output_of_non_square_pictures():
    tensors, _ = goldens.load("vi_b_nonsquare")
    sample = goldens.model("vi_b_nonsquare", scrambled_positions=True)(**goldens.inputs(tensors)).sample
    assert difference(sample, tensors["out_reference_raw"]) < LIMIT
    assert difference(sample, tensors["out_positions_fixed"]) > 1


@torch.no_grad()
def test_each_sample_uses_its_own_timestep_which_the_reference_gets_wrong():
    tensors, _ = goldens.load("v_batch2")
    arguments = goldens.inputs(tensors)
    transformer = goldens.model("v_batch2")
    together = transformer(**arguments).sample
    for index in range(2):
        alone = transformer(**{name: value[index : index + 1] for name, value in arguments.items()}).sample
        assert difference(together[index : index + 1], alone) < LIMIT
    assert difference(together, tensors["out_reference_raw_batch"]) > 1


@pytest.mark.parametrize("case", WITH_ACTIVATIONS)
@torch.no_grad()
def test_every_sub_step_equals_the_golden(case):
    tensors, _ = goldens.load(case)
    transformer = goldens.model(case)
    seen = {}

    def keep(name):
        return lambda module, arguments, output: seen.update({name: (arguments, output)})

    transformer.pos_embed.register_forward_hook(keep("patch"))
    transformer.adaln_single.register_forward_hook(keep("adaln"))
    transformer.caption_projection.register_forward_hook(keep("caption"))
    transformer.transformer_blocks[0].register_forward_hook(keep("first"))
    transformer.transformer_blocks[-1].register_forward_hook(keep("last"))
    transformer(**goldens.inputs(tensors))

    def check(name, value):
        golden = tensors[f"act.{name}"]
        assert difference(value.reshape(golden.shape), golden) < LIMIT, name

    (hidden_states, text, modulation, context), output = seen["first"]
    check("patch_only", seen["patch"][1])
    check("patch_plus_pos", hidden_states)
    check("embedded_timestep", seen["adaln"][1][0])
    check("adaln_6dim", seen["adaln"][1][1])
    check("caption", seen["caption"][1])

    block = transformer.transformer_blocks[0]
    shift1, scale1, gate1, *_ = (block.scale_shift_table + modulation).chunk(6, dim=1)
    proxies = context.proxies.tokens(hidden_states, None)
    order = window_major(context.proxies)  # the golden lists proxies window by window, we keep them in raster order
    check("block0.proxy_tokens_in", proxies[:, order])
    proxies = block.proxy_attention(proxies)
    check("block0.1_after_proxy_self_attn", proxies[:, order])
    hidden_states = block.injection(hidden_states, proxies)
    check("block0.2_after_visual_cross_attn", hidden_states)
    hidden_states = block.window_attention(hidden_states, shift1, scale1, gate1, context.windows)
    check("block0.3_after_window_attn", hidden_states)
    shift3, scale3, gate3 = (block.proxy_scale_shift_table + modulation[:, :3]).chunk(3, dim=1)
    hidden_states = block.shifted_window_attention(hidden_states, shift3, scale3, gate3, context.shifted_windows)
    check("block0.4_after_shift_window_attn", hidden_states)
    hidden_states = block.text_cross_attention(hidden_states, text, context.text_mask)
    check("block0.5_after_text_cross_attn", hidden_states)
    check("block0.6_after_ff", output)
    check("last_block_out", seen["last"][1])


def window_major(plan) -> Tensor:
    """Raster indices of the proxies in the golden's order: windows, then the strided proxies inside each."""
    sides = [size // length for size, length in zip(plan.grid, plan.window, strict=True)]
    inner = [1, plan.window[1] // plan.ratio[1], plan.window[2] // plan.ratio[2]]
    index = torch.arange(sides[0] * sides[1] * inner[1] * sides[2] * inner[2])
    return index.view(sides[0], sides[1], inner[1], sides[2], inner[2]).permute(0, 1, 3, 2, 4).flatten()


@pytest.mark.parametrize("case", WITH_ACTIVATIONS)
def test_shifted_windows_let_the_same_tokens_meet_as_the_reference_mask(case):
    tensors, config = goldens.load(case)
    _, _, frames, height, width = tensors["in.hidden_states"].shape
    grid, window = (frames, height // 2, width // 2), tuple(config["compress_ratios"])
    windows = Windows(grid, window, shifted=True)
    raster = torch.arange(frames * grid[1] * grid[2]).float().view(1, -1, 1)
    identity = torch.cat([torch.full((1, size, 1), float(i)) for i, size in enumerate(each_window(windows))], dim=1)
    of_token = torch.empty(raster.shape[1])
    of_token[windows.partition(raster).flatten().long()] = identity.flatten()  # token -> window

    shifts = [-(length // 2) for length in window]
    rolled = Windows(grid, window, shifted=False).partition(
        of_token.view(grid).roll(shifts, dims=(0, 1, 2)).reshape(1, -1, 1)
    )
    rolled = rolled.view(-1, window[0] * window[1] * window[2])  # the reference's windows
    meet = rolled[:, :, None] == rolled[:, None, :]
    assert torch.equal(meet, tensors["act.shift_mask"] == 0)


def each_window(windows: Windows) -> list[int]:
    return [tokens for count, tokens in windows.sizes for _ in range(count)]


@torch.no_grad()
def test_the_bare_backbone_gives_the_same_numbers_as_the_diffusers_head():
    tensors, _ = goldens.load("i_image_square")
    head = goldens.model("i_image_square")
    bare = PTDiTBackbone()
    bare.build(PTDiTParameters.from_config(head.config))
    bare.load_state_dict(head.state_dict())
    arguments = goldens.inputs(tensors)
    order = ("hidden_states", "timestep", "encoder_hidden_states")
    sample = bare.predict(*(arguments[name] for name in order), arguments["encoder_attention_mask"].bool())
    assert difference(sample, head(**arguments).sample) < 1e-6
