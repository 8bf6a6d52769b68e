"""A program of two processes whose main process takes longer than the others would wait for a message."""

import sys
import time
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, InitProcessGroupKwargs

from ptdit_diffusers.training.processes import main_process_does


def work() -> list:
    time.sleep(4)
    return [7, "x"]


def refuse() -> None:
    raise ValueError("no pictures")


def main() -> None:
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=2))])
    folder = Path(sys.argv[1])
    sys.stdout.write(f"{main_process_does(accelerator, folder, work)}\n")
    try:
        main_process_does(accelerator, folder, refuse)
    except ValueError as error:
        sys.stdout.write(f"{error}\n")
    sys.stdout.flush()
    accelerator.end_training()


if __name__ == "__main__":
    main()
