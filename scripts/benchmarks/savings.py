"""What each product of `fuse_linear_layers` saves, alone: time of the layers against time of their product."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptdit_diffusers.core.backbones import fused
from scripts.benchmarks.cost import Size, savings
from scripts.benchmarks.models import HEAD_DIM, Job, prepare
from scripts.benchmarks.timing import take_turns


def pairs(block: Any, job: Job, dtype: torch.dtype, device: str) -> dict[str, tuple[Callable, Callable]]:
    """Return by name the layers as they are, and their product; products of one forward are made in it."""
    dim = job.heads * HEAD_DIM
    count = job.grid[0] * job.grid[1] * job.grid[2]
    tokens, proxies, text = (
        torch.randn(job.batch, rows, dim, device=device).to(dtype)
        for rows in (count, count // (job.window[0] * job.window[1] * job.window[2]), job.text)
    )
    gate = torch.randn(1, 1, dim, device=device).to(dtype)
    visual, reader, shifted = block.pvisual_attn2, block.attn2, block.attn3
    product = fused.linear_product(visual.to_out[0], block.linear_1_visual)
    own = reader.to_out[0].weight, reader.to_out[0].bias
    joint = [torch.cat([getattr(layer, kind) for layer in (shifted.to_q, shifted.to_k, shifted.to_v)])
             for kind in ("weight", "bias")]  # fmt: skip

    def gated() -> Tensor:
        weight_and_bias = fused.gated_product(shifted.to_out[0], gate, block.linear_2, job.batch * count)
        if weight_and_bias is None:
            return block.linear_2(gate * shifted.to_out[0](tokens))
        return fused.apply_product(tokens, *weight_and_bias)

    return {
        "linear_1_visual * to_out": (
            lambda: block.linear_1_visual(visual.to_out[0](tokens)),
            lambda: F.linear(tokens, *product),
        ),
        "text folded": (
            lambda: reader(tokens, text),
            lambda: fused.fused_cross_attention(reader, tokens, text, None, *own),
        ),
        "proxies folded": (
            lambda: visual(tokens, proxies, out=lambda x: F.linear(x, *product)),
            lambda: fused.fused_cross_attention(visual, tokens, proxies, None, *product),
        ),
        "linear_2 * gate * to_out": (lambda: block.linear_2(gate * shifted.to_out[0](tokens)), gated),
        "joint q, k, v": (
            lambda: [layer(tokens) for layer in (shifted.to_q, shifted.to_k, shifted.to_v)],
            lambda: F.linear(tokens, *joint).chunk(3, dim=-1),
        ),
    }


@torch.inference_mode()
def measure_savings(job: Job, dtype: torch.dtype, device: str, repeats: int) -> dict[str, dict[str, float]]:
    """Return the predicted and the measured saving of each product, in D^2 products per token of a block."""
    model, _ = prepare("ptdit", job, dtype, device, compiled=False)
    block = model.transformer_blocks[0]
    unit = torch.randn(
        job.batch * job.grid[0] * job.grid[1] * job.grid[2],
        job.heads * HEAD_DIM,
        device=device,
    )
    unit = unit.to(dtype)
    functions = {"unit": lambda: F.linear(unit, block.linear_2.weight, block.linear_2.bias)}
    for name, (plain, product) in pairs(block, job, dtype, device).items():
        functions |= {f"{name} plain": plain, f"{name} product": product}
    times = take_turns(functions, repeats + 1, device)  # the first round warms up
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    size = Size(job.grid, job.window, job.window, job.heads * HEAD_DIM, 1, job.text, job.batch)
    return {
        name: {
            "predicted": round(value, 3),
            "measured": round((median[f"{name} plain"] - median[f"{name} product"]) / median["unit"], 3),
        }
        for name, value in savings(size, job.heads).items()
    }
