"""The training loop, the same for every task: batches, loss, optimizers, average, log, sheets, checkpoints, export.

A resumed run equals an uninterrupted one: batches and noise are pure functions of (seed, rank, step), the learning
rate is a function of the step, and the checkpoint holds weights, optimizers, average and step.
"""

import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from torch import Tensor, nn
from torch.optim import Optimizer

from ptdit_diffusers.training.checkpoint import (
    gathered,
    is_shared,
    like,
    load_checkpoint,
    remove_unfinished,
    save_checkpoint,
    unfinished,
)
from ptdit_diffusers.training.context import share_samples
from ptdit_diffusers.training.optimizers import schedule_free
from ptdit_diffusers.training.parallel import background_group, load_parts, save_parts, shard_size, share_weights
from ptdit_diffusers.training.processes import batch_loader, stop_signals
from ptdit_diffusers.training.randomness import mix
from ptdit_diffusers.training.record import (
    Spikes,
    append_log,
    human_time,
    memory_gib,
    plot_curve,
    trim_log,
    update_run,
    write_run,
)
from ptdit_diffusers.training.settings import LoopSettings
from ptdit_diffusers.training.sheets import step_name
from ptdit_diffusers.training.task import Task, trained_parameters

logger = logging.getLogger(__name__)

EXPORTS = "exports"  # folder of the results of steps on the way


class LossModule(nn.Module):
    """The loss of a task as a forward, so that autocast and the data-parallel wrapper see one module."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model, self.task = task.model, task

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss and scalars to log."""
        return self.task.loss(batch)

    def within(self, use: Callable[[], Any]) -> Any:
        """Call `use`, which runs the model: under FSDP2 this method gathers weights as the forward does."""
        return use()


class Run:
    """A task with its optimizers, average and step, and what the loop does with them.

    Files in `settings.output_dir`: checkpoint-*/, log.jsonl, loss.png, sheets, run.json. A checkpoint that lies there
    is taken up. After the last step the task exports the averaged weights to `settings.export_folder`.
    """

    def __init__(self, task: Task, settings: LoopSettings, accelerator: Accelerator) -> None:
        self.task, self.settings, self.accelerator = task, settings, accelerator
        self.folder = Path(settings.output_dir)
        self.context = settings.context_parallel
        if self.context > 1:
            share_samples(task.network, self.context, accelerator)
        self.data_rank, self.data_ranks = (
            number // self.context for number in (accelerator.process_index, accelerator.num_processes)
        )
        self.in_parts = settings.shard > 1 and accelerator.num_processes > 1
        self.wrapped, self.optimizers = self.prepared()
        self.schedule_free = schedule_free([each.optimizer for each in self.optimizers])
        for optimizer in self.schedule_free:
            optimizer.train()
        self.trained = list(trained_parameters(task.model).values())
        self.shared = any(map(is_shared, self.trained))
        if self.shared:
            from torch.distributed.fsdp import register_fsdp_forward_method  # not in every build of torch

            register_fsdp_forward_method(self.wrapped, "within")
        self.average = task.average(self.trained)
        self.writer, self.saving = ThreadPoolExecutor(1), Future()
        self.saving.set_result(None)
        self.group = background_group() if self.in_parts and settings.save_in_background else None
        self.step, self.seconds, self.waited, self.samples = 0, 0.0, 0.0, 0
        self.resume()
        self.started = self.saved_at = self.logged_at = time.monotonic()
        self.first_step = self.saved_step = self.step
        self.plotted_step = -1
        self.sums, self.summed, self.spikes = {}, 0, Spikes()
        self.work: Counter[str] = Counter()
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.folder)
            trim_log(self.folder / "log.jsonl", self.step)
            count = sum(parameter.numel() for parameter in self.trained)
            progress = {"parameters": count, "step": self.step, "seconds": round(self.seconds, 1)}
            write_run(self.folder / "run.json", task.settings, progress, accelerator.num_processes)
            shared = ", shared by the processes" if self.shared else ""
            logger.info(
                "%d parameters%s on %s, step %d of %d", count, shared, accelerator.device, self.step, settings.steps
            )

    def prepared(self) -> tuple[nn.Module, list[Any]]:
        """Return the loss and the optimizers as the processes share them."""
        module = LossModule(self.task)
        if not self.in_parts:
            module, *optimizers = self.accelerator.prepare(module, *self.task.optimizers())
            return module, optimizers
        size = shard_size(self.settings.shard, self.accelerator.num_processes)
        share_weights(module, self.task.blocks(), size, self.accelerator)
        return module, [self.accelerator.prepare(optimizer) for optimizer in self.task.optimizers()]

    def resume(self) -> None:
        """Take up weights, optimizers, average, step and seconds of the newest checkpoint, if there is one."""
        if (state := load_checkpoint(self.folder)) is None:
            return
        averages = self.average.shadow_params if self.average else []
        if state.get("in_parts"):
            checkpoint = self.folder / f"checkpoint-{state['step']:08d}"
            load_parts(checkpoint, self.task.model, [each.optimizer for each in self.optimizers], averages)
        else:
            self.task.load_state(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                restore_optimizer(optimizer.optimizer, saved)
            with torch.no_grad():
                for average, saved in zip(averages, state["ema"], strict=True):
                    average.copy_(like(saved, average))
        if self.average:
            self.average.optimization_step = state["step"]
        if self.accelerator.scaler and state.get("scaler"):
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]

    def train(self) -> bool:
        """Train until the last step, a limit or a stop signal; return whether the last step was reached."""
        settings = self.settings
        data = self.task.batches(self.data_rank)
        numbers = range(self.step * settings.accumulation, settings.steps * settings.accumulation)
        batches = iter(batch_loader(data, numbers, settings.workers, self.accelerator.device))
        sheet_steps = set(self.task.sheet_steps(settings.steps))
        if self.step == 0 and 0 in sheet_steps:
            with self.aside():
                self.sheet()
        with stop_signals() as stop, self.writer:
            while self.step < settings.steps and not self.must_stop(stop):
                self.optimize(batches)
                last = self.step == settings.steps
                if last or due(self.step, settings.log_every):
                    self.log()
                if self.step in sheet_steps or due(self.step, settings.sheet_every):
                    with self.aside():
                        self.sheet()
                if last or due(self.step, settings.checkpoint_every) or self.checkpoint_is_old():
                    self.save()
                if not last and due(self.step, settings.export_every):
                    with self.aside():
                        self.export_step()
            self.save()
            self.saving.result()
        finished = self.step == settings.steps
        if finished:
            self.export()
        else:
            logger.info("stopped at step %d of %d", self.step, settings.steps)
        return finished

    def optimize(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """Make one optimizer step: `accumulation` micro-batches, clipping, optimizers, average."""
        accelerator, settings = self.accelerator, self.settings
        rate = self.task.learning_rate(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                own_rate = rate * group.get("lr_factor", 1.0)  # a task may train some weights faster
                group["lr"] = torch.full_like(group["lr"], own_rate) if torch.is_tensor(group["lr"]) else own_rate
        for micro in range(settings.accumulation):
            ahead = accelerator.device.type == "cuda"  # its batches are pinned; MPS would read memory already freed
            began = time.monotonic()
            batch = send_to_device(next(batches), accelerator.device, non_blocking=ahead)
            self.waited += time.monotonic() - began
            with self.aside():  # counting, the first time of a size, is no training
                self.work.update(self.task.work_of(batch))
            index = self.step * settings.accumulation + micro
            torch.manual_seed(mix(settings.seed, *self.task.stream, self.data_rank, index))
            with accelerator.accumulate(self.wrapped), self.task.kernels():
                loss, numbers = self.wrapped(batch)
                accelerator.backward(loss * self.context)  # gradients of the context ranks add up
                numbers = {"loss": loss.detach(), **numbers}
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.trained, settings.clip)
                    numbers["gradient_norm"] = norm = norm.full_tensor() if is_shared(norm) else norm
                    self.watch(numbers["loss"], norm)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            for name, value in numbers.items():
                share = 1 if name == "gradient_norm" else 1 / settings.accumulation
                self.sums[name] = self.sums.get(name, 0) + value * share
        if self.average:
            self.average.step(self.trained)
        self.samples += self.task.samples_of(self.step, self.data_ranks)
        self.step += 1
        self.summed += 1

    def log(self) -> None:
        """Append the means since the last call to log.jsonl."""
        device, names = self.accelerator.device, [*sorted(self.sums), *sorted(self.work)]
        values = [torch.as_tensor({**self.sums, **self.work}[name], device=device).float() for name in names]
        means = dict(zip(names, self.accelerator.reduce(torch.stack(values), "mean").tolist(), strict=True))
        work = {name: means.pop(name) for name in self.work}
        line = {name: value / self.summed for name, value in means.items()}
        self.require_finite(line["loss"])
        now, settings = time.monotonic(), self.settings
        seconds = now - self.logged_at
        line["lr"] = self.task.learning_rate(self.step - 1)
        line["samples_per_second"] = self.samples / seconds
        if "tokens" in work:
            line["tokens_per_second"] = work["tokens"] * self.data_ranks / seconds
        if "seconds_at_peak" in work:  # of the processes that share samples each does a part
            line["mfu"] = work["seconds_at_peak"] / self.context / seconds
        line["data_wait"] = self.waited / seconds
        line["memory_gib"] = memory_gib(device)
        self.logged_at, self.sums, self.summed, self.waited, self.samples = now, {}, 0, 0.0, 0
        self.work.clear()
        left = (settings.steps - self.step) * (now - self.started) / (self.step - self.first_step)
        self.write(line, f"left {human_time(left)}")

    def require_finite(self, loss: float) -> None:
        """Stop before a broken model is written over a sound checkpoint.

        Raises:
            FloatingPointError: The loss is not finite.
        """
        if not math.isfinite(loss):
            hint = "precision bf16 or fp32" if self.accelerator.mixed_precision == "fp16" else "a lower lr"
            raise FloatingPointError(f"the loss is {loss} at step {self.step}; try {hint}, in another output_dir")

    def watch(self, loss: Tensor, norm: Tensor) -> None:
        """Stop before the optimizers take a step that is not finite, and name a step with an unusual gradient.

        The norm is that of all processes. Scaling for fp16 skips such steps by itself.

        Raises:
            FloatingPointError: The norm of the gradient is not finite.
        """
        if self.accelerator.scaler is not None:
            return
        norm = float(norm)
        if not math.isfinite(norm):
            what = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
            samples = self.task.describe(self.step)
            samples = f" ({samples})" if samples else ""
            raise FloatingPointError(f"{what} at step {self.step + 1}{samples}; try a lower lr, in another output_dir")
        if usual := self.spikes.usual(norm):
            samples = self.task.describe(self.step)
            logger.warning(
                "the gradient's norm is %.3g at step %d, usual is %.3g%s",
                norm,
                self.step + 1,
                usual,
                f"; it was trained on {samples}" if samples else "",
            )

    def require_sound(self) -> None:
        """Check every loss since the last line of the log, and the weights; all processes must call this.

        Raises:
            FloatingPointError: One of them is not finite, on any process.
        """
        loss = float(self.sums.get("loss", 0.0))
        local = [p.to_local() if is_shared(p) else p for p in self.trained]
        broken = not math.isfinite(loss) or not all(bool(p.isfinite().all()) for p in local)
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(broken), device=self.accelerator.device)
            broken = self.accelerator.reduce(flag, "sum").item() > 0
        if broken:
            self.require_finite(loss if not math.isfinite(loss) else math.nan)

    def write(self, numbers: dict[str, float], words: str = "") -> None:
        """Append one line about this step to log.jsonl, show it, and give it to the trackers."""
        if self.accelerator.is_main_process:
            numbers = {name: float(f"{value:.6g}") for name, value in numbers.items() if math.isfinite(value)}
            numbers["seconds"] = round(self.elapsed(), 1)
            append_log(self.folder / "log.jsonl", {"step": self.step, **numbers})
            self.accelerator.log(numbers, self.step)
            shown = {"step": self.step, **numbers}
            logger.info("  ".join([*(f"{name} {value:.5g}" for name, value in shown.items()), words]))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Do what is not training: its time does not count for the speed in the log."""
        began = time.monotonic()
        yield
        self.logged_at += time.monotonic() - began

    def sheet(self) -> None:
        """Plot the loss curve, and let the task show the averaged weights."""
        if self.accelerator.is_main_process or self.shared or self.task.all_draw or self.context > 1:
            folder = self.folder / self.task.sheet_folder
            folder.mkdir(parents=True, exist_ok=True)
            self.plot()
            if numbers := self.with_average(partial(self.task.sheet, folder / step_name(self.step), self.step)):
                self.write(numbers)

    def plot(self) -> None:
        """Plot the loss curve unless it is that of this step."""
        if self.accelerator.is_main_process and self.plotted_step != self.step:
            plot_curve(self.folder / "log.jsonl", self.folder / "loss.png")
        self.plotted_step = self.step

    def save(self) -> None:
        """Write a checkpoint unless this step has one; the one before is complete then.

        Raises:
            OSError: It, or the one before that was written in the background, could not be written.
        """
        self.saved_at = time.monotonic()
        if self.step == self.saved_step:
            return
        self.require_sound()
        self.saving.result()
        self.saved_step, background = self.step, self.settings.save_in_background
        averages, temporary, parts = self.average.shadow_params if self.average else [], None, None
        if self.in_parts:
            temporary = unfinished(self.folder, broadcast_object_list([uuid.uuid4().hex])[0])
            optimizers = [each.optimizer for each in self.optimizers]
            parts = save_parts(temporary, self.task.model, optimizers, averages, self.group)
            state: dict[str, Any] = {"in_parts": True}
        else:
            optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
            state = {"model": self.task.state(), "optimizers": optimizers, "ema": averages}
        state |= {
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
            "step": self.step,
            "seconds": self.elapsed(),
            **self.task.notes(),
        }
        if background or (self.shared and not self.in_parts):
            state = gathered(state, copy=background and self.accelerator.is_main_process)
        write = partial(self.write_checkpoint, state, temporary, parts)
        if background:
            self.saving = self.writer.submit(write)
        else:
            write()
            self.accelerator.wait_for_everyone()

    def write_checkpoint(self, state: dict[str, Any], temporary: Path | None, parts: Callable | None) -> None:
        """Write a checkpoint, whose parts are complete when `parts` returns."""
        if parts:
            parts()
        if self.accelerator.is_main_process:
            save_checkpoint(self.folder, state["step"], state, self.settings.keep, temporary)
            progress = {"step": state["step"], "seconds": round(state["seconds"], 1)}
            update_run(self.folder / "run.json", progress)

    def export(self) -> None:
        """Let the task write its result from the averaged weights."""
        folder = self.settings.export_folder
        self.plot()
        if self.accelerator.is_main_process:
            logger.info("exporting step %d to %s", self.step, folder)
        self.let_write(partial(self.task.export, folder))

    def export_step(self) -> None:
        """Let the task write what the averaged weights of a step on the way give."""
        self.let_write(partial(self.task.export_step, self.folder / EXPORTS / step_name(self.step), self.step))

    def let_write(self, write: Callable[[], None]) -> None:
        """Call `write`, which exports the averaged weights, on the processes that it needs."""
        if self.accelerator.is_main_process or self.shared:
            self.with_average(write)
        self.accelerator.wait_for_everyone()

    def with_average(self, use: Callable[[], Any]) -> Any:
        """Call `use` with the averaged weights in the model, in eval mode, without gradients."""
        kept = [each.detach().clone() for each in self.trained] if self.schedule_free else []
        for optimizer in self.schedule_free:
            optimizer.eval()
        if self.average:
            self.average.store(self.trained)
            self.average.copy_to(self.trained)
        self.task.model.eval()
        with torch.no_grad():
            result = self.wrapped.within(use) if self.shared else use()
        self.task.model.train()
        if self.average:
            self.average.restore(self.trained)
        for optimizer in self.schedule_free:
            optimizer.train()
        with torch.no_grad():
            for weight, value in zip(self.trained, kept, strict=False):
                weight.copy_(value)  # without the rounding of `eval` and `train`
        return result

    def must_stop(self, stop: dict[str, bool]) -> bool:
        """Return whether a signal came or a limit of this call was reached, on any process."""
        settings = self.settings
        over = stop["now"] or 0 < settings.stop_after <= self.step - self.first_step
        over = over or 0 < settings.max_minutes * 60 <= time.monotonic() - self.started
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(over), device=self.accelerator.device)
            over = self.accelerator.reduce(flag, "sum").item() > 0
        return over

    def checkpoint_is_old(self) -> bool:
        """Return whether `checkpoint_minutes` have passed since the last one."""
        return 0 < self.settings.checkpoint_minutes <= (time.monotonic() - self.saved_at) / 60

    def elapsed(self) -> float:
        """Return the seconds trained, earlier calls included."""
        return self.seconds + time.monotonic() - self.started


def restore_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Take up the state of an optimizer; the rates, averages and decays of the present settings stay."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in saved["state"].items():
        values.update({n: like(v, parameters[index]) for n, v in values.items() if getattr(v, "ndim", 0)})
    kept = [{n: group[n] for n in ("lr", "betas", "weight_decay") if n in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, options in zip(optimizer.param_groups, kept, strict=True):
        group.update(options)


def due(step: int, every: int) -> bool:
    """Return whether something done every `every` steps (0 = never) is due."""
    return every > 0 and step % every == 0
