"""What caches of latents have in common: pixels as the VAE takes them, and files of tensors."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor


def to_pixels(frames: np.ndarray) -> Tensor:
    """Return uint8 frames (..., F, H, W, 3) as float32 (..., 3, F, H, W) in -1..1."""
    return rearrange(torch.from_numpy(frames), "... f h w c -> ... c f h w").float() / 127.5 - 1


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file under a temporary name and rename it."""
    temporary = path.with_suffix(".tmp")
    save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
    temporary.replace(path)
