"""What the PT-DiT pipelines of one call share: components, loading, saving, and classifier-free guidance.

It must not know prompts, sizes and decoding (`ptdit_parts`) or the steps (`ptdit_denoising`).
Letters: B samples (prompts * pictures per prompt), L text tokens, C latent channels, F latent frames, H W latent size.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from ptdit_diffusers.core.embedded import resolve_model
from ptdit_diffusers.core.sampling import apply_guidance
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel

from .ptdit_denoising import TEXT_TENSORS, PTDiTDenoisingMixin
from .ptdit_lora import PTDiTLoraLoaderMixin
from .ptdit_parts import PTDiTPartsMixin
from .ptdit_remote import copy_code
from .ptdit_text import join_text


@dataclass
class PTDiTPipelineOutput(BaseOutput):
    """What a call returns: `images`, or `frames` of a video, or `views` with `num_views`; the others are None.

    Args:
        images: List of B pictures, array (B, height, width, 3) or tensor (B, 3, height, width), values 0 to 1.
        frames: List of B lists of pictures, array (B, frames, height, width, 3) or tensor (B, frames, 3, height,
            width), as the video pipelines of diffusers return them.
        views: As `frames`; view i of V is seen from azimuth i * 360 / V degrees. With `output_type="latent"` the field
            holds the latents (B, C, F, H, W).
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor | None = None
    frames: list[list[PIL.Image.Image]] | np.ndarray | torch.Tensor | None = None
    views: list[list[PIL.Image.Image]] | np.ndarray | torch.Tensor | None = None


class PTDiTPipelineBase(DiffusionPipeline, PTDiTPartsMixin, PTDiTDenoisingMixin, PTDiTLoraLoaderMixin):
    """Components and manners of the PT-DiT pipelines; what a call does is `PTDiTDenoisingMixin.generate`.

    Args:
        tokenizer: Tokeniser of the text encoder; adds its end token itself.
        text_encoder: T5 encoder. May be None when embeddings are passed.
        vae: Video VAE. May be None with `output_type="latent"` and no picture to start from.
        transformer: The denoiser. May be None when only `encode_prompt` is used.
        scheduler: Flow-matching Euler scheduler. With `use_dynamic_shifting` its `base_image_seq_len` is the number of
            tokens per frame at which the time shift is 1.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = []
    _callback_tensor_inputs = ["latents", *TEXT_TENSORS]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: T5EncoderModel,
        vae: AutoencoderKLOpenSoraPlan,
        transformer: PTDiTTransformer3DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # model_index.json names the library of each component. Our classes are registered in diffusers' namespace, and
        # only that spelling can be loaded from the Hub, so it is the one to record.
        if name in self.__dict__.get("_internal_dict", ()):
            component_class = type(getattr(value, "_orig_mod", value))
            if component_class.__module__.partition(".")[0] == __name__.partition(".")[0]:
                self.register_to_config(**{name: ("diffusers", component_class.__name__)})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "PTDiTPipelineBase":
        """Load a pipeline from a folder, a Hub id, or by the short name of a model that comes with the package.

        Args:
            pretrained_model_name_or_path: E.g. "shapes-128". A local folder of that name goes first.
            kwargs: Options of `DiffusionPipeline.from_pretrained`, e.g. `dtype` or single components.

        Raises:
            ValueError: Neither a folder, nor of the form owner/name, nor a known short name; the message lists those.
        """
        return super().from_pretrained(resolve_model(pretrained_model_name_or_path), **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save all components; a pipeline whose code came from the Hub takes that code along.

        Args:
            save_directory: Folder to write to.
            kwargs: Options of `DiffusionPipeline.save_pretrained`.
        """
        super().save_pretrained(save_directory, **kwargs)
        copy_code(type(self), save_directory)

    @property
    def guidance_scale(self) -> float:
        """Strength of guidance in the present call; a callback may change `_guidance_scale`."""
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        """How far guidance is scaled back in the present call, 0 to 1."""
        return self._guidance_rescale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether a negative prompt takes part: guidance above 1."""
        return self._guidance_scale > 1

    def guidance_texts(self, tensors: dict[str, torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Text of one forward in the order [negative, positive], without tokens that all samples mask."""
        names = ("negative_prompt", "prompt") if self.do_classifier_free_guidance else ("prompt",)
        embeds, mask = join_text(
            [tensors[f"{name}_embeds"] for name in names], [tensors[f"{name}_attention_mask"] for name in names]
        )
        return embeds.to(self.transformer.dtype), mask

    def guided_flow(
        self,
        latents: torch.Tensor,
        texts: tuple[torch.Tensor, torch.Tensor | None],
        step: int,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Flow (B, C, F, H, W) under classifier-free guidance, from one forward over all samples, guided or not."""
        embeds, mask = texts
        flow = self.predict_flow(torch.cat([latents] * (len(embeds) // len(latents))), embeds, mask, step, options)
        if not self.do_classifier_free_guidance:
            return flow
        return apply_guidance(flow, self.guidance_scale, self.guidance_rescale)
