"""Names, sizes and settings in LoRA files: diffusers' names for those of others, and what does not fit is refused."""

import re
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ptdit_diffusers.models.transformer_dit import DiT2DModel
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel

from .ptdit_lora_text import TEXT_PREFIX, text_key

OUR_PREFIX = "transformer."
DOTTED_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", OUR_PREFIX)  # stripped in turn
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")  # kohya's kind: dots of the module became underscores
DOWN, UP, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
SHOWN = 3  # keys named in a message
BLOCK = re.compile(r"((?:transformer_)?blocks)_(\d+)_(.+)")
PLAIN_NAME = re.compile(r"[\w.]+")


@torch.no_grad()  # the weights of a pipeline ask for gradients
def magnitudes_of_peft(
    weights: dict[str, Tensor], network: torch.nn.Module, prefix: str = OUR_PREFIX
) -> dict[str, Tensor]:
    """Return the weights with the sizes of ComfyUI's DoRA turned into those of peft, (outputs,).

    ComfyUI computes scale * (W + B A) / |W|, peft magnitude * (W + B A) / |W + B A|; norms are those of rows.

    Args:
        weights: Checked by `check_lora`.
        network: Has the base weights W.
        prefix: Of all keys.

    Raises:
        ValueError: The base weights cannot be read.
    """
    changed = dict(weights)
    scales = {key: value for key, value in weights.items() if key.endswith(MAGNITUDE) and value.ndim == 2}
    for key, scale in scales.items():
        name = key.removesuffix(MAGNITUDE)
        layer = network.get_submodule(name.removeprefix(prefix))
        base = getattr(layer, "base_layer", layer).weight.dequantize().float().cpu()
        product = weights[name + UP].float().cpu() @ weights[name + DOWN].float().cpu()
        if base.shape != product.shape:
            raise ValueError(f"{key} needs the base weights, which are packed in 4 bits here; load it without them.")
        moved = base + product
        sizes = scale.flatten().float().cpu() * moved.norm(dim=1) / base.norm(dim=1)
        changed[key] = sizes.to(scale.dtype)
    return changed


def convert_foreign_lora(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give LoRA weights diffusers' names and fold `<module>.alpha` into them.

    diffusers reads alpha only from metadata that foreign files lack, so alpha / rank goes into the second matrix.

    Raises:
        ValueError: There is not a single LoRA matrix, or an alpha without its matrices; names the first keys.
    """
    flat = _flat_names() if any(key.startswith(FLAT_PREFIXES) for key in weights) else {}
    renamed = {}
    for key, value in weights.items():
        key = re.sub(r"\.lora_([AB])\.(?!weight$|bias$)[^.]+\.", r".lora_\1.", key)  # peft's adapter name
        key = key.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")
        renamed[text_key(key) or OUR_PREFIX + _module_and_rest(key, flat)] = value
    if not any(key.endswith((DOWN, UP)) for key in renamed):
        raise ValueError(
            f"this is not a LoRA: of its {len(weights)} keys, none ends with lora_A.weight or lora_down.weight "
            f"(first keys: {_first(weights)})."
        )
    check_forms(renamed)
    for key in [key for key in renamed if key.endswith(".alpha")]:
        module = key.removesuffix(".alpha")
        alpha = renamed.pop(key)
        if module + DOWN not in renamed or module + UP not in renamed:
            raise ValueError(
                f"{key.removeprefix(OUR_PREFIX)} has no lora_down and lora_up (or lora_A, lora_B) beside it."
            )
        if alpha.numel() != 1:
            raise ValueError(f"{key.removeprefix(OUR_PREFIX)} is not one number.")
        rank, up = renamed[module + DOWN].shape[0], renamed[module + UP]
        renamed[module + UP] = (up.float() * (float(alpha) / rank)).to(up.dtype)
    return renamed


def check_forms(weights: dict[str, Tensor]) -> None:
    """Raise ValueError unless every key belongs to a LoRA and every matrix is one; names the first that do not.

    Other trainers also save whole differences of weights (`diff`, `diff_b`), which are no LoRA.
    """
    wrong = [f"{key} (no part of a LoRA)" for key in weights if ".lora_" not in key and not key.endswith(".alpha")]
    if wrong:
        raise ValueError(
            f"this file is not only a LoRA: {len(wrong)} of {len(weights)} keys cannot be used, first "
            f"{'; '.join(wrong[:SHOWN])}."
        )
    empty = [
        key for key, value in weights.items() if key.endswith((DOWN, UP)) and (value.ndim < 2 or 0 in value.shape)
    ]
    if empty:
        raise ValueError(f"{_first(empty)} of this LoRA holds no matrix.")


def _module_and_rest(key: str, flat: dict[str, str]) -> str:
    for prefix in FLAT_PREFIXES:
        if key.startswith(prefix):
            module, dot, rest = key.removeprefix(prefix).partition(".")
            block = BLOCK.fullmatch(module)
            if block is None:
                return flat.get(module, module) + dot + rest
            blocks, number, layer = block.groups()
            first = flat.get(f"{blocks}_0_{layer}", f"{blocks}.0.{layer}")
            return first.replace(".0.", f".{number}.", 1) + dot + rest
    for prefix in DOTTED_PREFIXES:
        key = key.removeprefix(prefix)
    return key


@lru_cache
def _flat_names() -> dict[str, str]:
    """kohya's spelling of every module of transformers with one block -> its real name."""
    with torch.device("meta"):  # names only: no memory, any width
        models = [
            PTDiTTransformer3DModel(1, 48, num_layers=1, use_additional_conditions=True),
            DiT2DModel(1, 48, num_layers=1),
        ]
    return {name.replace(".", "_"): name for model in models for name, _ in model.named_modules()}


def adapter_settings(weights: dict[str, Tensor], metadata: Any) -> dict[str, Any]:
    """Return the settings of an adapter: layers and ranks from its weights, strength and kind from its metadata.

    peft takes names in the metadata for regular expressions, and builds what it says before it looks at a weight.

    Raises:
        ValueError: The metadata are not those of an adapter.
    """
    if not isinstance(metadata, dict):
        raise ValueError(f"the metadata of this LoRA are a {type(metadata).__name__}, not the settings of an adapter.")
    of_text = {name: value for name, value in metadata.items() if name.startswith(TEXT_PREFIX)}
    rest = {name: value for name, value in metadata.items() if name not in of_text}
    settings = {}
    for prefix, about in ((OUR_PREFIX, rest), (TEXT_PREFIX, of_text)):
        part = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        found = {name.removeprefix(prefix): value for name, value in about.items()}
        if any(key.endswith(DOWN) for key in part):
            settings |= {prefix + name: value for name, value in _settings_of_network(part, found).items()}
    return settings


def _settings_of_network(weights: dict[str, Tensor], found: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the adapter of one network: `weights` by its own names, `found` in the metadata."""
    ranks = {key.removesuffix(DOWN): value.shape[0] for key, value in weights.items() if key.endswith(DOWN)}
    rank = max(ranks.values(), key=list(ranks.values()).count)
    alpha, alphas = found.get("lora_alpha", rank), found.get("alpha_pattern") or {}
    numbers = [alpha, *(alphas.values() if isinstance(alphas, dict) else ["?"])]
    if not all(isinstance(number, int | float) for number in numbers):
        raise ValueError("the metadata of this LoRA have no numbers as lora_alpha and alpha_pattern.")
    patterns = [name for name in alphas if not PLAIN_NAME.fullmatch(name)]
    if patterns:
        raise ValueError(f"alpha_pattern of this LoRA's metadata names {patterns[0]!r}, which is no name of a layer.")
    return {
        "r": rank,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "target_modules": sorted(ranks),
        "lora_alpha": alpha,
        "alpha_pattern": alphas,
        "use_dora": any("lora_magnitude_vector" in key for key in weights),
        "lora_bias": any(key.endswith(".lora_B.bias") for key in weights),
        "use_rslora": found.get("use_rslora") is True,
    }


def check_lora(weights: dict[str, Tensor], network: torch.nn.Module, prefix: str = OUR_PREFIX) -> None:
    """Raise ValueError unless every key names a layer of the network and has its size; names the first that fail.

    Args:
        weights: Under diffusers' names. A matrix A is (rank, inputs), B is (outputs, rank); convolutions have two more
            dimensions.
        network: Transformer or text encoder; it may have adapters already.
        prefix: Of keys for this network.
    """
    modules = dict(network.named_modules())
    wrong = []
    for key, value in weights.items():
        name, found, kind = key.removeprefix(prefix).rpartition(".lora_")
        layer = modules.get(name) if found and key.startswith(prefix) else None
        layer = getattr(layer, "base_layer", layer)
        inputs = getattr(layer, "in_features", getattr(layer, "in_channels", None))
        outputs = getattr(layer, "out_features", getattr(layer, "out_channels", None))
        if inputs is None:
            wrong.append(f"{key} (no such layer)")
        elif kind in ("A.weight", "B.weight") and value.ndim < 2:
            wrong.append(f"{key} (no matrix)")
        elif kind == "A.weight" and value.shape[1] != inputs:
            wrong.append(f"{key} ({value.shape[1]} inputs, the layer has {inputs})")
        elif kind == "B.weight" and value.shape[0] != outputs:
            wrong.append(f"{key} ({value.shape[0]} outputs, the layer has {outputs})")
        elif kind == "B.bias" and tuple(value.shape) != (outputs,):
            wrong.append(f"{key} (shape {tuple(value.shape)}, the layer has {outputs} outputs)")
        elif kind == "magnitude_vector" and tuple(value.shape) not in ((outputs,), (outputs, 1)):
            wrong.append(f"{key} (shape {tuple(value.shape)}, the layer has {outputs} outputs)")
    if wrong:
        raise ValueError(
            f"this LoRA is for another model: {len(wrong)} of {len(weights)} keys do not fit, first "
            f"{'; '.join(wrong[:SHOWN])}."
        )
    for key in (key for key in weights if key.endswith(DOWN)):
        other = key.removesuffix(DOWN) + UP
        if other in weights and weights[key].shape[0] != weights[other].shape[1]:
            ranks = weights[key].shape[0], weights[other].shape[1]
            raise ValueError(f"this LoRA is damaged: {key} has rank {ranks[0]}, and its lora_B rank {ranks[1]}.")
    for one, other in ((DOWN, UP), (UP, DOWN), (MAGNITUDE, DOWN)):
        halves = [key for key in weights if key.endswith(one) and key.removesuffix(one) + other not in weights]
        if halves:
            raise ValueError(f"this LoRA is not complete: {_first(halves)} without {other[1:]}.")


def _first(keys: Any) -> str:
    return ", ".join(list(keys)[:SHOWN]) or "none"
