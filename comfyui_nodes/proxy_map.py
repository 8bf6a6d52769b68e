"""Pictures of a model's attention, block by block: windows, attention among proxies, attention of the injection.

Attention is recorded by ComfyUI's attention override, so a model without a map does no extra work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ptdit_diffusers.core.backbones.proxies import ProxyPlan, proxy_boxes, proxy_positions
from ptdit_diffusers.core.backbones.windows import Triple, Windows

PANEL = 192  # pixels of the longer side of one map
GAP = 6
RAMP = ((0.05, 0.03, 0.20), (0.45, 0.10, 0.43), (0.87, 0.32, 0.23), (0.99, 0.80, 0.25), (1.0, 1.0, 0.85))
CALLS = ("proxies", "injection")  # of the attentions of a block, the first two


class Recorder:
    """Record attention weights (tokens, keys) of chosen blocks: means over heads, of the first sample.

    It is ComfyUI's `optimized_attention_override`.

    Args:
        blocks: numbers of the blocks to record.
    """

    def __init__(self, blocks: set[int]):
        self.blocks = blocks
        self.calls: dict[int, int] = {}
        self.maps: dict[tuple[int, str], Tensor] = {}

    def __call__(self, attention: Callable, query: Tensor, key: Tensor, value: Tensor, heads: int,
                 *args: Any, **kwargs: Any) -> Tensor:  # fmt: skip
        block = (kwargs.get("transformer_options") or {}).get("block_index", -1)
        call = self.calls.get(block, 0)
        self.calls[block] = call + 1
        if block in self.blocks and call < len(CALLS):
            self.maps[block, CALLS[call]] = attention_weights(query[0], key[0], heads).to("cpu")
        return attention(query, key, value, heads, *args, **kwargs)


def attention_weights(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Return softmax weights (tokens, keys), the mean over heads, of queries (tokens, D) and keys (keys, D)."""
    weights = torch.zeros(len(query), len(key), device=query.device)
    for q, k in zip(query.float().chunk(heads, dim=1), key.float().chunk(heads, dim=1), strict=True):
        weights += (q @ k.T * q.shape[1] ** -0.5).softmax(dim=1)
    return weights / heads


def proxies_of_tokens(plan: ProxyPlan) -> Tensor:
    """Return for each token (N,) the index of the proxy to whose set it belongs."""
    index = torch.zeros(1, dtype=torch.long)
    positions = proxy_positions(*plan, torch.device("cpu"))
    counts = [int(torch.unique(start).numel()) for start, _, _ in positions]
    for size, (box, stride), count in zip(plan.grid, proxy_boxes(plan.window, plan.ratio), counts, strict=True):
        token = torch.arange(size)
        axis = token // box * stride + token % box % stride
        index = (index[:, None] * count + axis).flatten()
    return index


def colors(values: Tensor) -> Tensor:
    """Map 0..1 (H, W) to colors (H, W, 3), from dark blue over red to light yellow."""
    ramp = torch.tensor(RAMP)
    place = values.clamp(0, 1) * (len(ramp) - 1)
    low = place.floor().long().clamp(max=len(ramp) - 2)
    part = (place - low)[..., None]
    return ramp[low] * (1 - part) + ramp[low + 1] * part


def panel(picture: Tensor, grid: Triple) -> Tensor:
    """Resize a picture (H, W, 3) to a panel of the token grid's shape, by nearest neighbor."""
    scale = PANEL / max(grid[1:])
    size = tuple(max(1, round(side * scale)) for side in grid[1:])
    return torch.nn.functional.interpolate(picture.permute(2, 0, 1)[None], size=size)[0].permute(1, 2, 0)


def heat(values: Tensor, grid: Triple, frame: int) -> Tensor:
    """Return one frame of a map over tokens (N,) as a panel; colors run from its smallest to its largest value."""
    frame_values = values.reshape(grid)[frame]
    low, high = frame_values.min(), frame_values.max()
    return panel(colors((frame_values - low) / (high - low).clamp(min=1e-12)), grid)


def mark(picture: Tensor, grid: Triple, row: int, column: int) -> Tensor:
    """Return the panel with a green frame around one token."""
    height, width = picture.shape[:2]
    top, bottom = row * height // grid[1], max((row + 1) * height // grid[1], row * height // grid[1] + 3) - 1
    left, right = column * width // grid[2], max((column + 1) * width // grid[2], column * width // grid[2] + 3) - 1
    picture = picture.clone()
    for edge in (top, min(bottom, height - 1)):
        picture[edge, left : right + 1] = torch.tensor((0.2, 1.0, 0.4))
    for edge in (left, min(right, width - 1)):
        picture[top : bottom + 1, edge] = torch.tensor((0.2, 1.0, 0.4))
    return picture


def lattice(picture: Tensor, grid: Triple, window: Triple) -> Tensor:
    """Return a picture (H, W, 3) as a panel with the borders of windows (bright) and of shifted windows (dark)."""
    picture = panel(picture, grid)
    for shifted, color in ((True, (0.15, 0.15, 0.2)), (False, (1.0, 0.85, 0.1))):
        _, rows, columns = Windows(grid, window, shifted).axes
        for axis, runs in enumerate((rows, columns)):
            size, tokens = picture.shape[axis], grid[1 + axis]
            for run in runs:
                for start in range(run.start, run.stop, run.length):
                    picture.select(axis, min(start * size // tokens, size - 1))[:] = torch.tensor(color)
    return picture


def row_of(panels: list[Tensor]) -> Tensor:
    """Join panels side by side."""
    height = panels[0].shape[0]
    gap = torch.ones(height, GAP, 3)
    return torch.cat([part for each in panels for part in (each, gap)][:-1], dim=1)


def draw_map(recorder: Recorder, plan: ProxyPlan, picture: Tensor, frame: int, row: int, column: int) -> Tensor:
    """Draw one sheet (H, W, 3): a row for each recorded block, with four panels.

    1. the picture with the borders of windows; 2. how much attention each proxy gets from the other proxies;
    3. which proxies the marked token's proxy attends to; 4. which proxies the marked token itself attends to in the
    injection. Proxies are shown at their tokens.

    Args:
        recorder: a recorder that was used in a forward.
        plan: proxies of that forward.
        picture: (H, W, 3) in 0..1, the frame.
        frame, row, column: the marked token.
    """
    grid = plan.grid
    owner = proxies_of_tokens(plan)
    token = (frame * grid[1] + row) * grid[2] + column
    sheets = []
    for block in sorted(recorder.blocks):
        proxies, injection = (recorder.maps[block, call] for call in CALLS)
        received = proxies.mean(dim=0)
        panels = [
            lattice(picture, grid, plan.window),
            heat(received[owner], grid, frame),
            mark(heat(proxies[owner[token]][owner], grid, frame), grid, row, column),
            mark(heat(injection[token][owner], grid, frame), grid, row, column),
        ]
        panels[0] = mark(panels[0], grid, row, column)
        sheets.append(row_of(panels))
    gap = torch.ones(GAP, sheets[0].shape[1], 3)
    return torch.cat([part for each in sheets for part in (each, gap)][:-1], dim=0)
