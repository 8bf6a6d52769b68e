"""Attention maps: the recorded weights are the model's, the measures are right, both figures are drawn."""

import json

import pytest
import torch
from PIL import Image

from scripts.attention_maps import changes, distances, main, recorded, spread_by_distance, window_tokens
from tests.ptdit_diffusers.class_models import tiny_diffit_pipeline, tiny_folder, tiny_pipeline


@pytest.mark.parametrize("pipeline", [tiny_pipeline, tiny_diffit_pipeline])
@torch.no_grad()
def test_recording_changes_nothing_and_gives_shares(pipeline):
    pipe = pipeline()
    options = {"num_inference_steps": 3, "guidance_scale": 1.5, "output_type": "latent"}
    plain = pipe(1, generator=torch.manual_seed(0), **options).images
    processor = pipe.transformer.blocks[1].attn.processor
    with recorded(pipe, 1) as maps:
        seen = pipe(1, generator=torch.manual_seed(0), **options).images
    assert torch.allclose(seen, plain, atol=1e-3)
    assert pipe.transformer.blocks[1].attn.processor is processor
    assert list(maps) == [999.0, 500.0, 0.0]
    for weights in maps.values():
        assert weights.shape == (4, 16, 16) and torch.allclose(weights.sum(-1), torch.ones(4, 16), atol=1e-5)


def test_change_is_the_total_variation_between_timesteps():
    one, other = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    one[..., 0], other[..., 1] = 1, 1
    assert changes({900.0: one, 500.0: one, 100.0: other}) == [0.0, 1.0]


def test_windows_and_distances_count_tokens():
    assert window_tokens(1, 2, 6, 2).tolist() == [8, 9, 14, 15]
    assert distances(1, 2, 6, 2).view(6, 6)[:, 0].tolist() == [2, 2, 2, 2, 2, 3]
    assert (distances(1, 2, 6, 2) == 0).nonzero().flatten().tolist() == [8, 9, 14, 15]


def test_spread_is_zero_where_all_queries_look_alike_and_large_where_they_do_not():
    weights = torch.full((1, 64, 64), 1 / 64)
    assert spread_by_distance(weights) == pytest.approx([0] * 5, abs=1e-5)
    near = weights.clone()
    near[:, torch.arange(64), torch.arange(64)] += 1  # every token looks at itself
    spread = spread_by_distance(near)
    assert spread[0] > 1 and spread[1:] == pytest.approx([0] * 4, abs=1e-5)


@pytest.mark.parametrize("figure", ["timesteps", "windows"])
def test_the_command_draws_and_measures(tmp_path, capsys, figure):
    models = {name: tiny_folder(tmp_path / name, make) for name, make in
              {"dit": tiny_pipeline, "diffit": tiny_diffit_pipeline}.items()}  # fmt: skip
    words = [figure, *(word for folder in models.values() for word in ("--model", str(folder))), "--class", "red star"]
    output, numbers = tmp_path / "maps.png", tmp_path / "maps.json"
    words += ["--steps", "4", "--output", str(output)]
    assert main([*words, "--json", str(numbers)]) == 0
    with Image.open(output) as picture:
        assert min(picture.size) > 200
    found = json.loads(numbers.read_text(encoding="utf-8"))
    assert list(found) == ["dit", "diffit"] and found["dit"]["timesteps"] == [999.0, 666.0, 333.0, 0.0]
    assert len(found["dit"].get("changes", found["dit"].get("spread_by_distance"))) == (
        3 if figure == "timesteps" else 1
    )
    capsys.readouterr()
    assert main([*words, "--block", "7"]) == 2
    assert "--block 7 must be 0 to 1; nearest: 1" in capsys.readouterr().err


def test_models_of_prompts_are_refused(tmp_path, capsys):
    words = ["timesteps", "--model", "shapes-128", "--class", "1", "--output", str(tmp_path / "maps.png")]
    assert main(words) == 2
    assert "shapes-128 is no class-conditional transformer" in capsys.readouterr().err
    assert not (tmp_path / "maps.png").exists()
