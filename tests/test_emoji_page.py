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


@pytest.mark.parametrize("name", ["docs/emoji.md", "scripts/emoji/card.md", "scripts/configs/emoji.yaml"])
def test_passes_are_counted_in_samples_and_pictures_of_training(name):
    settings, text = read_settings(ROOT / "scripts" / "configs" / "emoji.yaml"), (ROOT / name).read_text("utf-8")
    (batch,) = {stage.batch for stage in settings.stages}
    assert 0 <= 2 * GROUNDS_EACH * PICTURES - SAMPLES < 10
    assert f"{PICTURES}" in text and f"in {PICTURES / batch:.0f} steps" in text
    if "card" not in name:
        assert f"{SAMPLES * (1 - settings.data.validation) / batch:.0f} steps" in text
    if "emoji.yaml" not in name:
        assert f"{SAMPLES:,} samples" in text
