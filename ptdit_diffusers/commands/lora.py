"""`ptdit lora`: short for `accelerate launch -m lora.train`, in a clone of the repository."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from .terminal import UserError


def add_command(commands: Any) -> None:
    """Add `lora` to the subcommands of the parser."""
    parser = commands.add_parser(
        "lora",
        help="train a LoRA (in a clone of the repository)",
        prefix_chars="\0",  # no options of its own: all of them, --help too, are the training's
        add_help=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("options", nargs="*", metavar="OPTIONS")


def run(arguments: argparse.Namespace) -> None:
    """Launch the training in this folder.

    Raises:
        UserError: This is no clone of the repository.
    """
    if not Path("lora/train.py").is_file():
        raise UserError("training is not part of the installed package; run this in a clone of the repository")
    raise SystemExit(
        subprocess.call([sys.executable, "-m", "accelerate.commands.launch", "-m", "lora.train", *arguments.options])
    )
