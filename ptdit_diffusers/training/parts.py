"""Parts that loops are made of: batches ahead of time, the loss as a module, optimisers, kernels, rate, stop signals.

Must not know any stage.
"""

import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset

from ptdit_diffusers.training.settings import LoopSettings
from ptdit_diffusers.training.stage import Stage


class LossModule(nn.Module):
    """The stage's loss as a forward, so that autocast and the data-parallel wrapper see one module."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.model, self.stage = stage.model, stage

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and scalars to log."""
        return self.stage.loss(batch)


class Batches(Dataset):
    """The stage's micro-batches by number."""

    def __init__(self, stage: Stage, rank: int, batch_size: int) -> None:
        self.stage, self.rank, self.batch_size = stage, rank, batch_size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """CPU tensors of micro-batch `index`."""
        return self.stage.batch(index, self.rank, self.batch_size)


def batch_loader(data: Dataset, numbers: range, workers: int, device: torch.device) -> DataLoader:
    """Micro-batches of these numbers, in order, made ahead of time when `workers` > 0."""
    pin = device.type == "cuda"
    return DataLoader(data, None, sampler=numbers, num_workers=workers, pin_memory=pin, worker_init_fn=ignore_stop)


def attention_kernels(device: torch.device) -> AbstractContextManager:
    """On a CPU, plain attention: the backward pass of the fused one is slow for small windows. Elsewhere no change."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products; a CPU without them takes some ten times as long."""
    if device.type != "cpu":
        return True
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def check_processes(accelerator: Accelerator) -> None:
    """Raise ValueError where processes were started together but do not know each other.

    Each would train alone, into the same folder.
    """
    if (started := int(os.environ.get("WORLD_SIZE", "1"))) > accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started but do not know each other; on a CPU set ACCELERATE_USE_CPU=1."
        )


class InFloat32(TorchFunctionMode):
    """Float32 wherever bfloat16 is asked for."""

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call `func`, or `Tensor.float` in place of `Tensor.bfloat16`."""
        return (torch.Tensor.float if func is torch.Tensor.bfloat16 else func)(*args, **(kwargs or {}))


class Float32Muon(torch.optim.Muon):
    """Muon that orthogonalises in float32, for CPUs that do not multiply bfloat16."""

    def step(self, closure: Callable | None = None) -> Any:
        """As Muon's."""
        with InFloat32():
            return super().step(closure)


def make_optimizers(model: nn.Module, settings: LoopSettings) -> list[torch.optim.Optimizer]:
    """AdamW for the trained parameters, and Muon (arXiv 2502.16982) for the matrices that `settings.muon` names.

    Muon's steps are scaled to the size of AdamW's, so one learning rate serves both.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    orthogonal = {n: p for n, p in trained.items() if settings.muon and p.ndim == 2 and re.search(settings.muon, n)}
    if settings.muon and not orthogonal:
        raise ValueError(f"muon={settings.muon!r} matches no matrix of the model, for example {next(iter(trained))}.")
    rest = [parameter for name, parameter in trained.items() if name not in orthogonal]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = rest[0].device.type in ("cpu", "cuda")
    optimizers = [torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=fused)]
    if orthogonal:
        matrices, decay = list(orthogonal.values()), settings.weight_decay
        kind = torch.optim.Muon if multiplies_bf16(matrices[0].device) else Float32Muon
        optimizers.append(kind(matrices, lr=settings.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def learning_rate(step: int, settings: LoopSettings) -> float:
    """Rate of 0-based `step`: linear warm-up, a hold, then cosine or linear decay towards 0 at `steps`."""
    begin = settings.warmup + settings.hold * (settings.steps - settings.warmup)
    if step < settings.warmup:
        return settings.lr * (step + 1) / (settings.warmup + 1)
    left = 1 - max(0.0, step - begin) / max(1.0, settings.steps - begin)
    return settings.lr * (left if settings.decay == "linear" else (1 - math.cos(math.pi * left)) / 2)


def due(step: int, every: int) -> bool:
    """Whether something done every `every` steps (0 = never) is due."""
    return every > 0 and step % every == 0


@contextmanager
def stop_signals() -> Iterator[dict[str, bool]]:
    """Turn Ctrl-C and SIGTERM into a flag, so that the step in progress ends and is saved."""
    stop = {"now": False}
    numbers = (signal.SIGINT, signal.SIGTERM)
    earlier = [signal.signal(number, lambda *_: stop.update(now=True)) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, earlier, strict=True):
            signal.signal(number, handler)


def ignore_stop(worker: int) -> None:
    """Leave Ctrl-C to the training process; end on SIGTERM, which is how it ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
