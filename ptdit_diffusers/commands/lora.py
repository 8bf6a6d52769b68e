"""`ptdit lora`, `ptdit distill`: train in this process, in several, or as `accelerate config` has written it down."""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .launching import run_training
from .terminal import UserError

PROGRAMS = {"lora": ("train", "train a LoRA"), "distill": ("distill", "distill a model into a student of few steps")}


def add_command(commands: Any) -> None:
    """Add `lora` and `distill` to the subcommands of the parser."""
    for program, (name, text) in PROGRAMS.items():
        parser = commands.add_parser(
            program,
            help=text,
            prefix_chars="\0",  # no options of its own: all of them, --help too, are the training's
            add_help=False,
        )
        parser.set_defaults(run=run, program=program, module=name)
        parser.add_argument("options", nargs="*", metavar="OPTIONS")


def run(arguments: argparse.Namespace) -> None:
    """Train, and exit with the exit code of the training.

    The installed package has it as `ptdit_diffusers.lora`, a clone of the repository as `lora`.

    Raises:
        UserError: There is neither, or a package is missing.
    """
    if find_spec("matplotlib") is None:
        raise UserError("training needs matplotlib: pip install '.[train]' in a clone of the repository")
    if find_spec("ptdit_diffusers.lora"):
        module = f"ptdit_diffusers.lora.{arguments.module}"
    elif Path("lora/train.py").is_file():
        module = f"lora.{arguments.module}"
        sys.path.insert(0, os.getcwd())
    else:
        raise UserError("ptdit_diffusers is not installed; run this in a clone of the repository")
    raise SystemExit(run_training(arguments.program, module, arguments.options))
