"""What this machine has: memory of a device, and how fast it multiplies. And calls that ask for much more."""

import ctypes
import os
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ptdit_diffusers.core.cost import Call, Cost, cost_of, largest

LONGEST = 24 * 3600  # seconds of a call that need no second thought
UNDOUBTED = 10**13  # MACs: minutes on any machine
BEYOND_PRODUCTS = 2.0  # time of networks, as a multiple of their products in large matrices
BEYOND_TENSORS = 1.5  # memory of the process, as a multiple of the tensors: buffers of kernels, gaps
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of containers
HUGE = 10**300  # about the largest float


class Machine(NamedTuple):
    """Where a call computes, and what is left for it there."""

    device: torch.device
    dtype: torch.dtype
    memory: int

    def bytes_for(self, cost: Cost) -> float:
        """Return the memory that a call needs here."""
        return min(cost.memory, HUGE) * BEYOND_TENSORS

    def seconds_for(self, cost: Cost) -> float:
        """Return the time that a call takes here; 0 where it is short on any machine."""
        if cost.macs < UNDOUBTED:
            return 0.0
        return BEYOND_PRODUCTS * min(cost.macs, HUGE) / macs_per_second(self.device.type, self.dtype)

    def can(self, cost: Cost) -> bool:
        """Whether a call fits the memory and ends within a day."""
        return self.bytes_for(cost) <= self.memory and self.seconds_for(cost) <= LONGEST


def memory_of(device: torch.device) -> int:
    """Return the bytes of a device; for the CPU those of the machine, or of the container."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    found = _installed()
    for path in map(Path, LIMITS):
        limit = path.read_text().strip() if path.is_file() else ""
        found = min(found, int(limit)) if limit.isdecimal() else found
    return found


@lru_cache
def macs_per_second(device: str, dtype: torch.dtype, size: int = 0) -> float:
    """Return how many multiply-accumulates a second a device does in products of large matrices, measured now."""
    size = size or (768 if device == "cpu" else 4096)
    dtype = dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32
    one = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        (one @ one)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return size**3 / best


def refusal(
    call: Call, cost: Callable[[Call], Cost], machine: Machine, names: Mapping[str, tuple[str, int, int]]
) -> str | None:
    """Return why a call is not made: its estimate, and the nearest sizes that fit; None if it can be made.

    Args:
        call: Its sizes.
        cost: What a call of other sizes costs.
        machine: Where it computes.
        names: Fields of `Call` that the caller chose ("size" is height and width) -> how to write their values, e.g.
            "num_frames={}", and the smallest and the step of the legal ones.
    """
    needed = cost(call)
    if machine.can(needed):
        return None
    fields = ((written, _values(call, name), least) for name, (written, least, _) in names.items())
    given = ", ".join(written.format(*values) for written, values, least in fields if max(values) > least)
    memory, seconds = machine.bytes_for(needed), machine.seconds_for(needed)
    place = "CPU" if machine.device.type == "cpu" else "GPU"
    text = f"{given}: needs about {amount(memory)} of memory, of {amount(machine.memory)} on the {place}, and "
    text += duration(seconds) if seconds == 0 else f"about {duration(seconds)}"
    for name, (written, least, step) in names.items():
        nearest = largest(call, name, least, step, lambda changed: machine.can(cost(changed)))
        if nearest is not None:
            return f"{text}; nearest: {written.format(*_values(nearest, name))}"
    return text


def check_size_of_call(
    pipe: Any, call: Call, names: Mapping[str, tuple[str, int, int]], vae: Any, windows: Any = None
) -> None:
    """Refuse a call that needs more memory than its device has beside the weights there, or more than a day.

    Args:
        pipe: The pipeline; its `transformer` computes.
        call, names: As for `refusal`.
        vae: What decodes the result; None if latents are the result.
        windows: Window size and proxy ratio of the transformer by name; None where it has none.

    Raises:
        ValueError: It does; names the estimate and the nearest sizes.
    """
    transformer, config = pipe.transformer, None if vae is None else vae.config
    number_bytes = transformer.dtype.itemsize
    windows = windows and (windows["window_size"], windows["proxy_ratio"])
    device = pipe._execution_device
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    weights = sum(weight.nbytes for part in parts for weight in part.parameters() if weight.device.type == device.type)
    machine = Machine(device, transformer.dtype, memory_of(device) - weights)
    fixed = cost_of(call, transformer.config, config, number_bytes, windows)
    if machine.can(fixed):
        return
    reason = refusal(call, lambda other: cost_of(other, transformer.config, config, number_bytes), machine, names)
    if reason is not None:
        raise ValueError(f"{reason}. To try it nevertheless, set refuse_large_calls = False on the pipeline.")


def amount(size: float) -> str:
    """Return bytes in words of three digits."""
    for name in ("MiB", "GiB", "TiB"):
        size /= 2**20 if name == "MiB" else 2**10
        if size < 1000:
            break
    return f"{size:.3g} {name}"


def duration(seconds: float) -> str:
    """Return a time in words of two digits."""
    for name, length in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{float(f'{seconds / length:.2g}'):g} {name}"
    return "some minutes at most" if seconds == 0 else f"{seconds:.0f} seconds"


def _installed() -> int:
    """Return the bytes of main memory."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kilobytes = ctypes.c_ulonglong()  # Windows
    ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kilobytes))
    return kilobytes.value * 1024


def _values(call: Call, name: str) -> tuple[int, ...]:
    return (call.height, call.width) if name == "size" else (getattr(call, name),)
