"""Proxy tokens of PT-DiT (arXiv 2409.04005 v2, Eq. 1): which tokens each proxy stands for, and how it is made of them.

Functions of sizes and tensors; no layers, no weights.
Shape letters: B batch, F H W token frames/rows/columns, N = F*H*W tokens in raster order, D width, M proxies.
"""

import math
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .cuts import Triple, axis_segments
from .shares import Share, cuts_of, halo, lengths_of

PROXY_MODES = ("mean", "random", "first")


def legal_proxy_mode(mode: str) -> str:
    """Return a proxy mode.

    Raises:
        ValueError: it is not one of `PROXY_MODES`; names them.
    """
    if mode not in PROXY_MODES:
        raise ValueError(f"proxy_mode={mode!r} is unknown; choose one of {', '.join(PROXY_MODES)}.")
    return mode


def proxy_boxes(window: Triple, ratio: Triple) -> list[tuple[int, int]]:
    """Return (box, stride) of the pooling per axis; a box holds `stride` proxies, proxy y has tokens y, y+stride, ...

    Ratios finer than the window give strided proxies inside each window, as in the official code; in time a finer
    ratio counts as the window's, also as in that code. A ratio coarser than the window pools over its own boxes.
    """
    boxes = [(max(length, part), max(length, part) // part) for length, part in zip(window, ratio, strict=True)]
    return [(boxes[0][0], 1), *boxes[1:]]


def pool_axis(video: Tensor, axis: int, box: int, stride: int) -> Tensor:
    """Average one axis of (B, F, H, W, D) to its proxies; a shorter last box averages the tokens it has."""
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


def mean_proxies(hidden_states: Tensor, grid: Triple, window: Triple, ratio: Triple) -> Tensor:
    """Return proxy tokens as means (v2 of the paper, Eq. 1): (B, N, D) -> (B, M, D)."""
    video = hidden_states.unflatten(1, grid)
    for axis, (box, stride) in reversed(list(enumerate(proxy_boxes(window, ratio), start=1))):
        video = pool_axis(video, axis, box, stride)
    return video.flatten(1, 3)


def proxy_index(grid: Triple, window: Triple, ratio: Triple, uniform: Tensor | None, device: torch.device) -> Tensor:
    """Return token indices (B or 1, M) of single-token proxies: random ones (v1 of the paper) or the first.

    The sets are those that `mean_proxies` averages, in the same order.

    Args:
        grid, window, ratio: as for `mean_proxies`.
        uniform: numbers in [0, 1) of shape (3, B, M), one per axis, see `random_numbers`; None takes the first tokens.
        device: where to compute.
    """
    index = torch.zeros((1, 1), dtype=torch.long, device=device)
    positions = proxy_positions(grid, window, ratio, device)
    for axis, (start, stride, count) in enumerate(positions):
        position = start if uniform is None else start + stride * (uniform[axis] * count).long()
        index = index * grid[axis] + position
    return index


def proxy_positions(grid: Triple, window: Triple, ratio: Triple, device: torch.device) -> list[tuple]:
    """Return (first position of the set, stride, number of positions) per axis; tensors of shape (1, M)."""
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


def random_numbers(
    batch: int,
    proxies: int,
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
) -> Tensor:
    """Sample uniform numbers (3, batch, proxies) for `proxy_index`, on the generator's device.

    With a list, sample i uses generator i; a list shorter than the batch is repeated, so that the two halves of a
    guided batch get the same proxies.
    """
    if generator is None:  # torch.compile takes a size that it does not know only without this argument
        return torch.rand((3, batch, proxies), device=device)
    if not isinstance(generator, list):
        return torch.rand((3, batch, proxies), generator=generator, device=generator.device).to(device)
    rows = [torch.rand((3, 1, proxies), generator=one, device=one.device).to(device) for one in generator]
    return torch.cat(rows, dim=1).repeat(1, batch // len(rows), 1)


class ProxyPlan(NamedTuple):
    """Which tokens each proxy stands for: token grid, window size and proxy ratio (frames, rows, columns each)."""

    grid: Triple
    window: Triple
    ratio: Triple

    def tokens(self, hidden_states: Tensor, index: Tensor | None) -> Tensor:
        """Return the proxies (B, M, D): means if `index` is None, else the tokens at `index` (B or 1, M)."""
        if index is None:
            return mean_proxies(hidden_states, *self)
        return hidden_states.gather(1, index[..., None].expand(len(hidden_states), -1, hidden_states.shape[-1]))

    def numbers(self) -> Triple:
        """Return the number of proxies along each axis."""
        boxes = zip(self.grid, proxy_boxes(self.window, self.ratio), strict=True)
        frames, rows, columns = [size // box * stride + min(stride, size % box) for size, (box, stride) in boxes]
        return frames, rows, columns

    def number(self) -> int:
        """Return the number of proxies M."""
        return math.prod(self.numbers())


class SharedProxies(NamedTuple):
    """The proxies of a grid whose tokens several devices own: each gives its part, and gets all proxies."""

    plan: ProxyPlan
    share: Share

    def tokens(self, hidden_states: Tensor, index: Tensor | None) -> Tensor:
        """Return all proxies (B, M, D) from own tokens (B, N, D).

        Args:
            hidden_states: own tokens.
            index: None for means, else the tokens that are proxies, (B or 1, M), numbered in the whole grid.
        """
        share, axis = self.share, self.share.axis
        spans = [self.proxies_of(*span) for span in share.spans]
        is_cut = any(first[1] > second[0] for first, second in pairwise(spans))  # proxies of several devices
        start, stop = spans[share.messages.rank]
        if index is not None:
            rows = self.picked(hidden_states, index)[start:stop]
        else:
            rows = self.averaged(hidden_states, start, stop, is_cut)
        if is_cut:  # parts are added up in float32
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        rows = share.messages.gather(rows, [last - first for first, last in spans], is_used_by_all=True)
        if is_cut:
            numbers = torch.tensor([number for span in spans for number in range(*span)], device=rows.device)
            total = rows.new_zeros(self.plan.numbers()[axis], *rows.shape[1:])
            rows = total.index_add(0, numbers, rows).to(hidden_states.dtype)
        return rows.movedim(0, 1 + axis).flatten(1, 3)

    def received(self, shifts: bool) -> int:
        """Return how many proxies and tokens this device gets from others in a block, padding included.

        Args:
            shifts: whether blocks have shifted windows.
        """
        share, axis = self.share, self.share.axis
        grid, numbers = self.plan.grid, self.plan.numbers()
        longest = max(lengths_of([self.proxies_of(*span) for span in share.spans]))
        proxies = (share.messages.count - 1) * longest * (self.plan.number() // numbers[axis])
        slices = halo(share.span, cuts_of(grid[axis], self.plan.window[axis], shifts))
        return proxies + slices * (math.prod(grid) // grid[axis])

    def box(self) -> tuple[int, int]:
        """Return box and stride along the shared axis, as `proxy_boxes`."""
        return proxy_boxes(self.plan.window, self.plan.ratio)[self.share.axis]

    def proxies_of(self, start: int, stop: int) -> tuple[int, int]:
        """Return the proxies along the shared axis, first and one after the last, of boxes with slices of a span."""
        box, stride = self.box()
        return start // box * stride, min(self.plan.numbers()[self.share.axis], -(-stop // box) * stride)

    def averaged(self, hidden_states: Tensor, start: int, stop: int, is_cut: bool) -> Tensor:
        """Return the means of own tokens for proxies `start` to `stop` along the shared axis, which comes first.

        Where shares cut boxes they are sums of own tokens, divided by the members of the whole proxy.
        """
        axis = self.share.axis
        video = hidden_states.unflatten(1, self.share.own_grid)
        for other, (box, stride) in reversed(list(enumerate(proxy_boxes(self.plan.window, self.plan.ratio)))):
            if other != axis or not is_cut:
                video = pool_axis(video, 1 + other, box, stride)
        rows = video.movedim(1 + axis, 0)  # (T, B, ., ., D)
        if not is_cut:
            return rows
        box, stride = self.box()
        numbers = [position // box * stride + position % box % stride for position in range(self.plan.grid[axis])]
        members, own = Counter(numbers), numbers[slice(*self.share.span)]  # own: the proxy of each own slice
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        rows = rows / rows.new_tensor([members[number] for number in own]).view(-1, 1, 1, 1, 1)
        own = torch.tensor([number - start for number in own], device=rows.device)
        return rows.new_zeros(stop - start, *rows.shape[1:]).index_add(0, own, rows)

    def picked(self, hidden_states: Tensor, index: Tensor) -> Tensor:
        """Return the tokens at `index` (B or 1, M), zero where others own them, with the shared axis first."""
        axis, size = self.share.axis, self.plan.grid[self.share.axis]
        first, last = self.share.span
        inner = math.prod(self.plan.grid[axis + 1 :])  # tokens from one slice to the next
        slices = index // inner % size
        is_own = (slices >= first) & (slices < last)
        own = index // (inner * size) * (inner * (last - first)) + (slices - first) * inner + index % inner
        own = torch.where(is_own, own, 0)[..., None].expand(len(hidden_states), -1, hidden_states.shape[-1])
        tokens = hidden_states.gather(1, own) * is_own[..., None]
        return tokens.unflatten(1, self.plan.numbers()).movedim(1 + axis, 0)
