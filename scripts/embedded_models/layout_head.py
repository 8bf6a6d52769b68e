"""An auxiliary loss: a middle block predicts what stands at each token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.datasets.shapes import BACKGROUNDS


class LayoutHead(torch.nn.Module):
    """Predicts what stands at each token from the output of a middle block; not part of the exported model.

    So the blocks before it learn figures instead of textures, as with representation alignment (arXiv 2410.06940),
    but with the scene of the data set in place of the features of another network.

    Args:
        block: The middle block; its output is (B, N, width).
        width: Of its tokens.
        kinds: How many kinds of objects there are beside the background.
        numbers: How many numbers the layout has of each token.
    """

    def __init__(self, block: torch.nn.Module, width: int, kinds: int, numbers: int) -> None:
        super().__init__()
        self.sizes = [kinds + 1, len(BACKGROUNDS), numbers]
        self.read = torch.nn.Sequential(
            torch.nn.LayerNorm(width),
            torch.nn.Linear(width, width),
            torch.nn.GELU(),
            torch.nn.Linear(width, sum(self.sizes)),
        )
        block.register_forward_hook(self.keep)

    def keep(self, block: torch.nn.Module, arguments: tuple, output: Tensor) -> None:
        """Keep the block's output (B, N, width) until `loss`."""
        self.tokens = output

    def loss(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return cross entropies of kind and color plus the error of the numbers, and the share of right kinds.

        Args:
            targets: (B, N, 2 + numbers), see `scripts.datasets.layouts`.
        """
        kinds, colors, numbers = self.read(self.tokens).float().split(self.sizes, dim=-1)
        kind, color = targets[..., 0].long(), targets[..., 1].long()
        figure = kind > 0
        error = F.cross_entropy(kinds.flatten(0, 1), kind.flatten())
        error = error + F.cross_entropy(colors.flatten(0, 1), color.flatten())
        distance = F.smooth_l1_loss(numbers, targets[..., 2:], reduction="none").mean(-1)
        right = (kinds.argmax(-1) == kind) & figure
        self.tokens = None
        return error + (distance * figure).sum() / figure.sum().clamp(min=1), right.sum() / figure.sum().clamp(min=1)
