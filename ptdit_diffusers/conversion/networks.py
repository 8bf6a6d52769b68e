"""Open checkpoints of transformer and VAE: configuration from the file, strict check of all weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ptdit_diffusers.core.checkpoint_names import (
    POSITION_BUFFER,
    ConversionError,
    Shapes,
    check_weights,
    shapes_of,
    transformer_names,
    vae_names,
)
from ptdit_diffusers.core.configuration import infer_transformer, infer_vae, transformer_config
from ptdit_diffusers.core.sizes import KNOWN_SIZES

from ..models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ..models.transformer_ptdit import PTDiTTransformer3DModel
from .containers import Weights

Triple = tuple[int, int, int]
Config = dict[str, Any]


@dataclass
class Part:
    """One component of the folder that will be written.

    Attributes:
        folder: Name of its folder.
        stem: Name of its weight files, without number and ending.
        weights: Its weights, not read yet.
        model: Its model, without memory.
        facts: Lines to report about it.
    """

    folder: str
    stem: str
    weights: Weights
    model: Any
    facts: list[str] = field(default_factory=list)


def plan_transformer(
    path: Path, num_heads: int | None, window_size: Triple | None, proxy_ratio: Triple | None
) -> Part:
    """Open a transformer checkpoint, find its configuration, check all its weights.

    Args:
        num_heads: None takes those that the file carries, else those of the known size of that width.
        window_size, proxy_ratio: Tokens (frames, rows, columns); None takes what the file carries, else the released
            model's windows, and one proxy per window.

    Raises:
        ConversionError: The file cannot be read, or does not hold exactly such a transformer.
    """
    asked = {"num_attention_heads": num_heads, "window_size": window_size, "proxy_ratio": proxy_ratio}
    weights, config = open_transformer(path, asked=asked)
    part = Part("transformer", "diffusion_pytorch_model", weights, build(PTDiTTransformer3DModel, config))
    part.facts = describe_transformer(part, asked)
    return part


def open_transformer(path: Path, config: Config | None = None, asked: Config | None = None) -> tuple[Weights, Config]:
    """Open a transformer checkpoint and check all its weights.

    Args:
        path: The file.
        config: The whole configuration; None finds it.
        asked: Options of the user; see `transformer_config`.

    Returns:
        The weights without the position buffer, and the whole configuration.

    Raises:
        ConversionError: The file cannot be read, or does not hold exactly such a transformer.
    """
    weights = Weights(path)
    shapes = weights.shapes
    weights.rename(transformer_names(shapes))
    if config is None:
        return weights, checked_config(path, shapes, weights.carried_config("transformer"), asked)
    check_transformer(path, shapes, config)
    return weights, config


def checked_config(path: Path, shapes: Shapes, carried: Config, asked: Config | None) -> Config:
    """Return the whole configuration of a transformer after a check of all shapes; see `transformer_config`."""
    check_transformer(path, shapes, infer_transformer(shapes, carried))
    return transformer_config(shapes, path, carried, asked)


def check_transformer(path: Path, shapes: Shapes, config: Config) -> None:
    """Check that shapes, those of a position buffer included, are those of a transformer with this configuration.

    Raises:
        ConversionError: They are not.
    """
    model = build_for(path, PTDiTTransformer3DModel, config)
    sizes = model.config
    dim = sizes.num_attention_heads * sizes.attention_head_dim
    expected = shapes_of(model.state_dict())
    if POSITION_BUFFER in shapes:
        tokens = (sizes.sample_size // sizes.patch_size) ** 2
        expected[POSITION_BUFFER] = (1, sizes.sample_frames, tokens, dim)
    check_weights(path, f"a PT-DiT transformer of width {dim} with {sizes.num_layers} layers", expected, shapes)


def describe_transformer(part: Part, asked: Config) -> list[str]:
    """Return lines that say what was found, and where."""
    config, carried = part.model.config, part.weights.carried_config("transformer")
    dim = config.num_attention_heads * config.attention_head_dim
    size = KNOWN_SIZES.get(dim)

    def origin(name: str, otherwise: str) -> str:
        return "as asked" if asked[name] else "as in the file" if name in carried else otherwise

    heads = origin("num_attention_heads", f"those of PT-DiT/{size.name}" if size else "")
    layers = f" (PT-DiT/{size.name} has {size.layers})" if size and size.layers != config.num_layers else ""
    shift = "with" if config.shift_window else "without"
    extra = "with" if part.model.additional_conditions else "without"
    window, ratio = ("x".join(map(str, triple)) for triple in (config.window_size, config.proxy_ratio))
    return [
        f"{weights_in_words(part)}; width {dim}, {config.num_layers} layers{layers}, text width "
        f"{config.caption_channels}, latent channels {config.in_channels} in, {config.out_channels} out, {shift} "
        f"shifted windows, {extra} size conditions",
        f"transformer: {config.num_attention_heads} heads ({heads}); windows {window} "
        f"({origin('window_size', 'the released ones')}), proxy ratio {ratio} "
        f"({origin('proxy_ratio', 'one proxy per window')}): weights do not show these",
    ]


def plan_vae(path: Path, scale: float | None = None) -> Part:
    """Open a VAE checkpoint, find its configuration, check all its weights.

    Args:
        scale: Scale of latents that the transformer carries; a scale in the VAE's own file wins.

    Raises:
        ConversionError: The file cannot be read, or does not hold exactly such a VAE.
    """
    weights, config = open_vae(path)
    if scale is not None:
        config = {"scaling_factor": scale} | config
    part = Part("vae", "diffusion_pytorch_model", weights, build(AutoencoderKLOpenSoraPlan, config))
    z_channels, scale = part.model.config.z_channels, part.model.config.scaling_factor
    part.facts = [f"{weights_in_words(part)}; {z_channels} latent channels, scale {scale}"]
    return part


def open_vae(path: Path, config: Config | None = None, asked: Config | None = None) -> tuple[Weights, Config]:
    """Open a VAE checkpoint and check all its weights.

    Args:
        path: The file.
        config: The whole configuration; None finds it.
        asked: Options of the user; of these `norm_num_groups` and `scaling_factor` win over the file.

    Returns:
        The weights without those of training losses, and the configuration.

    Raises:
        ConversionError: The file cannot be read, or does not hold exactly such a VAE.
    """
    weights = Weights(path)
    weights.rename(vae_names(weights.facts))
    asked = {name: asked[name] for name in ("norm_num_groups", "scaling_factor") if asked and asked.get(name)}
    config = config or infer_vae(weights.shapes, weights.carried_config("vae") | asked)
    model = build_for(path, AutoencoderKLOpenSoraPlan, config)
    what = f"the causal VAE of Open-Sora-Plan with {model.config.hidden_size} channels"
    check_weights(path, what, shapes_of(model.state_dict()), weights.shapes)
    return weights, config


def weights_in_words(part: Part) -> str:
    """Return how many values a component has, in which format, and where in the file they are."""
    values = sum(math.prod(facts.shape) for facts in part.weights.facts.values())
    formats = sorted({str(facts.dtype).removeprefix("torch.") for facts in part.weights.facts.values()})
    nesting = f" under {'.'.join(part.weights.nesting)!r}" if part.weights.nesting else ""
    name = part.folder.replace("_", " ")
    return f"{name}: {part.weights.path}{nesting}, {values:,} values in {' and '.join(formats)}"


def build_for(path: Path, model_class: Any, config: Config) -> Any:
    """Build a model of diffusers or transformers without memory for the weights in a file or folder.

    Raises:
        ConversionError: There is no model with such a configuration.
    """
    try:
        return build(getattr(model_class, "from_config", model_class), {"config": config})
    except Exception as error:  # of many kinds: the configuration may hold anything
        raise ConversionError(f"{path}: there is no {model_class.__name__} of this configuration: {error}") from error


def build(model_class: Callable[..., Any], config: dict[str, Any]) -> Any:
    """Build a model that has shapes but no memory."""
    with torch.device("meta"):
        return model_class(**config)
