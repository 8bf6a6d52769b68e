"""Processes of the tests: real interpreters, and forks of one process that has imported the libraries.

Starting an interpreter that imports torch, diffusers and transformers costs about five seconds of CPU time. A fork
takes a command line as an interpreter does, `-m MODULE ...` or `-c CODE`, and has its own folder, environment, output
and process group. Variables that those libraries read while they are imported (HF_HOME, HF_ENDPOINT, ...) and the
start-up of a command need a real interpreter.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

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
)
CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()  # not on Windows


@dataclass
class Running:
    """A process that was started; its output goes to two files."""

    process: subprocess.Popen | multiprocessing.Process
    folder: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stdout(self) -> str:
        return self._text("stdout")

    @property
    def stderr(self) -> str:
        return self._text("stderr")

    def _text(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    @property
    def returncode(self) -> int | None:
        """The exit code, or None while it runs."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def wait(self, timeout: float = 300) -> int:
        """Wait for the end of the process and return its exit code.

        Raises:
            TimeoutError: It still runs after `timeout` seconds; the message ends with what it wrote.
        """
        end = time.monotonic() + timeout
        while self.returncode is None:
            if time.monotonic() > end:
                raise TimeoutError(f"still running after {timeout} s:\n{self.stdout[-2000:]}\n{self.stderr[-4000:]}")
            time.sleep(0.02)
        return self.returncode


@contextmanager
def start(words: Sequence[object], folder: Path = ROOT, real: bool = False, **variables: str) -> Iterator[Running]:
    """Start `python WORDS` in a folder with more environment variables; the block's end kills what still runs."""
    environment = os.environ | variables
    path = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    line = [str(word) for word in words]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as output:
        if real or not CAN_FORK:
            with open(Path(output, "stdout"), "wb") as out, open(Path(output, "stderr"), "wb") as err:
                process = subprocess.Popen(
                    [sys.executable, *line], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out,
                    stderr=err, start_new_session=True,
                )  # fmt: skip
        else:
            context = multiprocessing.get_context("forkserver")
            process = context.Process(target=_be_python, args=(line, folder, environment, output))
            process.start()
        try:
            yield Running(process, Path(output))
        finally:
            with suppress(ProcessLookupError, PermissionError):  # its group, launchers' children too
                os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
            process.wait() if isinstance(process, subprocess.Popen) else process.join()


def run(words: Sequence[object], folder: Path = ROOT, real: bool = False, **variables: str) -> Running:
    """Run `python WORDS` to its end, as `start` does."""
    with start(words, folder, real, **variables) as running:
        running.wait()
        return subprocess.CompletedProcess(list(words), running.returncode, running.stdout, running.stderr)


def _be_python(line: list[str], folder: Path, environment: dict[str, str], output: str) -> None:
    """Behave as an interpreter with this command line. Runs in a fork."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(output, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    kind, what, *sys.argv[1:] = line
    sys.path[:0] = [str(folder)]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = kind
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
