"""Train a LoRA for PT-DiT.

    accelerate launch -m lora.train --config lora/configs/24gb.yaml --data DIR --output-dir runs/mine
    accelerate launch -m lora.train --config lora/configs/24gb.yaml --data DIR --output-dir runs/mine --resume

A resumed run equals an uninterrupted one: batches and noise are functions of (seed, number of the batch), and the
checkpoint holds adapter, optimiser, schedule, average and step.
"""

import dataclasses
import logging
import math
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from lora.adapter import add_adapter, check_targets, folded_weights, trained_parameters, whole
from lora.base import BaseModel, choose_dtype, free_memory
from lora.batches import Batches, describe_epoch
from lora.config import Settings, check_packages, make_parser, read_settings, refuse_other_settings
from lora.export import base_layer_weights, check_push, export, push
from lora.objective import FlowLoss
from lora.optimisers import make_optimizer
from lora.precompute import fill_cache
from lora.records import Trackers, human_time, memory_gib
from lora.validate import draw_sheet, draw_validation, quarter_steps, save_validation
from ptdit_diffusers.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from ptdit_diffusers.training.parts import attention_kernels, batch_loader, check_processes, due, stop_signals
from ptdit_diffusers.training.record import append_log, draw_curve, trim_log, write_run
from ptdit_diffusers.training.stage import mix

logger = logging.getLogger("lora")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for bad input)."""
    parser = make_parser(__doc__.splitlines()[0])
    flags = parser.parse_args(arguments)
    try:
        settings = read_settings(flags)
        named = {"fp16": "fp16", "bf16": "bf16", "fp32": "no", "auto": None}[settings.precision]
        accelerator = Accelerator(
            mixed_precision=named,
            gradient_accumulation_steps=settings.accumulation,
        )
        check_processes(accelerator)
        level = logging.INFO if accelerator.is_main_process else logging.ERROR
        logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
        base = BaseModel(settings.base)
        saved = check_before_training(settings, base, accelerator)
        cache = fill_cache(settings, base, accelerator)
        run = Run(settings, base, cache, accelerator, saved)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"lora: {error}\n")
        return 2
    try:
        finished = run.train()
    except (OSError, FloatingPointError) as error:
        kept = checkpoints(run.folder)
        last = f"go on from {kept[-1].name} with --resume" if kept else "no checkpoint was written yet"
        sys.stderr.write(f"lora: stopped at step {run.step}: {error}; {last}.\n")
        return 1
    if finished and settings.push_to_hub and accelerator.is_main_process:
        try:
            logger.info("uploaded to %s", push(run.folder / "lora", settings.push_to_hub))
        except OSError as error:
            sys.stderr.write(f"lora: {run.folder / 'lora'} is finished, but not uploaded: {error}\n")
            return 1
    accelerator.end_training()
    return 0


def check_before_training(settings: Settings, base: BaseModel, accelerator: Accelerator) -> dict[str, Any] | None:
    """Everything that can be refused before long work; returns the newest checkpoint.

    Raises:
        ValueError: An unknown target, a used output folder, a checkpoint of other settings, too little disk space.
    """
    check_targets(base.transformer_config, settings.targets)
    choose_dtype(settings.precision, accelerator.device)
    check_packages(settings)
    if settings.push_to_hub and accelerator.is_main_process:
        check_push(settings.push_to_hub)
    folder = Path(settings.output_dir)
    if not settings.resume and (checkpoints(folder) or (folder / "lora").exists()):
        raise ValueError(f"output_dir {folder} holds an earlier run; go on with --resume, or give another folder.")
    if settings.prior_prompts and not Path(settings.prior_prompts).is_file():
        raise ValueError(f"prior_prompts {settings.prior_prompts!r} is no file; give one with a prompt per line.")
    existing = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    if existing.is_file():
        raise ValueError(f"output_dir {folder} cannot be made: {existing} is a file.")
    free = shutil.disk_usage(existing).free
    if free < 100 * 2**20:
        raise ValueError(f"the disk of output_dir {folder} has {free / 2**20:.0f} MiB free; at least 100 are needed.")
    saved = load_checkpoint(folder)
    if saved is not None:
        refuse_other_settings(saved["settings"], settings)
        if saved["processes"] != accelerator.num_processes:
            raise ValueError(
                f"the checkpoint was made by {saved['processes']} processes, these are {accelerator.num_processes}; "
                "the batches would differ. Launch as many as before."
            )
    return saved


class Run:
    """Model, adapter, optimiser and step of one run, and what the loop does with them."""

    def __init__(
        self, settings: Settings, base: BaseModel, cache: Any, accelerator: Accelerator, saved: dict[str, Any] | None
    ) -> None:
        """Load the transformer, add the adapter, and take up the checkpoint, if any."""
        self.settings, self.base, self.cache, self.accelerator = settings, base, cache, accelerator
        self.folder = Path(settings.output_dir)
        self.device = accelerator.device
        dtype = choose_dtype(settings.precision, self.device)
        logger.info("%s on %s, base weights kept in %s", dtype, self.device, settings.base_weights)
        self.transformer = base.load_transformer(dtype, settings.base_weights, self.device)
        self.first = add_adapter(self.transformer, settings)
        self.transformer.set_windows(proxy_mode=settings.proxy_mode)
        if settings.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.transformer.train()
        if settings.compile:
            self.transformer.compile_repeated_blocks()
        self.batches = Batches(cache, settings, accelerator.process_index, accelerator.num_processes)
        per_epoch = math.ceil(self.batches.plan.per_epoch / settings.accumulation)
        self.max_steps = settings.epochs * per_epoch or settings.max_steps
        logger.info("%s; %d steps", describe_epoch(self.batches, settings), self.max_steps)

        optimizer = make_optimizer(list(trained_parameters(self.transformer).values()), settings)
        self.loss, self.optimizer = accelerator.prepare(FlowLoss(self.transformer, dtype), optimizer)
        self.transformer = accelerator.unwrap_model(self.loss).transformer
        self.parameters = trained_parameters(self.transformer)
        self.sharded = any(hasattr(parameter, "full_tensor") for parameter in self.parameters.values())  # FSDP2
        if self.sharded:
            register_fsdp_forward_method(self.loss, "within")
        counts = {"num_warmup_steps": settings.warmup, "num_training_steps": self.max_steps}
        self.schedule = get_scheduler(settings.schedule, self.optimizer.optimizer, **counts)
        self.average = EMAModel(self.parameters.values(), decay=settings.ema) if settings.ema else None
        self.step, self.seconds = 0, 0.0
        if saved is not None:
            self.resume(saved)
        self.started = self.logged_at = time.monotonic()
        self.first_step = self.saved_step = self.step
        self.sums, self.summed = torch.zeros((), device=self.device), 0
        self.trackers = Trackers(settings, self.folder, accelerator)
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            trim_log(self.folder / "log.jsonl", self.step)
            count = sum(parameter.numel() for parameter in self.parameters.values())
            write_run(
                self.folder / "run.json", settings, {"parameters": count, "step": self.step}, accelerator.num_processes
            )
            shared = ", shared by the processes" if self.sharded else ""
            logger.info("%d values in %d matrices%s, from step %d", count, len(self.parameters), shared, self.step)

    def train(self) -> bool:
        """The loop; returns whether the last step was reached."""
        settings, last = self.settings, self.max_steps
        marks = quarter_steps(last) if settings.validation_prompts else []
        numbers = range(self.step * settings.accumulation, last * settings.accumulation)
        batches = iter(batch_loader(self.batches, numbers, settings.workers, self.device))
        if self.step == 0:
            self.validate(marks)
        with stop_signals() as stop:
            while self.step < last and not self.must_stop(stop):
                self.optimise(batches)
                if self.step == last or self.step % settings.log_every == 0:
                    self.log()
                if self.step in marks or due(self.step, settings.validation_every):
                    self.validate(marks)
                if due(self.step, settings.checkpoint_every):
                    self.save()
        self.save()
        if self.step == last:
            self.finish(marks)
        else:
            logger.info("stopped at step %d of %d; go on with --resume", self.step, last)
        self.trackers.close()
        return self.step == last

    def optimise(self, batches: Any) -> None:
        """One optimiser step: `accumulation` forwards and backwards, clipping, optimiser, schedule, average."""
        accelerator, settings = self.accelerator, self.settings
        for micro in range(settings.accumulation):
            batch = send_to_device(next(batches), self.device, non_blocking=True)
            number = self.step * settings.accumulation + micro
            torch.manual_seed(mix(settings.seed, 4, accelerator.process_index, number))  # dropout
            with accelerator.accumulate(self.loss), attention_kernels(self.device):
                loss = self.loss(batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(list(self.parameters.values()), settings.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.sums += loss.detach() / settings.accumulation
        self.schedule.step()
        if self.average:
            self.average.step(self.parameters.values())
        self.step += 1
        self.summed += 1

    def log(self) -> None:
        """Append loss, learning rate, speed, memory and time left to log.jsonl.

        Raises:
            FloatingPointError: The loss is not finite.
        """
        settings = self.settings
        loss = self.accelerator.reduce(self.sums / self.summed, "mean").item()
        if not math.isfinite(loss):
            hint = "precision bf16 or fp32" if settings.precision == "fp16" else "a lower lr"
            raise FloatingPointError(f"the loss is {loss}; try {hint}")
        now = time.monotonic()
        samples = self.summed * settings.accumulation * settings.batch_size * self.accelerator.num_processes
        left = (self.max_steps - self.step) * (now - self.started) / (self.step - self.first_step)
        line = {
            "step": self.step,
            "loss": round(loss, 6),
            "lr": self.schedule.get_last_lr()[0],
            "samples_per_second": round(samples / (now - self.logged_at), 3),
            "memory_gib": memory_gib(self.device),
            "seconds": round(self.elapsed(), 1),
        }
        self.logged_at, self.sums, self.summed = now, torch.zeros_like(self.sums), 0
        if self.accelerator.is_main_process:
            append_log(self.folder / "log.jsonl", line)
            self.trackers.log({name: value for name, value in line.items() if name != "step"}, self.step)
            words = "  ".join(f"{name} {value:.5g}" for name, value in line.items())
            logger.info("%s  left %s", words, human_time(left))

    def weights(self) -> dict[str, Tensor]:
        """The adapter with its scale folded in, from the average where there is one. Every process must call this."""
        values = self.average.shadow_params if self.average else self.parameters.values()
        parameters = {name: whole(value).float() for name, value in zip(self.parameters, values, strict=True)}
        return folded_weights(self.transformer, parameters, self.first)

    def validate(self, marks: list[int]) -> None:
        """Draw the validation prompts with the present weights."""
        if not self.settings.validation_prompts or not (self.accelerator.is_main_process or self.sharded):
            return
        if self.average:
            self.average.store(self.parameters.values())
            self.average.copy_to(self.parameters.values())
        draw = partial(draw_validation, self.transformer, self.base, self.cache, self.settings, self.device)
        pictures = self.loss.within(draw) if self.sharded else draw()
        if self.average:
            self.average.restore(self.parameters.values())
        if self.accelerator.is_main_process:
            folder = self.folder / "validation"
            save_validation(pictures, folder, self.step, self.settings)
            draw_sheet(folder, self.folder / "sheet.png", [mark for mark in marks if mark <= self.step], self.settings)
            self.trackers.pictures(pictures, self.step)
        self.logged_at = time.monotonic()  # the pictures' time is not the training's

    def save(self) -> None:
        """Write a checkpoint unless this step has one."""
        if self.step == self.saved_step:
            return
        state = {
            "adapter": {name: whole(parameter) for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer_state(),
            "schedule": self.schedule.state_dict(),
            "average": [whole(value) for value in self.average.shadow_params] if self.average else [],
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
            "step": self.step,
            "seconds": self.elapsed(),
            "settings": dataclasses.asdict(self.settings),
            "processes": self.accelerator.num_processes,
        }
        if self.accelerator.is_main_process:
            try:
                save_checkpoint(self.folder, self.step, state, self.settings.keep)
            except RuntimeError as error:  # what torch.save makes of a write that failed
                shutil.rmtree(self.folder / "unfinished-checkpoint", ignore_errors=True)
                reason = error.__context__ or error
                raise OSError(f"the checkpoint could not be written ({reason})") from error
        self.saved_step = self.step
        self.accelerator.wait_for_everyone()

    def optimizer_state(self) -> dict[str, Any]:
        """State of the optimiser, gathered where processes share it."""
        state = self.optimizer.optimizer.state_dict()  # its tensors are the optimiser's own
        state["state"] = {
            index: {name: whole(v) if hasattr(v, "full_tensor") else v for name, v in values.items()}
            for index, values in state["state"].items()
        }
        return state

    def resume(self, saved: dict[str, Any]) -> None:
        """Take up adapter, optimiser, schedule, average, scaler and step of a checkpoint."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(like(saved["adapter"][name], parameter))
            for value, average in zip(
                saved["average"], self.average.shadow_params if self.average else [], strict=True
            ):
                average.copy_(like(value, average))
        for index, values in saved["optimizer"]["state"].items():
            parameter = list(self.parameters.values())[index]
            values.update({n: like(v, parameter) for n, v in values.items() if getattr(v, "ndim", 0)})
        self.optimizer.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        if self.accelerator.scaler and saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        if self.average:
            self.average.optimization_step = saved["step"]
        self.step, self.seconds = saved["step"], saved["seconds"]

    def finish(self, marks: list[int]) -> None:
        """Write the finished LoRA, the loss curve and the sheet."""
        weights = self.weights()
        base_weights = base_layer_weights(self.transformer, weights)
        if self.accelerator.is_main_process:
            draw_curve(self.folder / "log.jsonl", self.folder / "loss.png")
            draw_sheet(self.folder / "validation", self.folder / "sheet.png", marks, self.settings)
            logger.info("saved %s", export(self.folder, weights, self.settings, self.step, base_weights))
        self.accelerator.wait_for_everyone()
        free_memory()

    def must_stop(self, stop: dict[str, bool]) -> bool:
        """Whether a signal came, the minutes are over or the steps of this call done, on any process."""
        settings = self.settings
        over = stop["now"] or 0 < settings.stop_after <= self.step - self.first_step
        over = over or 0 < settings.max_minutes * 60 <= time.monotonic() - self.started
        if self.accelerator.num_processes > 1:
            over = self.accelerator.reduce(torch.tensor(float(over), device=self.device), "sum").item() > 0
        return over

    def elapsed(self) -> float:
        """Seconds trained, earlier calls included."""
        return self.seconds + time.monotonic() - self.started


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A saved tensor in the form of a parameter that processes may share (FSDP2)."""
    if not hasattr(parameter, "full_tensor") or value.shape != parameter.shape:
        return value.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


if __name__ == "__main__":
    raise SystemExit(main())
