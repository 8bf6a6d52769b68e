"""Images and masks that a call starts from: reading, encoding, mixing with noise, keeping what a mask leaves out.

Shapes: B samples, n images that were given, C latent channels, H W latent size; height and width are in pixels.
"""

from functools import cached_property
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from .ptdit_checks import check_image_count, is_integer, nearest_integer
from .ptdit_request import ImageRequest, InpaintRequest

SLACK = 0.05  # by which floats may leave their range, as after resizing
ROUNDING = 1e-3  # below 0: still an image from 0 to 1, and not one from -1 to 1
WHITE = 128  # of 255
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


class ImageInputMixin:
    """Starts from a noisy copy of an image."""

    def read_image(self, request: ImageRequest, crop: Box | None = None) -> Tensor:
        """Return `image` (B, 3, height, width) from -1 to 1: cut to `crop` if there is one, and resized.

        Raises:
            ValueError: There is no image, no VAE, or neither one image nor one per prompt or sample.
        """
        return self._read(self.image_processor, "image", request.image, request, crop)

    def encode_picture(self, image: Tensor) -> Tensor:
        """Encode images (B, 3, height, width) from -1 to 1 to scaled latents (B, C, 1, H, W) in float32.

        The mean of the posterior is taken, so the same image always gives the same latents.
        """
        video = image.unsqueeze(2).to(device=self._execution_device, dtype=self.vae.dtype)
        posterior = self.vae.encode(video, return_dict=False)[0]
        return posterior.mode().float() * self.vae.config.scaling_factor

    def mix_with_noise(self, image: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Return the encoded image at the noise level of the first step, `latents` (B, C, 1, H, W), and its two parts.

        It is (1 - level) * image + level * noise.
        """
        image_latents = self.encode_picture(image).to(noise.device)
        level = self.noise_level(0).to(noise.device)
        latents = (1 - level) * image_latents + level * noise
        return {"latents": latents, "image_latents": image_latents, "noise": noise}

    def _read(
        self, processor: VaeImageProcessor, name: str, images: Any, request: ImageRequest, crop: Box | None
    ) -> Tensor:
        """Return images of any kind as one tensor (B, channels, height, width)."""
        if self.vae is None:
            raise ValueError(f"`{name}` cannot be encoded: this pipeline was loaded without a VAE.")
        if images is None or (isinstance(images, list) and not images):
            raise ValueError(f"`{name}` is missing; pass an image or a list of images.")
        mode = "default" if crop is None else "fill"
        mask = processor is not self.image_processor
        many = isinstance(images, (list, tuple))
        images = [readable(name, image, mask) for image in images] if many else readable(name, images, mask)
        try:
            tensor = processor.preprocess(images, request.height, request.width, mode, crop).float()
        except (ValueError, TypeError, RuntimeError) as problem:
            kind = type(images[0] if isinstance(images, list) else images).__name__
            raise ValueError(
                f"`{name}` of type {kind} cannot be read; pass PIL images, arrays (height, width, channels) or "
                f"tensors (channels, height, width): {problem}"
            ) from problem
        if tensor.shape[1] not in (1, 1 if mask else 3):
            raise ValueError(
                f"`{name}` has {tensor.shape[1]} channels; pass {1 if mask else 3}: arrays (height, width, channels), "
                "tensors (channels, height, width), without alpha."
            )
        tensor = tensor if mask else tensor.expand(-1, 3, -1, -1)
        check_image_count(name, len(tensor), request.samples // request.num_images_per_prompt, request.samples)
        return tensor.repeat_interleave(request.samples // len(tensor), dim=0)


class MaskInputMixin(ImageInputMixin):
    """Changes only the masked part of an image."""

    @cached_property
    def mask_processor(self) -> VaeImageProcessor:
        """Reads masks: one channel, 0 or 1."""
        return VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor_spatial,
            do_normalize=False,
            do_binarize=True,
            do_convert_grayscale=True,
        )

    def crop_region(self, request: InpaintRequest) -> Box | None:
        """Return the part of the image that `padding_mask_crop` asks for, or None for the whole image.

        Raises:
            ValueError: `padding_mask_crop` is used with something else than one PIL image, mask and output.
        """
        if request.padding_mask_crop is None:
            return None
        kinds = isinstance(request.image, PIL.Image.Image) and isinstance(request.mask_image, PIL.Image.Image)
        if not kinds or request.output_type != "pil":
            raise ValueError(
                f"padding_mask_crop={request.padding_mask_crop} needs one PIL image, one PIL mask and "
                f'output_type="pil"; got {type(request.image).__name__}, {type(request.mask_image).__name__} and '
                f"{request.output_type!r}."
            )
        check_crop(request.image, request.mask_image, request.padding_mask_crop)
        return self.mask_processor.get_crop_region(
            request.mask_image, request.width, request.height, pad=request.padding_mask_crop
        )

    def read_mask(self, request: InpaintRequest, crop: Box | None = None) -> Tensor:
        """Return `mask_image` as (B, 1, 1, H, W), 1 where the image changes and 0 where it stays.

        Raises:
            ValueError: There is no mask, or neither one mask nor one per prompt or sample.
        """
        mask = self._read(self.mask_processor, "mask_image", request.mask_image, request, crop)
        side = 1 / self.vae_scale_factor_spatial
        mask = torch.nn.functional.interpolate(mask, scale_factor=side, mode="nearest").unsqueeze(2)
        return mask.to(self._execution_device)

    def keep_unmasked(self, tensors: dict[str, Tensor | None], level: Tensor) -> Tensor:
        """Return latents that are the original image at this noise level, 0 to 1, where the mask is 0."""
        level = level.to(tensors["noise"].device)
        known = (1 - level) * tensors["image_latents"] + level * tensors["noise"]
        return tensors["mask"] * tensors["latents"] + (1 - tensors["mask"]) * known

    def paste(self, request: InpaintRequest, images: list[PIL.Image.Image], crop: Box) -> list[PIL.Image.Image]:
        """Return the original image with the masked part of each of these at its place in `crop`."""
        return [self.image_processor.apply_overlay(request.mask_image, request.image, image, crop) for image in images]


def readable(name: str, image: Any, mask: bool) -> Any:
    """Return an image or mask so that diffusers reads it right: floats from 0 to 1 (or -1 to 1), or 8 bits of PIL.

    Args:
        name: Of the argument, for messages.
        image: A PIL image, an array or a tensor; anything else is returned as it is.
        mask: It is a mask: integers of 0 and 1 mean black and white there.

    Raises:
        ValueError: Its mode, type or values have no one meaning.
    """
    if isinstance(image, PIL.Image.Image):
        return _readable_pil(name, image)
    if isinstance(image, np.ndarray) and image.dtype.kind in "biuf":
        kind, least, most = image.dtype.kind, image.min(initial=0), image.max(initial=0)
    elif isinstance(image, Tensor) and not image.is_complex() and image.numel():
        kind = "b" if image.dtype == torch.bool else "f" if image.is_floating_point() else "i"
        least, most = (float(image.float().min()), float(image.float().max()))
    else:
        return image
    floats = image.astype(np.float32) if isinstance(image, np.ndarray) else image.float()
    if kind == "b":
        return floats
    if kind == "f":
        lowest = 0 if mask else -1
        if not lowest - SLACK <= least <= most <= 1 + SLACK:
            raise ValueError(
                f"`{name}` holds values from {least:.4g} to {most:.4g}; floats must be from 0 to 1"
                f"{'' if mask else ' (or -1 to 1)'}: divide pixels by 255."
            )
        return image.clip(min=0) if -ROUNDING < least < 0 else image
    eight_bits = image.dtype in (np.uint8, torch.uint8)
    if mask and least >= 0 and most <= 1:
        return floats
    if least < 0 or most > 255 or (not eight_bits and most <= 1):
        raise ValueError(
            f"`{name}` of {image.dtype} holds values from {least} to {most}; pass bytes from 0 to 255, or floats from "
            "0 to 1."
        )
    return floats / 255


def _readable_pil(name: str, image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode[0] in "IF":
        raise ValueError(
            f"`{name}` has mode {image.mode}, whose white is not known; pass 8 bits, for example "
            "Image.fromarray((array / array.max() * 255).astype('uint8'))."
        )
    if image.has_transparency_data:
        least, _ = image.convert("RGBA").getchannel("A").getextrema()
        if least < 255:
            raise ValueError(
                f"`{name}` is transparent in places; put it on a background, for example "
                "Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA')).convert('RGB')."
            )
        return image.convert("RGB")
    return image


def check_crop(image: PIL.Image.Image, mask: PIL.Image.Image, padding: Any) -> None:
    """Raise unless a mask has white pixels, is as large as its image, and the padding is an integer of at least 0."""
    if not is_integer(padding) or padding < 0:
        raise ValueError(
            f"padding_mask_crop={padding!r} must be an integer of at least 0; nearest: {nearest_integer(padding, 0)}."
        )
    if image.size != mask.size:
        raise ValueError(
            f"`image` has size {image.size} and `mask_image` {mask.size}; padding_mask_crop needs one size."
        )
    if _readable_pil("mask_image", mask).convert("L").getextrema()[1] < WHITE:
        raise ValueError("`mask_image` has no white pixels, so padding_mask_crop has nothing to cut out.")
