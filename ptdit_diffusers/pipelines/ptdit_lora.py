"""Loading and saving LoRA weights for the pipeline: diffusers' files, and those of ComfyUI, kohya and raw peft."""

import json
import re
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.utils import _get_model_file
from torch import Tensor

from ptdit_diffusers.core.few_steps import DISTILLED, LORA_FILE, read_distillation
from ptdit_diffusers.models.transformer_dit import DiT2DModel
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel

OUR_PREFIX = "transformer."
DOTTED_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", OUR_PREFIX)  # stripped in turn
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")  # kohya's kind: dots of the module became underscores
DOWN, UP, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
DORA_SCALE = ".dora_scale"  # ComfyUI's and kohya's size of each output, (outputs, 1), relative to the base weights
FETCHING = (
    "weight_name local_files_only cache_dir force_download proxies token revision subfolder use_safetensors".split()
)
CASTING = "layerwise_casting"  # diffusers' name of the hook
SHOWN = 3  # keys named in a message
BLOCK = re.compile(r"((?:transformer_)?blocks)_(\d+)_(.+)")
PLAIN_NAME = re.compile(r"[\w.]+")


class PTDiTLoraLoaderMixin(CogVideoXLoraLoaderMixin):
    """LoRA for the transformers of this package; the parent class does everything but foreign names and the checks.

    `set_adapters` takes one weight per adapter, or one per block: `{"transformer": {"transformer_blocks.3": 0.5}}`;
    modules that are not named keep 1.
    """

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], dict[str, Any] | None]:
        """Read a LoRA file, folder, Hub id or dictionary and give its weights diffusers' names.

        Args:
            pretrained_model_name_or_path_or_dict: As for every pipeline of diffusers. Keys may be diffusers'
                (`transformer.`), ComfyUI's (`diffusion_model.`), raw peft's (`base_model.model.`), bare module names,
                or kohya's (`lora_unet_transformer_blocks_0_attn1_to_q`); `.alpha` is folded into the weights.
            kwargs: Options of diffusers' method, `return_lora_metadata` and `weight_name` among them.

        Returns:
            The weights, and with `return_lora_metadata=True` the file's metadata as well.

        Raises:
            ValueError: The file holds no LoRA, or one of another kind; names the first keys.
        """
        wants_metadata, options = kwargs.pop("return_lora_metadata", False), dict(kwargs)
        try:
            weights, metadata = fetch_lora(pretrained_model_name_or_path_or_dict, kwargs)
            weights = super().lora_state_dict(weights, **kwargs)
        except (RecursionError, json.JSONDecodeError) as error:
            raise ValueError("the metadata of this LoRA file is no JSON of an adapter's settings.") from error
        if not _names_no_layer(pretrained_model_name_or_path_or_dict):
            weights = convert_foreign_lora(weights)
            metadata = None if metadata is None else adapter_settings(weights, metadata)
            student = distillation_of(pretrained_model_name_or_path_or_dict, options)
            if student is not None:
                metadata = (metadata or adapter_settings(weights, {})) | {DISTILLED: student}
        return (weights, metadata) if wants_metadata else weights

    @classmethod
    def load_lora_into_transformer(
        cls, state_dict: dict[str, Tensor], transformer: PTDiTTransformer3DModel, **kwargs: Any
    ) -> None:
        """Put an adapter into the transformer.

        Args:
            state_dict: Weights under diffusers' names, as `lora_state_dict` returns them.
            transformer: The model that gets the adapter.
            kwargs: Options of diffusers' method: `adapter_name`, `hotswap`, `metadata`, ...

        Raises:
            ValueError: The weights belong to another model; names the first modules that do not fit.
        """
        if not _names_no_layer(state_dict):
            check_lora(state_dict, transformer)
            state_dict = magnitudes_of_peft(state_dict, transformer)
        if any(layer.get_hook(CASTING) for layer in _hooked(transformer)):
            raise ValueError(
                "enable_layerwise_casting() was called before: it would store the LoRA in the small format, too, "
                "which cannot be scaled. Load the LoRA first, and call enable_layerwise_casting() afterwards."
            )
        metadata = dict(kwargs.get("metadata") or {})
        student = metadata.pop(DISTILLED, None)
        before = set(getattr(transformer, "peft_config", {}))
        try:
            super().load_lora_into_transformer(state_dict, transformer, **kwargs | {"metadata": metadata or None})
        except RuntimeError as error:  # of torch: a size that fits neither layer nor kernel
            raise ValueError(f"this LoRA does not fit the transformer: {' '.join(str(error).split())}") from error
        for name in set(getattr(transformer, "peft_config", {})) - before:
            transformer.peft_config[name].distilled = student  # goes when the adapter goes


def distillation_of(source: Any, options: dict[str, Any]) -> dict[str, Any] | None:
    """Return how the student in a LoRA file is used, None for any other LoRA; see `read_distillation`.

    Args:
        source: As for `lora_state_dict`, which has read it; of the Hub's files, the copies in the cache are looked at.
        options: Of `lora_state_dict`.
    """
    if isinstance(source, dict):
        return None
    where = {name: options.get(name) for name in ("subfolder", "cache_dir", "revision")}
    name = options.get("weight_name") or LORA_FILE
    try:
        path = Path(_get_model_file(source, weights_name=name, local_files_only=True, **where))
    except OSError:  # under another name, which diffusers guessed
        return None
    return read_distillation(path) if path.suffix == ".safetensors" else None


def warn_of_guidance(transformer: torch.nn.Module, scale: float) -> None:
    """Warn where guidance meets an active LoRA that was distilled with guidance built in."""
    if scale <= 1 or not getattr(transformer, "_hf_peft_config_loaded", False):
        return
    layers = [layer for layer in transformer.modules() if hasattr(layer, "base_layer")]
    if all(layer.disable_adapters for layer in layers):
        return
    for name in transformer.active_adapters():
        student = getattr(transformer.peft_config[name], "distilled", None)
        if student is not None:
            warnings.warn(
                f"the LoRA {name!r} was distilled for {student['steps']} steps with guidance built in: "
                f"guidance_scale={scale:g} guides once more; use guidance_scale=1 and "
                f"num_inference_steps={student['steps']}.",
                stacklevel=2,
            )


def fetch_lora(
    source: str | dict[str, Tensor], options: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read a LoRA as diffusers does, and name the sizes of ComfyUI's DoRA, which diffusers would leave out, as peft's.

    They keep their shape (outputs, 1), by which `magnitudes_of_peft` knows them.

    Args:
        source: As for `lora_state_dict`.
        options: Of `lora_state_dict`; those that are about reading are taken out.

    Returns:
        The weights, and the adapter's settings in the metadata of the file, if there are any.
    """
    reading = {name: options.pop(name, False if name == "force_download" else None) for name in FETCHING}
    pickles = reading["use_safetensors"] is None
    reading |= {"use_safetensors": pickles or reading["use_safetensors"], "allow_pickle": pickles}
    agent = {"file_type": "attn_procs_weights", "framework": "pytorch"}
    weights, metadata = _fetch_state_dict(source, user_agent=agent, **reading)
    return {
        key.removesuffix(DORA_SCALE) + MAGNITUDE if key.endswith(DORA_SCALE) else key: value
        for key, value in weights.items()
    }, metadata


def magnitudes_of_peft(weights: dict[str, Tensor], transformer: PTDiTTransformer3DModel) -> dict[str, Tensor]:
    """Return the weights with the sizes of ComfyUI's DoRA turned into those of peft, (outputs,).

    ComfyUI computes scale * (W + B A) / |W|, peft magnitude * (W + B A) / |W + B A|; norms are those of rows.

    Args:
        weights: Checked by `check_lora`.
        transformer: Has the base weights W.

    Raises:
        ValueError: The base weights cannot be read.
    """
    changed = dict(weights)
    scales = {key: value for key, value in weights.items() if key.endswith(MAGNITUDE) and value.ndim == 2}
    for key, scale in scales.items():
        name = key.removesuffix(MAGNITUDE)
        layer = transformer.get_submodule(name.removeprefix(OUR_PREFIX))
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
        renamed[OUR_PREFIX + _module_and_rest(key, flat)] = value
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


def _names_no_layer(source: Any) -> bool:
    """A dictionary in memory whose keys have no dot names no layer of any model: diffusers only warns of it."""
    return isinstance(source, dict) and bool(source) and not any("." in key for key in source)


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
    found = {name.removeprefix(OUR_PREFIX): value for name, value in metadata.items()}
    ranks = {key[len(OUR_PREFIX) : -len(DOWN)]: value.shape[0] for key, value in weights.items() if key.endswith(DOWN)}
    rank = max(ranks.values(), key=list(ranks.values()).count)
    alpha, alphas = found.get("lora_alpha", rank), found.get("alpha_pattern") or {}
    numbers = [alpha, *(alphas.values() if isinstance(alphas, dict) else ["?"])]
    if not all(isinstance(number, int | float) for number in numbers):
        raise ValueError("the metadata of this LoRA have no numbers as lora_alpha and alpha_pattern.")
    patterns = [name for name in alphas if not PLAIN_NAME.fullmatch(name)]
    if patterns:
        raise ValueError(f"alpha_pattern of this LoRA's metadata names {patterns[0]!r}, which is no name of a layer.")
    settings = {
        "r": rank,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "target_modules": sorted(ranks),
        "lora_alpha": alpha,
        "alpha_pattern": alphas,
        "use_dora": any("lora_magnitude_vector" in key for key in weights),
        "lora_bias": any(key.endswith(".lora_B.bias") for key in weights),
        "use_rslora": found.get("use_rslora") is True,
    }
    return {OUR_PREFIX + name: value for name, value in settings.items()}


def check_lora(weights: dict[str, Tensor], transformer: PTDiTTransformer3DModel) -> None:
    """Raise ValueError unless every key names a layer of the transformer and has its size; names the first that fail.

    Args:
        weights: Under diffusers' names. A matrix A is (rank, inputs), B is (outputs, rank); convolutions have two more
            dimensions.
        transformer: May have adapters already.
    """
    modules = dict(transformer.named_modules())
    wrong = []
    for key, value in weights.items():
        name, found, kind = key.removeprefix(OUR_PREFIX).rpartition(".lora_")
        layer = modules.get(name) if found and key.startswith(OUR_PREFIX) else None
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


def expand_block_scales(
    transformer: PTDiTTransformer3DModel, scales: list[float | dict[str, float]]
) -> list[float | dict[str, float]]:
    """Per-block scales of `set_adapters`, written out for every layer with an adapter; the longest name counts.

    diffusers takes the first name that is part of a layer's name, so "transformer_blocks.1" would also mean block 10.

    Raises:
        ValueError: A name is no module of the transformer.
    """
    modules = dict(transformer.named_modules())
    layers = [name for name, module in modules.items() if hasattr(module, "base_layer")]
    return [
        _scale_of_each(layers, scale, modules, len(transformer.transformer_blocks))
        if isinstance(scale, dict)
        else scale
        for scale in scales
    ]


def _scale_of_each(layers: list[str], scales: dict[str, float], modules: dict, blocks: int) -> dict[str, float]:
    for name in scales:
        if name not in modules:
            raise ValueError(
                f"{name!r} is no module of the transformer; name blocks as transformer_blocks.0 to "
                f"transformer_blocks.{blocks - 1}, or modules in them as transformer_blocks.0.attn1."
            )
    expanded = {}
    for layer in layers:
        above = [name for name in scales if f"{layer}.".startswith(f"{name}.")]
        expanded[layer] = scales[max(above, key=len)] if above else 1.0
    return expanded


def _hooked(model: torch.nn.Module) -> list[Any]:
    """Return diffusers' registries of hooks of all layers that have one."""
    return [layer._diffusers_hook for layer in model.modules() if hasattr(layer, "_diffusers_hook")]


def _first(keys: Any) -> str:
    return ", ".join(list(keys)[:SHOWN]) or "none"
