"""What goes into PT-DiT: patches, and the timestep with its fellow conditions. Plain torch, layers from `operations`.

Shape letters as in `ptdit_backbone`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .ptdit_grid import timestep_sinusoid


class Embedder(nn.Module):
    """Two linear layers with an activation between: time, size and caption embedding."""

    def __init__(self, in_dim: int, dim: int, activation: nn.Module, operations: Any, device: Any, dtype: Any):
        super().__init__()
        self.linear_1 = operations.Linear(in_dim, dim, device=device, dtype=dtype)
        self.activation = activation
        self.linear_2 = operations.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.activation(self.linear_1(values)))


class Conditions(nn.Module):
    """Embeds the timestep and, in models that were built for it, the picture's size and aspect ratio."""

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
        timestep: torch.Tensor,
        resolution: torch.Tensor | None,
        aspect_ratio: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        embedded = self.timestep_embedder(timestep_sinusoid(timestep).to(dtype))  # (B, D)
        if not self.additional:
            return embedded
        size = self.resolution_embedder(timestep_sinusoid(resolution).to(dtype)).flatten(1)  # (B, 2D/3)
        aspect = self.aspect_ratio_embedder(timestep_sinusoid(aspect_ratio).to(dtype)).flatten(1)  # (B, D/3)
        return embedded + torch.cat([size, aspect], dim=1)


class AdaLayerNormSingle(nn.Module):
    """One modulation for all blocks (PixArt's adaLN-single): the embedding (B, D) and its six rows (B, 6, D)."""

    def __init__(self, dim: int, additional: bool, operations: Any, device: Any, dtype: Any):
        super().__init__()
        self.emb = Conditions(dim, additional, operations, device, dtype)
        self.linear = operations.Linear(dim, 6 * dim, device=device, dtype=dtype)

    def forward(self, *conditions: Any) -> tuple[torch.Tensor, torch.Tensor]:
        embedded = self.emb(*conditions)
        return embedded, self.linear(F.silu(embedded)).unflatten(1, (6, -1))


class PatchEmbed(nn.Module):
    """Patches of p x p latent pixels, frame by frame, to tokens: (B, C, F, pH, pW) -> (B, N, D)."""

    def __init__(self, patch_size: int, in_channels: int, dim: int, operations: Any, device: Any, dtype: Any):
        super().__init__()
        self.proj = operations.Conv2d(
            in_channels, dim, kernel_size=patch_size, stride=patch_size, device=device, dtype=dtype
        )

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        frames = latents.shape[2]
        pictures = latents.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        tokens = self.proj(pictures).flatten(2).mT  # (B*F, H*W, D); channels come last already, so nothing is copied
        return tokens.contiguous().unflatten(0, (-1, frames)).flatten(1, 2)
