"""The comparison of DiT with diffusers' class runs the same weights through both."""

import json

import pytest
import torch
from PIL import Image

from ptdit_diffusers import DiT2DModel
from scripts.benchmarks.dit_in_diffusers import in_diffusers, main
from tests.ptdit_diffusers import dit_goldens
from tests.ptdit_diffusers.class_models import tiny_folder


def test_diffusers_class_gets_every_weight(tmp_path):
    transformer = dit_goldens.model("dit_sampler")
    in_diffusers(transformer).save_pretrained(tmp_path)
    again = DiT2DModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in transformer.state_dict().items())


@pytest.mark.slow
def test_the_command_writes_numbers_and_a_picture(tmp_path):
    files = ["--output", str(tmp_path / "numbers.json"), "--picture", str(tmp_path / "pictures.png")]
    folder = str(tiny_folder(tmp_path / "model"))
    assert main(["--model", folder, "--steps", "4", "--guidance", "4", "--classes", "1", "2", *files]) == 0
    rows = json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8"))["rows"]
    exact, network, all_channels = (row["latents_rms"] for row in rows.values())
    assert exact == 0 and min(network, all_channels) > 0.01
    assert Image.open(tmp_path / "pictures.png").size == (2 * 64, 3 * 64)
