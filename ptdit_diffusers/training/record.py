"""What a run writes down for people: log.jsonl, the loss curve, run.json; time and memory in words and numbers."""

import dataclasses
import importlib.util
import json
import math
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ptdit_diffusers.core.files import new_file, replace_json


def read_log(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """Return the lines of a log.jsonl, without those after `last_step`."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return [line for line in lines if last_step is None or line["step"] <= last_step]


def trim_log(path: Path, last_step: int) -> None:
    """Drop the lines after `last_step`: a resumed run writes them again."""
    if path.exists():
        kept = read_log(path, last_step)
        with new_file(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def append_log(path: Path, line: dict[str, Any]) -> None:
    """Add one JSON line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def require_matplotlib() -> None:
    """Raise ValueError where matplotlib is missing; without this check a run would end at its first plot."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("training needs matplotlib: pip install '.[train]' in a clone of the repository.")


def plot_curve(log: Path, picture: Path) -> None:
    """Plot the loss against the step (log scale), and the learning rate below it; nothing for an empty log."""
    lines = [line for line in read_log(log) if "loss" in line]
    if not lines:
        return
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(8, 6))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    figure.subplots_adjust(top=0.97, right=0.97)
    steps = [line["step"] for line in lines]
    upper.plot(steps, [line["loss"] for line in lines], linewidth=0.8)
    upper.set(ylabel="loss", yscale="log" if min(line["loss"] for line in lines) > 0 else "linear")
    if upper.get_yscale() == "log":  # plain numbers; powers of ten are typeset, which takes a second
        upper.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        upper.yaxis.set_minor_locator(NullLocator())
        upper.yaxis.set_major_formatter("{x:g}")
    upper.grid(alpha=0.3)
    lower.plot(steps, [line["lr"] for line in lines])
    lower.set(xlabel="optimizer step", ylabel="learning rate")
    with new_file(picture) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def write_run(path: Path, settings: Any, progress: dict[str, Any], processes: int) -> None:
    """Write run.json: settings and seed, progress so far, and one entry per call of the script.

    An entry has versions, hardware, and the settings of the call before where they differ.
    """
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"calls": [], "settings": {}}
    new = json.loads(json.dumps(dataclasses.asdict(settings)))  # tuples become lists, as in the file
    call = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "from_step": progress["step"],
        "processes": processes,
        "hardware": hardware(),
        "versions": versions(),
        "settings_before": {key: old for key, old in earlier["settings"].items() if old != new.get(key)},
    }
    run = {"seed": settings.seed, **progress, "settings": new, "calls": [*earlier["calls"], call]}
    replace_json(path, run)


def update_run(path: Path, progress: dict[str, Any]) -> None:
    """Bring the progress in run.json up to date."""
    run = json.loads(path.read_text(encoding="utf-8"))
    run.update(progress)
    replace_json(path, run)


def hardware() -> str:
    """Return one line: GPUs, or CPU cores and the threads that are used."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter for the numbers."""
    found = {"python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "accelerate", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def memory_gib(device: torch.device) -> float:
    """Return the peak memory so far: of the GPU, or on a CPU of the process (0 where the system does not tell)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    if importlib.util.find_spec("resource") is None:  # Windows
        return 0.0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)


class Spikes:
    """Tells gradients that are far larger than those of the steps before; it only watches."""

    def __init__(self, sigmas: float = 5.0, quiet: int = 50, memory: float = 0.98) -> None:
        """Choose the limits.

        Args:
            sigmas: Standard deviations of the logarithm of the norm above its mean.
            quiet: Steps before the first report.
            memory: Share of mean and variance that a step leaves.
        """
        self.sigmas, self.quiet, self.memory = sigmas, quiet, memory
        self.steps, self.mean, self.variance = 0, 0.0, 0.0

    def usual(self, norm: float) -> float | None:
        """Take up the norm of a step, and return the usual norm where this one is far above it, else None."""
        value = math.log(max(norm, 1e-30))
        spike = self.steps >= self.quiet and value > self.mean + self.sigmas * max(math.sqrt(self.variance), 0.05)
        found = math.exp(self.mean) if spike else None
        share = max(1 - self.memory, 1 / (self.steps + 1))
        change = value - self.mean
        self.mean += share * change
        self.variance = (1 - share) * (self.variance + share * change**2)
        self.steps += 1
        return found


def human_time(seconds: float) -> str:
    """Return hours, minutes and seconds, the largest two."""
    hours, rest = divmod(int(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
