"""Every form in which files of transformer and VAE come, written from one tiny network each.

The transformer has the width of PT-DiT/S, so that its heads are known, and one block.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ptdit_diffusers.core.backbones.parameters import PTDiTParameters, VAEParameters
from ptdit_diffusers.core.backbones.ptdit import PTDiTBackbone
from ptdit_diffusers.core.backbones.vae import PTDiTVAEBackbone
from ptdit_diffusers.core.checkpoint_names import PACKED_CONFIG, POSITION_BUFFER
from ptdit_diffusers.core.configuration import pack_config

Weights = dict[str, Tensor]
NETWORK = {"num_attention_heads": 6, "attention_head_dim": 48, "num_layers": 1, "caption_channels": 32}
SETTINGS = {"num_attention_heads": 8, "window_size": [1, 4, 4], "proxy_ratio": [1, 2, 2], "proxy_mode": "first",
            "num_windows": 4, "sample_frames": 3, "sample_size": 128, "round_timestep": True}  # fmt: skip
VAE = {"hidden_size": 32, "hidden_size_mult": (1, 1, 1, 1), "num_res_blocks": 1}
VAE_SETTINGS = {"norm_num_groups": 8, "scaling_factor": 0.5}
PREFIXES = ("module.", "model.", "_orig_mod.", "transformer.", "diffusion_model.", "module._orig_mod.",
            "model.module.", "model.diffusion_model.", "model.diffusion_model._orig_mod.",
            "module.model.")  # fmt: skip


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> Weights:
    """Return weights in which every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (0.06 if len(shape) > 1 else 0.05)
        for name, shape in shapes.items()
    }


def network(**changes: Any) -> Weights:
    """Return weights of the transformer."""
    backbone = PTDiTBackbone()
    backbone.build(PTDiTParameters.from_config(NETWORK | changes))
    return random_weights({name: tuple(value.shape) for name, value in backbone.state_dict().items()}, seed=1)


def vae_network() -> Weights:
    """Return weights of the VAE."""
    backbone = PTDiTVAEBackbone()
    backbone.build(VAEParameters(**VAE))
    return random_weights({name: tuple(value.shape) for name, value in backbone.state_dict().items()}, seed=2)


def wrong(weights: Weights) -> Weights:
    """Return weights that must not be taken."""
    return {name: torch.zeros_like(value) for name, value in weights.items()}


def prefixed(weights: Weights, prefix: str) -> Weights:
    """Put a prefix before all names."""
    return {prefix + name: value for name, value in weights.items()}


def buffer(side: int, frames: int = 1) -> Weights:
    """Return a position buffer for side x side tokens."""
    return {POSITION_BUFFER: torch.zeros(1, frames, side**2, 288)}


def nested(weights: Weights) -> dict[str, dict[str, Any]]:
    """Return the nestings of checkpoints; wherever there are averaged weights, the others are wrong."""
    other = wrong(weights)
    return {
        "flat": weights,
        "model": {"model": weights},
        "state_dict": {"state_dict": weights, "step": 7},
        "module": {"ema_state_dict": {}, "module": weights},
        "ema": {"ema": prefixed(weights, "module."), "model": other, "epoch": 3},
        "model_ema": {"model_ema": weights, "model": other},
        "ema_state_dict": {"ema_state_dict": prefixed(weights, "module."), "state_dict": {"gen_model": other}},
        "state_dict_ema": {"state_dict_ema": weights, "state_dict": other},
        "gen_model": {"state_dict": {"gen_model": weights, "dics_model": {"x": torch.zeros(1)}}},
    }


def pt(content: dict[str, Any], old: bool = False) -> Callable[[Path], Path]:
    """Return a writer of a torch file."""

    def write(stem: Path) -> Path:
        torch.save(content, stem.with_suffix(".pt"), _use_new_zipfile_serialization=not old)
        return stem.with_suffix(".pt")

    return write


def safetensors(weights: Weights, config: dict[str, Any] | None = None) -> Callable[[Path], Path]:
    """Return a writer of a safetensors file, with a configuration in its header."""

    def write(stem: Path) -> Path:
        contiguous = {name: value.contiguous() for name, value in weights.items()}
        metadata = None if config is None else {"config": json.dumps(config)}
        save_file(contiguous, stem.with_suffix(".safetensors"), metadata=metadata)
        return stem.with_suffix(".safetensors")

    return write


def formats(weights: Weights) -> dict[str, Callable[[Path], Path]]:
    """Return writers of other number formats."""
    names = {"fp16": torch.float16, "bf16": torch.bfloat16}
    return {
        f"format {name}": safetensors({key: value.to(dtype) for key, value in weights.items()})
        for name, dtype in names.items()
    }


def transformer_forms() -> dict[str, Callable[[Path], Path]]:
    """Return name -> writer of every form of a transformer's file."""
    plain, conditions = network(), network(additional_conditions=True)
    packed = {PACKED_CONFIG: pack_config(SETTINGS)}
    forms = {f"nesting {name}": pt(content) for name, content in nested(plain | buffer(16)).items()}
    forms |= {f"old format, nesting {name}": pt(nested(plain)[name], old=True) for name in ("flat", "state_dict")}
    forms |= {f"prefix {prefix}": safetensors(prefixed(plain | buffer(16), prefix)) for prefix in PREFIXES}
    forms |= {f"packed, prefix {prefix}": safetensors(prefixed(plain | packed, prefix)) for prefix in PREFIXES[-3:]}
    forms |= formats(plain) | {
        "safetensors": safetensors(plain),
        "without shifted windows": safetensors(network(shift_window=False)),
        "size conditions": safetensors(conditions),
        "buffer of 5 frames": safetensors(plain | buffer(16, frames=5)),
        "header": safetensors(plain, SETTINGS),
        "header with components": safetensors(plain, {"transformer": SETTINGS, "scheduler": {}}),
        "header of another program": safetensors(plain, {"architecture": "PT-DiT", "num_windows": None}),
        "packed": safetensors(plain | packed),
        "packed in a torch file": pt({"ema": plain | packed, "model": wrong(plain)}),
    }
    for spelling in ("additional_conditions", "use_additional_conditions"):
        settings = SETTINGS | {"sample_size": 64, spelling: True}
        forms[f"packed, {spelling}"] = safetensors(conditions | {PACKED_CONFIG: pack_config(settings)})
    for side in (16, 32, 64):
        forms[f"buffer {side}x{side}"] = safetensors(plain | buffer(side))
        forms[f"buffer {side}x{side}, size conditions"] = safetensors(conditions | buffer(side))
    return forms


def vae_forms() -> dict[str, Callable[[Path], Path]]:
    """Return name -> writer of every form of a VAE's file."""
    weights = vae_network()
    losses = {"loss.logvar": torch.zeros(1), "loss.discriminator.main.0.weight": torch.zeros(2, 2)}
    forms = {f"nesting {name}": pt(content) for name, content in nested(weights | losses).items()}
    forms |= {f"old format, nesting {name}": pt(nested(weights)[name], old=True) for name in ("flat", "gen_model")}
    forms |= {f"prefix {prefix}": safetensors(prefixed(weights, prefix)) for prefix in PREFIXES}
    packed = {PACKED_CONFIG: pack_config(VAE_SETTINGS)}
    return forms | formats(weights) | {
        "safetensors": safetensors(weights),
        "header": safetensors(weights, VAE | VAE_SETTINGS),
        "header with components": safetensors(weights, {"vae": VAE_SETTINGS}),
        "packed": safetensors(weights | packed),
    }  # fmt: skip
