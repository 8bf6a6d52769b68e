"""Whole checkpoints that ComfyUI saved of our models: Load Checkpoint gives our VAE, which ComfyUI cannot build."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ptdit_diffusers.core.backbones.parameters import VAEParameters
from ptdit_diffusers.core.checkpoint_names import official_vae_state_dict
from ptdit_diffusers.core.class_configuration import loaded_class_config
from ptdit_diffusers.core.configuration import loaded_transformer_config, loaded_vae_config

from .vae import PTDiTVAE

NETWORK, VAE = "model.diffusion_model.", "vae."  # ComfyUI's prefixes


def checkpoint_vae(state_dict: Mapping[str, Tensor], pictures: bool) -> PTDiTVAE | None:
    """Return the VAE in a whole checkpoint, None if it holds none of ours."""
    weights = {name.removeprefix(VAE): value for name, value in state_dict.items() if name.startswith(VAE)}
    config = loaded_vae_config(weights)
    if config is None:
        return None
    parameters = VAEParameters.from_config(config)
    return PTDiTVAE(official_vae_state_dict(weights), parameters, pictures, name="the checkpoint's VAE")


def with_own_vae(original: Callable) -> Callable:
    """Return `load_state_dict_guess_config` that loads a checkpoint's VAE itself if it is ours."""

    def load_state_dict_guess_config(sd: dict, output_vae: bool = True, *args: Any, **kwargs: Any) -> Any:
        vae, metadata = None, kwargs.get("metadata")
        if output_vae and (config := loaded_transformer_config(sd, NETWORK, metadata)) is not None:
            vae = checkpoint_vae(sd, pictures=config["sample_frames"] == 1)
        elif output_vae and loaded_class_config(sd, NETWORK, metadata) is not None:
            vae = checkpoint_vae(sd, pictures=True)
        parts = original(sd, output_vae and vae is None, *args, **kwargs)
        return parts if parts is None or vae is None else (*parts[:2], vae, *parts[3:])

    return load_state_dict_guess_config
