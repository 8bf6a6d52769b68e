"""What a network is, read from its weights: the configuration of a PT-DiT from names and shapes.

Plain Python and torch; it must not know ComfyUI.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ptdit_diffusers.core.sizes import KNOWN_SIZES, OFFICIAL_BASE_TOKENS, RELEASED_WINDOW

SIGNATURE = "transformer_blocks.0.proxy_attn1.to_q.weight"
PREFIXES = ("", "module.", "transformer.", "model.", "_orig_mod.")
POSITIONS = "pos_embed.pos_embed"
CONFIG_KEY = "ptdit_config"  # a tensor of UTF-8 bytes: the configuration travels with the weights in every version
TRIPLES = ("window_size", "proxy_ratio")
NETWORK = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "num_layers",
    "patch_size",
    "sample_size",
    "sample_frames",
    "caption_channels",
    "window_size",
    "proxy_ratio",
    "shift_window",
    "proxy_mode",
    "num_windows",
    "scrambled_positions",
    "additional_conditions",
    "round_timestep",
)
EXTRAS = {"latent_scale": 0.18215, "base_tokens": OFFICIAL_BASE_TOKENS, "latent_rgb": None}


def inner_prefix(keys: Iterable[str], key_prefix: str) -> str | None:
    """What stands before our names after ComfyUI's own prefix, or None if these are no weights of a PT-DiT."""
    keys = keys if isinstance(keys, (dict, set)) else set(keys)
    return next((prefix for prefix in PREFIXES if f"{key_prefix}{prefix}{SIGNATURE}" in keys), None)


def pack_config(config: Mapping[str, Any]) -> torch.Tensor:
    """A configuration as a uint8 tensor, to travel among weights."""
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def unpack_config(packed: torch.Tensor) -> dict[str, Any]:
    """Undoes `pack_config`."""
    return json.loads(bytes(packed.to("cpu", torch.uint8).tolist()))


def given_config(
    weights: Mapping[str, torch.Tensor], prefix: str, metadata: Mapping[str, str] | None
) -> dict[str, Any]:
    """The configuration that came with the weights: packed among them, or JSON in the file's metadata."""
    if prefix + CONFIG_KEY in weights:
        return unpack_config(weights[prefix + CONFIG_KEY])
    try:
        config = json.loads((metadata or {}).get("config", "{}"))
    except ValueError:
        return {}
    return config.get("transformer", config) if isinstance(config, dict) else {}


def infer_config(
    weights: Mapping[str, torch.Tensor], prefix: str = "", metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Configuration of the network with these weights; what they do not tell comes with them or from known sizes.

    Args:
        weights: name -> tensor; only shapes of plain or first axes are read, so quantised files work too.
        prefix: stands before every name.
        metadata: header of the safetensors file.

    Returns:
        Arguments of `PTDiTNetwork` (`NETWORK`) and what is needed around it (`EXTRAS`).

    Raises:
        ValueError: The number of heads is neither given nor known for this width.
    """

    def shape(name: str) -> tuple[int, ...]:
        return tuple(weights[prefix + name].shape)

    given = given_config(weights, prefix, metadata)
    dim = shape("transformer_blocks.0.proxy_attn1.to_q.weight")[0]
    _, in_channels, patch, _ = shape("pos_embed.proj.weight")
    blocks = {name[len(prefix) :].split(".")[1] for name in weights if name.startswith(prefix + "transformer_blocks.")}
    additional = prefix + "adaln_single.emb.resolution_embedder.linear_1.weight" in weights
    frames = shape(POSITIONS)[1] if prefix + POSITIONS in weights else 1
    sample_size = round((shape(POSITIONS)[2]) ** 0.5) * patch if prefix + POSITIONS in weights else 32
    config = {
        "in_channels": in_channels,
        "out_channels": shape("proj_out.bias")[0] // patch**2,
        "num_layers": len(blocks),
        "patch_size": patch,
        "sample_size": 128 if additional else sample_size,
        "sample_frames": frames,
        "caption_channels": shape("caption_projection.linear_1.weight")[1],
        "window_size": RELEASED_WINDOW,
        "shift_window": prefix + "transformer_blocks.0.linear_2.bias" in weights,
        "proxy_mode": "mean",
        "num_windows": 64,
        "scrambled_positions": False,
        "additional_conditions": additional,
        "round_timestep": False,
        **EXTRAS,
    }
    config |= {name: given[name] for name in (*NETWORK, *EXTRAS) if given.get(name) is not None}
    config.setdefault("proxy_ratio", config["window_size"])
    heads = config.get("num_attention_heads") or (KNOWN_SIZES[dim].heads if dim in KNOWN_SIZES else None)
    if heads is None or dim % heads:
        known = ", ".join(f"{width} ({size.heads} heads)" for width, size in KNOWN_SIZES.items())
        raise ValueError(
            f"these PT-DiT weights have width {dim}, and weights do not tell the number of heads; known widths: "
            f"{known}. Use 'PT-DiT Folder Loader' on the model's folder, whose config.json tells it."
        )
    config |= {"num_attention_heads": heads, "attention_head_dim": dim // heads}
    return config | {name: tuple(config[name]) for name in TRIPLES}


def strip_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under our names: without what wrappers put before them, the position buffer and the configuration."""
    prefix = inner_prefix(weights, "") or ""
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.removeprefix(prefix) not in (POSITIONS, CONFIG_KEY)
    }
