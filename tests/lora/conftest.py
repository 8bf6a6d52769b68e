"""Fixtures of the fine-tuning tests: a filled cache, and runs of the real script in this process."""

from collections.abc import Callable
from pathlib import Path

import pytest

SETTINGS = """
rank: 2
batch_size: 2
max_steps: 4
lr: 0.01
log_every: 1
checkpoint_every: 2
precision: fp32
"""
CAPTIONS = ["a red star", "a blue ring above a white square", "two green circles"]


@pytest.fixture(scope="session")
def prompts(tmp_path_factory) -> Path:
    """A file of captions to distill with."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    return path


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
    from lora.cache import Cache
    from lora.config import LoRASettings
    from lora.precompute import data_settings
    from lora.samples import recorded_samples
    from ptdit_diffusers.training.base_model import BaseModel

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
