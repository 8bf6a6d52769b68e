"""How a training is started: in this process, in several, or as `accelerate config` has written it down."""

import argparse
import os
import signal
import subprocess
import sys
from importlib import import_module

from .processes import run_processes
from .terminal import LineParser, interrupt_ends_at_once, number

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


def run_training(program: str, module: str, options: list[str]) -> int:
    """Run a training, and return its exit code.

    Args:
        program: Name of the command.
        module: With a function `main` that takes the options and returns an exit code.
        options: Of the training, with those of the launch among them.
    """
    from ptdit_diffusers.training.processes import default_processes, has_launch_settings

    count, options = processes_asked_for(options, program)
    if count is None and has_launch_settings():
        return launch(module, options)
    if (count := count or default_processes()) > 1:
        return run_processes(module, options, count)
    with interrupt_ends_at_once():
        training = import_module(module)
    return training.main(options)


class OwnOptions(LineParser):
    """Knows the options of the command itself; all others are the training's."""

    parse_known_args = argparse.ArgumentParser.parse_known_args


def processes_asked_for(options: list[str], program: str) -> tuple[int | None, list[str]]:
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
