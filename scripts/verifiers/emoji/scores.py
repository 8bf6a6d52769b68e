"""Numbers of a judge's readings: shares that are right, distances to training pictures, distances between sets.

Letters: N pictures, M training pictures, D features.
"""

from dataclasses import dataclass

import numpy as np

from scripts.verifiers.emoji.judge import Reading

SMALL = 32  # pixels a side at which pictures are compared
SUBSETS, SUBSET = 50, 100  # of the kernel distance


@dataclass(frozen=True)
class Asked:
    """What N pictures should show: numbers of concepts, styles and tones; -1 = not asked."""

    concepts: np.ndarray
    styles: np.ndarray
    tones: np.ndarray


def concept_credit(reading: Reading, asked: Asked, twins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return credit of each picture (N,) for the first concept and for the first five.

    Args:
        reading, asked: What is there and what should be.
        twins: (K,) group of near-duplicates of each concept; another concept of the right group counts half.
    """
    right = reading.concepts == asked.concepts[:, None]
    twin = twins[reading.concepts] == twins[asked.concepts][:, None]
    credit = np.where(right, 1.0, np.where(twin, 0.5, 0.0))
    return credit[:, 0], credit.max(1)


def shares(
    reading: Reading, asked: Asked, twins: np.ndarray, backgrounds: np.ndarray | None = None
) -> dict[str, float]:
    """Return the shares of pictures that are right, by what is right.

    Args:
        reading, asked, twins: As for `concept_credit`.
        backgrounds: (N,) bool, whether the ground is right, where it is asked.
    """
    first, five = concept_credit(reading, asked, twins)
    style, tone = reading.styles == asked.styles, reading.tones == asked.tones
    found = {"concept": first, "concept_5": five, "style": style, "both": first * style}
    if (asked.tones > 0).any():
        found |= {"tone": tone, "concept_tone": first * tone}
    if backgrounds is not None:
        found |= {"ground": backgrounds, "all": first * style * backgrounds}
    return {name: float(np.mean(values)) for name, values in found.items()}


def small(pictures: np.ndarray) -> np.ndarray:
    """Return pictures, bytes (N, S, S, 3), as rows of few pixels (N, SMALL * SMALL * 3).

    They are scaled so that the distance of two rows is the root mean square of their differences, colors being 0 to 1.
    """
    count, side = len(pictures), pictures.shape[1]
    blocks = pictures.reshape(count, SMALL, side // SMALL, SMALL, side // SMALL, 3)
    rows = (blocks.mean((2, 4), dtype=np.float32) / 255).reshape(count, -1)
    return rows / rows.shape[1] ** 0.5


def nearest(rows: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return number and distance of the nearest of M known rows to each row (N, D)."""
    squares = (rows**2).sum(1)[:, None] + (known**2).sum(1) - 2 * rows @ known.T
    best = squares.argmin(1)
    return best, np.sqrt(np.maximum(squares[np.arange(len(rows)), best], 0))


def kernel_distance(one: np.ndarray, other: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the kernel inception distance (arXiv 1801.01401) x 1000 of features (N, D), and its standard deviation.

    The features are those of a judge, not of Inception: numbers compare only among themselves.
    """
    choice, size = np.random.default_rng(seed), min(SUBSET, len(one), len(other))
    found = []
    for _ in range(SUBSETS):
        x, y = (rows[choice.choice(len(rows), size, replace=False)].astype(np.float64) for rows in (one, other))
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        inner = sum((k.sum() - np.trace(k)) / (size * (size - 1)) for k in (xx, yy))
        found.append(inner - 2 * xy.mean())
    return 1000 * float(np.mean(found)), 1000 * float(np.std(found))


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the Frechet distance (arXiv 1706.08500) of features (N, D) of two sets, as if they were normal.

    It grows with few pictures: compare only distances of sets of the same sizes, in features of the same judge.
    """
    means = [rows.astype(np.float64).mean(0) for rows in (one, other)]
    covariances = [np.cov(rows.astype(np.float64), rowvar=False) for rows in (one, other)]
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    mixed = np.linalg.eigvalsh(root @ covariances[1] @ root)  # of the same eigenvalues as the product of both
    spread = sum(map(np.trace, covariances)) - 2 * np.sqrt(mixed.clip(0)).sum()
    return float(((means[0] - means[1]) ** 2).sum() + spread)


def ground_color(pictures: np.ndarray) -> np.ndarray:
    """Return the color of the border of pictures, bytes (N, S, S, 3): the median of 4 pixels all around, (N, 3)."""
    edge = np.ones(pictures.shape[1:3], bool)
    edge[4:-4, 4:-4] = False
    return np.median(pictures[:, edge], axis=1)
