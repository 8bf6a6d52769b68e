"""What all PT-DiT pipelines share: components, loading, prompts, checks and decoding.

It must not know how noise becomes a picture; that is `ptdit_denoising`.
Letters: B samples (prompts * pictures per prompt), L text tokens, C latent channels, F latent frames, H W latent size.
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel

from .ptdit_checks import (
    check_batch,
    check_count,
    check_output_type,
    check_size,
    check_text,
    require_finite,
    warn_of_black,
)
from .ptdit_denoising import TEXT_TENSORS, PTDiTDenoisingMixin
from .ptdit_embedded import resolve_model
from .ptdit_lora import PTDiTLoraLoaderMixin
from .ptdit_remote import copy_code
from .ptdit_text import join_text, prepare_prompts, tokenise


@dataclass
class PTDiTPipelineOutput(BaseOutput):
    """What a call returns: `images` for one frame, `frames` for a video; the other one is None.

    Args:
        images: List of B pictures, array (B, height, width, 3) or tensor (B, 3, height, width), values 0 to 1.
        frames: List of B lists of pictures, array (B, frames, height, width, 3) or tensor (B, frames, 3, height,
            width). With `output_type="latent"` either field holds the latents (B, C, F, H, W).
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor | None = None
    frames: list[list[PIL.Image.Image]] | np.ndarray | torch.Tensor | None = None


class PTDiTPipelineBase(DiffusionPipeline, PTDiTDenoisingMixin, PTDiTLoraLoaderMixin):
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
        self.vae_scale_factor_spatial = vae.spatial_compression_ratio if vae is not None else 8
        self.vae_scale_factor_temporal = vae.temporal_compression_ratio if vae is not None else 4
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor_spatial, do_convert_rgb=True)

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

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the present call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """Time of the present step, 0 to 1000; None outside the loop."""
        return self._current_timestep

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """`attention_kwargs` of the present call."""
        return self._attention_kwargs

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt = True` in a callback to stop after that step and decode what is there."""
        return self._interrupt

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        clean_caption: bool = True,
        max_sequence_length: int = 200,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Turn prompts into embeddings; each one is padded only to the longest of its own batch.

        Args:
            prompt, negative_prompt: Texts; a missing negative prompt is "". Not needed where embeddings are given.
            do_classifier_free_guidance: Whether the negative prompt is needed.
            num_images_per_prompt: How often each row is repeated.
            device: Where the embeddings go; default the pipeline's device.
            prompt_embeds, negative_prompt_embeds: Finished embeddings (prompts, L, width), only repeated here.
            prompt_attention_mask, negative_prompt_attention_mask: Their masks (prompts, L), true where a token counts;
                None if all do.
            clean_caption: Clean the prompt like the training captions. A negative prompt is never cleaned.
            max_sequence_length: Most tokens of a prompt; a longer one is cut, with a warning that names what is lost.

        Returns:
            Embeddings and bool mask of the prompt, then of the negative prompt (None, None without guidance).

        Raises:
            ValueError: A text has to be encoded, but there is no text encoder or tokeniser.
        """
        device = device or self._execution_device
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            prompts = prepare_prompts(prompts, clean_caption)
            prompt_embeds, prompt_attention_mask = self._encode("prompt", prompts, max_sequence_length, device)
        if not do_classifier_free_guidance:
            if negative_prompt or negative_prompt_embeds is not None:
                warnings.warn("guidance is off (scale <= 1): the negative prompt has no effect.", stacklevel=2)
            negative_prompt_embeds = negative_prompt_attention_mask = None
        elif negative_prompt_embeds is None:
            prompts = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""]
            prompts = prepare_prompts(prompts * (len(prompt_embeds) if len(prompts) == 1 else 1), clean=False)
            negative_prompt_embeds, negative_prompt_attention_mask = self._encode(
                "negative_prompt", prompts, max_sequence_length, device
            )
        parts = prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask
        prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask = (
            None if part is None else part.to(device).repeat_interleave(num_images_per_prompt, dim=0) for part in parts
        )
        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask

    def _encode(
        self, name: str, prompts: list[str], max_sequence_length: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                f"`{name}` cannot be encoded: this pipeline was loaded without text encoder or tokeniser; "
                f"pass `{name}_embeds`" + (" or guidance_scale=1." if name == "negative_prompt" else ".")
            )
        ids, mask = tokenise(self.tokenizer, prompts, max_sequence_length)
        ids, mask = ids.to(device), mask.to(device)
        embeds = self.text_encoder(ids, attention_mask=mask)[0]
        require_finite(embeds, f"{name} embeddings", self.text_encoder.dtype)
        return embeds, mask.bool()

    def _guidance_batch(self, tensors: dict[str, torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Text of one forward in the order [negative, positive], without tokens that all samples mask."""
        names = ("negative_prompt", "prompt") if self.do_classifier_free_guidance else ("prompt",)
        embeds, mask = join_text(
            [tensors[f"{name}_embeds"] for name in names], [tensors[f"{name}_attention_mask"] for name in names]
        )
        return embeds.to(self.transformer.dtype), mask

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        height: int,
        width: int,
        num_frames: int = 1,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
    ) -> int:
        """Check what depends on each other: texts, sizes, generators, latents, components. Arguments as in a call.

        Returns:
            The number of samples: prompts * pictures per prompt.

        Raises:
            ValueError: Something does not fit; the message names the value, the rule and the nearest legal values.
        """
        width_of_text = self.transformer.config.caption_channels
        check_text("prompt", prompt, prompt_embeds, prompt_attention_mask, width_of_text)
        negative = negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask
        check_text("negative_prompt", *negative, width_of_text)
        if prompt is None and prompt_embeds is None:
            raise ValueError("`prompt` and `prompt_embeds` are both None; pass one of them.")
        prompts = len(prompt_embeds) if prompt is None else 1 if isinstance(prompt, str) else len(prompt)
        if isinstance(negative_prompt, list):
            check_batch("negative_prompt", len(negative_prompt), prompts, "one string")
        if negative_prompt_embeds is not None:
            check_batch("negative_prompt_embeds", len(negative_prompt_embeds), prompts)

        spatial, patch = self.vae_scale_factor_spatial, self.transformer.config.patch_size
        for name, size in (("height", height), ("width", width)):
            check_size(name, size, spatial * patch, 0, f"VAE {spatial} x patch {patch}")
        check_size("num_frames", num_frames, self.vae_scale_factor_temporal, 1, "frames that the VAE packs into one")
        check_count("num_images_per_prompt", num_images_per_prompt)
        samples = prompts * num_images_per_prompt
        if isinstance(generator, list):
            check_batch("generator", len(generator), samples, "one generator")
        expected = self._latent_shape(samples, height, width, num_frames)
        if latents is not None and tuple(latents.shape) != expected:
            raise ValueError(f"`latents` must have shape {expected} for this call, got {tuple(latents.shape)}.")
        check_output_type(output_type)
        if self.vae is None and output_type != "latent":
            raise ValueError(f'output_type={output_type!r} needs a VAE, but this pipeline has none; pass "latent".')
        return samples

    def _latent_shape(self, samples: int, height: int, width: int, num_frames: int) -> tuple[int, int, int, int, int]:
        spatial, frames = self.vae_scale_factor_spatial, (num_frames - 1) // self.vae_scale_factor_temporal + 1
        return samples, self.transformer.config.in_channels, frames, height // spatial, width // spatial

    def _fill_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        if self.transformer is None:
            raise ValueError("this pipeline was loaded without a transformer; only `encode_prompt` can be used.")
        default_height, default_width = self.default_size()
        return default_height if height is None else height, default_width if width is None else width

    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels at which the trained windows fit exactly (official weights: 1024)."""
        windows_per_side = max(1, round(math.sqrt(self.transformer.config.num_windows)))
        pixels_per_token = self.vae_scale_factor_spatial * self.transformer.config.patch_size
        _, rows, columns = self.transformer.config.window_size
        return rows * windows_per_side * pixels_per_token, columns * windows_per_side * pixels_per_token

    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil") -> list | np.ndarray | torch.Tensor:
        """Turn latents (B, C, F, H, W) into pictures (F = 1) or videos; "latent" returns them as they are.

        Raises:
            RuntimeError: Latents or pixels hold NaN or infinite values.
        """
        require_finite(latents, "latents", self.transformer.dtype)
        if output_type == "latent":
            return latents
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        video = self.vae.decode(latents, return_dict=False)[0].float()
        require_finite(video, "decoded pixels", self.vae.dtype)
        warn_of_black(video, self.vae.dtype)
        if latents.shape[2] == 1:
            return self.video_processor.postprocess(video[:, :, 0], output_type)
        return self.video_processor.postprocess_video(video, output_type)
