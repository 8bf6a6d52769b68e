"""What a denoiser is trained to do: noisy samples, the target, the error, and the times at which it is asked.

An objective is a function of the signature of `flow_matching`; others (DDPM's noise with a learned variance, EDM) go
beside it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def flow_matching(
    predict: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    noise: Tensor,
    time: Tensor,
    area: Tensor | None = None,
) -> Tensor:
    """Return the mean square error of the predicted flow of each sample (B,).

    Rectified flow: x_t = (1 - t) x_0 + t noise, and the flow is noise - x_0.

    Args:
        predict: (noisy samples, timesteps (B,) in 0..1000) -> flow, shaped like the samples.
        latents: x_0 (B, ...).
        noise: Shaped like `latents`.
        time: t (B,) in 0..1; 1 is noise.
        area: Weight of each place (B, 1, ...), shaped like the samples otherwise; None = 1.
    """
    t = time.view(-1, *[1] * (latents.ndim - 1))
    noisy = (1 - t) * latents + t * noise
    error = F.mse_loss(predict(noisy, time * 1000), noise - latents, reduction="none")
    error = error if area is None else error * area
    return error.mean(tuple(range(1, latents.ndim)))


def sample_times(
    shape: tuple[int, ...],
    generator: torch.Generator,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    stratified: bool = False,
    **others: Any,
) -> Tensor:
    """Sample times in 0..1, logit-normal ones unless `others` says so.

    Args:
        shape: Of the result; one number where `stratified`.
        generator: On the CPU.
        mean: Of the normal before the sigmoid.
        std: Of the normal.
        shift: r > 1 moves the times towards noise, t -> r t / (1 + (r - 1) t), as the sampler does. The same as
            ln r added to `mean`, except for rounding.
        stratified: Take one time from each of as many equal shares of the distribution: less variance than
            independent times.
        others: `kind`, `mode_scale`, `low` and `high` of `shifted_times`.
    """
    if stratified:
        (count,) = shape
        shares = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        return shifted_times(shares, mean=mean, std=std, shift=shift, **others)
    return _times(torch.randn(shape, generator=generator), mean, std, shift, **others)


def shifted_times(shares: Tensor, *, mean: float = 0.0, std: float = 1.0, shift: float = 1.0, **others: Any) -> Tensor:
    """Return the times below which these shares (0..1) of the distribution of `sample_times` lie.

    Args:
        shares: Of any shape.
        mean, std, shift: As for `sample_times`.
        others: `kind` is "logit_normal", "uniform" or "mode" (Eq. 20 of arXiv 2403.03206, with its scale
            `mode_scale`); the times, after the shift, are scaled from 0..1 to `low`..`high`.
    """
    return _times(torch.special.ndtri(shares), mean, std, shift, **others)


def _times(
    normal: Tensor,
    mean: float,
    std: float,
    shift: float,
    kind: str = "logit_normal",
    mode_scale: float = 1.29,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    if kind == "logit_normal":
        time = torch.sigmoid(normal * std + mean)
    else:
        time = torch.special.ndtr(normal)
    if kind == "mode":
        time = time - mode_scale * (torch.cos(torch.pi / 2 * (1 - time)) ** 2 - time)
    time = shift * time / (1 + (shift - 1) * time)
    return time if (low, high) == (0, 1) else low + (high - low) * time
