"""The LoRA itself: which layers get one, its first values, and its weights with the scale folded in."""

import difflib
import logging
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors import SafetensorError
from torch import Tensor, nn

from ptdit_diffusers.core.few_steps import LORA_FILE
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.pipelines.ptdit_lora_text import TEXT_PREFIX
from ptdit_diffusers.training.checkpoint import checkpoints
from ptdit_diffusers.training.networks import Networks
from ptdit_diffusers.training.task import trained_parameters

from .config import TARGETS, LoRASettings
from .text_encoder import text_layers

logger = logging.getLogger("lora")

NAME = "default"  # of the adapter in the model
INITS = {"default": True, "gaussian": "gaussian", "pissa": "pissa", "olora": "olora"}  # ours -> peft's


def target_layers(transformer: nn.Module, targets: str) -> list[str]:
    """Return the full names of the Linear layers that get an adapter.

    Args:
        transformer: The model; it may be on the meta device.
        targets: A preset of `config.TARGETS`, ends of names with commas between them, or a regular expression for
            whole names.

    Raises:
        ValueError: A name or the expression matches no Linear layer.
    """
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    if re.fullmatch(r"[\w.,\s]*\w[\w.,\s]*", targets) and targets not in TARGETS:
        found: set[str] = set()
        for part in re.split(r"[,\s]+", targets.strip(" ,")):
            matching = {name for name in linear if f".{name}".endswith(f".{part}")}
            if not matching:
                ends = {name.split(".", 2)[-1] for name in linear}
                near = difflib.get_close_matches(part, ends | {e.rpartition(".")[2] for e in ends}, n=1, cutoff=0)
                raise ValueError(f"targets: {part!r} is no linear layer of the transformer; nearest: {near[0]!r}.")
            found |= matching
        return sorted(found)
    try:
        pattern = re.compile(TARGETS.get(targets, targets))
    except re.error as error:
        raise ValueError(f"targets={targets!r} is no regular expression: {error}.") from error
    matching = [name for name in linear if pattern.fullmatch(name)]
    if not matching:
        raise ValueError(f"targets={targets!r} matches no linear layer; whole names look like {linear[-2]!r}.")
    return matching


def layer_name(name: str) -> str:
    """Return the name of a layer or parameter of `Networks` as settings and files have it.

    In the transformer it is the transformer's own, in the text encoder it begins with TEXT_PREFIX.
    """
    return name.removeprefix("transformer.")


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a transformer or of `Networks` by their `layer_name`."""
    return {layer_name(name): module for name, module in model.named_modules()}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained by their `layer_name`."""
    return {layer_name(name): parameter for name, parameter in trained_parameters(model).items()}


def is_of_text(name: str) -> bool:
    """Return whether a layer, parameter or weight with such a `layer_name` belongs to the text encoder."""
    return name.startswith(TEXT_PREFIX)


def trained_layers(model: nn.Module, settings: LoRASettings) -> dict[str, nn.Linear]:
    """Return the layers of a transformer or of `Networks` that get an adapter, by name.

    Raises:
        ValueError: As `target_layers`.
    """
    both, named = isinstance(model, Networks), named_layers(model)
    names = target_layers(model.transformer if both else model, settings.targets)
    if both:
        names += [TEXT_PREFIX + name for name in text_layers(model.text_encoder, settings.targets)]
    return {name: named[name] for name in names}


def adapter_layers(
    config: dict, settings: LoRASettings, text_encoder: nn.Module | None = None
) -> dict[str, nn.Linear]:
    """Return the layers that get an adapter, by name, without loading weights: the model is built on the meta device.

    Args:
        config: Of the transformer.
        settings: Of the run.
        text_encoder: On the meta device, where it is trained, too.

    Raises:
        ValueError: As `target_layers`.
    """
    with torch.device("meta"):
        model = PTDiTTransformer3DModel.from_config(config)
    return trained_layers(model if text_encoder is None else Networks(model, text_encoder), settings)


def layer_ranks(layers: Iterable[str], settings: LoRASettings) -> dict[str, int]:
    """Return the rank of each layer: that of the last of `rank_pattern` that is found in its name, else `rank`.

    Layers of rank 0 are left out.

    Raises:
        ValueError: A pattern is found in no name, or all layers of a network have rank 0.
    """
    ranks = dict.fromkeys(layers, settings.rank)
    has_text = any(map(is_of_text, ranks))
    for pattern, rank in settings.rank_pattern.items():
        ranks |= dict.fromkeys(matching("rank_pattern", pattern, ranks), rank)
    ranks = {layer: rank for layer, rank in ranks.items() if rank}
    if all(map(is_of_text, ranks)):
        raise ValueError(f"rank_pattern={settings.rank_pattern} leaves no layer with a rank; nearest: 1 instead of 0.")
    if has_text and not any(map(is_of_text, ranks)):
        raise ValueError(
            f"rank_pattern={settings.rank_pattern} leaves no layer of the text encoder with a rank; nearest: "
            "train_text_encoder=False."
        )
    return ranks


def matching(setting: str, pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names in which a regular expression is found.

    Raises:
        ValueError: It is found in none, or is no regular expression.
    """
    names = list(names)
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise ValueError(f"{setting}: {pattern!r} is no regular expression: {error}.") from error
    if not found:
        near = difflib.get_close_matches(pattern, names, n=1, cutoff=0)[0]
        raise ValueError(f"{setting}: {pattern!r} is in no name of what is trained; nearest: {near!r}.")
    return found


def rate_factors(names: Iterable[str], settings: LoRASettings) -> dict[str, float]:
    """Return by which factor the learning rate of each parameter differs: the last of `lr_pattern` counts.

    Raises:
        ValueError: As `matching`.
    """
    factors = dict.fromkeys(names, 1.0)
    for pattern, factor in settings.lr_pattern.items():
        factors |= dict.fromkeys(matching("lr_pattern", pattern, factors), factor)
    return factors


def adapter_shapes(layers: Mapping[str, nn.Linear], settings: LoRASettings) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of a LoRA on these layers, under the names of `folded_weights`.

    Raises:
        ValueError: As `layer_ranks`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rank in layer_ranks(layers, settings).items():
        shapes[f"{name}.lora_A.weight"] = (rank, layers[name].in_features)
        shapes[f"{name}.lora_B.weight"] = (layers[name].out_features, rank)
        if settings.dora:
            shapes[f"{name}.lora_magnitude_vector"] = (layers[name].out_features,)
    return shapes


def ranks_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the rank of each layer of a LoRA whose weights have these shapes."""
    end = ".lora_A.weight"
    return {key.removesuffix(end): shape[0] for key, shape in shapes.items() if key.endswith(end)}


def parameter_name(key: str) -> str:
    """Return the name that a weight of a LoRA has in the model."""
    return f"{key.removesuffix('.weight')}.{NAME}.weight"


def adapter_values(config: dict, settings: LoRASettings, text_encoder: nn.Module | None = None) -> int:
    """Return how many values are trained, without loading weights; arguments as for `adapter_layers`.

    Raises:
        ValueError: As `target_layers`, `layer_ranks` and `rate_factors`; or `start` does not fit.
    """
    shapes = adapter_shapes(adapter_layers(config, settings, text_encoder), settings)
    rate_factors(map(parameter_name, shapes), settings)
    if reads_start(settings):
        start_weights(settings, shapes)
    return sum(map(math.prod, shapes.values()))


def reads_start(settings: LoRASettings) -> bool:
    """Return whether the first values are those of `start`; a run that goes on has them in its checkpoint."""
    return bool(settings.start) and not (settings.resume and checkpoints(Path(settings.output_dir)))


def start_weights(settings: LoRASettings, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the weights of the LoRA that a training starts from, `<layer>.lora_A.weight` and so on, without scale.

    Their ranks may be higher than those of `shapes`; `cut_ranks` cuts them.

    Args:
        settings: Of the run; `start` is a file or folder in any form that the pipeline reads, but for ComfyUI's DoRA.
        shapes: From `adapter_shapes`.

    Raises:
        ValueError: There is none, or it is on other layers, of lower ranks, of other widths or of another kind.
    """
    start = f"start {settings.start!r}"
    if not Path(settings.start).exists():
        raise ValueError(f"{start} is neither a file nor a folder; give a LoRA, for example OUTPUT_DIR/lora.")
    try:
        weights, facts = PTDiTPipeline.lora_state_dict(settings.start, return_lora_metadata=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{start} holds no LoRA: {error}") from error
    weights = {layer_name(key): value.float() for key, value in weights.items()}
    ranks, found = ranks_of(shapes), ranks_of({key: value.shape for key, value in weights.items()})
    if any(map(is_of_text, found)) != any(map(is_of_text, ranks)):
        has, nearest = ("also has", True) if any(map(is_of_text, found)) else ("has no", False)
        raise ValueError(f"{start} {has} weights for the text encoder; nearest: train_text_encoder={nearest}.")
    if found.keys() != ranks.keys():
        other = sorted(found.keys() ^ ranks.keys())[0]
        raise ValueError(
            f"{start} is on {len(found)} layers, targets={settings.targets!r} are {len(ranks)}; one of them alone has "
            f"{other!r}. Nearest: the targets with which it was trained."
        )
    different = [
        layer for layer, rank in ranks.items() if found[layer] < rank or settings.dora and found[layer] > rank
    ]
    if different:
        layer = different[0]
        raise ValueError(f"{start} has rank {found[layer]} in {layer}, not {ranks[layer]}; nearest: {found[layer]}.")
    if any(key.endswith("magnitude_vector") for key in weights) != settings.dora:
        raise ValueError(f"{start} is {'no' if settings.dora else 'a'} DoRA; nearest: dora={not settings.dora}.")
    if settings.dora and any(value.ndim > 1 for key, value in weights.items() if key.endswith("magnitude_vector")):
        raise ValueError(f"{start} has the sizes of a DoRA in ComfyUI's form; nearest: {LORA_FILE} of its folder.")
    if weights.keys() != shapes.keys():
        key = sorted(weights.keys() ^ shapes.keys())[0]
        raise ValueError(
            f"{start} {'lacks' if key in shapes else 'also has'} {key!r}; nearest: one with lora_A and lora_B alone."
        )
    for key, shape in shapes.items():
        layer, _, kind = key.rpartition(".lora_")
        own = {"A.weight": (found[layer], shape[-1]), "B.weight": (shape[0], found[layer])}.get(kind, shape)
        if weights[key].shape != own:
            raise ValueError(
                f"{start}: {key} has the shape {tuple(weights[key].shape)}, not {own}; nearest: a LoRA of this base."
            )
    for layer, rank in found.items():
        weights[f"{layer}.lora_B.weight"] *= strength(layer, rank, facts or {})
    return weights


def lower_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the matrices (rank, inputs) and (outputs, rank) whose product is nearest to that of two of a higher rank.

    Nearest in the sum of squares: the largest singular values are kept.
    """
    (left, left_rest), (right, right_rest) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(left_rest @ right_rest.T, full_matrices=False)
    root = values[:rank].sqrt()
    down, up = root[:, None] * (v[:rank] @ right.T), left @ u[:, :rank] * root
    lack = rank - len(root)  # a layer may have fewer inputs or outputs than the rank
    return F.pad(down, (0, 0, 0, lack)), F.pad(up, (0, lack))


def cut_ranks(weights: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the weights of a LoRA of higher ranks in these ranks, and say how much of it that keeps."""
    found, cut, squares = ranks_of({key: value.shape for key, value in weights.items()}), {}, []
    for layer in (layer for layer, rank in found.items() if rank > ranks[layer]):
        down, up = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        cut[down], cut[up] = lower_rank(weights[down], weights[up], ranks[layer])
        squares.append([float((each[up] @ each[down]).square().sum()) for each in (weights, cut)])
    if squares:
        before, after = map(sum, zip(*squares, strict=True))
        logger.info(
            "the start has a higher rank in %d layers and was cut; %.1f %% of its squares are kept",
            len(squares),
            100 * after / max(before, 1e-30),
        )
    return {**weights, **cut}


def strength(layer: str, rank: int, facts: Mapping[str, Any]) -> float:
    """Return by what the product of the matrices of a layer is multiplied; `facts`: metadata of the pipeline."""
    prefix = TEXT_PREFIX if is_of_text(layer) else "transformer."
    alphas = facts.get(f"{prefix}alpha_pattern") or {}
    alpha = alphas.get(layer.removeprefix(TEXT_PREFIX), facts.get(f"{prefix}lora_alpha", rank))
    return alpha / (rank**0.5 if facts.get(f"{prefix}use_rslora") else rank)


def add_adapter(model: nn.Module, settings: LoRASettings) -> dict[str, Tensor]:
    """Put a LoRA on the target layers of a transformer or of `Networks`, in float32 and trainable.

    Returns:
        Its first values, for the initializations that take them out of the base weights; else nothing.
    """
    layers = trained_layers(model, settings)
    ranks, shapes = layer_ranks(layers, settings), adapter_shapes(layers, settings)
    both = isinstance(model, Networks)
    torch.manual_seed(settings.seed)  # the same on every process
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*residual.*")
        (model.transformer if both else model).add_adapter(
            peft_config({layer: rank for layer, rank in ranks.items() if not is_of_text(layer)}, settings), NAME
        )
        if both:
            own = {layer.removeprefix(TEXT_PREFIX): rank for layer, rank in ranks.items() if is_of_text(layer)}
            model.text_encoder.add_adapter(peft_config(own, settings), NAME)
    for parameter in trained_parameters(model).values():
        parameter.data = parameter.data.float()
    if reads_start(settings):
        take_start(model, cut_ranks(start_weights(settings, shapes), ranks))
    changed_base = settings.init in ("pissa", "olora")
    return {name: p.detach().cpu().clone() for name, p in adapter_parameters(model).items()} if changed_base else {}


def peft_config(ranks: Mapping[str, int], settings: LoRASettings) -> LoraConfig:
    """Return peft's configuration of the adapter of one network, whose layers have these ranks."""
    others = {layer: rank for layer, rank in ranks.items() if rank != settings.rank}
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale_alpha,
        rank_pattern=others,
        alpha_pattern={} if settings.alpha else others,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        init_lora_weights=INITS[settings.init],
        target_modules=list(ranks),
    )


@torch.no_grad()
def take_start(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights of a LoRA into the adapter, whose own scale is taken out of them."""
    parameters, layers = adapter_parameters(model), named_layers(model)
    for key, value in weights.items():
        layer, _, kind = key.rpartition(".lora_")
        scale = layers[layer].scaling[NAME] if kind == "B.weight" else 1.0
        parameters[parameter_name(key)].copy_(value / scale)


def folded_weights(model: nn.Module, parameters: dict[str, Tensor], first: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the adapter with the scale folded into the second matrix, so that alpha is the rank.

    PiSSA and OLoRA take the first values of the adapter out of the base weights. Their LoRA is returned as the
    difference to those values, with twice the rank, for the untouched base: s (B A - B0 A0) = [s B, -s B0] [A; A0].

    Args:
        model: Transformer or `Networks` with the adapter; it is asked for the scale of each layer.
        parameters: `adapter_parameters`, or averages of them, under the same names, on the CPU.
        first: What `add_adapter` returned.

    Returns:
        `<layer>.lora_A.weight` (rank, inputs), `.lora_B.weight` (outputs, rank) and, with DoRA,
        `.lora_magnitude_vector` (outputs,), float32.
    """
    folded = {}
    for layer, module in named_layers(model).items():
        if f"{layer}.lora_A.{NAME}.weight" not in parameters:
            continue
        down, up = (f"{layer}.lora_{side}.{NAME}.weight" for side in "AB")
        scale = module.scaling[NAME]
        a, b = parameters[down], parameters[up] * scale
        if first:
            a, b = torch.cat([a, first[down]]), torch.cat([b, first[up] * -scale], dim=1)
        folded[f"{layer}.lora_A.weight"], folded[f"{layer}.lora_B.weight"] = a.contiguous(), b.contiguous()
        magnitude = f"{layer}.lora_magnitude_vector.{NAME}.weight"
        if magnitude in parameters:
            folded[f"{layer}.lora_magnitude_vector"] = parameters[magnitude]
    return folded


def dora_scale_for_comfyui(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    """Return the `dora_scale` (outputs, 1) with which ComfyUI computes the same weights.

    peft computes magnitude * (W + B A) / |W + B A|, ComfyUI dora_scale * (W + B A) / |W|; norms are those of rows.
    """
    weight = weight.float().cpu()
    return (magnitude * weight.norm(dim=1) / (weight + b @ a).norm(dim=1))[:, None]
