"""EDM (arXiv 2206.00364): preconditioning of a network, noise levels, and the deterministic Heun sampler.

Pictures x are in -1..1; a noise level sigma is the standard deviation of the noise that was added to them. Levels are
formed in float64 on the CPU.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SIGMA_DATA = 0.5  # standard deviation of the data
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # of the sampler

Denoise = Callable[[Tensor, float], Tensor]  # (noisy pictures (B, ...), noise level) -> denoised pictures


class Scales(NamedTuple):
    """What scales the network's input and output, and what it is told: D(x) = skip x + out F(input x; noise).

    Attributes:
        skip, out, input: factors, shaped like the levels.
        noise: c_noise = ln(sigma) / 4.
    """

    skip: Tensor
    out: Tensor
    input: Tensor
    noise: Tensor


def preconditioning(sigma: Tensor, sigma_data: float = SIGMA_DATA) -> Scales:
    """Return the scales for noise levels of any shape, in their dtype."""
    total = sigma**2 + sigma_data**2
    return Scales(sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4)


def denoised(
    network: Callable[[Tensor, Tensor], Tensor], noisy: Tensor, sigma: Tensor, sigma_data: float = SIGMA_DATA
) -> Tensor:
    """Return D(x; sigma), the network's estimate of the pictures.

    Args:
        network: (c_in * x, c_noise (B,)) -> F, shaped like x.
        noisy: x (B, ...).
        sigma: noise levels (B,).
        sigma_data: standard deviation of the data.
    """
    scales = preconditioning(sigma.to(noisy.dtype), sigma_data)
    shape = (-1, *(1 for _ in range(noisy.ndim - 1)))
    predicted = network(noisy * scales.input.view(shape), scales.noise)
    return scales.skip.view(shape) * noisy + scales.out.view(shape) * predicted.to(noisy.dtype)


def noise_levels(
    steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> list[float]:
    """Return the noise levels of the sampler, falling from `sigma_max` to `sigma_min`, then 0: `steps` + 1 numbers.

    s_i = (a + i / (N - 1) (b - a)) ** rho with a = sigma_max ** (1 / rho), b = sigma_min ** (1 / rho).
    """
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(first + index / max(1, steps - 1) * (last - first)) ** rho for index in range(steps)] + [0.0]


def heun_step(denoise: Denoise, noisy: Tensor, level: float, lower: float) -> Tensor:
    """Return the pictures at the noise level `lower` from those at `level`, by Heun's rule; to level 0 by Euler's.

    So N steps need 2 N - 1 evaluations of the network.
    """
    slope = (noisy - denoise(noisy, level)) / level
    moved = noisy + (lower - level) * slope
    if lower == 0:
        return moved
    slope_there = (moved - denoise(moved, lower)) / lower
    return noisy + (lower - level) * (slope + slope_there) / 2


def state_dtype(device: torch.device | str) -> torch.dtype:
    """Return the format that samples are kept in between steps: float64, but float32 on Apple's GPUs."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64
