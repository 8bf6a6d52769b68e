"""DiffiT (arXiv 2312.02139): time-dependent attention with relative positions, its block, and the latent model.

Names of layers are those of the official checkpoints. `operations` and `attention` are as in `dit.py`, where patches,
positions and the embeddings of time and class come from.
Shape letters: B batch, N tokens in raster order, D width, S tokens of one window, E width of the condition.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .diffit_parameters import DiffiTParameters
from .dit import DiTBackbone, Mlp
from .embeddings import unpatchify
from .layers import MultiHeadAttention, layer_norm, scaled_dot_product
from .windows import Windows

INDEX_BUFFER = "relative_position_index"  # in official files; here it is computed


class Cut(NamedTuple):
    """How attention cuts a token grid.

    Attributes:
        windows: the windows; None if the whole grid is one.
        indexes: rows of the bias table for each window shape, int64 (S, S), [query, key].
    """

    windows: Windows | None
    indexes: list[Tensor]


def relative_index(rows: int, columns: int, window: int, device: torch.device | None = None) -> Tensor:
    """Return which row of a bias table belongs to each pair of tokens: int64 (S, S), [query, key].

    Row (dr + window - 1) * (2 window - 1) + dc + window - 1 is for a query dr rows below and dc columns right of the
    key.

    Args:
        rows, columns: tokens of this window, at most `window` each.
        window: tokens per side that the table was made for.
        device: where to compute.
    """
    row, column = (torch.arange(length, device=device) for length in (rows, columns))
    down = (row[:, None] - row + window - 1)[:, None, :, None]  # (query row, 1, key row, 1)
    right = (column[:, None] - column + window - 1)[None, :, None, :]  # (1, query column, 1, key column)
    return (down * (2 * window - 1) + right).flatten(2).flatten(0, 1)


def check_index(name: str, stored: Tensor, window: int) -> None:
    """Check the index buffer of a file, which must be the formula's.

    Args:
        name: its name, for the message.
        stored: the buffer.
        window: tokens per side of its bias table.

    Raises:
        ValueError: it is another one.
    """
    expected = relative_index(window, window, window, torch.device("cpu"))
    if stored.is_meta:
        return
    if stored.shape != expected.shape or not torch.equal(stored.to("cpu", torch.long), expected):
        raise ValueError(
            f"{name} is not the index of a window of {window} x {window} tokens, so the bias of positions would be "
            "read from wrong places."
        )


def cut_grid(rows: int, columns: int, window: int, shifted: bool = False, device: torch.device | None = None) -> Cut:
    """Cut a token grid into windows of `window` tokens per side; those at the borders may be smaller."""
    if rows == columns == window and not shifted:
        return Cut(None, [relative_index(rows, columns, window, device)])
    windows = Windows((1, rows, columns), (1, window, window), shifted, device)
    return Cut(windows, [relative_index(*shape[1:], window, device) for shape in windows.shapes])


class DiffiTAttention(MultiHeadAttention):
    """Multi-head attention whose queries, keys and values each have a time part, with a bias of relative positions.

    The bias is gathered from its table in every call, for one window shape at a time: for 512 px it has 67 MB in
    float32, and this way one block has it at a time.

    Args:
        dim: width D.
        heads: number of heads; D / heads is the head width.
        window: tokens per side that the bias table is for.
        condition_dim: width E of the condition.
        attention: callable like `scaled_dot_product`; it gets the bias (1, heads, S, S) as its mask.
        operations, device, dtype: layer classes, and where and in which format weights are made.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int,
        condition_dim: int,
        attention: Callable,
        operations: Any,
        device: Any,
        dtype: Any,
    ):
        super().__init__(heads, attention)
        self.window = window
        table = torch.empty((2 * window - 1) ** 2, heads, device=device, dtype=dtype)
        self.relative_position_bias_table = nn.Parameter(table)
        self.qkv = operations.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.qkv_temb = operations.Linear(condition_dim, 3 * dim, device=device, dtype=dtype)
        self.proj = operations.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, hidden_states: Tensor, condition: Tensor, cut: Cut) -> Tensor:
        """Attend among the tokens of each window.

        Args:
            hidden_states: (B, N, D), partitioned by the windows of the cut.
            condition: (B, E).
            cut: as `cut_grid` returns it.

        Returns:
            (B, N, D).
        """
        return self.attend(self.attention, hidden_states, condition, cut)

    def attend(self, attention: Callable, hidden_states: Tensor, condition: Tensor, cut: Cut) -> Tensor:
        """Do the same as `forward` with any `attention` callable; hosts call it from their own `forward`."""
        query, key, value = (t.unflatten(-1, (self.heads, -1)) for t in self.project(hidden_states, condition))
        if cut.windows is None:
            hidden_states = attention(query, key, value, self.bias(cut.indexes[0], query))
        else:
            hidden_states = cut.windows.attend(
                attention, query, key, value, lambda group: self.bias(cut.indexes[group], query)
            )
        return self.output(hidden_states.flatten(2))

    def project(self, hidden_states: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, N, D) of tokens (B, N, D) and condition (B, E)."""
        return (self.qkv(hidden_states) + self.qkv_temb(condition)[:, None]).chunk(3, dim=-1)

    def output(self, hidden_states: Tensor) -> Tensor:
        """Apply the last layer: (B, N, D)."""
        return self.proj(hidden_states)

    def bias(self, index: Tensor, like: Tensor) -> Tensor:
        """Return what is added to the logits, (1, heads, S, S), on the device and in the dtype of `like`."""
        table = self.relative_position_bias_table.to(like.device, like.dtype)
        return table.t().index_select(1, index.flatten()).unflatten(1, index.shape)[None]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        stored = state_dict.pop(f"{prefix}{INDEX_BUFFER}", None)
        if stored is not None:
            check_index(f"{prefix}{INDEX_BUFFER}", stored, self.window)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class DiffiTBlock(nn.Module):
    """Attention and feed-forward after norms without weights; only the attention knows time and class.

    Args:
        dim: width D.
        attention_layer: makes the attention.
        operations, device, dtype: layer classes, and where and in which format weights are made.
    """

    def __init__(self, dim: int, attention_layer: Callable, operations: Any, device: Any, dtype: Any):
        super().__init__()
        self.attn = attention_layer()
        self.mlp = Mlp(dim, operations, device, dtype)

    def forward(self, hidden_states: Tensor, condition: Tensor, cut: Cut) -> Tensor:
        """Return the new tokens (B, N, D) from tokens in raster order and condition (B, E)."""
        inner = layer_norm(hidden_states)
        if cut.windows is None:
            inner = self.attn(inner, condition, cut)
        else:
            inner = cut.windows.restore(self.attn(cut.windows.partition(inner), condition, cut))
        hidden_states = hidden_states + inner
        return hidden_states + self.mlp(layer_norm(hidden_states))


class DiffiTFinalLayer(nn.Module):
    """Norm, SiLU, then a linear layer to patches: (B, N, D) -> (B, N, p*p*C). It has no condition."""

    def __init__(self, dim: int, out_dim: int, operations: Any, device: Any, dtype: Any):
        super().__init__()
        self.linear = operations.Linear(dim, out_dim, device=device, dtype=dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear(F.silu(layer_norm(hidden_states)))


class DiffiTBackbone(DiTBackbone):
    """The latent model without the conventions of a host: a host calls `build` in its constructor, then `predict`.

    Index buffers of official files are compared with the formula when weights are loaded, and not kept.
    """

    def build(
        self,
        parameters: DiffiTParameters,
        operations: Any = nn,
        attention: Callable = scaled_dot_product,
        attention_class: type[DiffiTAttention] = DiffiTAttention,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the layers under the official checkpoint's names; see `DiTBackbone.build`."""
        dim, layers = parameters.dim, {"operations": operations, "device": device, "dtype": dtype}
        self.window, self.shift_window, self.is_global = (
            parameters.window,
            parameters.shift_window,
            parameters.is_global,
        )

        def attention_layer() -> DiffiTAttention:
            return attention_class(dim, parameters.num_attention_heads, self.window, dim, attention, **layers)

        self.build_inputs(parameters, **layers)
        blocks = (DiffiTBlock(dim, attention_layer, **layers) for _ in range(parameters.num_layers))
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = DiffiTFinalLayer(dim, self.patch_size**2 * self.out_channels, **layers)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Give weights the initial values of the official model, which predicts exactly 0.

        They are those of `DiTBackbone.initialize_common`; bias tables are N(0, 0.02), cut off at 2 (the default of
        `trunc_normal_`).
        """
        self.initialize_common()
        for block in self.blocks:
            nn.init.trunc_normal_(block.attn.relative_position_bias_table, std=0.02)

    def check_size(self, height: int, width: int) -> None:
        """Check a size of latents: with one window for the whole grid only the trained size is legal.

        Raises:
            ValueError: the network does not take it; names the nearest that it takes.
        """
        super().check_size(height, width)
        if self.is_global and (height, width) != (self.sample_size, self.sample_size):
            side = self.sample_size
            raise ValueError(
                f"latents of {height} x {width} must be {side} x {side}: the bias of positions was trained for this "
                f"size only; nearest: {side} x {side}."
            )

    def predict(self, latents: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Predict the noise and, with learned variance, the interpolation between its bounds.

        Args:
            latents: (B, C, height, width), of a size that `check_size` takes.
            timestep: (B,) or (1,) in 0..999, as trained: neither divided nor the index of a shorter schedule.
            class_labels: int64 (B,); `num_classes` is the null class.

        Returns:
            (B, out channels, height, width).
        """
        rows, columns = (size // self.patch_size for size in latents.shape[2:])
        hidden_states, time, label = self.embed(latents, timestep, class_labels)
        condition = time + label  # (B, D); no activation, unlike DiT
        cuts = [cut_grid(rows, columns, self.window, False, latents.device)]
        if self.shift_window:
            cuts.append(cut_grid(rows, columns, self.window, True, latents.device))
        for number, block in enumerate(self.blocks):
            hidden_states = self.run_block(block, hidden_states, condition, cuts[number % len(cuts)])
        patches = self.final_layer(hidden_states)  # (B, N, p*p*C)
        return unpatchify(patches, (1, rows, columns), self.patch_size)[:, :, 0]  # (B, C, height, width)
