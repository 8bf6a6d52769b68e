"""`ptdit quantize`: a smaller copy of a model folder. Arguments and messages only."""

import argparse
from pathlib import Path
from typing import Any

from ptdit_diffusers.core.small_formats import FORMATS, QUANTIZED_PARTS

from .models import silence_libraries
from .terminal import errors_of_writing, interrupt_ends_at_once, say, say_warnings


def add_command(commands: Any) -> None:
    """Add `quantize` to the subcommands of the parser."""
    parser = commands.add_parser(
        "quantize",
        help="write a smaller copy of a model folder",
        description="Write a smaller copy of a model folder. int8 (needs torchao) and fp8 give a complete folder that "
        "loads as before; the other formats (need gguf) give one GGUF file for each component.",
        epilog="Example: ptdit quantize my-model --output my-model-fp8 --format fp8",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="folder that `ptdit convert` or save_pretrained wrote")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--format", choices=FORMATS, required=True, help="number format of the linear layers' weights")
    add(
        "--components",
        nargs="+",
        choices=QUANTIZED_PARTS,
        default=QUANTIZED_PARTS,
        help="what to quantize (default: both)",
    )
    add("--overwrite", action="store_true", help="replace a model folder that exists (default: refuse)")


def run(arguments: argparse.Namespace) -> None:
    """Quantize, reporting sizes.

    Raises:
        UserError: The model cannot be quantized, or the output cannot be written; nothing is left behind.
    """
    say_warnings()
    with interrupt_ends_at_once():
        silence_libraries()
        from ptdit_diffusers.core.checkpoint_names import ConversionError

        from ..conversion.quantize import quantize
    components = tuple(arguments.components)
    with errors_of_writing(arguments.output, ConversionError):
        quantize(arguments.model, arguments.output, arguments.format, components, arguments.overwrite, say)
    say(f"saved {arguments.output}")
