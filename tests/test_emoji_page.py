"""docs/emoji.md: its commands are ours, and its files of settings are accepted."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from ptdit_diffusers.cli import build_parser
from ptdit_diffusers.training.own_data import train
from ptdit_diffusers.training.own_data.settings import read_settings
from scripts.datasets.emoji.shards import GROUNDS_EACH
from scripts.emoji.__main__ import parse

PICTURES = 5263  # of training, each in twice GROUNDS_EACH samples, but five that are seen on few grounds
SAMPLES = 42_097
ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "emoji.md").read_text(encoding="utf-8")


def test_every_command_of_the_page_is_accepted():
    lines = [
        line
        for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    known = build_parser()._subparsers._group_actions[0].choices
    for line in lines:
        words = shlex.split(line)
        if words[:3] == ["python", "-m", "scripts.emoji"]:
            parse(words[3:])
        elif words[0] in ("ptdit", "torchrun"):
            assert words[1] in known or words[3:5] == ["-m", train.__name__]
            assert "scripts/configs" not in line or read_settings(ROOT / words[words.index("--config") + 1])
        else:
            assert words[:4] == ["python", "-m", "pip", "install"], words


def test_the_files_of_settings_train_a_model_of_the_size_that_the_page_names():
    settings = read_settings(ROOT / "scripts" / "configs" / "emoji.yaml")
    width = settings.size.heads * settings.size.head_width
    assert round(30 * width**2 * settings.size.layers / 1e6) == 16  # million parameters
    assert settings.vae.hidden_size == 24 and settings.data.licence_column == "licence"
    assert settings.data.group_column == "picture"  # as the tars have it: one picture on several grounds
    decoder = yaml.safe_load((ROOT / "scripts" / "configs" / "emoji-decoder.yaml").read_text(encoding="utf-8"))
    assert decoder["start"] == f"{settings.run.output}/model"


def trained_samples() -> float:
    return SAMPLES * (1 - read_settings(ROOT / "scripts" / "configs" / "emoji.yaml").data.validation)


@pytest.mark.parametrize("name", ["docs/emoji.md", "scripts/emoji/card.md", "scripts/configs/emoji.yaml"])
def test_how_often_a_picture_is_seen_is_counted_in_samples_of_training(name):
    text = (ROOT / name).read_text("utf-8")
    assert 0 <= 2 * GROUNDS_EACH * PICTURES - SAMPLES < 10
    assert f"{PICTURES}" in text and f"once in {trained_samples() / (2 * GROUNDS_EACH):.0f} samples" in text
    assert "emoji.yaml" in name or f"{SAMPLES:,} samples" in text


def test_the_page_counts_the_passes_of_the_settings():
    stages = read_settings(ROOT / "scripts" / "configs" / "emoji.yaml").stages
    small, large = sorted({stage.batch for stage in stages})
    per_pass = {batch: f"{trained_samples() / batch:.0f}" for batch in (small, large)}
    assert f"a pass over the others is {per_pass[small]} steps of {small} or {per_pass[large]} of {large}" in PAGE
    passes = sum(stage.steps * stage.batch for stage in stages) / trained_samples()
    assert f"The steps of the settings are {passes:.0f} passes." in PAGE
