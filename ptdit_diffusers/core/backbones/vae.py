"""Causal video VAE of Open-Sora-Plan v1.2 in plain torch: layers, encoder and decoder.

Must not know diffusers or ComfyUI: the heads add names, configuration and manners. Parameter names are those of the
official checkpoint. `**factory` is `operations` (namespace with Conv2d, Conv3d and GroupNorm), `dtype` and `device`.
Shape letters: B batch, C channels, T frames, H W rows/columns (pixels or latent cells, 8 pixels per cell).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .vae_tiling import SPATIAL_RATIO, TEMPORAL_RATIO, Stream, VAETiling, map_chunks, map_stream, map_tiles

NORM_EPS = 1e-6


def check_pixel_sizes(num_frames: int, height: int, width: int) -> None:
    """Check that a video can be encoded.

    Args:
        num_frames: frames, must be 4n + 1 (the first frame stands alone, then groups of four).
        height: pixel rows, must be a positive multiple of 8.
        width: pixel columns, must be a positive multiple of 8.

    Raises:
        ValueError: naming the value, the rule and the nearest legal values.
    """
    if num_frames < 1 or num_frames % TEMPORAL_RATIO != 1:
        below = max(1, (num_frames - 1) // TEMPORAL_RATIO * TEMPORAL_RATIO + 1)
        above = below + TEMPORAL_RATIO
        raise ValueError(f"num_frames={num_frames} is not 4n + 1 (1, 5, 9, ...); nearest: {below} or {above}.")
    for name, size in (("height", height), ("width", width)):
        if size < 1 or size % SPATIAL_RATIO != 0:
            below = max(SPATIAL_RATIO, size // SPATIAL_RATIO * SPATIAL_RATIO)
            above = below + SPATIAL_RATIO
            raise ValueError(f"{name}={size} is not a multiple of {SPATIAL_RATIO}; nearest: {below} or {above}.")


def _check_axes(video: torch.Tensor) -> None:
    if video.ndim != 5:
        raise ValueError(
            f"shape {tuple(video.shape)} has {video.ndim} axes; it must be (batch, channels, frames, height, width), "
            "one picture being one frame: unsqueeze(2)."
        )


class FrameConv3d(nn.Conv3d):
    """A Conv3d that also takes one unpadded frame (B, C, 1, H, W) and then sees that frame at every kernel position.

    A kernel over k_t equal frames is a 2D kernel, summed over time: the same numbers for a third of the work when
    k_t is 3. It is a subclass, and not a branch in the caller, so that forward hooks which move or cast the weights
    (offloading, fp8 storage) still run before the weights are read.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.shape[2] > 1:
            return super().forward(hidden_states)
        weight = self.weight.sum(dim=2)  # (C_out, C_in, k_h, k_w)
        frame = F.conv2d(hidden_states.squeeze(2), weight, self.bias, self.stride[1:], self.padding[1:])
        return frame.unsqueeze(2)


class CausalConv3d(nn.Module):
    """3D convolution over (B, C, T, H, W) in which a frame sees itself and earlier frames only.

    The first frame is repeated k_t - 1 times in front; space is padded with zeros by `padding` on each side. While a
    `stream` is set, the frames in front are those that the chunk before ended with.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int, int],
        stride: int = 1,
        padding: int = 0,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.time_pad, self.carried = kernel_size[0] - 1, kernel_size[0] - stride
        self.stream: Stream | None = None
        # Other operations classes own the casting of their weights, so only torch's plain class is replaced.
        conv_class = FrameConv3d if operations.Conv3d is nn.Conv3d else operations.Conv3d
        spatial_padding = (0, padding, padding)
        self.conv = conv_class(
            in_channels, out_channels, kernel_size, stride, spatial_padding, dtype=dtype, device=device
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        single_frame = hidden_states.shape[2] == 1 and isinstance(self.conv, FrameConv3d) and self.stream is None
        if self.time_pad > 0 and not single_frame:
            past = hidden_states[:, :, :1].expand(-1, -1, self.time_pad, -1, -1)
            if self.stream is not None:
                past = self.stream.past.get(self, past)
            hidden_states = torch.cat([past, hidden_states], dim=2)  # (B, C, T + k_t - 1, H, W)
            if self.stream is not None:
                self.stream.past[self] = hidden_states[:, :, -self.carried :].clone()  # not a view of the whole
        return self.conv(hidden_states)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the input (through a 1x1 convolution if the channels change).

    `causal=True` works on (B, C, T, H, W) with statistics over time; `causal=False` on single frames (B, C, H, W).
    """

    def __init__(
        self, in_channels: int, out_channels: int, causal: bool, norm_num_groups: int, **factory: Any
    ) -> None:
        super().__init__()
        conv = partial(_conv, causal=causal, **factory)
        norm = partial(_norm, norm_num_groups=norm_num_groups, **factory)
        self.norm1 = norm(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3)
        self.norm2 = norm(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.nin_shortcut = conv(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states if self.nin_shortcut is None else self.nin_shortcut(hidden_states)
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)))
        hidden_states = self.conv2(F.silu(self.norm2(hidden_states)))
        return residual + hidden_states


class FrameAttention(nn.Module):
    """Single-head self-attention among the pixels of each frame, with norm (statistics over time) and residual."""

    def __init__(self, channels: int, norm_num_groups: int, **factory: Any) -> None:
        super().__init__()
        conv = partial(_conv, causal=True, **factory)
        self.norm = _norm(channels, norm_num_groups, **factory)
        self.q = conv(channels, channels, 1)
        self.k = conv(channels, channels, 1)
        self.v = conv(channels, channels, 1)
        self.proj_out = conv(channels, channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, channels, frames, height, width = hidden_states.shape
        normed = self.norm(hidden_states)
        query, key, value = (
            projection(normed).permute(0, 2, 3, 4, 1).reshape(batch * frames, 1, height * width, channels)
            for projection in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(query, key, value)  # (B T, 1, H W, C)
        attended = attended.reshape(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3).contiguous()
        return hidden_states + self.proj_out(attended)


class Downsample(nn.Module):
    """Halves space: one zero row and column at the bottom and right, then a convolution of 3 with stride 2.

    `causal=True` halves time too, T = 2n + 1 frames to n + 1; `causal=False` works on single frames (B, C, H, W).
    """

    def __init__(self, channels: int, causal: bool, **factory: Any) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, 3, causal=causal, stride=2, padding=0, **factory)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(hidden_states, (0, 1, 0, 1)))


class FrameUpsample(nn.Module):
    """Doubles space by nearest neighbour, then a convolution of 1x3x3."""

    def __init__(self, channels: int, **factory: Any) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (1, 3, 3), padding=1, **factory)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(hidden_states, scale_factor=(1, 2, 2), mode="nearest"))


class VideoUpsample(nn.Module):
    """Doubles space, and n + 1 frames to 2n + 1, trilinearly, then causal 3x3x3.

    The first frame is one picture before and after, so it is only resized in space, apart from the others. Their last
    half frame looks one frame ahead; while a `stream` is set it waits for the next chunk, unless this is the last.
    """

    def __init__(self, channels: int, **factory: Any) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (3, 3, 3), padding=1, **factory)
        self.stream: Stream | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.stream is not None and self in self.stream.past:
            return self.conv(self._double_time(hidden_states))
        first, later = hidden_states[:, :, 0], hidden_states[:, :, 1:]
        upsampled = F.interpolate(first, scale_factor=(2, 2), mode="bilinear").unsqueeze(2)
        if self.stream is not None:
            self.stream.past[self] = later[:, :, :0]
        if later.shape[2] > 0:
            upsampled = torch.cat([upsampled, self._double_time(later)], dim=2)  # (B, C, 1 + 2 (T - 1), 2H, 2W)
        return self.conv(upsampled)

    def _double_time(self, later: torch.Tensor) -> torch.Tensor:
        if self.stream is None:
            return F.interpolate(later, scale_factor=(2, 2, 2), mode="trilinear")
        past, last = self.stream.past[self], self.stream.last
        self.stream.past[self] = later[:, :, -1:].clone()
        doubled = F.interpolate(torch.cat([past, later], dim=2), scale_factor=(2, 2, 2), mode="trilinear")
        return doubled[:, :, past.shape[2] : None if last else -1]


def _conv(
    in_channels: int, out_channels: int, size: int, causal: bool, operations: Any = nn, **options: Any
) -> nn.Module:
    """Convolution of kernel `size` on every axis, causal 3D or plain 2D; it keeps the size unless told otherwise."""
    options = {"padding": size // 2, **options}
    if causal:
        return CausalConv3d(in_channels, out_channels, (size, size, size), operations=operations, **options)
    return operations.Conv2d(in_channels, out_channels, size, **options)


def _norm(channels: int, norm_num_groups: int, operations: Any = nn, **options: Any) -> nn.Module:
    return operations.GroupNorm(norm_num_groups, channels, eps=NORM_EPS, affine=True, **options)


class _Checkpointed(nn.Module):
    """Runs blocks, recomputing them in the backward pass when `gradient_checkpointing` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable = partial(checkpoint, use_reentrant=False)

    def _run(self, block: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, hidden_states)
        return block(hidden_states)

    def _run_all(self, blocks: nn.ModuleList, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            hidden_states = self._run(block, hidden_states)
        return hidden_states


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, norm_num_groups: int, **factory: Any) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, True, norm_num_groups, **factory)
        self.attn_1 = FrameAttention(channels, norm_num_groups, **factory)
        self.block_2 = ResidualBlock(channels, channels, True, norm_num_groups, **factory)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(hidden_states)))


class Level(nn.Module):
    """The residual blocks of one resolution; `upsample` or `downsample` is set by the encoder or decoder."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, causal: bool, norm_num_groups: int, **factory: Any
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(
            ResidualBlock(widths[i], out_channels, causal, norm_num_groups, **factory) for i in range(num_blocks)
        )


class Encoder(_Checkpointed):
    """Pixels (B, C_in, T, H, W) to (B, 2 z, (T - 1) / 4 + 1, H / 8, W / 8); full and half size work frame by frame."""

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        z_channels: int,
        num_res_blocks: int,
        norm_num_groups: int,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.conv_in = _conv(in_channels, widths[0], 3, causal=False, **factory)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            before = widths[max(level - 1, 0)]
            self.down.append(Level(before, width, num_res_blocks, level >= 2, norm_num_groups, **factory))
        self.down[0].downsample = Downsample(widths[0], causal=False, **factory)
        self.down[1].downsample = Downsample(widths[1], causal=True, **factory)
        self.down[2].downsample = Downsample(widths[2], causal=True, **factory)
        self.mid = Middle(widths[-1], norm_num_groups, **factory)
        self.norm_out = _norm(widths[-1], norm_num_groups, **factory)
        self.conv_out = _conv(widths[-1], 2 * z_channels, 3, causal=True, **factory)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        batch, _, frames = pixels.shape[:3]
        hidden_states = self.conv_in(pixels.transpose(1, 2).flatten(0, 1))  # (B T, C, H, W)
        hidden_states = self._run_all(self.down[0].block, hidden_states)
        hidden_states = self.down[0].downsample(hidden_states)  # (B T, C, H/2, W/2)
        hidden_states = self._run_all(self.down[1].block, hidden_states)
        hidden_states = hidden_states.unflatten(0, (batch, frames)).transpose(1, 2)  # (B, C, T, H/2, W/2)
        hidden_states = self.down[1].downsample(hidden_states)  # (B, C, (T-1)/2 + 1, H/4, W/4)
        hidden_states = self._run_all(self.down[2].block, hidden_states)
        hidden_states = self.down[2].downsample(hidden_states)  # (B, C, (T-1)/4 + 1, H/8, W/8)
        hidden_states = self._run_all(self.down[3].block, hidden_states)
        hidden_states = self._run(self.mid, hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class Decoder(_Checkpointed):
    """Latents (B, z, T, H, W) to pixels (B, C_out, 4 (T - 1) + 1, 8 H, 8 W); every level is causal in time."""

    def __init__(
        self,
        out_channels: int,
        widths: Sequence[int],
        z_channels: int,
        num_res_blocks: int,
        norm_num_groups: int,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.conv_in = _conv(z_channels, widths[-1], 3, causal=True, **factory)
        self.mid = Middle(widths[-1], norm_num_groups, **factory)
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            before = widths[min(level + 1, len(widths) - 1)]
            self.up.append(Level(before, width, num_res_blocks + 1, True, norm_num_groups, **factory))
        self.up[1].upsample = FrameUpsample(widths[1], **factory)
        self.up[2].upsample = VideoUpsample(widths[2], **factory)
        self.up[3].upsample = VideoUpsample(widths[3], **factory)
        self.norm_out = _norm(widths[0], norm_num_groups, **factory)
        self.conv_out = _conv(widths[0], out_channels, 3, causal=True, **factory)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        hidden_states = self._run(self.mid, self.conv_in(latents))
        for level in reversed(self.up):  # levels are numbered by resolution: 3 is the smallest and runs first
            hidden_states = self._run_all(level.block, hidden_states)
            if level is not self.up[0]:
                hidden_states = self._run(level.upsample, hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class PTDiTVAEBackbone(nn.Module):
    """Encoder, decoder and the 1x1x1 convolutions around the latents; a head calls `_build` in its constructor."""

    spatial_compression_ratio = SPATIAL_RATIO
    temporal_compression_ratio = TEMPORAL_RATIO

    def _build(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        hidden_size: int = 128,
        hidden_size_mult: Sequence[int] = (1, 2, 4, 4),
        z_channels: int = 4,
        num_res_blocks: int = 2,
        norm_num_groups: int = 32,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Create the layers; defaults are those of the released checkpoint.

        Raises:
            ValueError: if there are not four levels or a width is not a multiple of `norm_num_groups`.
        """
        widths = [hidden_size * mult for mult in hidden_size_mult]
        if len(widths) != 4:
            raise ValueError(f"hidden_size_mult={tuple(hidden_size_mult)} has {len(widths)} levels; it must have 4.")
        for width in widths:
            if width % norm_num_groups != 0:
                nearest = max(1, round(width / norm_num_groups)) * norm_num_groups
                raise ValueError(
                    f"level width {width} is not a multiple of norm_num_groups={norm_num_groups}; nearest: {nearest}."
                )
        factory = {"operations": operations, "dtype": dtype, "device": device}
        self.encoder = Encoder(in_channels, widths, z_channels, num_res_blocks, norm_num_groups, **factory)
        self.decoder = Decoder(out_channels, widths, z_channels, num_res_blocks, norm_num_groups, **factory)
        self.quant_conv = CausalConv3d(2 * z_channels, 2 * z_channels, (1, 1, 1), **factory)
        self.post_quant_conv = CausalConv3d(z_channels, z_channels, (1, 1, 1), **factory)

    def encode_moments(self, pixels: torch.Tensor, tiling: VAETiling | None = None) -> torch.Tensor:
        """Encode a video to the mean and log variance of its latents.

        Args:
            pixels: (B, in_channels, T, H, W) in [-1, 1], T = 4n + 1, H and W multiples of 8.
            tiling: tile sizes, used if the video does not fit into one tile; `None` never tiles.

        Returns:
            (B, 2 * z_channels, n + 1, H / 8, W / 8), means first, unscaled and log variance not clamped.

        Raises:
            ValueError: if the sizes are not legal.
        """
        _check_axes(pixels)
        check_pixel_sizes(*pixels.shape[-3:])
        if tiling is None or tiling.covers(*pixels.shape[-3:]):
            return self._encode_tile(pixels)
        run = self._over_time(self._encode_tile, self.encoder, tiling.frames, pixels.shape[2], tiling)
        return map_tiles(run, pixels, tiling.size, tiling.size // SPATIAL_RATIO)

    def decode_pixels(self, latents: torch.Tensor, tiling: VAETiling | None = None) -> torch.Tensor:
        """Decode unscaled latents.

        Args:
            latents: (B, z_channels, T, H, W).
            tiling: tile sizes, used if the video does not fit into one tile; `None` never tiles.

        Returns:
            (B, out_channels, 4 (T - 1) + 1, 8 H, 8 W), about [-1, 1], not clamped.

        Raises:
            ValueError: if `latents` has not five axes.
        """
        _check_axes(latents)
        num_frames, height, width = latents.shape[-3:]
        num_frames = (num_frames - 1) * TEMPORAL_RATIO + 1
        if tiling is None or tiling.covers(num_frames, height * SPATIAL_RATIO, width * SPATIAL_RATIO):
            return self._decode_tile(latents)
        length = (tiling.frames - 1) // TEMPORAL_RATIO + 1
        run = self._over_time(self._decode_tile, self.decoder, length, latents.shape[2], tiling)
        return map_tiles(run, latents, tiling.size // SPATIAL_RATIO, tiling.size)

    @staticmethod
    def _over_time(run: Callable, network: _Checkpointed, length: int, frames: int, tiling: VAETiling) -> Callable:
        """`run` over chunks of `length` of the `frames`, with or without memory between them."""
        if frames <= length or not tiling.carry_frames:
            return partial(map_chunks, run, length=length)
        if network.gradient_checkpointing and torch.is_grad_enabled():
            raise ValueError(
                "carry_frames=True cannot go with gradient checkpointing: a layer that is run again would find other "
                "frames carried over. Disable one of them."
            )
        layers = [module for module in network.modules() if isinstance(module, CausalConv3d | VideoUpsample)]
        return partial(map_stream, run, length=length, layers=layers)

    def _encode_tile(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.quant_conv(self.encoder(pixels))

    def _decode_tile(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(latents))
