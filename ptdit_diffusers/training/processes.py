"""Processes and their devices: what they were started as, stop signals, data loaders, attention kernels."""

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.commands.config import default_config_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset


def check_processes(accelerator: Accelerator) -> None:
    """Check that processes that were started together know each other.

    Otherwise each of them would train alone, into the same folder.

    Raises:
        ValueError: They do not.
    """
    if (started := int(os.environ.get("WORLD_SIZE", "1"))) > accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started but do not know each other; on a CPU set ACCELERATE_USE_CPU=1."
        )


def needs_launcher() -> bool:
    """Return whether there are several GPUs, or `accelerate config` has written down how to train."""
    return torch.cuda.device_count() > 1 or Path(default_config_file).is_file()


@contextmanager
def stop_signals() -> Iterator[dict[str, bool]]:
    """Turn Ctrl-C, SIGTERM and Windows' Ctrl-Break into a flag, so that the step in progress ends and is saved."""
    stop = {"now": False}

    def note(*_: Any) -> None:
        if not stop["now"] and os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, b"\nstopping: a checkpoint is written after this step\n")  # print may be in use already
        stop["now"] = True

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
    earlier = [signal.signal(number, note) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, earlier, strict=True):
            signal.signal(number, handler)


def batch_loader(data: Dataset, numbers: range, workers: int, device: torch.device) -> DataLoader:
    """Return a loader of the batches of these numbers, in order; made ahead of time when `workers` > 0."""
    pin = device.type == "cuda"
    return DataLoader(
        data, None, sampler=numbers, num_workers=workers, pin_memory=pin, worker_init_fn=_leave_stop_signals
    )


def _leave_stop_signals(worker: int) -> None:
    """Leave Ctrl-C to the training process; end on SIGTERM, which is how it ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def attention_kernels(device: torch.device) -> AbstractContextManager:
    """Choose plain attention on a CPU, where the fused kernel's backward is slow for small windows."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
