"""What devices that share a forward of PT-DiT send each other, through torch.distributed.

Only this module knows torch.distributed. Both messages are differentiable and compile into one graph.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor


def all_rows(rows: Tensor, group: Any) -> Tensor:
    """Return the rows (m, ...) of all devices, one after another: (P m, ...)."""
    gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
    return collectives.wait_tensor(gather(rows.contiguous(), 0, group))


class GatherForAll(torch.autograd.Function):
    """Gather rows of which each device makes its own use: their gradients add up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return all_rows(rows, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        scatter = getattr(collectives, "reduce_scatter_single", None) or collectives.reduce_scatter_tensor
        return collectives.wait_tensor(scatter(grad.contiguous(), "sum", 0, ctx.group)), None


class GatherResult(torch.autograd.Function):
    """Gather rows with which all devices do the same: each has the whole gradient, and takes its part."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        ctx.rank, ctx.count = dist.get_rank(group), len(rows)
        return all_rows(rows, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(0, ctx.rank * ctx.count, ctx.count), None


class Trade(torch.autograd.Function):
    """Send each device its rows, and get others from it; gradients go back the same ways."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.ways = sent, received, group
        return collectives.wait_tensor(collectives.all_to_all_single(rows.contiguous(), received, sent, group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received, group = ctx.ways
        back = collectives.all_to_all_single(grad.contiguous(), sent, received, group)
        return collectives.wait_tensor(back), None, None, None


class GroupMessages:
    """Messages of the processes of a group, see `core.backbones.shares.Messages`.

    Args:
        group: a process group of torch.distributed.
    """

    def __init__(self, group: Any):
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)

    def trade(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return Trade.apply(rows, list(sent), list(received), self.group)

    def gather(self, rows: Tensor, lengths: Sequence[int], is_used_by_all: bool) -> Tensor:
        most = max(lengths)
        padding = rows.new_zeros(most - len(rows), *rows.shape[1:])
        padded = torch.cat([rows, padding]) if len(padding) else rows
        gathered = (GatherForAll if is_used_by_all else GatherResult).apply(padded, self.group)
        pieces = gathered.split(most)
        return torch.cat([piece[:length] for piece, length in zip(pieces, lengths, strict=True)])

    def agree(self, values: Tensor) -> bool:
        """Return whether all devices have the same values (n,)."""
        everywhere = all_rows(values[None], self.group)
        return bool((everywhere == values).all())
