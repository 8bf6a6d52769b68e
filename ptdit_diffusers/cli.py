"""The console command `ptdit`: its parser and exit codes. Each subcommand is a module in `commands`."""

import argparse
import sys

from . import __version__
from .commands import convert, export, generate, lora, own_data, quantize
from .commands.terminal import EXIT_INTERRUPTED, LineParser, UserError, complain, say

EXIT_BAD_INPUT = 2


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command; a subcommand sets `run`, the function that runs it."""
    parser = LineParser(
        prog="ptdit",
        description="Generate images, videos and views of objects with PT-DiT (Qihoo-T2X), and convert, train and "
        "export its models.",
        epilog="`ptdit COMMAND --help` explains a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ptdit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    generate.add_command(commands)
    convert.add_command(commands)
    quantize.add_command(commands)
    lora.add_command(commands)
    own_data.add_commands(commands)
    export.add_command(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments after `ptdit`; None takes those of the shell.

    Returns:
        The exit code: 0 for success, 2 for bad input (one line on stderr), 130 if interrupted.
    """
    try:
        arguments = build_parser().parse_args(argv)
        arguments.words = sys.argv[1:] if argv is None else argv
        arguments.run(arguments)
    except UserError as error:
        complain(str(error))
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        say("ptdit: interrupted; finished images were kept", error=True)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
