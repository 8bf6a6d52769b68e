"""Text around the sheets of the proxy map: noise level, panels and blocks. Plain torch and Pillow."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

STRIP = 16  # pixels of the strips at the top and at the left
PANELS = ("windows", "attention received", "from its proxy token", "from the token")  # each fits a panel


def labeled(sheet: Tensor, blocks: list[int], level: float, gap: int) -> Tensor:
    """Return a sheet (H, W, 3) in 0..1 with its noise level and panels named above it and its blocks at the left.

    Args:
        sheet: rows of four panels with gaps between them.
        blocks: number of the block of each row.
        level: noise level, 0 to 1.
        gap: pixels between rows and between panels.
    """
    height, width = sheet.shape[:2]
    canvas = Image.new("RGB", (width + STRIP, height + 2 * STRIP), "white")
    canvas.paste(Image.fromarray((sheet * 255).round().byte().numpy()), (STRIP, 2 * STRIP))
    draw = ImageDraw.Draw(canvas)
    draw.text((STRIP, 2), f"noise level {level:.2f}; rows are blocks", fill="black")
    for number, name in enumerate(PANELS):
        draw.text((STRIP + number * (width + gap) // len(PANELS), STRIP + 2), name, fill="black")
    for number, block in enumerate(blocks):
        draw.text((2, 2 * STRIP + number * (height + gap) // len(blocks)), str(block), fill="black")
    return torch.from_numpy(np.asarray(canvas).astype(np.float32) / 255)
