"""Products of neighboring linear layers: the same results up to rounding, with less work, for inference.

Shape letters: B batch, N tokens, D width, K keys of a cross-attention, G gates.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_linear(name: str, layer: nn.Module) -> None:
    """Check that a layer's output depends on its `weight` and `bias` alone.

    Raises:
        ValueError: weights are quantized, stored in 8 bits or not loaded, or a LoRA is loaded but not merged.
    """
    if getattr(layer, "merged", True) is False:
        raise ValueError(f"{name} carries a LoRA that is not merged into its weight: call fuse_lora() first.")
    weight = layer.weight
    plain = type(weight) in (nn.Parameter, Tensor) and weight.dtype in FLOATS and not weight.is_meta
    if not plain:
        raise ValueError(
            f"{name} has a weight of type {type(weight).__name__}, {weight.dtype} on {weight.device}; linear layers "
            "can only be fused when their weights are loaded as floating-point numbers of 16 or more bits."
        )


@torch.no_grad()
def linear_product(first: nn.Module, second: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight (D, D) and bias (D,) of `second(first(x))`, rounded from float32 to the dtype of `first`."""
    dtype = first.weight.dtype
    fine = torch.promote_types(dtype, torch.float32)
    weight = second.weight.to(fine) @ first.weight.to(fine)
    bias = F.linear(first.bias.to(fine), second.weight.to(fine), second.bias.to(fine))
    return weight.to(dtype), bias.to(dtype)


def gated_product(first: nn.Module, gate: Tensor, second: nn.Module, tokens: int) -> tuple[Tensor, Tensor] | None:
    """Return weights (G, D, D) and biases (G, 1, D) of `second(gate * first(x))` for gates (G, 1, D), G = 1 or B.

    Return None if that is more work than the two layers: D^3 per gate against D^2 for each of `tokens` tokens.
    """
    if len(gate) * gate.shape[-1] >= tokens:
        return None
    weight = (second.weight * gate) @ first.weight
    return weight, F.linear(gate * first.bias, second.weight, second.bias)


def apply_product(hidden_states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply the weights (G, D, D) and biases (G, 1, D) of `gated_product` to (B, N, D)."""
    if len(weight) == 1:
        return F.linear(hidden_states, weight[0], bias[0, 0])
    return torch.baddbmm(bias, hidden_states, weight.mT)


def folding_pays(tokens: int, keys: int, heads: int, dim: int) -> bool:
    """Return whether `folded_cross_attention` is less work than plain cross-attention.

    It takes 2 K heads D products per token and 2 K D^2 once; plain attention takes 2 D^2 + 2 K D per token.
    """
    return tokens * keys * heads + keys * dim < tokens * (dim + keys)


def folded_cross_attention(
    attention: nn.Module,
    hidden_states: Tensor,
    source: Tensor,
    attention_mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """Attend with the query layer multiplied into the keys and the output layer into the values, head by head.

    Softmax weights add up to 1, so the bias of the output can be added to the values of the first head. Masked keys
    get the value zero, so that a sample without any text gets the bias alone, as from attention kernels.

    Args:
        attention: module with to_q, to_k, to_v and heads.
        hidden_states: (B, N, D).
        source: (B, K, D).
        attention_mask: bool (B, K), True = keep, or None.
        weight, bias: the output layer, (D, D) and (D,).

    Returns:
        (B, N, D).
    """
    heads = attention.heads
    key, value = (
        t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (attention.to_k(source), attention.to_v(source))
    )
    scale = key.shape[-1] ** -0.5
    query = attention.to_q
    folded_key = key @ (query.weight * scale).unflatten(0, (heads, -1))  # (B, heads, K, D)
    offset = key @ (query.bias * scale).view(heads, -1, 1)  # (B, heads, K, 1)
    if attention_mask is not None:
        masked = ~attention_mask[:, None, :, None]
        offset = offset.masked_fill(masked, torch.finfo(offset.dtype).min / 2)  # finite: no 0 / 0
        value = value.masked_fill(masked, 0)
    folded_value = value @ weight.t().unflatten(0, (heads, -1))  # (B, heads, K, D)
    folded_value = torch.cat([folded_value[:, :1] + bias, folded_value[:, 1:]], dim=1)

    logits = torch.baddbmm(offset.flatten(1)[:, None], hidden_states, folded_key.flatten(1, 2).mT)  # (B, N, heads * K)
    shares = logits.unflatten(-1, (heads, -1)).softmax(-1).flatten(-2)
    return torch.bmm(shares.to(folded_value.dtype), folded_value.flatten(1, 2))


def fused_cross_attention(
    attention: nn.Module,
    hidden_states: Tensor,
    source: Tensor,
    attention_mask: Tensor | None,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """Attend by `folded_cross_attention` where it is less work, else with `weight` and `bias` as output layer."""
    if folding_pays(hidden_states.shape[1], source.shape[1], attention.heads, hidden_states.shape[-1]):
        return folded_cross_attention(attention, hidden_states, source, attention_mask, weight, bias)
    return attention(hidden_states, source, attention_mask, out=partial(F.linear, weight=weight, bias=bias))
