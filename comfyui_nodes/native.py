"""PT-DiT as a ComfyUI model: network, model class, latent format, configuration class.

What all our networks share with ComfyUI is in `network`; everything else of the network is `PTDiTBackbone`.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.supported_models_base
import comfy.text_encoders.pixart_t5
import comfy.text_encoders.sd3_clip
import torch
from comfy.ldm.common_dit import pad_to_patch_size
from torch import Tensor

from ptdit_diffusers.core.backbones.parameters import PTDiTParameters, VAEParameters
from ptdit_diffusers.core.backbones.ptdit import PTDiTBackbone
from ptdit_diffusers.core.checkpoint_names import PACKED_CONFIG, official_transformer_state_dict
from ptdit_diffusers.core.configuration import SAMPLING_FIELDS, pack_config
from ptdit_diffusers.core.sampling import time_shift

from .network import ComfyModel, ComfyNetwork, check_names
from .text import saved_clip_target
from .windows import WindowRule, rule_for, window_and_ratio

SETTINGS, ROUNDING = "ptdit", "ptdit_round_timestep"  # our keys in transformer_options
IMAGE_MODEL = "ptdit"
T5_XXL_WIDTH = 4096


class PTDiTNetwork(ComfyNetwork, PTDiTBackbone):
    """The backbone with ComfyUI's layers, attention, patches and wrappers.

    Args:
        image_model: ComfyUI's name of the kind of model.
        dtype, device, operations: ComfyUI's format, device and classes of layers.
        config: fields of `PTDiTParameters`.
    """

    block_inputs = ("txt", "vec")

    def __init__(
        self,
        image_model: str | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
        operations: Any = None,
        **config: Any,
    ):
        super().__init__()
        self.prepare(dtype)
        self.build(PTDiTParameters(**config), operations, self.attention, device=device, dtype=dtype)
        self.number_blocks(self.transformer_blocks)

    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        attention_mask: Tensor | None,
        transformer_options: dict[str, Any],
        windows: tuple = (),
        **unused: Any,
    ) -> Tensor:
        """Return the velocity noise - x0; `timestep` is (B,) in 0..1000.

        `x` is (B, C, F, height, width) of any size, or (B, C, height, width) for pictures. Models of pictures get the
        latter, which stock nodes can crop, flip and mask.
        """
        picture = x.ndim == 4
        if picture:
            x = x.unsqueeze(2)
        frames, height, width = x.shape[2:]
        latents = pad_to_patch_size(x, (1, self.patch_size, self.patch_size))
        rule = WindowRule(*windows)
        window, ratio = window_and_ratio(self, rule, *latents.shape[-2:])
        mode = self.proxy_mode if rule.proxy_mode == "checkpoint" else rule.proxy_mode
        if self.round_timestep or transformer_options.get(ROUNDING):  # here, since the seed of proxies follows it
            timestep = timestep.to(x.dtype)
        self.begin(transformer_options, len(self.transformer_blocks))
        sample = self.predict(
            latents,
            timestep,
            context,
            None if attention_mask is None else attention_mask.bool(),
            *self.size_conditions(latents),
            window_size=window,
            proxy_ratio=ratio,
            proxy_mode=mode,
            generator=[torch.Generator().manual_seed(round(float(timestep[0]) * 1000))] if mode == "random" else None,
        )
        self.end()
        velocity = self.flow(sample)[:, :, :frames, :height, :width].to(sample.dtype)  # ComfyUI makes it float32
        return velocity.squeeze(2) if picture else velocity

    def size_conditions(self, latents: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return pixel size (B, 2) and aspect ratio (B, 1) for networks with additional conditions, else None."""
        if not self.additional_conditions:
            return None, None
        height, width = (8 * side for side in latents.shape[-2:])
        values = torch.tensor([[height, width, height / width]], dtype=torch.float32, device=latents.device)
        values = values.expand(len(latents), -1)
        return values[:, :2], values[:, 2:]


class PTDiTModel(ComfyModel):
    """Model that ComfyUI samples with: its conditions, and the window rule of each step."""

    def __init__(self, model_config: Any, model_type: Any = comfy.model_base.ModelType.FLOW, device: Any = None):
        super().__init__(model_config, model_type, device=device, unet_model=PTDiTNetwork)

    @property
    def blocks(self) -> int:
        """Number of blocks of the network."""
        return len(self.diffusion_model.transformer_blocks)

    def arguments(self, sigma: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        """Return the windows of a step; they are an explicit argument, so that torch.compile guards on them."""
        rules = options.get(SETTINGS)
        return {"windows": tuple(rule_for(rules, self.progress(sigma)))} if rules else {}

    def progress(self, sigma: Tensor) -> float:
        """Return the share of the sampling time, 0 to 1, that has passed at a noise level.

        Nodes with start and end percents count in these shares.
        """
        level = float(sigma.flatten()[0])
        shift = getattr(self.model_sampling, "shift", 1.0)  # sigma = shift u / (1 + (shift - 1) u), u = 1 - progress
        return min(max(1 - level / (shift - (shift - 1) * level), 0.0), 1 - 1e-6)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """Add text (B, L, width) and its mask to the conditions; ComfyUI runs texts of other lengths separately.

        Raises:
            ValueError: frames for a model of single pictures, or text of another encoder.
        """
        network, noise = self.diffusion_model, kwargs.get("noise")
        if noise is not None and noise.ndim == 5 and noise.shape[2] > 1 and network.sample_frames == 1:
            raise ValueError(
                f"this PT-DiT makes single pictures (1 latent frame); the latent has {noise.shape[2]}. In the empty "
                "latent node set length to 1 and views to 0; for several pictures raise batch_size. If the latent "
                "comes from VAE Encode, switch video off in Load PT-DiT VAE, or set encode_as to pictures in PT-DiT "
                "Folder Loader."
            )
        conditions = super().extra_conds(**kwargs)
        text, mask = kwargs.get("cross_attn"), kwargs.get("attention_mask")
        if text is not None:
            width = network.caption_projection.linear_1.in_features
            if text.shape[-1] != width:
                raise ValueError(
                    f"the text encoder gives vectors of width {text.shape[-1]}, this PT-DiT reads {width}: use its "
                    "own text encoder (T5-XXL of type pixart for the official weights, the folder's CLIP otherwise)."
                )
            conditions["c_crossattn"] = comfy.conds.CONDRegular(text)
        if mask is not None:
            conditions["attention_mask"] = comfy.conds.CONDRegular(mask)
        return conditions


class PTDiTLatent(comfy.latent_formats.LatentFormat):
    """Latents of the causal video VAE: (B, 4, F, height / 8, width / 8), or without F for models of pictures."""

    latent_channels = 4
    spacial_downscale_ratio = 8
    temporal_downscale_ratio = 4
    taesd_decoder_name = None  # there is no small decoder for this VAE

    def __init__(
        self,
        scale_factor: float = VAEParameters.scaling_factor,
        rgb: list[list[float]] | None = None,
        pictures: bool = False,
    ):
        self.scale_factor = scale_factor
        self.latent_dimensions = 2 if pictures else 3
        if rgb is None:  # the official VAE was trained from Stable Diffusion's
            self.latent_rgb_factors = comfy.latent_formats.SD15().latent_rgb_factors
        else:  # four rows of factors, then the bias
            self.latent_rgb_factors, self.latent_rgb_factors_bias = rgb[:-1], rgb[-1]


class PTDiTConfig(comfy.supported_models_base.BASE):
    """What ComfyUI's loaders read; `unet_config` comes from `loaded_transformer_config`."""

    unet_config = {"image_model": IMAGE_MODEL}
    unet_extra_config = {}
    sampling_settings = {"shift": 1.0, "multiplier": 1000}
    latent_format = PTDiTLatent
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]
    vae_key_prefix = ["vae."]
    text_encoder_key_prefix = ["text_encoders."]

    def __init__(self, unet_config: dict[str, Any]):
        extras = {name: unet_config.get(name, default) for name, default in SAMPLING_FIELDS.items()}
        super().__init__({name: value for name, value in unet_config.items() if name not in SAMPLING_FIELDS})
        config = self.unet_config
        self.extras = extras
        self.latent_format = PTDiTLatent(extras["latent_scale"], extras["latent_rgb"], config["sample_frames"] == 1)
        tokens = config["num_windows"] * config["window_size"][1] * config["window_size"][2]
        self.sampling_settings["shift"] = time_shift(tokens, extras["base_tokens"])  # of the trained size
        dim = config["num_attention_heads"] * config["attention_head_dim"]
        self.memory_usage_factor = dim / 1200  # measured: activations of a forward at their peak are dim / 1260

    def model_type(self, state_dict: dict, prefix: str = "") -> Any:
        """Return the kind of prediction: rectified flow."""
        return comfy.model_base.ModelType.FLOW

    def get_model(self, state_dict: dict, prefix: str = "", device: Any = None) -> PTDiTModel:
        """Make the model, still without weights."""
        return PTDiTModel(self, device=device)

    def process_unet_state_dict(self, state_dict: dict) -> dict:
        """Return the weights under our names.

        Raises:
            ConversionError: Some are missing, which ComfyUI would leave random.
        """
        weights = official_transformer_state_dict(state_dict)
        with torch.device("meta"):
            expected = PTDiTBackbone()
            expected.build(PTDiTParameters.from_config(self.unet_config))
        check_names("the PT-DiT", expected, weights)
        return weights

    def process_vae_state_dict(self, state_dict: dict) -> dict:
        """Drop a VAE that is not the causal one, which `checkpoints` loads: with another the model would not load."""
        if state_dict:
            logging.warning("PT-DiT: the checkpoint's VAE is not PT-DiT's and not loaded; use Load PT-DiT VAE.")
        return {}

    def process_unet_state_dict_for_saving(self, state_dict: dict) -> dict:
        """Return the weights as ComfyUI saves them, with the configuration, which cannot be read off the weights."""
        names = (field.name for field in fields(PTDiTParameters))
        config = {name: self.unet_config[name] for name in names} | self.extras
        return super().process_unet_state_dict_for_saving({**state_dict, PACKED_CONFIG: pack_config(config)})

    def clip_target(self, state_dict: dict | None = None) -> Any:
        """Return T5-XXL without padding, as stock text nodes use it for PixArt; None for another text encoder."""
        prefix = f"{self.text_encoder_key_prefix[0]}t5xxl.transformer."
        norm = (state_dict or {}).get(f"{prefix}encoder.final_layer_norm.weight")
        if norm is not None and len(norm) != T5_XXL_WIDTH:
            return saved_clip_target(state_dict, self.text_encoder_key_prefix[0])
        found = comfy.text_encoders.sd3_clip.t5_xxl_detect(state_dict or {}, prefix)
        pixart = comfy.text_encoders.pixart_t5
        return comfy.supported_models_base.ClipTarget(pixart.PixArtTokenizer, pixart.pixart_te(**found))
