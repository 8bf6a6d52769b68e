"""Fine-tuning on clips and pictures together: the cache, the run, and a file that moves the video pipeline."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lora.precompute import main as precompute
from lora.train import main as train
from ptdit_diffusers import PTDiTPipeline
from tests.processes import run_ranks


@pytest.fixture
def clips(tmp_path):
    """Two clips of six frames and a picture, with captions."""
    folder, choice = tmp_path / "clips", np.random.default_rng(0)
    folder.mkdir()
    for name in ("one.gif", "two.gif", "three.png"):
        blocks = choice.integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
        frames = [Image.fromarray(block).resize((64, 64), Image.Resampling.NEAREST) for block in blocks]
        more = {"save_all": True, "append_images": frames[1:]} if name.endswith("gif") else {}
        frames[0].save(folder / name, **more)
        (folder / name).with_suffix(".txt").write_text("a red star", encoding="utf-8")
    return folder


def test_a_lora_is_trained_on_clips_and_pictures_and_changes_the_clips_of_the_pipeline(
    clips, tiny_model_folder, tmp_path
):
    shared = ["--base", str(tiny_model_folder), "--cache-dir", str(tmp_path / "cache"), "--num-frames", "5"]
    assert precompute([*shared, "--data", str(clips)]) == 0
    steps = ["--max-steps", "4", "--rank", "2", "--lr", "0.01", "--log-every", "1", "--precision", "fp32"]
    settings = [
        "--config",
        "lora/configs/video-24gb.yaml",
        "--resolution",
        "64",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert train([*settings, *shared, *steps, "--accumulation", "1", "--workers", "0", "--warmup", "0"]) == 0
    lines = (tmp_path / "out" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4 and all(np.isfinite(json.loads(line)["loss"]) for line in lines)
    pipe = PTDiTPipeline.from_pretrained(tiny_model_folder)
    pipe.set_progress_bar_config(disable=True)

    def latents() -> torch.Tensor:
        settings = {"num_inference_steps": 2, "generator": torch.manual_seed(0), "output_type": "latent"}
        return pipe("a red star", num_frames=5, **settings).frames

    plain = latents()
    pipe.load_lora_weights(tmp_path / "out" / "lora")
    assert (latents() - plain).abs().max() > 1e-4


@pytest.mark.slow
def test_two_processes_that_share_each_clip_learn_what_one_learns(clips, tiny_model_folder, tmp_path):
    shared = ["--base", str(tiny_model_folder), "--cache-dir", str(tmp_path / "cache"), "--num-frames", "5"]
    assert precompute([*shared, "--data", str(clips)]) == 0
    flags = "--max-steps 3 --rank 2 --lr 0.01 --precision fp32 --accumulation 1 --workers 0 --warmup 0".split()
    words = ["--config", "lora/configs/video-24gb.yaml", "--resolution", "64", *shared, *flags]
    line = ["-m", "lora.train", *words, "--context-parallel", "2", "--output-dir", tmp_path / "two"]
    for done in run_ranks(line, 2, ACCELERATE_USE_CPU="true"):
        assert done.returncode == 0, done.stderr
    assert train([*words, "--output-dir", str(tmp_path / "one")]) == 0
    one, two = (load_file(tmp_path / name / "lora" / "pytorch_lora_weights.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=2e-4, rtol=1e-3)
