"""Sizes and settings of DiT, and the models of its paper by name."""

from dataclasses import dataclass, fields
from typing import Any

from .parameters import FromConfig

BLOCK_TYPES = ("adaln_zero", "adaln", "cross_attention", "in_context")
ADAPTIVE = ("adaln_zero", "adaln")  # block types whose norms are modulated
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # layers, width, heads
LARGEST_TABLE = 2**28  # numbers of the position table, 1 GiB
PRESETS = tuple(f"DiT-{size}/{patch}" for size in SIZES for patch in (8, 4, 2))


@dataclass(frozen=True, kw_only=True)
class ClassParameters(FromConfig):
    """Sizes that class-conditional transformers share. Defaults are those of the released models for 256 px.

    Attributes:
        num_attention_heads: heads of every attention.
        attention_head_dim: width of a head; the width D = heads * head width must be a multiple of 4.
        num_layers: number of blocks.
        patch_size: latent pixels per token side.
        in_channels: latent channels.
        out_channels: channels of the output: noise, then with learned variance as many again.
        sample_size: side of the latents that the weights were trained for, a multiple of `patch_size`.
        num_classes: number of classes; the label of this number is the null class.
        class_dropout_prob: probability that training replaces a label by the null class; at 0 there is no null class.

    Raises:
        ValueError: a value is not legal; names the nearest legal one.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    num_layers: int = 28
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int = 8
    sample_size: int = 32
    num_classes: int = 1000
    class_dropout_prob: float = 0.1

    def __post_init__(self) -> None:
        self._check_counts(*(field.name for field in fields(self) if field.type is int))
        if self.dim % 4:
            raise ValueError(
                f"num_attention_heads * attention_head_dim = {self.dim} must be a multiple of 4 (positions); "
                f"nearest: {max(4, round(self.dim / 4) * 4)}."
            )
        check_multiple("sample_size", self.sample_size, self.patch_size)
        if self.grid_side**2 * self.dim > LARGEST_TABLE:
            side = int((LARGEST_TABLE / self.dim) ** 0.5) * self.patch_size
            raise ValueError(
                f"sample_size={self.sample_size} with width {self.dim} needs a position table of "
                f"{self.grid_side**2 * self.dim:,} numbers, at most {LARGEST_TABLE:,} are made; nearest: {side}."
            )
        if not 0 <= self.class_dropout_prob < 1:
            raise ValueError(
                f"class_dropout_prob={self.class_dropout_prob!r} must be at least 0 and below 1; nearest: "
                f"{0.0 if self.class_dropout_prob < 0 else 0.9}."
            )

    @property
    def dim(self) -> int:
        """Width D of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def grid_side(self) -> int:
        """Tokens per side of the trained size."""
        return self.sample_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class DiTParameters(ClassParameters):
    """Sizes and settings of DiT. Defaults are those of the released DiT-XL/2 for 256 px.

    Attributes:
        block_type: one of `BLOCK_TYPES`; the others are those of `ClassParameters`.

    Raises:
        ValueError: a value is not legal; names the nearest legal one.
    """

    block_type: str = "adaln_zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_type not in BLOCK_TYPES:
            raise ValueError(f"block_type={self.block_type!r} is unknown; choose one of {', '.join(BLOCK_TYPES)}.")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "DiTParameters":
        """Return one of the paper's models.

        Args:
            name: "DiT-XL/2" and the like; "XL/2" and "DiT-XL-2" mean the same.
            changes: fields that differ from it, e.g. `sample_size=64` for 512 px.

        Raises:
            ValueError: there is no such model; names those that there are.
        """
        key = name.upper().replace("-", "/").removeprefix("DIT/")
        known = {preset.removeprefix("DiT-"): preset for preset in PRESETS}
        if key not in known:
            raise ValueError(f"{name!r} is no preset of DiT; choose one of {', '.join(PRESETS)}.")
        size, patch = key.split("/")
        layers, width, heads = SIZES[size]
        preset = {
            "num_attention_heads": heads,
            "attention_head_dim": width // heads,
            "num_layers": layers,
            "patch_size": int(patch),
        }
        return cls(**(preset | changes))


def check_multiple(name: str, size: int, patch_size: int) -> None:
    """Check that a latent size can be cut into patches.

    Raises:
        ValueError: it cannot; names the nearest sizes that can.
    """
    if size % patch_size:
        low = size // patch_size * patch_size
        raise ValueError(
            f"{name}={size} is not a multiple of the patch size {patch_size}; "
            f"nearest: {low or patch_size} or {low + patch_size}."
        )
