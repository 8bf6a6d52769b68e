"""Q4_K of GGUF, which the gguf package can read but not write: 256 numbers in 144 bytes, 4.5 bits each.

A block holds 8 groups of 32 numbers, each number being scale * level - offset with a level from 0 to 15. Scales and
offsets of the groups are integers from 0 to 63, times two fp16 numbers of the block.
"""

import torch
from torch import Tensor

BLOCK, GROUPS, GROUP = 256, 8, 32
LEVELS, STEPS = 15, 63  # largest level, largest integer of a scale
STRETCHES = (-1.0, -0.6, -0.2, 0.2, 0.6)  # added to the number of levels that the range of a group fills
BLOCKS_AT_ONCE = 1 << 14  # bounds memory: some times 16 MB of fp32


def quantize_q4_k(weight: Tensor) -> Tensor:
    """Quantize (..., columns), columns a multiple of 256, to bytes (..., columns / 256 * 144)."""
    parts = weight.reshape(-1, GROUPS, GROUP).split(BLOCKS_AT_ONCE)
    return torch.cat([pack(part.float()) for part in parts]).reshape(*weight.shape[:-1], -1)


def fit(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and offset of each group, (N, 8, 1) each and not negative, with the least squared error.

    Levels are rounded for ranges a little narrower and wider than the group's own. For each range, scale and offset
    follow from linear regression of the numbers on their levels.
    """
    low = groups.amin(-1, keepdim=True).clamp(max=0)  # an offset cannot be negative
    spread = (groups.amax(-1, keepdim=True) - low).clamp(min=1e-30)
    total = groups.sum(-1, keepdim=True)
    best = torch.full_like(low, torch.inf)
    scale, offset = torch.zeros_like(low), torch.zeros_like(low)
    for stretch in STRETCHES:
        levels = ((groups - low) * ((LEVELS + stretch) / spread)).round_().clamp_(0, LEVELS)
        sum_levels, sum_squares = levels.sum(-1, keepdim=True), levels.square().sum(-1, keepdim=True)
        product = (levels * groups).sum(-1, keepdim=True)
        slope = (GROUP * product - total * sum_levels) / (GROUP * sum_squares - sum_levels.square()).clamp(min=1)
        start = (total - slope * sum_levels) / GROUP
        slope = torch.where(start > 0, product / sum_squares.clamp(min=1), slope)
        start = start.clamp(max=0)
        error = (levels * slope + start - groups).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, slope, scale), torch.where(better, -start, offset)
    return scale.clamp(min=0), offset


def pack(groups: Tensor) -> Tensor:
    """Pack blocks (N, 8, 32) into bytes (N, 144)."""
    scale, offset = fit(groups)
    shared = torch.stack([scale, offset]).amax(2, keepdim=True).div(STEPS).half()  # (2, N, 1, 1)
    steps = (torch.stack([scale, offset]) / shared.float().clamp(min=1e-30)).round().clamp(0, STEPS)
    scale, offset = shared.float() * steps
    levels = ((groups + offset) / scale.clamp(min=1e-30)).round().clamp(0, LEVELS).byte()

    scales, offsets = steps.byte().squeeze(-1)  # (N, 8): six bits each; the last four lend two bits to the first four
    high = [part[:, :4] | (part[:, 4:] >> 4) << 6 for part in (scales, offsets)]
    low = (scales[:, 4:] & 15) | (offsets[:, 4:] & 15) << 4
    nibbles = levels[:, 0::2] | levels[:, 1::2] << 4  # two groups to one byte
    halves = torch.cat(list(shared.squeeze(-1)), dim=1).view(torch.uint8)
    return torch.cat([halves, *high, low, nibbles.flatten(1)], dim=1)
