"""Formulas of what a call costs, against products and tensors that torch counts."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from ptdit_diffusers.core.cost import Call, cost_of, decoder_macs, largest, plain_macs
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.models.transformer_dit import DiT2DModel
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from scripts.benchmarks.memory import PeakMemory

TINY = {"num_attention_heads": 4, "attention_head_dim": 24, "num_layers": 2, "num_windows": 4, "caption_channels": 32,
        "window_size": (1, 4, 4), "proxy_ratio": (1, 4, 4)}  # fmt: skip
VAE = {"hidden_size": 16, "norm_num_groups": 4, "num_res_blocks": 1}


def counted(function) -> float:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(("frames", "pixels"), [(1, 128), (5, 64), (17, 64)])
@torch.no_grad()
def test_products_of_decoding_agree_with_the_formula(frames, pixels):
    with torch.device("meta"):
        vae, latents = AutoencoderKLOpenSoraPlan(), torch.empty(1, 4, (frames - 1) // 4 + 1, pixels // 8, pixels // 8)
    macs = decoder_macs((128, 256, 512, 512), 3, frames, pixels, pixels)
    assert counted(lambda: vae.decode(latents)) == pytest.approx(macs, rel=0.01)


@torch.no_grad()
def test_products_of_dit_and_its_vae_agree_with_the_formula():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=(32, 64, 128, 128), layers_per_block=2, **blocks)
        transformer = DiT2DModel(num_layers=2).eval()
        latents = torch.empty(2, 4, 32, 32)
        labels = torch.zeros(2, dtype=torch.long)
        forward = counted(lambda: transformer(latents, torch.empty(2), labels))
        decoding = counted(lambda: vae.decode(latents))
    assert decoding == pytest.approx(2 * decoder_macs((32, 64, 128, 128), 3, 1, 256, 256), rel=0.01)
    assert forward == pytest.approx(plain_macs(256, 1152, 2, 2), rel=0.02)
    whole = cost_of(Call(1, 256, 256, 3, prompts=2, predictions=1), transformer.config, vae.config, 4)
    assert whole.macs == pytest.approx(3 * forward + decoding, rel=0.02)


@pytest.mark.parametrize("call", [Call(1, 256, 192, 1), Call(2, 128, 128, 1, predictions=1), Call(1, 64, 64, 1, 1, 9),
                                  Call(1, 64, 64, 1, frames=5, views=True)])  # fmt: skip
@torch.no_grad()
def test_the_memory_of_a_call_is_about_that_of_the_counted_tensors(call):
    transformer, vae = PTDiTTransformer3DModel(**TINY).eval(), AutoencoderKLOpenSoraPlan(**VAE).eval()
    latents = torch.randn(call.samples, 4, call.latent_frames, call.height // 8, call.width // 8)
    batch = torch.cat([latents] * call.predictions)
    with PeakMemory() as memory:
        transformer(batch, torch.randn(len(batch), 8, 32), torch.full((len(batch),), 5.0))
    assert 0.5 <= memory.peak / cost_of(call, transformer.config, None, 4).memory <= 1.6
    with PeakMemory() as memory:
        decoded = [vae.decode(part)[0] for part in (latents.split(1, dim=2) if call.views else [latents])]
    assert sum(part.shape[2] for part in decoded) == call.frames
    assert 0.6 <= memory.peak / cost_of(call, transformer.config, vae.config, 4).memory <= 1.2


def test_the_largest_call_that_fits_keeps_its_proportions():
    call, cost = Call(3, 1024, 512, 7), lambda one: one.samples * one.height * one.width
    half = replace(call, height=256, width=128)
    assert largest(call, "size", 16, 16, lambda one: cost(one) <= 3 * 256 * 128) == half
    assert largest(call, "samples", 1, 1, lambda one: cost(one) <= 2 * 1024 * 512).samples == 2
    assert largest(call, "frames", 1, 4, lambda one: False) is None
    assert largest(replace(call, frames=17), "frames", 1, 4, lambda one: one.frames < 13).frames == 9


def test_several_small_calls_need_the_memory_of_one():
    one, many = Call(1, 64, 64, 1, at_once=64 * 64), Call(100, 64, 64, 1, at_once=64 * 64)
    assert cost_of(many, TINY, VAE, 4).memory == cost_of(one, TINY, VAE, 4).memory
    assert cost_of(many, TINY, VAE, 4).macs == 100 * cost_of(one, TINY, VAE, 4).macs
