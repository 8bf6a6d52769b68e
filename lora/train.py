"""Train a LoRA for PT-DiT.

    accelerate launch -m lora.train --config 24gb --data DIR --output-dir runs/mine
    accelerate launch -m lora.train --config 24gb --data DIR --output-dir runs/mine --resume

In an installed package the module is `ptdit_diffusers.lora.train`, and `ptdit lora` is short for the launch. A resumed
run equals an uninterrupted one.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers.training_utils import free_memory
from safetensors import SafetensorError

from ptdit_diffusers.core.messages import log_to_terminal
from ptdit_diffusers.training.base_model import BaseModel
from ptdit_diffusers.training.checkpoint import checkpoints, load_checkpoint
from ptdit_diffusers.training.command import complain, exit_code
from ptdit_diffusers.training.context import check_context
from ptdit_diffusers.training.data.space import require_space
from ptdit_diffusers.training.processes import (
    check_processes,
    lock_folder,
    main_process_checks,
)
from ptdit_diffusers.training.run import Run
from ptdit_diffusers.training.trackers import begin_tracking

from .adapter import adapter_values
from .cache import Cache
from .command_line import check_packages, make_parser, read_settings, refuse_other_settings
from .config import LoRASettings, TrainingSettings
from .export import MODEL_FILE, check_push, push
from .precompute import RUN_SAMPLES, data_settings, fill_cache, run_sizes
from .requirements import check_device, run_bytes
from .samples import write_samples
from .task import LoRATask
from .text_encoder import checked_text_encoder
from .validate import check_prompts

logger = logging.getLogger("lora")

RESULTS = ("lora", f"model/{MODEL_FILE}")  # of an adapter; of a student of all weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 2 for bad input, 1 for a run that failed, 130 for Ctrl-C."""
    return exit_code(lambda: train(settings_of(arguments)), "lora")


def settings_of(arguments: Sequence[str] | None) -> LoRASettings:
    """Return the settings of a command line.

    Raises:
        ValueError, OSError: A setting is not right, or its package is missing.
    """
    settings = read_settings(make_parser(__doc__.splitlines()[0]).parse_args(arguments))
    check_packages(settings)
    return settings


def train(settings: LoRASettings) -> int:
    """Encode the data, train, and write the LoRA; return the exit code.

    Raises:
        ValueError, OSError: Something is not right; training has not begun.
    """
    folder = Path(settings.output_dir)
    accelerator = Accelerator(
        mixed_precision={"fp16": "fp16", "bf16": "bf16", "fp32": "no", "auto": None}[settings.precision],
        gradient_accumulation_steps=settings.accumulation,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_dir=folder,
    )
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    log_to_terminal(level)
    check_processes(accelerator)
    base = BaseModel(settings.base)
    settings, global_batch = check_before_training(settings, base, accelerator)
    with ExitStack() as held:

        def take_folder() -> None:
            held.callback(lock_folder(folder, "output_dir").release)
            refuse_used(settings)  # once more: another run may have ended since

        main_process_checks(accelerator, take_folder)
        cache = fill_cache(settings, base, accelerator)
        main_process_checks(accelerator, lambda: note_samples(settings, base, cache))
        task = LoRATask(settings, base, cache, accelerator, global_batch)
        run = Run(task, settings.loop_settings(task.steps), accelerator)
        begin_tracking(accelerator, folder)
        return finish(settings, run, accelerator)


def note_samples(settings: LoRASettings, base: BaseModel, cache: Cache) -> None:
    """Write down which samples the run has, for its resume."""
    write_samples(Path(settings.output_dir) / RUN_SAMPLES, cache.samples, data_settings(settings, base))


def finish(settings: TrainingSettings, run: Run, accelerator: Accelerator) -> int:
    """Train to the end or to a stop, and upload what was asked for; return the exit code."""
    folder = Path(settings.output_dir)
    try:
        finished = run.train()
    except (OSError, SafetensorError, FloatingPointError) as error:
        kept = checkpoints(folder)
        last = f"go on from {kept[-1].name} with --resume" if kept else "no checkpoint was written yet"
        if isinstance(error, FloatingPointError) and kept:
            last = f"the last sound checkpoint is {kept[-1].name}"
        complain(
            f"stopped at step {run.step}: {(str(error).strip() or type(error).__name__).splitlines()[-1]}; {last}.",
            settings.program,
        )
        return 1
    accelerator.end_training()
    if not finished:
        logger.info("go on with --resume")
    free_memory()
    if finished and settings.push_to_hub and accelerator.is_main_process:
        try:
            logger.info("uploaded to %s", push(folder / "lora", settings.push_to_hub))
        except OSError as error:
            complain(f"{folder / 'lora'} is finished, but not uploaded: {error}", settings.program)
            return 1
    return 0


def check_before_training(
    settings: LoRASettings, base: BaseModel, accelerator: Accelerator
) -> tuple[LoRASettings, int]:
    """Check everything that can be refused before long work.

    Returns:
        The settings, in a resumed run with the `start` with which it began, and the samples of a batch of all
        processes.

    Raises:
        ValueError: An unknown target, a used output folder, a checkpoint of other settings.
        OSError: There is too little disk space.
    """
    sets = settings.data_sets()
    for each in sets:
        run_sizes(each, base)
    check_prompts(settings, base)
    token = 8 * base.transformer_config["patch_size"]  # pixels; the longer side of a bucket is at least `resolution`
    smallest = min(each.resolution or base.own_resolution for each in sets)
    check_context(settings.context_parallel, accelerator.num_processes, smallest // token)
    text_encoder = checked_text_encoder(base, accelerator) if settings.train_text_encoder else None
    values = adapter_values(base.transformer_config, settings, text_encoder)
    check_device(settings, accelerator.device)
    if settings.push_to_hub and accelerator.is_main_process:
        check_push(settings.push_to_hub)
    refuse_used(settings)
    if settings.prior_prompts and not Path(settings.prior_prompts).is_file():
        raise ValueError(f"prior_prompts {settings.prior_prompts!r} is no file; give one with a prompt per line.")
    folder = Path(settings.output_dir)
    if any(each.data and Path(each.data).is_dir() and Path(each.data).resolve() == folder.resolve() for each in sets):
        raise ValueError(f"output_dir {folder} is the folder of the data; give another one, it may lie in it.")
    doubled = settings.init in ("pissa", "olora")
    results = 1 + (settings.max_steps // settings.export_every if settings.export_every else 0)
    require_space("output_dir", folder, run_bytes(values, settings.keep, settings.ema > 0, doubled, results))
    saved = load_checkpoint(folder) if settings.resume else None
    data_ranks = accelerator.num_processes // settings.context_parallel
    if saved is None:
        return settings, settings.batch_size * data_ranks
    refuse_other_settings(saved["settings"], settings)
    refuse_other_base(saved, settings, base)
    global_batch = kept_batch(saved, settings.batch_size, data_ranks, settings.context_parallel)
    return replace(settings, start=saved["settings"].get("start", "")), global_batch


def kept_batch(saved: dict[str, Any], batch_size: int, data_ranks: int, context: int = 1) -> int:
    """Return the samples of a batch with which a run began, for any number of processes that go on with it.

    Args:
        saved: The checkpoint.
        batch_size: Samples per process, of the settings.
        data_ranks: Groups of processes now, each of which has samples of its own.
        context: Processes of a group.

    Raises:
        ValueError: There are fewer samples than processes.
    """
    batch = saved.get("global_batch", batch_size * (saved["processes"] // context))
    if data_ranks > batch:
        raise ValueError(
            f"{data_ranks} processes cannot share the {batch} samples of a batch with which this run began; nearest: "
            f"--num-processes {batch * context}."
        )
    if batch != batch_size * data_ranks:
        logger.info(
            "the run began with batches of %d samples, and keeps them: %d processes share them", batch, data_ranks
        )
    return batch


def refuse_used(settings: TrainingSettings) -> None:
    """Raise ValueError where the output folder holds a run that this one does not go on with."""
    folder = Path(settings.output_dir)
    if not settings.resume and (checkpoints(folder) or any((folder / name).exists() for name in RESULTS)):
        raise ValueError(f"output_dir {folder} holds an earlier run; go on with --resume, or give another folder.")


def refuse_other_base(saved: dict[str, object], settings: TrainingSettings, base: BaseModel) -> None:
    """Raise ValueError where a checkpoint was trained on other base weights, unless that is accepted."""
    earlier = str(saved["settings"]["base"])
    if saved.get("transformer", "") == base.fingerprint("transformer", "scheduler") or settings.accept_changes:
        return
    if "transformer" in saved or earlier != settings.base:
        same = f" (the folder {earlier!r} holds others now)" if earlier == settings.base else f", those of {earlier!r}"
        raise ValueError(
            f"the checkpoint was trained on other base weights than those of {settings.base!r}{same}. Put them back, "
            "go on all the same with --accept-changes, or start anew in another output_dir."
        )


if __name__ == "__main__":
    raise SystemExit(main())
