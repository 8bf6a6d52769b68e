"""Power-function averages of weights, and the solve for any other width after the run (arXiv 2312.02696, section 3).

The average of width s at time t weighs the weights of time tau by a multiple of tau^g, so its width grows with t; s is
the standard deviation of that weight over t. Snapshots of two widths span, nearly, every width between.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ptdit_diffusers.training.checkpoint import is_shared
from ptdit_diffusers.training.latents import write_tensors

SNAPSHOT = re.compile(r"step-(\d+)-(0\.\d+)\.safetensors")


def exponent(width: float) -> float:
    """Return the exponent g of a width: width = sqrt(g + 1) / ((g + 2) sqrt(g + 3)).

    Raises:
        ValueError: No average is so wide.
    """
    if not 0 < width < 0.28:
        raise ValueError(f"width={width} must be above 0 and below 0.28; nearest: {min(max(width, 0.01), 0.27)}.")
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


class PowerAverages:
    """Running averages of parameters at several widths; the first is what is shown and exported.

    It has what the loop uses of diffusers' EMAModel. Averages are float32, whatever the weights are.

    Args:
        parameters: What is averaged.
        widths: Relative ones, for example 0.05 and 0.10.
        starts: Steps at which the averages begin anew: those of the stages.
        snapshot: Called after some steps with (step, width, average of each parameter).
        snapshot_steps: Which ones.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        widths: Sequence[float],
        starts: Iterable[int] = (0,),
        snapshot: Callable[[int, float, Sequence[Tensor]], None] | None = None,
        snapshot_steps: Iterable[int] = (),
    ) -> None:
        self.widths, self.exponents = tuple(widths), [exponent(width) for width in widths]
        self.starts, self.snapshot, self.snapshot_steps = sorted(starts), snapshot, frozenset(snapshot_steps)
        self.count, self.optimization_step = len(parameters), 0
        self.shadow_params = [p.detach().clone().float() for _ in widths for p in parameters]
        self.stored: list[Tensor] = []

    @torch.no_grad()
    def step(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take up the weights after a step."""
        self.optimization_step += 1
        done = self.optimization_step - max(start for start in self.starts if start < self.optimization_step)
        for number, g in enumerate(self.exponents):
            share = 1 - (1 - 1 / done) ** (g + 1)  # of the newest weights; all of the first
            averages, values = own_parts(self.of(number)), own_parts(parameters)
            if all(value.dtype == torch.float32 for value in values):
                torch._foreach_lerp_(averages, values, share)
            else:  # one by one: a copy of all in float32 would need memory
                for average, value in zip(averages, values, strict=True):
                    average.lerp_(value.float(), share)
        if self.snapshot and self.optimization_step in self.snapshot_steps:
            for number, width in enumerate(self.widths):
                self.snapshot(self.optimization_step, width, self.of(number))

    def of(self, number: int) -> list[Tensor]:
        """Return the averages of one width."""
        return self.shadow_params[number * self.count : (number + 1) * self.count]

    @torch.no_grad()
    def store(self, parameters: Sequence[nn.Parameter]) -> None:
        """Keep the weights themselves, for `restore`."""
        self.stored = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def copy_to(self, parameters: Sequence[nn.Parameter]) -> None:
        """Put the averages of the first width into the model."""
        torch._foreach_copy_(own_parts(parameters), own_parts(self.of(0)))

    @torch.no_grad()
    def restore(self, parameters: Sequence[nn.Parameter]) -> None:
        """Put the stored weights back."""
        torch._foreach_copy_(own_parts(parameters), own_parts(self.stored))
        self.stored = []


def own_parts(values: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors themselves, or this process's parts of those that processes share."""
    return [value.detach().to_local() if is_shared(value) else value.detach() for value in values]


def snapshot_steps(starts: Sequence[int], last: int, count: int) -> list[int]:
    """Return the steps after which a run has snapshots: `count` of them, evenly spread, and the last of stages."""
    if not count:
        return []
    ends = [*starts[1:], last]
    return sorted({last * (i + 1) // count for i in range(count) if last * (i + 1) // count} | set(ends))


def write_snapshot(folder: Path, step: int, start: int, width: float, values: Mapping[str, Tensor]) -> None:
    """Write the average of a width after a step, in half precision.

    Args:
        folder: Of the snapshots.
        step: Of the run.
        start: Step at which the average began.
        width: Relative.
        values: Averages by name of the parameter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: value.detach().to("cpu", torch.float16) for name, value in values.items()}
    facts = {"start": str(start), "width": str(width)}
    write_tensors(folder / f"step-{step:08d}-{width:.4f}.safetensors", half, facts)


# --- after the run ---------------------------------------------------------------------------------------------------


def overlap(t: float, g: float, other_t: float, other_g: float) -> float:
    """Return the integral of the product of two weightings: of time t and exponent g, and of another."""
    if t > other_t:
        t, g, other_t, other_g = other_t, other_g, t, g
    return (g + 1) * (other_g + 1) / (g + other_g + 1) * t**other_g / other_t ** (other_g + 1)


def solve(snapshots: Sequence[tuple[float, float]], t: float, width: float) -> np.ndarray:
    """Return the factors with which snapshots add up to nearly the average of another width.

    Args:
        snapshots: Time and width of each.
        t: Time of the wanted average.
        width: Of the wanted average.
    """
    profiles = [(time, exponent(each)) for time, each in snapshots]
    wanted = exponent(width)
    matrix = np.array([[overlap(*one, *other) for other in profiles] for one in profiles])
    right = np.array([overlap(*one, t, wanted) for one in profiles])
    factors, *_ = np.linalg.lstsq(matrix, right, rcond=1e-10)
    return factors / factors.sum()


def average_snapshots(folder: Path, width: float) -> tuple[dict[str, Tensor], int]:
    """Return the average of a width at the end of a run, by name of the parameter, and the step of that end.

    Args:
        folder: Of the snapshots.
        width: Relative.

    Raises:
        ValueError: There are no snapshots.
    """
    found = sorted(path for path in folder.glob("*.safetensors") if SNAPSHOT.fullmatch(path.name))
    if not found:
        raise ValueError(f"{folder} holds no snapshots; they are written with run.snapshots above 0.")
    facts = {path: _facts(path) for path in found}
    last, start = max((step, start) for step, start, _ in facts.values())
    used = [(path, step - start, each) for path, (step, start_of, each) in facts.items() if start_of == start]
    factors = solve([(done, each) for _, done, each in used], last - start, width)
    total: dict[str, Tensor] = {}
    for factor, (path, _, _) in zip(factors, used, strict=True):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                value = file.get_tensor(name).float() * float(factor)
                total[name] = total[name] + value if name in total else value
    return total, last


def _facts(path: Path) -> tuple[int, int, float]:
    """Return step, step of the beginning, and width of a snapshot."""
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(json.dumps(file.metadata() or {}))
    return int(SNAPSHOT.fullmatch(path.name)[1]), int(metadata["start"]), float(metadata["width"])
