"""Shares of a token grid: every device owns some slices of one axis, and gets what it needs of the others'.

Sizes alone decide everything, so that no size is ever sent. What moves the tokens is a `Messages` of the host.
Shape letters: B batch, N tokens, D width; P devices; T slices of the shared axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .cuts import Triple, axis_segments, borders_of

Span = tuple[int, int]  # first slice, and the one after the last


class Messages(Protocol):
    """What the devices of one forward send each other. All of them call the same methods in the same order.

    Attributes:
        rank: number of this device.
        count: number of devices P.
    """

    rank: int
    count: int

    def trade(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send each device its part of `rows` (T, ...); return what comes from each, in their order.

        Args:
            rows: as many for each device as `sent` says, in their order.
            sent, received: numbers of rows, by device.
        """

    def gather(self, rows: Tensor, lengths: Sequence[int], is_used_by_all: bool) -> Tensor:
        """Return the rows (T, ...) of all devices, in their order.

        Args:
            rows: those of this device.
            lengths: numbers of rows, by device.
            is_used_by_all: whether each device uses the result for its own share, so that gradients add up; else all
                do the same with it.
        """


def overlap(first: Span, second: Span) -> Span:
    """Return the slices that two spans have in common; (0, 0) if there are none."""
    start, stop = max(first[0], second[0]), min(first[1], second[1])
    return (start, stop) if start < stop else (0, 0)


def lengths_of(spans: Sequence[Span]) -> list[int]:
    """Return the number of slices of each span."""
    return [stop - start for start, stop in spans]


def reach(span: Span, borders: Sequence[int]) -> Span:
    """Return the slices of all windows that hold a slice of the span."""
    start = max(border for border in borders if border <= span[0])
    return start, min(border for border in borders if border >= span[1])


def even_bounds(size: int, devices: int) -> tuple[int, ...]:
    """Return bounds of shares as equal as slices allow; windows may be cut."""
    return tuple(size * device // devices for device in range(devices + 1))


def window_bounds(size: int, window: int, devices: int) -> tuple[int, ...]:
    """Return bounds of shares of whole windows; the last one may end with a smaller window, so it gets more."""
    each, more = divmod(-(-size // window), devices)
    counts = [each + (device >= devices - more) for device in range(devices)]
    return tuple(min(size, window * sum(counts[:device])) for device in range(devices + 1))


@dataclass(frozen=True)
class Share:
    """What one device owns of a token grid.

    Attributes:
        grid: token frames, rows, columns of the whole.
        axis: 0, 1 or 2, the axis that is shared.
        bounds: first slice of each device, and the number of slices (P + 1).
        messages: how devices reach each other.
    """

    grid: Triple
    axis: int
    bounds: tuple[int, ...]
    messages: Messages

    @property
    def spans(self) -> list[Span]:
        """The slices of each device."""
        return list(pairwise(self.bounds))

    @property
    def span(self) -> Span:
        """The slices of this device."""
        return self.spans[self.messages.rank]

    @property
    def own_grid(self) -> Triple:
        """Token frames, rows, columns of this device."""
        start, stop = self.span
        return (*self.grid[: self.axis], stop - start, *self.grid[self.axis + 1 :])

    def narrow(self, values: Tensor, first_axis: int, size: int = 1) -> Tensor:
        """Return this device's part of whole values.

        Args:
            values: frames, rows and columns of the grid are three of its axes.
            first_axis: that of the frames.
            size: how many members of the shared axis make one slice.
        """
        start, stop = self.span
        return values.narrow(first_axis + self.axis, start * size, (stop - start) * size)

    def rows(self, tokens: Tensor) -> Tensor:
        """Return own tokens (B, N, D) with the shared axis first: (T, B, ., ., D)."""
        return tokens.unflatten(1, self.own_grid).movedim(1 + self.axis, 0)

    def tokens(self, rows: Tensor) -> Tensor:
        """Undo `rows`, for any number of slices."""
        return rows.movedim(0, 1 + self.axis).flatten(1, 3)

    def extend(self, tokens: Tensor, borders: Sequence[int]) -> Tensor:
        """Return own tokens (B, N, D) with those of other devices that lie in the same windows, in raster order.

        Args:
            tokens: own ones.
            borders: where the windows of the shared axis begin, and the end.
        """
        wanted = [reach(span, borders) for span in self.spans]
        if wanted == self.spans:
            return tokens
        rank, (first, _) = self.messages.rank, self.span
        rows = self.rows(tokens)
        sent = [overlap(want, self.span) for want in wanted[:rank] + [(0, 0)] + wanted[rank + 1 :]]
        received = [overlap(span, wanted[rank]) for span in self.spans[:rank] + [(0, 0)] + self.spans[rank + 1 :]]
        given = torch.cat([rows[max(start - first, 0) : max(stop - first, 0)] for start, stop in sent])
        taken = self.messages.trade(given, lengths_of(sent), lengths_of(received))
        below = sum(lengths_of(received[:rank]))
        return self.tokens(torch.cat([taken[:below], rows, taken[below:]]))

    def whole(self, tokens: Tensor) -> Tensor:
        """Return the tokens (B, N, D) of all devices in raster order."""
        return self.tokens(self.messages.gather(self.rows(tokens), lengths_of(self.spans), is_used_by_all=False))


class Plan(NamedTuple):
    """A way to share a grid, and what it costs the busiest device.

    Attributes:
        work: of a block, in D^2 multiplications.
        vectors: of D numbers that it receives in a block.
        axis, bounds: as those of `Share`.
    """

    work: float
    vectors: int
    axis: int
    bounds: tuple[int, ...]


def halo(span: Span, cuts: Sequence[Sequence[int]]) -> int:
    """Return how many slices of others lie in the windows of a span, for all cuts of the axis together."""
    return sum(sum(lengths_of([reach(span, borders)])) - (span[1] - span[0]) for borders in cuts)


def cuts_of(size: int, window: int, shifts: bool) -> list[list[int]]:
    """Return the borders of the windows of an axis, and with `shifts` those of the shifted ones."""
    return [borders_of(axis_segments(size, window, shifted)) for shifted in (False, True)[: 1 + shifts]]


def make_plan(
    grid: Triple, window: Triple, axis: int, bounds: tuple[int, ...], shifts: bool, proxies: int, dim: int
) -> Plan:
    """Return what sharing an axis at these bounds costs.

    Args:
        grid, window: tokens per axis.
        axis, bounds: as those of `Share`.
        shifts: whether blocks have shifted windows.
        proxies: their number M.
        dim: width D.
    """
    size = grid[axis]
    area = grid[0] * grid[1] * grid[2] // size  # tokens of a slice
    cuts = cuts_of(size, window[axis], shifts)
    inside = window[0] * window[1] * window[2]
    work, vectors = 0.0, 0
    piece = proxies // (len(bounds) - 1)
    for span in pairwise(bounds):
        own = (span[1] - span[0]) * area
        beyond = halo(span, cuts) * area
        attention = 2 * (own * (len(cuts) * inside + proxies)) / dim
        work = max(work, 22 * own + 2 * beyond + 6 * proxies + attention)
        vectors = max(vectors, beyond + (len(bounds) - 2) * piece)
    return Plan(work, vectors, axis, bounds)


def best_plan(grid: Triple, window: Triple, shifts: bool, proxies: int, dim: int, devices: int) -> Plan:
    """Return the axis and the bounds with the least work for the busiest device, then with the fewest vectors.

    Raises:
        ValueError: no axis is as long as there are devices; names the largest number of devices.
    """
    if devices > max(grid):
        raise ValueError(
            f"{devices} devices cannot share {grid[0]} x {grid[1]} x {grid[2]} tokens (frames, rows, columns): each "
            f"needs a slice of one axis; nearest: {max(grid)} devices."
        )
    plans = []
    for axis, size in enumerate(grid):
        if size >= devices:
            bounds = {even_bounds(size, devices)}
            if -(-size // window[axis]) >= devices:
                bounds.add(window_bounds(size, window[axis], devices))
            plans += [make_plan(grid, window, axis, each, shifts, proxies, dim) for each in sorted(bounds)]
    return min(plans)
