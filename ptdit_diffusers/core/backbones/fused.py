"""Products of neighbouring linear layers, exact up to rounding: less work for inference. Plain torch, no parameters.

Shape letters as in `ptdit`; H heads, K keys of a cross-attention, d = D / H.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_linear(name: str, layer: nn.Module) -> None:
    """Refuses a layer whose output is not just `weight` and `bias`.

    Raises:
        ValueError: weights are quantised, stored in 8 bits or not loaded, or a LoRA is loaded but not merged.
    """
    if getattr(layer, "merged", True) is False:
        raise ValueError(f"{name} carries a LoRA that is not merged into its weight: call fuse_lora() first.")
    weight = layer.weight
    plain = type(weight) in (nn.Parameter, torch.Tensor) and weight.dtype in FLOATS and not weight.is_meta
    if not plain:
        raise ValueError(
            f"{name} has a weight of type {type(weight).__name__}, {weight.dtype} on {weight.device}; linear layers "
            "can only be fused when their weights are loaded as floating-point numbers of 16 or more bits."
        )


@torch.no_grad()
def linear_product(first: nn.Module, second: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (D, D) and bias (D,) of `second(first(x))`, rounded from float32 to the dtype of `first`."""
    dtype = first.weight.dtype
    fine = torch.promote_types(dtype, torch.float32)
    weight = second.weight.to(fine) @ first.weight.to(fine)
    bias = F.linear(first.bias.to(fine), second.weight.to(fine), second.bias.to(fine))
    return weight.to(dtype), bias.to(dtype)


def gated_product(
    first: nn.Module, gate: torch.Tensor, second: nn.Module, tokens: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Weights (G, D, D) and biases (G, 1, D) of `second(gate * first(x))` for gates (G, 1, D), G = 1 or B.

    None when that would be more work than the two layers: D^3 per gate against D^2 for each of `tokens` tokens.
    """
    if len(gate) * gate.shape[-1] >= tokens:
        return None
    weight = (second.weight * gate) @ first.weight
    return weight, F.linear(gate * first.bias, second.weight, second.bias)


def apply_product(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(B, N, D) through the weights (G, D, D) and biases (G, 1, D) of `gated_product`."""
    if len(weight) == 1:
        return F.linear(hidden_states, weight[0], bias[0, 0])
    return torch.baddbmm(bias, hidden_states, weight.mT)


def folding_pays(tokens: int, keys: int, heads: int, dim: int) -> bool:
    """Whether `folded_cross_attention` is less work: 2 K H D a token and 2 K D^2 at first, against 2 D^2 + 2 K D."""
    return tokens * keys * heads + keys * dim < tokens * (dim + keys)


def folded_cross_attention(
    attention: nn.Module,
    hidden_states: torch.Tensor,
    source: torch.Tensor,
    attention_mask: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """Cross-attention whose query layer went into the keys and whose output layer into the values, head by head.

    Softmax weights add up to 1, so the output's bias may ride on the values of the first head. Masked keys have value
    zero, so that a sample without any text gets the bias alone, as it does from attention kernels.

    Args:
        attention: module with to_q, to_k, to_v and heads.
        hidden_states: (B, N, D).
        source: (B, K, D).
        attention_mask: bool (B, K), True = keep, or None.
        weight, bias: the output layer, (D, D) and (D,).
    """
    heads = attention.heads
    key, value = (
        t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (attention.to_k(source), attention.to_v(source))
    )
    scale = key.shape[-1] ** -0.5
    query = attention.to_q
    folded_key = key @ (query.weight * scale).unflatten(0, (heads, -1))  # (B, H, K, D)
    offset = key @ (query.bias * scale).view(heads, -1, 1)  # (B, H, K, 1)
    if attention_mask is not None:
        masked = ~attention_mask[:, None, :, None]
        offset = offset.masked_fill(masked, torch.finfo(offset.dtype).min / 2)  # finite: no 0 / 0
        value = value.masked_fill(masked, 0)
    folded_value = value @ weight.t().unflatten(0, (heads, -1))  # (B, H, K, D)
    folded_value = torch.cat([folded_value[:, :1] + bias, folded_value[:, 1:]], dim=1)

    logits = torch.baddbmm(offset.flatten(1)[:, None], hidden_states, folded_key.flatten(1, 2).mT)  # (B, N, H * K)
    shares = logits.unflatten(-1, (heads, -1)).softmax(-1).flatten(-2)
    return torch.bmm(shares.to(folded_value.dtype), folded_value.flatten(1, 2))


def fused_cross_attention(
    attention: nn.Module,
    hidden_states: torch.Tensor,
    source: torch.Tensor,
    attention_mask: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """`folded_cross_attention` where it is less work, else the attention with `weight` and `bias` as output layer."""
    if folding_pays(hidden_states.shape[1], source.shape[1], attention.heads, hidden_states.shape[-1]):
        return folded_cross_attention(attention, hidden_states, source, attention_mask, weight, bias)
    return attention(hidden_states, source, attention_mask, out=partial(F.linear, weight=weight, bias=bias))
