"""DiT and DiffiT as ComfyUI models: networks, model class, configuration class. Their condition is a class, not text.

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

from ptdit_diffusers.core.backbones.diffit import DiffiTBackbone
from ptdit_diffusers.core.backbones.dit import DiTBackbone
from ptdit_diffusers.core.checkpoint_names import PACKED_CONFIG
from ptdit_diffusers.core.class_configuration import CLASS_SYSTEMS
from ptdit_diffusers.core.configuration import CLASS_SAMPLING_FIELDS, FLOW, STABLE_DIFFUSION_SCALE, pack_config

from .native import PTDiTLatent
from .network import ComfyModel, ComfyNetwork, check_names

CLASS_MODEL = "ptdit_classes"  # ComfyUI's name of the kind of model


class ClassNetwork(ComfyNetwork):
    """A backbone with ComfyUI's layers, attention, patches and wrappers; classes inherit from this, then from it.

    Args:
        image_model: ComfyUI's name of the kind of model.
        system: its name among `CLASS_SYSTEMS`.
        dtype, device, operations: ComfyUI's format, device and classes of layers.
        config: fields of the system's parameters.
    """

    def __init__(
        self,
        image_model: str | None = None,
        system: str = "DiT",
        dtype: torch.dtype | None = None,
        device: Any = None,
        operations: Any = None,
        **config: Any,
    ):
        super().__init__()
        self.prepare(dtype)
        parameters = CLASS_SYSTEMS[system].parameters(**config)
        self.build(parameters, operations, self.attention, device=device, dtype=dtype)
        self.number_blocks(self.blocks)
        self.eval()  # older ComfyUI leaves networks in training mode, in which labels are dropped at random

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
        self.check_size(*latents.shape[-2:])
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


class DiTNetwork(ClassNetwork, DiTBackbone):
    """DiT."""


class DiffiTNetwork(ClassNetwork, DiffiTBackbone):
    """The latent model of DiffiT."""


NETWORKS = {"DiT": DiTNetwork, "DiffiT": DiffiTNetwork}


class ClassModel(ComfyModel):
    """Model that ComfyUI samples with: its conditions are classes."""

    def __init__(self, model_config: Any, model_type: Any = comfy.model_base.ModelType.EPS, device: Any = None):
        self.title = model_config.unet_config["system"]
        super().__init__(model_config, model_type, device=device, unet_model=NETWORKS[self.title])

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
                f"{self.title} makes single pictures; the latent has {noise.ndim} axes. In PT-DiT Empty Latent set "
                "length to 1 and views to 0; for several pictures raise batch_size."
            )
        rows = network.y_embedder.embedding_table.weight.shape[0]
        if classes is None or classes.ndim != 3 or classes.shape[-1] != rows:
            found = "nothing" if classes is None else f"vectors of width {classes.shape[-1]}"
            raise ValueError(
                f"this {self.title} knows {network.num_classes} classes and no text; the conditioning holds {found}. "
                "Connect DiT Class, with this model as its input, to positive and negative of the sampler."
            )
        weights = classes.float().mean(1)  # (N, rows)
        empty = weights.abs().sum(-1) == 0
        if empty.any():
            if rows == network.num_classes:
                raise ValueError(
                    f"this {self.title} was trained without a null class, so it cannot be guided: set cfg to 1, and "
                    "connect the output class of DiT Class to negative, too."
                )
            weights[empty, network.num_classes] = 1.0
        count = int((weights != 0).sum(-1).max())
        shares, labels = weights.topk(count)
        conditions = super().extra_conds(**{name: value for name, value in kwargs.items() if name != "cross_attn"})
        return conditions | {"labels": comfy.conds.CONDRegular(labels), "shares": comfy.conds.CONDRegular(shares)}


class ClassConfig(comfy.supported_models_base.BASE):
    """What ComfyUI's loaders read; `unet_config` comes from `loaded_class_config`."""

    unet_config = {"image_model": CLASS_MODEL}
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

    def get_model(self, state_dict: dict, prefix: str = "", device: Any = None) -> ClassModel:
        """Make the model, still without weights, and say in the log how it is sampled."""
        config, title = self.unet_config, self.unet_config["system"]
        flow = self.extras["prediction_type"] == FLOW
        sampling = "rectified flow" if flow else "predicts the noise of 1000 steps with linear betas"
        logging.info("PT-DiT: %s of %d classes; %s.", title, config["num_classes"], sampling)
        if config["out_channels"] > config["in_channels"]:
            logging.info("PT-DiT: ComfyUI's samplers do not use the learned variance of %s; it is left out.", title)
        return ClassModel(self, self.model_type(state_dict, prefix), device=device)

    def process_unet_state_dict(self, state_dict: dict) -> dict:
        """Return the weights under official names.

        Raises:
            ValueError: Some are missing, copies in diffusers' form differ, or index buffers are not the formula's.
        """
        title = self.unet_config["system"]
        system = CLASS_SYSTEMS[title]
        weights = system.weights({name: value for name, value in state_dict.items() if name != PACKED_CONFIG})
        with torch.device("meta"):
            expected = system.backbone()
            expected.build(system.parameters.from_config(self.unet_config))
        check_names(f"the {title}", expected, weights)
        return weights

    def process_unet_state_dict_for_saving(self, state_dict: dict) -> dict:
        """Return the weights as ComfyUI saves them, with the configuration, which cannot be read off the weights."""
        names = (field.name for field in fields(CLASS_SYSTEMS[self.unet_config["system"]].parameters))
        config = {name: self.unet_config[name] for name in names} | self.extras
        return super().process_unet_state_dict_for_saving({**state_dict, PACKED_CONFIG: pack_config(config)})

    def clip_target(self, state_dict: dict | None = None) -> None:
        """Return None: there is no text encoder."""
        return None
