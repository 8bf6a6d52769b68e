"""A training aid: what stands at each token, read off a middle block. Must not know the loop or the stages."""

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from scripts.drawn_world import BACKGROUNDS, SHAPES, Scene


class LayoutHead(torch.nn.Module):
    """Reads off a middle block what stands at each token; a training aid that is not part of the exported model.

    It teaches the blocks before it to know figures instead of textures, in the manner of representation alignment
    (arXiv 2410.06940), with the drawn scene in place of another network's features.
    """

    def __init__(self, transformer: PTDiTTransformer3DModel) -> None:
        super().__init__()
        blocks = transformer.transformer_blocks
        width = transformer.proj_out.in_features
        self.read = torch.nn.Sequential(
            torch.nn.LayerNorm(width),
            torch.nn.Linear(width, width),
            torch.nn.GELU(),
            torch.nn.Linear(width, len(SHAPES) + 1 + len(BACKGROUNDS) + 3),
        )
        blocks[(len(blocks) - 1) // 2].register_forward_hook(self.keep)

    def keep(self, block: torch.nn.Module, arguments: tuple, output: Tensor) -> None:
        """Remember the block's output (B, N, D) until `loss`."""
        self.tokens = output

    def loss(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropies of shape and colour plus the distance error, and the share of right shapes on figures.

        Args:
            targets: (B, N, 5) from `layout_targets`.
        """
        shapes, colours, place = self.read(self.tokens).float().split([len(SHAPES) + 1, len(BACKGROUNDS), 3], dim=-1)
        shape, colour = targets[..., 0].long(), targets[..., 1].long()
        figure = shape > 0
        error = F.cross_entropy(shapes.flatten(0, 1), shape.flatten())
        error = error + F.cross_entropy(colours.flatten(0, 1), colour.flatten())
        distance = F.smooth_l1_loss(place, targets[..., 2:], reduction="none").mean(-1)
        right = (shapes.argmax(-1) == shape) & figure
        self.tokens = None
        return error + (distance * figure).sum() / figure.sum().clamp(min=1), right.sum() / figure.sum().clamp(min=1)


def layout_targets(scene: Scene, side: int) -> numpy.ndarray:
    """What stands at each of side x side tokens: float32 (side * side, 5).

    Columns: shape (0 = background, else 1 + index in SHAPES), colour (index in BACKGROUNDS), and for figures the
    centre's distance right and down and the radius, in tokens. A smaller figure hides a larger one around it.
    """
    centres = (numpy.arange(side) + 0.5) / side
    x, y = (axis.ravel() for axis in numpy.meshgrid(centres, centres))
    targets = numpy.zeros((side * side, 5), dtype=numpy.float32)
    targets[:, 1] = BACKGROUNDS.index(scene.background)
    figures = [(thing, group) for group in scene.groups for thing in group.things]
    for thing, group in sorted(figures, key=lambda item: -item[0].radius):
        here = numpy.hypot(x - thing.x, y - thing.y) < thing.radius + 0.25 / side
        targets[here, 0] = 1 + SHAPES.index(group.shape)
        targets[here, 1] = BACKGROUNDS.index(group.colour)
        targets[here, 2] = (thing.x - x[here]) * side
        targets[here, 3] = (thing.y - y[here]) * side
        targets[here, 4] = thing.radius * side
    return targets
