"""Intervals, tables, strips and sheets."""

from dataclasses import dataclass

import numpy as np
import pytest

from scripts.evaluation.report import sheet, strip, table, wilson


@dataclass
class Found:
    wrong: tuple[str, ...]


def test_intervals_and_tables_are_as_published() -> None:
    low, high = wilson(95, 100)
    assert (round(low, 4), round(high, 4)) == (0.8882, 0.9785)
    assert wilson(0, 0) == (0.0, 1.0)
    text = table({"right colours": (95, 100)}, {"right colours": "figures asked for"})
    assert "95.00 %   88.82 -  97.85  95 / 100 figures asked for" in text


def test_a_sheet_frames_right_pictures_green_and_wrong_ones_red() -> None:
    picture = np.full((128, 128, 3), 255, np.uint8)
    page = np.asarray(sheet([picture, picture], ["a", "b"], [Found(()), Found(("no red heart",))]))
    assert page[4, 20, 1] > page[4, 20, 0] and page[4, page.shape[1] // 2 + 20, 0] > 150
    with pytest.raises(ValueError, match="at least 1"):
        sheet([], [], [])


def test_a_strip_shows_first_and_last():
    pictures = np.arange(17, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3)
    assert strip(pictures, 9)[0, ::4, 0].tolist() == list(range(0, 17, 2))
