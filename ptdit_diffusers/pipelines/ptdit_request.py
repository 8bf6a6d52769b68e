"""The arguments of one call of a pipeline, under the names that `__call__` documents."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from ptdit_diffusers.core.backbones.windows import Triple


@dataclass(kw_only=True)
class GenerationRequest:
    """What text to image, video and views take. The steps of a call read it, or the state of a modular block instead.

    `check_call` replaces `height`, `width` and `num_frames` by the sizes to use and adds `samples`.
    """

    prompt: str | list[str] | None
    negative_prompt: str | list[str] | None
    height: int | None
    width: int | None
    num_frames: int = 1
    num_views: int | None = None
    num_inference_steps: int
    sigmas: list[float] | None
    timesteps: list[float] | None
    guidance_scale: float
    guidance_rescale: float
    num_images_per_prompt: int
    generator: torch.Generator | list[torch.Generator] | None
    latents: Tensor | None
    prompt_embeds: Tensor | None
    prompt_attention_mask: Tensor | None
    negative_prompt_embeds: Tensor | None
    negative_prompt_attention_mask: Tensor | None
    output_type: str
    return_dict: bool
    attention_kwargs: dict[str, Any] | None
    callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None
    callback_on_step_end_tensor_inputs: list[str]
    clean_caption: bool
    max_sequence_length: int
    window_size: str | Triple
    proxy_ratio: str | Triple
    samples: int = field(init=False)  # prompts * images per prompt


@dataclass(kw_only=True)
class ImageRequest(GenerationRequest):
    """What image to image takes besides."""

    image: Any
    strength: float


@dataclass(kw_only=True)
class InpaintRequest(ImageRequest):
    """What inpainting takes besides."""

    mask_image: Any
    padding_mask_crop: int | None
