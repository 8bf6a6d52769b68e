"""Names of weights in checkpoints: nestings, prefixes, strict comparison, and which kind of model names belong to.

Independent of file formats and configurations.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

POSITION_BUFFER = "pos_embed.pos_embed"  # our model computes it, so it is never kept
PACKED_CONFIG = "ptdit_config"  # a uint8 tensor among the weights: the configuration as JSON
TRANSFORMER_SIGNATURE = "transformer_blocks.0.proxy_attn1.to_q.weight"
VAE_SIGNATURE = "encoder.mid.attn_1.q.conv.weight"
# What wrappers, trainers and pipelines put before names, in any order and number.
PREFIXES = ("module.", "model.", "_orig_mod.", "diffusion_model.", "transformer.")
# Averaged weights go first: they are the ones to sample with.
NESTINGS = ("ema_state_dict", "state_dict_ema", "ema", "model_ema", "model", "state_dict", "gen_model", "module")
DEEPEST = 8  # nestings; released files have two at most
LISTED = 10  # names in a message

# The kind of model that a checkpoint seems to hold, by a name that only this kind has; the first match counts.
KINDS = (
    (r"(^|\.)(lora_(A|B|up|down|unet|te)|hada_w)", "a LoRA"),
    (r"\.(scale_weight|weight_scale|scale_input)$|^scaled_fp8$", "a scaled fp8 copy, which needs its scales"),
    (r"transformer_blocks\.\d+\.proxy_attn1\.", "a PT-DiT transformer"),
    (r"encoder\.mid\.attn_1\.q\.conv\.weight", "the VAE of Open-Sora-Plan"),
    (r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.", "a T5 text encoder"),
    (r"text_model\.encoder\.layers\.", "a CLIP text encoder"),
    (r"encoder\.mid\.attn_1\.q\.weight|encoder\.mid_block\.attentions\.", "a VAE of Stable Diffusion's kind"),
    (r"patch_embed\.text_proj|(^|\.)layers\.\d+\.attention\.query_key_value|mixins\.patch_embed", "CogVideoX"),
    (r"double_blocks\.\d+|single_transformer_blocks\.\d+", "Flux or HunyuanVideo"),
    (r"joint_blocks\.\d+|context_embedder\.", "Stable Diffusion 3"),
    (r"input_blocks\.\d+|down_blocks\.\d+\.resnets\.", "a Stable Diffusion UNet"),
    (r"temporal_transformer_blocks\.\d+", "Latte or Open-Sora-Plan 1.0"),
    (r"spatial_blocks\.\d+", "Open-Sora"),
    (r"patchify_proj\.", "LTX-Video"),
    (r"blocks\.\d+\.self_attn\.norm_q|time_projection\.", "Wan"),
    (r"blocks\.\d+\.cross_attn\.q_linear|y_embedder\.y_embedding", "PixArt"),
    (r"^transformer_blocks\.\d+\.attn2\.|^adaln_single\.", "PixArt, or another model with its layout"),
    (r"^blocks\.\d+\.attn\.qkv_temb\.", "DiffiT"),
    (r"^y_embedder\.embedding_table|^blocks\.\d+\.adaLN_modulation\.|norm1\.emb\.class_embedder\.", "DiT"),
)

Shapes = dict[str, tuple[int, ...]]


class ConversionError(ValueError):
    """A file cannot be used; the text says which file and why."""


def find_weights(content: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Find the named tensors in a loaded checkpoint, however they are nested.

    Each mapping is looked at once, because those of a hostile file may hold each other.

    Returns:
        The names of the nestings that lead to them, outermost first, and name -> tensor (empty if there is none).
    """
    seen: set[int] = set()

    def search(content: Mapping[str, Any], path: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, Any]]:
        seen.add(id(content))
        for name in NESTINGS if len(path) < DEEPEST else ():
            inner = content.get(name)
            if isinstance(inner, Mapping) and inner and id(inner) not in seen:
                found = search(inner, (*path, name))
                if found[1]:
                    return found
        return path, {str(key): value for key, value in content.items() if isinstance(value, Tensor)}

    return search(content, ())


def check_tensors(source: Any, tensors: Mapping[str, Tensor]) -> None:
    """Check that weights are plain arrays of numbers, and no larger than what the file holds of them.

    Raises:
        ConversionError: One is sparse, nested, quantized by torch, without memory, or repeats its numbers.
    """
    for name, tensor in tensors.items():
        plain = not tensor.is_nested and tensor.layout is torch.strided and not tensor.is_quantized
        if not plain or tensor.device.type == "meta":
            raise ConversionError(f"{source}: {name} is no plain tensor, so the file was not made by saving a model")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ConversionError(f"{source}: {name} has {tensor.numel():,} values, of which the file holds fewer")


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """Remove the prefixes of wrappers.

    Returns:
        Clean name -> given name.

    Raises:
        ConversionError: Two given names mean the same weight.
    """
    cleaned: dict[str, str] = {}
    for name in names:
        clean = name
        while clean.startswith(PREFIXES):
            clean = clean.partition(".")[2]
        if clean in cleaned:
            raise ConversionError(f"{cleaned[clean]} and {name} in the file both stand for {clean}; keep one of them")
        cleaned[clean] = name
    return cleaned


def is_transformer(names: Iterable[str]) -> bool:
    """Return whether these are weights of a PT-DiT transformer, whichever known prefixes their names have."""
    return any(name.endswith(TRANSFORMER_SIGNATURE) and TRANSFORMER_SIGNATURE in clean_names([name]) for name in names)


def transformer_names(names: Iterable[str]) -> dict[str, str]:
    """Return clean name -> given name of a transformer's weights, without position buffer and packed configuration."""
    cleaned = clean_names(names)
    return {clean: name for clean, name in cleaned.items() if clean not in (POSITION_BUFFER, PACKED_CONFIG)}


def vae_names(names: Iterable[str]) -> dict[str, str]:
    """Return clean name -> given name of a VAE's weights, without those of training losses."""
    cleaned = clean_names(names)
    return {clean: name for clean, name in cleaned.items() if "loss" not in clean and clean != PACKED_CONFIG}


def official_transformer_state_dict(checkpoint: Mapping[str, Any], **_: Any) -> dict[str, Tensor]:
    """Return the weights of a loaded transformer checkpoint, nested or not, under the names of our model."""
    weights = find_weights(checkpoint)[1]
    return {clean: weights[name] for clean, name in transformer_names(weights).items()}


def official_vae_state_dict(checkpoint: Mapping[str, Any], **_: Any) -> dict[str, Tensor]:
    """Return the weights of a loaded VAE checkpoint, nested or not, under the names of our model.

    Raises:
        ConversionError: There are no weights of this VAE, so nothing would be loaded.
    """
    weights = find_weights(checkpoint)[1]
    names = vae_names(weights)
    if VAE_SIGNATURE not in names:
        found = ", ".join(list(names)[:5])
        raise ConversionError(f"no {VAE_SIGNATURE} in the checkpoint, so it is not this VAE; it starts with: {found}.")
    return {clean: weights[name] for clean, name in names.items()}


def shapes_of(weights: Mapping[str, Any]) -> Shapes:
    """Return name -> shape of weights."""
    return {name: tuple(value.shape) for name, value in weights.items()}


def kind_of(names: Iterable[str]) -> str | None:
    """Return the kind of model that weights of these names seem to belong to, or None."""
    names = list(names)
    for pattern, kind in KINDS:
        if any(re.search(pattern, name) for name in names):
            return kind
    return None


def check_weights(source: Any, what: str, expected: Shapes, found: Shapes) -> None:
    """Check that weights are exactly those expected.

    Args:
        source: The file, for the message.
        what: The model that the weights should belong to, for the message.
        expected, found: Name -> shape.

    Raises:
        ConversionError: Names the first ten missing, unexpected and misshapen weights, and the kind of model.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        f"{name} is {found[name]}, must be {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if not (missing or unexpected or misshapen):
        return
    kind = kind_of(found)
    parts = [f"{source} does not hold exactly the weights of {what}; it seems to be {kind or 'of an unknown kind'}"]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)):
        if names:
            more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
            parts.append(f"{len(names)} {title}: {', '.join(names[:LISTED])}{more}")
    raise ConversionError("; ".join(parts))
