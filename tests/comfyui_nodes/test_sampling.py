"""Tests of comfyui_nodes/sampling.py: official noise levels, legal sizes."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from comfyui_nodes.sampling import latent_frames, latent_shape, official_sigmas, shift_for, size_for


@pytest.mark.parametrize("latent, shift", [((64, 64, 1), 1), ((128, 128, 1), 2), ((64, 64, 5), 5**0.5)])
def test_the_shift_is_the_official_one(latent, shift):
    assert shift_for(*latent, base_tokens=1024) == pytest.approx(shift)


def test_noise_levels_are_those_of_the_pipelines_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1 - i / 30 for i in range(30)], mu=float(torch.tensor(2.0).log()))
    torch.testing.assert_close(official_sigmas(30, 2.0), scheduler.sigmas, atol=1e-6, rtol=0)


def test_denoise_keeps_the_last_levels():
    assert torch.equal(official_sigmas(5, 2.0, denoise=0.5), official_sigmas(10, 2.0)[-6:])
    assert official_sigmas(5, 2.0, denoise=0.0).numel() == 0


def test_sizes_are_multiples_of_sixteen_and_presets_keep_the_number_of_pixels():
    assert size_for("custom", 1001, 30) == (1008, 32)
    width, height = size_for("16:9", 1024, 1024)
    assert (width, height) == (1360, 768) and abs(width * height / 1024**2 - 1) < 0.02


def test_frames_that_no_clip_has_are_refused():
    assert [latent_frames(length) for length in (1, 5, 17)] == [1, 2, 5]
    with pytest.raises(ValueError, match="length=24 is not 4n \\+ 1.*nearest: 21 or 25"):
        latent_frames(24)


def test_pictures_have_four_axes_and_videos_and_views_five():
    assert latent_shape(128, 96, length=1, views=0, batch_size=3) == (3, 4, 12, 16)
    assert latent_shape(128, 96, length=17, views=0, batch_size=1) == (1, 4, 5, 12, 16)
    assert latent_shape(96, 96, length=1, views=1, batch_size=2) == (2, 4, 1, 12, 12)
