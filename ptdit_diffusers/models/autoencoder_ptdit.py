"""diffusers model of the causal video VAE of Open-Sora-Plan v1.2: configuration, latent_dist, tiling and slicing.

The layers are in `core.backbones.vae`, tiles in `core.backbones.vae_tiling`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import FromOriginalModelMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from ptdit_diffusers.core.backbones.parameters import VAEParameters
from ptdit_diffusers.core.backbones.shares import Messages
from ptdit_diffusers.core.backbones.vae import PTDiTVAEBackbone
from ptdit_diffusers.core.backbones.vae_tiling import SPATIAL_RATIO, TEMPORAL_RATIO, VAETiling
from ptdit_diffusers.core.devices import check_operations
from ptdit_diffusers.core.embedded import weights_folder


# ModelMixin, backbone, ConfigMixin in this order: with ConfigMixin first its __getattr__ would hide nn.Module's.
class AutoencoderKLOpenSoraPlan(ModelMixin, PTDiTVAEBackbone, AutoencoderMixin, ConfigMixin, FromOriginalModelMixin):
    """Causal video VAE, 8x in space and 4x in time, that encodes 4n + 1 frames to n + 1 latent frames.

    The defaults are those of the released checkpoint, and its names of weights are kept, so it loads unchanged.
    Callers multiply latents by `config.scaling_factor`, and divide by it before `decode`, as in diffusers.

    Args:
        in_channels: color channels of the encoder's input.
        out_channels: color channels of the decoder's output.
        hidden_size: channels at full resolution.
        hidden_size_mult: channels of the four resolutions as multiples of `hidden_size`.
        z_channels: latent channels.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        norm_num_groups: groups of every GroupNorm; the channels of each level must be a multiple of it.
        scaling_factor: number that callers multiply latents by, so that their standard deviation is about one.

    Raises:
        ValueError: if there are not four levels or a width is not a multiple of `norm_num_groups`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock", "FrameAttention"]
    _group_offload_block_modules = ["encoder", "decoder", "quant_conv", "post_quant_conv"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        hidden_size: int = 128,
        hidden_size_mult: tuple[int, ...] = (1, 2, 4, 4),
        z_channels: int = 4,
        num_res_blocks: int = 2,
        norm_num_groups: int = 32,
        scaling_factor: float = VAEParameters.scaling_factor,
    ) -> None:
        super().__init__()
        self.build(VAEParameters.from_config(self.config))
        self.use_slicing = False
        self.use_tiling = False
        self.tiling = VAETiling()
        self._devices = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> "AutoencoderKLOpenSoraPlan":
        """Load from a folder or the Hub; embedded models whose VAE is that of another one get it from there.

        Args:
            pretrained_model_name_or_path: folder or OWNER/NAME.
            subfolder: of it, where the VAE is.
            kwargs: options of `ModelMixin.from_pretrained`, e.g. `dtype`.
        """
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        if (weights := weights_folder(folder)) != folder:
            return super().from_pretrained(weights, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def enable_tiling(
        self,
        tile_sample_min_size: int = 512,
        tile_sample_min_num_frames: int = 29,
        carry_frames: bool = True,
    ) -> None:
        """Encode and decode in tiles what is larger than one tile, so that memory does not grow with size or length.

        Tiles in time are not blended. Each layer carries its last frames over to the next tile, which is then computed
        from the same frames as without tiles. Only the statistics of the GroupNorms differ, since they run over time;
        that changes the numbers a little. Tiles in space are blended, as in the official code.

        Args:
            tile_sample_min_size: side of a tile in pixels, a multiple of 64.
            tile_sample_min_num_frames: frames of a tile, 4n + 1 and at least 5.
            carry_frames: `False` cuts time as the official code does, which shows at the seams.

        Raises:
            ValueError: if a tile size is not legal.
        """
        self.tiling = VAETiling(tile_sample_min_size, tile_sample_min_num_frames, carry_frames)
        self.use_tiling = True

    def share_tiles(self, devices: Messages | None) -> None:
        """Decode the tiles of `enable_tiling` on several devices, all of which must call `decode` alike.

        Each gets the whole result, bit for bit that of one device. What is not tiled every device decodes.

        Args:
            devices: how they reach each other; None decodes everything here.
        """
        self._devices = devices

    def decoder_runs(self, shape: Sequence[int]) -> int:
        """Return how often `decode` runs the decoder for latents of this shape (B, C, T, H, W); for progress bars."""
        samples, _, frames, height, width = shape
        size = (frames - 1) * TEMPORAL_RATIO + 1, height * SPATIAL_RATIO, width * SPATIAL_RATIO
        tiles = 1
        if self.use_tiling:
            shared = self._devices is not None
            tiles = self.tiling.count_own(*size, self._devices) if shared else self.tiling.count(*size)
        return (samples if self.use_slicing else 1) * tiles

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """Encode pixels to a distribution over unscaled latents.

        Args:
            x: (B, in_channels, T, H, W) in [-1, 1], T = 4n + 1, H and W multiples of 8.
            return_dict: return an `AutoencoderKLOutput` instead of a tuple.

        Returns:
            `latent_dist`, whose `mode()` and `sample(generator)` are (B, z_channels, n + 1, H / 8, W / 8).

        Raises:
            ValueError: if the sizes are not legal.
            RuntimeError: if a GPU of Apple computes 3D convolutions or resizing wrongly.
        """
        tiling = self.tiling if self.use_tiling else None
        self._check_device(x)
        slices = x.split(1) if self.use_slicing else [x]
        moments = torch.cat([self.encode_moments(part, tiling) for part in slices])
        latent_dist = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=latent_dist) if return_dict else (latent_dist,)

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple:
        """Decode unscaled latents to pixels.

        Args:
            z: (B, z_channels, T, H, W), already divided by `config.scaling_factor`.
            return_dict: return a `DecoderOutput` instead of a tuple.

        Returns:
            `sample` (B, out_channels, 4 (T - 1) + 1, 8 H, 8 W), about [-1, 1], not clamped.

        Raises:
            ValueError: if `z` has not five axes.
            RuntimeError: if a GPU of Apple computes 3D convolutions or resizing wrongly.
        """
        tiling = self.tiling if self.use_tiling else None
        self._check_device(z)
        slices = z.split(1) if self.use_slicing else [z]
        sample = torch.cat([self.decode_pixels(part, tiling, self._devices) for part in slices])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @staticmethod
    def _check_device(tensor: Tensor) -> None:
        if tensor.device.type == "mps":
            check_operations("mps")

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple:
        """Encode and decode again.

        Args:
            sample: (B, in_channels, T, H, W) in [-1, 1], T = 4n + 1, H and W multiples of 8.
            sample_posterior: sample from the posterior instead of taking its mean.
            return_dict: return a `DecoderOutput` instead of a tuple.
            generator: source of the posterior noise.

        Returns:
            The reconstruction, with the shape of `sample` except for the channels.

        Raises:
            ValueError: if the sizes are not legal.
        """
        posterior = self.encode(sample).latent_dist
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(latents, return_dict=return_dict)
