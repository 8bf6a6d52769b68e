"""What every subcommand shares: how it speaks, how it reports a mistake, and types of arguments.

It must not know any subcommand, nor import torch or diffusers.
"""

import argparse
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

SIZE_STEP = 16  # pixels: VAE 8 x patch 2
FRAME_STEP = 4  # frames that the VAE packs into one latent frame, after the first
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count


class UserError(Exception):
    """Something the user can put right. Its text is the one line that is shown; the exit code is 2."""


class LineParser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def say(text: str, error: bool = False) -> None:
    """Write one line: facts to stdout, mistakes and warnings to stderr, in whatever encoding the terminal has."""
    stream = sys.stderr if error else sys.stdout
    encoding = stream.encoding or "utf-8"
    line = " ".join(text.split("\n"))
    stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


def say_warnings() -> None:
    """Show the warnings that libraries raise as one line each, without the source line; not what torchao and
    diffusers say of parts of torchao that are for other machines or other releases; int8 needs none of them.
    """
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (DeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)
    warnings.showwarning = lambda message, *place: say(f"warning: {message}", error=True)


@contextmanager
def interrupt_ends_at_once() -> Iterator[None]:
    """Within this block Ctrl-C ends the process on the spot. For imports and loading, before any file is written:
    an exception in the middle of an import is caught by some libraries and comes back as something else.
    """

    def end(*_: Any) -> None:
        say("ptdit: interrupted", error=True)
        os._exit(EXIT_INTERRUPTED)

    previous = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind if it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], Any]:
    """Make an argument type: a finite number of the given kind within the given limits, both included."""
    rule = f"{'a whole number' if kind is int else 'a number'} of at least {least}"
    if math.isfinite(most):
        rule += f" and at most {most}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {rule}") from None
        if math.isnan(value) or not least <= value <= most or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not {rule}; nearest: {most if value > most else least}")
        return value

    return parse


def pixels(text: str) -> int:
    """Argument type of a height or width: a positive multiple of 16."""
    value = number(int, SIZE_STEP)(text)
    if value % SIZE_STEP:
        below = value // SIZE_STEP * SIZE_STEP
        raise argparse.ArgumentTypeError(
            f"{value} is not a multiple of {SIZE_STEP} (VAE 8 x patch 2); nearest: {below} or {below + SIZE_STEP}"
        )
    return value


def clip_frames(text: str) -> int:
    """Argument type of a number of frames: 4n + 1."""
    value = number(int, 1)(text)
    if value % FRAME_STEP != 1:
        below = (value - 1) // FRAME_STEP * FRAME_STEP + 1
        raise argparse.ArgumentTypeError(
            f"{value} is not of the form {FRAME_STEP}n + 1 (frames that the VAE packs into one); nearest: {below} or "
            f"{below + FRAME_STEP}"
        )
    return value
