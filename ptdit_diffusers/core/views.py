"""Views of an object: the azimuth of each, and all of them on one contact sheet."""

import math
from collections.abc import Sequence

import PIL.Image


def azimuths(num_views: int) -> list[float]:
    """Return the azimuth of each view in degrees, i * 360 / num_views; the first view is the front."""
    return [index * 360 / num_views for index in range(num_views)]


def sheet_columns(count: int) -> int:
    """Return the columns of the squarest sheet of `count` images that has no empty cells.

    If that is more than 3 times as wide as high, return those of the squarest sheet of all.
    """
    least = math.ceil(math.sqrt(count))
    full = next(columns for columns in range(least, count + 1) if count % columns == 0)
    return full if full <= 3 * (count // full) else least


def contact_sheet(views: Sequence[PIL.Image.Image], columns: int | None = None) -> PIL.Image.Image:
    """Return all views (or frames) on one image, row by row; cells that stay empty are white.

    Args:
        views: Images of one size, e.g. `output.views[0]`.
        columns: Images in a row; default `sheet_columns`, e.g. 4 for 8 images.

    Raises:
        ValueError: There are no images, they differ in size, or `columns` is not an integer of at least 1.
    """
    sizes = {view.size for view in views}
    if len(sizes) != 1:
        raise ValueError(f"a contact sheet needs images of one size; got {sorted(sizes) or 'none'}.")
    columns = sheet_columns(len(views)) if columns is None else columns
    if not isinstance(columns, int) or columns < 1:
        raise ValueError(f"columns={columns!r} must be an integer of at least 1; nearest: 1.")
    (width, height), rows = views[0].size, math.ceil(len(views) / columns)
    sheet = PIL.Image.new("RGB", (columns * width, rows * height), "white")
    for index, view in enumerate(views):
        sheet.paste(view, (index % columns * width, index // columns * height))
    return sheet
