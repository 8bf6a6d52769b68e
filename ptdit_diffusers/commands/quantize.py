"""`ptdit quantize`: a smaller copy of a model folder. Arguments and messages only."""

import argparse
from pathlib import Path
from typing import Any

from .terminal import EXIT_INTERRUPTED, UserError, first_line, interrupt_ends_at_once, say, say_warnings

FORMATS = ("int8", "fp8", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "q4_k")  # of `conversion.quantize`
COMPONENTS = ("transformer", "text_encoder")


def add_command(commands: Any) -> None:
    """Add `quantize` to the subcommands of the parser."""
    parser = commands.add_parser(
        "quantize",
        help="make a smaller copy of a model folder",
        description="Make a smaller copy of a model folder. int8 (needs torchao) and fp8 give a whole folder that "
        "loads as before; the other formats (need gguf) give one GGUF file for each component.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="folder that `ptdit convert` or save_pretrained wrote")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    add("--format", choices=FORMATS, required=True, help="number format of the linear layers' weights")
    add("--components", nargs="+", choices=COMPONENTS, default=COMPONENTS, help="what to quantize (default: both)")
    add("--overwrite", action="store_true", help="replace a model folder that exists (default: refuse)")


def run(arguments: argparse.Namespace) -> None:
    """Quantize, reporting sizes.

    Raises:
        UserError: The model cannot be quantized, or the output cannot be written; nothing is left behind.
    """
    say_warnings()
    with interrupt_ends_at_once():
        from ptdit_diffusers.core.checkpoint_names import ConversionError

        from ..conversion.quantize import quantize
    components = tuple(arguments.components)
    try:
        quantize(arguments.model, arguments.output, arguments.format, components, arguments.overwrite, say)
    except ConversionError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(
            f"--output {arguments.output} cannot be written: {error.strerror or first_line(error)}; nothing was kept"
        ) from error
    except KeyboardInterrupt:
        say("ptdit: interrupted; nothing was written", error=True)
        raise SystemExit(EXIT_INTERRUPTED) from None
    say(f"saved {arguments.output}")
