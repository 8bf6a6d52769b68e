"""Power-function averages: the widths are what they say, and any width is solved for after the run."""

import numpy as np
import pytest
import torch
from torch import nn

from ptdit_diffusers.training.average import (
    PowerAverages,
    average_snapshots,
    exponent,
    overlap,
    snapshot_steps,
    write_snapshot,
)


def test_the_exponents_are_those_of_the_paper():
    assert exponent(0.10) == pytest.approx(6.94, abs=0.01)
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01)
    times = np.linspace(0, 1, 200_001)
    for width in (0.03, 0.1, 0.2):
        weight = times ** exponent(width)
        weight /= weight.sum()
        mean = (weight * times).sum()
        assert np.sqrt((weight * (times - mean) ** 2).sum()) == pytest.approx(width, rel=1e-3)
    with pytest.raises(ValueError, match=r"width=0.5 must be above 0 and below 0.28; nearest: 0.27"):
        exponent(0.5)


def test_the_overlap_is_the_integral():
    times = np.linspace(0, 1, 400_001)
    for t, g, other_t, other_g in ((0.5, 6.9, 1.0, 17.0), (1.0, 6.9, 0.7, 3.0)):
        one = np.where(times <= t, (g + 1) * times**g / t ** (g + 1), 0)
        other = np.where(times <= other_t, (other_g + 1) * times**other_g / other_t ** (other_g + 1), 0)
        assert overlap(t, g, other_t, other_g) == pytest.approx((one * other).mean(), rel=1e-3)


def walk(steps: int, widths, folder=None, starts=(0,), count=20):
    """Averages of weights that walk about, as those of a training do."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(500, generator=generator))

    def snapshot(step, width, values):
        start = max(each for each in starts if each < step)
        write_snapshot(folder, step, start, width, {"weight": values[0]})

    marks = snapshot_steps(starts, steps, count) if folder else ()
    averages = PowerAverages([weight], widths, starts, snapshot if folder else None, marks)
    for _ in range(steps):
        with torch.no_grad():
            weight += 0.02 * torch.randn(500, generator=generator)
        averages.step([weight])
    return averages, weight


def test_the_first_weights_are_the_average_and_a_new_start_forgets():
    averages, weight = walk(1, (0.1,))
    assert torch.equal(averages.of(0)[0], weight)
    again, _ = walk(60, (0.1,), starts=(0, 59))
    assert torch.equal(again.of(0)[0], walk(60, (0.1,))[1])


@pytest.mark.parametrize("width", [0.05, 0.07, 0.13])
def test_a_width_that_is_solved_for_equals_one_that_was_tracked(tmp_path, width):
    walk(2000, (0.05, 0.10), tmp_path)
    solved, step = average_snapshots(tmp_path, width)
    tracked, weight = walk(2000, (width,))
    error = (solved["weight"] - tracked.of(0)[0]).square().mean().sqrt()
    assert step == 2000 and error < 1e-3 * tracked.of(0)[0].square().mean().sqrt()
    assert error < 0.02 * (weight - tracked.of(0)[0]).square().mean().sqrt()  # it is not just the last weights


def test_only_snapshots_of_the_last_stage_count(tmp_path):
    walk(900, (0.05, 0.10), tmp_path, starts=(0, 400))
    solved, _ = average_snapshots(tmp_path, 0.08)
    tracked, _ = walk(900, (0.08,), starts=(0, 400))
    assert (solved["weight"] - tracked.of(0)[0]).square().mean().sqrt() < 3e-3
    with pytest.raises(ValueError, match="holds no snapshots"):
        average_snapshots(tmp_path / "none", 0.1)


def test_what_was_stored_comes_back():
    averages, weight = walk(50, (0.05, 0.1))
    before = weight.detach().clone()
    averages.store([weight])
    averages.copy_to([weight])
    assert torch.equal(weight, averages.of(0)[0]) and not torch.equal(weight, before)
    averages.restore([weight])
    assert torch.equal(weight, before)
