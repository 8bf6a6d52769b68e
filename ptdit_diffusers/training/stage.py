"""What the loop asks of a stage, and the random numbers a stage may use. Must not know any stage or the loop.

A stage module (scripts/embedded_models/<name>_stage.py) defines two names, found by scripts/train.py:

    Settings                           dataclass derived from config.LoopSettings, with `model:` and `data:` parts
    build(settings, device) -> Stage   makes the stage; `device` is where the loop trains

Example of a whole stage module:

    @dataclass(kw_only=True)
    class Settings(LoopSettings):
        model: ModelSettings = field(default_factory=ModelSettings)

    class LineStage:
        def __init__(self, settings, device):
            self.settings, self.model = settings, nn.Linear(1, 1).to(device)
        def batch(self, step, rank, batch_size):
            points = torch.rand(batch_size, 1, generator=torch_generator(self.settings.seed, rank, step))
            return {"x": points, "y": 3 * points}
        def loss(self, batch):
            return F.mse_loss(self.model(batch["x"]), batch["y"]), {}
        def sheet(self, path): ...
        def export(self, folder): ...
"""

from pathlib import Path
from typing import Protocol

import numpy
import torch
from torch import Tensor, nn

HELD_OUT_SEED = 2**31  # of what training never sees: apart from every training seed


class Stage(Protocol):
    """One thing to train. Everything random in a step comes out of `batch`, so a run can stop and resume anywhere.

    Attributes:
        model: fp32 module whose parameters with `requires_grad` are trained (frozen helpers such as a VAE or a text
            encoder belong on the stage, not in `model`). The loop optimises it, keeps its EMA and saves its state
            dict. The stage keeps calling `self.model` directly: the loop never replaces it.
    """

    model: nn.Module

    def batch(self, step: int, rank: int, batch_size: int) -> dict[str, Tensor]:
        """CPU tensors of one micro-batch, noise and timesteps included.

        A pure function of (seed, rank, step): use numpy_generator / torch_generator below. `step` counts
        micro-batches, not optimiser steps. Called in worker processes when `workers` > 0, so it must not use the GPU.
        """

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss to minimise, and scalars to log beside it (detached tensors; may be empty).

        `batch` is already on the training device. Runs under the loop's autocast and through its data-parallel
        wrapper; the global RNG is seeded from (seed, rank, step) just before, so drawing here is repeatable too.
        """

    def sheet(self, path: Path) -> dict[str, float]:
        """Write a sample sheet or report to `path.with_suffix(...)` and return numbers for the log (may be empty).

        Called on rank 0 with the EMA weights in `model`, in eval mode, without gradients and without autocast.
        """

    def export(self, folder: Path) -> None:
        """Write the components as sub-folders of the diffusers folder `folder`; called as `sheet` is."""


def numpy_generator(*seeds: int) -> numpy.random.Generator:
    """Generator for the non-negative integers given, for example (seed, rank, step)."""
    return numpy.random.default_rng(seeds)


def torch_generator(*seeds: int) -> torch.Generator:
    """CPU generator for the non-negative integers given, for example (seed, rank, step)."""
    return torch.Generator().manual_seed(mix(*seeds))


def mix(*seeds: int) -> int:
    """One 63-bit seed from several, without the collisions of sums."""
    return int(numpy.random.SeedSequence(seeds).generate_state(1, numpy.uint64)[0] >> 1)
