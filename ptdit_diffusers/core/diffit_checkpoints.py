"""Checkpoints of DiffiT's latent model: which files they are, their configuration, their index buffers.

Independent of file formats. Names are DiT's, see `dit_checkpoints`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .backbones.diffit import INDEX_BUFFER, check_index
from .backbones.diffit_parameters import DiffiTParameters
from .checkpoint_names import ConversionError, Shapes, clean_names, find_weights
from .configuration import length
from .dit_checkpoints import DIFFIT_SIGNATURE, OFFICIAL_SIGNATURE, POSITION_TABLE, inferred_sizes

BIAS_TABLE = "relative_position_bias_table"
FIRST_TABLE = f"blocks.0.attn.{BIAS_TABLE}"


def is_diffit(names: Iterable[str]) -> bool:
    """Return whether weights of these names are those of DiffiT's latent model."""
    return set(names).issuperset((*OFFICIAL_SIGNATURE, DIFFIT_SIGNATURE))


def window_of(rows: int) -> int:
    """Return the tokens per side of the window that a bias table of so many rows is for."""
    return (math.isqrt(rows) + 1) // 2


def diffit_config(shapes: Shapes, source: Any, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the configuration of a DiffiT with weights of these shapes. The bias tables show its heads and windows.

    Where shapes make no sense, values are those of the released model, so that `check_weights` can name what is wrong.

    Args:
        shapes: Official name -> shape.
        source: The file, for messages.
        given: Wins over what is inferred. Weights do not show `shift_window`.

    Raises:
        ConversionError: Another number of heads is given than the tables have, or it does not divide the width.
    """
    released, given = DiffiTParameters(), dict(given or {})
    sizes = inferred_sizes(shapes)
    width = length(shapes, "x_embedder.proj.weight", 0, released.dim)
    window = window_of(length(shapes, FIRST_TABLE, 0, 0))
    heads = length(shapes, FIRST_TABLE, 1, released.num_attention_heads)
    asked = given.pop("num_attention_heads", None) or heads
    if asked != heads:
        raise ConversionError(
            f"{source}: num_attention_heads={asked} does not fit the bias tables, which have {heads} heads; "
            f"nearest: {heads}"
        )
    if heads < 1 or width % heads:
        raise ConversionError(f"{source}: the bias tables have {heads} heads, which do not divide the width {width}")
    if POSITION_TABLE not in shapes and window:  # as released: one window for the whole grid
        sizes["sample_size"] = window * sizes["patch_size"]
    sizes["window_size"] = window if 0 < window < sizes["sample_size"] // sizes["patch_size"] else None
    return sizes | given | {"num_attention_heads": heads, "attention_head_dim": width // heads}


def index_buffers(names: Iterable[str]) -> list[str]:
    """Return those of the names that are index buffers beside a bias table."""
    names = set(names)
    return sorted(
        name
        for name in names
        if name.endswith(f".{INDEX_BUFFER}") and f"{name.removesuffix(INDEX_BUFFER)}{BIAS_TABLE}" in names
    )


def single_file_diffit(checkpoint: Mapping[str, Any], **_: Any) -> dict[str, Tensor]:
    """Return the weights of a loaded checkpoint, nested or not, without its index buffers.

    Raises:
        ValueError: An index buffer is not the formula's.
    """
    weights = find_weights(checkpoint)[1]
    weights = {clean: weights[name] for clean, name in clean_names(weights).items()}
    for name in index_buffers(weights):
        rows = len(weights[f"{name.removesuffix(INDEX_BUFFER)}{BIAS_TABLE}"])
        check_index(name, weights.pop(name), window_of(rows))
    return weights
