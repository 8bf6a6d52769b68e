"""Sizes and settings that a network is built from: what each means, its default, and which values are legal."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .proxies import legal_proxy_mode
from .windows import Triple, legal_triple

MOST_LAYERS = 512  # that are built; the largest released model has 28
LARGEST_SIZE = 2**20  # of any other count
SIZE_CONDITIONS_AT = 128  # the one sample_size at which the official code embeds resolution and aspect ratio


class FromConfig:
    """A dataclass that can be built from a saved configuration."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Any:
        """Build from a saved configuration; names that are not fields are ignored, missing ones keep the default."""
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})

    def _check_counts(self, *names: str) -> None:
        """Check that fields are integers >= 1.

        Raises:
            ValueError: one is not; names the nearest legal value.
        """
        for name in names:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                nearest = max(1, round(value)) if isinstance(value, (int, float)) else 1
                raise ValueError(f"{name}={value!r} must be an integer >= 1; nearest: {nearest}.")
            if name in ("num_layers", "num_res_blocks") and value > MOST_LAYERS:
                raise ValueError(f"{name}={value} must be at most {MOST_LAYERS}.")
            if value > LARGEST_SIZE:
                raise ValueError(f"{name}={value} must be at most {LARGEST_SIZE}.")


@dataclass(frozen=True, kw_only=True)
class PTDiTParameters(FromConfig):
    """Sizes and settings of PT-DiT. Defaults are those of the released 1.13 B text-to-image checkpoint.

    Attributes:
        num_attention_heads: heads of every attention.
        attention_head_dim: width of a head; the width D = heads * head width must be a multiple of 16.
        in_channels: latent channels.
        out_channels: channels of the output; only the first `in_channels` are trained.
        num_layers: number of blocks.
        patch_size: latent pixels per token side, in space only.
        sample_size: latent size that sets the unit of positions: `max(sample_size // 64, 1)` rows or columns.
        sample_frames: latent frames that the weights were trained for; 1 for pictures.
        caption_channels: width of the text encoder's output.
        window_size: tokens per window (frames, rows, columns).
        proxy_ratio: tokens per proxy (frames, rows, columns), see `PTDiTBackbone.set_windows`.
        shift_window: whether blocks have a shifted-window attention.
        proxy_mode: how a proxy is made of its tokens, one of `PROXY_MODES`.
        num_windows: windows per frame at the trained size; `PTDiTBackbone.auto_windows` keeps it.
        scrambled_positions: on non-square pictures, use the positions that the official code computes by mistake.
        additional_conditions: embed resolution and aspect ratio, which needs D to be a multiple of 3; `None` means
            only if `sample_size` is 128, as in the official code.
        round_timestep: round the timestep to the dtype of the latents, as the official code does.

    Raises:
        ValueError: a value is not legal; names the nearest legal one.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int = 8
    num_layers: int = 28
    patch_size: int = 2
    sample_size: int = 32
    sample_frames: int = 1
    caption_channels: int = 4096
    window_size: Triple = (1, 8, 8)
    proxy_ratio: Triple = (1, 8, 8)
    shift_window: bool = True
    proxy_mode: str = "mean"
    num_windows: int = 64
    scrambled_positions: bool = False
    additional_conditions: bool | None = None
    round_timestep: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "PTDiTParameters":
        """As `FromConfig.from_config`; diffusers' `use_additional_conditions` counts as `additional_conditions`."""
        if "use_additional_conditions" in config:
            config = {**config, "additional_conditions": config["use_additional_conditions"]}
        return super().from_config(config)

    def __post_init__(self) -> None:
        self._check_counts(*(field.name for field in fields(self) if field.type is int))
        if self.additional_conditions is None:
            object.__setattr__(self, "additional_conditions", self.sample_size == SIZE_CONDITIONS_AT)
        width = f"num_attention_heads * attention_head_dim = {self.dim}"
        if self.dim % 16:
            nearest = max(16, round(self.dim / 16) * 16)
            raise ValueError(f"{width} must be a multiple of 16 (positions); nearest: {nearest}.")
        if self.additional_conditions and self.dim % 3:
            raise ValueError(
                f"{width} must be a multiple of 3 with additional conditions (sample_size 128); "
                f"nearest: {round(self.dim / 48) * 48 or 48}."
            )
        for name in ("window_size", "proxy_ratio"):  # JSON has lists
            object.__setattr__(self, name, legal_triple(name, getattr(self, name)))
        legal_proxy_mode(self.proxy_mode)

    @property
    def dim(self) -> int:
        """Width D of a token."""
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True, kw_only=True)
class VAEParameters(FromConfig):
    """Sizes of the causal video VAE. Defaults are those of the released Open-Sora-Plan v1.2 checkpoint.

    Attributes:
        in_channels: color channels of the encoder's input.
        out_channels: color channels of the decoder's output.
        hidden_size: channels at full resolution.
        hidden_size_mult: channels of the four resolutions as multiples of `hidden_size`.
        z_channels: latent channels.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        norm_num_groups: groups of every GroupNorm; the channels of each level must be a multiple of it.
        scaling_factor: number that callers multiply latents by, so that their standard deviation is about one.

    Raises:
        ValueError: a value is not legal; names the nearest legal one.
    """

    in_channels: int = 3
    out_channels: int = 3
    hidden_size: int = 128
    hidden_size_mult: tuple[int, ...] = (1, 2, 4, 4)
    z_channels: int = 4
    num_res_blocks: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    def __post_init__(self) -> None:
        self._check_counts(*(field.name for field in fields(self) if field.type is int))
        object.__setattr__(self, "hidden_size_mult", tuple(self.hidden_size_mult))
        if len(self.widths) != 4:
            raise ValueError(
                f"hidden_size_mult={self.hidden_size_mult} has {len(self.widths)} levels; it must have 4."
            )
        for width in self.widths:
            if width % self.norm_num_groups:
                nearest = max(1, round(width / self.norm_num_groups)) * self.norm_num_groups
                raise ValueError(
                    f"level width {width} is not a multiple of norm_num_groups={self.norm_num_groups}; "
                    f"nearest: {nearest}."
                )

    @property
    def widths(self) -> list[int]:
        """Channels of the four resolutions, from full size down."""
        return [self.hidden_size * mult for mult in self.hidden_size_mult]
