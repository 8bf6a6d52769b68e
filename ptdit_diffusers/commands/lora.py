"""`ptdit lora`: train a LoRA; short for `accelerate launch` with the training module."""

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .terminal import UserError


def add_command(commands: Any) -> None:
    """Add `lora` to the subcommands of the parser."""
    parser = commands.add_parser(
        "lora",
        help="train a LoRA",
        prefix_chars="\0",  # no options of its own: all of them, --help too, are the training's
        add_help=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("options", nargs="*", metavar="OPTIONS")


def run(arguments: argparse.Namespace) -> None:
    """Launch the training, and exit with its exit code.

    The installed package has it as `ptdit_diffusers.lora`, a clone of the repository as `lora`.

    Raises:
        UserError: There is neither, or a package is missing.
    """
    if find_spec("matplotlib") is None:
        raise UserError("training needs matplotlib: pip install '.[train]' in a clone of the repository")
    if find_spec("ptdit_diffusers.lora"):
        module = "ptdit_diffusers.lora.train"
    elif Path("lora/train.py").is_file():
        module = "lora.train"
    else:
        raise UserError("ptdit_diffusers is not installed; run this in a clone of the repository")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "-m", module]
    raise SystemExit(subprocess.call([*launch, *arguments.options]))
