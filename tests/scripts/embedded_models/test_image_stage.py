"""The stage of the image-space model: it trains through the real script, resumes exactly, and exports a pipeline."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from ptdit_diffusers import DiffiTImagePipeline
from ptdit_diffusers.training.checkpoint import load_checkpoint
from ptdit_diffusers.training.settings import load_settings
from scripts import train
from scripts.datasets.shapes import CLASSES
from scripts.embedded_models.image_stage import ImageStage, ImageStageSettings

pytestmark = pytest.mark.slow
CONFIGS = Path(__file__).resolve().parents[3] / "scripts" / "configs"
SIZES = {
    "sample_size": 32,
    "block_out_channels": [8, 16],
    "layers_per_block": [1, 1],
    "window_size": 4,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "time_embed_dim": 16,
}


def write_config(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    section = {
        "output_dir": str(folder / "run"),
        "export_dir": str(folder / "export"),
        "seed": 1,
        "steps": 3,
        "batch_size": 4,
        "warmup": 1,
        "log_every": 1,
        "sheet_every": 0,
        "model": SIZES,
        "data": {"steps": 1},
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"diffit_image": section}), encoding="utf-8")
    return config


def run(folder: Path, *flags: str) -> Path:
    assert train.main(["--config", str(write_config(folder)), "--stage", "diffit_image", *flags]) == 0
    return folder


def test_the_export_is_a_pipeline_that_makes_pictures_of_named_classes(tmp_path):
    folder = run(tmp_path)
    pipe = DiffiTImagePipeline.from_pretrained(folder / "export")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("red star", num_inference_steps=2, generator=torch.manual_seed(0)).images[0].size == (32, 32)
    assert str(tmp_path) not in (folder / "export" / "unet" / "config.json").read_text(encoding="utf-8")
    assert len(list((folder / "run" / "sheets").glob("*.png"))) == 1
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any("held_out_loss" in line for line in lines)


def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path):
    whole = load_checkpoint(run(tmp_path / "whole") / "run")
    run(tmp_path / "parts", "--set", "stop_after=1")
    parts = load_checkpoint(run(tmp_path / "parts") / "run")
    assert parts["step"] == whole["step"] == 3
    assert all(torch.equal(value, parts["model"][name]) for name, value in whole["model"].items())


def test_batches_show_the_classes_of_their_labels_and_depend_on_the_step_only(tmp_path):
    settings = load_settings(write_config(tmp_path), "diffit_image", ImageStageSettings, {})
    stage = ImageStage(settings, torch.device("cpu"))
    first, again, next_one = stage.batch(0, 0, 4), stage.batch(0, 0, 4), stage.batch(1, 0, 4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pictures"], next_one["pictures"])
    assert first["pictures"].shape == (4, 3, 32, 32) and first["pictures"].abs().max() <= 1
    for picture, label in zip(first["pictures"], first["labels"], strict=True):
        color = CLASSES[label].split()[0]
        inside = picture.flatten(1).mT.unique(dim=0)
        if color in ("black", "white"):  # the figure's own tone is among the pixels
            assert (inside.sum(1).min() < -2) if color == "black" else (inside.sum(1).max() > 2)


def test_the_published_configuration_is_legal_and_its_weights_stay_below_12_mb():
    settings = load_settings(CONFIGS / "figures.yaml", "diffit_image", ImageStageSettings, {})
    stage = ImageStage(settings, torch.device("cpu"))
    assert 2 * sum(parameter.numel() for parameter in stage.model.parameters()) < 12e6
