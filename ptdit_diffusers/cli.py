"""The console command `ptdit`: its parser and its exit codes. Each subcommand is a module in `commands`."""

import argparse
import sys

from . import __version__
from .commands import convert, export, generate, lora, quantize
from .commands.terminal import EXIT_INTERRUPTED, LineParser, UserError, say

EXIT_BAD_INPUT = 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; a chosen subcommand leaves the function that runs it in `run`."""
    parser = LineParser(prog="ptdit", description="PT-DiT: pictures from words.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ptdit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    generate.add_command(commands)
    convert.add_command(commands)
    quantize.add_command(commands)
    lora.add_command(commands)
    export.add_command(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Words after `ptdit`; None takes them from the shell.

    Returns:
        The exit code: 0 done, 2 bad input (one line on stderr says what), 130 interrupted.
    """
    try:
        arguments = build_parser().parse_args(argv)
        arguments.run(arguments)
    except UserError as error:
        say(f"ptdit: {error}", error=True)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        say("ptdit: interrupted; finished pictures were kept", error=True)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
