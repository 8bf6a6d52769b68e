"""Optimisers and learning rates by name. Must not know the model."""

from torch import nn
from torch.optim import AdamW, Optimizer

from lora.config import Settings


def make_optimizer(parameters: list[nn.Parameter], settings: Settings) -> Optimizer:
    """The optimiser that the settings name; `config.check_packages` says whether it can be had."""
    options = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return AdamW(parameters, **options)
    if settings.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)
    from prodigyopt import Prodigy

    return Prodigy(parameters, safeguard_warmup=True, use_bias_correction=True, **options)
