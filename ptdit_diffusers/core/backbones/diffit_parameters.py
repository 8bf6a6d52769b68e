"""Sizes and settings of DiffiT's latent model, and the released models by name."""

from dataclasses import dataclass
from typing import Any

from .dit_parameters import ClassParameters

PRESETS = {"DiffiT-256": {}, "DiffiT-512": {"sample_size": 64}}  # picture size -> what differs from the defaults


@dataclass(frozen=True, kw_only=True)
class DiffiTParameters(ClassParameters):
    """Sizes and settings of DiffiT's latent model. Defaults are those of the released model for 256 px.

    Attributes:
        window_size: tokens per side of the windows of attention; `None`: the whole grid is one window, as released.
        shift_window: whether every second block shifts the windows by half their size.

    The others are those of `ClassParameters`.

    Raises:
        ValueError: a value is not legal; names the nearest legal one.
    """

    window_size: int | None = None
    shift_window: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        largest, size = self.grid_side, self.window_size
        if size is not None and (type(size) is not int or not 1 <= size <= largest):
            nearest = min(max(1, round(size)), largest) if isinstance(size, (int, float)) else largest
            raise ValueError(
                f"window_size={size!r} must be an integer from 1 to {largest}, the tokens per side; "
                f"nearest: {nearest}."
            )
        if self.shift_window and self.is_global:
            raise ValueError("shift_window=True needs windows smaller than the grid: give window_size, or False.")

    @property
    def window(self) -> int:
        """Tokens per side of a window."""
        return self.window_size or self.grid_side

    @property
    def is_global(self) -> bool:
        """Whether one window is the whole grid, so that the weights fit one size of pictures only."""
        return self.window == self.grid_side

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "DiffiTParameters":
        """Return one of the released models.

        Args:
            name: "DiffiT-256" or "DiffiT-512".
            changes: fields that differ from it.

        Raises:
            ValueError: there is no such model; names those that there are.
        """
        known = {preset.lower(): sizes for preset, sizes in PRESETS.items()}
        if name.lower() not in known:
            raise ValueError(f"{name!r} is no preset of DiffiT; choose one of {', '.join(PRESETS)}.")
        return cls(**(known[name.lower()] | changes))
