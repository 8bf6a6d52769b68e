"""A folder of drawn pictures with captions, and a file of settings that trains on it in seconds."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from scripts.datasets.shapes import describe, render, sample_scene


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty drawn pictures; 30 are squares, 10 are wide."""
    folder = tmp_path_factory.mktemp("own") / "cats"
    folder.mkdir()
    for index in range(40):
        choice = np.random.default_rng([5, index])
        scene = sample_scene(choice)
        picture = Image.fromarray(render(scene, 128))
        if index % 4 == 3:
            picture = picture.resize((128, 40))
        picture.save(folder / f"{index:04d}.png")
        caption, _ = describe(scene, choice)
        (folder / f"{index:04d}.txt").write_text(caption, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def write_config(drawn: Path, tiny_model_folder: Path) -> Callable[..., Path]:
    """Write settings of a small run in a folder: write_config(folder, output, run={"seed": 1}, ...) -> file."""

    def write(folder: Path, output: str = "out", **sections: Any) -> Path:
        values: dict[str, Any] = {
            "data": {"source": str(drawn), "validation": 0.1, "flip": True, "encoded": str(folder / "encoded")},
            "start": str(tiny_model_folder),
            "stages": [{"resolution": 64, "steps": 12, "batch": 6, "lr": 1e-3}],
            "run": {"output": str(folder / output), "log_every": 1, "checkpoint_every": 4, "sheet_every": 0},
        }
        values["run"] |= {"sheet": ["a red star"], "steps": 2, "snapshots": 4, "precision": "fp32"}
        for name, section in sections.items():
            values[name] = values[name] | section if isinstance(values.get(name), dict) else section
        path = folder / f"{output}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


@pytest.fixture
def config(write_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Write settings of a small run: config(output, run={"seed": 1}, ...) -> file."""
    return partial(write_config, tmp_path)
