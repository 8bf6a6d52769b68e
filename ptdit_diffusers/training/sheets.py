"""The sheet of a run: the pictures of all prompts, at several steps, as one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ptdit_diffusers.core.files import new_file


def write_sheet(folder: Path, target: Path, columns: Mapping[str, str], prompts: Sequence[str]) -> None:
    """Write one picture of all: a row per prompt, a column per step.

    Args:
        folder: Of the pictures.
        target: The sheet.
        columns: What stands above a column -> beginning of the names of its pictures, `NAME-ROW.png`; columns that
            lack one, or whose pictures say in their metadata that they are of other prompts, are left out.
        prompts: One for each row.
    """
    shown = {title: name for title, name in columns.items() if _is_of(folder, name, prompts)}
    if not shown or not prompts:
        return
    pictures = [[Image.open(folder / f"{name}-{row}.png") for name in shown.values()] for row in range(len(prompts))]
    width = max(picture.width for row in pictures for picture in row)
    heights = [max(picture.height for picture in row) for row in pictures]
    tops = [16 + sum(heights[:row]) + 18 * row for row in range(len(prompts) + 1)]
    sheet = Image.new("RGB", (len(shown) * (width + 4), tops[-1]), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(shown):
        pen.text((column * (width + 4) + 2, 2), title, fill="black")
        for row in range(len(prompts)):
            sheet.paste(pictures[row][column], (column * (width + 4), tops[row]))
    for row, prompt in enumerate(prompts):
        pen.text((2, tops[row] + heights[row] + 2), prompt, fill="black")
    with new_file(target) as temporary:
        sheet.save(temporary, format="PNG")


def _is_of(folder: Path, name: str, prompts: Sequence[str]) -> bool:
    for row, prompt in enumerate(prompts):
        file = folder / f"{name}-{row}.png"
        if not file.is_file():
            return False
        with Image.open(file) as picture:
            if not prompt.startswith(picture.info.get("prompt", "")):  # options may stand behind its text
                return False
    return True


def step_name(step: int) -> str:
    """Return the beginning of the names of the pictures of a step."""
    return f"step-{step:08d}"
