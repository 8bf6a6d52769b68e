"""Buckets: the sizes to which pictures are scaled, so that none is cut square. Sizes are height x width in pixels."""

import math


def bucket_sizes(resolution: int, step: int, max_aspect: float) -> list[tuple[int, int]]:
    """Return the legal sizes (height, width): multiples of `step`, about resolution^2 pixels, at most `max_aspect`.

    For every height the width whose area comes nearest, and the same turned by 90 degrees.

    Raises:
        ValueError: The resolution is not a multiple of the step.
    """
    if resolution % step or resolution < step:
        low = max(step, resolution // step * step)
        raise ValueError(
            f"resolution={resolution} is not a multiple of bucket_step={step}; nearest: {low} or {low + step}."
        )
    sizes = {(resolution, resolution)}
    for short in range(step, resolution, step):
        long = round(resolution**2 / short / step) * step
        if long / short <= max_aspect:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def nearest_size(height: int, width: int, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the size whose aspect ratio is nearest; of equals, the one with most pixels."""
    wanted = math.log(height / width)
    return min(sizes, key=lambda size: (round(abs(math.log(size[0] / size[1]) - wanted), 6), -size[0] * size[1]))
