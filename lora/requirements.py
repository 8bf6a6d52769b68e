"""What a LoRA run asks of the machine: the device and the room on the disk."""

import torch

from ptdit_diffusers.core.devices import check_compiler, has_float8
from ptdit_diffusers.training.base_model import choose_dtype
from ptdit_diffusers.training.optimizers import make_optimizers

from .config import TrainingSettings


def check_device(settings: TrainingSettings, device: torch.device) -> None:
    """Check that a device can do what the settings ask of it.

    Raises:
        ValueError: It cannot: a number format, or torch.compile; or there is no such optimizer.
    """
    choose_dtype(settings.precision, device)
    value = {"value": torch.nn.Parameter(torch.zeros(2, 2))}
    options = {"lr": settings.lr, "weight_decay": settings.weight_decay, "arguments": settings.optimizer_args}
    try:
        make_optimizers(value, settings.optimizer, **options)  # refuses classes and arguments that there are not
    except TypeError as error:
        raise ValueError(
            f"optimizer={settings.optimizer!r} does not take weight_decay and "
            f"optimizer_args={settings.optimizer_args!r} ({error}); nearest: 'adamw'."
        ) from error
    if settings.base_weights == "fp8" and not has_float8(device):
        raise ValueError(f"base_weights='fp8': {device.type} has no float8; nearest: 'none'.")
    if settings.compile:
        check_compiler(device)


def run_bytes(values: int, keep: int, average: bool, doubled: bool, results: int = 1) -> int:
    """Return how many bytes checkpoints and the finished LoRA take.

    Args:
        values: Trained values, float32.
        keep: Checkpoints kept; one more is there while the newest is written.
        average: Checkpoints hold a running average.
        doubled: The LoRA is written with twice the rank (PiSSA, OLoRA).
        results: LoRAs that are written, each in two forms.
    """
    checkpoint = values * 4 * (3 + average)  # the values and the two averages of Adam
    return checkpoint * (keep + 1) + 2 * values * 4 * (1 + doubled) * results
