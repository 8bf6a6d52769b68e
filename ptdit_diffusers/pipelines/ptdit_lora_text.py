"""The part of a LoRA that belongs to the text encoder, a T5: names, loading, strength.

diffusers can do this for CLIP only, whose layers have other names.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from torch import Tensor, nn

TEXT_PREFIX = "text_encoder."
FOREIGN_PREFIXES = ("text_encoders.t5xxl.transformer.", "text_encoders.transformer.")  # ComfyUI's, of any T5
FLAT = re.compile(  # of kohya's kind: dots of the module became underscores
    r"lora_te\d?_encoder_block_(\d+)_layer_(\d+)_(SelfAttention|DenseReluDense)_([a-z_\d]+)\.(.+)"
)


def text_key(key: str) -> str | None:
    """Return diffusers' name of a LoRA weight for the text encoder, None where a key is for something else."""
    for prefix in (TEXT_PREFIX, *FOREIGN_PREFIXES):
        if key.startswith(prefix):
            return TEXT_PREFIX + key.removeprefix(prefix)
    if flat := FLAT.fullmatch(key):
        return f"{TEXT_PREFIX}encoder.block.{flat[1]}.layer.{flat[2]}.{flat[3]}.{flat[4]}.{flat[5]}"
    return None


def free_name(*networks: nn.Module | None) -> str:
    """Return the first of default_0, default_1, ... that no adapter of these networks has."""
    taken = {name for network in networks for name in getattr(network, "peft_config", {})}
    return next(name for name in map("default_{}".format, range(len(taken) + 1)) if name not in taken)


def leave_alone(name: str, *networks: nn.Module | None) -> None:
    """Make a new adapter the only active one in all networks, as peft does in those that get it."""
    adapted = [network for network in networks if getattr(network, "peft_config", {})]
    if any(name in network.peft_config for network in adapted):
        for network in (each for each in adapted if name not in each.peft_config):
            for layer in (each for each in network.modules() if hasattr(each, "lora_A")):
                layer.set_adapter([name])


def add_text_adapter(pipe: Any, weights: dict[str, Tensor], settings: dict[str, Any], name: str) -> None:
    """Put an adapter into the text encoder of a pipeline, frozen, on the device and in the format of its layers.

    Args:
        pipe: The pipeline; what it offloads is offloaded afterwards, too.
        weights: Checked, under diffusers' names, each beginning with TEXT_PREFIX.
        settings: Of peft, by the same kind of names.
        name: Of the adapter.

    Raises:
        ValueError: The text encoder has an adapter of this name.
        ImportError: peft is not installed.
    """
    try:  # not needed to load a pipeline, also not by the copy of this file in an exported folder
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    except ImportError as error:
        raise ImportError("the package peft is missing, which LoRAs need; pip install peft.") from error

    encoder: nn.Module = pipe.text_encoder
    if name in getattr(encoder, "peft_config", {}):
        raise ValueError(f"the text encoder has an adapter {name!r} already; give another adapter_name.")
    own = {key.removeprefix(TEXT_PREFIX): value for key, value in settings.items() if key.startswith(TEXT_PREFIX)}
    with without_offloading(pipe):
        inject_adapter_in_model(LoraConfig(**own), encoder, name)
        short = {key.removeprefix(TEXT_PREFIX): value for key, value in weights.items()}
        set_peft_model_state_dict(encoder, short, name)
        for layer in (layer for layer in encoder.modules() if name in getattr(layer, "lora_A", {})):
            base = layer.get_base_layer().weight
            dtype = base.dtype if base.is_floating_point() else torch.float32
            for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                if name in part:
                    part[name].to(base.device, dtype).requires_grad_(False)
    encoder._hf_peft_config_loaded = True  # transformers' own sign, which diffusers asks for when it deletes one


@contextmanager
def without_offloading(pipe: Any) -> Iterator[None]:
    """Take diffusers' hooks for offloading off a pipeline while its layers are replaced, and put them back."""
    by_model, by_layer, *by_group = _func_optionally_disable_offloading(pipe)
    yield
    if by_model:
        pipe.enable_model_cpu_offload()
    elif by_layer:
        pipe.enable_sequential_cpu_offload()
    elif any(by_group):
        from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                _maybe_remove_and_reapply_group_offloading(part)


@contextmanager
def scaled_lora(network: nn.Module | None, options: dict[str, Any] | None) -> Iterator[None]:
    """Multiply the strength of the adapters of a network by `scale` of `attention_kwargs` for some time."""
    scale = (options or {}).get("scale", 1.0)
    layers = [] if network is None or scale == 1.0 else [m for m in network.modules() if hasattr(m, "lora_A")]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update({name: value * scale for name, value in layer.scaling.items()})
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
