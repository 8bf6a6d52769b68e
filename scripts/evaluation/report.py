"""Results of an evaluation: tables of shares with intervals, sheets of samples with their prompts, and their files."""

import textwrap
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from ptdit_diffusers.core.files import replace_json
from scripts.evaluation.records import now, versions

PACKAGES = ("torch", "diffusers", "transformers", "numpy", "scipy", "pillow")
SHOWN = 9  # pictures of a strip on a sheet at most


def wilson(right: int, asked: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval (low, high) of a share, 0..1; (0, 1) when nothing was asked."""
    if asked == 0:
        return 0.0, 1.0
    z = 1.959964
    share = right / asked
    middle = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def table(tally: Mapping[str, tuple[int, int]], of: Mapping[str, str]) -> str:
    """Return a text table of a tally: share, interval and what it is a share of (`of`, by row)."""
    lines = [f"{'':36} {'share':>8}  {'95 % interval':>16}  of"]
    for row, (right, asked) in tally.items():
        low, high = wilson(right, asked)
        share = f"{100 * right / asked:6.2f} %" if asked else "     - %"
        lines.append(f"{row:36} {share}  {100 * low:6.2f} - {100 * high:6.2f}  {right} / {asked} {of.get(row, '')}")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def strip(pictures: np.ndarray, most: int | None = None) -> np.ndarray:
    """Return pictures (F, H, W, 3) side by side (H, n * W, 3), at most `most` of them, first and last included."""
    if most is not None and len(pictures) > most:
        pictures = pictures[np.linspace(0, len(pictures) - 1, most).round().astype(int)]
    return rearrange(pictures, "f h w c -> h (f w) c")


class Verdict(Protocol):
    """What a verifier found: one line per mistake."""

    @property
    def wrong(self) -> tuple[str, ...]: ...


def sheet(
    pictures: Sequence[np.ndarray], prompts: Sequence[str], verdicts: Sequence[Verdict], columns: int = 6
) -> Image.Image:
    """Set pictures in rows, each in a green (everything right) or red frame, with its prompt and what is wrong below.

    Args:
        pictures: sRGB bytes (H, W, 3), all of the same size.
        prompts: one per picture.
        verdicts: one per picture.
        columns: pictures per row.

    Raises:
        ValueError: there is no picture.
    """
    if not pictures:
        raise ValueError("a sheet of 0 pictures; it needs at least 1.")
    font = ImageFont.load_default()
    height, width = pictures[0].shape[:2]
    cell_width, line_height = max(width, 144) + 16, 12
    letters = (cell_width - 12) // 6
    texts = []
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        wrong = [part for text in verdict.wrong for part in textwrap.wrap(text, letters)]
        texts.append((textwrap.wrap(prompt, letters), wrong[:4]))
    cell_height = height + 14 + line_height * max(len(asked) + len(wrong) for asked, wrong in texts)
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (cell_width * min(columns, len(pictures)), cell_height * rows), "white")
    pen = ImageDraw.Draw(canvas)
    for index, (picture, (asked, wrong)) in enumerate(zip(pictures, texts, strict=True)):
        left, top = index % columns * cell_width + 6, index // columns * cell_height + 6
        frame = "#c81e1e" if verdicts[index].wrong else "#1e9632"
        pen.rectangle((left - 3, top - 3, left + width + 2, top + height + 2), fill=frame)
        canvas.paste(Image.fromarray(picture), (left, top))
        for number, text in enumerate(asked + wrong):
            color = "black" if number < len(asked) else "#c81e1e"
            pen.text((left - 2, top + height + 4 + line_height * number), text, fill=color, font=font)
    return canvas


def write_results(
    folder: Path,
    settings: Mapping[str, Any],
    seconds: float,
    tally: Mapping[str, tuple[int, int]],
    of: Mapping[str, str],
    rest: Mapping[str, Any],
) -> str:
    """Write results.json and table.txt of an evaluated model; return the text of the table.

    Args:
        folder: To write to; exists.
        settings: Of the command.
        seconds: That generating and verifying took.
        tally: (right, asked) for each row of the table.
        of: What each row is a share of.
        rest: Further entries of results.json; numbers under "means" stand below the table.
    """
    summary = {
        "date": now(),
        "seconds": round(seconds, 1),
        "settings": dict(settings),
        "versions": versions(PACKAGES),
        "table": {row: {"right": right, "asked": asked} for row, (right, asked) in tally.items()},
        **rest,
    }
    replace_json(folder / "results.json", summary)
    heading = ", ".join(f"{name} {value}" for name, value in settings.items())
    means = "".join(f"mean {name}: {value:.3f}\n" for name, value in rest.get("means", {}).items())
    text = f"{heading}\n{summary['date']}\n\n{table(tally, of)}{means}"
    (folder / "table.txt").write_text(text, encoding="utf-8")
    return text


def write_sheets(
    folder: Path,
    number: int,
    each: int,
    samples: Sequence[np.ndarray],
    prompts: Sequence[str],
    verdicts: Sequence[Verdict],
    columns: int,
) -> None:
    """Write sheet_01.png and so on: at most `number` sheets of `each` samples (F, H, W, 3), the first, not chosen."""
    for page in range(min(number, -(-len(samples) // each))):
        part = slice(page * each, (page + 1) * each)
        strips = [strip(pictures, SHOWN) for pictures in samples[part]]
        sheet(strips, prompts[part], verdicts[part], columns).save(folder / f"sheet_{page + 1:02d}.png")
