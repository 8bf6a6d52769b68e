"""Train a LoRA for PT-DiT.

    accelerate launch -m lora.train --config 24gb --data DIR --output-dir runs/mine
    accelerate launch -m lora.train --config 24gb --data DIR --output-dir runs/mine --resume

In an installed package the module is `ptdit_diffusers.lora.train`, and `ptdit lora` is short for the launch. A resumed
run equals an uninterrupted one.
"""

import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from diffusers.training_utils import free_memory

from ptdit_diffusers.training.checkpoint import checkpoints, load_checkpoint
from ptdit_diffusers.training.processes import check_processes
from ptdit_diffusers.training.run import Run
from ptdit_diffusers.training.trackers import begin_tracking

from .adapter import check_targets
from .base import BaseModel, check_device
from .config import LoRASettings, check_packages, make_parser, read_settings, refuse_other_settings
from .export import check_push, push
from .precompute import fill_cache
from .task import LoRATask

logger = logging.getLogger("lora")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (2 for bad input)."""
    flags = make_parser(__doc__.splitlines()[0]).parse_args(arguments)
    try:
        settings = read_settings(flags)
        check_packages(settings)
        folder = Path(settings.output_dir)
        accelerator = Accelerator(
            mixed_precision={"fp16": "fp16", "bf16": "bf16", "fp32": "no", "auto": None}[settings.precision],
            gradient_accumulation_steps=settings.accumulation,
            log_with=None if settings.report_to == "none" else settings.report_to,
            project_dir=folder,
        )
        check_processes(accelerator)
        level = logging.INFO if accelerator.is_main_process else logging.ERROR
        logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
        base = BaseModel(settings.base)
        check_before_training(settings, base, accelerator)
        task = LoRATask(settings, base, fill_cache(settings, base, accelerator), accelerator)
        run = Run(task, settings.loop_settings(task.steps), accelerator)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"lora: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("lora: interrupted before the first step; what was encoded stays in the cache\n")
        return 130
    begin_tracking(accelerator, folder)
    try:
        finished = run.train()
    except (OSError, FloatingPointError) as error:
        kept = checkpoints(folder)
        last = f"go on from {kept[-1].name} with --resume" if kept else "no checkpoint was written yet"
        sys.stderr.write(f"lora: stopped at step {run.step}: {error}; {last}.\n")
        return 1
    accelerator.end_training()
    if not finished:
        logger.info("go on with --resume")
    free_memory()
    if finished and settings.push_to_hub and accelerator.is_main_process:
        try:
            logger.info("uploaded to %s", push(folder / "lora", settings.push_to_hub))
        except OSError as error:
            sys.stderr.write(f"lora: {folder / 'lora'} is finished, but not uploaded: {error}\n")
            return 1
    return 0


def check_before_training(settings: LoRASettings, base: BaseModel, accelerator: Accelerator) -> None:
    """Check everything that can be refused before long work.

    Raises:
        ValueError: An unknown target, a used output folder, a checkpoint of other settings, too little disk space.
    """
    check_targets(base.transformer_config, settings.targets)
    check_device(settings, accelerator.device)
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


if __name__ == "__main__":
    raise SystemExit(main())
