"""Sizes and settings of DiffiT's image-space model, and our presets by name."""

from dataclasses import dataclass, fields
from typing import Any

from .parameters import MOST_LAYERS, FromConfig

CIFAR = {"sample_size": 32, "block_out_channels": (128, 256, 256), "window_size": 4}
FFHQ = {"sample_size": 64, "block_out_channels": (128, 256, 256, 256), "window_size": 8}
PRESETS = {  # the paper prints two numbers of blocks per stage; "large" is the other one
    "cifar10": {**CIFAR, "layers_per_block": (2, 2, 2)},
    "cifar10-large": {**CIFAR, "layers_per_block": (4, 4, 4)},
    "ffhq64": {**FFHQ, "layers_per_block": (1, 2, 2, 2)},
    "ffhq64-large": {**FFHQ, "layers_per_block": (4, 4, 4, 4)},
}


@dataclass(frozen=True, kw_only=True)
class DiffiTUNetParameters(FromConfig):
    """Sizes and settings of DiffiT's image-space model. Defaults are those of "ffhq64".

    Attributes:
        sample_size: side of the pictures that the weights were trained for.
        in_channels: color channels, or channels of latents.
        block_out_channels: width of each stage, from full resolution down; every stage halves the sides.
        layers_per_block: residual cells of each stage, in encoder and decoder.
        window_size: cells per side of the windows of attention, at every stage.
        attention_head_dim: width of a head (ours).
        norm_num_groups: groups of every GroupNorm (ours).
        time_embed_dim: width of the time token.
        num_classes: number of classes (ours), 0 for none; the label of this number is the null class.
        class_dropout_prob: probability that training replaces a label by the null class; at 0 there is no null class.
        dropout: probability of the dropout before the convolution of a cell (ours).
        augment_dim: numbers that describe how a training picture was augmented, 9 for EDM's; 0 for none.

    Raises:
        ValueError: a value is not legal; names the nearest legal one.
    """

    sample_size: int = 64
    in_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 256)
    layers_per_block: tuple[int, ...] = (1, 2, 2, 2)
    window_size: int = 8
    attention_head_dim: int = 32
    norm_num_groups: int = 32
    time_embed_dim: int = 512
    num_classes: int = 0
    class_dropout_prob: float = 0.1
    dropout: float = 0.0
    augment_dim: int = 0

    def __post_init__(self) -> None:
        may_be_zero = ("num_classes", "augment_dim")
        names = [field.name for field in fields(self) if field.type is int]
        self._check_counts(*(name for name in names if name not in may_be_zero or getattr(self, name) != 0))
        for name in ("block_out_channels", "layers_per_block"):  # JSON has lists
            values = getattr(self, name)
            values = tuple(values) if isinstance(values, (tuple, list)) else ()
            if not values or any(type(value) is not int or value < 1 for value in values):
                raise ValueError(f"{name}={getattr(self, name)!r} must be integers >= 1, one for each stage.")
            object.__setattr__(self, name, values)
        stages = len(self.block_out_channels)
        if len(self.layers_per_block) != stages:
            raise ValueError(
                f"layers_per_block={self.layers_per_block} has {len(self.layers_per_block)} stages; it must have "
                f"{stages}, as block_out_channels."
            )
        if sum(self.layers_per_block) > MOST_LAYERS:
            raise ValueError(f"layers_per_block={self.layers_per_block} must be at most {MOST_LAYERS} in all.")
        for width in self.block_out_channels:
            for name in ("attention_head_dim", "norm_num_groups"):
                unit = getattr(self, name)
                if width % unit:
                    nearest = max(1, round(width / unit)) * unit
                    raise ValueError(f"stage width {width} is not a multiple of {name}={unit}; nearest: {nearest}.")
        for name in ("class_dropout_prob", "dropout"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(
                    f"{name}={value!r} must be at least 0 and below 1; nearest: {0.0 if value < 0 else 0.9}."
                )
        self.check_side("sample_size", self.sample_size)

    def check_side(self, name: str, size: int) -> None:
        """Check that a side of a picture can be cut into whole windows at every stage.

        Raises:
            ValueError: it cannot; names the first such stage and the nearest legal sizes.
        """
        deepest = 2 ** (len(self.block_out_channels) - 1)
        unit = self.window_size * deepest
        if size % unit == 0 and size > 0:
            return
        stage = next(stage for stage in range(deepest.bit_length()) if size % (self.window_size << stage) or size < 1)
        low = size // unit * unit
        raise ValueError(
            f"{name}={size} gives {size / 2**stage:g} cells per side at stage {stage + 1}, which is no multiple of "
            f"the window {self.window_size}; nearest: {low or unit} or {low + unit if low else 2 * unit}."
        )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "DiffiTUNetParameters":
        """Return one of our presets for the paper's data sets.

        Args:
            name: one of `PRESETS`.
            changes: fields that differ from it.

        Raises:
            ValueError: there is no such preset; names those that there are.
        """
        if name not in PRESETS:
            raise ValueError(f"{name!r} is no preset; choose one of {', '.join(PRESETS)}.")
        return cls(**(PRESETS[name] | changes))
