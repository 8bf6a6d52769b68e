"""Words for the log about what is connected to a model and cannot act on it, or not well. Plain Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BLOCKS = ("double_block", "single_block")  # what nodes may replace in a PT-DiT
# What other nodes write into ComfyUI's `transformer_options` for networks of their own -> the node
UNREAD = {
    "rope_options": "ScaleROPE",
    "stg_self_attn_blocks": "LTXVSpatioTemporalGuidance",
    "a2v_cross_attn": "LTXVModalityGuidance",
}
SAFE_THRESHOLD = 0.05  # measured with shapes-128 and 30 steps: pictures, 7 steps left out; at 0.2 noise, 14 left out


def without_effect(control: Any, options: Mapping[str, Any], blocks: int) -> list[str]:
    """Return what other nodes put on a model or its prompts that this network never reads.

    Args:
        control: What a ControlNet gives for this step, or None.
        options: ComfyUI's `transformer_options`.
        blocks: Number of blocks of the network.
    """
    found = [] if control is None else ["a ControlNet or T2I adapter"]
    found += [node for name, node in UNREAD.items() if name in options]
    patches = [name for name, each in options.get("patches", {}).items() if each]
    for place, replaced in options.get("patches_replace", {}).items():
        keys = [key for key in replaced if place != "dit" or key[0] not in BLOCKS or key[1] >= blocks]
        patches += [f"{place} {' '.join(map(str, key)) if isinstance(key, tuple) else key}" for key in keys]
    if patches:
        names = ", ".join(sorted(patches)[:4]) + (", ..." if len(patches) > 4 else "")
        found.append(f"patches for layers that it does not have ({names})")
    return found


def foreign_sampling(prediction_fits: bool, time: float) -> str | None:
    """Return a warning if a node has set the sampling of another kind of model, else None.

    Args:
        prediction_fits: Whether the sampling takes the output for what it is, noise or flow.
        time: What the network is told at the strongest noise; ours are trained with about 1000.
    """
    if prediction_fits and 990 < time < 1010:
        return None
    reason = f"it tells the network the time {time:g} at full noise instead of 1000" if prediction_fits else (
        "it takes what the network predicts for something else"
    )  # fmt: skip
    return f"a ModelSampling node for other models is connected: {reason}, so the picture will be wrong. Remove it."


def eager_cache(options: Mapping[str, Any]) -> str | None:
    """Return a warning if EasyCache or LazyCache may leave out too many steps, else None."""
    threshold = getattr(options.get("easycache"), "reuse_threshold", 0.0)
    if threshold <= SAFE_THRESHOLD:
        return None
    return (
        f"EasyCache or LazyCache with reuse_threshold {threshold:g} may leave out so many steps that noise remains; "
        f"{SAFE_THRESHOLD:g} gives right pictures with the models that come with the nodes."
    )


def log_lines(control: Any, options: Mapping[str, Any], blocks: int, title: str = "PT-DiT") -> list[str]:
    """Return all lines for the log about one sampling run."""
    lines = [f"{title} cannot use {each}; it changes nothing." for each in without_effect(control, options, blocks)]
    eager = eager_cache(options)
    return [*lines, eager] if eager else lines
