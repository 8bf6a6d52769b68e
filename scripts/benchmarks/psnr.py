"""Peak signal-to-noise ratio."""

import math

import numpy as np


def psnr(found: np.ndarray, expected: np.ndarray, peak: float = 1.0) -> float:
    """Return the peak signal-to-noise ratio in decibels; infinite for equal values."""
    error = np.square(found.astype(np.float64) - expected).mean()
    return 20 * math.log10(peak) - 10 * math.log10(error) if error else math.inf
