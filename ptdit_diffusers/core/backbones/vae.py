"""Causal video VAE of Open-Sora-Plan v1.2: layers, encoder and decoder.

Names of weights are those of the official checkpoint. `**factory` is `operations` (a namespace with Conv2d, Conv3d and
GroupNorm), `dtype` and `device`.
Shape letters: B batch, C channels, T frames, H W rows/columns (pixels or latent cells, 8 pixels per cell).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .parameters import VAEParameters
from .shares import Messages
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


def _check_axes(video: Tensor) -> None:
    if video.ndim != 5:
        raise ValueError(
            f"shape {tuple(video.shape)} has {video.ndim} axes; it must be (batch, channels, frames, height, width), "
            "one picture being one frame: unsqueeze(2)."
        )


class FrameConv3d(nn.Conv3d):
    """Conv3d that also takes one unpadded frame (B, C, 1, H, W), as if that frame stood at every kernel position.

    A kernel over k_t equal frames is a 2D kernel, summed over time: the same numbers for a third of the work when
    k_t is 3. It is a subclass, and not a branch in the caller, so that forward hooks which move or cast the weights
    (offloading, fp8 storage) still run before the weights are read.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.shape[2] > 1:
            return super().forward(hidden_states)
        weight = self.weight.sum(dim=2)  # (C_out, C_in, k_h, k_w)
        frame = F.conv2d(hidden_states.squeeze(2), weight, self.bias, self.stride[1:], self.padding[1:])
        return frame.unsqueeze(2)


class CausalConv3d(nn.Module):
    """3D convolution over (B, C, T, H, W) in which a frame depends on itself and earlier frames only.

    The first frame is repeated k_t - 1 times in front; space is padded with zeros by `padding` on each side. While a
    `stream` is set, the frames in front are the last ones of the previous chunk.
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

    def forward(self, hidden_states: Tensor) -> Tensor:
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
    """Norm, SiLU, conv, norm, SiLU, conv, plus the input (through a 1x1 convolution if the channels change).

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

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = hidden_states if self.nin_shortcut is None else self.nin_shortcut(hidden_states)
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)))
        hidden_states = self.conv2(F.silu(self.norm2(hidden_states)))
        return residual + hidden_states


def frame_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with (frames, 1, tokens, C) tensors; on a CPU in float32, as kernels for bfloat16 round the weights."""
    if query.device.type != "cpu" or query.dtype not in (torch.bfloat16, torch.float16):
        return F.scaled_dot_product_attention(query, key, value)
    with torch.autocast("cpu", enabled=False):
        exact = (each.float() for each in (query, key, value))
        return F.scaled_dot_product_attention(*exact).to(query.dtype)


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

    def forward(self, hidden_states: Tensor) -> Tensor:
        batch, channels, frames, height, width = hidden_states.shape
        normed = self.norm(hidden_states)
        query, key, value = (
            projection(normed).permute(0, 2, 3, 4, 1).reshape(batch * frames, 1, height * width, channels).contiguous()
            for projection in (self.q, self.k, self.v)
        )  # contiguous: for others torch makes the whole matrix of scores
        attended = frame_attention(query, key, value)  # (B T, 1, H W, C)
        attended = attended.reshape(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3).contiguous()
        return hidden_states + self.proj_out(attended)


class Downsample(nn.Module):
    """Halve space: one zero row and column at the bottom and right, then a convolution of 3 with stride 2.

    `causal=True` halves time, too, T = 2n + 1 frames to n + 1; `causal=False` works on single frames (B, C, H, W).
    """

    def __init__(self, channels: int, causal: bool, **factory: Any) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, 3, causal=causal, stride=2, padding=0, **factory)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.conv(F.pad(hidden_states, (0, 1, 0, 1)))


class FrameUpsample(nn.Module):
    """Double space by nearest neighbor, then convolve with a 1x3x3 kernel."""

    def __init__(self, channels: int, **factory: Any) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (1, 3, 3), padding=1, **factory)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.conv(F.interpolate(hidden_states, scale_factor=(1, 2, 2), mode="nearest"))


class VideoUpsample(nn.Module):
    """Double space, and n + 1 frames to 2n + 1, trilinearly, then convolve with a causal 3x3x3 kernel.

    The first frame is resized in space alone, apart from the others. The last half frame of the others depends on one
    frame more; while a `stream` is set it waits for the next chunk, unless this is the last.
    """

    def __init__(self, channels: int, **factory: Any) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (3, 3, 3), padding=1, **factory)
        self.stream: Stream | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.stream is not None and self in self.stream.past:
            return self.conv(self._double_time(hidden_states))
        first, later = hidden_states[:, :, 0], hidden_states[:, :, 1:]
        upsampled = F.interpolate(first, scale_factor=(2, 2), mode="bilinear").unsqueeze(2)
        if self.stream is not None:
            self.stream.past[self] = later[:, :, :0]
        if later.shape[2] > 0:
            upsampled = torch.cat([upsampled, self._double_time(later)], dim=2)  # (B, C, 1 + 2 (T - 1), 2H, 2W)
        return self.conv(upsampled)

    def _double_time(self, later: Tensor) -> Tensor:
        if self.stream is None:
            return F.interpolate(later, scale_factor=(2, 2, 2), mode="trilinear")
        past, last = self.stream.past[self], self.stream.last
        self.stream.past[self] = later[:, :, -1:].clone()
        doubled = F.interpolate(torch.cat([past, later], dim=2), scale_factor=(2, 2, 2), mode="trilinear")
        return doubled[:, :, past.shape[2] : None if last else -1]


def _conv(
    in_channels: int, out_channels: int, size: int, causal: bool, operations: Any = nn, **options: Any
) -> nn.Module:
    """Make a convolution of kernel `size` on every axis, causal 3D or plain 2D; by default it keeps the size."""
    options = {"padding": size // 2, **options}
    if causal:
        return CausalConv3d(in_channels, out_channels, (size, size, size), operations=operations, **options)
    return operations.Conv2d(in_channels, out_channels, size, **options)


def _norm(channels: int, norm_num_groups: int, operations: Any = nn, **options: Any) -> nn.Module:
    return operations.GroupNorm(norm_num_groups, channels, eps=NORM_EPS, affine=True, **options)


class _Checkpointed(nn.Module):
    """Run blocks, recomputing them in the backward pass if `gradient_checkpointing` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable = partial(checkpoint, use_reentrant=False)

    def _run(self, block: nn.Module, hidden_states: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, hidden_states)
        return block(hidden_states)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, norm_num_groups: int, **factory: Any) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, True, norm_num_groups, **factory)
        self.attn_1 = FrameAttention(channels, norm_num_groups, **factory)
        self.block_2 = ResidualBlock(channels, channels, True, norm_num_groups, **factory)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(hidden_states)))


class Level(_Checkpointed):
    """Residual blocks of one resolution, then `downsample` or `upsample`, which the encoder or decoder sets.

    Offloading brings the weights of a level when its forward is called, so nothing may call its layers one by one.
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, causal: bool, norm_num_groups: int, **factory: Any
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(
            ResidualBlock(widths[i], out_channels, causal, norm_num_groups, **factory) for i in range(num_blocks)
        )
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, hidden_states: Tensor, videos: tuple[int, int] | None = None) -> Tensor:
        """Apply the layers; with `videos` (B, T), frames (B T, C, H, W) become (B, C, T, H, W) after the blocks."""
        for block in self.block:
            hidden_states = self._run(block, hidden_states)
        if videos is not None:
            hidden_states = hidden_states.unflatten(0, videos).transpose(1, 2)
        resample = self.downsample or self.upsample
        return hidden_states if resample is None else self._run(resample, hidden_states)


class Encoder(_Checkpointed):
    """Pixels (B, C_in, T, H, W) to (B, 2 z, (T - 1) / 4 + 1, H / 8, W / 8); full and half size work frame by frame."""

    def __init__(self, parameters: VAEParameters, **factory: Any) -> None:
        super().__init__()
        widths, groups = parameters.widths, parameters.norm_num_groups
        self.conv_in = _conv(parameters.in_channels, widths[0], 3, causal=False, **factory)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            before = widths[max(level - 1, 0)]
            self.down.append(Level(before, width, parameters.num_res_blocks, level >= 2, groups, **factory))
        self.down[0].downsample = Downsample(widths[0], causal=False, **factory)
        self.down[1].downsample = Downsample(widths[1], causal=True, **factory)
        self.down[2].downsample = Downsample(widths[2], causal=True, **factory)
        self.mid = Middle(widths[-1], groups, **factory)
        self.norm_out = _norm(widths[-1], groups, **factory)
        self.conv_out = _conv(widths[-1], 2 * parameters.z_channels, 3, causal=True, **factory)

    def forward(self, pixels: Tensor) -> Tensor:
        batch, _, frames = pixels.shape[:3]
        hidden_states = self.conv_in(pixels.transpose(1, 2).flatten(0, 1))  # (B T, C, H, W)
        hidden_states = self.down[0](hidden_states)  # (B T, C, H/2, W/2)
        hidden_states = self.down[1](hidden_states, (batch, frames))  # (B, C, (T-1)/2 + 1, H/4, W/4)
        hidden_states = self.down[2](hidden_states)  # (B, C, (T-1)/4 + 1, H/8, W/8)
        hidden_states = self.down[3](hidden_states)
        hidden_states = self._run(self.mid, hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class Decoder(_Checkpointed):
    """Latents (B, z, T, H, W) to pixels (B, C_out, 4 (T - 1) + 1, 8 H, 8 W); every level is causal in time."""

    def __init__(self, parameters: VAEParameters, **factory: Any) -> None:
        super().__init__()
        widths, groups = parameters.widths, parameters.norm_num_groups
        self.conv_in = _conv(parameters.z_channels, widths[-1], 3, causal=True, **factory)
        self.mid = Middle(widths[-1], groups, **factory)
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            before = widths[min(level + 1, len(widths) - 1)]
            self.up.append(Level(before, width, parameters.num_res_blocks + 1, True, groups, **factory))
        self.up[1].upsample = FrameUpsample(widths[1], **factory)
        self.up[2].upsample = VideoUpsample(widths[2], **factory)
        self.up[3].upsample = VideoUpsample(widths[3], **factory)
        self.norm_out = _norm(widths[0], groups, **factory)
        self.conv_out = _conv(widths[0], parameters.out_channels, 3, causal=True, **factory)

    def forward(self, latents: Tensor) -> Tensor:
        hidden_states = self._run(self.mid, self.conv_in(latents))
        for level in reversed(self.up):  # levels are numbered by resolution: 3 is the smallest and runs first
            hidden_states = level(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class PTDiTVAEBackbone(nn.Module):
    """Encoder, decoder and the 1x1x1 convolutions around the latents; a host calls `build` in its constructor."""

    spatial_compression_ratio = SPATIAL_RATIO
    temporal_compression_ratio = TEMPORAL_RATIO

    def build(
        self,
        parameters: VAEParameters,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Create the layers under the official checkpoint's names.

        Args:
            parameters: sizes.
            operations: namespace with the classes Conv2d, Conv3d and GroupNorm.
            dtype, device: in which format and where weights are made.
        """
        factory = {"operations": operations, "dtype": dtype, "device": device}
        latents = parameters.z_channels
        self.encoder = Encoder(parameters, **factory)
        self.decoder = Decoder(parameters, **factory)
        self.quant_conv = CausalConv3d(2 * latents, 2 * latents, (1, 1, 1), **factory)
        self.post_quant_conv = CausalConv3d(latents, latents, (1, 1, 1), **factory)

    def encode_moments(self, pixels: Tensor, tiling: VAETiling | None = None) -> Tensor:
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

    def decode_pixels(
        self, latents: Tensor, tiling: VAETiling | None = None, devices: Messages | None = None
    ) -> Tensor:
        """Decode unscaled latents.

        Args:
            latents: (B, z_channels, T, H, W).
            tiling: tile sizes, used if the video does not fit into one tile; `None` never tiles.
            devices: each decodes some of the spatial tiles, and gets all of them; `None`: this one decodes all.

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
        inner = len(latents), self.decoder.conv_out.conv.out_channels, num_frames
        return map_tiles(run, latents, tiling.size // SPATIAL_RATIO, tiling.size, devices, inner)

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

    def _encode_tile(self, pixels: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(pixels))

    def _decode_tile(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))
