"""`ptdit inspect`, `ptdit encode`, `ptdit train`, `ptdit average`: training on one's own pictures."""

import argparse
import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .launching import run_training
from .models import silence_libraries
from .terminal import UserError, interrupt_ends_at_once, number, say, say_warnings

MODULES = {  # name -> what it does, and whether in several processes
    "encode": ("encode the pictures of a training ahead of it, in parts by any number of machines", False),
    "train": ("train on your own pictures", True),
    "average": ("write the model of a run with another average of its weights", False),
}
PACKAGE = "ptdit_diffusers.training.own_data"


def add_commands(commands: Any) -> None:
    """Add the four subcommands to the parser."""
    parser = commands.add_parser(
        "inspect",
        help="look through pictures that you want to train on",
        description="Look through pictures: files, sizes, captions, unknown words, near-duplicates, how well the VAE "
        "reconstructs them, and what a training would cost here.",
        epilog="Example: ptdit inspect cats",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_inspect)
    add = parser.add_argument
    add("source", metavar="DATA", nargs="?", help="folder, metadata.jsonl, metadata.csv, or tar shards "
        "(default: that of --config)")  # fmt: skip
    add("--config", metavar="FILE", help="YAML file of the training, see docs/train-your-own.md")
    add("--start", metavar="MODEL", help="model to start from (default: that of --config, else shapes-128)")
    add("--resolution", type=number(int, 16), metavar="PIXELS", help="(default: the model's own)")
    add("--sample", type=number(int, 0), default=0, metavar="N", help="look into N of the tars (default: all)")
    for name, (text, _) in MODULES.items():
        parser = commands.add_parser(name, help=text, prefix_chars="\0", add_help=False)
        parser.set_defaults(run=run_module, own_command=name)
        parser.add_argument("options", nargs="*", metavar="OPTIONS")


def check_packages() -> None:
    """Refuse where packages of the extra `train` are missing."""
    missing = [name for name in ("matplotlib", "yaml") if find_spec(name) is None]
    if missing:
        raise UserError(f"training needs {' and '.join(missing)}: pip install 'ptdit-diffusers[train]'")


def run_module(arguments: argparse.Namespace) -> None:
    """Run a command, and exit with its exit code.

    Raises:
        UserError: A package is missing.
    """
    check_packages()
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # read while they are imported, by the processes of a training, too
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    name, module = arguments.own_command, f"{PACKAGE}.{arguments.own_command}"
    if MODULES[name][1]:
        raise SystemExit(run_training(name, module, arguments.options))
    with interrupt_ends_at_once():
        command = import_module(module)
    raise SystemExit(command.main(arguments.options))


def run_inspect(arguments: argparse.Namespace) -> None:
    """Write what was found to stdout.

    Raises:
        UserError: There is no data.
    """
    check_packages()
    say_warnings()
    with interrupt_ends_at_once():
        silence_libraries()
        from ptdit_diffusers.training.own_data.inspect import inspect
        from ptdit_diffusers.training.own_data.settings import for_inspection
    try:
        settings = for_inspection(arguments.source, arguments.config, arguments.start, arguments.resolution)
        for line in inspect(settings, arguments.sample):
            say(line)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
