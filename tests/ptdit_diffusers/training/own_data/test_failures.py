"""What goes wrong in a night: a full disk, Ctrl-C, a kill while pictures are encoded, two runs into one folder."""

import errno
import json
import logging
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from ptdit_diffusers.training import checkpoint
from ptdit_diffusers.training.data.encode import PictureEncoder
from ptdit_diffusers.training.own_data import encode, train
from ptdit_diffusers.training.processes import lock_folder
from tests.processes import start, wait


def run(config: Path, *overrides: str) -> int:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    words = [word for item in ("run.sheet=[]", *overrides) for word in ("--set", item)]
    return train.main(["--config", str(config), *words])


def test_a_checkpoint_in_the_background_has_the_weights_of_its_step(config, tmp_path, monkeypatch):
    save = torch.save

    def slow(state, file, *rest):
        log = tmp_path / "slow" / "log.jsonl"
        while state["step"] == 4 and '"step": 7,' not in log.read_text(encoding="utf-8"):
            time.sleep(0.01)  # for ever if the training waited
        save(state, file, *rest)
        save(state, file, *rest)

    assert run(config("plain"), "run.stop_after=4") == 0
    monkeypatch.setattr(checkpoint.torch, "save", slow)
    assert run(config("slow"), "run.async=true", "run.keep=9", "run.stop_after=8") == 0
    one, two = (torch.load(tmp_path / name / "checkpoint-00000004" / "state.pt") for name in ("plain", "slow"))
    for name in ("model", "ema"):
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0)
    torch.testing.assert_close(one["optimizers"][0]["state"], two["optimizers"][0]["state"], rtol=0, atol=0)


@pytest.mark.parametrize("background, end", [("false", 8), ("true", 12)])
def test_a_full_disk_ends_the_run_in_one_line_and_the_last_checkpoint_stays(
    config, tmp_path, capsys, monkeypatch, background, end
):
    save = torch.save

    def full(state, file, *rest):
        if state["step"] > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, file, *rest)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    assert run(config(), f"run.async={background}") == 1
    message = capsys.readouterr().err
    assert f"stopped at step {end}" in message
    assert "No space left on device" in message and "the last sound checkpoint is checkpoint-00000004" in message
    assert "the same command goes on from there" in message
    assert [each.name for each in (tmp_path / "out").glob("*checkpoint-*")] == ["checkpoint-00000004"]
    monkeypatch.undo()
    assert run(config()) == 0


def test_encoding_that_is_interrupted_goes_on_with_the_rest(config, tmp_path, capsys, monkeypatch):
    add, path = PictureEncoder.add, str(config())

    def interrupted(self, picture):
        if len(self.found) == 25:
            raise KeyboardInterrupt
        add(self, picture)

    monkeypatch.setattr(PictureEncoder, "add", interrupted)
    assert encode.main(["--config", path]) == 130
    assert "interrupted; what was encoded and saved is kept" in capsys.readouterr().err
    monkeypatch.undo()
    counts = []
    finish = PictureEncoder.encode
    monkeypatch.setattr(PictureEncoder, "encode", lambda self, all: (finish(self, all), counts.append(self.encoded)))
    assert encode.main(["--config", path]) == 0
    assert counts == [15]
    (index,) = (tmp_path / "encoded").rglob("manifest.json")
    assert json.loads(index.read_text(encoding="utf-8"))["count"] == 40


def test_two_runs_never_write_into_one_folder(config, tmp_path, capsys):
    with lock_folder(tmp_path / "out", "test"):
        assert run(config()) == 2
    assert "is in use by another run" in capsys.readouterr().err


def test_a_folder_of_another_kind_of_run_is_refused(config, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{}", encoding="utf-8")
    assert run(config()) == 2
    assert "holds a run of another kind" in capsys.readouterr().err


def test_one_picture_without_a_caption_is_trained_on_without_held_out_ones(config, drawn, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = tmp_path / "one"
    data.mkdir()
    (data / "a.png").write_bytes((drawn / "0000.png").read_bytes())
    assert run(config(data={"source": str(data)}), "stages=[{resolution: 64, steps: 2, batch: 3, lr: 0.001}]") == 0
    assert "1 samples" in caplog.text and "nothing is held out" in caplog.text
    assert "1 of 1 have no caption and get data.default_caption=''" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that can be sent to one process")
def test_a_stop_signal_saves_the_step_and_the_same_command_goes_on(config, tmp_path):
    words = ["-m", "ptdit_diffusers.training.own_data.train", "--config", config(), "--set", "run.sheet=[]"]
    words += ["--set", "stages=[{resolution: 64, steps: 100000, batch: 6, lr: 0.001}]"]
    with start(words, ACCELERATE_USE_CPU="1") as running:
        log = tmp_path / "out" / "log.jsonl"
        while not (log.exists() and '"loss"' in log.read_text(encoding="utf-8")) and running.returncode is None:
            time.sleep(0.05)
        os.kill(running.pid, signal.SIGTERM)
        (done,) = wait([running])
    assert done.returncode == 0 and "the same command goes on" in done.stderr, done.stderr
    (saved,) = (tmp_path / "out").glob("checkpoint-*")
    assert f"stopped at step {int(saved.name[-8:])} of 100000" in done.stderr
