"""Several processes of this machine that work together, as torchrun starts them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def run_processes(module: str, options: list[str], count: int, seconds: float = 15) -> int:
    """Run a module in processes of this machine that know each other; return the exit code of the first to fail.

    Where one fails, the others are ended: they would wait for it.

    Args:
        module: As `python -m` takes it.
        options: Its arguments.
        count: Of processes.
        seconds: How long the others may take to end by themselves.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    words = [sys.executable, "-m", module, *options]
    apart = os.name == "posix"  # so that the terminal's Ctrl-C comes once, from here
    started = [
        subprocess.Popen(words, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, start_new_session=apart)
        for rank in range(count)
    ]
    with signals_go_to(started, (signal.SIGINT, signal.SIGTERM) if apart else (signal.SIGTERM,)):
        while None in (codes := [process.poll() for process in started]) and not any(codes):
            time.sleep(0.1)
        end_others(started, seconds)
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


def end_others(started: list[subprocess.Popen], seconds: float) -> None:
    """Give processes some time to end by themselves, then end them."""
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in started) and time.monotonic() < end:
        time.sleep(0.1)
    for process in started:
        process.kill()
        process.wait()


@contextmanager
def signals_go_to(processes: list[subprocess.Popen], numbers: tuple[int, ...]) -> Iterator[None]:
    """Hand these signals on to processes, and do nothing else at them."""

    def hand_on(number: int, _: Any) -> None:
        for process in processes:
            process.send_signal(number)

    earlier = {each: signal.signal(each, hand_on) for each in numbers}
    try:
        yield
    finally:
        for each, handler in earlier.items():
            signal.signal(each, handler)
