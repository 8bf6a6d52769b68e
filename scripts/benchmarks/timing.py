"""Time of functions that take turns, so that a busy machine slows all alike."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def seconds(function: Callable[[], Any], device: str) -> float:
    """Return the time of one call; on one CPU thread processor time, which other programs change less."""
    clock = time.process_time if on_one_thread(device) else time.perf_counter
    synchronize(device)
    start = clock()
    function()
    synchronize(device)
    return clock() - start


def on_one_thread(device: str) -> bool:
    """Return whether one CPU thread does all the work."""
    return device == "cpu" and torch.get_num_threads() == 1


def synchronize(device: str) -> None:
    """Wait for a CUDA device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def take_turns(functions: Mapping[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of each function in each round; every other round runs in reverse order."""
    times = {name: [] for name in functions}
    for turn in range(rounds):
        for name in list(functions) if turn % 2 == 0 else reversed(functions):
            times[name].append(seconds(functions[name], device))
    return times
