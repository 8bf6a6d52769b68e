"""Train a PT-DiT on one's own pictures: `ptdit train --config cats.yaml`, or for several machines

    torchrun --nnodes 2 --nproc-per-node 8 -m ptdit_diffusers.training.own_data.train --config big.yaml

The same line again goes on from the newest checkpoint, with any number of processes.
"""

import importlib.util
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from safetensors import SafetensorError

from ptdit_diffusers.core.arguments import LineParser
from ptdit_diffusers.core.devices import check_compiler, computes_bf16
from ptdit_diffusers.training.checkpoint import checkpoints, load_checkpoint
from ptdit_diffusers.training.command import begin_log, complain, exit_code
from ptdit_diffusers.training.context import check_context
from ptdit_diffusers.training.data.space import require_space
from ptdit_diffusers.training.own_data.batches import StageData, stage_data
from ptdit_diffusers.training.own_data.changes import changed
from ptdit_diffusers.training.own_data.model import make_base, outline, stage_sizes
from ptdit_diffusers.training.own_data.prepare import (
    Limits,
    StoppedEarlyError,
    captions_of,
    check_vae_source,
    encoded_versions,
    encodes_online,
    prepare_parts,
    source_of,
)
from ptdit_diffusers.training.own_data.settings import OwnDataSettings, by_source, read_settings
from ptdit_diffusers.training.own_data.task import OwnDataTask
from ptdit_diffusers.training.parallel import shard_size
from ptdit_diffusers.training.processes import check_processes, lock_folder, main_process_checks
from ptdit_diffusers.training.record import require_matplotlib
from ptdit_diffusers.training.run import Run
from ptdit_diffusers.training.task import trained_parameters
from ptdit_diffusers.training.trackers import TRACKERS, begin_tracking

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(hours=1)  # after which processes that wait for a lost one end
FEW = 1000  # pictures below which training all weights learns them by heart


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 2 for bad input, 1 for a run that failed, 130 for Ctrl-C."""
    return exit_code(lambda: train(settings_of(arguments)), "train")


def settings_of(arguments: Sequence[str] | None) -> OwnDataSettings:
    """Return the settings of a command line.

    Raises:
        ValueError, OSError: One is not right.
    """
    parser = LineParser(prog="ptdit train", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see docs/train-your-own.md")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any setting: run.max_minutes=30"
    )
    flags = parser.parse_args(arguments)
    require_matplotlib()
    settings = read_settings(flags.config, flags.set)
    check_packages(settings)
    return settings


def check_packages(settings: OwnDataSettings) -> None:
    """Raise ValueError where a setting needs a package that is not installed."""
    optimizer, needed = settings.optimizer, {"adamw8bit": "torchao", "bf16-stochastic": "torchao"}
    needed |= {name: name for name in TRACKERS}
    chosen = [("optimizer.name", optimizer.name, "adamw"), ("optimizer.weights", optimizer.weights, "fp32")]
    for name, value, other in [*chosen, ("run.report_to", settings.run.report_to, "none")]:
        if value in needed and importlib.util.find_spec(needed[value]) is None:
            raise ValueError(f"{name}={value!r} needs {needed[value]}: pip install {needed[value]}; or use {other!r}.")


def make_accelerator(settings: OwnDataSettings) -> Accelerator:
    """Return the accelerator of a run."""
    run = settings.run
    bf16 = run.precision == "bf16" or settings.optimizer.half
    bf16 = bf16 or (run.precision == "auto" and torch.cuda.is_available() and computes_bf16("cuda"))
    return Accelerator(
        mixed_precision="bf16" if bf16 else "no",
        gradient_accumulation_steps=run.accumulation,
        log_with=None if run.report_to == "none" else run.report_to,
        project_dir=settings.folder,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
    )


def train(settings: OwnDataSettings) -> int:
    """Encode what is not encoded, train, and write the model; return the exit code.

    Raises:
        ValueError, OSError: Something is not right; training has not begun.
    """
    limits, accelerator = Limits.of(settings.run), make_accelerator(settings)
    torch.set_float32_matmul_precision("high")
    begin_log(logging.INFO if accelerator.is_main_process else logging.ERROR)
    check_processes(accelerator)
    check_before_training(settings, accelerator)
    with ExitStack() as held:
        take = partial(lock_folder, settings.folder, "run.output")
        main_process_checks(accelerator, lambda: held.callback(take().release))
        try:
            base = make_base(settings, prepare_parts(settings, accelerator, limits))
        except StoppedEarlyError:
            logger.info("the same command goes on")
            return 0
        stages = stage_data(settings, encoded_versions(settings, base, accelerator))
        texts = captions_of(settings, base, [stage.encoded for stage in stages], accelerator)
        if accelerator.is_main_process:
            say_data(settings, stages)
        task = OwnDataTask(settings, base, stages, texts, accelerator)
        run = Run(task, replace(settings.loop_settings(), **limits.left()), accelerator)
        begin_tracking(accelerator, settings.folder, "ptdit")
        return finish(settings, run)


def check_before_training(settings: OwnDataSettings, accelerator: Accelerator) -> None:
    """Check everything that can be refused before long work.

    Raises:
        ValueError: A resolution that is not possible, no data, a used folder, a checkpoint of other settings.
        OSError: There is too little disk space.
    """
    shard_size(settings.parallel.shard, accelerator.num_processes)
    if settings.optimizer.half and accelerator.num_processes > 1:
        raise ValueError(
            f"optimizer.weights='bf16-stochastic' is for one process, there are {accelerator.num_processes}; nearest: "
            "fp32, with weights that the processes share (parallel.shard)."
        )
    if settings.optimizer.from_torchao:
        check_compiler(accelerator.device)  # torchao compiles its steps
    base, folder = make_base(settings), settings.folder
    slices = min(stage.resolution for stage in settings.stages) // (8 * base.transformer_config["patch_size"])
    check_context(settings.parallel.context, accelerator.num_processes, slices)
    encodes_online(settings, base)
    for source, each in by_source(settings).items():
        stage_sizes(each, base)
        if Path(source).is_dir() and Path(source).resolve() == folder.resolve():
            raise ValueError(f"run.output={folder} is the folder of the data; give another one, it may lie in it.")
        if not checkpoints(folder):
            source_of(each).count()  # refuses what is no folder, and tables that are not right
    check_vae_source(settings)
    if not checkpoints(folder):
        values = sum(p.numel() for p in trained_parameters(outline(settings, base)).values())
        copies = (3 + len(settings.run.ema)) * (settings.run.keep + 1) + 2
        snapshots = len(settings.run.ema) * (settings.run.snapshots + len(settings.stages)) / 2  # half precision
        exports = settings.total_steps // settings.run.export_every if settings.run.export_every else 0
        require_space("run.output", folder, int(values * 4 * (copies + snapshots + exports)))
    if (folder / "lora").exists() or ((folder / "run.json").exists() and not (folder / "data.json").exists()):
        raise ValueError(f"run.output={folder} holds a run of another kind; give another folder.")
    if (saved := load_checkpoint(folder)) is not None:
        if "own_data" not in saved:
            raise ValueError(f"run.output={folder} holds a run of another kind; give another folder.")
        if different := changed(saved["own_data"], settings, saved["step"]):
            raise ValueError(
                f"the checkpoint was made with other settings: {'; '.join(different)}. Give the old values, or start "
                "anew in another run.output."
            )


def say_data(settings: OwnDataSettings, stages: Sequence[StageData]) -> None:
    """Log what is trained on, and what is not."""
    different = {stage.encoded.version: stage.encoded for stage in stages}
    for version, encoded in different.items():
        if skipped := encoded.manifest["skipped"]:
            logger.info("%d files were left out; %s names them", len(skipped), version / "manifest.json")
    if len(different) > 1 and settings.data.validation:
        logger.info("each source has held-out samples of its own: a picture that is in several may be trained on")
    for number, (stage, data) in enumerate(zip(settings.stages, stages, strict=True), 1):
        sizes = ", ".join(
            f"{len(members)} of {size_text(data.encoded.buckets[name])}"
            for name, members in sorted(data.members.items())
        )
        logger.info(
            "stage %d: %d samples (%s), %d held out; %d steps of %d are %.1f passes",
            number,
            data.order.count,
            sizes,
            len(data.held_out),
            stage.steps,
            stage.batch,
            stage.steps * stage.batch / data.order.count,
        )
        if not len(data.held_out):
            logger.warning("nothing is held out, so nobody sees whether the model learns by heart")
    if stages[0].order.count < FEW and settings.train == "all":
        logger.warning(
            "%d pictures are few for all weights: the model will learn them by heart, and the log says when; "
            "train: lora forgets less",
            stages[0].order.count,
        )


def size_text(bucket: tuple[int, int, int]) -> str:
    """Return height and width of a bucket, and its frames where there are several."""
    frames, height, width = bucket
    return f"{height}x{width}" + (f" with {frames} frames" if frames > 1 else "")


def finish(settings: OwnDataSettings, run: Run) -> int:
    """Train to the end or to a stop; return the exit code."""
    folder = settings.folder
    try:
        finished = run.train()
    except (OSError, SafetensorError, FloatingPointError) as error:
        kept = checkpoints(folder)
        last = f"the last sound checkpoint is {kept[-1].name}" if kept else "no checkpoint was written yet"
        again = "" if isinstance(error, FloatingPointError) else "; the same command goes on from there"
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        complain(f"stopped at step {run.step}: {reason}; {last}{again}.", "train")
        return 1
    run.accelerator.end_training()
    if finished:
        logger.info("the model is in %s: ptdit generate PROMPT --model %s", folder / "model", folder / "model")
    else:
        logger.info("the same command goes on")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
