"""The causal video VAE as a ComfyUI VAE: stock decode, encode, tiled forms and out-of-memory fallback use it.

All weights of a file are checked before anything is loaded.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ptdit_diffusers.core.archives import check_archive
from ptdit_diffusers.core.backbones.parameters import VAEParameters
from ptdit_diffusers.core.backbones.vae import SPATIAL_RATIO, TEMPORAL_RATIO, PTDiTVAEBackbone
from ptdit_diffusers.core.checkpoint_names import (
    PACKED_CONFIG,
    check_tensors,
    check_weights,
    find_weights,
    kind_of,
    official_vae_state_dict,
    shapes_of,
)
from ptdit_diffusers.core.configuration import loaded_vae_config, pack_config
from ptdit_diffusers.core.devices import check_operations

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def read_vae(path: Path) -> tuple[dict[str, Tensor], VAEParameters]:
    """Return the weights of a VAE checkpoint under their own names, and the sizes of the VAE.

    Raises:
        ValueError: The file is no checkpoint, would run code, or holds another model.
    """
    metadata: Mapping[str, str] = {}
    try:
        if path.suffix in (".safetensors", ".sft"):
            content, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
        else:  # files in torch's older format, which is no zip file, cannot be mapped
            if packed := zipfile.is_zipfile(path):
                check_archive(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except Exception as error:
        raise ValueError(
            f"{path.name} cannot be read as weights: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
    tensors = find_weights(content)[1] if isinstance(content, Mapping) else {}
    check_tensors(path.name, tensors)
    config = loaded_vae_config(tensors, metadata)
    if config is None:
        kind = kind_of(tensors) or "of another kind"
        raise ValueError(
            f"{path.name} is not the causal VAE of Open-Sora-Plan; it seems to be {kind}. "
            "Other VAEs load with the stock Load VAE node."
        )
    return official_vae_state_dict(tensors), VAEParameters.from_config(config)


class PTDiTAutoencoder(PTDiTVAEBackbone):
    """The backbone with ComfyUI's layers, under the two names that ComfyUI calls."""

    def __init__(self, parameters: VAEParameters):
        super().__init__()
        self.build(parameters, operations=comfy.ops.disable_weight_init)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode (B, 3, T, H, W) in -1..1 to the mean of unscaled latents (B, z, (T - 1) / 4 + 1, H / 8, W / 8)."""
        return self.encode_moments(pixels).chunk(2, dim=1)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode unscaled latents (B, z, T, h, w) to pixels (B, 3, 4 (T - 1) + 1, 8 h, 8 w) of about -1..1."""
        return self.decode_pixels(latents)


def to_unit_range(image: Tensor) -> Tensor:
    """Map -1..1 to 0..1, in place and returned: older ComfyUI uses the result, newer only the change in place."""
    return image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)


def as_clips(samples: Tensor) -> Tensor:
    """Turn (B, z, h, w) into (B, z, 1, h, w); latents that have frames stay as they are."""
    return samples.unsqueeze(2) if samples.ndim == 4 else samples


class PTDiTVAE(comfy.sd.VAE):
    """A ComfyUI VAE around `PTDiTAutoencoder`.

    Args:
        weights: name -> tensor, exactly those of the VAE.
        parameters: sizes of the VAE.
        pictures: a batch of images is a batch of pictures; else it is the frames of one video.
        dtype: format of weights and computing; None chooses by device.
        name: of the file, for messages.

    Raises:
        ConversionError: The weights are not exactly those of such a VAE; names the first ones.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        parameters: VAEParameters,
        pictures: bool = True,
        dtype: torch.dtype | None = None,
        name: str = "the VAE",
    ):
        with torch.device("meta"):  # no memory before the weights are known to fit
            expected = shapes_of(PTDiTAutoencoder(parameters).state_dict())
        check_weights(name, "the causal VAE of Open-Sora-Plan", expected, shapes_of(weights))
        self.first_stage_model = PTDiTAutoencoder(parameters).eval()
        self.describe(parameters, pictures)
        management = comfy.model_management
        self.device = management.vae_device()
        if self.device.type == "mps":
            check_operations("mps")
        self.vae_dtype = dtype or management.vae_dtype(self.device, self.working_dtypes)
        self.output_device = management.intermediate_device()
        self.first_stage_model.to(self.vae_dtype)
        if hasattr(management, "archive_model_dtypes"):
            management.archive_model_dtypes(self.first_stage_model)
        patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
        self.patcher = patcher(
            self.first_stage_model, load_device=self.device, offload_device=management.vae_offload_device()
        )
        dynamic = getattr(self.patcher, "is_dynamic", lambda: False)()
        self.first_stage_model.load_state_dict(weights, **({"assign": True} if dynamic else {}))
        if hasattr(self, "model_size"):
            self.model_size()

    def decode(self, samples_in: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Decode as ComfyUI does, to (B, F, H, W, C); a latent with four axes is pictures and gives (B, H, W, C)."""
        pixels = super().decode(as_clips(samples_in), *args, **kwargs)
        return pixels.squeeze(1) if samples_in.ndim == 4 else pixels

    def decode_tiled(self, samples: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Decode in tiles; axes as in `decode`."""
        pixels = super().decode_tiled(as_clips(samples), *args, **kwargs)
        return pixels.squeeze(1) if samples.ndim == 4 else pixels

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Encode as ComfyUI does: pictures (B, H, W, C) to latents with four axes, videos to five."""
        return self.as_given(super().encode(pixel_samples), pixel_samples)

    def encode_tiled(self, pixel_samples: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Encode in tiles; axes as in `encode`."""
        return self.as_given(super().encode_tiled(pixel_samples, *args, **kwargs), pixel_samples)

    def get_sd(self) -> dict[str, Tensor]:
        """Return what ComfyUI saves: the weights, and the sizes that they do not show."""
        return {**super().get_sd(), PACKED_CONFIG: pack_config(asdict(self.parameters))}

    def as_given(self, latents: Tensor, pixels: Tensor) -> Tensor:
        """Return latents (B, z, 1, h, w) of pictures without the axis of frames, others unchanged."""
        return latents.squeeze(2) if self.not_video and pixels.ndim == 4 else latents

    def describe(self, parameters: VAEParameters, pictures: bool) -> None:
        """Set all attributes that ComfyUI's own methods read from a VAE."""
        self.parameters = parameters

        def bytes_for(pixels: int, maps: int, dtype: torch.dtype) -> float:  # feature maps of full size at a time
            return pixels * parameters.hidden_size * maps * comfy.model_management.dtype_size(dtype)

        def frames_of(latent_frames: int) -> int:
            return max(1, (latent_frames - 1) * TEMPORAL_RATIO + 1)

        self.memory_used_encode = lambda shape, dtype: bytes_for(math.prod(shape[2:]), 6, dtype)  # measured: 5.1
        self.memory_used_decode = lambda shape, dtype: bytes_for(
            frames_of(shape[2]) * shape[3] * shape[4] * SPATIAL_RATIO**2,
            12,
            dtype,  # measured: 12.0
        )
        self.downscale_ratio = (
            lambda frames: max(1, (frames - 1) // TEMPORAL_RATIO + 1), SPATIAL_RATIO, SPATIAL_RATIO
        )  # fmt: skip
        self.upscale_ratio = (frames_of, SPATIAL_RATIO, SPATIAL_RATIO)
        self.downscale_index_formula = self.upscale_index_formula = (TEMPORAL_RATIO, SPATIAL_RATIO, SPATIAL_RATIO)
        self.latent_channels, self.latent_dim = parameters.z_channels, 3
        self.output_channels = parameters.out_channels
        self.process_input = lambda image: image * 2.0 - 1.0
        self.process_output = to_unit_range
        self.working_dtypes = [torch.bfloat16, torch.float16, torch.float32]
        self.not_video = pictures
        self.crop_input = True
        self.disable_offload = self.handles_tiling = False
        self.pad_channel_value = self.size = self.extra_1d_channel = self.format_encoded = None
        self.audio_sample_rate = 44100


def load_vae(path: str, pictures: bool = True, dtype_name: str = "auto") -> PTDiTVAE:
    """Load the VAE of an official `.ckpt`, or of a safetensors file.

    Raises:
        ValueError: It is another file.
    """
    vae = PTDiTVAE(*read_vae(Path(path)), pictures, DTYPES.get(dtype_name), Path(path).name)
    vae.patcher.cached_patcher_init = (vae_patcher, (path, pictures, dtype_name))
    return vae


def vae_patcher(path: str, pictures: bool, dtype_name: str, disable_dynamic: bool = False) -> Any:
    """Load a VAE again and return its patcher: ComfyUI calls this for another device."""
    return load_vae(path, pictures, dtype_name).patcher


def preview_factors(vae: PTDiTVAE, scale: float) -> list[list[float]]:
    """Return factors from scaled latents to rough colors (-1..1): one row per latent channel, then the bias.

    They are fitted by least squares to 27 plain colors.
    """
    levels = torch.tensor([0.0, 0.5, 1.0])
    colors = torch.cartesian_prod(levels, levels, levels)  # (27, 3)
    pictures = colors[:, None, None].expand(-1, 32, 32, -1)  # (27, H, W, 3)
    latents = torch.cat([vae.encode(picture) for picture in pictures.split(1)]).float()  # (27, z, 4, 4), or a frame
    points = latents[..., 1:3, 1:3].mean((-1, -2)).flatten(1) * scale
    points = torch.cat([points, torch.ones(len(points), 1)], dim=1).to("cpu")
    return torch.linalg.lstsq(points, colors * 2 - 1).solution.tolist()
