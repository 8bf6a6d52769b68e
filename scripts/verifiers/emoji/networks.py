"""The networks of the judges. Letters: B pictures, S pixels a side, K concepts.

Two judges of different shape name the concept: what one of them gets wrong by habit, the other need not. A third
network, without jitter of colors in its training, names the style and the tone of the skin.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONCEPT_SIZE = 48  # pixels a side that the concept is read from
STYLE_SIZE = 128
EMBEDDING = 256
SCALE = 20.0  # of the cosines before the softmax
RESIDUAL, PLAIN = "residual", "plain"
STYLES, TONES = 4, 6


def mean_and_max(maps: Tensor) -> Tensor:
    """Return both over the places of maps (B, C, h, w): (B, 2 C)."""
    return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut; halves the sides where the stride is 2."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        )
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels))
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(maps))) + self.shortcut(maps))


def plain_block(channels_in: int, channels: int) -> nn.Sequential:
    """Return a convolution, and the largest of 2 x 2 places."""
    conv = nn.Conv2d(channels_in, channels, 3, 1, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2))


class ConceptNetwork(nn.Module):
    """Names the concept of a picture by the cosine of its embedding with a vector of each concept."""

    def __init__(self, concepts: int, shape: str = RESIDUAL) -> None:
        super().__init__()
        self.shape = shape
        stem = nn.Sequential(nn.Conv2d(3, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        if shape == RESIDUAL:
            blocks = [ResidualBlock(a, b, s) for a, b, s in ((32, 32, 1), (32, 64, 2), (64, 128, 2), (128, 256, 2))]
        else:
            blocks = [plain_block(a, b) for a, b in ((32, 96), (96, 192), (192, 256))]
        self.body = nn.Sequential(stem, *blocks)
        self.embed = nn.Linear(512, EMBEDDING)
        self.concepts = nn.Parameter(torch.randn(concepts, EMBEDDING) / EMBEDDING**0.5)  # short ones turn faster

    def features(self, pixels: Tensor) -> Tensor:
        """Return features (B, 512) of pictures (B, 3, S, S) in 0..1."""
        return mean_and_max(self.body(pixels * 2 - 1))

    def embedding(self, features: Tensor) -> Tensor:
        """Return unit vectors (B, EMBEDDING)."""
        return F.normalize(self.embed(features), dim=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return how likely each concept is (B, K), as logits."""
        return SCALE * self.embedding(self.features(pixels)) @ F.normalize(self.concepts, dim=1).T


class StyleNetwork(nn.Module):
    """Names the style and the tone of the skin."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
        blocks = [ResidualBlock(a, b, s) for a, b, s in ((32, 48, 2), (48, 96, 2), (96, 128, 2))]
        self.body = nn.Sequential(stem, *blocks)
        self.style = nn.Linear(256, STYLES)
        self.tone = nn.Linear(256, TONES)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of styles (B, STYLES) and tones (B, TONES) of pictures (B, 3, S, S) in 0..1."""
        features = mean_and_max(self.body(pixels * 2 - 1))
        return self.style(features), self.tone(features)
