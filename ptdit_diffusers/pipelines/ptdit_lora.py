"""Loading and saving LoRA weights for the pipeline: diffusers' files, and those of ComfyUI, kohya and raw peft."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.utils import _get_model_file
from torch import Tensor

from ptdit_diffusers.core.few_steps import DISTILLED, LORA_FILE, read_distillation, resolve_student
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel

from .ptdit_lora_names import (
    MAGNITUDE,
    adapter_settings,
    check_lora,
    convert_foreign_lora,
    magnitudes_of_peft,
)
from .ptdit_lora_text import TEXT_PREFIX, add_text_adapter, free_name, leave_alone

DORA_SCALE = ".dora_scale"  # ComfyUI's and kohya's size of each output, (outputs, 1), relative to the base weights
FETCHING = (
    "weight_name local_files_only cache_dir force_download proxies token revision subfolder use_safetensors".split()
)
CASTING = "layerwise_casting"  # diffusers' name of the hook


class PTDiTLoraLoaderMixin(CogVideoXLoraLoaderMixin):
    """LoRA for the transformers of this package, and for the T5 beside them; the parent class does most of it.

    `set_adapters` takes one weight per adapter, one for each network, `{"transformer": 1.0, "text_encoder": 0.5}`, or
    one per block of the transformer: `{"transformer": {"transformer_blocks.3": 0.5}}`; what is not named keeps 1.
    """

    _lora_loadable_modules = ["transformer", "text_encoder"]

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA; what it has for a network that this pipeline lacks is left out, with a warning.

        Args:
            pretrained_model_name_or_path_or_dict: As for `lora_state_dict`.
            adapter_name: Its name in both networks; None = a free one.
            hotswap: Replace the weights of the adapter of this name, in the transformer alone.
            kwargs: Options of diffusers' method and of `lora_state_dict`.

        Raises:
            ValueError: It is no LoRA, or one for another model; names the first keys. Nothing is loaded then.
        """
        low = {"low_cpu_mem_usage": kwargs.pop("low_cpu_mem_usage", True)}
        kwargs["return_lora_metadata"] = True
        weights, metadata = self.lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
        text = {key: value for key, value in weights.items() if key.startswith(TEXT_PREFIX)}
        rest = {key: value for key, value in weights.items() if key not in text}
        encoder = getattr(self, "text_encoder", None)
        if hotswap and (text or adapter_name in getattr(encoder, "peft_config", {})):
            raise ValueError("hotswap=True is not for a LoRA with weights for the text encoder; nearest: False.")
        adapter_name = adapter_name or free_name(self.transformer, encoder)
        for name, part in (("transformer", rest), ("text_encoder", text)):
            if part and getattr(self, name, None) is None:
                warnings.warn(
                    f"this LoRA has {len(part)} weights for the {name}, which this pipeline does not have: they are "
                    "left out.",
                    stacklevel=2,
                )
                part.clear()
        if text:
            check_lora(text, encoder, TEXT_PREFIX)
            refuse_casted(encoder)
        if rest:
            options = {"adapter_name": adapter_name, "hotswap": hotswap, "metadata": metadata, "_pipeline": self}
            self.load_lora_into_transformer(rest, transformer=self.transformer, **options, **low)
        if text:
            settings = {**adapter_settings(text, {}), **(metadata or {})}
            add_text_adapter(self, magnitudes_of_peft(text, encoder, TEXT_PREFIX), settings, adapter_name)
        leave_alone(adapter_name, self.transformer, encoder)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        transformer_lora_layers: dict[str, Tensor] | None = None,
        text_encoder_lora_layers: dict[str, Tensor] | None = None,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save a LoRA in diffusers' form.

        Args:
            save_directory: Folder to write to.
            transformer_lora_layers, text_encoder_lora_layers: Weights by names of layers, as peft returns them; at
                least one of the two.
            transformer_lora_adapter_metadata, text_encoder_lora_adapter_metadata: Settings of the adapters.
            kwargs: `is_main_process`, `weight_name`, `save_function` and `safe_serialization` of diffusers.

        Raises:
            ValueError: There are no weights.
        """
        layers = {"transformer": transformer_lora_layers, "text_encoder": text_encoder_lora_layers}
        about = {"transformer": transformer_lora_adapter_metadata, "text_encoder": text_encoder_lora_adapter_metadata}
        layers = {name: weights for name, weights in layers.items() if weights}
        if not layers:
            raise ValueError("save_lora_weights needs transformer_lora_layers or text_encoder_lora_layers.")
        options = {"is_main_process": True, "weight_name": None, "save_function": None, "safe_serialization": True}
        metadata = {name: about[name] for name in layers}
        cls._save_lora_weights(save_directory, lora_layers=layers, lora_metadata=metadata, **options | kwargs)

    def fuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Add the LoRA to the weights; `components`: None = both networks; `kwargs`: options of diffusers' method."""
        super().fuse_lora(components=components or self._lora_loadable_modules, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Take the LoRA out of the weights again; arguments as for `fuse_lora`."""
        super().unfuse_lora(components=components or self._lora_loadable_modules, **kwargs)

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], dict[str, Any] | None]:
        """Read a LoRA file, folder, Hub id or dictionary and give its weights diffusers' names.

        Args:
            pretrained_model_name_or_path_or_dict: As for every pipeline of diffusers, or the short name of a LoRA of
                few steps that comes with the package, such as "shapes-128-4steps". Keys may be diffusers'
                (`transformer.`), ComfyUI's (`diffusion_model.`), raw peft's (`base_model.model.`), bare module names,
                or kohya's (`lora_unet_transformer_blocks_0_attn1_to_q`), and of the text encoder diffusers'
                (`text_encoder.`) or ComfyUI's; `.alpha` is folded into the weights.
            kwargs: Options of diffusers' method, `return_lora_metadata` and `weight_name` among them.

        Returns:
            The weights, and with `return_lora_metadata=True` the file's metadata as well.

        Raises:
            ValueError: The file holds no LoRA, or one of another kind; names the first keys.
        """
        wants_metadata, options = kwargs.pop("return_lora_metadata", False), dict(kwargs)
        source = resolve_student(pretrained_model_name_or_path_or_dict)
        try:
            weights, metadata = fetch_lora(source, kwargs)
            weights = super().lora_state_dict(weights, **kwargs)
        except (RecursionError, json.JSONDecodeError) as error:
            raise ValueError("the metadata of this LoRA file is no JSON of an adapter's settings.") from error
        if not _names_no_layer(source):
            weights = convert_foreign_lora(weights)
            metadata = None if metadata is None else adapter_settings(weights, metadata)
            student = distillation_of(source, options)
            if student is not None:
                metadata = (metadata or adapter_settings(weights, {})) | {DISTILLED: student}
        return (weights, metadata) if wants_metadata else weights

    @classmethod
    def load_lora_into_transformer(
        cls, state_dict: dict[str, Tensor], transformer: PTDiTTransformer3DModel, **kwargs: Any
    ) -> None:
        """Put an adapter into the transformer.

        Args:
            state_dict: Weights under diffusers' names, as `lora_state_dict` returns them; those for the text encoder
                are not read.
            transformer: The model that gets the adapter.
            kwargs: Options of diffusers' method: `adapter_name`, `hotswap`, `metadata`, ...

        Raises:
            ValueError: The weights belong to another model; names the first modules that do not fit.
        """
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith(TEXT_PREFIX)}
        if not _names_no_layer(state_dict):
            check_lora(state_dict, transformer)
            state_dict = magnitudes_of_peft(state_dict, transformer)
        refuse_casted(transformer)
        metadata = dict(kwargs.get("metadata") or {})
        student = metadata.pop(DISTILLED, None)
        before = set(getattr(transformer, "peft_config", {}))
        try:
            super().load_lora_into_transformer(state_dict, transformer, **kwargs | {"metadata": metadata or None})
        except RuntimeError as error:  # of torch: a size that fits neither layer nor kernel
            raise ValueError(f"this LoRA does not fit the transformer: {' '.join(str(error).split())}") from error
        for name in set(getattr(transformer, "peft_config", {})) - before:
            transformer.peft_config[name].distilled = student  # goes when the adapter goes


def refuse_casted(network: torch.nn.Module) -> None:
    """Raise ValueError where the weights of a network are stored in a small format, which a LoRA would get, too."""
    if any(layer.get_hook(CASTING) for layer in _hooked(network)):
        raise ValueError(
            "enable_layerwise_casting() was called before: it would store the LoRA in the small format, too, "
            "which cannot be scaled. Load the LoRA first, and call enable_layerwise_casting() afterwards."
        )


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


def warn_of_student(transformer: torch.nn.Module, scale: float, num_frames: int, height: int, width: int) -> None:
    """Warn where an active LoRA of few steps meets guidance, which it has built in, or a size it was not made for.

    Args:
        transformer: With the LoRA.
        scale: Of the guidance; 1 = none.
        num_frames, height, width: Of what is made. The noise levels depend on them, and the LoRA knows its own alone.
    """
    if not getattr(transformer, "_hf_peft_config_loaded", False):
        return
    layers = [layer for layer in transformer.modules() if hasattr(layer, "base_layer")]
    if all(layer.disable_adapters for layer in layers):
        return
    for name in transformer.active_adapters():
        student = getattr(transformer.peft_config[name], "distilled", None)
        if student is None:
            continue
        if scale > 1:
            warnings.warn(
                f"the LoRA {name!r} was distilled for {student['steps']} steps with guidance built in: "
                f"guidance_scale={scale:g} guides once more; use guidance_scale=1 and "
                f"num_inference_steps={student['steps']}.",
                stacklevel=2,
            )
        frames, side = student.get("num_frames", num_frames), student.get("resolution", 0)
        if frames != num_frames or side and side**2 != height * width:
            warnings.warn(
                f"the LoRA {name!r} was distilled for num_frames={frames}, height={side}, width={side}, and may do "
                f"worse at num_frames={num_frames}, height={height}, width={width}, where the noise levels differ.",
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


def _names_no_layer(source: Any) -> bool:
    """A dictionary in memory whose keys have no dot names no layer of any model: diffusers only warns of it."""
    return isinstance(source, dict) and bool(source) and not any("." in key for key in source)
