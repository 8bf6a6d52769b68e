"""Prior pictures: named by everything they depend on."""

import shutil

import pytest
import torch

from lora.config import LoRASettings
from lora.validate import generate_prior, read_prompts
from ptdit_diffusers.training.base_model import BaseModel

CPU = torch.device("cpu")


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "prior.txt").write_text("a red star\n\na blue ring with\u2028two lines\n", encoding="utf-8")
    return {"output_dir": "x", "cache_dir": str(tmp_path / "cache"), "prior_prompts": str(tmp_path / "prior.txt")}


@pytest.mark.slow
def test_prior_pictures_are_made_again_for_another_base_seed_or_size_and_not_otherwise(
    settings, tiny_model_folder, tmp_path
):
    base = BaseModel(str(tiny_model_folder))
    other = shutil.copytree(tiny_model_folder, tmp_path / "other")
    (weights,) = (other / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x00\x3f")
    first = generate_prior(base, LoRASettings(**settings), CPU)
    assert [prompt for _, prompt in first] == ["a red star", "a blue ring with\u2028two lines"]
    times = [path.stat().st_mtime_ns for path, _ in first]
    for model, more in ((base, {"seed": 1}), (base, {"resolution": 32}), (BaseModel(str(other)), {})):
        made = generate_prior(model, LoRASettings(**settings, **more), CPU)
        assert not set(made) & set(first) and all(path.is_file() for path, _ in made)
    assert generate_prior(base, LoRASettings(**settings), CPU) == first
    assert [path.stat().st_mtime_ns for path, _ in first] == times
    first[0][0].write_bytes(first[0][0].read_bytes()[:100])  # damaged ones are made again
    generate_prior(base, LoRASettings(**settings), CPU)
    assert first[0][0].stat().st_size > 100


def test_prompts_that_cannot_be_read_are_refused(tmp_path):
    assert read_prompts("") == []
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="a.txt is not UTF-8"):
        read_prompts(str(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_bytes(b"\n \n")
    with pytest.raises(ValueError, match="a.txt holds no prompts"):
        read_prompts(str(tmp_path / "a.txt"))
