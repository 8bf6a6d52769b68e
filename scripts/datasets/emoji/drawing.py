"""From SVG to pixels: RGBA with straight alpha, 128 x 128; and plain grounds behind them."""

import io

import numpy as np
from PIL import Image

SIZE = 128
# The 3D set thresholds alpha, so its edges are jagged: it is drawn larger and averaged.
OVERSAMPLED = {"fluent": 2}
SCALED = {"twemoji": 0.9}  # it fills the canvas; the others have a margin
WHITE = "white"
GROUNDS = {  # name -> sRGB
    "red": (214, 52, 52),
    "orange": (245, 146, 46),
    "yellow": (250, 216, 70),
    "green": (74, 164, 82),
    "blue": (66, 122, 214),
    "purple": (142, 84, 184),
    "pink": (247, 158, 190),
    "brown": (130, 88, 58),
    "gray": (150, 150, 150),
    "black": (24, 24, 24),
}
COLORS = {WHITE: (255, 255, 255), **GROUNDS}


def draw(svg: str, style: str, size: int = SIZE) -> np.ndarray:
    """Return an icon as sRGB bytes with straight alpha (H, W, 4).

    Raises:
        ValueError: resvg-py is not installed, or cannot read the SVG.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise ValueError('drawing emoji needs resvg-py: python -m pip install ".[emoji]".') from error
    factor, scale = OVERSAMPLED.get(style, 1), SCALED.get(style, 1.0)
    inner = round(size * scale)
    content = resvg_py.svg_to_bytes(
        svg_string=svg, width=inner * factor, height=inner * factor, skip_system_fonts=True
    )
    with Image.open(io.BytesIO(bytes(content))) as image:
        pixels = np.asarray(image.convert("RGBA"))
    if factor > 1:
        pixels = smaller(pixels, factor)
    before = (size - inner) // 2
    after = size - inner - before
    return np.pad(pixels, ((before, after), (before, after), (0, 0)))


def smaller(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Return RGBA bytes averaged over factor x factor pixels; colors count by their alpha."""
    height, width, _ = pixels.shape
    blocks = pixels.reshape(height // factor, factor, width // factor, factor, 4).astype(np.float32)
    alpha = blocks[..., 3:]
    covered = alpha.sum((1, 3))
    color = (blocks[..., :3] * alpha).sum((1, 3)) / np.maximum(covered, 1e-6)
    return np.concatenate([color, covered / factor**2], -1).round().astype(np.uint8)


def on_ground(pixels: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Return RGBA bytes (..., 4) laid on a plain color, as RGB bytes (..., 3)."""
    alpha = pixels[..., 3:].astype(np.float32) / 255
    return (pixels[..., :3] * alpha + np.array(color, np.float32) * (1 - alpha)).round().astype(np.uint8)


def visibility(pixels: np.ndarray, color: tuple[int, int, int]) -> float:
    """Return how much an icon stands out from a ground: RMS difference over every fourth pixel, 0 to 1."""
    pixels = pixels[::4, ::4]
    difference = on_ground(pixels, color).astype(np.float32) - np.array(color, np.float32)
    return float(np.sqrt((difference**2).mean()) / 255)
