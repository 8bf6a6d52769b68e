"""A tiny class-conditional pipeline of the real classes, with the trained golden weights and a random VAE."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from ptdit_diffusers import ClassToImagePipeline, official_scheduler
from tests.ptdit_diffusers import diffit_goldens, dit_goldens

NAMES = {0: "tench, Tinca tinca", 1: "red star", 2: "crane", 3: "crane, lifting machine", 4: "golden retriever"}


def tiny_vae() -> AutoencoderKL:
    """A VAE of Stable Diffusion's kind, 8 pixels to a latent cell."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=1, **blocks).eval()


def tiny_pipeline(
    scheduler: Any = None, vae: Any = "image", transformer: Any = None, **options: Any
) -> ClassToImagePipeline:
    """A pipeline for 10 classes and 64 x 64 pixels."""
    transformer = dit_goldens.model("dit_sampler") if transformer is None else transformer
    vae = tiny_vae() if vae == "image" else vae
    scheduler = official_scheduler() if scheduler is None else scheduler
    pipe = ClassToImagePipeline(transformer, vae, scheduler, **{"id2label": NAMES, **options})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_diffit_pipeline(scheduler: Any = None, **options: Any) -> ClassToImagePipeline:
    """The same with DiffiT and its guidance."""
    official = {"guidance_scale": 4.4, "guidance_schedule": "power_cosine"}
    transformer = diffit_goldens.model("diffit_sampler")
    return tiny_pipeline(scheduler, transformer=transformer, **{**official, **options})


def tiny_folder(folder: Path, pipeline: Callable[[], ClassToImagePipeline] = tiny_pipeline) -> Path:
    """The pipeline saved to a folder."""
    pipeline().save_pretrained(folder)
    return folder
