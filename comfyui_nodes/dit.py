"""DiT as a ComfyUI model: network, model class, configuration class. Its condition is a class, not text.

A class travels as conditioning (N, 1, classes + 1): the share of each row of the class table, so 1 in one place. Stock
nodes can mix such conditionings, and all zeros, as ConditioningZeroOut makes them, mean the null class.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.supported_models_base
import torch
from comfy.ldm.common_dit import pad_to_patch_size
from torch import Tensor

from ptdit_diffusers.core.backbones.dit import DiTBackbone
from ptdit_diffusers.core.backbones.dit_parameters import DiTParameters
from ptdit_diffusers.core.checkpoint_names import PACKED_CONFIG
from ptdit_diffusers.core.configuration import CLASS_SAMPLING_FIELDS, FLOW, STABLE_DIFFUSION_SCALE, pack_config
from ptdit_diffusers.core.dit_checkpoints import single_file_dit

from .native import PTDiTLatent
from .network import ComfyModel, ComfyNetwork, check_names

DIT_MODEL = "dit_of_classes"  # ComfyUI's name of the kind of model


class DiTNetwork(ComfyNetwork, DiTBackbone):
    """The backbone with ComfyUI's layers, attention, patches and wrappers.

    Args:
        image_model: ComfyUI's name of the kind of model.
        dtype, device, operations: ComfyUI's format, device and classes of layers.
        config: fields of `DiTParameters`.
    """

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
        self.build(DiTParameters(**config), operations, self.attention, device=device, dtype=dtype)
        self.number_blocks(self.blocks)

    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None,
        attention_mask: Tensor | None,
        transformer_options: dict[str, Any],
        labels: Tensor | None = None,
        shares: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """Return noise or flow, shaped like `x` (B, C, height, width); the learned variance is left out.

        Args:
            timestep: (B,) in 0..1000.
            labels: rows of the class table (B, k).
            shares: how much of each (B, k).
        """
        height, width = x.shape[2:]
        latents = pad_to_patch_size(x, (self.patch_size, self.patch_size))
        self.begin(transformer_options, len(self.blocks))
        predicted = self.predict(latents, timestep, (labels, shares))
        self.end()
        return predicted[:, : self.in_channels, :height, :width]

    def embed(
        self, latents: Tensor, timestep: Tensor, class_labels: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embed as the backbone does; a class may be a mixture of k rows of the table."""
        labels, shares = class_labels
        hidden_states, time, rows = super().embed(latents, timestep, labels)  # rows: (B, k, D)
        return hidden_states, time, (rows * shares[..., None].to(rows.dtype)).sum(1)


class DiTModel(ComfyModel):
    """Model that ComfyUI samples with: its conditions are classes."""

    title = "DiT"

    def __init__(self, model_config: Any, model_type: Any = comfy.model_base.ModelType.EPS, device: Any = None):
        super().__init__(model_config, model_type, device=device, unet_model=DiTNetwork)

    @property
    def blocks(self) -> int:
        """Number of blocks of the network."""
        return len(self.diffusion_model.blocks)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """Add the classes to the conditions: rows of the class table (N, k) and their shares (N, k).

        Raises:
            ValueError: the conditioning is no class, or is empty for a model without a null class; or the latent has
                frames.
        """
        network, noise, classes = self.diffusion_model, kwargs.get("noise"), kwargs.get("cross_attn")
        if noise is not None and noise.ndim != 4:
            raise ValueError(
                f"DiT makes single pictures; the latent has {noise.ndim} axes. In PT-DiT Empty Latent set length to 1 "
                "and views to 0; for several pictures raise batch_size."
            )
        rows = network.y_embedder.embedding_table.weight.shape[0]
        if classes is None or classes.ndim != 3 or classes.shape[-1] != rows:
            found = "nothing" if classes is None else f"vectors of width {classes.shape[-1]}"
            raise ValueError(
                f"this DiT knows {network.num_classes} classes and no text; the conditioning holds {found}. Connect "
                "DiT Class, with this model as its input, to positive and negative of the sampler."
            )
        weights = classes.float().mean(1)  # (N, rows)
        empty = weights.abs().sum(-1) == 0
        if empty.any():
            if rows == network.num_classes:
                raise ValueError(
                    "this DiT was trained without a null class, so it cannot be guided: set cfg to 1, and connect the "
                    "output class of DiT Class to negative, too."
                )
            weights[empty, network.num_classes] = 1.0
        count = int((weights != 0).sum(-1).max())
        shares, labels = weights.topk(count)
        conditions = super().extra_conds(**{name: value for name, value in kwargs.items() if name != "cross_attn"})
        return conditions | {"labels": comfy.conds.CONDRegular(labels), "shares": comfy.conds.CONDRegular(shares)}


class DiTConfig(comfy.supported_models_base.BASE):
    """What ComfyUI's loaders read; `unet_config` comes from `loaded_class_config`."""

    unet_config = {"image_model": DIT_MODEL}
    unet_extra_config = {}
    # In ComfyUI "sqrt_linear" are betas that grow linearly; its "linear" are squares. A flow uses the last two.
    sampling_settings = {
        "beta_schedule": "sqrt_linear",
        "linear_start": 1e-4,
        "linear_end": 2e-2,
        "timesteps": 1000,
        "shift": 1.0,
        "multiplier": 1000,
    }
    latent_format = comfy.latent_formats.SD15
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]
    vae_key_prefix = ["vae."]
    text_encoder_key_prefix = ["text_encoders."]

    def __init__(self, unet_config: dict[str, Any]):
        extras = {name: unet_config.get(name, default) for name, default in CLASS_SAMPLING_FIELDS.items()}
        super().__init__({name: value for name, value in unet_config.items() if name not in CLASS_SAMPLING_FIELDS})
        self.extras = extras
        if extras["latent_rgb"] is not None or extras["latent_scale"] != STABLE_DIFFUSION_SCALE:
            self.latent_format = PTDiTLatent(extras["latent_scale"], extras["latent_rgb"], pictures=True)
        self.sampling_settings["shift"] = extras["shift"]
        dim = self.unet_config["num_attention_heads"] * self.unet_config["attention_head_dim"]
        self.memory_usage_factor = dim / 1200  # as for PT-DiT, whose blocks have the same widest activations

    def model_type(self, state_dict: dict, prefix: str = "") -> Any:
        """Return the kind of prediction: noise, or rectified flow where the file says so."""
        types = comfy.model_base.ModelType
        return types.FLOW if self.extras["prediction_type"] == FLOW else types.EPS

    def get_model(self, state_dict: dict, prefix: str = "", device: Any = None) -> DiTModel:
        """Make the model, still without weights, and say in the log how it is sampled."""
        config = self.unet_config
        flow = self.extras["prediction_type"] == FLOW
        sampling = "rectified flow" if flow else "predicts the noise of 1000 steps with linear betas"
        logging.info("PT-DiT: DiT of %d classes; %s.", config["num_classes"], sampling)
        if config["out_channels"] > config["in_channels"]:
            logging.info("PT-DiT: ComfyUI's samplers do not use the learned variance of this DiT; it is left out.")
        return DiTModel(self, self.model_type(state_dict, prefix), device=device)

    def process_unet_state_dict(self, state_dict: dict) -> dict:
        """Return the weights under official names.

        Raises:
            ConversionError: Some are missing, or copies in diffusers' form differ.
        """
        weights = {name: value for name, value in state_dict.items() if name != PACKED_CONFIG}
        weights = single_file_dit(weights)
        with torch.device("meta"):
            expected = DiTBackbone()
            expected.build(DiTParameters.from_config(self.unet_config))
        check_names("the DiT", expected, weights)
        return weights

    def process_unet_state_dict_for_saving(self, state_dict: dict) -> dict:
        """Return the weights as ComfyUI saves them, with the configuration, which cannot be read off the weights."""
        names = (field.name for field in fields(DiTParameters))
        config = {name: self.unet_config[name] for name in names} | self.extras
        return super().process_unet_state_dict_for_saving({**state_dict, PACKED_CONFIG: pack_config(config)})

    def clip_target(self, state_dict: dict | None = None) -> None:
        """Return None: there is no text encoder."""
        return None
