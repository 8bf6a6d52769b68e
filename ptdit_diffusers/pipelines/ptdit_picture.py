"""Starting from a picture: reading it, encoding it, mixing it with noise, and keeping what a mask leaves out.

It must not know prompts or the network; `PTDiTDenoisingMixin.generate` calls these at their places.
Letters: B samples, n pictures that were handed in, C latent channels, H W latent size, height width pixels.
"""

from functools import cached_property
from typing import Any

import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor

from .ptdit_checks import check_picture_count
from .ptdit_denoising import GenerationRequest


class PictureInputMixin:
    """A pipeline that begins with a noisy copy of a picture."""

    def read_pictures(self, request: GenerationRequest, samples: int) -> dict[str, Any]:
        """Check `image` and bring it to the size of the call.

        Returns:
            `image` (B, 3, height, width), values -1 to 1.

        Raises:
            ValueError: There is no picture, no VAE, or neither one picture nor one per prompt or sample.
        """
        image = self._read(self.image_processor, "image", request.image, request)
        return {"image": _spread("image", image, request.num_images_per_prompt, samples)}

    def start(self, pictures: dict[str, Any], noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """The picture at the noise level of the first step: (1 - level) * picture + level * noise."""
        image_latents = self.encode_picture(pictures["image"]).to(noise.device)
        level = self.noise_level(0).to(noise.device)
        latents = (1 - level) * image_latents + level * noise
        return {"latents": latents, "image_latents": image_latents, "noise": noise}

    def encode_picture(self, image: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, C, 1, H, W) in float32 of pictures (B, 3, height, width) from -1 to 1.

        The mean of the posterior is taken, so the same picture always gives the same latents.
        """
        video = image.unsqueeze(2).to(device=self._execution_device, dtype=self.vae.dtype)
        posterior = self.vae.encode(video, return_dict=False)[0]
        return posterior.mode().float() * self.vae.config.scaling_factor

    def _read(
        self,
        processor: VaeImageProcessor,
        name: str,
        pictures: Any,
        request: GenerationRequest,
        crop: tuple[int, int, int, int] | None = None,
    ) -> torch.Tensor:
        """Pictures of any kind as a tensor (n, channels, height, width) of the size of the call."""
        if self.vae is None:
            raise ValueError(f"`{name}` cannot be encoded: this pipeline was loaded without a VAE.")
        if pictures is None or (isinstance(pictures, list) and not pictures):
            raise ValueError(f"`{name}` is missing; pass a picture or a list of pictures.")
        mode = "default" if crop is None else "fill"
        try:
            return processor.preprocess(pictures, request.height, request.width, mode, crop).float()
        except (ValueError, TypeError, RuntimeError) as problem:
            kind = type(pictures[0] if isinstance(pictures, list) else pictures).__name__
            raise ValueError(
                f"`{name}` of type {kind} cannot be read; pass PIL pictures, arrays (height, width, channels) or "
                f"tensors (channels, height, width): {problem}"
            ) from problem


class MaskInputMixin(PictureInputMixin):
    """A pipeline that makes only the masked part of a picture new."""

    @cached_property
    def mask_processor(self) -> VaeImageProcessor:
        """Reads masks: one channel, 0 or 1."""
        return VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor_spatial,
            do_normalize=False,
            do_binarize=True,
            do_convert_grayscale=True,
        )

    def read_pictures(self, request: GenerationRequest, samples: int) -> dict[str, Any]:
        """Check `image` and `mask_image`, cut out the masked part if asked to, bring both to the size of the call.

        Returns:
            `image` (B, 3, height, width), -1 to 1; `mask` (B, 1, 1, H, W), 1 where the picture is made new; `crop`,
            the part that was cut out as (left, top, right, bottom), or None.

        Raises:
            ValueError: As for `image` alone; or `padding_mask_crop` goes with something it cannot be used with.
        """
        crop = None
        if request.padding_mask_crop is not None:
            kinds = isinstance(request.image, PIL.Image.Image) and isinstance(request.mask_image, PIL.Image.Image)
            if not kinds or request.output_type != "pil":
                raise ValueError(
                    f"padding_mask_crop={request.padding_mask_crop} needs one PIL picture, one PIL mask and "
                    f'output_type="pil"; got {type(request.image).__name__}, {type(request.mask_image).__name__} and '
                    f"{request.output_type!r}."
                )
            crop = self.mask_processor.get_crop_region(
                request.mask_image, request.width, request.height, pad=request.padding_mask_crop
            )
        image = self._read(self.image_processor, "image", request.image, request, crop)
        mask = self._read(self.mask_processor, "mask_image", request.mask_image, request, crop)
        side = 1 / self.vae_scale_factor_spatial
        mask = torch.nn.functional.interpolate(mask, scale_factor=side, mode="nearest").unsqueeze(2)
        copies = request.num_images_per_prompt
        image, mask = _spread("image", image, copies, samples), _spread("mask_image", mask, copies, samples)
        return {"image": image, "mask": mask, "crop": crop}

    def start(self, pictures: dict[str, Any], noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """As from a picture alone, and the mask (B, 1, 1, H, W)."""
        return {**super().start(pictures, noise), "mask": pictures["mask"].to(noise.device)}

    def keep_known(self, tensors: dict[str, torch.Tensor | None], level: torch.Tensor) -> torch.Tensor:
        """Where the mask is 0, the picture at the noise level of the moment, whatever the network made there."""
        level = level.to(tensors["noise"].device)
        known = (1 - level) * tensors["image_latents"] + level * tensors["noise"]
        return tensors["mask"] * tensors["latents"] + (1 - tensors["mask"]) * known

    def finish(self, result: Any, request: GenerationRequest, pictures: dict[str, Any]) -> Any:
        """Paste the made part back into the whole picture if `padding_mask_crop` cut it out."""
        if pictures["crop"] is None:
            return result
        return [
            self.image_processor.apply_overlay(request.mask_image, request.image, made, pictures["crop"])
            for made in result
        ]


def _spread(name: str, pictures: torch.Tensor, copies: int, samples: int) -> torch.Tensor:
    """One picture for all samples, one per prompt, or one per sample: repeated to one per sample."""
    check_picture_count(name, len(pictures), samples // copies, samples)
    return pictures.repeat_interleave(samples // len(pictures), dim=0)
