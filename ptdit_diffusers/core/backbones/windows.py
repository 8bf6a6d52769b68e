"""Windows of a token grid: where the grid is cut, and how tokens move into and out of the order of windows.

Shape letters: B batch, F H W token frames/rows/columns, N = F*H*W tokens in raster order, D width, S tokens of one
window.
"""

import math
from collections.abc import Callable
from copy import copy
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .cuts import Triple, axis_segments, borders_of, segments_of_share
from .shares import Share, reach


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
        share: the part of the grid that this device owns; its windows may reach beyond it.

    Attributes:
        axes: the segments of each axis.
        sizes: (windows, tokens per window) of each group, in the order of the partitioned tokens.
        own_sizes: the same, counting own tokens only.
        shapes: tokens (frames, rows, columns) of one window of each group.
        order, inverse: index (N,) from raster order to window order, and back, of own tokens.
        key_order, key_inverse: the same of all tokens of the windows.
    """

    def __init__(
        self,
        grid: Triple,
        window: Triple,
        shifted: bool,
        device: torch.device | None = None,
        share: Share | None = None,
    ):
        self.axes = [axis_segments(size, length, shifted) for size, length in zip(grid, window, strict=True)]
        self.share = share
        own = [(0, size) for size in grid]
        reached = list(own)
        if share is not None:
            own[share.axis] = share.span
            self.borders = borders_of(self.axes[share.axis])
            reached[share.axis] = reach(share.span, self.borders)
            self.axes[share.axis] = segments_of_share(self.axes[share.axis], *share.span)
        self.sizes, self.own_sizes, self.shapes = [], [], []
        for group in product(*self.axes):
            count, tokens, queries = 1, 1, 1
            for run in group:
                count *= run.count
                tokens *= run.length
                queries *= run.length if run.own is None else run.own
            self.sizes.append((count, tokens))
            self.own_sizes.append((count, queries))
            self.shapes.append(tuple(run.length for run in group))
        self.order, self.inverse = self.window_order(grid, window, shifted, own, device)
        self.key_order, self.key_inverse = self.order, self.inverse
        if reached != own:
            self.key_order, self.key_inverse = self.window_order(grid, window, shifted, reached, device)

    def window_order(
        self, grid: Triple, window: Triple, shifted: bool, spans: list[tuple[int, int]], device: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the index from raster order to window order of the tokens in the spans of each axis, and back."""
        group = number = torch.zeros((), dtype=torch.long, device=device)
        most = 1  # numbers of windows are below it
        for axis, (size, length, runs) in enumerate(zip(grid, window, self.axes, strict=True)):
            view = [-1 if other == axis else 1 for other in range(3)]
            position = torch.arange(*spans[axis], device=device).view(view)
            shift = length // 2 if shifted else 0
            group = group * len(runs) + sum((position >= run.start).long() for run in runs[1:])
            windows = size // length + 2
            number = number * windows + (position + length - shift) // length
            most = most * windows
        of_window = (group * most + number).flatten()  # (N,)
        # int32: GPUs of Apple sort more than 256 numbers of int64 wrongly since macOS 15
        order = of_window.to(torch.int32).argsort(stable=True)
        return order, order.to(torch.int32).argsort()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Windows":
        """Return the same windows for tokens on another device."""
        moved = copy(self)
        for name in ("order", "inverse", "key_order", "key_inverse"):
            setattr(moved, name, getattr(self, name).to(device, non_blocking=non_blocking))
        return moved

    def keys(self, hidden_states: Tensor) -> Tensor | None:
        """Return all tokens of the windows in window order, from own ones in raster order.

        None where no device needs tokens of another one. Where one does, all use the result, so that gradients come
        back to those who gave.
        """
        extended = hidden_states if self.share is None else self.share.extend(hidden_states, self.borders)
        return None if extended is hidden_states else Reorder.apply(extended, self.key_order, self.key_inverse)

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

        Keys and values are of all tokens of the windows, queries of own ones. `mask_of` returns the mask for the
        attention of a group of windows, for example a bias of positions.
        """
        pieces, batch, heads = [], len(query), query.shape[2]
        own, all_ = ([count * size for count, size in sizes] for sizes in (self.own_sizes, self.sizes))
        groups = (t.flatten(2).split(lengths, dim=1) for t, lengths in ((query, own), (key, all_), (value, all_)))
        groups = zip(self.own_sizes, self.sizes, *groups, strict=True)  # (B, windows * S, D) of one window shape
        for group, ((_, queries), (_, size), *qkv) in enumerate(groups):
            # None of these steps asks whether there is only one window, for which torch.compile would recompile.
            q, k, v = (
                t.flatten(0, 1).unflatten(1, (heads, -1)).unflatten(0, (-1, length))
                for t, length in zip(qkv, (queries, size, size), strict=True)
            )
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
