"""Learning rates of both vocabularies."""

import pytest
import torch
from diffusers.optimization import get_scheduler

from ptdit_diffusers.training.schedules import SCHEDULES, named_schedule, warmup_hold_decay


def test_the_learning_rate_warms_up_holds_and_decays_to_zero() -> None:
    settings = {"lr": 2.0, "warmup": 10, "hold": 0.5, "decay": "linear", "steps": 100}
    rates = [warmup_hold_decay(step, **settings) for step in range(101)]
    assert rates[0] == pytest.approx(2 / 11) and rates[10] == 2 == rates[55]
    assert rates[100] == 0 and all(later <= earlier for earlier, later in zip(rates[10:], rates[11:], strict=False))
    settings |= {"decay": "cosine", "hold": 0.0}
    assert warmup_hold_decay(55, **settings) == pytest.approx(1.0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_named_schedule_gives_the_rates_that_diffusers_sets(name: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.01)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=7)
    rate = named_schedule(name, 0.01, 2, 7)
    for step in range(8):
        assert optimizer.param_groups[0]["lr"] == rate(step)
        optimizer.step()
        schedule.step()
