"""Sheets of an evaluation: uncurated samples, and held-out samples beside their neighbors in training.

The second kind holds pictures of the icon sets: it is for looking at, on the user's machine. Whoever passes it on has
the duties of the licenses, which a line below it names.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from scripts.verifiers.emoji.judge import Reading
from scripts.verifiers.emoji.scores import nearest, small

CREDIT = (
    "Shows pictures of Noto Emoji (Google, Apache-2.0), Fluent Emoji (Microsoft Corporation, MIT) and Twemoji "
    "(Twitter, Inc and other contributors, CC-BY 4.0), rasterized, on recolored grounds."
)
ROWS, COLUMNS = 12, 8


def write_sheets(
    folder: Path, found: Sequence[Any], made: np.ndarray, true: np.ndarray, reading: Reading, trained: Any
) -> None:
    """Write samples-KIND.png, the first 64 samples of a kind; and neighbors.png: sample, nearest picture of training
    by pixels and by the judge, and the true picture, which training never saw.
    """
    for kind in dict.fromkeys(each.kind for each in found):
        mine = [index for index, each in enumerate(found) if each.kind == kind][: COLUMNS * COLUMNS]
        grid([[made[index]] for index in mine], [found[index].prompt for index in mine], COLUMNS).save(
            folder / f"samples-{kind}.png"
        )
    mine = np.array([index for index, each in enumerate(found) if each.kind == "pairs"][: 3 * ROWS], int)
    if len(mine):
        pixel, _ = nearest(small(made[mine]), trained.small)
        judged, _ = nearest(reading.embeddings[mine], trained.embeddings)
        rows = [
            [made[index], trained.pixels[a], trained.pixels[b], true[index]]
            for index, a, b in zip(mine, pixel, judged, strict=True)
        ]
        title = "sample | nearest of training by pixels | by the judge | true picture, never seen"
        grid(rows, [found[index].prompt for index in mine], 3, [title, CREDIT]).save(folder / "neighbors.png")


def grid(
    cells: Sequence[Sequence[np.ndarray]], texts: Sequence[str], columns: int, lines: Sequence[str] = ()
) -> Image.Image:
    """Return cells of pictures side by side, with a text under each and lines below all."""
    font, gap, line = ImageFont.load_default(), 8, 12
    side = cells[0][0].shape[0]
    width = len(cells[0]) * side + gap
    wrapped = [textwrap.wrap(text, (width - gap) // 6) for text in texts]
    height = side + gap + line * max(map(len, wrapped))
    rows = -(-len(cells) // columns)
    canvas = Image.new("RGB", (columns * width, rows * height + len(lines) * line), "white")
    pen = ImageDraw.Draw(canvas)
    for number, (pictures, words) in enumerate(zip(cells, wrapped, strict=True)):
        left, top = number % columns * width, number // columns * height
        for place, pixels in enumerate(pictures):
            canvas.paste(Image.fromarray(pixels), (left + place * side, top))
        for row, text in enumerate(words):
            pen.text((left, top + side + row * line), text, fill="black", font=font)
    for number, text in enumerate(lines):
        pen.text((0, rows * height + number * line), text, fill="black", font=font)
    return canvas
