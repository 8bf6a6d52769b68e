"""Trajectory distribution matching: a student of few steps learns from its own states which way they should move.

Of every step of the student the distribution of its results is compared with the teacher's, at noise levels between
the ends of the step (TDM of github.com/Luo-Yihong/TDM, after DMD, arXiv 2311.18828). The fake score, a second adapter,
follows what the student makes; the teacher is the model without adapters. No data are needed but captions.
The first `keep_first` steps, which decide what is where, learn from the teacher's paths instead; DP-DMD (arXiv
2602.03139) does so with the first one to keep diversity.
Letters: B samples, C latent channels, F H W latent frames, rows, columns; T noise levels of the steps, t between two.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import Dataset

from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.training.base_model import BaseModel
from ptdit_diffusers.training.optimizers import make_optimizers
from ptdit_diffusers.training.randomness import Stream, numpy_generator, torch_generator
from ptdit_diffusers.training.task import trained_parameters

from .adapter import NAME
from .distill_config import DistillSettings
from .distill_task import SegmentBatches, SegmentTask, segment_batch
from .paths import Paths

FAKE = "fake"  # the second adapter
NEAREST = 0.02  # share of a step that t keeps from its end, where the equations divide by t


class TDMBatches(Dataset):
    """One process's part of every batch, by its number: captions, noise, and which step of the student is trained."""

    def __init__(
        self, paths: Paths, settings: DistillSettings, rank: int, processes: int, global_batch: int = 0
    ) -> None:
        """Plan the batches; the arguments are those of `SegmentBatches`."""
        self.paths, self.settings = paths, settings
        self.order = SegmentBatches(paths, settings, rank, processes, global_batch)
        self.global_batch = self.order.global_batch

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Return `noise` and `fresh` (B, C, F, H, W), `share` (B,) in 0..1, text, `segment` (B,), all the same,
        `weight` () as `SegmentBatches`, and whether the student `learns` (B,). In a step that keeps to the paths there
        are also `start`, their states before it, and `path`, their velocity in it, shaped like the noise.
        """
        settings = self.settings
        segment = int(numpy_generator(settings.seed, Stream.PATH_PLACE, number).integers(settings.steps))
        places = [number * self.global_batch + place for place in self.order.places]
        indices = [self.order.index(place) for place in places]
        generators = [torch_generator(settings.seed, Stream.FEW_STEPS, place) for place in places]
        shape = self.paths.noise(0).shape
        text, mask = self.paths.text(indices)
        batch = {
            "noise": torch.stack([torch.randn(shape, generator=each) for each in generators]),
            "fresh": torch.stack([torch.randn(shape, generator=each) for each in generators]),
            "share": torch.cat([torch.rand(1, generator=each) for each in generators]),
            "segment": torch.full((len(places),), segment),
            "text": text,
            "mask": mask,
            "weight": torch.tensor(self.order.share),
            "learns": torch.full((len(places),), float(number >= settings.fake_first * settings.accumulation)),
        }
        if segment < settings.keep_first:
            kept = segment_batch(self.paths, indices, batch["segment"], torch.zeros(len(places)))
            batch |= {"start": kept["noisy"], "path": kept["target"]}
        return batch


class TDMTask(SegmentTask):
    """A student's adapter that is trained by its own states, and the adapter of the fake score."""

    def __init__(
        self,
        settings: DistillSettings,
        base: BaseModel,
        paths: Paths,
        accelerator: Accelerator,
        global_batch: int = 0,
    ) -> None:
        """Load the teacher and the student, and add the adapter of the fake score."""
        super().__init__(settings, base, paths, accelerator, global_batch)
        self.data = TDMBatches(paths, settings, accelerator.process_index, accelerator.num_processes, global_batch)
        layers = [name for name, layer in self.model.named_modules() if hasattr(layer, "base_layer")]
        torch.manual_seed(settings.seed + 1)
        self.model.add_adapter(LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=layers), FAKE)
        self.adapters = [each for name, each in self.model.named_parameters() if ".lora_" in name]
        for parameter in self.adapters:
            parameter.data = parameter.data.float()
        self.act_as(NAME)

    def act_as(self, adapter: str | None) -> None:
        """Let the model be the student (NAME), the fake score (FAKE) or the teacher (None)."""
        if adapter is None:
            self.model.disable_adapters()
        else:
            self.model.enable_adapters()
            self.model.set_adapter(adapter)
        for parameter in self.adapters:  # peft freezes those that are not active, whose gradients are still needed
            parameter.requires_grad_(True)

    @contextmanager
    def teacher(self) -> Iterator[PTDiTTransformer3DModel]:
        self.act_as(None)
        try:
            yield self.model
        finally:
            self.act_as(NAME)

    def optimizers(self) -> list[Optimizer]:
        settings, all_of = self.settings, trained_parameters(self.model)
        options = {"lr": settings.lr, "weight_decay": settings.weight_decay, "betas": (0.0, 0.95)}
        options["arguments"] = settings.optimizer_args
        found = []
        for adapter, factor in ((NAME, 1.0), (FAKE, settings.fake_lr)):
            mine = {name: each for name, each in all_of.items() if f".{adapter}." in name}
            made = make_optimizers(mine, settings.optimizer, **options)
            for group in (group for optimizer in made for group in optimizer.param_groups):
                group["lr_factor"] = factor
            found += made
        return found

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses of student and fake score, of different weights, as a sum."""
        stride = self.settings.points // self.settings.steps
        times, step = self.paths.times[::stride], int(batch["segment"][0])
        text, mask = batch["text"], batch["mask"]
        begin, end = times[step], times[step + 1]
        state = batch["start"] if "path" in batch else self.reached(batch["noise"], times[: step + 1], text, mask)
        velocity = self.predict(state, torch.full_like(batch["share"], begin), text, mask)
        t = end + (begin - end) * batch["share"].clamp(min=NEAREST)
        clean, noisy, own = renoised(state, velocity, begin, end, t, batch["fresh"])
        level = t.view(-1, 1, 1, 1, 1)
        with torch.no_grad():
            self.act_as(None)
            real = self.guided(noisy, t, text, mask)
            self.act_as(FAKE)
            fake = self.predict(noisy, t, text, mask)
            if "path" in batch:
                way = begin * (velocity - batch["path"])
                weight = way.abs().mean((1, 2, 3, 4), keepdim=True)
            else:
                way = level * (fake - real)
                weight = (clean - (noisy - level * real)).abs().mean((1, 2, 3, 4), keepdim=True)
            target = clean + way / weight.clamp(min=1e-4)
        student = 0.5 * (clean - target).square().mean() * batch["weight"] * batch["learns"].mean()
        follows = (self.predict(noisy, t, text, mask) - own).square().mean() * batch["weight"]
        self.act_as(NAME)
        distance = weight.mean() * batch["weight"]
        return student + follows, {"loss_student": student.detach(), "loss_fake": follows.detach(), "w0": distance}


def renoised(
    state: Tensor, velocity: Tensor, begin: float, end: float, t: Tensor, fresh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Make one step of the student and noise its result to a level within the step.

    Args:
        state: x (B, C, F, H, W) at level `begin`.
        velocity: u of the student, shaped like it; the step is y = x - (begin - end) u.
        begin, end: Noise levels of the step.
        t: Noise levels (B,) between `end` and `begin`, above 0.
        fresh: Noise n, shaped like the state.

    Returns:
        The clean latents x0 = x - begin u that the student foresees, with its gradient; and without gradient the noisy
        ones (1 - t) x0 + t n', and their velocity n' - x0, where n' joins the noise that y has with the fresh one.
    """
    level = t.view(-1, 1, 1, 1, 1)
    clean = state - begin * velocity
    with torch.no_grad():
        noise, result = clean + velocity, state - (begin - end) * velocity
        kept = (1 - level) / (1 - end)
        added = (level.square() - (kept * end).square()).clamp(min=0).sqrt()
        joined = (kept * end * noise + added * fresh) / level
        return clean, kept * result + added * fresh, joined - clean
