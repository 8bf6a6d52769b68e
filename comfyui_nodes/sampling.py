"""Noise levels of the official sampler for ComfyUI, and legal sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from ptdit_diffusers.core.sampling import time_shift

ASPECTS = {
    "custom": None,
    "1:1": (1, 1),
    "4:3": (4, 3),
    "3:2": (3, 2),
    "16:9": (16, 9),
    "21:9": (21, 9),
    "3:4": (3, 4),
    "2:3": (2, 3),
    "9:16": (9, 16),
}


def shift_for(height: int, width: int, frames: int, base_tokens: int, patch: int = 2) -> float:
    """Return the official shift for latents of height x width with `frames` latent frames."""
    return time_shift((height // patch) * (width // patch), base_tokens, 4 * (frames - 1) + 1)


def official_sigmas(steps: int, shift: float, denoise: float = 1.0) -> Tensor:
    """Return noise levels (steps + 1,) from 1 to 0: u = 1 - i / N, shifted to s u / (1 + (s - 1) u).

    With `denoise` below 1 only the last steps + 1 of N = steps / denoise levels are kept, as in ComfyUI.
    """
    if denoise <= 0:
        return torch.zeros(0)
    total = max(steps, int(steps / denoise))
    levels = 1 - torch.arange(total + 1, dtype=torch.float32) / total
    return (shift * levels / (1 + (shift - 1) * levels))[-(steps + 1) :]


def size_for(aspect: str, width: int, height: int, step: int = 16) -> tuple[int, int]:
    """Return width and height in pixels, multiples of `step`; a preset keeps the number of pixels."""
    ratio = ASPECTS[aspect]
    if ratio is not None:
        side = (width * height / (ratio[0] * ratio[1])) ** 0.5
        width, height = (round(side * part) for part in ratio)
    return tuple(max(step, round(side / step) * step) for side in (width, height))


def latent_frames(length: int) -> int:
    """Return the latent frames of a clip of `length` frames.

    Raises:
        ValueError: the number is not 4n + 1; names the nearest ones.
    """
    if length % 4 != 1:
        below = max(1, (length - 1) // 4 * 4 + 1)
        raise ValueError(f"length={length} is not 4n + 1 (1, 5, 9, ...); nearest: {below} or {below + 4}.")
    return (length - 1) // 4 + 1


def latent_shape(width: int, height: int, length: int, views: int, batch_size: int) -> tuple[int, ...]:
    """Return the shape of an empty latent: four axes for pictures, frames before rows for videos and views.

    Raises:
        ValueError: As in `latent_frames`.
    """
    frames = views or latent_frames(length)
    axis = (frames,) if views or frames > 1 else ()
    return batch_size, 4, *axis, height // 8, width // 8
