"""What the PT-DiT pipelines do with their components outside the steps: read prompts, check a call, decode latents.

It must not know how noise becomes a picture, or whether the pipeline is a `DiffusionPipeline` or made of blocks.
Letters: B samples (prompts * pictures per prompt), L text tokens, C latent channels, F latent frames, H W latent size.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor

from ptdit_diffusers.core.captions import prepare_prompts

from .ptdit_checks import (
    check_batch,
    check_count,
    check_output_type,
    check_size,
    check_text,
    check_views,
    require_finite,
    warn_of_black,
    warn_of_pictures_only,
)
from .ptdit_text import tokenise


class PTDiTPartsMixin:
    """The work of tokeniser, text encoder and VAE; the pipeline that mixes this in holds them, or None instead."""

    @property
    def vae_scale_factor_spatial(self) -> int:
        """Pixels per latent cell along one side."""
        vae = getattr(self, "vae", None)
        return 8 if vae is None else vae.spatial_compression_ratio

    @property
    def vae_scale_factor_temporal(self) -> int:
        """Frames that the VAE packs into one latent frame."""
        vae = getattr(self, "vae", None)
        return 4 if vae is None else vae.temporal_compression_ratio

    @cached_property
    def video_processor(self) -> VideoProcessor:
        """Turns decoded frames into what a call returns."""
        return VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    @cached_property
    def image_processor(self) -> VaeImageProcessor:
        """Reads the pictures that a call is given, and lays pictures over each other."""
        return VaeImageProcessor(vae_scale_factor=self.vae_scale_factor_spatial, do_convert_rgb=True)

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
        expected = self.latent_shape(samples, height, width, num_frames)
        if latents is not None and tuple(latents.shape) != expected:
            raise ValueError(f"`latents` must have shape {expected} for this call, got {tuple(latents.shape)}.")
        check_output_type(output_type)
        if self.vae is None and output_type != "latent":
            raise ValueError(f'output_type={output_type!r} needs a VAE, but this pipeline has none; pass "latent".')
        warn_of_pictures_only(expected[2], self.transformer.config.sample_frames)
        return samples

    def clip_length(self, num_frames: int, num_views: int | None = None) -> int:
        """Length of a call in the frames of a video: `num_frames`, or for views the length with a latent frame each.

        So the network sees V views as it sees the 4 (V - 1) + 1 frames of a video: V latent frames on its time axis,
        with positions 0 to V - 1 there (views stand on a line, not on a circle: the last does not know that the first
        follows), the same windows, and the same time shift. Only the VAE treats them in another way.

        Raises:
            ValueError: Both were given, or there are fewer than two views.
        """
        check_views(num_views, num_frames)
        return num_frames if num_views is None else (num_views - 1) * self.vae_scale_factor_temporal + 1

    def latent_shape(self, samples: int, height: int, width: int, num_frames: int) -> tuple[int, int, int, int, int]:
        """Shape (B, C, F, H, W) of the latents of a call; height and width in pixels."""
        spatial, frames = self.vae_scale_factor_spatial, (num_frames - 1) // self.vae_scale_factor_temporal + 1
        return samples, self.transformer.config.in_channels, frames, height // spatial, width // spatial

    def fill_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, with the model's own where None is given.

        Raises:
            ValueError: There is no transformer.
        """
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

    def decode_latents(
        self, latents: torch.Tensor, output_type: str = "pil", views: bool = False
    ) -> list | np.ndarray | torch.Tensor:
        """Turn latents (B, C, F, H, W) into pictures (F = 1) or videos; "latent" returns them as they are.

        Args:
            latents: Scaled latents.
            output_type: "pil", "np", "pt" or "latent".
            views: Each latent frame is a picture of its own, decoded alone: nothing blends over time.

        Raises:
            RuntimeError: Latents or pixels hold NaN or infinite values.
        """
        require_finite(latents, "latents", self.transformer.dtype)
        if output_type == "latent":
            return latents
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        if latents.shape[2] == 1:
            video = self.vae.decode(latents, return_dict=False)[0].float()
        elif views:
            with self._decoding_bar(latents.split(1, dim=2)) as parts:
                video = torch.cat([self.vae.decode(part, return_dict=False)[0].float() for part in parts], dim=2)
        else:
            with self._decoding_bar([latents]):
                video = self.vae.decode(latents, return_dict=False)[0].float()
        require_finite(video, "decoded pixels", self.vae.dtype)
        warn_of_black(video, self.vae.dtype)
        if latents.shape[2] == 1:
            return self.video_processor.postprocess(video[:, :, 0], output_type)
        return self.video_processor.postprocess_video(video, output_type)

    @contextmanager
    def _decoding_bar(self, parts: Sequence[torch.Tensor]) -> Iterator[Sequence[torch.Tensor]]:
        """A progress bar that counts the runs of the VAE's decoder: views, samples, tiles."""
        with self.progress_bar(total=sum(self.vae.decoder_runs(part.shape) for part in parts)) as bar:
            bar.set_description("decoding")

            def count(*_: Any) -> None:  # what a hook returns would replace the output
                bar.update()

            hook = self.vae.decoder.register_forward_hook(count)
            try:
                yield parts
            finally:
                hook.remove()
