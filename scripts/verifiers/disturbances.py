"""Disturbances of true samples (F, H, W, 3) of bytes: harmless ones that a verifier must bear, and those that make
them wrong. Their random numbers come from the generator that is passed.
"""

from io import BytesIO

import numpy as np
from PIL import Image
from scipy import ndimage

from scripts.datasets.registry import DATA_SETS


def unchanged(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the pictures as they are."""
    return pictures


# --- harmless --------------------------------------------------------------------------------------------------------


def blur(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur with a sigma of 0.7 pixels."""
    return ndimage.gaussian_filter(pictures.astype(float), (0, 0.7, 0.7, 0)).round().astype(np.uint8)


def compress(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """JPEG at quality 75 with full color resolution: ringing and blocks, as decoders of small latents leave them."""
    return np.stack([_as_jpeg(picture) for picture in pictures])


def _as_jpeg(picture: np.ndarray) -> np.ndarray:
    file = BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=75, subsampling=0)
    return np.asarray(Image.open(file).convert("RGB"))


def add_noise(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add normal noise with a sigma of 4 bytes."""
    return np.clip(pictures + rng.normal(0, 4, pictures.shape), 0, 255).astype(np.uint8)


def recolor(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scale and move each channel by up to 5 %."""
    scale, move = rng.uniform(0.95, 1.05, 3), rng.uniform(-0.05, 0.05, 3) * 128
    return np.clip(pictures * scale + move, 0, 255).astype(np.uint8)


def blur_recolor_compress(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply three disturbances one after another."""
    return compress(recolor(blur(pictures, rng), rng), rng)


def soften(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur by 1 pixel in 64 and add noise of 4 bytes: pictures as a small model leaves them."""
    sigma = pictures.shape[1] / 64
    blurred = ndimage.gaussian_filter(pictures.astype(float), (0, sigma, sigma, 0))
    return np.clip(blurred + rng.normal(0, 4, pictures.shape), 0, 255).round().astype(np.uint8)


# --- wrong -----------------------------------------------------------------------------------------------------------


def freeze(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Repeat the first picture."""
    return np.repeat(pictures[:1], len(pictures), axis=0)


def reverse_but_first(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Reverse the order of all pictures but the first."""
    return np.concatenate([pictures[:1], pictures[:0:-1]])


def shuffle(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Leave no picture where it was."""
    order = rng.permutation(len(pictures))
    while (order == np.arange(len(order))).any():
        order = rng.permutation(len(pictures))
    return pictures[order]


def exchange_one_view(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Put one view of another object among the others."""
    views, number = DATA_SETS["views"], int(rng.integers(len(pictures)))
    other = views.render(views.sample(rng, None), pictures.shape[1], len(pictures))
    return np.concatenate([pictures[:number], other[number : number + 1], pictures[number + 1 :]])
