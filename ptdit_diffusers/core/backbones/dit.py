"""DiT (arXiv 2212.09748): the four kinds of blocks and the whole network.

Names of layers are those of the official checkpoints. `operations` is a namespace with Linear, Conv2d, Embedding and
LayerNorm, `attention` a callable like `scaled_dot_product`: each host builds the same network with its own.
Shape letters: B batch, H W token rows/columns, N = H*W tokens in raster order, D width, C latent channels.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dit_parameters import ADAPTIVE, ClassParameters, DiTParameters, check_multiple
from .embeddings import PatchEmbed, timestep_sinusoid, unpatchify
from .layers import MultiHeadAttention, modulated_norm, scaled_dot_product

TABLE_TOLERANCE = 1e-3  # of a stored position table: averages over training move it by 2e-4


# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------


def grid_positions(rows: int, columns: int, dim: int) -> Tensor:
    """Return sin-cos positions [sin column | cos column | sin row | cos row], D/4 each, of a token grid.

    Positions are indices whatever the size. They are formed in float64 on the CPU: float32 loses the last digits.

    Returns:
        float32 tensor (N, D) on the CPU.
    """
    count = dim // 4
    exponents = torch.arange(count, dtype=torch.float64, device="cpu") / count
    frequencies = 1.0 / 10000.0**exponents

    def along(length: int) -> Tensor:
        angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()

    column = along(columns)[None].expand(rows, -1, -1)
    row = along(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1)


class TimestepEmbedder(nn.Module):
    """Embed timesteps: (B,) in 0..1000, fractional or not, -> (B, D)."""

    def __init__(self, dim: int, operations: Any, device: Any, dtype: Any):
        super().__init__()
        first = operations.Linear(256, dim, device=device, dtype=dtype)
        self.mlp = nn.Sequential(first, nn.SiLU(), operations.Linear(dim, dim, device=device, dtype=dtype))

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(timestep_sinusoid(timestep).to(dtype))


class ClassEmbedder(nn.Module):
    """Embed class labels: int64 (B,) -> (B, D). The row after the last class is the null class.

    In training a label becomes the null class with probability `dropout`: one random number per label and forward.
    """

    def __init__(self, num_classes: int, dropout: float, dim: int, operations: Any, device: Any, dtype: Any):
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        rows = num_classes + (dropout > 0)
        self.embedding_table = operations.Embedding(rows, dim, device=device, dtype=dtype)

    def forward(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        if self.training and self.dropout > 0:
            dropped = torch.rand(len(labels), device=labels.device) < self.dropout
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------


class DiTAttention(MultiHeadAttention):
    """Multi-head attention with queries, keys and values of one linear layer; cross-attention has one for queries.

    Args:
        dim: width D.
        heads: number of heads; D / heads is the head width.
        attention: callable like `scaled_dot_product`.
        operations, device, dtype: layer classes, and where and in which format weights are made.
        is_cross_attention: queries of the tokens, keys and values of `encoder_hidden_states`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        attention: Callable,
        operations: Any,
        device: Any,
        dtype: Any,
        is_cross_attention: bool = False,
    ):
        super().__init__(heads, attention)
        self.is_cross_attention = is_cross_attention
        if is_cross_attention:
            self.q = operations.Linear(dim, dim, device=device, dtype=dtype)
            self.kv = operations.Linear(dim, 2 * dim, device=device, dtype=dtype)
        else:
            self.qkv = operations.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.proj = operations.Linear(dim, dim, device=device, dtype=dtype)

    def project(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, N, D), keys and values (B, keys, D)."""
        if self.is_cross_attention:
            return self.q(hidden_states), *self.kv(encoder_hidden_states).chunk(2, dim=-1)
        return self.qkv(hidden_states).chunk(3, dim=-1)

    def output(self, hidden_states: Tensor) -> Tensor:
        """Apply the last layer: (B, N, D)."""
        return self.proj(hidden_states)


class Mlp(nn.Module):
    """D -> 4D -> D with GELU (tanh)."""

    def __init__(self, dim: int, operations: Any, device: Any, dtype: Any):
        super().__init__()
        self.fc1 = operations.Linear(dim, 4 * dim, device=device, dtype=dtype)
        self.fc2 = operations.Linear(4 * dim, dim, device=device, dtype=dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gelu = F.gelu if torch.is_grad_enabled() else torch.ops.aten.gelu_  # in place: no second tensor of this size
        return self.fc2(gelu(self.fc1(hidden_states), approximate="tanh"))


def modulation(dim: int, rows: int, operations: Any, device: Any, dtype: Any) -> nn.Sequential:
    """Return the layers from a condition (B, D) to `rows` shifts, scales and gates, (B, rows * D)."""
    return nn.Sequential(nn.SiLU(), operations.Linear(dim, rows * dim, device=device, dtype=dtype))


class DiTBlock(nn.Module):
    """Block with modulated norms: adaLN-Zero, or without gates plain adaLN.

    The rows of plain adaLN, which has no official code, are [shift, scale] of the attention, then of the feed-forward.
    """

    def __init__(self, dim: int, gated: bool, attention_layer: Callable, operations: Any, device: Any, dtype: Any):
        super().__init__()
        self.gated = gated
        self.attn = attention_layer()
        self.mlp = Mlp(dim, operations, device, dtype)
        self.adaLN_modulation = modulation(dim, 6 if gated else 4, operations, device, dtype)

    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
        """Return the new tokens (B, N, D) from tokens and condition (B, D)."""
        rows = self.adaLN_modulation(condition)[:, None].chunk(6 if self.gated else 4, dim=-1)  # (B, 1, D) each
        if not self.gated:
            shift1, scale1, shift2, scale2 = rows
            hidden_states = hidden_states + self.attn(modulated_norm(hidden_states, shift1, scale1))
            return hidden_states + self.mlp(modulated_norm(hidden_states, shift2, scale2))
        shift1, scale1, gate1, shift2, scale2, gate2 = rows
        inner = self.attn(modulated_norm(hidden_states, shift1, scale1))
        hidden_states = torch.addcmul(hidden_states, gate1, inner)
        inner = self.mlp(modulated_norm(hidden_states, shift2, scale2))
        return torch.addcmul(hidden_states, gate2, inner)


class DiTTokenBlock(nn.Module):
    """Block of a plain vision transformer; conditions are tokens, either among the others or in a cross-attention.

    There is no official code of these blocks. Our choices where the paper is open: the two tokens are [time, class],
    without positions and without a norm of their own; norms have eps 1e-6; the cross-attention has as many heads as
    the self-attention.
    """

    def __init__(self, dim: int, cross: bool, attention_layer: Callable, operations: Any, device: Any, dtype: Any):
        super().__init__()
        norm = {"eps": 1e-6, "device": device, "dtype": dtype}
        self.cross = cross
        self.norm1 = operations.LayerNorm(dim, **norm)
        self.attn = attention_layer()
        if cross:
            self.norm_cross = operations.LayerNorm(dim, **norm)
            self.cross_attn = attention_layer(is_cross_attention=True)
        self.norm2 = operations.LayerNorm(dim, **norm)
        self.mlp = Mlp(dim, operations, device, dtype)

    def forward(self, hidden_states: Tensor, condition: Tensor | None) -> Tensor:
        """Return the new tokens (B, N, D) from tokens and, with cross-attention, conditions (B, 2, D)."""
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
        if self.cross:
            hidden_states = hidden_states + self.cross_attn(self.norm_cross(hidden_states), condition)
        return hidden_states + self.mlp(self.norm2(hidden_states))


class FinalLayer(nn.Module):
    """Norm, modulated by the condition where the blocks are, then a linear layer to patches: (B, N, p*p*C)."""

    def __init__(self, dim: int, out_dim: int, adaptive: bool, operations: Any, device: Any, dtype: Any):
        super().__init__()
        self.adaptive = adaptive
        if adaptive:
            self.adaLN_modulation = modulation(dim, 2, operations, device, dtype)
        else:
            self.norm_final = operations.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)
        self.linear = operations.Linear(dim, out_dim, device=device, dtype=dtype)

    def forward(self, hidden_states: Tensor, condition: Tensor | None) -> Tensor:
        if not self.adaptive:
            return self.linear(self.norm_final(hidden_states))
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(modulated_norm(hidden_states, shift, scale))


# ---------------------------------------------------------------------------------------------------------------------
# Backbone
# ---------------------------------------------------------------------------------------------------------------------


class DiTBackbone(nn.Module):
    """The network without the conventions of a host: a host calls `build` in its constructor, then `predict`.

    The position table `pos_embed` is a buffer, so that state dicts have the official names. A stored table is compared
    with the formula, and the formula is used.
    """

    def build(
        self,
        parameters: DiTParameters,
        operations: Any = nn,
        attention: Callable = scaled_dot_product,
        attention_class: type[DiTAttention] = DiTAttention,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the layers under the official checkpoint's names.

        Args:
            parameters: sizes and settings.
            operations: namespace with the classes Linear, Conv2d, Embedding and LayerNorm.
            attention: callable like `scaled_dot_product`.
            attention_class: module around it.
            device, dtype: where and in which format weights are made.
        """
        dim, adaptive = parameters.dim, parameters.block_type in ADAPTIVE
        self.block_type = parameters.block_type
        layers = {"operations": operations, "device": device, "dtype": dtype}

        def attention_layer(is_cross_attention: bool = False) -> DiTAttention:
            heads = parameters.num_attention_heads
            return attention_class(dim, heads, attention, **layers, is_cross_attention=is_cross_attention)

        def block() -> nn.Module:
            if adaptive:
                return DiTBlock(dim, self.block_type == "adaln_zero", attention_layer, **layers)
            return DiTTokenBlock(dim, self.block_type == "cross_attention", attention_layer, **layers)

        self.build_inputs(parameters, **layers)
        self.blocks = nn.ModuleList(block() for _ in range(parameters.num_layers))
        self.final_layer = FinalLayer(dim, self.patch_size**2 * self.out_channels, adaptive, **layers)

    def build_inputs(self, parameters: ClassParameters, operations: Any, device: Any, dtype: Any) -> None:
        """Create the layers before the blocks, and the position table."""
        dim, layers = parameters.dim, {"operations": operations, "device": device, "dtype": dtype}
        self.patch_size, self.sample_size = parameters.patch_size, parameters.sample_size
        self.in_channels, self.out_channels = parameters.in_channels, parameters.out_channels
        self.num_classes = parameters.num_classes
        self.x_embedder = PatchEmbed(self.patch_size, self.in_channels, dim, **layers)
        self.t_embedder = TimestepEmbedder(dim, **layers)
        self.y_embedder = ClassEmbedder(self.num_classes, parameters.class_dropout_prob, dim, **layers)
        side = parameters.grid_side
        self.register_buffer("pos_embed", grid_positions(side, side, dim)[None].to(device))

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Give weights the initial values of the official model, which predicts exactly 0.

        | weights | value |
        | --- | --- |
        | class table, both linear layers of the timestep embedding | N(0, 0.02) |
        | modulation of adaLN-Zero blocks and of the final layer, linear layer of the final layer | 0 |
        | all other linear layers, patches (as a linear layer) | Xavier uniform |
        | biases | 0 |
        | norms of `cross_attention` and `in_context` | 1, bias 0: torch's defaults |
        """
        self.initialize_common()
        zero = [self.final_layer.adaLN_modulation[1]] if self.block_type in ADAPTIVE else []
        if self.block_type == "adaln_zero":
            zero += [block.adaLN_modulation[1] for block in self.blocks]
        for layer in zero:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def initialize_common(self) -> None:
        """Give initial values to all linear layers (Xavier; the last one zero), patches, class and time embedding."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for layer in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def checked_positions(self, stored: Tensor | None = None) -> Tensor:
        """Return the position table (1, N, D) of the trained size by the formula, in float32 on the CPU.

        Args:
            stored: the table of a file, which must be the same up to rounding.

        Raises:
            ValueError: the table is for another size, or is another one.
        """
        side, dim = self.sample_size // self.patch_size, self.pos_embed.shape[-1]
        table = grid_positions(side, side, dim)[None]
        if stored is None or stored.is_meta:
            return table
        if stored.shape != table.shape:
            raise ValueError(
                f"pos_embed has shape {tuple(stored.shape)}, must be {tuple(table.shape)}: the weights are for "
                f"another size than sample_size={self.sample_size}."
            )
        difference = (stored.detach().to("cpu", torch.float32) - table).abs().max().item()
        allowed = max(TABLE_TOLERANCE, torch.finfo(stored.dtype).eps / 2)  # bfloat16 rounds values near 1 by 2e-3
        if not difference <= allowed:
            raise ValueError(
                f"pos_embed is not DiT's position table: it differs by up to {difference:.2g}, allowed are "
                f"{allowed:.1g}."
            )
        return table

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        name = f"{prefix}pos_embed"
        state_dict[name] = self.checked_positions(state_dict.get(name))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def positions(self, rows: int, columns: int) -> Tensor:
        """Return the positions (N, D) of a token grid of any size."""
        side = self.sample_size // self.patch_size
        if rows == columns == side:
            return self.pos_embed[0]
        return grid_positions(rows, columns, self.pos_embed.shape[-1])

    def check_size(self, height: int, width: int) -> None:
        """Check a size of latents.

        Raises:
            ValueError: the network does not take it; names the nearest that it takes.
        """
        check_multiple("latent height", height, self.patch_size)
        check_multiple("latent width", width, self.patch_size)

    def run_block(self, block: nn.Module, *inputs: Any) -> Tensor:
        """Call one block; hosts override it, for example for gradient checkpointing."""
        return block(*inputs)

    def embed(self, latents: Tensor, timestep: Tensor, class_labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens with positions (B, N, D), and the embedded timestep and class, (B, D) each."""
        rows, columns = (size // self.patch_size for size in latents.shape[2:])
        hidden_states = self.x_embedder(latents[:, :, None])  # (B, N, D)
        dtype = hidden_states.dtype
        hidden_states = (hidden_states + self.positions(rows, columns).to(hidden_states.device)).to(dtype)
        time = self.t_embedder(timestep, dtype).expand(len(latents), -1)
        return hidden_states, time, self.y_embedder(class_labels, dtype)

    def predict(self, latents: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Predict the noise and, with learned variance, the interpolation between its bounds.

        Args:
            latents: (B, C, height, width), height and width multiples of the patch size.
            timestep: (B,) or (1,) in 0..999, as trained: neither divided nor the index of a shorter schedule.
            class_labels: int64 (B,); `num_classes` is the null class.

        Returns:
            (B, out channels, height, width).
        """
        rows, columns = (size // self.patch_size for size in latents.shape[2:])
        hidden_states, time, label = self.embed(latents, timestep, class_labels)
        if self.block_type in ADAPTIVE:
            condition = time + label  # (B, D)
        else:
            condition = torch.stack([time, label], dim=1)  # (B, 2, D)
        if self.block_type == "in_context":
            hidden_states, condition = torch.cat([hidden_states, condition], dim=1), None  # (B, N + 2, D)
        for block in self.blocks:
            hidden_states = self.run_block(block, hidden_states, condition)
        if self.block_type == "in_context":
            hidden_states = hidden_states[:, :-2]

        patches = self.final_layer(hidden_states, condition)  # (B, N, p*p*C)
        return unpatchify(patches, (1, rows, columns), self.patch_size)[:, :, 0]  # (B, C, height, width)
