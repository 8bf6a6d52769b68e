"""A training aid: what stands at each token, read off a middle block. Must not know the loop or the stages."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from scripts.datasets.shapes import BACKGROUNDS


class LayoutHead(torch.nn.Module):
    """Reads off a middle block what stands at each token; a training aid that is not part of the exported model.

    It teaches the blocks before it to know figures instead of textures, in the manner of representation alignment
    (arXiv 2410.06940), with the drawn scene in place of another network's features.

    Args:
        transformer: Whose middle block is read.
        kinds: How many kinds of things there are beside the background.
        numbers: How many numbers the layout has of each token.
    """

    def __init__(self, transformer: PTDiTTransformer3DModel, kinds: int, numbers: int) -> None:
        super().__init__()
        blocks = transformer.transformer_blocks
        width = transformer.proj_out.in_features
        self.sizes = [kinds + 1, len(BACKGROUNDS), numbers]
        self.read = torch.nn.Sequential(
            torch.nn.LayerNorm(width),
            torch.nn.Linear(width, width),
            torch.nn.GELU(),
            torch.nn.Linear(width, sum(self.sizes)),
        )
        blocks[(len(blocks) - 1) // 2].register_forward_hook(self.keep)

    def keep(self, block: torch.nn.Module, arguments: tuple, output: Tensor) -> None:
        """Remember the block's output (B, N, D) until `loss`."""
        self.tokens = output

    def loss(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropies of kind and colour plus the error of the numbers, and the share of right kinds on figures.

        Args:
            targets: (B, N, 2 + numbers), see `scripts.datasets.layouts`.
        """
        kinds, colours, numbers = self.read(self.tokens).float().split(self.sizes, dim=-1)
        kind, colour = targets[..., 0].long(), targets[..., 1].long()
        figure = kind > 0
        error = F.cross_entropy(kinds.flatten(0, 1), kind.flatten())
        error = error + F.cross_entropy(colours.flatten(0, 1), colour.flatten())
        distance = F.smooth_l1_loss(numbers, targets[..., 2:], reduction="none").mean(-1)
        right = (kinds.argmax(-1) == kind) & figure
        self.tokens = None
        return error + (distance * figure).sum() / figure.sum().clamp(min=1), right.sum() / figure.sum().clamp(min=1)
