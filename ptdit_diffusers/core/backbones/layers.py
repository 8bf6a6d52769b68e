"""Layers that transformer backbones share: norms, attention, feed-forward.

`operations` is a namespace with Linear and Conv2d, `attention` a callable like `scaled_dot_product`: each host builds
the same network with its own. Shape letters: B batch, N tokens, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .windows import Windows


def scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with (B, tokens, heads, head_dim) tensors; `mask` is bool (B, 1, 1, keys), True = keep, or None."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def layer_norm(hidden_states: Tensor) -> Tensor:
    """Apply LayerNorm without weights, eps 1e-6."""
    return F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=1e-6)


def modulated_norm(hidden_states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply LayerNorm to (B, N, D), multiply by 1 + scale and add shift, both (B or 1, 1, D).

    With one shift and scale for all samples this is one pass over the tokens.
    """
    if len(shift) == 1:
        return F.layer_norm(hidden_states, hidden_states.shape[-1:], 1 + scale[0, 0], shift[0, 0], eps=1e-6)
    return torch.addcmul(shift, layer_norm(hidden_states), 1 + scale)


class MultiHeadAttention(nn.Module):
    """Multi-head attention over all tokens or inside windows; subclasses have the layers before and after it.

    Args:
        heads: number of heads.
        attention: callable like `scaled_dot_product`.
    """

    def __init__(self, heads: int, attention: Callable):
        super().__init__()
        self.heads = heads
        self.attention = attention

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        windows: Windows | None = None,
        out: Callable | None = None,
    ) -> Tensor:
        """Attend from `hidden_states` to `encoder_hidden_states`, or to themselves.

        Args:
            hidden_states: (B, N, D).
            encoder_hidden_states: (B, keys, D); None for self-attention.
            attention_mask: bool (B, keys), True = keep; None if all are kept.
            windows: tokens are partitioned by these windows, and each sees its own window only.
            out: used in place of the output layer.

        Returns:
            (B, N, D).
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
        """Do the same as `forward` with any `attention` callable; hosts call it from their own `forward`."""
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)) for t in self.project(hidden_states, encoder_hidden_states)
        )
        if windows is None:
            mask = None if attention_mask is None else attention_mask[:, None, None]
            hidden_states = attention(query, key, value, mask)  # (B, N, heads, head_dim)
        else:
            hidden_states = windows.attend(attention, query, key, value)
        hidden_states = hidden_states.flatten(2)  # (B, N, D)
        return self.output(hidden_states) if out is None else out(hidden_states)

    def project(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, N, D), keys and values (B, keys, D)."""
        raise NotImplementedError

    def output(self, hidden_states: Tensor) -> Tensor:
        """Apply the last layer: (B, N, D)."""
        raise NotImplementedError


class Attention(MultiHeadAttention):
    """Multi-head attention with one linear layer, with bias, each for queries, keys and values.

    Args:
        dim: width D.
        heads: number of heads; D / heads is the head width.
        attention: callable like `scaled_dot_product`.
        operations, device, dtype: layer classes, and where and in which format weights are made.
    """

    def __init__(self, dim: int, heads: int, attention: Callable, operations: Any, device: Any, dtype: Any):
        super().__init__(heads, attention)
        self.to_q = operations.Linear(dim, dim, device=device, dtype=dtype)
        self.to_k = operations.Linear(dim, dim, device=device, dtype=dtype)
        self.to_v = operations.Linear(dim, dim, device=device, dtype=dtype)
        self.to_out = nn.ModuleList([operations.Linear(dim, dim, device=device, dtype=dtype), nn.Dropout(0.0)])

    def project(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, N, D), keys and values (B, keys, D)."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        return self.to_q(hidden_states), self.to_k(source), self.to_v(source)

    def output(self, hidden_states: Tensor) -> Tensor:
        """Apply the last layer: (B, N, D)."""
        return self.to_out[1](self.to_out[0](hidden_states))


class GELUProjection(nn.Module):
    """Linear, then GELU (tanh): the first layer of the feed-forward, under the key that checkpoints use.

    Without gradients GELU works in place: allocating a second tensor of this size costs a CPU more time than GELU.
    """

    def __init__(self, dim: int, inner: int, operations: Any, device: Any, dtype: Any):
        super().__init__()
        self.proj = operations.Linear(dim, inner, device=device, dtype=dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gelu = F.gelu if torch.is_grad_enabled() else torch.ops.aten.gelu_
        return gelu(self.proj(hidden_states), approximate="tanh")


class FeedForward(nn.Module):
    """Two linear layers, D -> 4D -> D, with GELU (tanh) between."""

    def __init__(self, dim: int, operations: Any, device: Any, dtype: Any):
        super().__init__()
        first = GELUProjection(dim, 4 * dim, operations, device, dtype)
        self.net = nn.ModuleList([first, nn.Dropout(0.0), operations.Linear(4 * dim, dim, device=device, dtype=dtype)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.net:
            hidden_states = layer(hidden_states)
        return hidden_states
