"""Registration with ComfyUI: model classes, detection before the stock one, LoRA keys, a checkpoint's VAE, own LoRAs.

Nothing else of ComfyUI is patched; ComfyUI-GGUF's list of architectures gets our name. Each wrapper calls the original
function, has a mark and is applied once, so other packs can wrap, too.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import comfy.lora
import comfy.model_detection
import comfy.sd
import comfy.supported_models
import comfy.text_encoders.pixart_t5
import folder_paths

from ptdit_diffusers.core.class_configuration import loaded_class_config
from ptdit_diffusers.core.configuration import loaded_transformer_config
from ptdit_diffusers.core.few_steps import student_folders

from .checkpoints import with_own_vae
from .dit import CLASS_MODEL, ClassConfig
from .native import IMAGE_MODEL, PTDiTConfig

MARK = "_ptdit_wrapper"
T5 = "t5xxl.transformer."  # beginning of ComfyUI's names of the weights of a T5
CONFIGS = {IMAGE_MODEL: (loaded_transformer_config, PTDiTConfig), CLASS_MODEL: (loaded_class_config, ClassConfig)}


def is_ours(model: Any) -> bool:
    """Return whether a ComfyUI model (BaseModel) is ours, whichever copy of this pack made it."""
    return model.model_config.unet_config.get("image_model") in CONFIGS


def lora_aliases(path: str) -> list[str]:
    """Return the names that LoRA files use for the layer at `path`, without those that ComfyUI knows by itself."""
    flat = path.replace(".", "_")
    dotted = [path, *(f"{start}.{path}" for start in ("transformer", "base_model.model", "unet"))]
    return [*dotted, f"lycoris_{flat}", f"lora_transformer_{flat}"]


def wrap_once(module: Any, name: str, wrapper: Callable) -> None:
    """Replace `module.name` by wrapper(original), unless ours is already somewhere in the chain."""
    original = function = getattr(module, name)
    while function is not None:
        if getattr(function, MARK, False):
            return
        function = getattr(function, "__wrapped__", None)
    wrapped = functools.wraps(original)(wrapper(original))
    setattr(wrapped, MARK, True)
    setattr(module, name, wrapped)


def with_detection(original: Callable) -> Callable:
    """Return `detect_unet_config` that asks us first.

    Stock detection takes PT-DiT for PixArt and drops half of it, and does not know DiT.
    """

    def detect_unet_config(state_dict: dict, key_prefix: str, *args: Any, **kwargs: Any) -> dict | None:
        metadata = args[0] if args else kwargs.get("metadata")
        for image_model, (loaded_config, _) in CONFIGS.items():
            config = loaded_config(state_dict, key_prefix, metadata)
            if config is not None:
                return {"image_model": image_model, **config}
        return original(state_dict, key_prefix, *args, **kwargs)

    return detect_unet_config


def with_lora_names(original: Callable) -> Callable:
    """Return `model_lora_keys_unet` that also knows the names that diffusers, PEFT and LyCORIS give to our layers."""

    def model_lora_keys_unet(model: Any, *args: Any, **kwargs: Any) -> dict:
        names = original(model, *args, **kwargs)
        if is_ours(model):
            for key in model.state_dict():
                if key.startswith("diffusion_model.") and key.endswith(".weight"):
                    path = key.removeprefix("diffusion_model.").removesuffix(".weight")
                    names.update(dict.fromkeys(lora_aliases(path), key))
        return names

    return model_lora_keys_unet


def with_text_lora_names(original: Callable) -> Callable:
    """Return `model_lora_keys_clip` that also knows diffusers' names of the layers of a T5 alone, which we have."""

    def model_lora_keys_clip(model: Any, *args: Any, **kwargs: Any) -> dict:
        names = original(model, *args, **kwargs)
        if isinstance(model, comfy.text_encoders.pixart_t5.PixArtT5XXL):
            for key in model.state_dict():
                if key.startswith(T5) and key.endswith(".weight"):
                    names[f"text_encoder.{key.removeprefix(T5).removesuffix('.weight')}"] = key
        return names

    return model_lora_keys_clip


def allow_gguf(prompt: dict) -> dict:
    """Add our architecture to the list of ComfyUI-GGUF. It may load after us, so this runs before each prompt."""
    for module in [each for each in sys.modules.values() if isinstance(each, ModuleType)]:
        names = vars(module).get("IMG_ARCH_LIST")
        if isinstance(names, set):
            names.add(IMAGE_MODEL)
    return prompt


def register() -> None:
    """Register our models with ComfyUI's loaders; a second call changes nothing."""
    models = comfy.supported_models.models
    for _, config in CONFIGS.values():
        ours = [index for index, each in enumerate(models) if each.unet_config == config.unet_config]
        if ours:
            models[ours[0]] = config
        else:
            models.append(config)
    for folder in student_folders():  # that come with the nodes; the wheel has not this form
        if (folder / "comfyui").is_dir():
            folder_paths.add_model_folder_path("loras", str(folder / "comfyui"))
    wrap_once(comfy.model_detection, "detect_unet_config", with_detection)
    wrap_once(comfy.lora, "model_lora_keys_unet", with_lora_names)
    wrap_once(comfy.lora, "model_lora_keys_clip", with_text_lora_names)
    wrap_once(comfy.sd, "load_state_dict_guess_config", with_own_vae)
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and allow_gguf not in server.on_prompt_handlers:
        server.add_on_prompt_handler(allow_gguf)
