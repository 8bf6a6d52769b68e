"""Sizes of `ptdit generate` that no machine of this kind can do: refused with an estimate before a weight is read."""

import argparse
import math
from pathlib import Path
from typing import Any

from ptdit_diffusers.core.documents import read_mapping

from .loading import DTYPES, Plan
from .models import class_settings, is_class_model
from .terminal import FRAME_STEP, SIZE_STEP, UserError, place_among

VAE_STEP = 8  # pixels per latent cell
PIXELS_PER_CALL = 8 * 256 * 256  # bounds the memory of one call; more images are generated in several calls


def check_cost(plan: Plan, arguments: argparse.Namespace) -> None:
    """Refuse what needs more memory than the device has, or more than a day, unless the user said --yes.

    The configurations have been checked. The estimate is that of one device, also where several share the call.

    Raises:
        UserError: Names the estimate and the nearest sizes.
    """
    import torch

    from ptdit_diffusers.core.backbones.vae_tiling import VAETiling
    from ptdit_diffusers.core.cost import Call, Cost, cost_of
    from ptdit_diffusers.core.model_folder import weights_shapes

    from ..pipelines.machine import Machine, memory_of, refusal

    network = class_settings(plan.folder).network if is_class_model(plan.folder) else "transformer"
    config, vae = read_mapping(plan.folder / network / "config.json"), plan.folder / "vae" / "config.json"
    height, width = trained_size(plan.folder, config)
    vae = read_mapping(vae) if vae.is_file() else None
    views, video = arguments.num_views is not None, arguments.num_frames > 1
    call = Call(
        samples=arguments.num_images,
        height=arguments.height or height,
        width=arguments.width or width,
        steps=arguments.steps,
        frames=arguments.num_views or arguments.num_frames,
        predictions=1 + (arguments.guidance > 1),
        views=views,
        tiling=VAETiling() if video else None,
        at_once=PIXELS_PER_CALL,
    )
    names = {
        "samples": ("--num-images {}", 1, 1),
        "frames": ("--num-views {}", 2, 1) if views else ("--num-frames {}", 1, FRAME_STEP),
        "size": ("--height {} --width {}", SIZE_STEP, SIZE_STEP),
        "steps": ("--steps {}", 1, 1),
    }
    device, dtype = torch.device(plan.device), getattr(torch, DTYPES[plan.dtype])

    def cost(other: Call) -> Cost:
        if network == "transformer":
            return cost_of(other, config, vae, dtype.itemsize)
        shapes = weights_shapes(plan.folder / network) or {}  # no formula: each weight is used at least once
        return Cost(0, other.samples * other.steps * sum(map(math.prod, shapes.values())))

    memory = memory_of(device) // (place_among()[1] if plan.device == "cpu" else 1)  # each process has a copy
    reason = refusal(call, cost, Machine(device, dtype, memory), names)
    if reason is not None:
        raise UserError(f"{reason}; --yes tries it nevertheless")


def token_grid(folder: Path, arguments: argparse.Namespace) -> tuple[int, int, int]:
    """Return how many frames, rows and columns of tokens a call of a PT-DiT model folder has."""
    config = read_mapping(folder / "transformer" / "config.json")
    height, width = trained_size(folder, config)
    frames = arguments.num_views or (arguments.num_frames - 1) // FRAME_STEP + 1
    token = VAE_STEP * config.get("patch_size", 2)
    return frames, (arguments.height or height) // token, (arguments.width or width) // token


def trained_size(folder: Path, config: dict[str, Any]) -> tuple[int, int]:
    """Return height and width in pixels of the pictures of a model folder, whose network has this configuration."""
    if is_class_model(folder):
        side = config.get("sample_size", 32) * (8 if (folder / "vae").is_dir() else 1)
        return side, side
    from ptdit_diffusers.core.sampling import default_size

    return default_size(config)
