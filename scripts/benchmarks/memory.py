"""Peak bytes of tensors that live at the same time: counted on any device, and by formula.

Buffers inside kernels are not seen.
"""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts storages made inside the context: `peak` bytes at once. Weights and inputs do not count."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.untyped_storage()._cdata not in before:
                storage = leaf.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def forward_bytes(tokens: int, dim: int, number: int) -> int:
    """Peak of one forward above the weights: 11 tensors of all tokens, in the shifted windows of a long video.

    Args:
        tokens: Batch times latent frames times rows times columns.
        dim: Width.
        number: Bytes of a number.
    """
    return 11 * tokens * dim * number


def decode_bytes(tile: int, frames: int, number: int, hidden_size: int = 128) -> int:
    """Peak of decoding one tile: 8 tensors of the full resolution, and the frames that layers carry over.

    Args:
        tile: Side in pixels.
        frames: Frames of a tile, 9 or more.
        number: Bytes of a number.
        hidden_size: Channels of the VAE at full resolution.
    """
    return (8 * frames + 45) * hidden_size * tile**2 * number


def video_bytes(frames: int, pixels: int) -> int:
    """The finished video in fp32 and two copies of it, as the pipeline turns it into pictures."""
    return 3 * frames * 3 * pixels**2 * 4
