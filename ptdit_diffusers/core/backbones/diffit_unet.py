"""DiffiT's image-space model: a U-shaped network of residual cells with time-dependent attention in windows.

No code of it was released, and its paper (arXiv 2312.02139) leaves much open. So results of this network are no
reproduction of the paper's. What is whose choice:

| part | from the paper | ours |
| --- | --- | --- |
| widths 128, 256, 256(, 256); window 8 (FFHQ-64), 4 (CIFAR-10) | widths of FFHQ, windows | widths of CIFAR |
| cells per stage | prints 4 and, elsewhere, 1 to 2 | presets of both; the last stage is the bottleneck |
| cell: GroupNorm, swish, 3x3 convolution, DiffiT block, added to the input | all | 32 groups; 1x1 for new widths |
| smaller and larger maps | convolutions, once per stage | 3x3 with stride 2; nearest, then 3x3 |
| skip connections at every resolution | that they are | concatenated, one per resolution |
| head: GroupNorm, 3x3 convolution | all | starts at zero |
| time token: two layers, swish, width 512 | all | the sinusoid is that of EDM's DDPM++ |
| attention | windows, not shifted; bias of relative positions | heads of width 32 |
| classes | none | a class row is added to the time token |

Shape letters: B batch, C channels, H W rows/columns, N = H*W, E width of the time token.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .diffit import Cut, DiffiTAttention, DiffiTBlock, cut_grid
from .diffit_unet_parameters import DiffiTUNetParameters
from .dit import ClassEmbedder
from .layers import scaled_dot_product

SINUSOID = 128  # numbers that describe a noise level
FACTORY = {"operations": nn, "device": None, "dtype": None}


def noise_sinusoid(noise_level: Tensor) -> Tensor:
    """Return 64 sines, then 64 cosines, of c_noise: (B,) -> (B, 128), float32. The last frequency is 1 / 10000."""
    count = SINUSOID // 2
    exponents = torch.arange(count, dtype=torch.float32, device=noise_level.device) / (count - 1)
    angles = noise_level.float()[:, None] * (1 / 10000) ** exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimeToken(nn.Module):
    """Embed noise levels, and how pictures were augmented: (B,) and (B, A) -> (B, E)."""

    def __init__(self, dim: int, augment_dim: int):
        super().__init__()
        self.augment = nn.Linear(augment_dim, SINUSOID, bias=False) if augment_dim else None
        self.linear_1 = nn.Linear(SINUSOID, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, noise_level: Tensor, augment_labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        hidden_states = noise_sinusoid(noise_level).to(dtype)
        if self.augment is not None and augment_labels is not None:
            hidden_states = hidden_states + self.augment(augment_labels.to(dtype))
        return F.silu(self.linear_2(F.silu(self.linear_1(hidden_states))))


class DiffiTCell(nn.Module):
    """Residual cell: GroupNorm, swish, 3x3 convolution, DiffiT block; its input is added.

    Args:
        in_channels, channels: width before and after the cell.
        parameters: the other sizes.
        attention_layer: makes the attention.
    """

    def __init__(self, in_channels: int, channels: int, parameters: DiffiTUNetParameters, attention_layer: Callable):
        super().__init__()
        self.norm = nn.GroupNorm(parameters.norm_num_groups, in_channels, eps=1e-6)
        self.dropout = nn.Dropout(parameters.dropout)
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()
        self.block = DiffiTBlock(channels, attention_layer, **FACTORY)

    def forward(self, hidden_states: Tensor, condition: Tensor, cut: Cut) -> Tensor:
        """Return the new map (B, C, H, W) from a map, the condition (B, E) and the windows of this resolution."""
        inner = self.conv(self.dropout(F.silu(self.norm(hidden_states))))
        tokens = self.block(inner.flatten(2).mT, condition, cut)  # (B, N, C)
        return self.shortcut(hidden_states) + tokens.mT.unflatten(2, inner.shape[2:])


class DiffiTStage(nn.Module):
    """The cells of one resolution, on the way down or up.

    Args:
        in_channels: width before the first cell.
        number: the stage, 0 at full resolution.
        parameters: sizes.
        attention_layer: (width) -> the attention.
        down, up: whether a convolution to half the sides follows, or one to twice the sides.
    """

    def __init__(
        self,
        in_channels: int,
        number: int,
        parameters: DiffiTUNetParameters,
        attention_layer: Callable,
        down: bool = False,
        up: bool = False,
    ):
        super().__init__()
        channels = parameters.block_out_channels[number]
        widths = [in_channels] + [channels] * (parameters.layers_per_block[number] - 1)
        self.cells = nn.ModuleList(
            DiffiTCell(width, channels, parameters, lambda: attention_layer(channels)) for width in widths
        )
        self.downsample = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if down else None
        self.upsample = nn.Conv2d(channels, channels, 3, padding=1) if up else None

    def forward(self, hidden_states: Tensor, condition: Tensor, cut: Cut, run_cell: Callable) -> tuple[Tensor, Tensor]:
        """Return the map (B, C, H, W) after the cells, and that of the next stage: half or twice the sides.

        Offloading brings the weights of a stage when this is called, so nothing may call its layers one by one.
        """
        for cell in self.cells:
            hidden_states = run_cell(cell, hidden_states, condition, cut)
        if self.downsample is not None:
            return hidden_states, self.downsample(hidden_states)
        if self.upsample is None:
            return hidden_states, hidden_states
        return hidden_states, self.upsample(F.interpolate(hidden_states, scale_factor=2))


class DiffiTUNetBackbone(nn.Module):
    """The network without the conventions of a host: a host calls `build` in its constructor, then `predict`."""

    def build(
        self,
        parameters: DiffiTUNetParameters,
        attention: Callable = scaled_dot_product,
        attention_class: type[DiffiTAttention] = DiffiTAttention,
    ) -> None:
        """Create the layers.

        Args:
            parameters: sizes and settings.
            attention: callable like `scaled_dot_product`.
            attention_class: module around it.
        """
        self.parameters_of = parameters
        widths, dim = parameters.block_out_channels, parameters.time_embed_dim
        last = len(widths) - 1

        def attention_layer(width: int) -> DiffiTAttention:
            heads = width // parameters.attention_head_dim
            return attention_class(width, heads, parameters.window_size, dim, attention, **FACTORY)

        self.conv_in = nn.Conv2d(parameters.in_channels, widths[0], 3, padding=1)
        self.time_token = TimeToken(dim, parameters.augment_dim)
        if parameters.num_classes:
            self.y_embedder = ClassEmbedder(parameters.num_classes, parameters.class_dropout_prob, dim, **FACTORY)
        before = (widths[0], *widths)  # width before each stage on the way down
        self.encoder = nn.ModuleList(
            DiffiTStage(before[stage], stage, parameters, attention_layer, down=stage < last, up=stage == last > 0)
            for stage in range(last + 1)
        )
        self.decoder = nn.ModuleList(  # from the second lowest resolution up
            DiffiTStage(widths[stage + 1] + widths[stage], stage, parameters, attention_layer, up=stage > 0)
            for stage in reversed(range(last))
        )
        self.norm_out = nn.GroupNorm(parameters.norm_num_groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], parameters.in_channels, 3, padding=1)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Give weights initial values (ours, after the latent model and EDM's DDPM++).

        | weights | value |
        | --- | --- |
        | convolutions and linear layers | Xavier uniform, bias 0 |
        | bias tables, class rows | N(0, 0.02), the tables cut off at 2 |
        | GroupNorm | 1, bias 0 |
        | convolution of the head | 0, so that the network predicts 0 |
        """
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, DiffiTAttention):
                nn.init.trunc_normal_(layer.relative_position_bias_table, std=0.02)
            elif isinstance(layer, nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.conv_out.weight)

    def run_cell(self, cell: DiffiTCell, *inputs: Any) -> Tensor:
        """Call one cell; hosts override it, for example for gradient checkpointing."""
        return cell(*inputs)

    def predict(
        self,
        pictures: Tensor,
        noise_level: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Return the raw output F of the network, without EDM's preconditioning.

        Args:
            pictures: c_in * noisy pictures (B, C, H, W); sides as `DiffiTUNetParameters.check_side` takes them.
            noise_level: c_noise = ln(sigma) / 4, (B,) or (1,).
            class_labels: int64 (B,), with classes only; `num_classes` is the null class.
            augment_labels: (B, A), with `augment_dim` only; None is a picture as it is.

        Returns:
            (B, C, H, W).
        """
        rows, columns = pictures.shape[2:]
        hidden_states = self.conv_in(pictures)
        condition = self.time_token(noise_level, augment_labels, hidden_states.dtype).expand(len(pictures), -1)
        if class_labels is not None:
            condition = condition + self.y_embedder(class_labels, hidden_states.dtype)
        window, device = self.parameters_of.window_size, pictures.device
        cuts = [cut_grid(rows >> stage, columns >> stage, window, False, device) for stage in range(len(self.encoder))]

        skips = []
        for stage, cut in zip(self.encoder, cuts, strict=True):
            skip, hidden_states = stage(hidden_states, condition, cut, self.run_cell)
            skips.append(skip)
        for stage, cut, skip in zip(self.decoder, cuts[-2::-1], skips[-2::-1], strict=True):
            _, hidden_states = stage(torch.cat([hidden_states, skip], dim=1), condition, cut, self.run_cell)
        return self.conv_out(self.norm_out(hidden_states))
