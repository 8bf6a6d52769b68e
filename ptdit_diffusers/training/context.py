"""Context parallelism in training: several processes share each sample, which is too large for one.

The processes are data ranks x context ranks: those of one data rank get the same batches and random numbers, share the
tokens of the model, and compute the same loss. Each then has the part of every gradient that its own tokens give; the
data-parallel wrapper takes the mean over all processes, where the sum over the context ranks is wanted, so the loss is
multiplied by their number before the backward pass.
"""

import logging
from typing import Any

from accelerate import Accelerator
from torch import nn

logger = logging.getLogger(__name__)


def check_context(context: int, processes: int, slices: int | None = None) -> None:
    """Check that processes can be grouped to share samples.

    Args:
        context: Processes that share a sample.
        processes: All of them.
        slices: Tokens along the longest axis of the smallest sample, if they are known.

    Raises:
        ValueError: Their number is no multiple of `context`, or there are fewer slices than that.
    """
    if processes % context:
        most = max(size for size in range(1, processes + 1) if processes % size == 0 and size <= context)
        raise ValueError(
            f"context_parallel={context} processes cannot share a sample where there are {processes} in all; nearest: "
            f"{most}, or start {(processes // context + 1) * context} processes (--num-processes)."
        )
    if slices is not None and context > slices:
        raise ValueError(
            f"context_parallel={context} processes cannot share {slices} rows or columns of tokens; nearest: {slices}."
        )


def share_samples(network: nn.Module, context: int, accelerator: Accelerator) -> None:
    """Let `context` processes share each sample; before the network is wrapped for data parallelism.

    Raises:
        ValueError: The network cannot, or the processes cannot be grouped so.
    """
    check_context(context, accelerator.num_processes)
    if not hasattr(network, "join_devices"):
        raise ValueError(
            f"context_parallel={context}: {type(network).__name__} cannot be shared; nearest: context_parallel=1."
        )
    network.enable_parallelism(config=context_config(context, accelerator))
    data_ranks = accelerator.num_processes // context
    logger.info("%d processes share each sample; %d samples at a time", context, data_ranks)


def context_config(context: int, accelerator: Accelerator) -> Any:
    """Return diffusers' configuration for groups of `context` neighbouring processes."""
    from diffusers import ContextParallelConfig  # with torch.distributed, which builds may lack

    from ptdit_diffusers.models.parallel_ptdit import make_mesh

    mesh = make_mesh((accelerator.num_processes // context, 1, context), ("data", "ring", "ulysses"))
    return ContextParallelConfig(ulysses_degree=context, mesh=mesh)
