"""The training loop, the same for every stage: batches -> loss -> optimiser -> EMA -> checkpoint, log, sheet, export.

A resumed run equals an uninterrupted one: batches and noise are pure functions of (seed, rank, step), the learning
rate is a function of the step, and the checkpoint holds weights, optimiser, EMA and step. Must not know any stage.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers.training_utils import EMAModel
from torch import Tensor

from ptdit_diffusers.training.checkpoint import load_checkpoint, save_checkpoint
from ptdit_diffusers.training.parts import (
    Batches,
    LossModule,
    batch_loader,
    due,
    learning_rate,
    make_optimizers,
    stop_signals,
)
from ptdit_diffusers.training.record import append_log, draw_curve, trim_log, update_run, write_run
from ptdit_diffusers.training.settings import LoopSettings
from ptdit_diffusers.training.stage import Stage, mix

logger = logging.getLogger(__name__)


def train(stage: Stage, settings: LoopSettings, accelerator: Accelerator) -> int:
    """Train until `settings.steps`, a time limit or a stop signal; returns the step reached.

    Files in `settings.output_dir`: checkpoint-*/, log.jsonl, loss.png, sheets/, run.json. Existing checkpoints there
    are resumed. At the last step the EMA weights are exported to `settings.export_folder`.
    """
    run = Run(stage, settings, accelerator)
    data = Batches(stage, accelerator.process_index, settings.batch_size)
    numbers = range(run.step * settings.accumulation, settings.steps * settings.accumulation)
    batches = iter(batch_loader(data, numbers, settings.workers, accelerator.device))
    with stop_signals() as stop:
        while run.step < settings.steps and not run.must_stop(stop):
            run.optimise(batches)
            last = run.step == settings.steps
            if last or run.step % settings.log_every == 0:
                run.log()
            if last or due(run.step, settings.sheet_every):
                run.sheet()
            if last or due(run.step, settings.checkpoint_every) or run.checkpoint_is_old():
                run.save()
    run.save()
    if run.step == settings.steps:
        run.export()
    return run.step


class Run:
    """Stage, optimiser, EMA and step of one run, and what the loop does with them."""

    def __init__(self, stage: Stage, settings: LoopSettings, accelerator: Accelerator) -> None:
        """Build optimiser and EMA and take up the newest checkpoint in the output folder, if any."""
        self.stage, self.settings, self.accelerator = stage, settings, accelerator
        self.folder = Path(settings.output_dir)
        self.trained = [parameter for parameter in stage.model.parameters() if parameter.requires_grad]
        self.ema = EMAModel(self.trained, decay=settings.ema_decay, foreach=True)
        self.step, self.seconds = 0, 0.0
        optimizers = make_optimizers(stage.model, settings)
        self.wrapped, *self.optimizers = accelerator.prepare(LossModule(stage), *optimizers)
        self.resume()
        self.started = self.saved_at = self.logged_at = time.monotonic()
        self.saved_step, self.sums, self.summed = self.step, {}, 0
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            trim_log(self.folder / "log.jsonl", self.step)
            count = sum(parameter.numel() for parameter in self.trained)
            progress = {"parameters": count, "step": self.step, "seconds": round(self.seconds, 1)}
            write_run(self.folder / "run.json", settings, progress, accelerator.num_processes)
            logger.info("%d parameters on %s, from step %d", count, accelerator.device, self.step)

    def resume(self) -> None:
        """Load weights, optimiser, EMA, step and seconds."""
        state = load_checkpoint(self.folder)
        if state is None:
            return
        self.stage.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            asked = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, options in zip(optimizer.param_groups, asked, strict=True):
                group.update(options)  # the settings go before the checkpoint
        for average, saved in zip(self.ema.shadow_params, state["ema"], strict=True):
            average.copy_(saved)
        self.step = self.ema.optimization_step = state["step"]
        self.seconds = state["seconds"]

    def optimise(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """One optimiser step: `accumulation` micro-batches, clipping, optimiser, EMA."""
        accelerator, settings = self.accelerator, self.settings
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, settings)
        for micro in range(settings.accumulation):
            batch = send_to_device(next(batches), accelerator.device, non_blocking=True)
            index = self.step * settings.accumulation + micro
            torch.manual_seed(mix(settings.seed, accelerator.process_index, index))
            with accelerator.accumulate(self.wrapped):
                loss, numbers = self.wrapped(batch)
                accelerator.backward(loss)
                numbers = {"loss": loss.detach(), **numbers}
                if accelerator.sync_gradients:
                    numbers["gradient_norm"] = accelerator.clip_grad_norm_(self.trained, settings.clip)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            for name, value in numbers.items():
                share = 1 if name == "gradient_norm" else 1 / settings.accumulation
                self.sums[name] = self.sums.get(name, 0) + value * share
        self.ema.step(self.trained)
        self.step += 1
        self.summed += 1

    def log(self) -> None:
        """Append the means since the last call to log.jsonl."""
        names = sorted(self.sums)
        means = torch.stack([self.sums[name].float() for name in names]) / self.summed
        means = dict(zip(names, self.accelerator.reduce(means, "mean").tolist(), strict=True))
        self.require_finite(means["loss"])
        now, settings = time.monotonic(), self.settings
        samples = self.summed * settings.accumulation * settings.batch_size * self.accelerator.num_processes
        line = {**means, "lr": learning_rate(self.step - 1, settings)}
        line["samples_per_second"] = samples / (now - self.logged_at)
        self.logged_at, self.sums, self.summed = now, {}, 0
        self.write(line)

    def require_finite(self, loss: float) -> None:
        """Stop before a broken model is written over a sound checkpoint."""
        if not math.isfinite(loss):
            raise FloatingPointError(f"The loss is {loss} at step {self.step}; resume with a lower lr.")

    def write(self, line: dict[str, float]) -> None:
        """Append one line about this step to log.jsonl and show it."""
        if self.accelerator.is_main_process:
            line = {name: float(f"{value:.6g}") for name, value in line.items() if name != "step"}
            line = {"step": self.step, **line, "seconds": round(self.elapsed(), 1)}
            append_log(self.folder / "log.jsonl", line)
            logger.info("  ".join(f"{name} {value:.5g}" for name, value in line.items()))

    def sheet(self) -> None:
        """Redraw the loss curve and let the stage write its sample sheet from the EMA weights."""
        if self.accelerator.is_main_process:
            draw_curve(self.folder / "log.jsonl", self.folder / "loss.png")
            (self.folder / "sheets").mkdir(exist_ok=True)
            with self.averaged():
                numbers = self.stage.sheet(self.folder / "sheets" / f"step-{self.step:08d}")
            if numbers:
                self.write(numbers)
        self.logged_at = time.monotonic()  # the sheet's time is not the training's

    def save(self) -> None:
        """Write a checkpoint unless this step has one."""
        self.saved_at = time.monotonic()
        if self.step == self.saved_step:
            return
        self.require_finite(float(self.sums.get("loss", 0.0)))
        self.saved_step = self.step
        if self.accelerator.is_main_process:
            state = {
                "model": self.stage.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "ema": self.ema.shadow_params,
                "step": self.step,
                "seconds": self.elapsed(),
            }
            save_checkpoint(self.folder, self.step, state, self.settings.keep)
            update_run(self.folder / "run.json", {"step": self.step, "seconds": round(self.elapsed(), 1)})

    def export(self) -> None:
        """Let the stage write its components from the EMA weights."""
        if self.accelerator.is_main_process:
            with self.averaged():
                self.stage.export(self.settings.export_folder)
            logger.info("exported step %d to %s", self.step, self.settings.export_folder)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """EMA weights in the model, eval mode, no gradients."""
        self.ema.store(self.trained)
        self.ema.copy_to(self.trained)
        self.stage.model.eval()
        with torch.no_grad():
            yield
        self.stage.model.train()
        self.ema.restore(self.trained)

    def must_stop(self, stop: dict[str, bool]) -> bool:
        """Whether a signal came or the minutes are over, on any process."""
        limit = self.settings.max_minutes * 60
        over = stop["now"] or 0 < limit <= time.monotonic() - self.started
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(over), device=self.accelerator.device)
            over = self.accelerator.reduce(flag, "sum").item() > 0
        return over

    def checkpoint_is_old(self) -> bool:
        """Whether `checkpoint_minutes` have passed since the last one."""
        return 0 < self.settings.checkpoint_minutes <= (time.monotonic() - self.saved_at) / 60

    def elapsed(self) -> float:
        """Seconds trained, earlier calls included."""
        return self.seconds + time.monotonic() - self.started
