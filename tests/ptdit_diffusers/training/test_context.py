"""Which processes can share samples, and which networks. The training itself is tested with the LoRA trainer."""

import pytest
from accelerate import Accelerator
from torch import nn

from ptdit_diffusers.training.context import check_context, share_samples


@pytest.mark.parametrize(
    ("context", "processes", "nearest"),
    [
        (2, 1, "nearest: 1, or start 2 processes"),
        (3, 4, "nearest: 2, or start 6 processes"),
        (4, 6, "nearest: 3, or start 8 processes"),
    ],
)
def test_processes_that_cannot_be_grouped_are_refused_with_the_nearest(context, processes, nearest):
    with pytest.raises(
        ValueError, match=f"context_parallel={context} processes .* there are {processes} in all; {nearest}"
    ):
        check_context(context, processes)


def test_no_more_processes_than_slices_share_a_sample():
    check_context(4, 4, slices=4)
    with pytest.raises(ValueError, match="context_parallel=8 .* cannot share 4 rows or columns of tokens; nearest: 4"):
        check_context(8, 8, slices=4)


def test_every_divisor_of_the_processes_is_taken():
    for context in (1, 2, 3, 6):
        check_context(context, 6)


def test_a_network_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="context_parallel=1: Linear cannot be shared"):
        share_samples(nn.Linear(1, 1), 1, Accelerator(cpu=True))
