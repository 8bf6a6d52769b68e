"""Sizes of a call, the noise that it begins with, and what becomes of its latents.

Shapes: B samples (prompts * images per prompt), C latent channels, F latent frames, H W latent size; height and width
are in pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from ptdit_diffusers.core.sampling import default_size

from .ptdit_checks import check_views, require_finite, warn_of_black
from .ptdit_request import GenerationRequest


class LatentsMixin:
    """Knows the sizes of the `vae` and `transformer` of the pipeline, and decodes; the VAE may be None."""

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
        """Reads the images that a call is given, and pastes images into others."""
        return VaeImageProcessor(vae_scale_factor=self.vae_scale_factor_spatial, do_convert_rgb=True)

    def default_size(self) -> tuple[int, int]:
        """Return height and width in pixels at which the trained windows fit exactly (official weights: 1024)."""
        return default_size(self.transformer.config, self.vae_scale_factor_spatial)

    def fill_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return height and width in pixels, with the default size where None is given.

        Raises:
            ValueError: There is no transformer.
        """
        if self.transformer is None:
            raise ValueError("this pipeline was loaded without a transformer; only `encode_prompt` can be used.")
        default_height, default_width = self.default_size()
        return default_height if height is None else height, default_width if width is None else width

    def clip_length(self, num_frames: int, num_views: int | None = None) -> int:
        """Return the frames of a video, or for views the length of the video that has a latent frame for each.

        So the network sees V views as it sees the 4 (V - 1) + 1 frames of a video: V latent frames on its time axis,
        with positions 0 to V - 1 there (views stand on a line, not on a circle: the last does not know that the first
        follows), the same windows, and the same time shift. Only the VAE treats them in another way.

        Raises:
            ValueError: Both were given, or there are fewer than two views.
        """
        check_views(num_views, num_frames)
        return num_frames if num_views is None else (num_views - 1) * self.vae_scale_factor_temporal + 1

    def latent_shape(self, samples: int, height: int, width: int, num_frames: int) -> tuple[int, int, int, int, int]:
        """Return the shape (B, C, F, H, W) of the latents of a call."""
        spatial, frames = self.vae_scale_factor_spatial, (num_frames - 1) // self.vae_scale_factor_temporal + 1
        return samples, self.transformer.config.in_channels, frames, height // spatial, width // spatial

    def prepare_noise(self, call: GenerationRequest) -> Tensor:
        """Return the noise (B, C, F, H, W) of a checked call: sampled, or the `latents` that were given."""
        shape = self.latent_shape(call.samples, call.height, call.width, call.num_frames)
        return self.prepare_latents(shape, self._execution_device, call.generator, call.latents)

    def prepare_latents(
        self,
        shape: tuple[int, int, int, int, int],
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Return standard normal noise (B, C, F, H, W) in float32, or the `latents` that were given.

        It is sampled one by one on the generator's device, so sample i does not depend on the size of the batch.
        """
        if latents is not None:
            return latents.to(device=device, dtype=torch.float32)
        generators = generator if isinstance(generator, list) else [generator] * shape[0]
        return torch.cat([randn_tensor((1, *shape[1:]), one, device, torch.float32) for one in generators])

    def decode_latents(
        self, latents: Tensor, output_type: str = "pil", views: bool = False
    ) -> list | np.ndarray | Tensor:
        """Turn latents (B, C, F, H, W) into images (F = 1) or videos; "latent" returns them as they are.

        Args:
            latents: Scaled latents.
            output_type: "pil", "np", "pt" or "latent".
            views: Each latent frame is an image of its own, decoded alone: nothing blends over time.

        Raises:
            RuntimeError: Latents or pixels hold NaN or infinite values.
        """
        require_finite(latents, "latents", self.transformer)
        if output_type == "latent":
            return latents
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        single = latents.shape[2] == 1
        parts = latents.split(1, dim=2) if views else [latents]
        runs = sum(self.vae.decoder_runs(part.shape) for part in parts)
        with nullcontext() if single else self._decoding_bar(runs):
            decoded = [self.vae.decode(part, return_dict=False)[0].float() for part in parts]
        video = decoded[0] if len(decoded) == 1 else torch.cat(decoded, dim=2)
        require_finite(video, "decoded pixels", self.vae)
        warn_of_black(video, self.vae.dtype)
        if single:
            return self.video_processor.postprocess(video[:, :, 0], output_type)
        return self.video_processor.postprocess_video(video, output_type)

    @contextmanager
    def _decoding_bar(self, runs: int) -> Iterator[None]:
        """Show a progress bar that counts the runs of the VAE's decoder: views, samples, tiles."""
        with self.progress_bar(total=runs) as bar:
            bar.set_description("decoding")

            def count(*_: Any) -> None:  # what a hook returns would replace the output
                bar.update()

            hook = self.vae.decoder.register_forward_hook(count)
            try:
                yield
            finally:
                hook.remove()
