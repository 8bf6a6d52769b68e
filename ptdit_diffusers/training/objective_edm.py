"""Loss of EDM (arXiv 2206.00364), which trains DiffiT's image-space model."""

from collections.abc import Callable

import torch
from torch import Tensor

from ptdit_diffusers.core.edm import SIGMA_DATA, denoised

MEAN, STD = -1.2, 1.2  # of ln sigma in training


def edm_matching(
    predict: Callable[[Tensor, Tensor], Tensor],
    pictures: Tensor,
    noise: Tensor,
    sigma: Tensor,
    sigma_data: float = SIGMA_DATA,
) -> Tensor:
    """Return the weighted mean square error of the denoised pictures of each sample (B,).

    The weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 makes an untrained network's error 1 at every level.

    Args:
        predict: (scaled noisy pictures, c_noise (B,)) -> raw output F of the network, shaped like the pictures.
        pictures: clean ones (B, ...), of standard deviation `sigma_data`.
        noise: standard normal, shaped like `pictures`.
        sigma: noise levels (B,).
        sigma_data: standard deviation of the data.
    """
    shape = (-1, *(1 for _ in range(pictures.ndim - 1)))
    noisy = pictures + sigma.view(shape) * noise
    error = (denoised(predict, noisy, sigma, sigma_data) - pictures).square().flatten(1).mean(dim=1)
    return error * (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def sample_sigmas(count: int, generator: torch.Generator, mean: float = MEAN, std: float = STD) -> Tensor:
    """Sample noise levels of training (count,): ln sigma is normal.

    Args:
        count: how many.
        generator: on the CPU.
        mean, std: of ln sigma.
    """
    return torch.exp(torch.randn(count, generator=generator) * std + mean)
