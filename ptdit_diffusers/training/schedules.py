"""Learning rates: functions from the 0-based step to the rate of that step.

A LoRA names one of diffusers' schedules, the stages of the embedded models describe theirs by warm-up, hold and decay.
"""

import math
from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


def named_schedule(name: str, lr: float, warmup: int, steps: int, cycles: int = 1) -> Callable[[int], float]:
    """Return the schedule that diffusers has under this name; `warmup` and `steps` count steps.

    `cycles` are those of "cosine_with_restarts": the rate falls to 0 and begins at its peak again so many times.

    Raises:
        ValueError: The polynomial schedule ends at 1e-7, and `lr` is not above that.
    """
    unused = torch.optim.SGD([torch.zeros(1)], lr=lr)  # diffusers returns schedules that are bound to an optimizer
    options = {"num_warmup_steps": warmup, "num_training_steps": steps, "num_cycles": cycles}
    (factor,) = get_scheduler(name, unused, **options).lr_lambdas
    return lambda step: lr * factor(step)


def warmup_hold_decay(step: int, lr: float, warmup: int, hold: float, decay: str, steps: int) -> float:
    """Return the rate of `step`: linear warm-up, a hold, then decay towards 0 at `steps`.

    Args:
        step: Counted from 0.
        lr: Peak rate.
        warmup: Steps of the warm-up.
        hold: Share of the steps after the warm-up that keep the peak rate, 0..1.
        decay: "linear" or "cosine".
        steps: Of the whole schedule.
    """
    begin = warmup + hold * (steps - warmup)
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    left = 1 - max(0.0, step - begin) / max(1.0, steps - begin)
    return lr * (left if decay == "linear" else (1 - math.cos(math.pi * left)) / 2)
