"""`ptdit generate --devices N`: processes, one for each device, that share every call and make one picture.

torchrun starts the same: `torchrun --nproc-per-node N -m ptdit_diffusers.cli generate ...`.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .limits import token_grid
from .models import is_class_model
from .processes import run_processes
from .terminal import UserError, place_among, say

if TYPE_CHECKING:
    from .. import PTDiTPipeline

MODULE = "ptdit_diffusers.cli"
ENDING = 1.0  # seconds that the others may take when one has failed


def must_start(devices: int | None) -> bool:
    """Return whether this process is to start the others; in one of them, check that they are as many as asked for.

    Raises:
        UserError: They are not.
    """
    count = place_among()[1]
    if count == 1:
        return (devices or 1) > 1
    if devices not in (None, count):
        raise UserError(f"--devices {devices}: {count} processes were started; leave it out, or give {count}")
    return False


def start_processes(arguments: argparse.Namespace, device: str) -> int:
    """Run the same command in a process for each device; return the exit code.

    Raises:
        UserError: This machine has not so many devices, or torch cannot connect them.
    """
    import torch

    count = arguments.devices
    if device == "mps":
        raise UserError(f"--devices {count}: an Apple GPU is one device; use --device cpu, or leave it out")
    if device == "cuda" and torch.cuda.device_count() < count:
        raise UserError(
            f"--devices {count}: there are {torch.cuda.device_count()} CUDA GPUs; nearest: {torch.cuda.device_count()}"
        )
    check_backend(device)
    code = run_processes(MODULE, arguments.words, count, ENDING)
    if code > 128 + 2 and code != 128 + 15:  # neither Ctrl-C nor SIGTERM: a process that could say nothing
        raise UserError(f"a process ended by signal {code - 128}; if it is 9, memory may have run out")
    return code


def check_backend(device: str) -> str:
    """Return the backend of torch.distributed for a device.

    Raises:
        UserError: This torch has not got it.
    """
    import torch

    distributed = torch.distributed
    backend = "nccl" if device == "cuda" else "gloo"
    if not distributed.is_available() or not getattr(distributed, f"is_{backend}_available")():
        raise UserError(f"--devices: torch {torch.__version__} comes without {backend}; leave it out")
    return backend


def check_share(folder: Path, arguments: argparse.Namespace, count: int) -> None:
    """Refuse, before a weight is read, more devices than the longest axis of the token grid has slices.

    Raises:
        UserError: Names the largest number.
    """
    if count == 1:
        return
    if is_class_model(folder):
        raise UserError(f"--devices {count} does not fit --model {arguments.model}, which generates images of classes")
    sharing = count // 2 if halves(arguments, count) else count
    if sharing > max(grid := token_grid(folder, arguments)):
        most = max(grid) * count // sharing
        raise UserError(
            f"--devices {count}: {grid[0]} x {grid[1]} x {grid[2]} tokens (frames, rows, columns) cannot be shared by "
            f"so many; nearest: {most}"
        )


def halves(arguments: argparse.Namespace, count: int) -> bool:
    """Whether one half of so many devices predicts for the negative prompt."""
    return arguments.guidance > 1 and count % 2 == 0


@contextmanager
def connected(device: str) -> Iterator[None]:
    """Connect the processes that share a call while the block runs; do nothing for one alone."""
    if place_among()[1] == 1:
        yield
        return
    import torch

    backend = check_backend(device)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(backend)
    yield  # where it fails, the process ends and the launcher ends the others: waiting for them would take minutes
    torch.distributed.barrier()  # none leaves while another still reads
    torch.distributed.destroy_process_group()


def share(pipe: "PTDiTPipeline", arguments: argparse.Namespace) -> None:
    """Let the processes share every call of the pipeline, and say how."""
    count = place_among()[1]
    if count == 1:
        return
    in_halves = halves(arguments, count)
    pipe.enable_parallelism(guidance_halves=in_halves)
    if place_among()[0]:
        pipe.set_progress_bar_config(disable=True)
    how = f"{count // 2} for the negative prompt, {count // 2} for the prompt" if in_halves else "all for each step"
    say(f"devices: {count}, {how}")


def is_loss(error: Exception) -> bool:
    """Whether an error says that another process is not there any more."""
    words = ("Connection closed", "Connection reset", "Broken pipe", "gloo", "NCCL")
    return place_among()[1] > 1 and isinstance(error, RuntimeError) and any(word in str(error) for word in words)
