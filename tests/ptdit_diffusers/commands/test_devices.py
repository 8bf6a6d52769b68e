"""`ptdit generate` on several devices: the picture of one, and errors that end all of them within seconds."""

import os
import re
import shlex
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributed as dist

from ptdit_diffusers.cli import main
from tests.processes import run, run_ranks, start, started_ranks, wait

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
PROMPT = "a red circle above a green star"
CLI = ["-m", "ptdit_diffusers.cli", "generate", PROMPT, "--device", "cpu"]
needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def assert_same_picture(one: Path, other: Path) -> None:
    with Image.open(one) as first, Image.open(other) as second:
        first, second = (np.asarray(each).astype(int) for each in (first, second))
    assert first.shape == second.shape
    assert np.abs(first - second).max() <= 1 and np.mean(first != second) < 0.01  # products of other shapes


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "options", "said"),
    [
        (2, (), "devices: 2, 1 for the negative prompt, 1 for the prompt"),
        (3, ("--num-frames", "9", "--output", "clip", "--height", "32"), "devices: 3, all for each step"),
        (4, ("--width", "96"), "devices: 4, 2 for the negative prompt, 2 for the prompt"),
    ],
    ids=str,
)
def test_processes_that_share_a_call_make_the_picture_of_one(tiny_model_folder, tmp_path, count, options, said):
    words = [*CLI, "--model", tiny_model_folder, "--steps", "2", "--output", "a.png", *options]
    (tmp_path / "one").mkdir()
    (tmp_path / "several").mkdir()
    alone = run(words, tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    several = run_ranks(words, count, folder=tmp_path / "several")
    assert [each.returncode for each in several] == [0] * count, several[0].stderr
    assert said in several[0].stdout.splitlines()
    assert not any(each.stdout for each in several[1:])  # the first speaks for all
    made, expected = (sorted((tmp_path / folder).rglob("*.png")) for folder in ("several", "one"))
    assert len(made) == len(expected) > 0
    for one, other in zip(made, expected, strict=True):
        assert_same_picture(one, other)


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "speaker", "said"),
    [
        ("prompt", 0, "ptdit: the devices have different prompts: give all processes the same prompt, size and seed"),
        ("load", 1, "ptdit: device 2 of 2: the model cannot be loaded here"),
        ("memory", 1, "ptdit: device 2 of 2: out of GPU memory; try a smaller"),
        ("kill", 0, "ptdit: another device has ended; what it said comes before this line"),
        ("NaN", 0, "hold NaN or infinite values"),
    ],
)
def test_a_fault_of_one_device_ends_all(tiny_model_folder, tmp_path, fault, speaker, said):
    words = [*CLI, "--model", tiny_model_folder, "--steps", "2", "--output", tmp_path / "a.png"]
    words[1] = "tests.ptdit_diffusers.commands.faulty_device"
    with ExitStack() as stack:
        both = [stack.enter_context(each) for each in started_ranks(words, 2, FAULT=fault)]
        wait(both, timeout=100)  # for the first to end
        begun = time.monotonic()
        while said not in both[speaker].text("stderr") and time.monotonic() < begun + 30:
            time.sleep(0.05)
        assert said in both[speaker].text("stderr"), [each.result() for each in both]
        code = both[speaker].returncode if speaker else wait([both[0]], timeout=30)[0].returncode
    assert code == 2
    assert not list(tmp_path.iterdir())


@needs_gloo
@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no Ctrl-C that can be sent to one process")
def test_devices_starts_the_processes_and_ctrl_c_ends_them(tiny_model_folder, tmp_path):
    words = [*CLI, "--model", tiny_model_folder, "--devices", "2", "--output", tmp_path / "a.png", "--steps"]
    done = run([*words, "2"])
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert done.stdout.count("saved") == 1
    with start([*words, "100000", "--overwrite", "--yes"]) as running:
        while "/100000" not in running.text("stderr") and running.returncode is None:
            time.sleep(0.05)
        os.kill(running.pid, signal.SIGINT)
        begun = time.monotonic()
        (stopped,) = wait([running])
    assert time.monotonic() - begun < 30
    assert stopped.returncode == 130 and "Traceback" not in stopped.stderr, stopped.stderr
    assert stopped.stderr.count("ptdit: interrupted") == 1


@needs_gloo
@pytest.mark.slow
def test_the_command_of_the_docs_runs_under_torchrun(tmp_path):
    (line,) = re.findall(r"^torchrun (.* generate .*)$", PAGE, re.MULTILINE)
    further = ["--device", "cpu", "--steps", "2"]
    done = run([*TORCHRUN, *shlex.split(line), *further], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "devices: 4, 2 for the negative prompt, 2 for the prompt" in done.stdout.splitlines()
    (one,) = re.findall(r"^ptdit (generate .*) --devices 4 (.*)$", PAGE, re.MULTILINE)  # the same, on one device
    words = [*shlex.split(" ".join(one)), *further, "--output", str(tmp_path / "one.png")]
    assert main(words) == 0
    assert_same_picture(tmp_path / "circle.png", tmp_path / "one.png")


@needs_gloo
@pytest.mark.slow
def test_torchrun_ends_all_processes_when_one_fails(tiny_model_folder, tmp_path):
    words = [*CLI, "--model", tiny_model_folder, "--output", tmp_path / "a.png", "--steps", "2"]
    words[1] = "tests.ptdit_diffusers.commands.faulty_device"
    done = run([*TORCHRUN, "--nproc-per-node", "2", *words], FAULT="memory")
    assert done.returncode == 1
    assert "ptdit: device 2 of 2: out of GPU memory" in done.stderr
    assert not list(tmp_path.iterdir())


@needs_gloo
@pytest.mark.slow
def test_the_script_of_the_docs_makes_the_picture_of_one(tmp_path):
    (script,) = re.findall(r"^```text\n# run.py\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "run.py").write_text(script.replace('"a red circle",', '"a red circle", num_inference_steps=2,'))
    for done in run_ranks(["-m", "run"], 4, folder=tmp_path):
        assert done.returncode == 0, done.stderr
    words = ["generate", "a red circle", "--device", "cpu", "--steps", "2", "--output", str(tmp_path / "one.png")]
    assert main(words) == 0
    assert_same_picture(tmp_path / "picture.png", tmp_path / "one.png")


def test_a_number_of_devices_that_cannot_be_is_one_line(tiny_model_folder, tmp_path, monkeypatch, capsys):
    words = ["generate", PROMPT, "--model", str(tiny_model_folder), "--output", str(tmp_path / "a.png")]

    def said(*options: str) -> str:
        assert main([*words, *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "--devices: 0 is not a whole number of at least 1" in said("--devices", "0").replace("argument ", "")
    monkeypatch.setattr("ptdit_diffusers.commands.devices.run_processes", None)  # none is started
    longest = "--devices 34: 1 x 4 x 4 tokens (frames, rows, columns) cannot be shared by so many; nearest: 8"
    assert longest in said("--device", "cpu", "--devices", "34")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "--devices 3: there are 2 CUDA GPUs; nearest: 2" in said("--device", "cuda", "--devices", "3")
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    assert "comes without gloo; leave it out" in said("--device", "cpu", "--devices", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "34")
    assert "--devices 2: 34 processes were started; leave it out, or give 34" in said("--devices", "2")
    assert longest in said("--device", "cpu")
