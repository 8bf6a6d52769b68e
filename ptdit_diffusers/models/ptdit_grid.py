"""The token grid of PT-DiT (arXiv 2409.04005 v2): sinusoids, positions, windows, proxies.

Functions of sizes and tensors in plain torch; no layers, no parameters.
Shape letters: B batch, F H W token frames/rows/columns, N = F*H*W tokens in raster order, D width, M proxies,
S tokens of one window.
"""

import math
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch

Triple = tuple[int, int, int]


# ---------------------------------------------------------------------------------------------------------------------
# Sinusoids
# ---------------------------------------------------------------------------------------------------------------------
def frequencies(count: int, device: torch.device) -> torch.Tensor:
    """10000^(-k/count) for k = 0..count-1, float32."""
    return torch.exp(torch.arange(count, dtype=torch.float32, device=device) * (-math.log(10000.0) / count))


def timestep_sinusoid(values: torch.Tensor) -> torch.Tensor:
    """Sinusoid of unscaled numbers (a timestep is 0..1000), 128 cosines, then 128 sines: (...,) -> (..., 256)."""
    angles = values.float()[..., None] * frequencies(128, values.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(grid: Triple, dim: int, scale: int, scrambled: bool, device: torch.device) -> torch.Tensor:
    """Absolute sin-cos positions [time D/4 | column 3D/8 | row 3D/8] of a token grid.

    Args:
        grid: token frames, rows, columns.
        dim: width D, a multiple of 16.
        scale: rows and columns are divided by it (frames are not).
        scrambled: give token i of a frame the column `i mod rows` and the row `i div rows`, as the official code does
            by mistake. Square grids are the same either way.
        device: where to compute.

    Returns:
        float32 tensor (F*H*W, D).
    """
    frames, rows, columns = grid
    index = torch.arange(rows * columns, device=device)
    run = rows if scrambled else columns
    column, row = (index % run).float() / scale, index.div(run, rounding_mode="floor").float() / scale
    parts = []
    for position, width in (
        (torch.arange(frames, device=device).float(), dim // 4),
        (column, 3 * dim // 8),
        (row, 3 * dim // 8),
    ):
        angles = position[:, None] * frequencies(width // 2, device)
        parts.append(torch.cat([angles.sin(), angles.cos()], dim=-1))
    time, column, row = parts
    space = torch.cat([column, row], dim=-1)  # (H*W, 3D/4)
    table = torch.cat([time[:, None].expand(-1, rows * columns, -1), space[None].expand(frames, -1, -1)], dim=-1)
    return table.flatten(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Windows and proxies
# ---------------------------------------------------------------------------------------------------------------------
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


def proxy_boxes(window: Triple, ratio: Triple) -> list[tuple[int, int]]:
    """Per axis: (box, stride) of the pooling. A box holds `stride` proxies; proxy y averages tokens y, y+stride, ...

    Ratios finer than the window give strided proxies inside each window, as the official code does; in time a finer
    ratio counts as the window's (also as there). A ratio coarser than the window pools over boxes of its own.
    """
    boxes = [(max(length, part), max(length, part) // part) for length, part in zip(window, ratio, strict=True)]
    return [(boxes[0][0], 1), *boxes[1:]]


def pool_axis(video: torch.Tensor, axis: int, box: int, stride: int) -> torch.Tensor:
    """Averages one axis of (B, F, H, W, D) to its proxies; a shorter last box averages what it has."""
    runs = axis_segments(video.shape[axis], box, shifted=False)
    parts = video.split([run.count * run.length for run in runs], dim=axis) if len(runs) > 1 else [video]
    pooled = []
    for part, run in zip(parts, runs, strict=True):
        boxes = part.unflatten(axis, (run.count, run.length))
        if stride == 1:
            boxes = boxes.mean(axis + 1, keepdim=True)
        elif run.length > stride:
            order = boxes.movedim(axis + 1, 0)  # (length, ...)
            boxes = torch.stack([order[y::stride].mean(0) for y in range(stride)], dim=axis + 1)
        pooled.append(boxes.flatten(axis, axis + 1))
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=axis)


def mean_proxies(hidden_states: torch.Tensor, grid: Triple, window: Triple, ratio: Triple) -> torch.Tensor:
    """Proxy tokens as means (v2 of the paper, Eq. 1): (B, N, D) -> (B, M, D)."""
    video = hidden_states.unflatten(1, grid)
    for axis, (box, stride) in reversed(list(enumerate(proxy_boxes(window, ratio), start=1))):
        video = pool_axis(video, axis, box, stride)
    return video.flatten(1, 3)


def proxy_index(
    grid: Triple,
    window: Triple,
    ratio: Triple,
    draw: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Token indices (B, M) of single-token proxies: at random (v1 of the paper), or the first of each set.

    Sets are those that `mean_proxies` averages, in the same order.

    Args:
        grid, window, ratio: as for `mean_proxies`.
        draw: numbers in [0, 1) of shape (3, B, M) from `draw_proxies`, one per axis; None takes the first tokens.
        device: where to compute.
    """
    index = torch.zeros((1, 1), dtype=torch.long, device=device)
    positions = proxy_positions(grid, window, ratio, device)
    for axis, (start, stride, count) in enumerate(positions):
        position = start if draw is None else start + stride * (draw[axis] * count).long()
        index = index * grid[axis] + position
    return index


def proxy_positions(grid: Triple, window: Triple, ratio: Triple, device: torch.device) -> list[tuple]:
    """Per axis and proxy: first position of its set, stride, number of positions; tensors of shape (1, M)."""
    axes = []
    for size, (box, stride) in zip(grid, proxy_boxes(window, ratio), strict=True):
        number = size // box * stride + min(stride, size % box)
        proxy = torch.arange(number, device=device)
        edge = proxy.div(stride, rounding_mode="floor") * box
        start = edge + proxy % stride
        count = ((edge + box).clamp(max=size) - start + stride - 1).div(stride, rounding_mode="floor")
        axes.append((start, stride, count))
    lengths = [len(start) for start, _, _ in axes]
    spread = []
    for axis, (start, stride, count) in enumerate(axes):
        view = [-1 if other == axis else 1 for other in range(3)]
        start, count = (values.view(view).expand(lengths).reshape(1, -1) for values in (start, count))
        spread.append((start, stride, count))
    return spread


def draw_proxies(
    batch: int,
    proxies: int,
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
) -> torch.Tensor:
    """Uniform numbers (3, batch, proxies) for `proxy_index`, drawn on the generator's device.

    With a list, sample i draws from generator i; a list shorter than the batch is repeated, so that the two halves of
    a guided batch see the same proxies.
    """
    if not isinstance(generator, list):
        where = device if generator is None else generator.device
        return torch.rand((3, batch, proxies), generator=generator, device=where).to(device)
    rows = [torch.rand((3, 1, proxies), generator=one, device=one.device).to(device) for one in generator]
    return torch.cat(rows, dim=1).repeat(1, batch // len(rows), 1)


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


class ProxyPlan(NamedTuple):
    """Where proxies come from: the grid, the windows, the ratio."""

    grid: Triple
    window: Triple
    ratio: Triple

    def tokens(self, hidden_states: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        """Means without an index, else the tokens at `index` (B or 1, M)."""
        if index is None:
            return mean_proxies(hidden_states, *self)
        return hidden_states.gather(1, index[..., None].expand(len(hidden_states), -1, hidden_states.shape[-1]))

    def number(self) -> int:
        """How many proxies there are."""
        boxes = zip(self.grid, proxy_boxes(self.window, self.ratio), strict=True)
        return math.prod(size // box * stride + min(stride, size % box) for size, (box, stride) in boxes)
