"""The LoRA itself: which layers get one, its first values, and its weights with the scale folded in."""

import difflib
import re
import warnings

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.training.task import trained_parameters

from .config import TARGETS, LoRASettings

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


def adapter_layers(config: dict, settings: LoRASettings) -> dict[str, nn.Linear]:
    """Return the layers that get an adapter, by name, without loading weights: the model is built on the meta device.

    Raises:
        ValueError: As `target_layers`.
    """
    with torch.device("meta"):
        model = PTDiTTransformer3DModel.from_config(config)
    return {name: model.get_submodule(name) for name in target_layers(model, settings.targets)}


def adapter_values(config: dict, settings: LoRASettings) -> int:
    """Return how many values are trained, without loading weights.

    Raises:
        ValueError: As `target_layers`.
    """
    layers = adapter_layers(config, settings).values()
    return sum(
        settings.rank * (each.in_features + each.out_features) + settings.dora * each.out_features for each in layers
    )


def add_adapter(transformer: PTDiTTransformer3DModel, settings: LoRASettings) -> dict[str, Tensor]:
    """Put a LoRA on the target layers, in float32 and trainable.

    Returns:
        Its first values, for the initializations that take them out of the base weights; else nothing.
    """
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale_alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        init_lora_weights=INITS[settings.init],
        target_modules=target_layers(transformer, settings.targets),
    )
    torch.manual_seed(settings.seed)  # the same on every process
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*residual.*")
        transformer.add_adapter(config, NAME)
    for parameter in trained_parameters(transformer).values():
        parameter.data = parameter.data.float()
    changed_base = settings.init in ("pissa", "olora")
    return (
        {name: p.detach().cpu().clone() for name, p in trained_parameters(transformer).items()} if changed_base else {}
    )


def folded_weights(
    transformer: nn.Module, parameters: dict[str, Tensor], first: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the weights of the adapter with the scale folded into the second matrix, so that alpha is the rank.

    PiSSA and OLoRA take the first values of the adapter out of the base weights. Their LoRA is returned as the
    difference to those values, with twice the rank, for the untouched base: s (B A - B0 A0) = [s B, -s B0] [A; A0].

    Args:
        transformer: The model with the adapter; it is asked for the scale of each layer.
        parameters: `trained_parameters`, or averages of them, under the same names, on the CPU.
        first: What `add_adapter` returned.

    Returns:
        `<layer>.lora_A.weight` (rank, inputs), `.lora_B.weight` (outputs, rank) and, with DoRA,
        `.lora_magnitude_vector` (outputs,), float32.
    """
    folded = {}
    for layer, module in transformer.named_modules():
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
