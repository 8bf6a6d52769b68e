"""Encoding and decoding in tiles, so that memory does not grow with the size or the length of a video.

Space: overlapping tiles that are blended into each other. Time: chunks; each layer carries its last input frames over
to the next chunk.
Shape letters: B batch, C channels, T frames, H W rows/columns (pixels or latent cells, 8 pixels per cell).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .shares import Messages

SPATIAL_RATIO = 8
TEMPORAL_RATIO = 4


@dataclass(frozen=True)
class VAETiling:
    """Tile sizes. Each tile has its own GroupNorm statistics, so tiled and untiled results differ a little.

    Attributes:
        size: side of a spatial tile in pixels, a multiple of 64 (neighbors overlap by an eighth of it).
        frames: length of a temporal tile in pixel frames, 4n + 1 and at least 5.
        carry_frames: every layer carries its last input frames into the next temporal tile, which then differs from
            the untiled result by its statistics only. `False` does as the official code: tiles share one frame and
            nothing else, which shows where they meet.

    Raises:
        ValueError: if a size is not legal.
    """

    size: int = 512
    frames: int = 29
    carry_frames: bool = True

    def __post_init__(self) -> None:
        if self.size < 64 or self.size % 64 != 0:
            below = max(64, self.size // 64 * 64)
            raise ValueError(
                f"tile size={self.size} is not a multiple of 64 pixels; nearest: {below} or {below + 64}."
            )
        if self.frames < 5 or self.frames % TEMPORAL_RATIO != 1:
            below = max(5, (self.frames - 1) // TEMPORAL_RATIO * TEMPORAL_RATIO + 1)
            raise ValueError(f"tile frames={self.frames} is not 4n + 1 from 5 on; nearest: {below} or {below + 4}.")

    def covers(self, num_frames: int, height: int, width: int) -> bool:
        """Return whether a video of that many pixel frames, rows and columns fits into one tile."""
        return num_frames <= self.frames and max(height, width) <= self.size

    def count(self, num_frames: int, height: int, width: int) -> int:
        """Return the number of tiles, spatial times temporal, for that many pixel frames, rows and columns."""
        if self.covers(num_frames, height, width):
            return 1
        return self.chunks(num_frames) * len(list(tile_places(height, width, self.size)))

    def chunks(self, num_frames: int) -> int:
        """Return the number of tiles in time for that many pixel frames."""
        return -(-max(num_frames - 1, 1) // (self.frames - 1))

    def count_own(self, num_frames: int, height: int, width: int, devices: Messages) -> int:
        """Return how many of the tiles that `count` counts this device runs; what is one tile, each device runs."""
        if self.covers(num_frames, height, width):
            return 1
        owners = tile_owners(height, width, self.size, devices.count)
        return self.chunks(num_frames) * owners.count(devices.rank)


@dataclass
class Stream:
    """State that the layers of one network carry from chunk to chunk.

    Attributes:
        past: last input frames (B, C, t, H, W) of each layer, for the next chunk.
        last: the present chunk is the last one, so no layer waits for the next.
    """

    past: dict[nn.Module, Tensor] = field(default_factory=dict)
    last: bool = False


@contextmanager
def streaming(layers: Iterable[nn.Module]) -> Iterator[Stream]:
    """Give `layers` one `Stream` as their attribute `stream` while the context is open."""
    stream, layers = Stream(), list(layers)
    for layer in layers:
        layer.stream = stream
    try:
        yield stream
    finally:
        for layer in layers:
            layer.stream = None


def map_chunks(run: Callable[[Tensor], Tensor], hidden_states: Tensor, length: int) -> Tensor:
    """Apply `run` to chunks of `length` frames of (B, C, T, H, W); neighbors share one frame, which is kept once."""
    starts = range(0, max(hidden_states.shape[2] - 1, 1), length - 1)
    chunks = [run(hidden_states[:, :, start : start + length]) for start in starts]
    return torch.cat([chunks[0], *(chunk[:, :, 1:] for chunk in chunks[1:])], dim=2)


def map_stream(
    run: Callable[[Tensor], Tensor],
    hidden_states: Tensor,
    length: int,
    layers: Iterable[nn.Module],
) -> Tensor:
    """Apply `run` to `length` frames of (B, C, T, H, W), then to `length` - 1 at a time.

    Args:
        run: maps (B, C, t, h, w) to (B, C', t', h', w'); its `layers` carry over what they need of earlier chunks.
        hidden_states: (B, C, T, H, W), T above `length`.
        length: frames of the first chunk.
        layers: modules with an attribute `stream`.
    """
    chunks = [hidden_states[:, :, :length], *hidden_states[:, :, length:].split(length - 1, dim=2)]
    done = []
    with streaming(layers) as stream:
        for chunk in chunks:
            stream.last = len(done) == len(chunks) - 1
            done.append(run(chunk))
    return torch.cat(done, dim=2)


def tile_places(height: int, width: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield top, left, height and width of the overlapping tiles, row by row, in units of `size`, the side of one."""
    step = size - size // 8
    for top in range(0, height, step):
        for left in range(0, width, step):
            yield top, left, min(size, height - top), min(size, width - left)


def tile_owners(height: int, width: int, size: int, devices: int) -> list[int]:
    """Return which device runs each tile: the largest first, each to the device with the least area so far."""
    areas = [rows * columns for _, _, rows, columns in tile_places(height, width, size)]
    owners, load = [0] * len(areas), [0] * devices
    for tile in sorted(range(len(areas)), key=lambda tile: -areas[tile]):
        owners[tile] = load.index(min(load))
        load[owners[tile]] += areas[tile]
    return owners


def map_tiles(
    run: Callable[[Tensor], Tensor],
    hidden_states: Tensor,
    size_in: int,
    size_out: int,
    devices: Messages | None = None,
    inner: tuple[int, int, int] = (0, 0, 0),
) -> Tensor:
    """Apply `run` to overlapping spatial tiles and join the results.

    Args:
        run: encoder or decoder; maps (B, C, T, h, w) to (B, C', T', h', w').
        hidden_states: (B, C, T, H, W).
        size_in: tile side in the units of the input; tiles start at every multiple of 7/8 of it.
        size_out: the same side in the units of the output; an eighth of it is blended.
        devices: run the tiles on several devices, each of which gets the whole result; None runs all of them here.
        inner: B, C', T', which a device without a tile cannot know; only for several devices.

    Returns:
        (B, C', T', H', W').
    """
    kept, extent = size_out - size_out // 8, size_out // 8
    height, width = hidden_states.shape[-2:]
    places = list(tile_places(height, width, size_in))
    cut = (hidden_states[..., top : top + size_in, left : left + size_in] for top, left, _, _ in places)
    if devices is None:
        tiles = map(run, cut)  # one after another, so that only two rows of them are held
    else:
        owners = tile_owners(height, width, size_in, devices.count)
        sizes = [(rows * size_out // size_in, columns * size_out // size_in) for _, _, rows, columns in places]
        tiles = run_shared(run, list(cut), sizes, owners, devices, inner)
    columns = sum(top == 0 for top, _, _, _ in places)
    above: list[Tensor] = []
    joined_rows = []
    for _ in range(len(places) // columns):
        row: list[Tensor] = []
        for column in range(columns):
            tile = next(tiles)
            if above:
                tile = _blend(above[column], tile, extent, dim=-2)
            if row:
                tile = _blend(row[-1], tile, extent, dim=-1)
            row.append(tile)
        joined_rows.append(torch.cat([tile[..., :kept, :kept] for tile in row], dim=-1))
        above = row
    return torch.cat(joined_rows, dim=-2)


def run_shared(
    run: Callable[[Tensor], Tensor],
    tiles: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    owners: Sequence[int],
    devices: Messages,
    inner: tuple[int, int, int],
) -> Iterator[Tensor]:
    """Run each tile on its device and yield the results (B, C', T', h', w') of all of them, on every device.

    Args:
        run, tiles: maps each tile (B, C, T, h, w).
        sizes: h', w' of each.
        owners: device of each.
        devices: how they reach each other.
        inner: B, C', T'.
    """
    own = [run(tile).flatten(-2).movedim(-1, 0) for tile, owner in zip(tiles, owners, strict=True)
           if owner == devices.rank]  # (h' w', B, C', T') each  # fmt: skip
    pixels = torch.cat([tiles[0].new_empty(0, *inner), *own])
    areas = [[height * width * (owner == device) for (height, width), owner in zip(sizes, owners, strict=True)]
             for device in range(devices.count)]  # fmt: skip
    pixels = devices.gather(pixels, [sum(each) for each in areas], is_used_by_all=False)
    begins = [sum(map(sum, areas[:device])) for device in range(devices.count)]
    for (height, width), owner in zip(sizes, owners, strict=True):
        tile = pixels[begins[owner] : begins[owner] + height * width]
        begins[owner] += height * width
        yield tile.movedim(0, -1).unflatten(-1, (height, width)).contiguous()


def _blend(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """Blend the end of `before` into the start of `after` along `dim`, with weights k / extent."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    shape = [1] * after.ndim
    shape[dim] = extent
    weight = (torch.arange(extent, device=after.device) / extent).to(after.dtype).view(shape)
    overlap = before.narrow(dim, before.shape[dim] - extent, extent)
    faded = overlap * (1 - weight) + after.narrow(dim, 0, extent) * weight
    return torch.cat([faded, after.narrow(dim, extent, after.shape[dim] - extent)], dim=dim)
