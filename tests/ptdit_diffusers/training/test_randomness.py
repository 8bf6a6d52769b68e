"""Generators made of several integers."""

import torch

from ptdit_diffusers.training.randomness import numpy_generator, torch_generator


def test_generators_of_different_seeds_differ_even_when_the_sums_agree() -> None:
    assert torch.rand(1, generator=torch_generator(1, 2)) != torch.rand(1, generator=torch_generator(2, 1))
    assert numpy_generator(1, 2).random() != numpy_generator(2, 1).random()
    assert torch.equal(torch.rand(3, generator=torch_generator(1, 2)), torch.rand(3, generator=torch_generator(1, 2)))
