"""Noise levels, lists of timesteps and guidance against the official code."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ptdit_diffusers.core.diffusion import (
    guide_classes,
    linear_alphas_cumprod,
    linear_betas,
    power_cosine,
    respaced_betas,
    respaced_timesteps,
)
from tests.ptdit_diffusers import diffit_goldens, dit_goldens

KNOWN = json.loads((dit_goldens.FOLDER / "timesteps.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("respacing", KNOWN["timesteps"])
def test_timesteps_are_those_of_the_official_sampler(respacing):
    assert respaced_timesteps(respacing) == KNOWN["timesteps"][respacing]


def test_the_official_sum_of_strides_rounds_in_another_way_than_linspace_for_some_numbers():
    other = {}
    for number in range(1, 1001):
        listed = respaced_timesteps(number)
        assert len(set(listed)) == number
        spread = np.linspace(0, 999, number).round().astype(int)[::-1]
        if (different := int((np.array(listed) != spread).sum())) and number > 1:
            other[number] = different
    assert other == {number: entries for number, _, entries in KNOWN["N_where_numpy_linspace_rounding_differs"]}


def test_whole_strides_exist_for_some_numbers_only():
    for number in range(1, 1001):
        if number in KNOWN["ddimN_valid"]:
            assert len(respaced_timesteps(f"ddim{number}")) == number
        else:
            with pytest.raises(ValueError, match=rf"no whole stride takes {number} of 1000 .*nearest: ddim\d+"):
                respaced_timesteps(f"ddim{number}")


def test_sections_and_all():
    assert respaced_timesteps("2,1,3") == [999, 833, 667, 334, 333, 0]
    assert respaced_timesteps("") == list(range(1000))[::-1]
    for wrong in ("0", "ten", "10,", "ddim"):
        with pytest.raises(ValueError, match="must be like .250., .10,20,30. or .ddim50., numbers from 1 on"):
            respaced_timesteps(wrong)
    with pytest.raises(ValueError, match="1001 timesteps cannot be taken from 1000 .*nearest: 1000"):
        respaced_timesteps(1001)


@pytest.mark.parametrize("number", [1000, 250, 50, 10])
def test_noise_levels_equal_the_golden(number):
    golden = load_file(dit_goldens.FOLDER / "schedule.safetensors")
    betas = respaced_betas(respaced_timesteps(number))
    assert (betas - golden[f"N{number}.betas"]).abs().max() < 1e-10
    assert (torch.cumprod(1 - betas, 0) - golden[f"N{number}.alphas_cumprod"]).abs().max() < 1e-10
    if number == 1000:
        assert (linear_betas() - golden["N1000.betas"]).abs().max() < 1e-15
        assert (linear_alphas_cumprod() - golden["N1000.alphas_cumprod"]).abs().max() < 1e-15


@pytest.mark.parametrize("case", ["dit_p2", "dit_p4"])
@torch.no_grad()
def test_guidance_equals_the_golden_on_three_channels_and_on_all(case):
    tensors, transformer = dit_goldens.load(case), dit_goldens.model(case)
    first = tensors["cfg.x"].chunk(2)[0]
    predicted = transformer(torch.cat([first, first]), tensors["cfg.t"], tensors["cfg.y"]).sample
    assert (predicted - tensors["cfg.model_out_unguided"]).abs().max() < dit_goldens.LIMIT
    for channels, name in ((3, "cfg.out_3_channels"), (4, "cfg.out_all_channels")):
        guided, expected = guide_classes(predicted, 4.0, channels), tensors[name].chunk(2)[0]
        assert guided.shape == expected.shape and (guided - expected).abs().max() < 4 * dit_goldens.LIMIT
    assert torch.equal(guide_classes(predicted, torch.full((2, 1, 1, 1), 4.0), 3), guide_classes(predicted, 4.0, 3))


def test_power_cosine_equals_the_official_values_at_every_timestep():
    golden = diffit_goldens.load("guidance")
    timesteps, every = golden["timesteps_250"], torch.arange(1000)
    for name, scale, steps in (("4.4", 4.4, timesteps), ("4.6", 4.6, timesteps)):
        assert (power_cosine(steps, scale) - golden[f"w_250_scale_{name}"]).abs().max() < 1e-6
    assert (power_cosine(every, 4.4) - golden["w_all_1000_scale_4.4"]).abs().max() < 1e-6
    ten = torch.tensor(respaced_timesteps(10))
    assert (power_cosine(ten, 4.4, 1.0) - golden["w_10_scale_4.4_pow_1"]).abs().max() < 1e-6
    assert (power_cosine(timesteps, 4.4) == 1).sum() == 24  # the first steps are not guided at all


@pytest.mark.parametrize(
    ("case", "output", "power"),
    [("diffit_p2", "out", 4.0), ("diffit_p2", "out_scale_pow_1", 1.0), ("diffit_constant_cfg", "out", None)],
)
@torch.no_grad()
def test_guidance_of_diffit_equals_the_golden(case, output, power):
    tensors, transformer, scale = diffit_goldens.load(case), diffit_goldens.model(case), 4.4
    first, timesteps = tensors["cfg.x"].chunk(2)[0], tensors["cfg.t"]
    assert tensors["cfg.scale"].item() == pytest.approx(scale)
    predicted = transformer(torch.cat([first, first]), timesteps, tensors["cfg.y"]).sample
    strength = scale if power is None else power_cosine(timesteps[:2], scale, power).view(-1, 1, 1, 1)
    guided = guide_classes(predicted, strength, 3)
    assert (guided - tensors[f"cfg.{output}"].chunk(2)[0]).abs().max() < diffit_goldens.LIMIT
