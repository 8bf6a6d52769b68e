"""The models of the paper, by their width: what weights alone do not show."""

from typing import NamedTuple


class Size(NamedTuple):
    """One of the paper's models (Table 4)."""

    name: str
    layers: int
    heads: int


KNOWN_SIZES = {  # width -> size
    288: Size("S", 10, 6),
    640: Size("B", 12, 10),
    864: Size("L", 28, 12),
    1152: Size("XL", 28, 16),
    1440: Size("H", 30, 20),
}
LARGEST_SIDE = 2**30  # pixels or frames; no machine comes near, and floats still count them
OFFICIAL_BASE_TOKENS = 1024  # tokens of a picture at which the time shift is 1 (512 x 512 pixels)
