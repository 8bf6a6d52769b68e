"""The student as a task of the training loop: it learns where a segment of the teacher's path leads, in one forward.

Letters: B samples, C latent channels, F H W latent frames, rows, columns, L text tokens, D text width, K segments.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import free_memory
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ptdit_diffusers.core.few_steps import LORA_FILE, read_distillation
from ptdit_diffusers.core.sampling import apply_guidance, choose_windows, size_conditions
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.training.base_model import BaseModel, choose_dtype
from ptdit_diffusers.training.checkpoint import whole
from ptdit_diffusers.training.data.order import places
from ptdit_diffusers.training.processes import attention_kernels
from ptdit_diffusers.training.randomness import Stream, numpy_generator
from ptdit_diffusers.training.schedules import named_schedule
from ptdit_diffusers.training.sheets import step_name, write_sheet
from ptdit_diffusers.training.task import trained_parameters
from ptdit_diffusers.training.trackers import track_pictures

from .adapter import add_adapter, folded_weights, reads_start
from .distill_config import DistillSettings
from .distill_export import export_lora, export_model
from .paths import Paths, noise_levels, pad_text
from .task import NetworkTask
from .validate import Sampling, generate_validation, quarter_steps, save_validation

logger = logging.getLogger("lora")

TEACHER = "teacher"  # beginning of the names of its pictures


class SegmentBatches(Dataset):
    """One process's part of every batch, by the number of the batch; it reads the paths and holds no model.

    An epoch goes through all paths that are not held out; the segments of a batch are as even as they can be.

    Attributes:
        places: Of a batch, that this process takes.
        share: With this weight the mean of all processes' means is that of the whole batch.
    """

    def __init__(
        self, paths: Paths, settings: DistillSettings, rank: int, processes: int, global_batch: int = 0
    ) -> None:
        """Plan the batches; the arguments after the settings are those of `CachedBatches`."""
        self.paths, self.settings = paths, settings
        self.members = settings.paths - settings.held_out
        self.global_batch = global_batch or settings.batch_size * processes
        self.places = places(self.global_batch, rank, processes)
        self.share = len(self.places) * processes / self.global_batch  # parts may differ in size
        self.epoch, self.order = -1, []

    def index(self, place: int) -> int:
        """Return which path stands at a place in the endless order of all epochs."""
        epoch, rest = divmod(place, self.members)
        if epoch != self.epoch:
            order = numpy_generator(self.settings.seed, Stream.PATH_ORDER, epoch).permutation(self.members)
            self.epoch, self.order = epoch, order + self.settings.held_out
        return int(self.order[rest])

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Return the batch of `segment_batch`, and `weight` (), the share. In a batch of the student's own states all
        `segment` are equal, and `noise` is what its steps begin with, in place of `noisy`, `time`, `target`.
        """
        settings, mine = self.settings, slice(self.places.start, self.places.stop)
        choice = numpy_generator(settings.seed, Stream.PATH_PLACE, number)
        segments = choice.permutation(self.global_batch) % settings.steps
        shares = choice.random((2, self.global_batch))
        indices = [self.index(number * self.global_batch + place) for place in self.places]
        if choice.random() < settings.own_states:
            segment, (text, mask) = int(choice.integers(1, settings.steps)), self.paths.text(indices)
            noise = torch.stack([self.paths.noise(index) for index in indices])
            batch = {"noise": noise, "segment": torch.full((len(indices),), segment), "text": text, "mask": mask}
            return batch | {"weight": torch.tensor(self.share)}
        inside = torch.from_numpy(shares[1][mine]) * torch.from_numpy(shares[0][mine] < settings.inner)
        batch = segment_batch(self.paths, indices, torch.from_numpy(segments[mine]), inside.float())
        return batch | {"weight": torch.tensor(self.share)}


def segment_batch(paths: Paths, indices: Sequence[int], segments: Tensor, inside: Tensor) -> dict[str, Tensor]:
    """Return samples of segments: the target is the mean velocity of the segment, (start - end) / (their times).

    Args:
        paths: Of the teacher.
        indices: Of the paths (B).
        segments: Which segment of each path (B,).
        inside: Place on the line from start to end (B,), 0..1; 0 is the start, which is what sampling visits.

    Returns:
        `noisy` and `target` (B, C, F, H, W), `time` (B,) in 0..1, `segment` (B,), `text` (B, L, D), `mask` (B, L).
    """
    stride = paths.settings.points // paths.settings.steps
    times = torch.tensor(paths.times)[::stride]
    pairs = [
        paths.states(index, (segment * stride, (segment + 1) * stride))
        for index, segment in zip(indices, segments.tolist(), strict=True)
    ]
    starts, ends = torch.stack(pairs, dim=1)
    begin, end = times[segments], times[segments + 1]
    target = (starts - ends) / _wide(begin - end)
    text, mask = paths.text(indices)
    return {
        "noisy": starts + (ends - starts) * _wide(inside),
        "target": target,
        "time": begin + (end - begin) * inside,
        "segment": segments,
        "text": text,
        "mask": mask,
    }


def _wide(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1, 1)


class SegmentTask(NetworkTask):
    """A student, an adapter or all weights, that is trained on the segments of its teacher's paths."""

    sheet_folder = "validation"
    stream = (Stream.FEW_STEPS,)
    model: PTDiTTransformer3DModel
    settings: DistillSettings

    def __init__(
        self,
        settings: DistillSettings,
        base: BaseModel,
        paths: Paths,
        accelerator: Accelerator,
        global_batch: int = 0,
    ) -> None:
        """Load the teacher and make what is trained of it the student, which `start` may name; `global_batch` as for
        `SegmentBatches`.
        """
        self.settings, self.base, self.paths, self.accelerator = settings, base, paths, accelerator
        ranks = accelerator.process_index, accelerator.num_processes
        self.data = SegmentBatches(paths, settings, *ranks, global_batch)
        self.schedule = named_schedule(settings.schedule, settings.lr, settings.warmup, settings.max_steps)
        self.device, self.dtype = accelerator.device, choose_dtype(settings.precision, accelerator.device)
        if settings.rank:
            self.model = base.load_transformer(self.dtype, settings.base_weights, self.device)
            add_adapter(self.model, settings.adapter())
        else:
            self.model = base.load_transformer(torch.float32, "none", self.device).requires_grad_(True)
        self.model.set_windows(proxy_mode="mean")
        if settings.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.model.train()
        if settings.compile:
            self.model.compile_repeated_blocks(dynamic=False)
        trained = f"an adapter of rank {settings.rank}" if settings.rank else "all weights"
        logger.info("%s on %s: %s, %d steps", self.dtype, self.device, trained, settings.max_steps)

    @cached_property
    def fine_times(self) -> list[float]:
        """Noise levels of all the teacher's steps."""
        return noise_levels(self.base, self.settings.teacher_steps, self.paths.side, self.settings.num_frames)

    @cached_property
    def empty(self) -> tuple[Tensor, Tensor]:
        """Embedding (1, L, D) of the empty caption, and its mask (1, L)."""
        text, mask = pad_text([self.paths.cache.text("")], self.paths.tokens)
        return text.to(self.device), mask.to(self.device)

    def batches(self, rank: int) -> SegmentBatches:
        return self.data

    def samples_of(self, step: int, processes: int) -> int:
        return self.data.global_batch * self.settings.accumulation

    def predict(self, noisy: Tensor, time: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Return the student's velocity (B, C, F, H, W) in float32 at noise levels `time` (B,)."""
        height, width = noisy.shape[-2:]
        (sample,) = self.model(
            hidden_states=noisy.to(self.model.dtype),
            encoder_hidden_states=text.to(self.model.dtype),
            timestep=time * 1000,
            encoder_attention_mask=mask,
            return_dict=False,
            **choose_windows(self.model, "auto", "auto", height, width),
            **size_conditions(self.model, height * 8, width * 8),
        )
        return self.model.flow(sample).float()

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean square error of the velocity, and that of each segment."""
        if "noise" in batch:
            batch = batch | self.continued(batch)
        predicted = self.predict(batch["noisy"], batch["time"], batch["text"], batch["mask"])
        error = (predicted - batch["target"]).square().flatten(1).mean(1)
        numbers = {}
        for segment in range(0 if self.settings.own_states else self.settings.steps):  # a batch of these has one alone
            here = batch["segment"] == segment
            numbers[f"loss_{segment + 1}"] = (error.detach() * here).sum() / here.sum().clamp(min=1)
        return error.mean() * batch["weight"], numbers

    @torch.no_grad()
    def continued(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return `noisy`, `time` and `target` of states that the student reaches, where the teacher goes on."""
        settings, segment = self.settings, int(batch["segment"][0])
        each, fine = settings.teacher_steps // settings.steps, self.fine_times
        text, mask = batch["text"], batch["mask"]
        noisy = self.reached(batch["noise"], fine[: segment * each + 1 : each], text, mask)
        levels = fine[segment * each : (segment + 1) * each + 1]
        with self.teacher():
            state = noisy
            for one, two in pairwise(levels):
                state = state - (one - two) * self.guided(state, torch.full((len(state),), one).to(state), text, mask)
        time = torch.full((len(noisy),), levels[0]).to(noisy)
        return {"noisy": noisy, "time": time, "target": (noisy - state) / (levels[0] - levels[-1])}

    @torch.no_grad()
    def reached(self, noise: Tensor, times: Sequence[float], text: Tensor, mask: Tensor) -> Tensor:
        """Return the states (B, C, F, H, W) that the student's own steps reach from noise, at the last level."""
        state = noise
        for one, two in pairwise(times):
            state = state - (one - two) * self.predict(state, torch.full((len(state),), one).to(state), text, mask)
        return state

    def guided(self, noisy: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Return the teacher's guided velocity (B, C, F, H, W), while the model is the teacher."""
        scale = self.settings.guidance
        if scale == 1:
            return self.predict(noisy, t, text, mask)
        empty, its_mask = self.empty[0].expand_as(text), self.empty[1].expand_as(mask)
        pair = [torch.cat(each) for each in ([noisy] * 2, [t] * 2, [empty, text], [its_mask, mask])]
        return apply_guidance(self.predict(*pair), scale)

    def notes(self) -> dict[str, Any]:
        return {
            "settings": dataclasses.asdict(self.settings),
            "processes": self.accelerator.num_processes,
            "global_batch": self.data.global_batch,
            "transformer": self.base.fingerprint("transformer", "scheduler"),
            "paths": self.paths.maker,
        }

    def sheet_steps(self, last: int) -> Sequence[int]:
        return quarter_steps(last)

    def sheet(self, path: Path, step: int) -> dict[str, float]:
        """Return the errors on held-out paths; show the student's pictures beside the teacher's."""
        with torch.compiler.set_stance("force_eager"):  # other shapes and no adapter would be compiled for one use
            return self._sheet(path, step)

    def _sheet(self, path: Path, step: int) -> dict[str, float]:
        settings = self.settings
        if settings.validation_prompts:
            student = Sampling(settings.steps, 1.0, settings.num_frames)
            self.show(path, step, student)
            marks = [mark for mark in self.sheet_steps(settings.max_steps) if mark <= step]
            columns = {TEACHER: TEACHER} | {f"step {mark}": step_name(mark) for mark in marks}
            if self.accelerator.is_main_process:
                write_sheet(path.parent, path.parent.parent / "sheet.png", columns, settings.validation_prompts)
        return self.held_out_errors()

    def show(self, path: Path, step: int, student: Sampling) -> None:
        """Write the student's pictures, and the teacher's where they are not there yet."""
        settings = self.settings
        reference = path.with_name(TEACHER)
        if not reference.with_name(f"{TEACHER}-{len(settings.validation_prompts) - 1}.png").is_file():
            teacher = Sampling(settings.teacher_steps, settings.guidance, settings.num_frames)
            with self.teacher() as model:
                self.keep(generate_validation(model, *self.made_by(teacher)), reference, 0, teacher)
        pictures = self.keep(generate_validation(self.model, *self.made_by(student)), path, step, student)
        track_pictures(self.accelerator, "validation", pictures, step)

    def made_by(self, sampling: Sampling) -> tuple[Any, ...]:
        """Return the arguments of `generate_validation` after the model."""
        return self.base, self.paths.cache.text, self.settings, self.device, sampling

    def keep(self, found: list[list[Image.Image]], path: Path, step: int, sampling: Sampling) -> list[Image.Image]:
        """Write pictures on the main process, and return them; others return none."""
        if not self.accelerator.is_main_process:
            return []
        return save_validation(found, path, step, self.settings, sampling)

    @contextmanager
    def teacher(self) -> Iterator[PTDiTTransformer3DModel]:
        """Give the teacher: the same weights without the adapter, or where all are trained, the base once more."""
        if self.settings.rank:
            self.model.disable_adapters()
            try:
                yield self.model
            finally:
                self.model.enable_adapters()
        else:
            yield self.base.load_transformer(self.dtype, "none", self.device).eval()
            free_memory()

    @torch.no_grad()
    def held_out_errors(self) -> dict[str, float]:
        """Return on held-out paths the relative error of each segment's velocity, and of the latents at the end.

        The latter are those of the student's own `steps` forwards from the same noise. Errors are root mean squares,
        relative to those of what should be there.
        """
        settings, times = self.settings, torch.tensor(self.paths.times)
        stride, wrong, size = (
            settings.points // settings.steps,
            torch.zeros(2, settings.steps + 1),
            settings.batch_size,
        )
        with self.accelerator.autocast(), attention_kernels(self.device):
            for first in range(0, settings.held_out, size):
                indices = range(first, min(first + size, settings.held_out))
                states = torch.stack(
                    [self.paths.states(index, range(0, settings.points + 1, stride)) for index in indices]
                )
                states = states.to(self.device)
                text, mask = (each.to(self.device) for each in self.paths.text(indices))
                own = states[:, 0]
                for segment, (begin, end) in enumerate(zip(times[:-1:stride], times[stride::stride], strict=True)):
                    level = torch.full((len(indices),), float(begin), device=self.device)
                    target = (states[:, segment] - states[:, segment + 1]) / float(begin - end)
                    error = self.predict(states[:, segment], level, text, mask) - target
                    wrong[:, segment] += torch.stack([error.square().sum(), target.square().sum()]).cpu()
                    own = own - float(begin - end) * self.predict(own, level, text, mask)
                error = own - states[:, -1]
                wrong[:, -1] += torch.stack([error.square().sum(), states[:, -1].square().sum()]).cpu()
        errors = (wrong[0] / wrong[1]).sqrt().tolist()
        names = [f"held_out_error_{segment + 1}" for segment in range(settings.steps)]
        return dict(zip([*names, "held_out_error_end"], errors, strict=True))

    def export(self, folder: Path) -> None:
        """Write the finished student: `folder`/lora, or `folder`/model where all weights are trained."""
        settings = self.settings
        if settings.rank:
            parameters = {name: whole(value).float() for name, value in trained_parameters(self.model).items()}
            weights = folded_weights(self.model, parameters, {})
            if self.accelerator.is_main_process:
                logger.info("saved %s", export_lora(folder, weights, settings, self.paths))
        elif self.accelerator.is_main_process:
            logger.info("saved %s", export_model(folder, self.model, self.base, settings, self.paths))


def check_start(settings: DistillSettings) -> None:
    """Check that a run begins with a student, and stage tdm with one of its own steps; the adapter checks the weights.

    Raises:
        ValueError: The folder that `start` names holds no student, or for stage tdm one of other steps.
    """
    if not reads_start(settings.adapter()):
        return
    path = Path(settings.start) / LORA_FILE
    facts = read_distillation(path) if path.is_file() else None
    if facts is None:
        raise ValueError(f"start {settings.start!r} holds no student; give the folder `lora` of stage segments.")
    if settings.stage == "tdm" and facts["steps"] != settings.steps:
        raise ValueError(
            f"start {settings.start!r} is a student of {facts['steps']} steps; nearest: steps={facts['steps']}."
        )
