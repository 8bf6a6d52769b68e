"""`ptdit lora`, `ptdit distill`: train in this process, in several, or as `accelerate config` has written it down."""

import argparse
import os
import signal
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .processes import run_processes
from .terminal import LineParser, UserError, interrupt_ends_at_once, number

# `accelerate launch` that leaves Ctrl-C to the training, which gets it, too, hands SIGTERM on as Ctrl-C, and ends with
# the training's exit code, without a traceback of its own.
LAUNCH = """
import psutil, runpy, signal, subprocess, sys

class Noted(subprocess.Popen):
    code = 0
    def wait(self, *options, **more):
        Noted.code = super().wait(*options, **more) or Noted.code
        return Noted.code

def hand_on(*_):
    for child in psutil.Process().children():
        child.send_signal(signal.SIGINT)

signal.signal(signal.SIGINT, lambda *_: None)
signal.signal(signal.SIGTERM, hand_on)
subprocess.Popen = Noted
try:
    runpy.run_module("accelerate.commands.launch", run_name="__main__", alter_sys=True)
except SystemExit as ended:
    sys.exit(Noted.code or ended.code)
except Exception as error:
    if type(error).__name__ != "ChildFailedError":  # of torchrun, for several processes
        raise
    sys.exit(error.get_first_failure()[1].exitcode)
"""


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
    from ptdit_diffusers.training.processes import default_processes, has_launch_settings

    count, options = processes_asked_for(arguments.options, arguments.program)
    if count is None and has_launch_settings():
        raise SystemExit(launch(module, options))
    if (count := count or default_processes()) > 1:
        raise SystemExit(run_processes(module, options, count))
    with interrupt_ends_at_once():
        training = import_module(module)
    raise SystemExit(training.main(options))


class OwnOptions(LineParser):
    """Knows the options of the command itself; all others are the training's."""

    parse_known_args = argparse.ArgumentParser.parse_known_args


def processes_asked_for(options: list[str], program: str = "lora") -> tuple[int | None, list[str]]:
    """Return the number of processes, None if it is not given, and the options of the training.

    `--cpu` sets the variable by which accelerate keeps from the GPUs.
    """
    parser = OwnOptions(prog=f"ptdit {program}", add_help=False, allow_abbrev=False)
    parser.add_argument("--num-processes", "--num_processes", type=number(int, 1, 1024))
    parser.add_argument("--cpu", action="store_true")
    own, others = parser.parse_known_args(options)
    if own.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return own.num_processes or (1 if own.cpu else None), others


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
