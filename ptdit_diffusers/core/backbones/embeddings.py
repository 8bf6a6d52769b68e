"""Inputs and output of a backbone: patches, positions, embeddings of the timestep and the picture size.

Shape letters: B batch, F H W token frames/rows/columns, N = F*H*W tokens in raster order, D width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .windows import Triple


class Embedder(nn.Module):
    """Two linear layers with an activation between; embeds timestep, picture size and text."""

    def __init__(self, in_dim: int, dim: int, activation: nn.Module, operations: Any, device: Any, dtype: Any):
        super().__init__()
        self.linear_1 = operations.Linear(in_dim, dim, device=device, dtype=dtype)
        self.activation = activation
        self.linear_2 = operations.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, values: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(values)))


class Conditions(nn.Module):
    """Embed the timestep and, with `additional`, the picture's resolution and aspect ratio: (B, D)."""

    def __init__(self, dim: int, additional: bool, operations: Any, device: Any, dtype: Any):
        super().__init__()
        factory = {"operations": operations, "device": device, "dtype": dtype}
        self.timestep_embedder = Embedder(256, dim, nn.SiLU(), **factory)
        self.additional = additional
        if additional:
            self.resolution_embedder = Embedder(256, dim // 3, nn.SiLU(), **factory)
            self.aspect_ratio_embedder = Embedder(256, dim // 3, nn.SiLU(), **factory)

    def forward(
        self,
        timestep: Tensor,
        resolution: Tensor | None,
        aspect_ratio: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        embedded = self.timestep_embedder(timestep_sinusoid(timestep).to(dtype))  # (B, D)
        if not self.additional:
            return embedded
        size = self.resolution_embedder(timestep_sinusoid(resolution).to(dtype)).flatten(1)  # (B, 2D/3)
        aspect = self.aspect_ratio_embedder(timestep_sinusoid(aspect_ratio).to(dtype)).flatten(1)  # (B, D/3)
        return embedded + torch.cat([size, aspect], dim=1)


class AdaLayerNormSingle(nn.Module):
    """Modulation that all blocks share (PixArt's adaLN-single): the embedding (B, D) and its six rows (B, 6, D)."""

    def __init__(self, dim: int, additional: bool, operations: Any, device: Any, dtype: Any):
        super().__init__()
        self.emb = Conditions(dim, additional, operations, device, dtype)
        self.linear = operations.Linear(dim, 6 * dim, device=device, dtype=dtype)

    def forward(self, *conditions: Any) -> tuple[Tensor, Tensor]:
        embedded = self.emb(*conditions)
        return embedded, self.linear(F.silu(embedded)).unflatten(1, (6, -1))


class PatchEmbed(nn.Module):
    """Embed patches of p x p latent pixels, frame by frame, as tokens: (B, C, F, pH, pW) -> (B, N, D)."""

    def __init__(self, patch_size: int, in_channels: int, dim: int, operations: Any, device: Any, dtype: Any):
        super().__init__()
        self.proj = operations.Conv2d(
            in_channels, dim, kernel_size=patch_size, stride=patch_size, device=device, dtype=dtype
        )

    def forward(self, latents: Tensor) -> Tensor:
        frames = latents.shape[2]
        pictures = latents.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        tokens = self.proj(pictures).flatten(2).mT  # (B*F, H*W, D); not a copy, since memory is channels-last
        return tokens.contiguous().unflatten(0, (-1, frames)).flatten(1, 2)


def unpatchify(patches: Tensor, grid: Triple, patch_size: int) -> Tensor:
    """Undo the cut into patches: (B, N, p*p*C) -> (B, C, F, pH, pW).

    The last axis of `patches` is (row in patch, column in patch, channel), channel fastest.
    """
    patches = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid)  # (B, F, H, W, p, p, C)
    return patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def frequencies(count: int, device: torch.device) -> Tensor:
    """Return 10000^(-k/count) for k = 0..count-1, float32."""
    return torch.exp(torch.arange(count, dtype=torch.float32, device=device) * (-math.log(10000.0) / count))


def timestep_sinusoid(values: Tensor) -> Tensor:
    """Return 128 cosines, then 128 sines, of unscaled numbers (timesteps: 0..1000): (...) -> (..., 256), float32."""
    angles = values.float()[..., None] * frequencies(128, values.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(grid: Triple, dim: int, scale: int, scrambled: bool, device: torch.device) -> Tensor:
    """Return absolute sin-cos positions [time D/4 | column 3D/8 | row 3D/8] of a token grid.

    Args:
        grid: token frames, rows, columns.
        dim: width D, a multiple of 16.
        scale: rows and columns are divided by it (frames are not).
        scrambled: give token i of a frame the column `i mod rows` and the row `i div rows`, as the official code does
            by mistake. Square grids are the same either way.
        device: where to compute.

    Returns:
        float32 tensor (N, D).
    """
    frames, rows, columns = grid
    index = torch.arange(rows * columns, device=device)
    run = rows if scrambled else columns
    column, row = (index % run).float() / scale, index.div(run, rounding_mode="floor").float() / scale
    parts = []
    for position, width in (
        (torch.arange(frames, device=device).float(), dim // 4),
        (column, 3 * dim // 8),
        (row, 3 * dim // 8),
    ):
        angles = position[:, None] * frequencies(width // 2, device)
        parts.append(torch.cat([angles.sin(), angles.cos()], dim=-1))
    time, column, row = parts
    space = torch.cat([column, row], dim=-1)  # (H*W, 3D/4)
    table = torch.cat([time[:, None].expand(-1, rows * columns, -1), space[None].expand(frames, -1, -1)], dim=-1)
    return table.flatten(0, 1)
