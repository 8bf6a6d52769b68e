"""How the commands of the trainings end: one line for what is refused, and exit codes."""

import sys
from collections.abc import Callable

import diffusers
import transformers

from ptdit_diffusers.core.messages import log_to_terminal, one_line
from ptdit_diffusers.training.processes import is_main_process, terminate_as_interrupt

REFUSED, INTERRUPTED = 2, 130  # 128 + SIGINT, as shells count


def exit_code(work: Callable[[], int], program: str) -> int:
    """Do the work and return its exit code: 2 for what it refuses with a ValueError or OSError, 130 for Ctrl-C.

    Args:
        work: Returns an exit code.
        program: Name of the command, for messages.
    """
    try:
        with terminate_as_interrupt():
            return work()
    except (ValueError, OSError) as error:
        complain(str(error), program)
        return REFUSED
    except KeyboardInterrupt:
        complain("interrupted; what was encoded and saved is kept.", program)
        return INTERRUPTED


def begin_log(level: int) -> None:
    """Show log messages of this level and above, and no bars of the libraries between them."""
    log_to_terminal(level)
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


def complain(text: str, program: str) -> None:
    """Write one line to stderr, on the main process alone."""
    if is_main_process():
        sys.stderr.write(f"{one_line(f'{program}: {text}')}\n")
