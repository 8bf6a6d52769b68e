"""What devices that share a forward of PT-DiT send each other, through torch.distributed.

Only this module knows torch.distributed. Both messages are differentiable and compile into one graph.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

GUIDANCE = "guidance"  # name of the axis of a mesh whose two halves take the negative and the positive text


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

    def differing(self, inputs: Mapping[str, Any]) -> list[str]:
        """Return the names of the inputs that are not the same on all devices; the same list on all of them.

        Args:
            inputs: by name; tensors, which are compared by two sums, or plain values.
        """
        device = next((value.device for value in inputs.values() if isinstance(value, Tensor)), None)
        sums = torch.stack([fingerprint(value, device) for value in inputs.values()])  # (names, 2)
        everywhere = all_rows(sums[None], self.group)
        same = torch.isclose(everywhere, sums, rtol=0, atol=0, equal_nan=True).all(0).all(1)
        return [name for name, is_same in zip(inputs, same.tolist(), strict=True) if not is_same]

    def any(self, value: bool, device: torch.device) -> bool:
        """Return whether a value is true on one device at least; the same on all of them."""
        return bool(all_rows(torch.tensor([value], dtype=torch.uint8, device=device), self.group).any())


def fingerprint(value: Any, device: torch.device | None) -> Tensor:
    """Return two numbers that differ, most probably, where values do."""
    if isinstance(value, Tensor):
        return torch.stack([value.float().sum(), value.float().abs().sum()]).to(device)
    number = zlib.crc32(repr(value).encode())
    return torch.tensor([float(number >> 16), float(number & 0xFFFF)], device=device)


def make_mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """Return a mesh of all processes, on the kind of device that their backend is for."""
    on_accelerator = torch.accelerator.is_available() and dist.get_backend() != "gloo"
    kind = torch.accelerator.current_accelerator().type if on_accelerator else "cpu"
    return init_device_mesh(kind, shape, mesh_dim_names=names)


def share_guidance() -> DeviceMesh:
    """Return a mesh of all processes: two halves, for the negative and the positive text, and shares in each.

    Raises:
        ValueError: the number of processes is odd.
    """
    count = dist.get_world_size()
    if count % 2:
        raise ValueError(
            f"{count} processes are not two halves, one for the negative and one for the positive text; nearest: "
            f"{max(count - 1, 2)} or {count + 1} processes, or guidance_halves=False."
        )
    return make_mesh((2, 1, count // 2), (GUIDANCE, "ring", "ulysses"))
