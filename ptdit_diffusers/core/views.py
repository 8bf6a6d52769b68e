"""What to do with the views of an object: which azimuth each one shows, and all of them on one sheet.

It must not know how views are made.
"""

import math
from collections.abc import Sequence

import PIL.Image


def azimuths(num_views: int) -> list[float]:
    """Degrees from which the views are seen, i * 360 / num_views; the first one is the front."""
    return [index * 360 / num_views for index in range(num_views)]


def sheet_columns(count: int) -> int:
    """Columns of the squarest sheet of `count` pictures without empty cells; with some if that is 3 times as wide."""
    least = math.ceil(math.sqrt(count))
    full = next(columns for columns in range(least, count + 1) if count % columns == 0)
    return full if full <= 3 * (count // full) else least


def contact_sheet(views: Sequence[PIL.Image.Image], columns: int | None = None) -> PIL.Image.Image:
    """All views (or frames) on one picture, row by row; cells that stay empty are white.

    Args:
        views: Pictures of one size, e.g. `output.views[0]`.
        columns: Pictures in a row; default `sheet_columns`, e.g. 4 for 8 pictures.

    Raises:
        ValueError: There are no pictures, they differ in size, or `columns` is not an integer of at least 1.
    """
    sizes = {view.size for view in views}
    if len(sizes) != 1:
        raise ValueError(f"a contact sheet needs pictures of one size; got {sorted(sizes) or 'none'}.")
    columns = sheet_columns(len(views)) if columns is None else columns
    if not isinstance(columns, int) or columns < 1:
        raise ValueError(f"columns={columns!r} must be an integer of at least 1; nearest: 1.")
    (width, height), rows = views[0].size, math.ceil(len(views) / columns)
    sheet = PIL.Image.new("RGB", (columns * width, rows * height), "white")
    for index, view in enumerate(views):
        sheet.paste(view, (index % columns * width, index // columns * height))
    return sheet
