"""Words for the log about what is connected to a model and cannot act on it, or not well. Plain Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BLOCKS = ("double_block", "single_block")  # what nodes may replace in a PT-DiT
FEW_CELLS = 64  # EasyCache at its defaults, seen: noise at 4 compared cells, pictures from about this number on


def without_effect(control: Any, options: Mapping[str, Any], blocks: int) -> list[str]:
    """Return what other nodes put on a model or its prompts that this network never reads.

    Args:
        control: What a ControlNet gives for this step, or None.
        options: ComfyUI's `transformer_options`.
        blocks: Number of blocks of the network.
    """
    found = [] if control is None else ["a ControlNet or T2I adapter"]
    patches = [name for name, each in options.get("patches", {}).items() if each]
    for place, replaced in options.get("patches_replace", {}).items():
        keys = [key for key in replaced if place != "dit" or key[0] not in BLOCKS or key[1] >= blocks]
        patches += [f"{place} {' '.join(map(str, key)) if isinstance(key, tuple) else key}" for key in keys]
    if patches:
        names = ", ".join(sorted(patches)[:4]) + (", ..." if len(patches) > 4 else "")
        found.append(f"patches for layers that it does not have ({names})")
    return found


def coarse_cache(options: Mapping[str, Any], shape: Sequence[int]) -> str | None:
    """Return a warning if EasyCache or LazyCache judges latents of this shape by too few of their cells, else None."""
    step = getattr(options.get("easycache"), "subsample_factor", None)
    if not step:
        return None
    cells = -(-shape[-2] // step) * -(-shape[-1] // step)
    if cells >= FEW_CELLS:
        return None
    return (
        f"EasyCache and LazyCache compare {cells} of the {shape[-2] * shape[-1]} cells of this latent, too few to "
        "tell which steps can be left out; at their defaults the picture may be noise. Remove the node, or set its "
        "reuse_threshold to 0.02 or less."
    )


def log_lines(control: Any, options: Mapping[str, Any], shape: Sequence[int], blocks: int) -> list[str]:
    """Return all lines for the log about one sampling run."""
    lines = [
        f"{each} is connected; PT-DiT cannot use it, and it changes nothing."
        for each in without_effect(control, options, blocks)
    ]
    coarse = coarse_cache(options, shape)
    return [*lines, coarse] if coarse else lines
