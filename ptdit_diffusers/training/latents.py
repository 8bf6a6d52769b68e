"""What caches of latents have in common: pixels as the VAE takes them, and files of tensors."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ptdit_diffusers.core.files import new_file


def to_pixels(frames: np.ndarray) -> Tensor:
    """Return uint8 frames (..., F, H, W, 3) as float32 (..., 3, F, H, W) in -1..1."""
    return rearrange(torch.from_numpy(frames), "... f h w c -> ... c f h w").float() / 127.5 - 1


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file as `new_file` does.

    Raises:
        OSError: It could not be written: the disk is full, or no longer there.
    """
    try:
        with new_file(path) as temporary:
            save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata)
    except SafetensorError as error:  # safetensors hides the system's error in its text
        raise OSError(f"{path} cannot be written: {error}") from error
