"""Fixtures of the fine-tuning tests: a folder of small pictures, and runs of the real script in this process."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SETTINGS = """
rank: 2
batch_size: 2
max_steps: 4
lr: 0.01
log_every: 1
checkpoint_every: 2
precision: fp32
"""


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three squares and two wide pictures, captions beside four of them."""
    folder = tmp_path_factory.mktemp("pictures")
    choice = np.random.default_rng(0)
    for index, size in enumerate([(64, 64), (80, 80), (64, 64), (96, 48), (100, 50)]):
        blocks = choice.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize(size, Image.Resampling.BILINEAR).save(folder / f"{index}.png")
        if index != 2:
            (folder / f"{index}.txt").write_text("a red star", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def cached(pictures, tiny_model_folder, tmp_path_factory) -> Path:
    """A filled cache of those pictures."""
    from lora.precompute import main

    folder = tmp_path_factory.mktemp("cache") / "cache"
    assert main(["--base", str(tiny_model_folder), "--data", str(pictures), "--cache-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def cache(cached, tiny_model_folder):
    """That cache, with the samples that are recorded in it."""
    from lora.base import BaseModel
    from lora.cache import Cache
    from lora.config import LoRASettings
    from lora.precompute import data_settings
    from lora.samples import recorded_samples

    base = BaseModel(str(tiny_model_folder))
    cache = Cache(cached, base)
    cache.require_samples(recorded_samples(cached, data_settings(LoRASettings(output_dir="x"), base)))
    return cache


@pytest.fixture
def train(tiny_model_folder, cached, tmp_path) -> Callable[..., int]:
    """Run the training script on the cache: train("output", "--flag", ...) -> exit code."""
    from accelerate.state import AcceleratorState

    from lora.train import main

    config = tmp_path / "settings.yaml"
    config.write_text(SETTINGS, encoding="utf-8")

    def run(output: str | Path, *flags: str) -> int:
        AcceleratorState._reset_state(True)
        places = ["--base", tiny_model_folder, "--cache-dir", cached, "--output-dir", tmp_path / output]
        return main([str(word) for word in ("--config", config, *places, *flags)])

    return run
