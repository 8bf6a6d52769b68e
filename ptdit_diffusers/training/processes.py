"""Processes and their devices: how they were started, what one does for all, signals, data loaders, kernels."""

import json
import logging
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.commands.config import default_config_file
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from ptdit_diffusers.core.files import replace_json

logger = logging.getLogger(__name__)

LOCK = ".lock"  # file in the folder of a run


def check_processes(accelerator: Accelerator) -> None:
    """Check that processes that were started together know each other.

    Otherwise each of them would train alone, into the same folder.

    Raises:
        ValueError: They do not.
    """
    if (started := int(os.environ.get("WORLD_SIZE", "1"))) > accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started but do not know each other; on a CPU set ACCELERATE_USE_CPU=1."
        )
    several = "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ  # set by a launcher asked for several
    if several and "ACCELERATE_USE_CPU" in os.environ and accelerator.num_processes == 1:
        logger.warning(
            "one process trains: `accelerate launch` starts no more than one on a CPU; `ptdit lora --cpu "
            "--num-processes N` and torchrun do."
        )


def is_main_process() -> bool:
    """Return whether this process speaks for all; also before they know each other."""
    return os.environ.get("RANK", "0") == "0"


def main_process_checks(accelerator: Accelerator, check: Callable[[], Any]) -> None:
    """Let the main process check something; all processes must call this, and all raise what it raises.

    Raises:
        ValueError: With the text of the ValueError or OSError of the check.
    """
    problem = [""]
    if accelerator.is_main_process:
        try:
            check()
        except (ValueError, OSError) as error:
            problem = [str(error)]
    if accelerator.num_processes > 1:
        broadcast_object_list(problem)
    if problem[0]:
        raise ValueError(problem[0])


def main_process_does(accelerator: Accelerator, folder: Path, work: Callable[[], Any]) -> Any:
    """Let the main process do long work, and return its result on every process; all of them must call this.

    The others wait for a file: waiting for a message, they would give up after ten minutes (NCCL).

    Args:
        accelerator: Knows the processes.
        folder: Which all processes see; it is made if it is missing.
        work: Returns plain values, as JSON has them.

    Raises:
        ValueError: On the other processes, with the text of what the work raised.
    """
    if accelerator.num_processes == 1:
        return work()
    token = broadcast_object_list([uuid.uuid4().hex])[0]
    path = folder / f".result-{token}.json"
    if not accelerator.is_main_process:
        while not path.exists():
            time.sleep(0.1)
        answer = json.loads(path.read_text(encoding="utf-8"))
        accelerator.wait_for_everyone()
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["result"]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = work()
    except Exception as error:
        with suppress(OSError):  # then the launcher ends the others
            replace_json(path, {"error": str(error)})
            accelerator.wait_for_everyone()
            path.unlink(missing_ok=True)
        raise
    replace_json(path, {"result": result})
    accelerator.wait_for_everyone()
    path.unlink(missing_ok=True)
    return result


def lock_folder(folder: Path, name: str) -> FileLock:
    """Take the folder of a run for this process, until the lock is released or the process ends in any way.

    Args:
        folder: It is made if it is missing.
        name: Of the setting, for the message.

    Raises:
        ValueError: Another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{name} {folder} is in use by another run; wait for its end, or give another one.") from None
    except (NotImplementedError, OSError) as error:  # some file systems of networks have no locks
        logger.warning("%s %s cannot be locked (%s): let no other run use it", name, folder, error)
    return lock


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the work in this block as Ctrl-C does, so that nothing unfinished stays behind."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def has_launch_settings() -> bool:
    """Return whether `accelerate config` has written down how to train."""
    return Path(default_config_file).is_file()


def default_processes() -> int:
    """Return one process for each GPU, or one where there is none."""
    return max(1, torch.cuda.device_count())


@contextmanager
def stop_signals() -> Iterator[dict[str, bool]]:
    """Turn Ctrl-C, SIGTERM and Windows' Ctrl-Break into a flag, so that the step in progress is saved.

    A second signal ends at once.
    """
    stop = {"now": False}

    def note(*_: Any) -> None:
        if stop["now"]:
            raise KeyboardInterrupt
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, b"\nstopping: a checkpoint is written after this step\n")  # print may be in use already
        stop["now"] = True

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
    earlier = [signal.signal(number, note) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, earlier, strict=True):
            signal.signal(number, handler)


def batch_loader(data: Dataset, numbers: range, workers: int, device: torch.device) -> DataLoader:
    """Return a loader of the batches of these numbers, in order; made ahead of time when `workers` > 0."""
    pin = device.type == "cuda"
    return DataLoader(
        data, None, sampler=numbers, num_workers=workers, pin_memory=pin, worker_init_fn=_leave_stop_signals
    )


def _leave_stop_signals(worker: int) -> None:
    """Leave Ctrl-C to the training process; end on SIGTERM, which is how it ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def attention_kernels(device: torch.device) -> AbstractContextManager:
    """Choose plain attention on a CPU, where the fused kernel's backward is slow for small windows."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
