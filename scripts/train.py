"""Train one stage of an embedded model.

    accelerate launch -m scripts.train --config scripts/configs/shapes.yaml --stage text
    python -m scripts.train --config scripts/configs/shapes.yaml --stage vae --max-minutes 30
    torchrun --nproc_per_node 2 -m scripts.train --config scripts/configs/clips.yaml --stage transformer

The last starts two processes; on a CPU with ACCELERATE_USE_CPU=1, and OMP_NUM_THREADS=1 for one core each.
Stages in order: text (T5 encoder and tokenizer), vae, transformer, decoder (the VAE's, its encoder frozen). dit and
diffit, models of classes, need only a VAE; diffit_image, a model of classes in pixels, needs nothing.
Call it again to resume.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ptdit_diffusers.core.devices import computes_bf16
from ptdit_diffusers.training.checkpoint import checkpoints
from ptdit_diffusers.training.context import check_context
from ptdit_diffusers.training.processes import check_processes
from ptdit_diffusers.training.record import require_matplotlib
from ptdit_diffusers.training.run import Run
from ptdit_diffusers.training.settings import load_settings, parse_yaml
from scripts.embedded_models.class_stage import ClassStage
from scripts.embedded_models.image_stage import ImageStage
from scripts.embedded_models.text_stage import TextStage
from scripts.embedded_models.transformer_stage import TransformerStage
from scripts.embedded_models.vae_stage import VAEStage

logger = logging.getLogger(__name__)

STAGES = {
    "text": TextStage,
    "vae": VAEStage,
    "decoder": VAEStage,
    "transformer": TransformerStage,
    "dit": ClassStage,
    "diffit": ClassStage,
    "diffit_image": ImageStage,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (2 for a bad setting)."""
    parser = make_parser()
    flags = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    kind = STAGES[flags.stage]
    try:
        require_matplotlib()
        settings = load_settings(flags.config, flags.stage, kind.settings_type, overrides(flags))
        if flags.export_only and not checkpoints(Path(settings.output_dir)):
            raise ValueError(f"--export-only: {settings.output_dir} has no checkpoint.")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    torch.set_float32_matmul_precision("high")
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision, gradient_accumulation_steps=settings.accumulation
    )
    try:
        check_processes(accelerator)
        check_context(settings.context_parallel, accelerator.num_processes)
    except ValueError as error:
        parser.error(str(error))
    if settings.mixed_precision == "bf16" and not computes_bf16(accelerator.device):
        logger.warning("This device does not multiply bfloat16: --set mixed_precision=no is several times faster.")
    torch.manual_seed(settings.seed)  # the initial weights are the same on every process
    run = Run(kind(settings, accelerator.device), settings, accelerator)
    if flags.export_only:
        run.export()
    else:
        run.train()
    accelerator.end_training()
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the script."""
    parser = argparse.ArgumentParser(prog="scripts.train", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file with one section per stage")
    parser.add_argument("--stage", required=True, choices=STAGES, help="section of the file to train")
    parser.add_argument("--output-dir", help="folder of the run (default: output_dir of the section)")
    parser.add_argument("--steps", type=int, help="optimizer steps of the whole schedule (default: section)")
    parser.add_argument("--max-minutes", type=float, help="save and stop after this many minutes (0: no limit)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any setting: model.dim=64")
    parser.add_argument("--export-only", action="store_true", help="export the newest checkpoint without training")
    return parser


def overrides(flags: argparse.Namespace) -> dict[str, Any]:
    """Return the settings given as flags, by dotted name."""
    given = {"output_dir": flags.output_dir, "steps": flags.steps, "max_minutes": flags.max_minutes}
    for item in flags.set:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set {item!r} must be NAME=VALUE, for example --set lr=0.001.")
        given[name] = parse_yaml(value)
    return given


if __name__ == "__main__":
    raise SystemExit(main())
