"""Distill a PT-DiT into a student of few steps without guidance.

    python -m lora.distill --config 24gb --base MODEL --prompts FILE --steps 4 --output-dir runs/mine-4steps
    python -m lora.distill --config 24gb --base MODEL --prompts FILE --steps 4 --output-dir runs/mine-4steps --resume

First the teacher makes its own guided paths from noise, which are kept (`--stage paths` ends there); then the student
learns the segments of these paths; `--stage tdm` goes on with a student from its own states. In an installed package
the module is `ptdit_diffusers.lora.distill`, and `ptdit distill` is short for it. Calling it again goes on with the
paths; with `--resume` it also goes on with the student, as if that had not stopped.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from accelerate import Accelerator

from ptdit_diffusers.core.embedded import embedded_model_names
from ptdit_diffusers.core.messages import log_to_terminal
from ptdit_diffusers.training.base_model import BaseModel, choose_dtype
from ptdit_diffusers.training.checkpoint import load_checkpoint
from ptdit_diffusers.training.command import exit_code
from ptdit_diffusers.training.data.space import require_space
from ptdit_diffusers.training.processes import (
    check_processes,
    lock_folder,
    main_process_checks,
    main_process_does,
)
from ptdit_diffusers.training.run import Run
from ptdit_diffusers.training.trackers import begin_tracking

from .adapter import adapter_values
from .command_line import check_packages, make_parser, read_settings, refuse_other_settings
from .distill_config import DistillSettings
from .distill_task import SegmentTask, check_start
from .export import MODEL_FILE, check_push
from .paths import Paths, check_grid, make_missing
from .requirements import check_device, run_bytes
from .tdm import TDMTask
from .train import finish, kept_batch, refuse_other_base, refuse_used
from .validate import check_prompts, read_prompts

logger = logging.getLogger("lora")

TASKS = {"segments": SegmentTask, "tdm": TDMTask}
Prompts = Callable[[DistillSettings], list[str]]  # raises ValueError for what must not be trained on


def main(arguments: Sequence[str] | None = None, prompts_of: Prompts | None = None) -> int:
    """Run the command line; return the exit code: 2 for bad input, 1 for a run that failed, 130 for Ctrl-C.

    Args:
        arguments: Of the command line; None takes those of the shell.
        prompts_of: Returns the captions of a run; None reads the file that `prompts` names.
    """

    def work() -> int:
        settings = read_settings(make_parser(__doc__.splitlines()[0], DistillSettings).parse_args(arguments),
                                 DistillSettings)  # fmt: skip
        check_packages(settings)
        return distill(settings, prompts_of or prompts_in_file)

    return exit_code(work, DistillSettings.program)


def prompts_in_file(settings: DistillSettings, checked: bool = False) -> list[str]:
    """Return the captions in the file `prompts`.

    Args:
        settings: Of the run.
        checked: Whether the caller looks for held-out combinations; else a warning says that nobody does.

    Raises:
        ValueError: There is no such file, or it holds no captions.
    """
    if not Path(settings.prompts).is_file():
        raise ValueError(
            f"prompts {settings.prompts!r} is no file; give one with a caption per line. `python -m scripts.distill`, "
            "in a clone of the repository, also takes the name of a synthetic data set."
        )
    if settings.base in embedded_model_names() and not checked:
        logger.warning(
            "combinations that are held out from the training of %s are not looked for in %s; `python -m "
            "scripts.distill` does",
            settings.base,
            settings.prompts,
        )
    return read_prompts(settings.prompts, "prompts")


def distill(settings: DistillSettings, prompts_of: Prompts) -> int:
    """Make the paths that lack, train the student, and write it; return the exit code.

    Raises:
        ValueError, OSError: Something is not right; nothing long has begun.
    """
    accelerator = Accelerator(
        mixed_precision={"fp16": "fp16", "bf16": "bf16", "fp32": "no", "auto": None}[settings.precision],
        gradient_accumulation_steps=settings.accumulation,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_dir=settings.output_dir,
    )
    log_to_terminal(logging.INFO if accelerator.is_main_process else logging.ERROR)
    check_processes(accelerator)
    base = BaseModel(settings.base)
    check_before_distilling(settings, base, accelerator)
    paths = Paths(base, settings, prompts_of(settings))
    missing = paths.missing()
    global_batch = refuse_other_run(settings, base, paths, accelerator) if settings.stage in TASKS else 0
    with ExitStack() as held:
        folder = Path(settings.output_dir)
        main_process_checks(accelerator, lambda: held.callback(lock_folder(folder, "output_dir").release))
        if not make_paths(settings, paths, missing, accelerator):
            logger.info("the paths are not complete; call this again to go on")
            return 0
        if settings.stage == "paths":
            return 0
        task = TASKS[settings.stage](settings, base, paths, accelerator, global_batch)
        run = Run(task, settings.loop_settings(settings.max_steps), accelerator)
        begin_tracking(accelerator, folder)
        return finish(settings, run, accelerator)


def make_paths(settings: DistillSettings, paths: Paths, missing: list[range], accelerator: Accelerator) -> bool:
    """Encode the captions and make the paths that lack, each process its share; return whether all are there."""
    texts = dict.fromkeys([*settings.shown_texts, *paths.captions], "")

    def encode() -> None:
        paths.cache.add_captions(texts, accelerator.device)

    main_process_does(accelerator, paths.folder, encode)
    paths.cache = type(paths.cache)(paths.cache.folder, paths.base)
    if missing:
        logger.info("%d of %d paths are to be made", sum(map(len, missing)), settings.paths)
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        dtype = choose_dtype(settings.precision, accelerator.device)
        make_missing(paths, settings, mine, dtype, accelerator.device)
        accelerator.wait_for_everyone()
    return not paths.missing()


def check_before_distilling(settings: DistillSettings, base: BaseModel, accelerator: Accelerator) -> None:
    """Check what can be refused without looking at paths.

    Raises:
        ValueError: The base or a setting does not fit.
        OSError: There is too little disk space.
    """
    config = base.transformer_config
    if (base.folder / MODEL_FILE).is_file():
        raise ValueError(f"base {base.name!r} is distilled itself and has no guidance; give the model it was made of.")
    if config.get("round_timestep", False):
        raise ValueError(
            f"base {base.name!r} has round_timestep: true, which moves the times of few steps; nearest: false, in "
            "transformer/config.json."
        )
    if config.get("proxy_mode", "mean") == "random":
        raise ValueError(
            f"base {base.name!r} has proxy_mode: random, with which its paths are no function of the noise; nearest: "
            "mean, in transformer/config.json."
        )
    if base.scheduler.config.stochastic_sampling:
        raise ValueError(f"base {base.name!r} has a scheduler with stochastic_sampling, which has no paths.")
    side = settings.resolution or base.own_resolution
    token = 8 * config["patch_size"]
    if side % token:
        low = max(token, side // token * token)
        raise ValueError(f"resolution={side} is not a multiple of {token}; nearest: {low} or {low + token}.")
    check_prompts(settings, base)
    check_grid(base, settings, side)
    check_device(settings, accelerator.device)
    frames = (settings.num_frames - 1) // 4 + 1
    state = config["in_channels"] * frames * (side // 8) ** 2 * 2
    require_space("paths_dir", settings.paths_folder, settings.paths * (settings.points + 1) * state)
    if settings.push_to_hub and settings.rank == 0:
        raise ValueError("push_to_hub uploads an adapter, which rank=0 does not make; nearest: rank=64.")
    if settings.push_to_hub and accelerator.is_main_process:
        check_push(settings.push_to_hub)


def refuse_other_run(settings: DistillSettings, base: BaseModel, paths: Paths, accelerator: Accelerator) -> int:
    """Check the folder of the run, and its checkpoint where it is resumed; return the samples of a batch.

    Raises:
        ValueError: An unknown target, a used output folder, a checkpoint of other settings, weights or paths, or
            fewer samples than processes.
        OSError: There is too little disk space.
    """
    if settings.rank:
        check_start(settings)
    values = adapter_values(base.transformer_config, settings.adapter()) if settings.rank else all_values(base)
    folder = Path(settings.output_dir)
    values *= 1 + (settings.stage == "tdm")  # the fake score
    require_space("output_dir", folder, run_bytes(values, settings.keep, settings.ema > 0, False))
    refuse_used(settings)
    saved = load_checkpoint(folder) if settings.resume else None
    if saved is None:
        return settings.batch_size * accelerator.num_processes
    refuse_other_settings(saved["settings"], settings)
    refuse_other_base(saved, settings, base)
    if saved["paths"] != paths.maker:
        raise ValueError(
            "the checkpoint was trained on other paths than those in paths_dir; give the folder of before."
        )
    return kept_batch(saved, settings.batch_size, accelerator.num_processes)


def all_values(base: BaseModel) -> int:
    """Return how many weights the transformer of the base has."""
    return sum(path.stat().st_size for path in (base.folder / "transformer").glob("*.safetensors")) // 2


if __name__ == "__main__":
    raise SystemExit(main())
