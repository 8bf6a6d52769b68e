"""Adds up verdicts, shows them in tables with intervals and sheets of pictures with prompts, and writes these files.

Owns rates and layout; knows nothing of how pictures are read or made.
"""

import json
import platform
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from math import sqrt
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from scripts.verifiers.pictures.verdict import Verdict

Tally = dict[str, tuple[int, int]]

# Row of the table, what it is a share of.
ROWS = {
    "right colours": "figures asked for",
    "right shapes": "figures asked for",
    "right relations": "relations asked for",
    "right relations, figures right too": "relations asked for",
    "right counts": "groups asked for",
    "right sizes": "figures whose size is said",
    "right background colours": "prompts that say it",
    "right background patterns": "prompts that say it",
    "all colours right": "prompts",
    "all shapes right": "prompts",
    "all relations right": "prompts with a relation",
    "no figure too many or too few": "prompts",
    "everything right": "prompts",
}


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95 % Wilson interval (low, high) of a share, 0..1; (0, 1) when nothing was asked."""
    if asked == 0:
        return 0.0, 1.0
    z = 1.959964
    share = right / asked
    middle = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _answers(verdict: Verdict) -> dict[str, list[bool | None]]:
    """Rights and wrongs of one verdict for each row; None is not asked for."""
    colors = [item.color_right for item in verdict.objects]
    shapes = [item.shape_right for item in verdict.objects]
    relations = [item.holds for item in verdict.relations]
    return {
        "right colours": list(colors),
        "right shapes": list(shapes),
        "right relations": list(relations),
        "right relations, figures right too": [item.strict for item in verdict.relations],
        "right counts": list(verdict.counts),
        "right sizes": [item.size_right for item in verdict.objects],
        "right background colours": [verdict.background_right],
        "right background patterns": [verdict.pattern_right],
        "all colours right": [all(colors)],
        "all shapes right": [all(shapes)],
        "all relations right": [all(relations) if relations else None],
        "no figure too many or too few": [verdict.figures_right],
        "everything right": [verdict.all_right],
    }


def add_up(verdicts: Iterable[Verdict]) -> Tally:
    """(right, asked) for each row of the table."""
    return add_up_answers(map(_answers, verdicts), ROWS)


def add_up_answers(found: Iterable[Mapping[str, Sequence[bool | None]]], rows: Iterable[str]) -> Tally:
    """(right, asked) for each row, from the answers of each verdict to each row; None is not asked for."""
    sums = {row: [0, 0] for row in rows}
    for verdict in found:
        for row, answers in verdict.items():
            said = [answer for answer in answers if answer is not None]
            sums[row][0] += sum(said)
            sums[row][1] += len(said)
    return {row: (right, asked) for row, (right, asked) in sums.items()}


def table(tally: Mapping[str, tuple[int, int]], of: Mapping[str, str] = ROWS) -> str:
    """Text table of a tally: share, interval and what it is a share of."""
    lines = [f"{'':36} {'share':>8}  {'95 % interval':>16}  of"]
    for row, (right, asked) in tally.items():
        low, high = wilson(right, asked)
        share = f"{100 * right / asked:6.2f} %" if asked else "     - %"
        lines.append(f"{row:36} {share}  {100 * low:6.2f} - {100 * high:6.2f}  {right} / {asked} {of.get(row, '')}")
    return "\n".join(line.rstrip() for line in lines) + "\n"


class Judged(Protocol):
    """A verdict: one line per thing that is wrong."""

    @property
    def wrong(self) -> tuple[str, ...]: ...


def sheet(
    pictures: Sequence[np.ndarray], prompts: Sequence[str], verdicts: Sequence[Judged], columns: int = 6
) -> Image.Image:
    """Pictures in rows, each in a green (everything right) or red frame, with its prompt and what is wrong below.

    Args:
        pictures: sRGB bytes (H, W, 3), all of the same size.
        prompts: one per picture.
        verdicts: one per picture.
        columns: pictures per row.

    Raises:
        ValueError: there is no picture.
    """
    if not pictures:
        raise ValueError("a sheet of 0 pictures was asked for; it needs at least 1.")
    font = ImageFont.load_default()
    height, width = pictures[0].shape[:2]
    wide, line = max(width, 144) + 16, 12
    letters = (wide - 12) // 6
    texts = []
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        wrong = [part for text in verdict.wrong for part in textwrap.wrap(text, letters)]
        texts.append((textwrap.wrap(prompt, letters), wrong[:4]))
    high = height + 14 + line * max(len(said) + len(wrong) for said, wrong in texts)
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (wide * min(columns, len(pictures)), high * rows), "white")
    pen = ImageDraw.Draw(canvas)
    for index, (picture, (said, wrong)) in enumerate(zip(pictures, texts, strict=True)):
        left, top = index % columns * wide + 6, index // columns * high + 6
        frame = "#c81e1e" if verdicts[index].wrong else "#1e9632"
        pen.rectangle((left - 3, top - 3, left + width + 2, top + height + 2), fill=frame)
        canvas.paste(Image.fromarray(picture), (left, top))
        for number, text in enumerate(said + wrong):
            color = "black" if number < len(said) else "#c81e1e"
            pen.text((left - 2, top + height + 4 + line * number), text, fill=color, font=font)
    return canvas


def write_results(
    folder: Path,
    settings: Mapping[str, Any],
    seconds: float,
    tally: Mapping[str, tuple[int, int]],
    of: Mapping[str, str],
    rest: Mapping[str, Any],
) -> str:
    """Write results.json and table.txt of a judged model; returns the text of the table.

    Args:
        folder: To write to; exists.
        settings: Of the command.
        seconds: That making and judging took.
        tally: (right, asked) for each row of the table.
        of: What each row is a share of.
        rest: Further entries of results.json; numbers under "means" stand below the table.
    """
    packages = ("torch", "diffusers", "transformers", "numpy", "scipy", "pillow")
    summary = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "settings": dict(settings),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "table": {row: {"right": right, "asked": asked} for row, (right, asked) in tally.items()},
        **rest,
    }
    unfinished = folder / "results.json.part"
    unfinished.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(folder / "results.json")
    said = ", ".join(f"{name} {value}" for name, value in settings.items())
    means = "".join(f"mean {name}: {value:.3f}\n" for name, value in rest.get("means", {}).items())
    text = f"{said}\n{summary['date']}\n\n{table(tally, of)}{means}"
    (folder / "table.txt").write_text(text, encoding="utf-8")
    return text


def write_sheets(
    folder: Path,
    number: int,
    each: int,
    pictures: Sequence[np.ndarray],
    prompts: Sequence[str],
    verdicts: Sequence[Judged],
    columns: int = 6,
) -> None:
    """Write sheet_01.png and so on: at most `number` sheets of `each` pictures, the first ones, not chosen."""
    for page in range(min(number, -(-len(pictures) // each))):
        part = slice(page * each, (page + 1) * each)
        sheet(pictures[part], prompts[part], verdicts[part], columns).save(folder / f"sheet_{page + 1:02d}.png")
