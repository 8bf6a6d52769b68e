"""Optimisers and learning rates by name. Must not know the model."""

from torch import nn
from torch.optim import AdamW, Optimizer

from lora.config import Settings


def make_optimizer(parameters: list[nn.Parameter], settings: Settings) -> Optimizer:
    """The optimiser that the settings name.

    Raises:
        ValueError: The library that it needs is missing.
    """
    options = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return AdamW(parameters, **options)
    package = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}[settings.optimizer]
    try:
        if settings.optimizer == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit as kind
        else:
            from prodigyopt import Prodigy as kind
    except ImportError:
        raise ValueError(
            f"optimizer={settings.optimizer!r} needs {package}: pip install {package}; or use 'adamw'."
        ) from None
    if settings.optimizer == "prodigy":
        options |= {"safeguard_warmup": True, "use_bias_correction": True}
    return kind(parameters, **options)
