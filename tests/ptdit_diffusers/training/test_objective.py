"""The flow-matching error and the times."""

import pytest
import torch

from ptdit_diffusers.training.objective import flow_matching, sample_times


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 4, 2, 5, 6)], ids=["pictures", "videos"])
def test_the_error_is_that_of_the_flow_at_each_time(shape) -> None:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    time, asked = torch.tensor([0.0, 0.25, 1.0]), []

    def predict(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        asked.append((noisy, timestep))
        return noise - latents + torch.tensor([0.0, 1.0, 2.0]).view(-1, *[1] * (len(shape) - 1))

    torch.testing.assert_close(flow_matching(predict, latents, noise, time), torch.tensor([0.0, 1.0, 4.0]))
    ((noisy, timestep),) = asked
    assert torch.equal(timestep, time * 1000) and torch.equal(noisy[0], latents[0]) and torch.equal(noisy[2], noise[2])
    torch.testing.assert_close(noisy[1], 0.75 * latents[1] + 0.25 * noise[1])


def test_stratified_times_take_one_from_each_share_of_the_distribution() -> None:
    times = sample_times((64,), torch.Generator().manual_seed(0), mean=0.5, stratified=True)
    shares = torch.special.ndtr(torch.logit(times) - 0.5).sort().values * 64
    assert torch.equal(shares.floor(), torch.arange(64.0))
    assert not torch.equal(times, times.sort().values)


def test_a_shift_is_its_logarithm_added_to_the_mean() -> None:
    first, second = (torch.Generator().manual_seed(0) for _ in range(2))
    shifted = sample_times((1000,), first, mean=0.3, std=0.5, shift=2.0)
    moved = sample_times((1000,), second, mean=0.3 + torch.tensor(2.0).log().item(), std=0.5)
    torch.testing.assert_close(shifted, moved)
    logits = torch.logit(moved)
    assert abs(logits.mean() - 0.993) < 0.05 and abs(logits.std() - 0.5) < 0.05
