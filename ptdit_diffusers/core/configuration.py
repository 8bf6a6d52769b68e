"""What a file says about itself: the configuration of a network, inferred from names and shapes of its weights.

It must not know file formats, diffusers or ComfyUI.
"""

import math
from pathlib import Path
from typing import Any

from .checkpoint_names import POSITION_BUFFER, ConversionError, Shapes
from .sizes import KNOWN_SIZES

EXTRA_CONDITIONS = "adaln_single.emb.resolution_embedder.linear_1.weight"


def infer_transformer(shapes: Shapes) -> dict[str, Any]:
    """Configuration of a transformer with weights of these shapes; where they do not fit, the released one's values.

    The width is given as one head, because heads leave no trace in the weights.
    """
    dim = length(shapes, "pos_embed.proj.weight", 0, 1152)
    dim = dim if dim and dim % 16 == 0 else 1152
    patch = length(shapes, "pos_embed.proj.weight", 2, 2) or 2
    extra = EXTRA_CONDITIONS in shapes
    sample_size, frames = 128 if extra else 32, 1
    if POSITION_BUFFER in shapes:
        frames = length(shapes, POSITION_BUFFER, 1, 1)
        sample_size = math.isqrt(length(shapes, POSITION_BUFFER, 2, 256)) * patch
    return {
        "num_attention_heads": 1,
        "attention_head_dim": dim,
        "in_channels": length(shapes, "pos_embed.proj.weight", 1, 4),
        "out_channels": max(1, length(shapes, "proj_out.weight", 0, 32) // patch**2),
        "num_layers": count(shapes, "transformer_blocks.") or 28,
        "patch_size": patch,
        "sample_size": sample_size,
        "sample_frames": frames,
        "caption_channels": length(shapes, "caption_projection.linear_1.weight", 1, 4096),
        "shift_window": any(".attn3." in name for name in shapes) or not any(".attn1." in name for name in shapes),
        "use_additional_conditions": None if extra == (sample_size == 128) else extra,
    }


def known_heads(path: Path, dim: int) -> int:
    """Heads of the known size with this width."""
    if dim in KNOWN_SIZES:
        return KNOWN_SIZES[dim].heads
    known = ", ".join(f"{width} ({size.heads} heads)" for width, size in KNOWN_SIZES.items())
    raise ConversionError(
        f"{path}: weights do not tell the number of heads, and width {dim} is no known size; known: {known}. "
        "Say it with --num-heads, in Python with num_attention_heads="
    )


def infer_vae(shapes: Shapes) -> dict[str, Any]:
    """Configuration of a VAE with weights of these shapes."""
    hidden = length(shapes, "encoder.conv_in.weight", 0, 128) or 128
    widths = []
    for level in range(4):
        name = f"encoder.down.{level}.block.0.conv1."
        widths.append(next((shape[0] for key, shape in shapes.items() if key.startswith(name)), hidden))
    return {
        "in_channels": length(shapes, "encoder.conv_in.weight", 1, 3),
        "out_channels": length(shapes, "decoder.conv_out.conv.weight", 0, 3),
        "hidden_size": hidden,
        "hidden_size_mult": tuple(max(1, width // hidden) for width in widths),
        "z_channels": length(shapes, "post_quant_conv.conv.weight", 0, 4),
        "num_res_blocks": count(shapes, "encoder.down.0.block.") or 2,
    }


def length(shapes: Shapes, name: str, axis: int, default: int) -> int:
    """Length of one axis of a weight, or a default if the weight is missing or has not so many axes."""
    shape = shapes.get(name, ())
    return shape[axis] if axis < len(shape) else default


def count(shapes: Shapes, prefix: str) -> int:
    """Number of members `prefix`0, `prefix`1, ...; one that is missing in between counts."""
    numbers = {name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)}
    found = {int(number) for number in numbers if number.isdecimal() and len(number) < 6}
    return min(max(found) + 1, 2 * len(found)) if found else 0
