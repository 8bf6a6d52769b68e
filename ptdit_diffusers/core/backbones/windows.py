"""Windows of a token grid: where the grid is cut, and how tokens move into and out of the order of windows.

Shape letters: B batch, F H W token frames/rows/columns, N = F*H*W tokens in raster order, D width, S tokens of one
window.
"""

import math
from collections.abc import Callable
from copy import copy
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

Triple = tuple[int, int, int]


class Segment(NamedTuple):
    """A run of equal windows along one axis: `count` windows of `length` tokens from token `start` on."""

    start: int
    count: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.count * self.length


def axis_segments(size: int, window: int, shifted: bool) -> list[Segment]:
    """Cut one axis at 0, c, 2c, ..., N; shifted at 0, s, s+c, s+2c, ..., N with s = c // 2.

    The shifted cut gives the same windows as a cyclic roll by -s with the usual region mask, without roll and mask.
    """
    shift = window // 2 if shifted else 0
    head = shift if shift < size else size  # min() would give torch.compile an expression to carry along
    count = (size - head) // window
    tail = size - head - count * window
    runs = [Segment(0, 1, head), Segment(head, count, window), Segment(size - tail, 1, tail)]
    return [run for run in runs if run.count > 0 and run.length > 0]


class Reorder(torch.autograd.Function):
    """Put tokens (B, N, ...) into the order of an index (N,): one read and one write, in the backward pass too."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return tokens.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return Reorder.apply(grad, inverse, order), None, None


class Windows:
    """One cut of a token grid into windows, grouped by window shape.

    Args:
        grid: token frames, rows, columns; any size.
        window: window length on each axis; a grid that it does not divide gets smaller windows at its borders.
        shifted: shift the cut by half a window (axes with window 1 have nothing to shift).
        device: device of the tokens.

    Attributes:
        axes: the segments of each axis.
        sizes: (windows, tokens per window) of each group, in the order of the partitioned tokens.
        shapes: tokens (frames, rows, columns) of one window of each group.
        order, inverse: index (N,) from raster order to window order, and back.
    """

    def __init__(self, grid: Triple, window: Triple, shifted: bool, device: torch.device | None = None):
        self.axes = [axis_segments(size, length, shifted) for size, length in zip(grid, window, strict=True)]
        self.sizes, self.shapes = [], []
        for group in product(*self.axes):
            count, tokens = 1, 1
            for run in group:
                count *= run.count
                tokens *= run.length
            self.sizes.append((count, tokens))
            self.shapes.append(tuple(run.length for run in group))

        group = number = torch.zeros((), dtype=torch.long, device=device)
        most = 1  # numbers of windows are below it
        for axis, (size, length, runs) in enumerate(zip(grid, window, self.axes, strict=True)):
            view = [-1 if other == axis else 1 for other in range(3)]
            position = torch.arange(size, device=device).view(view)
            shift = length // 2 if shifted else 0
            group = group * len(runs) + sum((position >= run.start).long() for run in runs[1:])
            windows = size // length + 2
            number = number * windows + (position + length - shift) // length
            most = most * windows
        of_window = (group * most + number).flatten()  # (N,)
        # int32: GPUs of Apple sort more than 256 numbers of int64 wrongly since macOS 15
        self.order = of_window.to(torch.int32).argsort(stable=True)
        self.inverse = self.order.to(torch.int32).argsort()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Windows":
        """Return the same windows for tokens on another device."""
        moved = copy(self)
        moved.order = self.order.to(device, non_blocking=non_blocking)
        moved.inverse = self.inverse.to(device, non_blocking=non_blocking)
        return moved

    def partition(self, hidden_states: Tensor) -> Tensor:
        """Move (B, N, D) from raster order to window order, one window after another."""
        return Reorder.apply(hidden_states, self.order, self.inverse)

    def restore(self, hidden_states: Tensor) -> Tensor:
        """Undo `partition`."""
        return Reorder.apply(hidden_states, self.inverse, self.order)

    def attend(
        self,
        attention: Callable,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask_of: Callable[[int], Tensor | None] = lambda group: None,
    ) -> Tensor:
        """Attend inside each window; all tensors are partitioned, (B, N, heads, head_dim).

        `mask_of` returns the mask for the attention of a group of windows, for example a bias of positions.
        """
        pieces, batch, heads = [], len(query), query.shape[2]
        lengths = [count * size for count, size in self.sizes]
        groups = (t.flatten(2).split(lengths, dim=1) for t in (query, key, value))
        groups = zip(self.sizes, *groups, strict=True)  # (B, windows * S, D) of one window shape
        for group, ((_, size), *qkv) in enumerate(groups):
            # None of these steps asks whether there is only one window, for which torch.compile would recompile.
            q, k, v = (t.flatten(0, 1).unflatten(1, (heads, -1)).unflatten(0, (-1, size)) for t in qkv)
            inner = attention(q, k, v, mask_of(group))  # (B * windows, S, heads, head_dim)
            pieces.append(inner.flatten(0, 1).flatten(1).unflatten(0, (batch, -1)))
        tokens = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)  # (B, N, D)
        return tokens.unflatten(2, (heads, -1))


def keep_windows(rows: int, columns: int, window: Triple, ratio: Triple, number: int) -> tuple[Triple, Triple]:
    """Return the window size and proxy ratio that cut rows x columns tokens into `number` windows.

    Windows keep their proportions, as nearly as whole tokens allow. Where no such window gives that number exactly,
    the one that comes nearest is taken. Time is left alone, and the number of proxies per window is kept.
    """
    scale = math.sqrt(rows * columns / (number * window[1] * window[2]))
    lengths = [sorted({max(1, math.floor(side * scale)), math.ceil(side * scale)}) for side in window[1:]]

    def misfit(pair: tuple[int, int]) -> tuple[int, float]:
        count = -(-rows // pair[0]) * -(-columns // pair[1])
        return abs(count - number), abs(math.log(pair[0] * window[2] / (pair[1] * window[1])))

    best = min(product(*lengths), key=misfit)
    fine = [max(1, round(new * part / old)) for new, part, old in zip(best, ratio[1:], window[1:], strict=True)]
    return (window[0], *best), (ratio[0], *fine)


def legal_triple(name: str, value: Any) -> Triple:
    """Return a window size or proxy ratio as a tuple.

    Raises:
        ValueError: it is not three integers >= 1 (frames, rows, columns of tokens); names the nearest legal value.
    """
    triple = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(triple) != 3 or any(type(part) is not int or part < 1 for part in triple):
        given = [part for part in triple if isinstance(part, (int, float))][:3]
        nearest = tuple(max(1, round(part)) for part in [*given, 1, 1, 1][:3])
        raise ValueError(f"{name}={value!r} must be three integers >= 1 (frames, rows, columns); nearest: {nearest}.")
    return triple
