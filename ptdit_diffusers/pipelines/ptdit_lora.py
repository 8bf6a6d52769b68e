"""Loading and saving LoRA weights for the pipeline, in diffusers' manner and from ComfyUI-style files.

It must not know the sampler, the text path or how a LoRA is trained.
"""

from typing import Any

import torch
from diffusers.loaders import CogVideoXLoraLoaderMixin

FOREIGN_PREFIX = "diffusion_model."
OUR_PREFIX = "transformer."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


class PTDiTLoraLoaderMixin(CogVideoXLoraLoaderMixin):
    """LoRA for `PTDiTTransformer3DModel`; the parent class does everything but the foreign key names."""

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | dict[str, torch.Tensor], **kwargs: Any
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """Read a LoRA file, folder, Hub id or dictionary and give its weights diffusers' names.

        Args:
            pretrained_model_name_or_path_or_dict: As for every pipeline of diffusers. Keys may begin with
                `transformer.` (diffusers) or `diffusion_model.` (ComfyUI and most trainers).
            kwargs: Options of diffusers' method, `return_lora_metadata` and `weight_name` among them.

        Returns:
            The weights, and with `return_lora_metadata=True` the file's metadata as well.
        """
        wants_metadata = kwargs.pop("return_lora_metadata", False)
        weights, metadata = super().lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        if any(key.startswith(FOREIGN_PREFIX) for key in weights):
            weights = convert_foreign_lora(weights)
        return (weights, metadata) if wants_metadata else weights


def convert_foreign_lora(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename `diffusion_model.<module>.lora_A|lora_down` keys and fold `<module>.alpha` into the weights.

    diffusers reads alpha only from metadata that such files do not have, so alpha / rank goes into the second matrix.
    """
    renamed = {}
    for key, value in weights.items():
        if key.startswith(FOREIGN_PREFIX):
            key = OUR_PREFIX + key.removeprefix(FOREIGN_PREFIX)
        renamed[key.replace(".lora_down.weight", DOWN).replace(".lora_up.weight", UP)] = value
    for key in [key for key in renamed if key.endswith(".alpha")]:
        module = key.removesuffix(".alpha")
        alpha = renamed.pop(key)
        rank = renamed[module + DOWN].shape[0]
        up = renamed[module + UP]
        renamed[module + UP] = (up.float() * (float(alpha) / rank)).to(up.dtype)
    return renamed
