"""The room that a run asks for is near what it takes, and too little is refused before anything is written."""

import shutil
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image

from lora import cache
from lora import train as training
from ptdit_diffusers.training.data import space

Usage = namedtuple("Usage", "total used free")


def test_the_room_that_is_asked_for_is_near_what_is_taken(train, tmp_path, monkeypatch):
    data, asked = tmp_path / "data", {}
    data.mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"{index}.png")
        (data / f"{index}.txt").write_text("a red star above a blue ring, white background " * 3)

    def note(setting, folder, needed):
        asked[setting] = needed

    monkeypatch.setattr(cache, "require_space", note)
    monkeypatch.setattr(training, "require_space", note)
    flags = ["--resolution", "128", "--rank", "64", "--ema", "0.9", "--keep", "2", "--checkpoint-every", "1"]
    assert train("out", "--data", data, "--cache-dir", tmp_path / "cache", "--max-steps", "2", *flags) == 0
    taken = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
    assert 0.7 < asked["cache_dir"] / taken < 1.5
    files = list((tmp_path / "out").rglob("*.pt")) + list((tmp_path / "out").rglob("*.safetensors"))
    taken = sum(path.stat().st_size for path in files)
    taken += max(path.stat().st_size for path in files)  # a third checkpoint is there while it is written
    assert 0.8 < asked["output_dir"] / taken < 1.2


@pytest.mark.parametrize("setting, module", [("output_dir", training), ("cache_dir", cache)], ids=["run", "cache"])
def test_too_little_room_is_refused_before_anything_is_written(
    train, pictures, tmp_path, capsys, monkeypatch, setting, module
):
    require = space.require_space
    for each in (training, cache):
        monkeypatch.setattr(each, "require_space", require if each is module else lambda *_: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 30 * 2**20))
    folder = tmp_path / ("out" if setting == "output_dir" else "cache")
    assert train("out", "--data", pictures, "--cache-dir", tmp_path / "cache", "--max-steps", "1") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"the disk of {setting} {folder} has 30 MiB free; this run needs about 5" in error
    assert not list((tmp_path / "cache").glob("*")) and not list((tmp_path / "out").glob("*.json"))
