"""Names of weights in checkpoints: nestings, prefixes, strict comparison, and what kind of model names belong to.

It must not know files or configurations.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

POSITION_BUFFER = "pos_embed.pos_embed"  # computed by our model, so it is never kept
PREFIXES = ("module.", "model.", "_orig_mod.")
# Averaged weights go first: they are what a training checkpoint is meant to be sampled with.
NESTINGS = ("ema_state_dict", "state_dict_ema", "ema", "model_ema", "model", "state_dict", "gen_model", "module")
LISTED = 10  # names in a message

# What kind of model a checkpoint seems to be, by a name that only that kind has; the first that matches counts.
KINDS = (
    (r"(^|\.)(lora_(A|B|up|down|unet|te)|hada_w)", "a LoRA"),
    (r"\.(scale_weight|weight_scale|scale_input)$|^scaled_fp8$", "a scaled fp8 copy, which needs its scales"),
    (r"transformer_blocks\.\d+\.proxy_attn1\.", "a PT-DiT transformer"),
    (r"encoder\.mid\.attn_1\.q\.conv\.weight", "the VAE of Open-Sora-Plan"),
    (r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.", "a T5 text encoder"),
    (r"text_model\.encoder\.layers\.", "a CLIP text encoder"),
    (r"encoder\.mid\.attn_1\.q\.weight|encoder\.mid_block\.attentions\.", "a VAE of Stable Diffusion's kind"),
    (r"patch_embed\.text_proj|transformer\.layers\.\d+\.attention\.query_key_value|mixins\.patch_embed", "CogVideoX"),
    (r"double_blocks\.\d+|single_transformer_blocks\.\d+", "Flux or HunyuanVideo"),
    (r"joint_blocks\.\d+|context_embedder\.", "Stable Diffusion 3"),
    (r"input_blocks\.\d+|down_blocks\.\d+\.resnets\.", "a Stable Diffusion UNet"),
    (r"temporal_transformer_blocks\.\d+", "Latte or Open-Sora-Plan 1.0"),
    (r"spatial_blocks\.\d+", "Open-Sora"),
    (r"patchify_proj\.", "LTX-Video"),
    (r"blocks\.\d+\.self_attn\.norm_q|time_projection\.", "Wan"),
    (r"blocks\.\d+\.cross_attn\.q_linear|y_embedder\.y_embedding", "PixArt"),
    (r"^transformer_blocks\.\d+\.attn2\.|^adaln_single\.", "PixArt, or another model with its layout"),
    (r"^blocks\.\d+\.adaLN_modulation\.", "DiT"),
)

Shapes = dict[str, tuple[int, ...]]


class ConversionError(ValueError):
    """A file cannot be converted; the text says which file and why."""


def find_weights(content: Mapping[str, Any], path: tuple[str, ...] = ()) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Find the named tensors in a loaded checkpoint, however they are nested.

    Returns:
        The names of the nestings that lead to them, outermost first, and name -> tensor (empty if there is none).
    """
    for name in NESTINGS:
        inner = content.get(name)
        if isinstance(inner, Mapping) and inner:
            found = find_weights(inner, (*path, name))
            if found[1]:
                return found
    return path, {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """Take off what wrappers put before names.

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


def official_transformer_state_dict(checkpoint: Mapping[str, Any], **_: Any) -> dict[str, Any]:
    """Weights of a loaded single file under our names: unwrapped, and without the position buffer."""
    weights = find_weights(checkpoint)[1]
    return {clean: weights[name] for clean, name in clean_names(weights).items() if clean != POSITION_BUFFER}


def kind_of(names: Iterable[str]) -> str | None:
    """What kind of model weights of these names seem to belong to, or None."""
    names = list(names)
    for pattern, kind in KINDS:
        if any(re.search(pattern, name) for name in names):
            return kind
    return None


def check_weights(source: Any, what: str, expected: Shapes, found: Shapes) -> None:
    """Refuse weights that are not exactly those expected.

    Args:
        source: The file, for the message.
        what: What the weights should be, for the message.
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
