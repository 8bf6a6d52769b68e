"""Near-duplicates by average hash: 8 x 8 pixels, each above or below the mean of its color channel."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

ALIKE = 6  # of 192 bits, at most, differ between near-duplicates
FLAT = 4  # of 255: differences from the mean that count as none, so that a plain area has one hash
COMPARED = 20_000  # pictures at most that are compared with each other; of more, equal hashes make a group


def average_hash(picture: Image.Image) -> tuple[int, int, int]:
    """Return 64 bits for each of red, green and blue of an RGB picture."""
    small = np.asarray(picture.resize((8, 8), Image.Resampling.BOX), np.float32)
    bits = small > small.mean(axis=(0, 1)) + FLAT
    return tuple(int.from_bytes(np.packbits(bits[..., channel]).tobytes(), "big") for channel in range(3))


def grouped(hashes: np.ndarray) -> np.ndarray:
    """Return the group (N,) uint64 of each picture; near-duplicates, and what lies between them, share one.

    The number of a group is made of the smallest hash in it, so that it stays when other pictures come or go.

    Args:
        hashes: (N, 3) uint64, from `average_hash`.
    """
    _, first, group = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    group, kinds = group.reshape(-1), hashes[first]
    if 1 < len(kinds) <= COMPARED:
        parent = np.arange(len(kinds))
        for number in range(len(kinds)):
            near = np.flatnonzero(distances(kinds[number], kinds[number + 1 :]) <= ALIKE) + number + 1
            for other in near:
                a, b = _root(parent, number), _root(parent, int(other))
                parent[max(a, b)] = min(a, b)
        group = np.array([_root(parent, number) for number in range(len(kinds))])[group]
    numbers = np.zeros(len(kinds), np.uint64)
    for channel in kinds.T:
        numbers = scrambled(numbers ^ channel)
    return numbers[group]


def joined(groups: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return groups (N,) uint64 that also hold together what has the same name; "" is no name.

    Args:
        groups: (N,) from `grouped`.
        names: One of each picture.
    """
    if not any(names):
        return groups
    numbers, group = np.unique(groups, return_inverse=True)
    parent, first = np.arange(len(numbers)), {}
    for name, number in zip(names, group.tolist(), strict=True):
        if name:
            a, b = _root(parent, first.setdefault(name, number)), _root(parent, number)
            parent[max(a, b)] = min(a, b)
    return numbers[[_root(parent, number) for number in range(len(numbers))]][group]


def scrambled(values: np.ndarray) -> np.ndarray:
    """Return 64-bit numbers mixed so that their order says nothing (splitmix64's finalizer)."""
    values = values.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))


def distances(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return in how many bits each of `others` (N, 3) differs from `one` (3,)."""
    return _BITS[(one ^ others).view(np.uint8)].sum(axis=1, dtype=np.int64)


_BITS = np.array([bin(value).count("1") for value in range(256)], np.uint8)


def _root(parent: np.ndarray, number: int) -> int:
    while parent[number] != number:
        parent[number] = parent[parent[number]]
        number = int(parent[number])
    return number
