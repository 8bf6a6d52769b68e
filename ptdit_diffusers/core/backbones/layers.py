"""Layers that backbones are made of: norms, attention, feed-forward. Plain torch.

Layers come from `operations` (a namespace with Linear and Conv2d), attention from one callable, so that every host
builds the same network with its own layers. Shape letters: B batch, N tokens, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .windows import Windows


def scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attends with (B, tokens, heads, head_dim) tensors; `mask` is bool (B, 1, 1, keys), True = keep, or None."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def layer_norm(hidden_states: Tensor) -> Tensor:
    """LayerNorm without parameters, eps 1e-6: the only norm of the model."""
    return F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=1e-6)


def modulated_norm(hidden_states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm of (B, N, D), times 1 + scale, plus shift; one of each for all samples is one pass over the tokens."""
    if len(shift) == 1:
        return F.layer_norm(hidden_states, hidden_states.shape[-1:], 1 + scale[0, 0], shift[0, 0], eps=1e-6)
    return torch.addcmul(shift, layer_norm(hidden_states), 1 + scale)


class Attention(nn.Module):
    """Multi-head attention with biases, plain or inside windows.

    Args:
        dim: width D.
        heads: number of heads; D / heads is the head width.
        attention: callable as `scaled_dot_product`.
        operations, device, dtype: how layers are built.
    """

    def __init__(self, dim: int, heads: int, attention: Callable, operations: Any, device: Any, dtype: Any):
        super().__init__()
        self.heads = heads
        self.attention = attention
        self.to_q = operations.Linear(dim, dim, device=device, dtype=dtype)
        self.to_k = operations.Linear(dim, dim, device=device, dtype=dtype)
        self.to_v = operations.Linear(dim, dim, device=device, dtype=dtype)
        self.to_out = nn.ModuleList([operations.Linear(dim, dim, device=device, dtype=dtype), nn.Dropout(0.0)])

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        windows: Windows | None = None,
        out: Callable | None = None,
    ) -> Tensor:
        """Queries of `hidden_states` (B, N, D) over `encoder_hidden_states` (B, keys, D), or over themselves.

        `attention_mask` is bool (B, keys), True = keep. With `windows`, tokens come partitioned and see their window.
        `out` replaces the output layer.
        """
        return self.attend(self.attention, hidden_states, encoder_hidden_states, attention_mask, windows, out)

    def attend(
        self,
        attention: Callable,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        windows: Windows | None,
        out: Callable | None,
    ) -> Tensor:
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)) for t in self.project(hidden_states, encoder_hidden_states)
        )
        if windows is None:
            mask = None if attention_mask is None else attention_mask[:, None, None]
            hidden_states = attention(query, key, value, mask)  # (B, N, heads, head_dim)
        else:
            hidden_states = windows.attend(attention, query, key, value)
        hidden_states = hidden_states.flatten(2)  # (B, N, D)
        return self.to_out[1](self.to_out[0](hidden_states)) if out is None else out(hidden_states)

    def project(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        return self.to_q(hidden_states), self.to_k(source), self.to_v(source)


class GELUProjection(nn.Module):
    """Linear, then GELU (tanh): the first layer of the feed-forward, under the key that checkpoints use.

    Without gradients in place: a second tensor of this size costs a CPU more to allocate than to compute.
    """

    def __init__(self, dim: int, inner: int, operations: Any, device: Any, dtype: Any):
        super().__init__()
        self.proj = operations.Linear(dim, inner, device=device, dtype=dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gelu = F.gelu if torch.is_grad_enabled() else torch.ops.aten.gelu_
        return gelu(self.proj(hidden_states), approximate="tanh")


class FeedForward(nn.Module):
    """D -> 4D -> D with GELU (tanh)."""

    def __init__(self, dim: int, operations: Any, device: Any, dtype: Any):
        super().__init__()
        first = GELUProjection(dim, 4 * dim, operations, device, dtype)
        self.net = nn.ModuleList([first, nn.Dropout(0.0), operations.Linear(4 * dim, dim, device=device, dtype=dtype)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.net:
            hidden_states = layer(hidden_states)
        return hidden_states
