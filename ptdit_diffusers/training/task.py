"""What the loop asks of a task: a LoRA, or a stage of an embedded model. Example of a whole task:

class LineTask(Task):
    def __init__(self, settings, device):
        self.settings, self.model = settings, nn.Linear(1, 1).to(device)
    def batch(self, step, rank, batch_size):
        points = torch.rand(batch_size, 1, generator=torch_generator(self.settings.seed, rank, step))
        return {"x": points, "y": 3 * points}
    def loss(self, batch):
        return F.mse_loss(self.model(batch["x"]), batch["y"]), {}
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from ptdit_diffusers.training.checkpoint import like
from ptdit_diffusers.training.optimizers import make_optimizers
from ptdit_diffusers.training.processes import attention_kernels
from ptdit_diffusers.training.schedules import warmup_hold_decay


class Task:
    """One thing to train; everything random in a step is a function of (seed, rank, step).

    The methods after `export` have defaults that take their values from `settings`, a LoopSettings.

    Attributes:
        model: Module whose parameters with `requires_grad` are trained, in fp32. Frozen helpers such as a VAE belong
            on the task, not in `model`. The loop never replaces it.
        settings: Dataclass with a `seed`; written to run.json.
        sheet_folder: Name of the folder that sheets go to.
        all_draw: Every process calls `sheet`, each to draw its share.
        stream: What stands between seed, rank and step in the seed of torch's global generator.
    """

    model: nn.Module
    settings: Any
    sheet_folder: ClassVar[str] = "sheets"
    all_draw: ClassVar[bool] = False
    stream: ClassVar[tuple[int, ...]] = ()

    @property
    def network(self) -> nn.Module:
        """The part of `model` whose tokens processes can share (`context_parallel`)."""
        return self.model

    def batch(self, step: int, rank: int, batch_size: int) -> dict[str, Tensor]:
        """Return one micro-batch as CPU tensors, noise and times included: a pure function of (seed, rank, step).

        `step` counts micro-batches, not optimizer steps. Called in worker processes when `workers` > 0, so it must not
        use the GPU.
        """
        raise NotImplementedError

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss to minimize, and scalars to log beside it (detached; may be none).

        `batch` is on the training device. Runs under autocast and through the data-parallel wrapper. torch's global
        generator is seeded before each call.
        """
        raise NotImplementedError

    def sheet(self, path: Path, step: int) -> dict[str, float]:
        """Show how good the weights are: write files whose names begin with `path`; return numbers for the log.

        Called with the averaged weights in `model`, in eval mode, without gradients and autocast; on the main process,
        and on all of them where they share the weights or samples or `all_draw` says so.
        """
        return {}

    def export(self, folder: Path) -> None:
        """Write the result to `folder` after the last step; called as `sheet` is."""

    def export_step(self, folder: Path, step: int) -> None:
        """Write the result of a step on the way to `folder`, which is of that step alone; called as `sheet` is."""
        self.export(folder)

    def batches(self, rank: int) -> Dataset:
        """Return the micro-batches of one process by number."""
        return Batches(self, rank)

    def blocks(self) -> Sequence[nn.Module]:
        """Return the parts of the model whose weights are gathered one after another where processes share them."""
        return ()

    def samples_of(self, step: int, processes: int) -> int:
        """Return how many samples the 0-based step has, of all processes together."""
        return self.settings.batch_size * self.settings.accumulation * processes

    def work_of(self, batch: dict[str, Any]) -> dict[str, float]:
        """Return how much work a micro-batch is on this process, for the log; what is not known is left out.

        `tokens` that the model sees, and `seconds_at_peak`: the time that its operations take at the device's peak.
        """
        return {}

    def describe(self, step: int) -> str:
        """Return in words what the 0-based step was trained on, for messages; "" = nothing is known."""
        return ""

    def optimizers(self) -> list[Optimizer]:
        """Return the optimizers of the parameters that are trained."""
        settings = self.settings
        return make_optimizers(
            trained_parameters(self.model),
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            decay_vectors=False,
            fused=True,
            muon=settings.muon,
        )

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the 0-based step."""
        settings = self.settings
        return warmup_hold_decay(step, settings.lr, settings.warmup, settings.hold, settings.decay, settings.steps)

    def average(self, parameters: Sequence[nn.Parameter]) -> EMAModel | None:
        """Return the running average of the parameters, which is what `sheet` and `export` get; None = no average."""
        return EMAModel(parameters, decay=self.settings.ema_decay, foreach=True)

    def sheet_steps(self, last: int) -> Sequence[int]:
        """Return the steps with a sheet beside those that the settings ask for; `last` is the last step."""
        return [last]

    def kernels(self) -> AbstractContextManager:
        """Return the context of forward and backward."""
        return nullcontext()

    def state(self) -> dict[str, Tensor]:
        """Return the weights for a checkpoint; the loop gathers those that processes share."""
        return self.model.state_dict()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up the weights of a checkpoint."""
        self.model.load_state_dict(state)

    def notes(self) -> dict[str, Any]:
        """Return what a checkpoint should hold besides the state of the loop: plain values."""
        return {}


class PartTask(Task):
    """A task whose checkpoints hold the parameters that are trained, and nothing of what is frozen beside them.

    Attributes:
        device: Where `model` is.
    """

    device: torch.device

    def kernels(self) -> AbstractContextManager:
        return attention_kernels(self.device)  # around the backward, too: it may recompute the blocks

    def state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in trained_parameters(self.model).items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, parameter in trained_parameters(self.model).items():
            parameter.copy_(like(state[name], parameter))


class Batches(Dataset):
    """The micro-batches of a task by number."""

    def __init__(self, task: Task, rank: int) -> None:
        self.task, self.rank = task, rank

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return micro-batch `index` as CPU tensors."""
        return self.task.batch(index, self.rank, self.task.settings.batch_size)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
