"""Discrete-time diffusion as DiT and DiffiT use it: noise levels, shorter lists of timesteps, guidance.

Levels are formed in float64 on the CPU, because 1 - A loses its last digits in float32 where A is near 1.
"""

import math

import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000
GUIDANCE_SCHEDULES = ("constant", "power_cosine")  # how the strength of guidance depends on the timestep
OFFICIAL_SCHEDULER = {  # arguments of diffusers' DDPMScheduler that make it the official ancestral sampler
    "beta_schedule": "linear",
    "variance_type": "learned_range",
    "clip_sample": False,
    "timestep_spacing": "linspace",
}


def linear_betas(steps: int = TRAIN_TIMESTEPS) -> Tensor:
    """Return the variances b of the forward process, float64 (T,): 1e-4 to 2e-2 for 1000 steps."""
    scale = 1000 / steps
    return torch.linspace(scale * 1e-4, scale * 2e-2, steps, dtype=torch.float64, device="cpu")


def linear_alphas_cumprod(steps: int = TRAIN_TIMESTEPS) -> Tensor:
    """Return A, the share of the picture's variance at each timestep, float64 (T,)."""
    return torch.cumprod(1 - linear_betas(steps), dim=0)


def respaced_betas(timesteps: list[int]) -> Tensor:
    """Return the variances of a process that only has these timesteps of 1000, ascending in time, float64 (K,)."""
    kept = linear_alphas_cumprod()[sorted(timesteps)]
    return 1 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])


def respaced_timesteps(respacing: str | int, steps: int = TRAIN_TIMESTEPS) -> list[int]:
    """Return the timesteps of the official sampler, from noise to picture.

    Args:
        respacing: "250" or 250: so many, evenly spread over all. "10,20,30": so many in each third, and so on.
            "ddim50": so many with the smallest whole stride that gives them. "": all.
        steps: timesteps of the training.

    Raises:
        ValueError: there are not so many timesteps, or no stride gives so many; names the nearest legal number.
    """
    text = str(respacing).strip()
    if not text:
        return list(range(steps))[::-1]
    if text.startswith("ddim"):
        return strided_timesteps(_count(text.removeprefix("ddim"), respacing), steps)
    counts = [_count(part, respacing) for part in text.split(",")]
    taken: list[int] = []
    start = 0
    for index, count in enumerate(counts):
        size = steps // len(counts) + (index < steps % len(counts))
        if count > size:
            raise ValueError(
                f"{count} timesteps cannot be taken from {size} (respacing {respacing!r}); nearest: {size}."
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0  # added up, as the official code does: for some counts this rounds in another way than products
        for _ in range(count):
            taken.append(start + round(position))
            position += stride
        start += size
    return taken[::-1]


def strided_timesteps(count: int, steps: int = TRAIN_TIMESTEPS) -> list[int]:
    """Return `count` timesteps 0, i, 2i, ... with the smallest fitting whole stride i, from noise to picture.

    Raises:
        ValueError: no stride gives so many; names the nearest number that one gives.
    """
    numbers = {len(range(0, steps, stride)): stride for stride in range(steps - 1, 0, -1)}  # the smallest stride stays
    if count not in numbers:
        nearest = min(numbers, key=lambda number: (abs(number - count), number))
        raise ValueError(f"no whole stride takes {count} of {steps} timesteps (ddim{count}); nearest: ddim{nearest}.")
    return list(range(0, steps, numbers[count]))[::-1]


def _count(text: str, respacing: str | int) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f'respacing {respacing!r} must be like "250", "10,20,30" or "ddim50", numbers from 1 on.')
    return int(text)


def power_cosine(timestep: Tensor, guidance_scale: float, power: float = 4.0) -> Tensor:
    """Return DiffiT's strength of guidance: 1 at noise, `guidance_scale` at the picture.

    w(t) = 1 + (guidance_scale - 1) * (1 - cos(pi * (1 - t / 1000) ** power)) / 2.

    Args:
        timestep: 0 to 1000, of any shape and on any device.
        guidance_scale: strength at timestep 0.
        power: the larger, the later guidance sets in. With 4 and a scale of 4.4 it is 1.03 at timestep 500.

    Returns:
        float32 of the same shape, on the CPU; formed in float64.
    """
    share = (1 - timestep.to("cpu", torch.float64) / TRAIN_TIMESTEPS).clamp(0, 1)
    return (1 + (guidance_scale - 1) * 0.5 * (1 - torch.cos(math.pi * share**power))).float()


def check_guidance_schedule(schedule: str, power: float) -> None:
    """Check how guidance depends on the timestep.

    Raises:
        ValueError: there is no such schedule, or the exponent is not a number above 0.
    """
    if schedule not in GUIDANCE_SCHEDULES:
        raise ValueError(f"guidance_schedule={schedule!r} is unknown; choose one of {', '.join(GUIDANCE_SCHEDULES)}.")
    if isinstance(power, bool) or not isinstance(power, (int, float)) or not 0 < power < math.inf:
        raise ValueError(f"guidance_power={power!r} must be a number above 0; the official one is 4.")


def guide_channels(
    conditional: Tensor, unconditional: Tensor, guidance_scale: float | Tensor, channels: int | None
) -> Tensor:
    """Return unconditional + scale * (conditional - unconditional) in the first channels, the others conditional.

    Args:
        conditional, unconditional: (n, C, ...).
        guidance_scale: one number, or a tensor that can be multiplied with the predictions.
        channels: how many of the first channels are guided; None guides all.
    """
    rest = conditional[:, channels:] if channels is not None else conditional[:, :0]
    conditional, unconditional = conditional[:, :channels], unconditional[:, :channels]
    return torch.cat([unconditional + guidance_scale * (conditional - unconditional), rest], dim=1)


def guide_classes(predicted: Tensor, guidance_scale: float | Tensor, channels: int) -> Tensor:
    """Return classifier-free guidance of one forward over [conditional, unconditional] samples: (2n, ...) -> (n, ...).

    See `guide_channels`: the official DiT guides 3 of 4 noise channels, and never the learned variance.

    Args:
        predicted: (2n, channels of the output, height, width).
        guidance_scale: one number, or a tensor that fits (n, 1, 1, 1).
        channels: how many of the first channels are guided.
    """
    return guide_channels(*predicted.chunk(2), guidance_scale, channels)
