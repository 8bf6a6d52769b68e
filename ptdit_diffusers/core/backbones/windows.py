"""Windows of a token grid: how it is cut, and the moves into and out of the order of windows. Plain torch.

Shape letters: B batch, F H W token frames/rows/columns, N = F*H*W tokens in raster order, D width, S tokens of one
window.
"""

import math
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch

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
    """Cuts one axis at 0, c, 2c, ..., N; shifted at 0, s, s+c, s+2c, ..., N with s = c // 2.

    The shifted cut is what a cyclic roll by -s with the usual region mask amounts to, without roll and mask.
    """
    shift = window // 2 if shifted else 0
    head = shift if shift < size else size  # not min(), which a compiler of dynamic sizes would carry along
    count = (size - head) // window
    tail = size - head - count * window
    runs = [Segment(0, 1, head), Segment(head, count, window), Segment(size - tail, 1, tail)]
    return [run for run in runs if run.count > 0 and run.length > 0]


class Reorder(torch.autograd.Function):
    """Puts tokens (B, N, ...) into the order of an index (N,): one read, one write, and the same backwards."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order, inverse)
        return tokens.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return Reorder.apply(grad, inverse, order), None, None


class Windows:
    """One cut of a token grid into windows, grouped by window shape, and the moves into and out of that order.

    Args:
        grid: token frames, rows, columns; any size.
        window: window length on each axis; a grid that it does not divide gets smaller windows at its borders.
        shifted: shift the cut by half a window (axes with window 1 have nothing to shift).
        device: where the tokens are.
    """

    def __init__(self, grid: Triple, window: Triple, shifted: bool, device: torch.device | None = None):
        self.axes = [axis_segments(size, length, shifted) for size, length in zip(grid, window, strict=True)]
        # (windows, tokens per window) of every group, in the order of the partitioned tokens
        self.sizes = []
        for group in product(*self.axes):
            count, tokens = 1, 1
            for run in group:
                count *= run.count
                tokens *= run.length
            self.sizes.append((count, tokens))

        group = number = torch.zeros((), dtype=torch.long, device=device)
        for axis, (size, length, runs) in enumerate(zip(grid, window, self.axes, strict=True)):
            view = [-1 if other == axis else 1 for other in range(3)]
            position = torch.arange(size, device=device).view(view)
            shift = length // 2 if shifted else 0
            group = group * len(runs) + sum((position >= run.start).long() for run in runs[1:])
            number = number * (size + 1) + (position + length - shift) // length
        tokens = grid[0] * grid[1] * grid[2]
        of_window = (group * (8 * tokens) + number).flatten()  # (N,); size + 1 is at most 2 size on each axis
        self.order = of_window.argsort(stable=True)
        self.inverse = self.order.argsort()

    def partition(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, N, D) raster order -> (B, N, D) window after window."""
        return Reorder.apply(hidden_states, self.order, self.inverse)

    def restore(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Undoes `partition`."""
        return Reorder.apply(hidden_states, self.inverse, self.order)

    def split(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Partitioned tokens (B, N, ...) -> one tensor (B, windows * S, ...) per window shape."""
        return tokens.split([count * size for count, size in self.sizes], dim=1)

    def attend(self, attention: Callable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attends inside each window; all tensors are partitioned, (B, N, heads, head_dim)."""
        pieces, batch, heads = [], len(query), query.shape[2]
        for (_, size), *qkv in zip(self.sizes, *(self.split(t.flatten(2)) for t in (query, key, value)), strict=True):
            # in steps of which none asks whether there is just one window: for a compiler that were another graph
            q, k, v = (t.flatten(0, 1).unflatten(1, (heads, -1)).unflatten(0, (-1, size)) for t in qkv)
            inner = attention(q, k, v, None)  # (B * windows, S, heads, head_dim)
            pieces.append(inner.flatten(0, 1).flatten(1).unflatten(0, (batch, -1)))
        tokens = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)  # (B, N, D)
        return tokens.unflatten(2, (heads, -1))


def keep_windows(rows: int, columns: int, window: Triple, ratio: Triple, number: int) -> tuple[Triple, Triple]:
    """Window size and proxy ratio that cut rows x columns tokens into `number` windows of the given proportions.

    Where no near-square window gives that number exactly, the one that comes nearest. Time is left alone, and the
    number of proxies per window is kept.
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
    """Checks a window size or proxy ratio: three integers >= 1 (frames, rows, columns of tokens)."""
    triple = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(triple) != 3 or any(type(part) is not int or part < 1 for part in triple):
        given = [part for part in triple if isinstance(part, (int, float))][:3]
        nearest = tuple(max(1, round(part)) for part in [*given, 1, 1, 1][:3])
        raise ValueError(f"{name}={value!r} must be three integers >= 1 (frames, rows, columns); nearest: {nearest}.")
    return triple
