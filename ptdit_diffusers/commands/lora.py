"""`ptdit lora`: train a LoRA, here, or on several GPUs through `accelerate launch` with the training module."""

import argparse
import os
import signal
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .terminal import UserError

# `accelerate launch` that leaves Ctrl-C to the training, which gets it, too, and hands SIGTERM on as Ctrl-C.
LAUNCH = """
import psutil, runpy, signal

def hand_on(*_):
    for child in psutil.Process().children():
        child.send_signal(signal.SIGINT)

signal.signal(signal.SIGINT, lambda *_: None)
signal.signal(signal.SIGTERM, hand_on)
runpy.run_module("accelerate.commands.launch", run_name="__main__", alter_sys=True)
"""


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
    """Train, and exit with the exit code of the training.

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
        sys.path.insert(0, os.getcwd())
    else:
        raise UserError("ptdit_diffusers is not installed; run this in a clone of the repository")
    from ptdit_diffusers.training.processes import needs_launcher

    if needs_launcher():
        raise SystemExit(launch(module, arguments.options))
    raise SystemExit(import_module(module).main(arguments.options))


def launch(module: str, options: list[str]) -> int:
    """Run `accelerate launch` and return its exit code, after a stop signal when the checkpoint is written."""
    process = subprocess.Popen([sys.executable, "-c", LAUNCH, "--quiet", "-m", module, *options])
    earlier = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),  # a terminal sends it to the training, too
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
    }
    try:
        return process.wait()
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
