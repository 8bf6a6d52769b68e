"""Formulas around the network: time shift, guidance, windows for a size, size conditions."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .backbones.parameters import PTDiTParameters
from .backbones.ptdit import PTDiTBackbone
from .backbones.windows import Triple


def time_shift(tokens_per_frame: int, base_tokens: int, num_frames: int = 1, frames_per_latent: int = 4) -> float:
    """Return the ratio r of the time shift t' = r t / (1 + (r - 1) t): larger images need more steps at high noise.

    r = sqrt(tokens_per_frame / base_tokens * m). m is 1 for an image and (num_frames // 17) * 5 from 17 frames on, as
    in the official sampler. Below 17 frames the official rule gives r = 0 and a useless schedule; here m is the number
    of latent frames there, which meets the official rule at both ends (1 frame: 1, 17 frames: 5).

    Args:
        tokens_per_frame: Tokens of one frame, rows * columns.
        base_tokens: Tokens of one frame at which r = 1 for an image (official: 1024, which is 512 x 512 pixels).
        num_frames: Frames in pixel space.
        frames_per_latent: Frames that the VAE packs into one latent frame.
    """
    frames = (num_frames // 17) * 5 if num_frames >= 17 else (num_frames - 1) // frames_per_latent + 1
    return math.sqrt(tokens_per_frame / base_tokens * frames)


def unshift(level: float, ratio: float) -> float:
    """Return the noise level that a shift by `ratio` turns into `level`: the inverse of t' = r t / (1 + (r - 1) t)."""
    return level / (ratio - (ratio - 1) * level)


def apply_guidance(flow: Tensor, guidance_scale: float, rescale: float = 0.0) -> Tensor:
    """Apply classifier-free guidance, negative + scale * (positive - negative), to a batch [negative, positive].

    With `rescale` above 0 the result is brought toward the standard deviation of the positive prediction, sample by
    sample: rescale * guided * std(positive) / std(guided) + (1 - rescale) * guided (arXiv 2305.08891, Eq. 15, 16).
    """
    negative, positive = flow.chunk(2)
    guided = negative + guidance_scale * (positive - negative)
    if rescale == 0:
        return guided
    axes = tuple(range(1, flow.ndim))
    spread = positive.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
    return guided * (rescale * spread + 1 - rescale)


def default_size(config: Mapping[str, Any], cell: int = 8) -> tuple[int, int]:
    """Return height and width in pixels at which the trained windows fit exactly (official weights: 1024).

    Args:
        config: Configuration of PT-DiT.
        cell: Pixels per latent cell along one side.
    """
    known = PTDiTParameters.from_config(config)
    windows_per_side, side = max(1, round(math.sqrt(known.num_windows))), cell * known.patch_size
    _, rows, columns = known.window_size
    return rows * windows_per_side * side, columns * windows_per_side * side


def choose_windows(
    transformer: PTDiTBackbone, window_size: str | Triple, proxy_ratio: str | Triple, height: int, width: int
) -> dict[str, Triple]:
    """Return window size and proxy ratio of a call, as arguments of the transformer.

    "auto" is what `transformer.set_windows` set, if it was called; else the number of windows of the trained size is
    kept. An explicit window with `proxy_ratio="auto"` keeps the trained number of proxies per window.

    Args:
        transformer: The model that will run.
        window_size, proxy_ratio: "auto" or tokens (frames, rows, columns).
        height, width: Latent size.
    """
    trained_window, trained_ratio = transformer.trained_windows
    auto_window, auto_ratio = transformer.window_size, transformer.proxy_ratio
    if not transformer.windows_were_set:
        auto_window, auto_ratio = transformer.auto_windows(height, width)
    if window_size == "auto":
        window_size = auto_window
    elif proxy_ratio == "auto":
        sides = zip(window_size, trained_ratio, trained_window, strict=True)
        auto_ratio = tuple(max(1, round(new * ratio / old)) for new, ratio, old in sides)
    ratio = auto_ratio if proxy_ratio == "auto" else tuple(proxy_ratio)
    return {"window_size": tuple(window_size), "proxy_ratio": ratio}


def size_conditions(transformer: PTDiTBackbone, height: int, width: int) -> dict[str, Tensor]:
    """Return resolution and aspect ratio (height / width) in pixels, for transformers that take them as conditions."""
    if not transformer.additional_conditions:
        return {}
    values = {"resolution": [[height, width]], "aspect_ratio": [[height / width]]}
    return {
        name: torch.tensor(value, dtype=torch.float32, device=transformer.device) for name, value in values.items()
    }


def proxy_generators(
    generator: torch.Generator | list[torch.Generator] | None, samples: int
) -> list[torch.Generator] | None:
    """Return a generator of the proxies of each sample (`proxy_mode="random"`), as repeatable as the noise.

    With a list, sample i gets the seed of its own generator, so it equals the single run; a single generator gives
    consecutive seeds. With None the proxies come from torch's global state.
    """
    if generator is None:
        return None
    if isinstance(generator, list):
        seeds = [one.initial_seed() for one in generator]
    else:
        seeds = [(generator.initial_seed() + index) % 2**63 for index in range(samples)]
    return [torch.Generator().manual_seed(seed) for seed in seeds]
