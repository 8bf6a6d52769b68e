"""Peak memory: of tensors that live at the same time, counted on any device, and of a process.

Buffers inside kernels are not counted.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Count the storages made inside the context: `peak` bytes at once. Weights and inputs do not count."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.untyped_storage()._cdata not in before:
                storage = leaf.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def peak_bytes(function: Callable[[], Any], device: str) -> int:
    """Return the peak of one call above what was allocated before."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as memory:
        function()
    return memory.peak


def watch_process(process: int, peaks: dict[str, float]) -> None:
    """Keep in `peaks["RssAnon"]` the peak in GB of a process's memory that is no mapped file, until the process ends.

    Linux only.
    """
    try:
        while True:
            lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
            found = next(line for line in lines if line.startswith("RssAnon"))
            peaks["RssAnon"] = max(peaks["RssAnon"], int(found.split()[1]) * 1024 / 10**9)
            time.sleep(0.05)
    except (OSError, StopIteration):
        return
