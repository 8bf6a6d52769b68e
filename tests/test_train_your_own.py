"""The first page of docs/train-your-own.md runs as it is written, on drawn pictures and with fewer steps."""

import re
import shlex
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ptdit_diffusers.cli import main
from ptdit_diffusers.training.own_data.settings import OwnDataSettings, StageSettings
from ptdit_diffusers.training.settings import build
from scripts.datasets.shapes import describe, render, sample_scene

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "train-your-own.md").read_text(encoding="utf-8")
BLOCKS = [(match[1], match[2]) for match in re.finditer(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)]
FEWER = ["--set", "stages=[{resolution: 128, steps: 8, batch: 4, lr: 2.0e-4}]", "--set", "text.steps=40"]
FEWER += ["--set", "run.steps=4", "--set", "run.sheet_every=0"]


def commands() -> list[list[str]]:
    return [shlex.split(line) for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]


def call(words: list[str]) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        code = main(words)
    except SystemExit as ended:
        code = ended.code
    assert code == 0, words


@pytest.mark.slow
def test_the_first_page_makes_a_model_of_forty_pictures_in_three_minutes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats").mkdir()
    for index in range(40):
        choice = np.random.default_rng([5, index])
        scene = sample_scene(choice)
        Image.fromarray(render(scene, 128)).save(tmp_path / "cats" / f"{index:04d}.png")
        caption = describe(scene, choice)[0].replace("circle", "tabby").replace("square", "chair")
        (tmp_path / "cats" / f"{index:04d}.txt").write_text(caption, encoding="utf-8")
    (settings, *_) = [text for kind, text in BLOCKS if kind == "yaml"]
    (tmp_path / "cats.yaml").write_text(settings, encoding="utf-8")
    inspect, train, generate = commands()[:3]
    began = time.process_time()
    call(inspect[1:])
    seen = capsys.readouterr().out
    assert "40 pictures" in seen and "'tabby'" in seen and "dB (PSNR" in seen and "train: lora" in seen
    call([*train[1:], *FEWER])
    call([*generate[1:], "--steps", "4"])
    assert time.process_time() - began < 180
    assert Image.open(tmp_path / "ptdit.png").size == (128, 128)
    assert (tmp_path / "runs" / "cats" / "sheet.png").is_file()


def test_every_file_of_settings_on_the_page_is_accepted():
    for kind, text in BLOCKS:
        if kind == "yaml":
            settings = build(OwnDataSettings, yaml.safe_load(text), "the page")
            assert all(isinstance(stage, StageSettings) for stage in settings.stages)


def test_every_command_of_the_page_is_one_of_ours():
    from ptdit_diffusers.cli import build_parser

    known = build_parser()._subparsers._group_actions[0].choices
    for words in commands():
        assert (words[0] == "ptdit" and words[1] in known) or words[0] == "torchrun", words
