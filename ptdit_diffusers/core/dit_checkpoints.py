"""Checkpoints of DiT: the names of diffusers' own class, copies that must agree, configurations inferred from shapes.

Independent of file formats.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .backbones.dit_parameters import SIZES, ClassParameters
from .checkpoint_names import ConversionError, Shapes, clean_names, find_weights
from .configuration import count, length

OFFICIAL_SIGNATURE = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight")
DIFFIT_SIGNATURE = "blocks.0.attn.qkv_temb.weight"  # DiffiT has the names of DiT, and this one
DIFFUSERS_SIGNATURE = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
POSITION_TABLE = "pos_embed"
KNOWN_HEADS = {width: heads for _, width, heads in SIZES.values()}  # width -> heads

# Names of diffusers' DiTTransformer2DModel -> official names, without the ending .weight or .bias.
OUTSIDE_BLOCKS = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
IN_BLOCKS = {  # queries, keys and values are rows of one official weight, in this order
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_q": "attn.qkv",
    "attn1.to_k": "attn.qkv",
    "attn1.to_v": "attn.qkv",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
COPIED_IN_BLOCKS = {
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
}
DIFFUSERS_NAME = re.compile(r"(transformer_blocks\.(?P<block>\d+)\.)?(?P<layer>.+)\.(?P<kind>weight|bias)")

Sources = dict[str, list[str]]


def is_dit(names: Iterable[str]) -> bool:
    """Return whether weights of these names are a DiT's, under official names or those of diffusers' class."""
    names = set(names)
    if DIFFUSERS_SIGNATURE in names:
        return True
    return names.issuperset(OFFICIAL_SIGNATURE) and DIFFIT_SIGNATURE not in names


def diffusers_sources(names: Iterable[str]) -> tuple[Sources, Sources]:
    """Return where official weights are in a state dict of diffusers' class.

    Args:
        names: All names of the state dict.

    Returns:
        Official name -> the weights whose rows it consists of, in order; and official name -> its copies, one of each
        block, which must all be equal. Unknown names stand for themselves.
    """
    joined: dict[str, dict[str, str]] = {}  # official name -> layer -> given name
    copies: dict[str, dict[int, str]] = {}  # official name -> block -> given name
    for name in names:
        match = DIFFUSERS_NAME.fullmatch(name)
        block, layer, kind = match.group("block", "layer", "kind") if match else (None, name, None)
        if block is None and layer in OUTSIDE_BLOCKS:
            joined[f"{OUTSIDE_BLOCKS[layer]}.{kind}"] = {layer: name}
        elif block is not None and layer in IN_BLOCKS:
            joined.setdefault(f"blocks.{block}.{IN_BLOCKS[layer]}.{kind}", {})[layer] = name
        elif block is not None and layer in COPIED_IN_BLOCKS:
            copies.setdefault(f"{COPIED_IN_BLOCKS[layer]}.{kind}", {})[int(block)] = name
        else:
            joined[name] = {layer: name}
    order = [*IN_BLOCKS]
    sources = {
        official: [layers[layer] for layer in sorted(layers, key=lambda one: order.index(one) if one in order else 0)]
        for official, layers in joined.items()
    }
    of_blocks = {official: [blocks[block] for block in sorted(blocks)] for official, blocks in copies.items()}
    return sources | {official: names[:1] for official, names in of_blocks.items()}, of_blocks


def check_copies(source: Any, copies: Sources, read: Callable[[str], Tensor]) -> None:
    """Check that the blocks of diffusers' class share one embedding of timestep and class.

    Args:
        source: The file, for the message.
        copies: Official name -> its copies in the blocks.
        read: Gives the weight of a name.

    Raises:
        ConversionError: A copy differs; names the first such block.
    """
    for official, (first, *others) in copies.items():
        reference = read(first)
        for name in others:
            if not torch.equal(read(name), reference):
                raise ConversionError(
                    f"{source}: {name} differs from that of block 0, so this is no DiT but a fine-tuned copy of "
                    f"diffusers' class, whose blocks were trained apart: the official model has one {official} for all"
                )


def official_state_dict(weights: Mapping[str, Tensor], source: Any = "the file") -> dict[str, Tensor]:
    """Return weights under official names, whichever of the two forms they have.

    Raises:
        ConversionError: Copies of diffusers' form differ.
    """
    if DIFFUSERS_SIGNATURE not in weights:
        return dict(weights)
    sources, copies = diffusers_sources(weights)
    check_copies(source, copies, weights.__getitem__)
    joined = {}
    for official, members in sources.items():
        tensors = [weights[name] for name in members]
        joined[official] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return joined


def single_file_dit(checkpoint: Mapping[str, Any], **_: Any) -> dict[str, Tensor]:
    """Return the weights of a loaded checkpoint, nested or not, under official names."""
    weights = find_weights(checkpoint)[1]
    return official_state_dict({clean: weights[name] for clean, name in clean_names(weights).items()})


def official_shapes(shapes: Shapes) -> Shapes:
    """Return the shapes that weights have under official names, whichever of the two forms they have."""
    if DIFFUSERS_SIGNATURE not in shapes:
        return shapes
    return {
        official: (sum(shapes[name][0] for name in members), *shapes[members[0]][1:])
        for official, members in diffusers_sources(shapes)[0].items()
    }


def dit_config(shapes: Shapes, source: Any, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the configuration of a DiT with weights of these shapes.

    Where shapes make no sense, values are those of the released model, so that `check_weights` can name what is wrong.

    Args:
        shapes: Official name -> shape.
        source: The file, for messages.
        given: Wins over what is inferred; without heads here the width must be a known one.

    Raises:
        ConversionError: The number of heads is neither given nor known for this width, or does not divide it.
    """
    given = dict(given or {})
    width = length(shapes, "x_embedder.proj.weight", 0, ClassParameters().dim)
    heads = given.pop("num_attention_heads", None) or KNOWN_HEADS.get(width)
    if heads is None:
        known = ", ".join(f"{width} ({heads} heads)" for width, heads in KNOWN_HEADS.items())
        raise ConversionError(
            f"{source}: weights do not show the number of heads, and width {width} is no known size; known: {known}. "
            "Give it with --num-heads, in Python with num_attention_heads=, or in ComfyUI load the model's folder "
            "with PT-DiT Folder Loader."
        )
    if width % heads:
        nearest = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - heads))
        raise ConversionError(
            f"{source}: num_attention_heads={heads} does not divide the width {width}; nearest: {nearest}"
        )
    inferred = inferred_sizes(shapes) | {"block_type": block_type(shapes)}
    return inferred | given | {"num_attention_heads": heads, "attention_head_dim": width // heads}


def inferred_sizes(shapes: Shapes) -> dict[str, Any]:
    """Return what the shapes of official names show about any class-conditional transformer, except its heads."""
    released = ClassParameters()
    patch = length(shapes, "x_embedder.proj.weight", 2, released.patch_size) or released.patch_size
    rows = length(shapes, "y_embedder.embedding_table.weight", 0, released.num_classes + 1)
    return {
        "num_layers": count(shapes, "blocks.") or released.num_layers,
        "patch_size": patch,
        "in_channels": length(shapes, "x_embedder.proj.weight", 1, released.in_channels),
        "out_channels": max(1, length(shapes, "final_layer.linear.weight", 0, 32) // patch**2),
        "sample_size": math.isqrt(length(shapes, POSITION_TABLE, 1, 0)) * patch or released.sample_size,
        "num_classes": max(1, rows - 1),
        "class_dropout_prob": released.class_dropout_prob,
    }


def block_type(shapes: Shapes) -> str:
    """Return the kind of the blocks, by the layers that only one kind has."""
    modulation = shapes.get("blocks.0.adaLN_modulation.1.bias")
    if modulation is not None:
        width = length(shapes, "x_embedder.proj.weight", 0, 1) or 1
        return "adaln" if modulation[0] == 4 * width else "adaln_zero"
    if "blocks.0.cross_attn.q.weight" in shapes:
        return "cross_attention"
    return "in_context" if "blocks.0.norm1.weight" in shapes else "adaln_zero"
