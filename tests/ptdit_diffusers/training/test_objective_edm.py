"""EDM's loss against its formula, and its noise levels."""

import torch

from ptdit_diffusers.core.edm import preconditioning
from ptdit_diffusers.training.objective_edm import edm_matching, sample_sigmas


def test_the_loss_is_the_error_of_the_network_for_its_target():
    torch.manual_seed(0)
    pictures, noise, output = (torch.randn(3, 3, 4, 4, dtype=torch.float64) for _ in range(3))
    sigma = torch.tensor([0.05, 0.5, 20.0], dtype=torch.float64)
    loss = edm_matching(lambda scaled, noise_level: output, pictures, noise, sigma)
    scales, wide = preconditioning(sigma), sigma.view(-1, 1, 1, 1)
    noisy = pictures + wide * noise
    target = (pictures - scales.skip.view(-1, 1, 1, 1) * noisy) / scales.out.view(-1, 1, 1, 1)
    assert torch.allclose(loss, (output - target).square().mean(dim=(1, 2, 3)))  # the weight cancels c_out


def test_an_untrained_network_has_the_loss_one():
    torch.manual_seed(0)
    pictures, noise = torch.randn(64, 3, 16, 16) * 0.5, torch.randn(64, 3, 16, 16)
    sigma = sample_sigmas(64, torch.Generator().manual_seed(0))
    loss = edm_matching(lambda scaled, noise_level: torch.zeros_like(scaled), pictures, noise, sigma)
    assert abs(loss.mean() - 1) < 0.02


def test_levels_of_training_are_lognormal():
    logs = sample_sigmas(20000, torch.Generator().manual_seed(0)).log()
    assert abs(logs.mean() + 1.2) < 0.03 and abs(logs.std() - 1.2) < 0.03
