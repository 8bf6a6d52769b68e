"""Processes of the tests: real interpreters, and forks of one process that has imported the libraries.

Starting an interpreter that imports torch, diffusers and transformers costs about seven seconds of CPU time, a fork
less than one. It runs `-m MODULE ...` in its own folder, environment and process group, with its output in files.
Where it starts `python` itself, as torchrun and other launchers do, that is a fork, too, with all that it was given.
What needs a real interpreter: the start-up of a command, and variables that the libraries read while they are
imported (HF_HOME, HF_ENDPOINT, ...).
"""

import gc
import inspect
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    "pytest",
    "torch._dynamo",
    "torch.distributed.run",
    "scipy.stats",
    "matplotlib.pyplot",
    "accelerate",
    "peft",
    "transformers.models.t5.modeling_t5",
    "diffusers.loaders.single_file_model",
    "diffusers.models.autoencoders.vae",
    "diffusers.modular_pipelines.modular_pipeline",
    "diffusers.pipelines.auto_pipeline",
    "diffusers.training_utils",
    "tests.warm",
)
CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()  # not on Windows


@dataclass
class Running:
    """A process that was started; it writes its output to two files of a folder."""

    process: subprocess.Popen | multiprocessing.Process
    output: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or None while it runs."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def text(self, name: str) -> str:
        """Return what it wrote to `stdout` or `stderr` so far."""
        path = self.output / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def result(self) -> CompletedProcess:
        """Return exit code and output so far."""
        return CompletedProcess((), self.returncode, self.text("stdout"), self.text("stderr"))

    def kill(self) -> None:
        """End it and what it started, if anything still runs."""
        with suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait() if isinstance(self.process, subprocess.Popen) else self.process.join()


@contextmanager
def start(words: Sequence[object], folder: Path = ROOT, real: bool = False, **variables: str) -> Iterator[Running]:
    """Start `python WORDS` in a folder with more environment variables; it is killed at the end of the block."""
    environment = os.environ | variables
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    line = [str(word) for word in words]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as output:
        if real or not CAN_FORK:
            with open(Path(output, "stdout"), "wb") as out, open(Path(output, "stderr"), "wb") as err:
                places = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, "cwd": folder}
                process = subprocess.Popen([sys.executable, *line], env=environment, start_new_session=True, **places)
        else:
            context = multiprocessing.get_context("forkserver")
            process = context.Process(target=_run_module, args=(line, folder, environment, output))
            process.start()
        running = Running(process, Path(output))
        try:
            yield running
        finally:
            running.kill()


def wait(running: Sequence[Running], timeout: float = 300) -> list[CompletedProcess]:
    """Wait until all processes have ended, or one has failed and the others may wait for it.

    Raises:
        TimeoutError: One still runs after `timeout` seconds; the message holds what it wrote.
    """
    end = time.monotonic() + timeout
    while None in (codes := [each.returncode for each in running]) and not any(codes):
        if time.monotonic() > end:
            late = next(each.result() for each in running if each.returncode is None)
            raise TimeoutError(f"still running after {timeout} s:\n{late.stdout[-2000:]}\n{late.stderr[-4000:]}")
        time.sleep(0.02)
    return [each.result() for each in running]


def run(words: Sequence[object], folder: Path = ROOT, real: bool = False, **variables: str) -> CompletedProcess:
    """Run `python WORDS` to its end, as `start` does."""
    with start(words, folder, real, **variables) as running:
        return wait([running])[0]


def started_ranks(
    words: Sequence[object], count: int, folder: Path = ROOT, **variables: str
) -> list[AbstractContextManager[Running]]:
    """Return starts of `python WORDS` as `count` processes that know each other, with torchrun's variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    variables |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [start(words, folder, **variables, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]


def run_ranks(words: Sequence[object], count: int, folder: Path = ROOT, **variables: str) -> list[CompletedProcess]:
    """Run `python WORDS` as `started_ranks` does, to its end."""
    with ExitStack() as stack:
        return wait([stack.enter_context(each) for each in started_ranks(words, count, folder, **variables)])


def _run_module(line: list[str], folder: Path, environment: dict[str, str], output: str) -> None:
    """Do in a fork what an interpreter does with this command line."""
    gc.freeze()
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(output, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    subprocess.Popen._execute_child = _start_fork
    _run_line(line, folder, environment)


def _run_line(line: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run `-m MODULE ...` or `-c CODE ...` in a folder, with these environment variables alone."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    kind, program, *words = line
    if kind == "-c":
        sys.argv = [kind, *words]
        module = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), vars(module))  # noqa: S102 (of a test)
    else:
        sys.argv[1:] = words
        sys.path.insert(0, str(folder))
        runpy.run_module(program, run_name="__main__", alter_sys=True)


_start_process = subprocess.Popen._execute_child
_parameters = inspect.signature(_start_process)
_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")


def _start_fork(popen: subprocess.Popen, *values: object) -> None:
    """Start what a `Popen` was given: a fork of this process in place of `python -m` and `python -c`."""
    given = _parameters.bind(popen, *values).arguments
    words = [] if isinstance(given["args"], str) else [os.fspath(word) for word in given["args"]]
    line = words[2:] if words[1:2] == ["-u"] else words[1:]
    if words[:1] != [sys.executable] or line[:1] not in (["-m"], ["-c"]) or given["p2cread"] != -1:
        return _start_process(popen, *values)
    place = Path(given["cwd"] or os.getcwd()), dict(given["env"] or os.environ)
    arguments = (given["c2pwrite"], given["errwrite"], line, *place)
    child = multiprocessing.get_context("fork").Process(target=_run_fork, args=arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    popen.pid = os.fork()
    if popen.pid == 0:
        if given["start_new_session"]:
            os.setsid()
        os._exit(child._bootstrap())
    popen._child_created = True
    popen._close_pipe_fds(*(given[name] for name in _PIPES))


def _run_fork(stdout: int, stderr: int, line: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Be the process that was to be started, with its pipes (-1 is none) and the signals of a new one."""
    for number, pipe in ((1, stdout), (2, stderr)):
        if pipe != -1:
            os.dup2(pipe, number)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _run_line(line, folder, environment)
