"""What the subcommands share: messages, errors, and types of arguments. It imports neither torch nor diffusers."""

import argparse
import logging
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ptdit_diffusers.core.sizes import LARGEST_SIDE

from ..core import arguments
from ..core.messages import one_line

SIZE_STEP = 16  # pixels: VAE 8 x patch 2
FRAME_STEP = 4  # frames that the VAE packs into one latent frame, after the first
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
FIRST_SPEAKS = 2.0  # seconds in which the first of several processes says what ends all of them


class UserError(Exception):
    """Something the user can put right. Its text is shown as one line; the exit code is 2."""


class LineParser(arguments.LineParser):
    """Reports a mistake in one line, with the nearest option."""

    refusal = UserError


def say(text: str, error: bool = False) -> None:
    """Write one line: results to stdout, errors and warnings to stderr, in the encoding of the terminal.

    A stream that is closed or full stops no work: what it would have shown is dropped.
    Names and keys of files may hold anything, so control characters, which could steer the terminal, are escaped.
    Of several processes that share a call, the first speaks for all.
    """
    if place_among()[0] == 0:
        write_line(text, error)


def complain(text: str) -> None:
    """Say what ends the command. Processes that share a call leave that to the first; if it does not, they do."""
    rank, count = place_among()
    if rank:
        time.sleep(FIRST_SPEAKS)  # the same happened there, and its end ends this process; else it waits for this one
        text = f"device {rank + 1} of {count}: {text}"
    write_line(f"ptdit: {text}", error=True)


def place_among() -> tuple[int, int]:
    """Return the number of this process among those that share a call, and how many they are."""
    if "LOCAL_RANK" not in os.environ:  # torchrun sets it, and so do we
        return 0, 1
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def write_line(text: str, error: bool = False) -> None:
    """Write one line, see `say`."""
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # closed by the shell
        return
    encoding = stream.encoding or "utf-8"
    line = one_line(text)
    try:
        stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except OSError as problem:
        with open(os.devnull, "w") as nowhere:  # what is buffered goes there, and all that follows
            os.dup2(nowhere.fileno(), stream.fileno())
        if not error and not isinstance(problem, BrokenPipeError):
            write_line(f"warning: messages cannot be written to stdout: {problem.strerror}", error=True)


def say_warnings() -> None:
    """Show the warnings of libraries as one line each, without the source line.

    Those of torchao, and of diffusers about parts of torchao for other machines or releases, are left out: int8 needs
    none of these parts.
    """
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (DeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)
    warnings.showwarning = lambda message, *place: say(f"warning: {message}", error=True)


@contextmanager
def interrupt_ends_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process at once within this block. For imports and loading, before any file is written.

    An exception in the middle of an import is caught by some libraries, which then raise another one.
    """

    def end(*_: Any) -> None:
        say("ptdit: interrupted", error=True)
        os._exit(EXIT_INTERRUPTED)

    previous = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def errors_of_writing(output: Path, *refusals: type[Exception]) -> Iterator[None]:
    """Report what stops the writing of a folder in one line. The block must leave nothing behind when it fails.

    Args:
        output: The folder, which the message names.
        refusals: Errors whose text is the message.

    Raises:
        UserError: One of the refusals, or the disk failed.
        SystemExit: Ctrl-C.
    """
    try:
        yield
    except refusals as error:
        raise UserError(str(error)) from error
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"--output {output} cannot be written: {reason}; nothing was kept") from error
    except KeyboardInterrupt:
        say("ptdit: interrupted; nothing was written", error=True)
        raise SystemExit(EXIT_INTERRUPTED) from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class if it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], Any]:
    """Return an argument type: a finite number of the given kind within the given limits, both included."""
    rule = f"{'a whole number' if kind is int else 'a number'} of at least {least}"
    if math.isfinite(most):
        rule += f" and at most {most}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {rule}") from None
        if not least <= value <= most or value == math.inf:  # no comparison holds for nan
            nearest = "" if value == most else f"; nearest: {most if value > most else least}"
            raise argparse.ArgumentTypeError(f"{text} is not {rule}{nearest}")
        return value

    return parse


def pixels(text: str) -> int:
    """Parse a height or width: a positive multiple of 16."""
    value = number(int, SIZE_STEP, LARGEST_SIDE)(text)
    if value % SIZE_STEP:
        below = value // SIZE_STEP * SIZE_STEP
        raise argparse.ArgumentTypeError(
            f"{value} is not a multiple of {SIZE_STEP} (VAE 8 x patch 2); nearest: {below} or {below + SIZE_STEP}"
        )
    return value


def frame_count(text: str) -> int:
    """Parse a number of frames: 4n + 1."""
    value = number(int, 1, LARGEST_SIDE + 1)(text)
    if value % FRAME_STEP != 1:
        below = (value - 1) // FRAME_STEP * FRAME_STEP + 1
        raise argparse.ArgumentTypeError(
            f"{value} is not of the form {FRAME_STEP}n + 1 (frames that the VAE packs into one); nearest: {below} or "
            f"{below + FRAME_STEP}"
        )
    return value
