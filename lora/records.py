"""What a run shows besides its files: TensorBoard or wandb, memory, time left. Must not know models."""

import importlib.util
import logging
import sys
from pathlib import Path

import numpy
import torch
from accelerate import Accelerator
from PIL import Image

from lora.config import Settings

logger = logging.getLogger(__name__)


class Trackers:
    """TensorBoard or wandb through accelerate, or nothing."""

    def __init__(self, settings: Settings, folder: Path, accelerator: Accelerator) -> None:
        """Open the tracker of `settings.report_to`; `config.check_packages` says whether it can be had."""
        self.kind, self.writer = settings.report_to, None
        if self.kind == "none" or not accelerator.is_main_process:
            return
        if self.kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"))
        else:
            import wandb

            self.writer = wandb.init(project="ptdit-lora", name=folder.resolve().name, dir=str(folder))

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Numbers of a step."""
        if self.kind == "tensorboard" and self.writer:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)
        elif self.writer:
            self.writer.log(numbers, step=step)

    def pictures(self, pictures: list[Image.Image], step: int) -> None:
        """Validation pictures of a step."""
        if self.kind == "tensorboard" and self.writer:
            for index, picture in enumerate(pictures):
                self.writer.add_image(f"validation/{index}", numpy.asarray(picture), step, dataformats="HWC")
        elif self.writer:
            import wandb

            self.writer.log({"validation": [wandb.Image(picture) for picture in pictures]}, step=step)

    def close(self) -> None:
        """Write out what is left."""
        if self.writer and self.kind == "tensorboard":
            self.writer.close()
        elif self.writer:
            self.writer.finish()


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the GPU, or on a CPU of the process (0 where the system does not say)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    if importlib.util.find_spec("resource") is None:  # Windows
        return 0.0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)


def human_time(seconds: float) -> str:
    """Hours, minutes and seconds, the largest two."""
    hours, rest = divmod(int(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
