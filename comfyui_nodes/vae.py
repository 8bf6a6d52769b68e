"""The causal video VAE as a ComfyUI VAE: stock decode, encode, tiled forms and out-of-memory fallback use it.

No maths of its own; files are checked name by name before anything is built.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import torch

from ptdit_diffusers.core.backbones.parameters import VAEParameters
from ptdit_diffusers.core.backbones.vae import SPATIAL_RATIO, TEMPORAL_RATIO, PTDiTVAEBackbone
from ptdit_diffusers.core.checkpoint_names import clean_names, find_weights, kind_of

ARGUMENTS = ("in_channels", "out_channels", "hidden_size", "hidden_size_mult", "z_channels", "num_res_blocks")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights of a checkpoint under their own names, and the configuration in its header if there is one.

    Raises:
        ValueError: It is no checkpoint, or one that would run code.
    """
    metadata: Mapping[str, str] = {}
    try:
        if path.suffix in (".safetensors", ".sft"):
            content, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path.name} cannot be read as weights: {str(error).splitlines()[0]}") from error
    tensors = find_weights(content)[1] if isinstance(content, Mapping) else {}
    weights = {clean: tensors[name] for clean, name in clean_names(tensors).items() if "loss" not in clean}
    config = json.loads((metadata or {}).get("config", "{}"))
    return weights, config if isinstance(config, dict) else {}


def infer_vae_config(weights: Mapping[str, torch.Tensor], name: str) -> dict[str, Any]:
    """Arguments of the VAE with these weights; norm groups leave no trace and are the released 32.

    Raises:
        ValueError: These are other weights; says whose they seem to be.
    """
    if "encoder.mid.attn_1.q.conv.weight" not in weights or "decoder.conv_out.conv.weight" not in weights:
        raise ValueError(
            f"{name} is not the causal VAE of Open-Sora-Plan; it seems to be {kind_of(weights) or 'of another kind'}. "
            "Other VAEs load with the stock Load VAE node."
        )
    first = weights["encoder.conv_in.weight"]
    hidden, in_channels = first.shape[:2]
    widths = [weights[f"encoder.down.{level}.block.0.norm2.weight"].shape[0] for level in range(4)]
    blocks = {key.split(".")[4] for key in weights if key.startswith("encoder.down.0.block.")}
    return {
        "in_channels": in_channels,
        "out_channels": weights["decoder.conv_out.conv.weight"].shape[0],
        "hidden_size": hidden,
        "hidden_size_mult": tuple(width // hidden for width in widths),
        "z_channels": weights["post_quant_conv.conv.weight"].shape[0],
        "num_res_blocks": len(blocks),
    }


class PTDiTAutoencoder(PTDiTVAEBackbone):
    """The backbone with ComfyUI's layers, under the two names that ComfyUI calls."""

    def __init__(self, **config: Any):
        super().__init__()
        self.build(VAEParameters(**config), operations=comfy.ops.disable_weight_init)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, T, H, W) in -1..1 to the mean of the unscaled latents (B, z, (T - 1) / 4 + 1, H / 8, W / 8)."""
        return self.encode_moments(pixels).chunk(2, dim=1)[0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Unscaled latents (B, z, T, h, w) to pixels (B, 3, 4 (T - 1) + 1, 8 h, 8 w) of about -1..1."""
        return self.decode_pixels(latents)


def to_unit_range(image: torch.Tensor) -> torch.Tensor:
    """-1..1 to 0..1, in place and returned: older ComfyUI uses the result, newer only the change in place."""
    return image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)


def as_clips(samples: torch.Tensor) -> torch.Tensor:
    """(B, z, h, w) to (B, z, 1, h, w); latents that have frames stay as they are."""
    return samples.unsqueeze(2) if samples.ndim == 4 else samples


class PTDiTVAE(comfy.sd.VAE):
    """A ComfyUI VAE around `PTDiTAutoencoder`.

    Args:
        weights: name -> tensor, exactly those of the VAE.
        config: fields of `VAEParameters`.
        pictures: a batch of images is a batch of pictures; else it is the frames of one video.
        dtype: format of weights and computing; None chooses by device.
        name: of the file, for messages.

    Raises:
        ValueError: Weights are missing or have other shapes; names the first ones.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        pictures: bool = True,
        dtype: torch.dtype | None = None,
        name: str = "the VAE",
    ):
        self.first_stage_model = PTDiTAutoencoder(**config).eval()
        expected = self.first_stage_model.state_dict()
        wrong = [key for key, value in expected.items() if key not in weights or weights[key].shape != value.shape]
        if wrong:
            raise ValueError(
                f"{name}: {len(wrong)} weights of the VAE are missing or misshapen: {', '.join(wrong[:5])}"
            )
        self.describe(config, pictures)
        management = comfy.model_management
        self.device = management.vae_device()
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
        kept = {key: weights[key] for key in expected}
        self.first_stage_model.load_state_dict(kept, **({"assign": True} if dynamic else {}))
        if hasattr(self, "model_size"):
            self.model_size()

    def decode(self, samples_in: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As ComfyUI's; a latent with four axes, which came from no sampler, is a batch of pictures."""
        return super().decode(as_clips(samples_in), *args, **kwargs)

    def decode_tiled(self, samples: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As ComfyUI's, likewise."""
        return super().decode_tiled(as_clips(samples), *args, **kwargs)

    def describe(self, config: Mapping[str, Any], pictures: bool) -> None:
        """Everything that ComfyUI's own methods read of a VAE."""
        hidden = config["hidden_size"]

        def bytes_for(pixels: int, maps: int, dtype: torch.dtype) -> float:  # maps of full size that live at once
            return pixels * hidden * maps * comfy.model_management.dtype_size(dtype)

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
        self.latent_channels, self.latent_dim = config["z_channels"], 3
        self.output_channels = config["out_channels"]
        self.process_input = lambda image: image * 2.0 - 1.0
        self.process_output = to_unit_range
        self.working_dtypes = [torch.bfloat16, torch.float16, torch.float32]
        self.not_video = pictures
        self.crop_input = True
        self.disable_offload = self.handles_tiling = False
        self.pad_channel_value = self.size = self.extra_1d_channel = self.format_encoded = None
        self.audio_sample_rate = 44100


def load_vae(path: str, pictures: bool = True, dtype_name: str = "auto") -> PTDiTVAE:
    """The VAE of an official `.ckpt`, or of our safetensors.

    Raises:
        ValueError: It is another file.
    """
    weights, given = read_weights(Path(path))
    config = infer_vae_config(weights, Path(path).name)
    config |= {key: given[key] for key in (*ARGUMENTS, "norm_num_groups") if key in given}
    vae = PTDiTVAE(weights, config, pictures, DTYPES.get(dtype_name), Path(path).name)
    vae.patcher.cached_patcher_init = (vae_patcher, (path, pictures, dtype_name))
    return vae


def vae_patcher(path: str, pictures: bool, dtype_name: str, disable_dynamic: bool = False) -> Any:
    """The patcher of a freshly loaded VAE: how ComfyUI makes one for another device."""
    return load_vae(path, pictures, dtype_name).patcher


def preview_factors(vae: PTDiTVAE, scale: float) -> list[list[float]]:
    """How scaled latents become rough colours (-1..1): one row per latent channel, then the bias.

    Fitted by least squares to 27 plain colours, in place of a table for each VAE.
    """
    levels = torch.tensor([0.0, 0.5, 1.0])
    colours = torch.cartesian_prod(levels, levels, levels)  # (27, 3)
    pictures = colours[:, None, None].expand(-1, 32, 32, -1).unsqueeze(1)  # (27, frame, H, W, 3)
    latents = torch.cat([vae.encode(picture) for picture in pictures]).float()  # (27, z, 1, 4, 4)
    points = latents[:, :, 0, 1:3, 1:3].mean((-1, -2)) * scale
    points = torch.cat([points, torch.ones(len(points), 1)], dim=1).to("cpu")
    return torch.linalg.lstsq(points, colours * 2 - 1).solution.tolist()
