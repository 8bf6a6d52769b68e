"""EDM's preconditioning, noise levels and Heun sampler, on data for which the exact answer is known."""

import math

import pytest
import torch
from diffusers import EDMEulerScheduler

from ptdit_diffusers.core.edm import denoised, heun_step, noise_levels, preconditioning, state_dtype

SPREAD = 0.5  # of normally distributed data, whose best denoiser is known


def best(noisy: torch.Tensor, level: float) -> torch.Tensor:
    return noisy * SPREAD**2 / (SPREAD**2 + level**2)


def sample(steps: int) -> tuple[torch.Tensor, int]:
    """The end of the path from 80 * (1, -2), and the evaluations of the denoiser."""
    levels, calls = noise_levels(steps), []
    state = torch.tensor([1.0, -2.0], dtype=torch.float64) * levels[0]
    for level, lower in zip(levels, levels[1:], strict=False):
        state = heun_step(lambda x, at: calls.append(at) or best(x, at), state, level, lower)
    return state, len(calls)


def test_heun_goes_to_the_exact_end_with_an_error_of_second_order():
    exact = torch.tensor([1.0, -2.0], dtype=torch.float64) * 80 * SPREAD / math.hypot(80, SPREAD)
    errors = []
    for steps, evaluations in ((18, 35), (36, 71), (72, 143)):
        state, calls = sample(steps)
        assert calls == evaluations
        errors.append(float((state - exact).abs().max()))
    assert errors[0] < 0.06
    assert errors[0] / errors[1] > 3.3 and errors[1] / errors[2] > 3.3  # 4 for second order, 2 for first


def test_levels_are_those_of_the_stock_scheduler():
    scheduler = EDMEulerScheduler()
    for steps in (18, 40):
        scheduler.set_timesteps(steps)
        assert torch.allclose(torch.tensor(noise_levels(steps)), scheduler.sigmas, rtol=1e-5)
    assert noise_levels(1) == pytest.approx([80.0, 0.0])


def test_preconditioning_is_that_of_the_stock_scheduler():
    scheduler, sigma = EDMEulerScheduler(), torch.tensor([0.01, 0.7, 40.0])
    noisy, output = torch.randn(3, 3, 2, 2), torch.randn(3, 3, 2, 2)
    seen = {}

    def network(scaled, noise_level):
        seen.update(scaled=scaled, noise_level=noise_level)
        return output

    found = denoised(network, noisy, sigma)
    wide = sigma.view(-1, 1, 1, 1)
    assert torch.allclose(seen["scaled"], scheduler.precondition_inputs(noisy, wide))
    assert torch.allclose(seen["noise_level"], scheduler.precondition_noise(sigma))
    assert torch.allclose(found, scheduler.precondition_outputs(noisy, output, wide))


def test_input_and_target_of_the_network_have_the_spread_one_at_every_level():
    sigma = torch.tensor([0.002, 0.3, 80.0], dtype=torch.float64)
    scales = preconditioning(sigma)
    assert torch.allclose(scales.input * (sigma**2 + 0.25).sqrt(), torch.ones(3, dtype=torch.float64))
    target = ((1 - scales.skip) ** 2 * 0.25 + scales.skip**2 * sigma**2).sqrt() / scales.out
    assert torch.allclose(target, torch.ones(3, dtype=torch.float64))


def test_samples_are_kept_in_the_finest_format_of_the_device():
    assert state_dtype("cpu") == torch.float64 and state_dtype("mps") == torch.float32
