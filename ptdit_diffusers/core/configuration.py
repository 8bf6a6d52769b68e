"""Read the configuration of a transformer or VAE: what its file carries, and what its weights show.

diffusers and ComfyUI both ask here. Configurations have the names and values of diffusers' `config.json`. Independent
of file formats.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backbones.diffit_parameters import DiffiTParameters
from .backbones.dit_parameters import DiTParameters
from .backbones.parameters import MOST_LAYERS, SIZE_CONDITIONS_AT, PTDiTParameters, VAEParameters
from .checkpoint_names import (
    PACKED_CONFIG,
    POSITION_BUFFER,
    VAE_SIGNATURE,
    ConversionError,
    Shapes,
    clean_names,
    is_transformer,
    shapes_of,
)
from .documents import parse_json, read_json
from .sizes import KNOWN_SIZES, OFFICIAL_BASE_TOKENS

SIZE_CONDITIONS = "adaln_single.emb.resolution_embedder.linear_1.weight"
ASKED = ("num_attention_heads", "window_size", "proxy_ratio")  # of a user, because weights do not show them
GGUF_CONFIG = "ptdit.config"  # field of a GGUF file: the configuration as JSON
STABLE_DIFFUSION_SCALE = 0.18215  # of the VAE that the official DiT and DiffiT use
EPSILON, FLOW = "epsilon", "flow_prediction"  # what a network predicts, in diffusers' words
# What a transformer's file may carry for sampling with it: the scale of its latents, the tokens per frame at which the
# time shift is 1, and the factors of previews.
SAMPLING_FIELDS = {
    "latent_scale": VAEParameters.scaling_factor,
    "base_tokens": OFFICIAL_BASE_TOKENS,
    "latent_rgb": None,
}
# The same for a class-conditional transformer: the scale of its latents, the factors of previews, what it predicts
# ("epsilon" or "flow_prediction"), the shift of a flow's times, and the names of its classes.
CLASS_SAMPLING_FIELDS = {
    "latent_scale": STABLE_DIFFUSION_SCALE,
    "latent_rgb": None,
    "prediction_type": EPSILON,
    "shift": 1.0,
    "id2label": None,
}
COMPONENT_FIELDS = {
    "transformer": {*(each.name for each in fields(PTDiTParameters)), *SAMPLING_FIELDS, "use_additional_conditions"},
    "class_transformer": {
        *(each.name for parameters in (DiTParameters, DiffiTParameters) for each in fields(parameters)),
        *CLASS_SAMPLING_FIELDS,
    },
    "vae": {each.name for each in fields(VAEParameters)},
}


# --- what a file carries ---------------------------------------------------------------------------------------------


def carried_config(
    weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, component: str = "transformer"
) -> dict[str, Any]:
    """Return the configuration that travels with weights, empty if none does.

    Args:
        weights: Clean name -> tensor; the configuration may be packed among them.
        metadata: Header of a safetensors file or fields of a GGUF file, which may hold it as JSON.
        component: "transformer", "class_transformer" or "vae".
    """
    metadata = metadata or {}
    try:
        if PACKED_CONFIG in weights:
            config = parse_json(bytes(weights[PACKED_CONFIG].to("cpu", torch.uint8).flatten().tolist()))
        else:
            config = parse_json(metadata.get("config") or metadata.get(GGUF_CONFIG) or "{}")
    except (TypeError, ValueError):
        return {}
    config = config.get(component, config) if isinstance(config, dict) else {}
    return known_fields(config, component) if isinstance(config, dict) else {}


def known_fields(config: Mapping[str, Any], component: str) -> dict[str, Any]:
    """Return the fields of a saved configuration that have a meaning here and a value."""
    known = {
        name: value for name, value in config.items() if name in COMPONENT_FIELDS[component] and value is not None
    }
    if "additional_conditions" in known:  # the name in files that ComfyUI saved
        known["use_additional_conditions"] = known.pop("additional_conditions")
    return known


def pack_config(config: Mapping[str, Any]) -> Tensor:
    """Return a configuration as a uint8 tensor, which every tool keeps that keeps weights."""
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def folder_config(folder: Path) -> dict[str, Any]:
    """Return the transformer's configuration in a folder of diffusers, with what VAE and scheduler add to it."""
    config = known_fields(read_json(folder / "transformer/config.json"), "transformer")
    scheduler, vae = folder / "scheduler/scheduler_config.json", folder / "vae/config.json"
    if scheduler.is_file() and (settings := read_json(scheduler)).get("use_dynamic_shifting"):
        config["base_tokens"] = settings["base_image_seq_len"]
    if vae.is_file():
        config["latent_scale"] = read_json(vae).get("scaling_factor", VAEParameters.scaling_factor)
    return config


# --- what weights show -----------------------------------------------------------------------------------------------


def transformer_config(
    shapes: Shapes, source: Any, carried: Mapping[str, Any] | None = None, asked: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the whole configuration of a transformer.

    Args:
        shapes: Clean name -> shape of all its weights.
        source: The file, for messages.
        carried: What the file says (`carried_config`).
        asked: Options of the user; of these the fields in `ASKED` win over the file. New windows have one proxy each.

    Raises:
        ConversionError: The number of heads is neither given nor known for this width, or does not divide it.
    """
    given = dict(carried or {})
    asked = {name: asked[name] for name in ASKED if asked.get(name)} if asked else {}
    if "window_size" in asked:
        given.pop("proxy_ratio", None)
    given |= asked
    config = infer_transformer(shapes, given)
    width, heads = config["attention_head_dim"], given.get("num_attention_heads")
    if heads is None and width not in KNOWN_SIZES:
        known = ", ".join(f"{known} ({size.heads} heads)" for known, size in KNOWN_SIZES.items())
        raise ConversionError(
            f"{source}: weights do not show the number of heads, and width {width} is no known size; known: {known}. "
            "Give it with --num-heads, in Python with num_attention_heads=, or in ComfyUI load the model's folder "
            "with PT-DiT Folder Loader."
        )
    heads = heads or KNOWN_SIZES[width].heads
    if width % heads:
        nearest = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - heads))
        raise ConversionError(
            f"{source}: num_attention_heads={heads} does not divide the width {width}; nearest: {nearest}"
        )
    return config | {"num_attention_heads": heads, "attention_head_dim": width // heads}


def loaded_transformer_config(
    state_dict: Mapping[str, Tensor], key_prefix: str = "", metadata: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """Return the configuration of a transformer that a host has loaded, None if these are weights of another model.

    Args:
        state_dict: Given name -> tensor; values are not read, so weights may be quantized.
        key_prefix: What the host itself puts before all names of the network.
        metadata: As in `carried_config`.

    Returns:
        The fields of `PTDiTParameters` and `SAMPLING_FIELDS`.

    Raises:
        ConversionError: As in `transformer_config`.
    """
    given = {name[len(key_prefix) :]: value for name, value in state_dict.items() if name.startswith(key_prefix)}
    if not is_transformer(given):
        return None
    weights = {clean: given[name] for clean, name in clean_names(given).items()}
    carried = carried_config(weights, metadata)
    parameters = PTDiTParameters.from_config(transformer_config(shapes_of(weights), "this file", carried))
    return asdict(parameters) | {name: carried.get(name, default) for name, default in SAMPLING_FIELDS.items()}


def loaded_vae_config(
    state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """Return the configuration of a VAE that a host has loaded, None if these are weights of another model."""
    weights = {clean: state_dict[name] for clean, name in clean_names(state_dict).items()}
    if VAE_SIGNATURE not in weights:
        return None
    return infer_vae(shapes_of(weights), carried_config(weights, metadata, "vae"))


def infer_transformer(shapes: Shapes, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the configuration of a transformer with weights of these shapes, all of its width in one head.

    Where shapes make no sense, values are those of the released model, so that `check_weights` can name what is wrong.

    Weights show `sample_size` by the position buffer, which has one position for each token of that size. Without the
    buffer, size conditions mean 128: the official code has them at no other size.

    Args:
        shapes: Clean name -> shape of all weights.
        given: Wins over what is inferred; heads and what is for sampling are ignored.
    """
    released = PTDiTParameters()
    width = length(shapes, "pos_embed.proj.weight", 0, released.dim)
    patch = length(shapes, "pos_embed.proj.weight", 2, released.patch_size) or released.patch_size
    conditions = SIZE_CONDITIONS in shapes
    sample_size = SIZE_CONDITIONS_AT if conditions else released.sample_size
    if POSITION_BUFFER in shapes:
        sample_size = math.isqrt(length(shapes, POSITION_BUFFER, 2, 0)) * patch or sample_size
    config = {
        "in_channels": length(shapes, "pos_embed.proj.weight", 1, released.in_channels),
        "out_channels": max(1, length(shapes, "proj_out.weight", 0, 32) // patch**2),
        "num_layers": count(shapes, "transformer_blocks.") or released.num_layers,
        "patch_size": patch,
        "sample_size": sample_size,
        "sample_frames": length(shapes, POSITION_BUFFER, 1, released.sample_frames),
        "caption_channels": length(shapes, "caption_projection.linear_1.weight", 1, released.caption_channels),
        "window_size": released.window_size,
        "shift_window": any(".attn3." in name for name in shapes) or not any(".attn1." in name for name in shapes),
        "use_additional_conditions": conditions,
    }
    config |= {name: value for name, value in (given or {}).items() if name not in SAMPLING_FIELDS}
    config.setdefault("proxy_ratio", config["window_size"])
    return config | {
        "num_attention_heads": 1,
        "attention_head_dim": width if width and width % 16 == 0 else released.dim,
    }


def infer_vae(shapes: Shapes, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the configuration of a VAE with weights of these shapes; what is given wins over what is inferred."""
    released = VAEParameters()
    hidden = length(shapes, "encoder.conv_in.weight", 0, released.hidden_size) or released.hidden_size
    widths = []
    for level in range(4):
        name = f"encoder.down.{level}.block.0.conv1."
        widths.append(next((shape[0] for key, shape in shapes.items() if key.startswith(name)), hidden))
    return {
        "in_channels": length(shapes, "encoder.conv_in.weight", 1, released.in_channels),
        "out_channels": length(shapes, "decoder.conv_out.conv.weight", 0, released.out_channels),
        "hidden_size": hidden,
        "hidden_size_mult": tuple(max(1, width // hidden) for width in widths),
        "z_channels": length(shapes, "post_quant_conv.conv.weight", 0, released.z_channels),
        "num_res_blocks": count(shapes, "encoder.down.0.block.") or released.num_res_blocks,
        **(given or {}),
    }


def length(shapes: Shapes, name: str, axis: int, default: int) -> int:
    """Return the length of one axis of a weight, or a default if the weight is missing or has too few axes."""
    shape = shapes.get(name, ())
    return shape[axis] if axis < len(shape) else default


def count(shapes: Shapes, prefix: str) -> int:
    """Return the number of members `prefix`0, `prefix`1, ...; one that is missing in between counts.

    Raises:
        ConversionError: There are more than `MOST_LAYERS`.
    """
    numbers = {name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)}
    if len(numbers) > MOST_LAYERS:
        raise ConversionError(f"the weights have {len(numbers)} members {prefix}N; at most {MOST_LAYERS} are read")
    found = {int(number) for number in numbers if number.isdecimal() and len(number) < 6}
    return min(max(found) + 1, 2 * len(found)) if found else 0
