"""Configurations of transformer and VAE, inferred from the shapes of their weights and then checked strictly.

What weights do not tell (heads, windows) comes from the caller or from the known sizes. It must not know file formats.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ptdit_diffusers.core.checkpoint_names import POSITION_BUFFER, ConversionError, Shapes, check_weights
from ptdit_diffusers.core.configuration import EXTRA_CONDITIONS, infer_transformer, infer_vae, known_heads
from ptdit_diffusers.core.sizes import KNOWN_SIZES, RELEASED_WINDOW

from ..models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan, official_vae_state_dict
from ..models.transformer_ptdit import PTDiTTransformer3DModel
from .containers import Weights

Triple = tuple[int, int, int]


@dataclass
class Part:
    """One component of the folder that will be written: its weights, its model without memory, what to say of it."""

    folder: str
    stem: str
    weights: Weights
    model: Any
    facts: list[str] = field(default_factory=list)


def plan_transformer(
    path: Path, num_heads: int | None, window_size: Triple | None, proxy_ratio: Triple | None
) -> Part:
    """Open a transformer checkpoint, infer its configuration, check all its weights.

    Args:
        num_heads: None takes those of the known size of that width.
        window_size, proxy_ratio: Tokens (frames, rows, columns); None takes the released model's windows, and one
            proxy per window.

    Raises:
        ConversionError: The file cannot be read, or does not hold exactly such a transformer.
    """
    weights, config = open_transformer(path)
    dim = config["attention_head_dim"]
    heads = num_heads or known_heads(path, dim)
    if dim % heads:
        legal = min((n for n in range(1, dim + 1) if dim % n == 0), key=lambda n: abs(n - heads))
        raise ConversionError(f"--num-heads {heads} does not divide the width {dim}; nearest: {legal}")
    config |= {"num_attention_heads": heads, "attention_head_dim": dim // heads}
    config["window_size"] = window_size or RELEASED_WINDOW
    config["proxy_ratio"] = proxy_ratio or config["window_size"]
    part = Part("transformer", "diffusion_pytorch_model", weights, build(PTDiTTransformer3DModel, config))
    part.facts = describe_transformer(part, num_heads, window_size, proxy_ratio)
    return part


def open_transformer(path: Path, given: dict[str, Any] | None = None) -> tuple[Weights, dict[str, Any]]:
    """Open a transformer checkpoint and check all its weights against a configuration.

    Returns:
        The weights without the position buffer, and the configuration: the given one, else what their shapes tell.

    Raises:
        ConversionError: The file cannot be read, or does not hold exactly such a transformer.
    """
    weights = Weights(path)
    config = given or infer_transformer(weights.shapes)
    model = build(PTDiTTransformer3DModel.from_config, {"config": config})
    sizes = model.config
    dim = sizes.num_attention_heads * sizes.attention_head_dim
    what = f"a PT-DiT transformer of width {dim} with {sizes.num_layers} layers"
    expected = shapes_of(model)
    if POSITION_BUFFER in weights.shapes:  # checked, then left out
        tokens = (sizes.sample_size // sizes.patch_size) ** 2
        expected[POSITION_BUFFER] = (1, sizes.sample_frames, tokens, dim)
    check_weights(path, what, expected, weights.shapes)
    weights.rename({name: name for name in weights.facts if name != POSITION_BUFFER})
    return weights, config


def describe_transformer(
    part: Part, num_heads: int | None, window_size: Triple | None, proxy_ratio: Triple | None
) -> list[str]:
    """What was inferred, in words."""
    config = part.model.config
    dim = config.num_attention_heads * config.attention_head_dim
    size = KNOWN_SIZES.get(dim)
    heads = "as asked" if num_heads else f"those of PT-DiT/{size.name}"
    layers = f" (PT-DiT/{size.name} has {size.layers})" if size and size.layers != config.num_layers else ""
    shift = "with" if config.shift_window else "without"
    extra = "with" if EXTRA_CONDITIONS in part.weights.facts else "without"
    window, ratio = ("x".join(map(str, triple)) for triple in (config.window_size, config.proxy_ratio))
    return [
        f"{weights_in_words(part)}; width {dim}, {config.num_layers} layers{layers}, text width "
        f"{config.caption_channels}, latent channels {config.in_channels} in, {config.out_channels} out, {shift} "
        f"shifted windows, {extra} size conditions",
        f"transformer: {config.num_attention_heads} heads ({heads}); windows {window} "
        f"({'as asked' if window_size else 'the released ones'}), proxy ratio {ratio} "
        f"({'as asked' if proxy_ratio else 'one proxy per window'}): these are not in the weights",
    ]


def plan_vae(path: Path) -> Part:
    """Open a VAE checkpoint, infer its configuration, check all its weights.

    Raises:
        ConversionError: The file cannot be read, or does not hold exactly such a VAE.
    """
    weights, config = open_vae(path)
    part = Part("vae", "diffusion_pytorch_model", weights, build(AutoencoderKLOpenSoraPlan, config))
    part.facts = [f"{weights_in_words(part)}; {part.model.config.z_channels} latent channels, scale 0.18215"]
    return part


def open_vae(path: Path, given: dict[str, Any] | None = None) -> tuple[Weights, dict[str, Any]]:
    """Open a VAE checkpoint and check all its weights against a configuration.

    Returns:
        The weights without those of training losses, and the configuration: the given one, else what shapes tell.

    Raises:
        ConversionError: The file cannot be read, or does not hold exactly such a VAE.
    """
    weights = Weights(path)
    try:
        weights.rename(official_vae_state_dict({name: name for name in weights.facts}))
    except ValueError:
        pass  # another model; the check below says more
    config = given or infer_vae(weights.shapes)
    try:
        model = build(AutoencoderKLOpenSoraPlan.from_config, {"config": config})
    except ValueError:  # widths that no such VAE can have
        model = build(AutoencoderKLOpenSoraPlan, {})
    what = f"the causal VAE of Open-Sora-Plan with {model.config.hidden_size} channels"
    check_weights(path, what, shapes_of(model), weights.shapes)
    return weights, config


def weights_in_words(part: Part) -> str:
    """How much there is, and where in the file it was."""
    values = sum(math.prod(facts.shape) for facts in part.weights.facts.values())
    formats = sorted({str(facts.dtype).removeprefix("torch.") for facts in part.weights.facts.values()})
    nesting = f" under {'.'.join(part.weights.nesting)!r}" if part.weights.nesting else ""
    name = part.folder.replace("_", " ")
    return f"{name}: {part.weights.path}{nesting}, {values:,} values in {' and '.join(formats)}"


def build(model_class: Callable[..., Any], config: dict[str, Any]) -> Any:
    """A model that has shapes but no memory."""
    with torch.device("meta"):
        return model_class(**config)


def shapes_of(model: torch.nn.Module) -> Shapes:
    """Name -> shape of all weights of a model."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}
